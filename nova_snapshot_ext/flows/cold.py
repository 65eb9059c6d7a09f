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

"""The flow ``cold``: a guest that is off, or is stopped for a moment.

A guest that runs is stopped with its memory saved and started again. In
between, its qcow2 disks get an internal snapshot, which is read while it runs
on; what that rests on is in the documentation of the flow. Where a disk can't
hold one, a backup job is begun before the guest runs again.
"""

import collections.abc
import contextlib

from nova_snapshot_ext import backup_job
from nova_snapshot_ext import disk_source
from nova_snapshot_ext.flows import base
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import internal_snapshot
from nova_snapshot_ext import power
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo
from nova_snapshot_ext import workspace


class ColdFlow(base.Flow):
    """Touches the guest, for the moment that it is stopped, and its disks'
    tables of internal snapshots or the scratch directory."""

    def obstacle(self, guest: guests.Guest, disks: base.Disks,
                 request: requests.Request) -> str | None:
        state = guest.state()
        if state is guests.State.OTHER:
            return f'the guest is {state.value}'
        if state is guests.State.SHUTOFF:
            return base.why_not_readable(disks)
        return (base.why_no_job_can_start(guest, disks)
                or _obstacle_to_stopping(guest, request)
                or (base.why_not_readable(disks) if _hold_internally(disks)
                    else backup_job.obstacle(guest, disks, request)))

    @contextlib.contextmanager
    def freeze(
            self, guest: guests.Guest, disks: base.Disks,
            request: requests.Request, log: undo.UndoLog,
    ) -> collections.abc.Iterator[frozen.Frozen]:
        if guest.state() is guests.State.SHUTOFF:
            way = _as_it_is
        elif _hold_internally(disks):
            way = _by_internal_snapshots
        else:
            way = _by_backup_job
        with log.scope(), way(guest, disks, request, log) as found:
            yield found


def _hold_internally(disks: base.Disks) -> bool:
    return all(internal_snapshot.possible(disk) for disk in disks)


def _obstacle_to_stopping(guest: guests.Guest,
                          request: requests.Request) -> str | None:
    if not request.may_stop:
        return ('it would stop a guest that Nova owns, which Nova might '
                'then power off for good')
    if request.quiesce is requests.Quiesce.REQUIRED:
        return ('the guest must be quiesced (os_require_quiesce), and is '
                'stopped instead')
    if not guest.is_persistent():
        return 'the guest is transient: stopped, it would be gone'
    if guest.state() is guests.State.PAUSED and guest.host_devices():
        return ('it is paused, and has devices of the host that it can not '
                'let go of meanwhile')
    why = (base.why_block_job(guest, guest.disks())
           or guest.why_not_savable())
    if why is not None:
        return why
    needed = guest.memory_bytes()
    free = workspace.free_bytes(request.managed_save_directory)
    if free < needed:
        return (f'its memory may take {needed} bytes in '
                f'{request.managed_save_directory}, where {free} are free')
    return None


@contextlib.contextmanager
def _as_it_is(
        guest: guests.Guest, disks: base.Disks, request: requests.Request,
        log: undo.UndoLog) -> collections.abc.Iterator[frozen.Frozen]:
    """Read the disks of a guest that is off."""
    consistency = frozen.Consistency.CRASH
    if guest.was_shut_down() and not guest.has_managed_save():
        consistency = frozen.Consistency.STOPPED
    sources = [disk_source.DiskSource(guest, disk) for disk in disks]
    sockets = workspace.make_socket_directory(request, log)
    with contextlib.ExitStack() as stack:
        yield frozen.Frozen(
            tuple(stack.enter_context(source.serving(sockets, log))
                  for source in sources),
            consistency, frozen.Pause(), scratch_bytes=lambda: 0)


@contextlib.contextmanager
def _by_internal_snapshots(
        guest: guests.Guest, disks: base.Disks, request: requests.Request,
        log: undo.UndoLog) -> collections.abc.Iterator[frozen.Frozen]:
    # Asked while it runs: libvirt knows the chains then.
    sources = [disk_source.DiskSource(guest, disk) for disk in disks]
    sockets = workspace.make_socket_directory(request, log)
    pause = frozen.Pause()
    stopped = power.Stopped(guest, request, log, pause)
    for source in sources:
        source.snapshot = internal_snapshot.make(source.path, log)
    stopped.start()
    with contextlib.ExitStack() as stack:
        yield frozen.Frozen(
            tuple(stack.enter_context(source.serving(sockets, log))
                  for source in sources),
            frozen.Consistency.CRASH, pause)


@contextlib.contextmanager
def _by_backup_job(
        guest: guests.Guest, disks: base.Disks, request: requests.Request,
        log: undo.UndoLog) -> collections.abc.Iterator[frozen.Frozen]:
    with backup_job.prepared(guest, disks, request, log) as job:
        pause = frozen.Pause()
        power.Stopped(guest, request, log, pause).start_after(job.begin)
        yield job.frozen(frozen.Consistency.CRASH, pause)
