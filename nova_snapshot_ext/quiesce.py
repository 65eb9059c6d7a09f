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

"""A guest's file systems frozen for the moment its disks are."""

import collections.abc
import contextlib
import dataclasses

from oslo_log import log as logging

from nova_snapshot_ext import exception
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo

LOG = logging.getLogger(__name__)


@undo.step
@undo.with_guest
def thaw(around: undo.Surroundings, guest: guests.Guest,
         timeout_s: int, life: str | None = None,
         since: float | None = None) -> None:
    """A guest that is off, was started anew or reset, or whose agent thawed
    by itself, is thawed.

    One that was reset is asked all the same, but not for ever: libvirt does
    not hear of an agent that ends, and comes back, during a backup job.

    :param life: the guest's when it was frozen
    :param since: the uptime in seconds before it was
    :raises UndoFailed: if no agent has its channel open
    """
    if (guest.state() is guests.State.SHUTOFF
            or life not in (None, guest.life())):
        return
    try:
        _ask_to_thaw(guest, timeout_s)
    except (exception.UndoFailed, guests.LibvirtError) as error:
        if (since is None or around.reset_at is None
                or around.reset_at < since
                or not (isinstance(error, exception.UndoFailed)
                        or error.agent_is_silent)):
            raise
        LOG.warning('%s was reset, and its file systems with it: nobody has '
                    'to thaw them (%s)', guest.name, error)


def _ask_to_thaw(guest: guests.Guest, timeout_s: int) -> None:
    if not guest.agent_connected():
        # To ask it would only keep others waiting who ask it something.
        raise exception.UndoFailed(
            f'The guest agent of {guest.name} has ended: nobody can thaw its '
            f'file systems until it is back, or the guest is started anew')
    _thaw(guest, timeout_s)


def _thaw(guest: guests.Guest, timeout_s: int) -> int:
    """Thaw; a guest that was faster is asked once more.

    Windows ends a freeze by itself after ten seconds. Its agent answers a
    thaw that comes later with an error, and the next one with 0.

    :returns: how many file systems were still frozen
    :raises LibvirtError: if it is not known whether all are thawed
    """
    with guest.agent_timeout(timeout_s):
        try:
            return guest.thaw_filesystems()
        except guests.LibvirtError as error:
            if error.agent_is_silent:
                raise
            LOG.info('%s is asked to thaw once more: %s', guest.name, error)
            guest.thaw_filesystems()
            return 0


@dataclasses.dataclass
class Outcome:
    """What the freeze came to; right once its scope has ended."""

    consistency: frozen.Consistency = frozen.Consistency.CRASH


def obstacle(guest: guests.Guest, request: requests.Request) -> str | None:
    """Why a guest that must be quiesced can't be, None if it can."""
    if request.quiesce is not requests.Quiesce.REQUIRED:
        return None
    if guest.state() is not guests.State.RUNNING:
        return ('it must be quiesced (os_require_quiesce), and is '
                f'{guest.state().value}')
    if not guest.agent_connected():
        return ('it must be quiesced (os_require_quiesce), and no guest '
                'agent has opened its channel')
    return None


@contextlib.contextmanager
def quiesced(
        guest: guests.Guest, request: requests.Request, log: undo.UndoLog,
        pause: frozen.Pause) -> collections.abc.Iterator[Outcome]:
    """Freeze, and thaw at the end of the scope, whatever happens in it.

    :param pause: gets the time for which nothing could be written
    :raises FreezeFailed: if the guest must be quiesced and was not
    """
    outcome = Outcome()
    required = request.quiesce is requests.Quiesce.REQUIRED
    if not _can_freeze(guest, request):
        if required:
            raise exception.FreezeFailed(
                'It must be quiesced (os_require_quiesce), and its guest '
                'agent does not answer')
        yield outcome
        return
    entry = log.push(thaw, within_s=request.freeze_timeout,
                     timeout_s=request.freeze_timeout, life=guest.life(),
                     since=undo.uptime())
    pause.begin()
    try:
        with guest.agent_timeout(request.freeze_timeout):
            frozen_count = guest.freeze_filesystems()
    except guests.LibvirtError as error:
        # It may have frozen some file systems, or be about to.
        entry.run()
        pause.end()
        if required:
            raise exception.FreezeFailed(
                f'It must be quiesced (os_require_quiesce): '
                f'{error}') from error
        LOG.info('%s is not quiesced: %s', guest.name, error)
        yield outcome
        return
    try:
        yield outcome
    finally:
        thawed = _thaw(guest, request.freeze_timeout)
        pause.end()
        entry.drop()
    if thawed >= frozen_count > 0:
        outcome.consistency = frozen.Consistency.FILESYSTEM
    elif required:
        raise exception.FreezeFailed(
            f'Of {frozen_count} file systems of {guest.name} that were '
            f'frozen, {thawed} still were after its disk was; it must be '
            f'quiesced (os_require_quiesce)')


def _can_freeze(guest: guests.Guest, request: requests.Request) -> bool:
    if request.quiesce is requests.Quiesce.NEVER:
        return False
    if (guest.state() is not guests.State.RUNNING
            or not guest.agent_connected()):
        return False
    # An agent that hangs is found out before it is told to freeze: nobody
    # could say afterwards whether it did.
    with guest.agent_timeout(request.freeze_timeout):
        return guest.agent_answers()
