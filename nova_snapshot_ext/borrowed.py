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

"""A disk that belongs to this process for a while, because it must open it."""

import os
import stat

from nova_snapshot_ext import power
from nova_snapshot_ext import undo


@undo.step
def restore_owner(around: undo.Surroundings, path: str, uid: int,
                  gid: int) -> None:
    """Give a disk back to whom it belonged, unless its guest runs.

    libvirt owns the disks of a running guest; those of a guest that is gone
    may be another host's by now. A device was made anew when the host was
    booted, with an owner of its own.
    """
    if power.is_gone(around) or power.running_guest(around) is not None:
        return
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return
    if not (around.rebooted and stat.S_ISBLK(status.st_mode)):
        around.host.chown(os.path.realpath(path), uid, gid)


def borrow(path: str, log: undo.UndoLog) -> undo.Entry:
    """Make a disk this process's own.

    :param path: as libvirt knows it. What it leads to may have another name
        after a reboot, such as /dev/dm-3
    :returns: what gives it back
    """
    status = os.stat(path)
    entry = log.push(
        restore_owner, path=path, uid=status.st_uid, gid=status.st_gid)
    log.surroundings.host.chown(os.path.realpath(path), os.getuid(), -1)
    return entry
