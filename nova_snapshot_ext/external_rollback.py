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

"""A guest goes back to an external snapshot.

The files of that instant get new overlays, and the guest is started with
those: with its memory of then, or booted. What it was writes to stays as it
was until the guest is there; with memory its own is saved meanwhile (managed
save), and it runs on with that if it can't get there. So whatever happens, it
comes up at one of the two instants.
"""

import collections.abc
import os

from nova_snapshot_ext import disk as disks_
from nova_snapshot_ext import domain_records
from nova_snapshot_ext import domain_snapshot
from nova_snapshot_ext import exception
from nova_snapshot_ext import external_files
from nova_snapshot_ext import external_merge
from nova_snapshot_ext import external_snapshot
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext import internal_snapshot
from nova_snapshot_ext import power
from nova_snapshot_ext import rollback_obstacles
from nova_snapshot_ext import rollback_way
from nova_snapshot_ext import undo


def obstacle(guest: guests.Guest, record: domain_records.Record,
             current: domain_records.Record | None) -> str | None:
    """Say why a guest can't go back to a snapshot, or None.

    Never touches the guest.

    :param current: the one that its state descends from
    """
    assert record.files is not None
    held = external_snapshot.held_disks(guest)
    why = (rollback_obstacles.why_not_now(guest, held)
           or _why_other_disks(held, record, current)
           or _why_no_files(record)
           or _why_not_given(held, record))
    if why is None and record.rollback is domain_records.Rollback.MEMORY:
        why = (domain_snapshot.why_no_memory(guest, held)
               or _why_more_disks(held, record)
               or rollback_obstacles.why_other_machine(guest, record))
    return why


def _why_other_disks(
        held: collections.abc.Sequence[disks_.Disk],
        record: domain_records.Record,
        current: domain_records.Record | None) -> str | None:
    """Only what descends from our snapshots is given up for another one."""
    now = {disk.target: disk for disk in held}
    for target in record.disks:
        below = None if current is None else current.disks.get(target)
        disk = now.get(target)
        if disk is None or below is None or (
                not external_files.is_ours(disk.path)
                or external_files.base_of(disk.path) != below):
            return (f'{target} is not an overlay of {below} any more: '
                    f'somebody else changed it')
    return None


def _why_more_disks(held: collections.abc.Sequence[disks_.Disk],
                    record: domain_records.Record) -> str | None:
    for disk in held:
        if disk.target not in record.disks:
            return f'{disk.target} was attached since'
    return None


def _why_no_files(record: domain_records.Record) -> str | None:
    assert record.files is not None
    for path in (*record.disks.values(),
                 *[record.files.memory] * bool(record.files.memory)):
        if not os.path.exists(path):
            return f'{path} is gone'
    return None


def _why_not_given(held: collections.abc.Sequence[disks_.Disk],
                   record: domain_records.Record) -> str | None:
    for disk in held:
        if disk.target in record.disks:
            why = external_files.why_not_given(disk.path)
            if why is not None:
                return why
    return None


class Way(rollback_way.Way):
    """To an external one."""

    def obstacle(self) -> str | None:
        found = {record.name: record for record in self.records.all()}
        if self.record.name not in found:
            return 'it is deleted by now'
        # A merge that was left over may have changed it.
        self.record = found[self.record.name]
        return obstacle(self.guest, self.record,
                        found.get(self.records.current or ''))

    def go(self, log: undo.UndoLog) -> None:
        life = self.guest.life()
        paused = self.guest.state() is guests.State.PAUSED
        name = internal_snapshot.new_name()
        now = {disk.target: disk for disk in self.guest.disks()
               if disk.target in self.record.disks}
        new = {target: external_files.overlay_beside(
            now[target].path, name, target) for target in now}
        left = [disk.path for disk in now.values()]
        with log.scope(), self._allowed_to_start(log):
            back = log.push(
                come_back_to_overlays, target=self.record.name,
                now={target: disk.path for target, disk in now.items()},
                new=new, life=life, paused=paused,
                current=self.records.current, uuid=self.guest.uuid,
                state_directory=self.records.state_directory)
            self._make(new, now, log.surroundings.host)
            with self.pause.measured(), log.calling():
                self._take_down(life)
                files = _overlays(new)
                self.guest.define_disks(files)
                self.records.set_current(self.record.name)
                self._come_up(lambda: self._start(life, paused, files),
                              lambda: _is_made_of(self.guest, new))
            log.push(delete_left_overlays, paths=left, uuid=self.guest.uuid,
                     state_directory=self.records.state_directory)
            back.drop()
            self.done = True

    def _make(self, new: dict[str, str], now: dict[str, disks_.Disk],
              host: hosts.Host) -> None:
        assert self.record.files is not None
        for target, path in new.items():
            external_files.create_overlay(
                path, disks_.Layer(self.record.disks[target],
                                   self.record.files.formats[target]),
                self.record.capacities[target], now[target].path, host)

    def _take_down(self, life: str | None) -> None:
        if life is None:
            return
        if self._memory:
            self.guest.save_memory()
        else:
            self.guest.destroy()

    @property
    def _memory(self) -> str:
        assert self.record.files is not None
        return self.record.files.memory

    def _start(self, life: str | None, paused: bool,
               files: dict[str, disks_.Layer]) -> None:
        if self._memory:
            self.guest.restore_memory(self._memory, files)
        elif life is not None:
            self.guest.start(paused)


