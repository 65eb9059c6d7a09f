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

"""The recipe of a rollback: a guest goes back to a domain snapshot.

Before anything else its present state is held in a snapshot like the one that
it goes back to: with its memory, libvirt takes one and leaves the guest off;
for disks alone, it is turned off and an internal snapshot is made. Whatever
happens then, it comes up at one of the two instants, and at the old one if the
rollback failed. That snapshot is deleted at the end.
"""

import contextlib
import dataclasses
import os
import time

from oslo_log import log as logging

from nova_snapshot_ext import domain_records
from nova_snapshot_ext import domain_snapshot
from nova_snapshot_ext import exception
from nova_snapshot_ext import external_rollback
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guard as guards
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext import internal_snapshot
from nova_snapshot_ext import power
from nova_snapshot_ext import rollback_obstacles
from nova_snapshot_ext import rollback_way
from nova_snapshot_ext import undo
from nova_snapshot_ext import workspace

LOG = logging.getLogger(__name__)

# How long the guest agent may take to open its channel anew.
_AGENT_S = 3.0


@dataclasses.dataclass(frozen=True)
class Result:
    """What was done."""

    rollback: domain_records.Rollback
    #: seconds for which the guest did not run
    guest_pause_s: float


def is_there(guest: guests.Guest, record: domain_records.Record) -> bool:
    """Whether every disk that a snapshot was taken of still holds it."""
    running = power.running_guest(undo.Surroundings(guest, hosts.PlainHost()))
    return all(internal_snapshot.has_snapshot(running, path, record.name)
               for path in record.disks.values())


def obstacle(guest: guests.Guest,
             record: domain_records.Record) -> str | None:
    """Say why a guest can't go back to a snapshot, or None.

    Never touches the guest.

    :returns: words that an operator understands
    :raises GuestGone: if there is no guest any more
    """
    why = (rollback_obstacles.why_not_now(
        guest, domain_snapshot.held_disks(guest))
        or _why_other_disks(guest, record))
    if why is None and not is_there(guest, record):
        why = 'its disks do not hold that snapshot any more'
    if why is None and record.rollback is domain_records.Rollback.MEMORY:
        why = _why_not_its_memory(guest, record)
    return why


def _why_other_disks(guest: guests.Guest,
                     record: domain_records.Record) -> str | None:
    held = {disk.target: disk.path
            for disk in domain_snapshot.held_disks(guest)}
    for target, path in record.disks.items():
        if held.get(target) != path:
            return f'{target} is not the disk any more that it was, {path}'
        size = guest.capacity(target)
        if size != record.capacities[target]:
            return (f'{target} was resized since, from '
                    f'{record.capacities[target]} to {size} bytes')
    if record.rollback is domain_records.Rollback.MEMORY:
        for target in held:
            if target not in record.disks:
                return f'{target} was attached since'
    return None


def _why_not_its_memory(guest: guests.Guest,
                        record: domain_records.Record) -> str | None:
    why = (domain_snapshot.why_no_memory(guest)
           or rollback_obstacles.why_other_machine(guest, record))
    if why is not None:
        return why
    if guest.state() is not guests.State.SHUTOFF:
        directory = os.path.dirname(next(iter(record.disks.values())))
        free, memory = workspace.free_bytes(directory), guest.memory_bytes()
        if free < memory:
            return (f'its present memory may take {memory} bytes in '
                    f'{directory} meanwhile, where {free} are free')
    return None


def revert(guest: guests.Guest, record: domain_records.Record,
           records: domain_records.Records, host: hosts.Host,
           agent_timeout: int = 10) -> Result:
    """Have a guest go back to a snapshot.

    With memory: it is up afterwards, running or paused as it was then. Disks
    alone: it is started from them if it was up, and stays off if it was off.

    :param host: its may_start() is asked before the guest is taken down, and
        whenever it is started
    :param agent_timeout: seconds for its guest agent to set its clock
    :raises RollbackRefused: if it can't; the guest was not touched
    :raises GuestBusy: if a snapshot, or a rollback, of it is under way
    :raises StartedByAnother: if somebody else has started it meanwhile, and
        what it was is kept as a snapshot
    :raises SnapshotError: if it failed; the guest is as it was, or the undo
        log says how it will be
    """
    undo.finish_left_over(records.state_directory, guest, host)
    was_up = guest.life() is not None
    way = (external_rollback.Way if record.external else _Way)(
        guest, record, records, frozen.Pause())
    try:
        with contextlib.ExitStack() as stack:
            guard = stack.enter_context(guards.Guard())
            log = stack.enter_context(undo.UndoLog.create(
                records.state_directory, guest, host))
            why = way.obstacle()
            if why is not None:
                raise exception.RollbackRefused(
                    f'{guest.name} can not go back to {record.name}: {why}')
            guard.watch(log)
            way.go(log)
    except exception.UndoFailed as error:
        if not way.done:
            raise
        LOG.warning('%s went back to %s; what is left of that is tried '
                    'again: %s', guest.name, record.name, error)
    except (exception.SnapshotError, OSError) as error:
        kept = way.kept_state()
        if kept is None:
            raise
        raise exception.StartedByAnother(
            f'{guest.name} was started by somebody else before it had gone '
            f'back to {record.name}: its disks may be those of either '
            f'instant. The state that it had is kept as the domain snapshot '
            f'{kept.name}, "{kept.title}"; it had not gone back because of: '
            f'{error}') from error
    if record.rollback is domain_records.Rollback.MEMORY:
        _set_clock(guest, agent_timeout)
    pause_s = way.pause.seconds if was_up else 0.0
    LOG.info('%s went back to %s of %s, %s; it did not run for %.2f s',
             guest.name, record.name, record.taken_at, record.rollback.value,
             pause_s)
    return Result(record.rollback, pause_s)


