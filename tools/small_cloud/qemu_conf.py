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

"""QEMU's mount namespaces, which libvirt cannot make inside a chroot.

libvirt gives every QEMU a mount namespace and begins by changing the mount at
`/`. Where `/` is a plain directory of a chroot no guest starts: "Failed
disable mount propagation out of the root filesystem". There, and only there,
the namespaces are switched off; `down` switches them on again.
"""

import pathlib

PATH = pathlib.Path('/etc/libvirt/qemu.conf')
LINES = '# tools/cloud: no mount at / inside a chroot\nnamespaces = []\n'


def _root_is_mounted() -> bool:
    mounts = pathlib.Path('/proc/self/mountinfo').read_text().splitlines()
    return any(line.split()[4] == '/' for line in mounts)


def allow_chroot() -> None:
    """To be called before libvirtd starts: it reads its file once."""
    if not _root_is_mounted() and LINES not in PATH.read_text():
        with PATH.open('a') as stream:
            stream.write(LINES)


def restore() -> None:
    if PATH.exists() and LINES in (text := PATH.read_text()):
        # Not replaced as a whole: owner and mode are the package's.
        PATH.write_text(text.replace(LINES, ''))
