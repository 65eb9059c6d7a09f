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

"""The flow ``backup``: a running guest's disks, frozen by a backup job.

libvirt's pull mode backup makes QEMU export its disks as they are at one
instant, over NBD. What the guest overwrites meanwhile is kept in scratch
files; the guest runs on, and nothing of the disk is copied on the host.
"""

import collections.abc
import contextlib
import os
import stat
from xml.etree import ElementTree

from nova_snapshot_ext import exception
from nova_snapshot_ext.flows import base
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import quiesce
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import scratch
from nova_snapshot_ext import undo
from nova_snapshot_ext import workspace


@undo.step
@undo.with_guest
def end_backup(around: undo.Surroundings, guest: guests.Guest,
               socket: str) -> None:
    """End the backup job that exports on our socket, and no other."""
    if guest.state() is not guests.State.SHUTOFF and (
            guest.backup_socket() == socket):
        scratch.end_job(guest)


class BackupFlow(base.Flow):
    """Touches the guest for the instant, and writes what it overwrites
    into the scratch directory."""

    def obstacle(self, guest: guests.Guest, disks: base.Disks,
                 request: requests.Request) -> str | None:
        return (base.why_no_job_can_start(guest, disks)
                or quiesce.obstacle(guest, request)
                or _why_no_scratch(guest, disks, request))

    @contextlib.contextmanager
    def freeze(
            self, guest: guests.Guest, disks: base.Disks,
            request: requests.Request, log: undo.UndoLog,
    ) -> collections.abc.Iterator[frozen.Frozen]:
        pause = frozen.Pause()
        with contextlib.ExitStack() as stack:
            stack.enter_context(log.scope())
            group = guest.qemu_gid()
            scratches = workspace.make_directory(
                request.scratch_directory, log, group)
            sockets = workspace.make_socket_directory(request, log, group)
            socket = os.path.join(sockets, 'nbd')
            capacities = {disk.target: guest.capacity(disk.target)
                          for disk in disks}
            files = stack.enter_context(
                scratch.made(scratches, capacities))
            log.push(end_backup, socket=socket)
            os.chmod(sockets, 0o770)
            with quiesce.quiesced(guest, request, log, pause) as outcome:
                guest.begin_backup(
                    _description(capacities, socket, files.paths))
            _take_over(socket, log)
            watch = stack.enter_context(scratch.watching(guest, files))
            yield frozen.Frozen(
                tuple(frozen.FrozenDisk(target, capacity, socket, target)
                      for target, capacity in capacities.items()),
                outcome.consistency, pause, why_lost=watch.why_lost)


def _why_no_scratch(guest: guests.Guest, disks: base.Disks,
                    request: requests.Request) -> str | None:
    """Why there is no place for the scratch of a job, None if there is."""
    directory = request.scratch_directory
    try:
        workspace.check_directory(
            directory, '[snapshot_ext] scratch_directory')
    except exception.InvalidSetting as error:
        return str(error)
    needed = sum(scratch.least_bytes(guest.capacity(disk.target))
                 for disk in disks)
    free = workspace.free_bytes(directory)
    if free < needed:
        return (f'its scratch needs {needed} bytes in {directory} to begin '
                f'with, where {free} are free')
    return None


def _take_over(socket: str, log: undo.UndoLog) -> None:
    """Have the socket that QEMU made for this process alone.

    First nobody else may reach into its directory: who runs as QEMU could
    have put a link in its place, and root would follow it; and other guests'
    QEMU run as the same user.

    :raises FreezeFailed: if it is no socket
    """
    os.chmod(os.path.dirname(socket), 0o700)
    if not stat.S_ISSOCK(os.lstat(socket).st_mode):
        raise exception.FreezeFailed(f'{socket} is not a socket')
    log.surroundings.host.chown(socket, os.getuid(), -1)


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
