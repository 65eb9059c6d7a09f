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

"""The guests of this cloud, as libvirt knows them."""

import pathlib
import subprocess

from small_cloud import state as cloud_state

URI = 'qemu:///system'


def _virsh(uri: str, *argv: str) -> str:
    return subprocess.run(
        ['virsh', '--quiet', '--connect', uri, *argv],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ).stdout


def names(
    state: cloud_state.State, uri: str = URI, *, running: bool = False
) -> list[str]:
    """Domains whose disks lie below this cloud's instances.

    Another cloud or a test may have domains on the same libvirtd.
    """
    return [
        name
        for name in _virsh(
            uri, 'list', '--name', *([] if running else ['--all'])
        ).split()
        if str(state.instances) in _virsh(uri, 'dumpxml', name)
    ]


def processes_left(state: cloud_state.State) -> bool:
    """Whether a QEMU runs on this cloud's disks, whatever libvirtd does."""
    needle = str(state.instances).encode()
    for entry in pathlib.Path('/proc').iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / 'cmdline').read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b'qemu-system' in command.split(b'\0')[0] and needle in command:
                return True
    return False


def destroy(state: cloud_state.State, uri: str = URI) -> list[str]:
    """Switch every guest off, as a power cut would.

    :returns: the names of those that ran.
    """
    ran = names(state, uri, running=True)
    for name in ran:
        _virsh(uri, 'destroy', name)
    return ran


def undefine(state: cloud_state.State, uri: str = URI) -> None:
    """Make libvirt forget the guests."""
    for name in names(state, uri):
        _virsh(
            uri,
            'undefine',
            name,
            '--managed-save',
            '--nvram',
            '--snapshots-metadata',
            '--checkpoints-metadata',
        )
