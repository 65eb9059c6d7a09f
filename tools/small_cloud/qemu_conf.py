# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""What this machine's libvirt needs in its qemu.conf while the cloud is up.

Guests move by the loopback interface. And libvirt gives every QEMU a mount
namespace and begins by changing the mount at `/`. Where `/` is a plain
directory of a chroot no guest starts: "Failed disable mount propagation out of
the root filesystem". There, and only there, the namespaces are switched off.
`down` puts back what was there.
"""

import pathlib

from small_cloud import endpoints

PATH = pathlib.Path('/etc/libvirt/qemu.conf')
FIRST, LAST = '# tools/cloud: begin\n', '# tools/cloud: end\n'


def _root_is_mounted() -> bool:
    mounts = pathlib.Path('/proc/self/mountinfo').read_text().splitlines()
    return any(line.split()[4] == '/' for line in mounts)


def _without(text: str) -> str:
    before, first, rest = text.partition(FIRST)
    return before + rest.partition(LAST)[2] if first else text


def _with(text: str) -> str:
    address = endpoints.MIGRATION
    lines = [
        f'migration_address = "{address}"',
        f'migration_host = "{address}"',
    ]
    if not _root_is_mounted():
        lines.append('namespaces = []')
    return _without(text) + FIRST + '\n'.join(lines) + '\n' + LAST


def extend() -> None:
    """To be called before libvirtd starts: it reads its file once."""
    # Not replaced as a whole, here and below: owner and mode are the
    # package's.
    PATH.write_text(_with(PATH.read_text()))


def copy(directory: pathlib.Path) -> None:
    """Write the same into another directory."""
    path = directory / PATH.name
    path.touch(mode=0o600)
    path.write_text(_with(PATH.read_text()))


def restore() -> None:
    if PATH.exists():
        PATH.write_text(_without(PATH.read_text()))