class _Way(rollback_way.Way):
    """To an internal one."""

    _safety = ''

    def kept_state(self) -> domain_records.Record | None:
        return None if not self._safety else domain_snapshot.kept_state(
            self.records, self._safety)

    def obstacle(self) -> str | None:
        return obstacle(self.guest, self.record)

    def go(self, log: undo.UndoLog) -> None:
        self._log = log
        self._life = self.guest.life()
        self._safety = internal_snapshot.new_name()
        self._paths = list(self.record.disks.values())
        with log.scope():
            if self.record.rollback is domain_records.Rollback.MEMORY:
                self._with_memory()
            else:
                self._disks_alone()

    def _with_memory(self) -> None:
        name = self.record.name
        self._log.push(domain_snapshot.forget_domain_snapshot, name=name)
        with self._allowed_to_start(self._log):
            back = self._push_way_back()
            with self.pause.measured(), self._log.calling():
                if self._life is None:
                    self._hold_disks()
                else:
                    self.guest.take_domain_snapshot(
                        domain_snapshot.description(
                            self.guest, self._safety,
                            domain_snapshot.held_disks(self.guest)),
                        halt=True)
                self.guest.define_domain_snapshot(self.record.domain_xml)
                self.records.set_current(name)
                self._come_up(
                    lambda: self.guest.revert_to(name),
                    lambda: domain_snapshot.is_at(self.guest, name))
            self._arrive(back)
            # While nobody can want to undefine it. The log has it as well.
            with contextlib.suppress(exception.SnapshotError):
                for each in (name, self._safety):
                    self.guest.forget_domain_snapshot(each)

    def _disks_alone(self) -> None:
        paused = self.guest.state() is guests.State.PAUSED
        with self._allowed_to_start(self._log):
            back = self._push_way_back()
            with self.pause.measured(), self._log.calling():
                if self._life is not None:
                    self.guest.destroy()
                self._hold_disks()
                # Not until all of them are what they were.
                self.records.set_current(None)
                for path in self._paths:
                    internal_snapshot.apply_named(
                        path, self.record.name, self._log)
                self.records.set_current(self.record.name)
                if self._life is not None:
                    # Its disks are those of then, whoever starts it.
                    self._come_up(lambda: self.guest.start(paused),
                                  lambda: True)
            self._arrive(back)

    def _arrive(self, back: undo.Entry) -> None:
        """Have it stay where it is, and delete what held its state."""
        self._log.push(
            domain_snapshot.delete_domain_snapshot, name=self._safety,
            uuid=self.guest.uuid, paths=self._paths,
            state_directory=self.records.state_directory)
        back.drop()
        self.done = True

    def _push_way_back(self) -> undo.Entry:
        return self._log.push(
            domain_snapshot.come_back, target=self.record.name,
            safety=self._safety, paths=self._paths, life=self._life,
            paused=self.guest.state() is guests.State.PAUSED,
            current=self.records.current, uuid=self.guest.uuid,
            state_directory=self.records.state_directory)

    def _hold_disks(self) -> None:
        for path in self._paths:
            internal_snapshot.make_named(path, self._safety, self._log)


def _set_clock(guest: guests.Guest, timeout_s: int) -> None:
    """Its clock goes on from the time of the snapshot; nothing fails of it."""
    try:
        if not guest.has_agent() or guest.state() is guests.State.PAUSED:
            return
        deadline = time.monotonic() + _AGENT_S
        while not guest.agent_connected():
            if time.monotonic() > deadline:
                LOG.info('The clock of %s is not set: its guest agent has '
                         'not opened its channel', guest.name)
                return
            time.sleep(0.1)
        with guest.agent_timeout(timeout_s):
            guest.set_clock()
    except exception.SnapshotError as error:
        LOG.info('The clock of %s is not set: %s', guest.name, error)
