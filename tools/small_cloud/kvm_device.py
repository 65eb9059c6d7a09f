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

"""The permissions of /dev/kvm, where no udev sets them.

Without udev /dev/kvm belongs to root alone. libvirt then asks QEMU what it can
do with root's rights, finds KVM, finds that QEMU's own user may not open it,
throws the answer away, and asks again at every call: four seconds each, a
minute at every start of nova-compute. What follows is what Debian's udev rule
does; guests are emulated all the same. `down` puts back what was there.
"""

import json
import os
import pathlib
import shutil

from small_cloud import state as cloud_state

DEVICE = pathlib.Path('/dev/kvm')


def _record(state: cloud_state.State) -> pathlib.Path:
    return state.run / 'dev-kvm.permissions'


def allow_group(state: cloud_state.State) -> None:
    """Give the device to the group kvm, if nobody but root can open it."""
    if not DEVICE.is_char_device():
        return
    status = DEVICE.stat()
    group = 0o060 if status.st_gid else 0
    if status.st_mode & (group | 0o006):
        return
    state.write(_record(state), json.dumps(
        {'mode': status.st_mode & 0o777, 'group': status.st_gid}))
    shutil.chown(DEVICE, 'root', 'kvm')
    DEVICE.chmod(0o660)


def restore(state: cloud_state.State) -> None:
    path = _record(state)
    if not path.exists():
        return
    if DEVICE.is_char_device():
        before = json.loads(path.read_text())
        os.chown(DEVICE, 0, before['group'])
        DEVICE.chmod(before['mode'])
    path.unlink()
