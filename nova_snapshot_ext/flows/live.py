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

"""The flow ``live``: a running guest's disk, copied while it runs.

The top layer of each disk is copied into an overlay with the same backing
file (virDomainBlockCopy, shallow). When both are equal and kept so, ending
the job leaves the overlay at that instant. The domain is never undefined.
"""

import collections.abc
import contextlib
import os
import time

from nova_snapshot_ext import disk as disks_
from nova_snapshot_ext import exception
from nova_snapshot_ext.flows import base
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import qemu_img
from nova_snapshot_ext import qemu_nbd
from nova_snapshot_ext import quiesce
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo
from nova_snapshot_ext import workspace

_POLL_S = 0.1


@undo.step
@undo.with_guest
def end_copy(around: undo.Surroundings, guest: guests.Guest, target: str,
             overlay: str) -> None:
    """End the copy into our overlay, and no other job."""
    if guest.state() is guests.State.SHUTOFF:
        return
    job = guest.block_job(target)
    if job is not None and job.mirror == overlay:
        guest.end_block_job(target)


@undo.step
@undo.with_guest
def resume_guest(around: undo.Surroundings, guest: guests.Guest,
                 life: str | None = None) -> None:
    """Let a guest run on that we suspended, unless it was started anew.

    :param life: the guest's then
    """
    if (guest.state() is guests.State.PAUSED
            and life in (None, guest.life())):
        guest.resume()


class LiveFlow(base.Flow):
    """Touches the staging directory and, for as long as the file systems
    are frozen, the guest."""

    def obstacle(self, guest: guests.Guest, disks: base.Disks,
                 request: requests.Request) -> str | None:
        return (base.why_no_job_can_start(guest, disks)
                or base.why_not_readable(disks, below_top=True)
                or quiesce.obstacle(guest, request))

    def staging_bytes(self, disk: disks_.Disk, capacity: int) -> int:
        top = disks_.chain_of(disk)[0]
        return disks_.image_bytes((top,), capacity)

    @contextlib.contextmanager
    def freeze(
            self, guest: guests.Guest, disks: base.Disks,
            request: requests.Request, log: undo.UndoLog,
    ) -> collections.abc.Iterator[frozen.Frozen]:
        pause = frozen.Pause()
        with contextlib.ExitStack() as stack:
            stack.enter_context(log.scope())
            overlays = workspace.make_directory(
                request.staging_directory, log, guest.qemu_gid())
            copies = [_Copy(guest, disk, overlays, log) for disk in disks]
            _wait_until_ready(copies, request)
            with quiesce.quiesced(guest, request, log, pause) as outcome:
                _end_at_one_instant(guest, copies, log, pause)
            sockets = workspace.make_socket_directory(request, log)
            yield frozen.Frozen(
                tuple(stack.enter_context(copy.serving(sockets, log))
                      for copy in copies),
                outcome.consistency, pause,
                scratch_bytes=lambda: sum(
                    os.stat(copy.overlay).st_blocks * 512
                    for copy in copies))


class _Copy:
    """One disk's overlay, from its block job to its NBD export."""

    def __init__(self, guest: guests.Guest, disk: disks_.Disk,
                 directory: str, log: undo.UndoLog) -> None:
        """Make the overlay and start the job.

        :param directory: that QEMU may pass through
        """
        self._guest = guest
        self._target = disk.target
        self._capacity = guest.capacity(disk.target)
        backing = disks_.chain_of(disk)[1:]
        self.overlay = os.path.join(directory, disk.target)
        self._chain = (disks_.Layer(self.overlay, 'qcow2'), *backing)
        _create_overlay(self.overlay, self._capacity, backing)
        self._job = log.push(
            end_copy, target=disk.target, overlay=self.overlay)
        guest.start_copy(disk.target, self.overlay)

    def ready(self) -> bool:
        """:raises FreezeFailed: if the job ended before it was"""
        job = self._guest.block_job(self._target)
        if job is None or job.mirror != self.overlay:
            raise exception.FreezeFailed(
                f'The block copy of {self._target} ended early: the '
                f'overlay may have no room, or someone ended it')
        return job.ready

    def end(self) -> None:
        """Leave the overlay as the disk is now.

        :raises FreezeFailed: if the job is not what keeps both equal
        """
        if not self.ready():
            raise exception.FreezeFailed(
                f'The block copy of {self._target} fell behind')
        self._guest.end_block_job(self._target)
        self._job.drop()

    def serving(
            self, sockets: str, log: undo.UndoLog,
    ) -> contextlib.AbstractContextManager[frozen.FrozenDisk]:
        return qemu_nbd.serving(
            disks_.chain_options(self._chain),
            os.path.join(sockets, self._target), self._target,
            self._capacity, log)


def _create_overlay(path: str, capacity: int,
                    backing: tuple[disks_.Layer, ...]) -> None:
    arguments = ['create', '-q', '-f', 'qcow2']
    if backing:
        arguments += ['-F', backing[0].format, '-b', backing[0].path]
    qemu_img.run(*arguments, path, str(capacity))
    # libvirt gives the file to QEMU's user while the job runs and need not
    # give it back; nobody else gets through the directory to read it.
    os.chmod(path, 0o644)


def _wait_until_ready(copies: list[_Copy],
                      request: requests.Request) -> None:
    deadline = time.monotonic() + request.copy_timeout
    for copy in copies:
        while not copy.ready():
            request.cancellation.check()
            if time.monotonic() > deadline:
                raise exception.FreezeFailed(
                    f'[snapshot_ext] copy_timeout = {request.copy_timeout} '
                    f'seconds were not enough for the block copy')
            time.sleep(_POLL_S)


def _end_at_one_instant(guest: guests.Guest, copies: list[_Copy],
                        log: undo.UndoLog, pause: frozen.Pause) -> None:
    """End all copies; several of a running guest while it stands still."""
    with contextlib.ExitStack() as stack:
        if len(copies) > 1 and guest.state() is guests.State.RUNNING:
            stack.enter_context(pause.measured())
            stack.callback(log.push(resume_guest, life=guest.life()).run)
            guest.suspend()
        for copy in copies:
            copy.end()
