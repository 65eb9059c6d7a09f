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

"""A guest stopped with its memory saved, and how it comes back."""

import collections.abc
import contextlib
import time

from nova_snapshot_ext import beside
from nova_snapshot_ext import exception
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo

_POLL_S = 0.05
#: how long a managed save, or the restore, may take whose end nobody hears of
SAVE_TIMEOUT_S = 600.0
# How long after it was asked to a guest may let go of a device.
_LATE_S = 60.0
#: how long libvirt may keep such a call waiting for the domain's lock
#: (QEMU_JOB_WAIT_TIME), and a margin: nothing tells of it meanwhile
LOCK_WAIT_S = 35.0
# How often it is looked whether a save has to be ended.
_END_SAVE_POLL_S = 1.0


@undo.step
@undo.with_guest
def start_guest(around: undo.Surroundings, guest: guests.Guest,
                was_running: bool = False) -> None:
    """Start a guest that we stopped.

    A save that nobody waits for any more is ended, so that it runs on.

    :raises UndoFailed: if it is still being stopped
    """
    begun = time.monotonic()
    was_ended = False
    while guest.state() is not guests.State.SHUTOFF:
        waited = time.monotonic() - begun
        if not around.owner_died:
            return          # its owner knows how its call ended
        was_ended = guest.end_save() or was_ended
        if guest.job() is None and (was_ended or waited > LOCK_WAIT_S):
            guest.remove_cut_save()
            if was_running:
                _resume_after_start(around, guest)
            return
        if waited > SAVE_TIMEOUT_S:
            raise exception.UndoFailed(
                f'The memory of {guest.name} is still being saved')
        time.sleep(_POLL_S)
    with around.host.may_start() as allowed:
        if allowed and guest.has_managed_save():
            guest.start()


@undo.with_guest
def start_again(around: undo.Surroundings, guest: guests.Guest,
                paused: bool) -> None:
    """Start a guest that we turned off, if it is off and we may.

    :param paused: that it was paused
    """
    if guest.state() is guests.State.SHUTOFF:
        with around.host.may_start() as allowed:
            if allowed and guest.state() is guests.State.SHUTOFF:
                guest.start(paused)


@undo.step
@undo.with_guest
def let_run(around: undo.Surroundings, guest: guests.Guest,
            was_running: bool) -> None:
    """Start a guest whose memory is saved, as it was; or have it run on.

    Its owner may have died when it was started and did not run yet, or when
    libvirt had not begun to start it.

    :raises UndoFailed: if it is still being started
    """
    if around.owner_died:
        _wait_until_started(guest)
    if guest.state() is guests.State.SHUTOFF:
        with around.host.may_start() as allowed:
            if (allowed and guest.state() is guests.State.SHUTOFF
                    and guest.has_managed_save()):
                guest.start()
    elif was_running:
        _resume_after_start(around, guest)


def _resume_after_start(around: undo.Surroundings,
                        guest: guests.Guest) -> None:
    with around.host.may_resume() as allowed:
        # Whoever paused it since has his reason.
        if allowed and guest.is_paused_by_start():
            guest.resume()


def _wait_until_started(guest: guests.Guest) -> None:
    """Wait for a start that goes on without its owner, if there is one.

    The guest is paused then for as long as its memory is read.
    """
    begun = time.monotonic()
    while (guest.state() not in (guests.State.SHUTOFF, guests.State.RUNNING)
           and guest.job() not in (None, 'backup')):
        if time.monotonic() - begun > SAVE_TIMEOUT_S:
            raise exception.UndoFailed(
                f'{guest.name} is still being started')
        time.sleep(_POLL_S)


@undo.step
@undo.with_guest
def attach_device(around: undo.Surroundings, guest: guests.Guest,
                  device: str, life: str | None = None) -> None:
    """Give back a device of the host, once the guest runs again.

    :param life: of the guest when it was asked to let go
    :raises UndoFailed: if the guest was not started yet
    """
    if guest.state() is not guests.State.SHUTOFF:
        # It was not stopped then: it may not have answered yet.
        guest.attach(device, _LATE_S if guest.life() == life else 0.0)
    elif guest.has_managed_save():
        raise exception.UndoFailed(f'{guest.name} was not started')


def running_guest(around: undo.Surroundings) -> guests.Guest | None:
    """The guest, if it has its disks open."""
    if around.guest is None:
        return None
    try:
        off = around.guest.state() is guests.State.SHUTOFF
    except exception.GuestGone:
        return None
    return None if off else around.guest


def is_gone(around: undo.Surroundings) -> bool:
    if around.guest is None:
        return True
    try:
        around.guest.state()
    except exception.GuestGone:
        return True
    return False


@contextlib.contextmanager
def _ended_in_time(guest: guests.Guest, request: requests.Request,
                   ) -> collections.abc.Iterator[None]:
    """End a managed save that takes too long, or that nobody wants.

    Its guest stands still meanwhile, and runs on then.
    """
    begun = time.monotonic()
    late = False

    def look() -> bool:
        nonlocal late
        late = time.monotonic() - begun > request.save_timeout
        if late or request.cancellation.reason is not None:
            with contextlib.suppress(exception.SnapshotError):
                guest.end_save()
        return True

    try:
        with beside.repeated(look, _END_SAVE_POLL_S):
            yield
    except exception.GuestGone:
        raise
    except exception.SnapshotError as error:
        request.cancellation.check()
        if late:
            raise exception.FreezeFailed(
                f'[snapshot_ext] save_timeout = {request.save_timeout} '
                f'seconds were not enough to save the memory of '
                f'{guest.name}: {error}') from error
        raise


class Stopped:
    """A guest that we stopped, until it is back by one of its methods."""

    def __init__(self, guest: guests.Guest, request: requests.Request,
                 log: undo.UndoLog, pause: frozen.Pause) -> None:
        """Take the guest's host devices, save its memory and stop it.

        :param pause: gets the time until it runs again
        :raises FreezeFailed: if its memory is not saved in time
        """
        self._guest = guest
        self._log = log
        self._pause = pause
        self._was_running = guest.state() is guests.State.RUNNING
        self._devices = []
        for device in guest.host_devices():
            self._devices.append(log.push(
                attach_device, device=device, life=guest.life()))
            guest.detach(device)
        self._start = log.push(start_guest, was_running=self._was_running)
        pause.begin()
        with _ended_in_time(guest, request), log.calling():
            guest.save_memory()

    def start(self) -> None:
        """Start it, in the state that it had."""
        with self._log.calling():
            self._start.run()
        self._is_back()

    def start_after(self, begin: collections.abc.Callable[[], None]) -> None:
        """Start it, with something begun before it runs.

        :param begin: what needs a guest that was started
        :raises FreezeFailed: if it is not ours to start any more
        """
        back = self._log.push(let_run, was_running=self._was_running)
        # From here on the save is known to be whole: nobody has to wait for
        # it before the guest runs on.
        self._start.drop()
        with self._log.surroundings.host.may_start() as allowed:
            if not allowed or not self._guest.has_managed_save():
                raise exception.FreezeFailed(
                    f'{self._guest.name} is not ours to start any more: it '
                    f'is being stopped or deleted, or was started meanwhile')
            with self._log.calling():
                self._guest.start(paused=True)
            begin()
            if self._was_running:
                self._guest.resume()
        back.drop()
        self._is_back()

    def _is_back(self) -> None:
        self._pause.end()
        for entry in reversed(self._devices):
            entry.run()
