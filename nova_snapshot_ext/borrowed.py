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

import contextlib
import os
import stat

from nova_snapshot_ext import disk as disks_
from nova_snapshot_ext import exception
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import power
from nova_snapshot_ext import undo


@undo.step
def restore_owner(around: undo.Surroundings, path: str, uid: int,
                  gid: int) -> None:
    """Give a disk back to whom it belonged, unless its guest runs.

    libvirt owns the disks of a running guest; those of a guest that is gone
    may be another host's by now, and what is no disk of the guest any more
    another guest's. A device was made anew when the host was
    booted, with an owner of its own.
    """
    if power.is_gone(around) or power.running_guest(around) is not None:
        return
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return
    assert around.guest is not None
    # An older release wrote down what the path leads to.
    real = os.path.realpath(path)
    if not (around.rebooted and stat.S_ISBLK(status.st_mode)) and (
            real in map(os.path.realpath, _paths(around.guest))):
        around.host.give_disk(real, uid, gid)


def _paths(guest: guests.Guest) -> set[str]:
    """Of the files and devices that a guest's disks are made of."""
    paths = set()
    for disk in guest.disks():
        paths.add(disk.path)
        with contextlib.suppress(exception.SnapshotError):
            paths |= {layer.path for layer in disks_.chain_of(disk)}
    return paths


def borrow(path: str, log: undo.UndoLog) -> undo.Entry:
    """Make a disk this process's own.

    :param path: as libvirt knows it. What it leads to may have another name
        after a reboot, such as /dev/dm-3
    :returns: what gives it back
    """
    status = os.stat(path)
    entry = log.push(
        restore_owner, path=path, uid=status.st_uid, gid=status.st_gid)
    log.surroundings.host.give_disk(os.path.realpath(path), os.getuid(), -1)
    return entry
