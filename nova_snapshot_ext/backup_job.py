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

"""A backup job in pull mode: a guest's disks, exported as of one instant.

QEMU exports them over NBD (virDomainBackupBegin), and keeps what the guest
overwrites meanwhile in scratch files. Nothing of the disks is copied.
"""

import collections.abc
import contextlib
import os
from xml.etree import ElementTree

from nova_snapshot_ext import disk as disks_
from nova_snapshot_ext import exception
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import rights
from nova_snapshot_ext import scratch
from nova_snapshot_ext import undo
from nova_snapshot_ext import workspace


@undo.step
@undo.with_guest
def end_backup(around: undo.Surroundings, guest: guests.Guest,
               socket: str) -> None:
    """End the backup job that exports on our socket, and no other.

    A guest that its scratch paused goes on, whoever ended the job.
    """
    if guest.state() is not guests.State.SHUTOFF:
        scratch.end_job(guest, socket)


def obstacle(guest: guests.Guest,
             disks: collections.abc.Sequence[disks_.Disk],
             request: requests.Request) -> str | None:
    """Why there is no place for the scratch of a job, or for its socket;
    None if there is."""
    directory = request.scratch_directory
    try:
        workspace.check_directory(
            directory, '[snapshot_ext] scratch_directory')
    except exception.InvalidSetting as error:
        return str(error)
    why = workspace.why_qemu_can_not_pass(
        request.socket_directory, guest.qemu_uid())
    if why is not None:
        return why
    needed = sum(scratch.least_bytes(guest.capacity(disk.target))
                 for disk in disks)
    free = workspace.free_bytes(directory)
    if free < needed:
        return (f'its scratch needs {needed} bytes in {directory} to begin '
                f'with, where {free} are free')
    return None


@contextlib.contextmanager
def prepared(
        guest: guests.Guest, disks: collections.abc.Sequence[disks_.Disk],
        request: requests.Request, log: undo.UndoLog,
) -> collections.abc.Iterator['Job']:
    """Make what a job needs while the guest runs on, untouched.

    The undo of the job is pushed here; the job's scope ends it.
    """
    group = guest.qemu_gid()
    directory = workspace.make_directory(
        request.scratch_directory, log, group)
    sockets = workspace.make_socket_directory(request, log, group)
    capacities = {disk.target: guest.capacity(disk.target) for disk in disks}
    socket = os.path.join(sockets, 'nbd')
    # The scratch is watched from before the job begins, and for as long as it
    # may be there: also while it is undone.
    with (scratch.made(directory, capacities) as files,
          scratch.watching(guest, files, socket) as watch,
          log.scope()):
        log.push(end_backup, socket=socket)
        # QEMU makes the socket.
        rights.set_mode(sockets, 0o770)
        yield Job(guest, capacities, files, watch, socket, log)


class Job:
    """A job that is begun, and then serves."""

    def __init__(self, guest: guests.Guest, capacities: dict[str, int],
                 files: scratch.Files, watch: scratch.Watch, socket: str,
                 log: undo.UndoLog) -> None:
        """Use :func:`prepared`."""
        self._guest = guest
        self._capacities = capacities
        self._files = files
        self._watch = watch
        self._socket = socket
        self._log = log
        self._description = _description(capacities, socket, files.paths)

    def begin(self) -> None:
        """Freeze the disks of the running or paused guest.

        :raises FreezeFailed: if the scratch ran short before
        :raises NotOurs: if what is in the place of the socket is none
        """
        self._watch.check()
        self._guest.begin_backup(self._description)
        _take_over(self._socket, self._log)
        lost = self._watch.why_lost()
        if lost is not None:
            # The watch may have found no job to end.
            raise exception.FreezeFailed(lost)

    def frozen(self, consistency: frozen.Consistency,
               pause: frozen.Pause) -> frozen.Frozen:
        """The disks, once the job was begun."""
        return frozen.Frozen(
            tuple(frozen.FrozenDisk(target, capacity, self._socket, target)
                  for target, capacity in self._capacities.items()),
            consistency, pause, why_lost=self._watch.why_lost,
            by_guest=True, scratch_bytes=self._files.held_bytes)


def _take_over(socket: str, log: undo.UndoLog) -> None:
    """Have the socket that QEMU made for this process alone.

    QEMU makes it in the moment that the job begins. Who runs as QEMU's user
    may connect until this is done.

    First nobody else may reach into its directory: who runs as QEMU could
    have put a link in its place, and root would follow it; and other guests'
    QEMU run as the same user.

    :raises NotOurs: if it is no socket
    """
    rights.set_mode(os.path.dirname(socket), 0o700)
    log.surroundings.host.take_socket(socket)


def _description(capacities: dict[str, int], socket: str,
                 scratches: dict[str, str]) -> str:
    """What virDomainBackupBegin takes
    (https://libvirt.org/formatbackup.html): every disk named, or else
    libvirt would take all.
    """
    backup = ElementTree.Element('domainbackup', mode='pull')
    ElementTree.SubElement(backup, 'server', transport='unix', socket=socket)
    disks = ElementTree.SubElement(backup, 'disks')
    for target in capacities:
        disk = ElementTree.SubElement(
            disks, 'disk', name=target, backup='yes', type='file',
            exportname=target)
        ElementTree.SubElement(disk, 'driver', type=scratch.FORMAT)
        ElementTree.SubElement(disk, 'scratch', file=scratches[target])
    return ElementTree.tostring(backup, encoding='unicode')