def _overlays(paths: dict[str, str]) -> dict[str, disks_.Layer]:
    return {target: disks_.Layer(path, external_files.FORMAT)
            for target, path in paths.items()}


@undo.step
def come_back_to_overlays(
        around: undo.Surroundings, target: str, now: dict[str, str],
        new: dict[str, str], life: str | None, paused: bool,
        current: str | None, uuid: str, state_directory: str) -> None:
    """Bring a guest back that did not get where it was to go.

    One that got there, and whose owner died before it could say so, stays
    there.

    :param target: the snapshot that it was to go back to
    :param now: the overlay of each disk that it wrote to, by target
    :param new: the one that it was to write to
    :param life: the guest's before, None if it was off
    :param paused: that it was paused
    :param current: the snapshot that its state descended from
    """
    internal_snapshot.check_name(target)
    if power.is_gone(around):
        return
    guest = around.guest
    assert guest is not None
    if around.owner_died and not around.rebooted:
        domain_snapshot.let_call_end(guest, life)
    arrived = _has_arrived(around, guest, new)
    gone = [disk for disk, path in now.items() if not os.path.exists(path)]
    for disk in gone:
        if not arrived and not os.path.exists(new[disk]):
            # Nobody deletes both: what they are on is not there.
            raise exception.UndoFailed(
                f'{now[disk]} of {guest.name} is not there, and nothing in '
                f'its place: is its file system mounted?')
    if arrived or gone:
        # What it was is given up.
        delete_left_overlays(around, paths=list(now.values()), uuid=uuid,
                             state_directory=state_directory)
        return
    domain_records.Records(state_directory, uuid).set_current(current)
    guest.define_disks(_overlays(now))
    if power.running_guest(around) is not None:
        _let_run_on(around, guest)
    elif life is not None:
        # With its memory, if that was saved.
        power.start_again(around, paused=paused)
    for path in new.values():
        external_files.delete(path)


def _has_arrived(around: undo.Surroundings, guest: guests.Guest,
                 new: dict[str, str]) -> bool:
    """Whether it runs from the new overlays, as no earlier life of it did."""
    return (power.running_guest(around) is not None
            and _is_made_of(guest, new))


def _is_made_of(guest: guests.Guest, paths: dict[str, str]) -> bool:
    found = {disk.target: disk.path for disk in guest.disks()}
    return all(found.get(target) == path for target, path in paths.items())


def _let_run_on(around: undo.Surroundings, guest: guests.Guest) -> None:
    """It was not taken down, or is back; libvirt may have died when it had
    paused it for that."""
    if around.rebooted:
        return
    if guest.is_paused_by_snapshot():
        guest.resume()
    if guest.job() is None:
        guest.remove_cut_save()


@undo.step
def delete_left_overlays(around: undo.Surroundings, paths: list[str],
                         uuid: str, state_directory: str) -> None:
    """Delete what a guest wrote to before it went back, and its memory of
    then.

    :param paths: of the overlays
    """
    if power.is_gone(around):
        return
    assert around.guest is not None
    if not external_merge.used_files(around).isdisjoint(paths):
        # It has come back to them: this failed before, and that did not.
        return
    if power.running_guest(around) is not None:
        # Of another life than this one.
        around.guest.remove_cut_save()
    else:
        around.guest.remove_managed_save_of(paths)
    kept = {path for record in domain_records.Records(
        state_directory, uuid).all() for path in record.disks.values()}
    for path in paths:
        if path not in kept:
            external_files.delete(path)
