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

"""Domain snapshots: of all disks of a guest at one instant, that stay.

Each qcow2 file of the guest has an internal snapshot of the same name; with
memory, libvirt and QEMU put that into the first of them. libvirt's metadata of
it is taken from libvirt at once and kept by us.
"""

import collections.abc
import dataclasses
import datetime
import os
import time
from xml.etree import ElementTree

from oslo_log import log as logging

from nova_snapshot_ext import disk as disks_
from nova_snapshot_ext import domain_records
from nova_snapshot_ext import exception
from nova_snapshot_ext import external_merge
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext import internal_snapshot
from nova_snapshot_ext import power
from nova_snapshot_ext import quiesce
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo

LOG = logging.getLogger(__name__)

_POLL_S = 0.1
# A call of a dead owner has reached libvirt by then.
_REACHED_S = 1.0
# In what is kept with a snapshot: it is about to be deleted.
_UNWANTED = 'unwanted'
_Note = collections.abc.Callable[[], domain_records.Record]


def held_disks(guest: guests.Guest) -> tuple[disks_.Disk, ...]:
    """The disks that are part of a domain snapshot.

    A file beside the root disk of a guest of Nova's is a disk of its own; one
    that is elsewhere is a volume, which nothing is written into.
    """
    root = os.path.dirname(guest.root_disk().path)
    elsewhere = not guest.belongs_to_nova()
    return tuple(
        disk for disk in guest.disks()
        if (disk.device == 'disk' and disk.path and not disk.block
            and internal_snapshot.possible(disk)
            and not (disk.readonly or disk.shared or disk.transient
                     or disk.encrypted)
            and (elsewhere or os.path.dirname(disk.path) == root)))


def why_no_memory(guest: guests.Guest,
                  held: tuple[disks_.Disk, ...] | None = None) -> str | None:
    """What of a guest would not go back with its memory, None if all does.

    :param held: the disks that would, None for those of an internal snapshot
    """
    why = guest.why_not_savable()
    if why is not None:
        return why
    if guest.host_devices():
        return 'it has a device of the host, whose state can not be saved'
    description = guest.description()
    if description.find('./devices/tpm') is not None:
        return 'it has a TPM, whose state would not go back with its memory'
    if (description.find('./os/nvram') is not None
            or description.find('./os/loader[@type="pflash"]') is not None):
        return ('it has UEFI variables in pflash, which would not go back '
                'with its memory')
    if guest.has_console_password():
        return ('it has a password for its console, which is not kept with '
                'its memory')
    kind = 'a qcow2 file' if held is None else 'a file'
    if held is None:
        held = held_disks(guest)
    for disk in guest.disks():
        if disk not in held and not disk.readonly and (
                disk.path or disk.kind not in ('file', 'block')):
            return (f'{disk.target} is not {kind} of its own: it would '
                    f'not go back with the memory, which would destroy the '
                    f'file systems on it')
    return None


@dataclasses.dataclass(frozen=True)
class Taken:
    """A domain snapshot, until its image is whole."""

    record: domain_records.Record
    consistency: frozen.Consistency
    #: deletes it
    entry: undo.Entry
    records: domain_records.Records

    def properties(self) -> dict[str, str]:
        """What its image says of it."""
        found = {'instance': self.record.uuid,
                 'rollback': self.record.rollback.value}
        if self.record.parent is not None:
            parent = self.records.find(self.record.parent)
            # What is kept of a rollback has none.
            if parent is not None and parent.image_id:
                found['parent'] = parent.image_id
        return found

    def keep(self, location: str) -> None:
        """Have it stay.

        :param location: of its image
        """
        self.records.add(dataclasses.replace(
            self.record, image_id=self.record.image_id or location))
        self.entry.drop()


def take(guest: guests.Guest, request: requests.Request, log: undo.UndoLog,
         pause: frozen.Pause) -> Taken:
    """Take one, which its undo deletes again.

    :param pause: gets the time for which the guest stands still
    """
    up = guest.state() is not guests.State.SHUTOFF
    with_memory = up and request.domain.memory
    name = internal_snapshot.new_name()
    disks = held_disks(guest)
    records = domain_records.Records(request.state_directory, guest.uuid)
    entry = log.push(
        delete_domain_snapshot, name=name, uuid=guest.uuid,
        paths=[disk.path for disk in disks],
        state_directory=request.state_directory)
    record = new_record(
        guest, dataclasses.replace(request.domain, memory=with_memory),
        records, name, disks)
    consistency = frozen.Consistency.CRASH
    if with_memory:
        record = dataclasses.replace(
            record, domain_xml=_with_memory(guest, name, disks, log, pause))
    elif up:
        consistency = _of_disks(guest, name, disks, request, log, pause)
    else:
        if guest.was_shut_down() and not guest.has_managed_save():
            consistency = frozen.Consistency.STOPPED
        for disk in disks:
            internal_snapshot.make_named(disk.path, name, log)
    return Taken(record, consistency, entry, records)


def new_record(guest: guests.Guest, wish: requests.DomainSnapshot,
               records: domain_records.Records, name: str,
               disks: collections.abc.Sequence[disks_.Disk],
               files: domain_records.Files | None = None,
               ) -> domain_records.Record:
    """The record of a snapshot of a guest as it is now.

    :param wish: its memory says whether that is part of it
    :param disks: that are part of it
    :param files: of an external one
    """
    return domain_records.Record(
        name=name, uuid=guest.uuid, image_id=wish.image_id, title=wish.title,
        parent=records.current,
        rollback=(domain_records.Rollback.MEMORY if wish.memory
                  else domain_records.Rollback.DISK),
        taken_at=datetime.datetime.now(datetime.UTC).isoformat(),
        disks={disk.target: disk.path for disk in disks},
        capacities={disk.target: guest.capacity(disk.target)
                    for disk in disks},
        domain_xml=ElementTree.tostring(
            guest.description(), encoding='unicode'),
        host_cpu=guest.host_cpu(), extra=wish.extra, files=files)


def _with_memory(guest: guests.Guest, name: str,
                 disks: collections.abc.Sequence[disks_.Disk],
                 log: undo.UndoLog, pause: frozen.Pause) -> str:
    """:returns: the XML that libvirt would know it by"""
    call = log.push(let_taking_end, name=name)
    with pause.measured(), log.calling():
        guest.take_domain_snapshot(description(guest, name, disks))
    call.drop()
    xml = guest.domain_snapshot(name)
    if xml is None:
        raise exception.FreezeFailed(
            f'libvirt does not know the snapshot that it has just taken of '
            f'{guest.name}')
    guest.forget_domain_snapshot(name)
    return xml


def description(guest: guests.Guest, name: str,
                disks: collections.abc.Sequence[disks_.Disk]) -> str:
    """What libvirt is told to take: internal, with memory.

    :param disks: that are part of it
    """
    root = ElementTree.Element('domainsnapshot')
    ElementTree.SubElement(root, 'name').text = name
    ElementTree.SubElement(root, 'memory', snapshot='internal')
    element = ElementTree.SubElement(root, 'disks')
    for disk in guest.disks():
        ElementTree.SubElement(
            element, 'disk', name=disk.target,
            snapshot='internal' if disk in disks else 'no')
    return ElementTree.tostring(root, encoding='unicode')


def _of_disks(guest: guests.Guest, name: str,
              disks: collections.abc.Sequence[disks_.Disk],
              request: requests.Request, log: undo.UndoLog,
              pause: frozen.Pause) -> frozen.Consistency:
    """libvirt refuses that for a guest that is up; QEMU does not."""
    guest.activate_disks()
    actions = []
    for disk in disks:
        node = guest.format_node(disk.path)
        if node is None:
            raise exception.FreezeFailed(
                f'QEMU of {guest.name} does not have {disk.path} open')
        actions.append({'type': 'blockdev-snapshot-internal-sync',
                        'data': {'device': node['node-name'], 'name': name}})
    with quiesce.quiesced(guest, request, log, pause) as outcome:
        guest.monitor('transaction', actions=actions)
    return outcome.consistency


@undo.step
@undo.with_guest
def let_taking_end(around: undo.Surroundings, guest: guests.Guest,
                   name: str) -> None:
    """Wait for a snapshot that a dead owner left libvirt to take, and see
    that the guest goes on after it.
    """
    if around.owner_died:
        wait_for_call(
            guest, lambda: guest.domain_snapshot(name) is not None)
    if guest.is_paused_by_snapshot():
        guest.resume()


def wait_for_call(guest: guests.Guest,
                  is_over: collections.abc.Callable[[], bool]) -> None:
    """Wait for a call of libvirt that a dead owner may have left under way.

    A guest that libvirt has paused for it while no job is there stands still
    for nothing: libvirtd died in the middle of it, and the call with it.

    :param is_over: asked while no job is seen; where it is not known to be,
        the call may still wait for the domain's lock
    :raises UndoFailed: if it does not end
    """
    begun = time.monotonic()
    while True:
        waited = time.monotonic() - begun
        # Before it is looked for the job, and again after: the pause lies
        # within the job.
        paused = guest.is_paused_by_snapshot()
        if guest.job() is None:
            if is_over() or waited > power.LOCK_WAIT_S or (
                    paused and waited > _REACHED_S
                    and guest.is_paused_by_snapshot()):
                return
        elif waited > power.SAVE_TIMEOUT_S:
            raise exception.UndoFailed(
                f'libvirt is still at work on {guest.name}')
        time.sleep(_POLL_S)


@undo.step
def delete_domain_snapshot(around: undo.Surroundings, name: str, uuid: str,
                           paths: list[str], state_directory: str) -> None:
    """Delete one from the disks and from what is known of it.

    :raises SnapshotError: if it is still there
    """
    internal_snapshot.check_name(name)
    forget_domain_snapshot(around, name)
    for path in paths:
        internal_snapshot.delete_internal_snapshot(
            around, path=path, name=name)
    domain_records.Records(state_directory, uuid).remove(name)


@undo.step
def forget_domain_snapshot(around: undo.Surroundings, name: str) -> None:
    """Have libvirt not know it any more: it would keep Nova from undefining
    and from migrating the domain."""
    internal_snapshot.check_name(name)
    if not power.is_gone(around):
        assert around.guest is not None
        around.guest.forget_domain_snapshot(name)


@undo.step
def come_back(around: undo.Surroundings, target: str, safety: str,
              paths: list[str], life: str | None, paused: bool,
              current: str | None, uuid: str, state_directory: str) -> None:
    """Bring a guest back that did not get where it was to go, and delete
    what held its state.

    One that got there, and whose owner died before it could say so, stays
    there; so does one that somebody else has started. All of it is one step:
    if a part fails, its state stays held, and nothing of ours starts it from
    disks that are halfway.

    :param target: the snapshot that it was to go back to
    :param safety: the one that holds what it was
    :param paths: of the disks that are in both
    :param life: the guest's before, None if it was off
    :param paused: that it was paused
    :param current: the snapshot that its state descended from
    """
    for name in (target, safety):
        internal_snapshot.check_name(name)
    if power.is_gone(around):
        return
    guest = around.guest
    assert guest is not None
    if around.owner_died:
        if not around.rebooted:
            let_call_end(guest, life)
        internal_snapshot.end_qemu_img(target)
    records = domain_records.Records(state_directory, uuid)
    stays = records.named(safety)
    if stays is None and _is_left_alone(around, guest, target, safety, life):
        other = _is_another_life(
            around, guest, target, safety, life, records)
        if other or records.current is None:
            # It is not where it was to go.
            records.set_current(current)
        stays = _give_up(guest, target, safety, paths, records, other)
    if stays is None:
        def is_back() -> domain_records.Record:
            records.set_current(current)
            return _give_up(
                guest, target, safety, paths, records, other=False)
        # Not until all of its disks are what they were.
        records.set_current(None)
        stays = _restore_with_memory(around, guest, target, safety, is_back)
    if stays is None:
        _restore_disks(around, guest, target, safety, paths)
        records.set_current(current)
        if life is not None:
            power.start_again(around, paused=paused)
        stays = is_back()
    _forget_both(guest, target, safety)
    if stays.extra.get(_UNWANTED):
        delete_domain_snapshot(
            around, name=safety, uuid=uuid, paths=paths,
            state_directory=state_directory)


def _is_left_alone(around: undo.Surroundings, guest: guests.Guest,
                   target: str, safety: str, life: str | None) -> bool:
    if power.running_guest(around) is None:
        return False
    if guest.life() == life:        # it was not taken down
        # libvirt may have died when it had paused it for that.
        if not around.rebooted and guest.is_paused_by_snapshot():
            guest.resume()
        return True
    if (around.owner_died or guest.domain_snapshot(target) is None
            or guest.current_domain_snapshot() == safety):
        return True     # it is there, or is back, or somebody started it
    guest.destroy()         # it came up by halves
    return False


def is_at(guest: guests.Guest, name: str) -> bool:
    """Whether libvirt has had a guest that is up go back to a snapshot.

    It says so in the snapshot when all is done; the guest's state says it
    from when it runs, until somebody pauses or resumes it.
    """
    return (guest.came_from_snapshot()
            or guest.current_domain_snapshot() == name)


def _is_another_life(around: undo.Surroundings, guest: guests.Guest,
                     target: str, safety: str, life: str | None,
                     records: domain_records.Records) -> bool:
    """Whether somebody else has started a guest that is up, and from disks
    that may be of then, of now, or some of each."""
    # libvirt names a life as it did an earlier one if it was restarted in
    # between; but it has taken one down whose state is in a snapshot.
    if (guest.life() == life and not around.rebooted
            and guest.current_domain_snapshot() != safety
            and not _holds_one_that_was_off(guest, target, safety, records)):
        return False
    if guest.domain_snapshot(target) is not None:
        return not is_at(guest, target)
    if guest.domain_snapshot(safety) is not None:
        # libvirt was not told yet where it was to go.
        return not guest.came_from_snapshot()
    # Without memory, all disks were of then before that was current.
    return records.current != target


def _holds_one_that_was_off(
        guest: guests.Guest, target: str, safety: str,
        records: domain_records.Records) -> bool:
    """Whether a guest that was to go back without memory was turned off: what
    holds its state is made after that."""
    gone_to = records.named(target)
    return (gone_to is not None
            and gone_to.rollback is domain_records.Rollback.DISK
            and any(internal_snapshot.has_snapshot(guest, path, safety)
                    for path in gone_to.disks.values()))


def _give_up(guest: guests.Guest, target: str, safety: str,
             paths: list[str], records: domain_records.Records,
             other: bool) -> domain_records.Record:
    """Note that a guest is never to be made what it was again: what it writes
    from now on would be lost, whenever that is tried again.

    :param other: whether somebody else has started it: then what holds the
        state that it had becomes a snapshot like others, if it holds all
    """
    kept = other and all(internal_snapshot.has_snapshot(guest, path, safety)
                         for path in paths)
    xml = guest.domain_snapshot(safety)
    gone_to = records.named(target)
    wish = requests.DomainSnapshot(
        memory=xml is not None,
        title=f'before going back to {gone_to.title if gone_to else target}',
        extra={} if kept else {_UNWANTED: True})
    record = new_record(
        guest, wish, records, safety, [] if gone_to is not None else [
            disk for disk in guest.disks() if disk.path in paths])
    if gone_to is not None:
        # Its disks may have other names by now: in a rescue they have.
        record = dataclasses.replace(
            record, disks=gone_to.disks, capacities=gone_to.capacities)
    if xml is not None:
        record = dataclasses.replace(record, domain_xml=xml)
    records.replace(record)
    if kept:
        LOG.warning(
            '%s was started by somebody else while it was to go back to a '
            'snapshot; its disks may be those of then, or those of now. The '
            'state that it had is kept as the domain snapshot %s, "%s"',
            guest.name, safety, record.title)
    return record


def kept_state(records: domain_records.Records,
               safety: str) -> domain_records.Record | None:
    """The snapshot that holds what a guest was that somebody else has started,
    None if there is none.

    :param safety: of :func:`come_back`
    """
    found = records.named(safety)
    return None if found is None or found.extra.get(_UNWANTED) else found


def _restore_with_memory(
        around: undo.Surroundings, guest: guests.Guest, target: str,
        safety: str, is_back: _Note) -> domain_records.Record | None:
    """Have a guest that is off be what it was, if its memory is held and it
    may be started.

    :param is_back: notes that it is what it was
    :returns: what that gave, None if only its disks can be restored
    """
    if around.rebooted or guest.domain_snapshot(safety) is None:
        return None
    with around.host.may_start() as allowed:
        if not allowed:
            return None
        _check_off(around, guest)
        guest.revert_to(safety)
        found = is_back()
        _forget_both(guest, target, safety)
        return found


def _restore_disks(around: undo.Surroundings, guest: guests.Guest,
                   target: str, safety: str, paths: list[str]) -> None:
    """Have the disks of a guest that is off be what they were."""
    with around.host.undisturbed():
        _check_off(around, guest)
        for path in paths:
            internal_snapshot.apply_again(around, path, safety)
        _forget_both(guest, target, safety)


def _check_off(around: undo.Surroundings, guest: guests.Guest) -> None:
    """:raises UndoFailed: if somebody has started it while its lock was
        waited for; the next try sees what it is
    """
    if power.running_guest(around) is not None:
        raise exception.UndoFailed(
            f'{guest.name} was started by somebody else meanwhile')


def _forget_both(guest: guests.Guest, target: str, safety: str) -> None:
    """Have libvirt know neither, before Nova may be at work on the guest:
    it could not undefine it."""
    for name in (target, safety):
        guest.forget_domain_snapshot(name)


def let_call_end(guest: guests.Guest, life: str | None) -> None:
    """Wait for a call that takes a guest down or starts it, whose end nobody
    hears of.

    :param life: the guest's before it, None if it was off
    :raises UndoFailed: if it does not end
    """
    begun = time.monotonic()

    def is_over() -> bool:
        if guest.state() is guests.State.SHUTOFF:
            return time.monotonic() - begun > _REACHED_S
        return guest.life() != life and not guest.is_starting_up()
    wait_for_call(guest, is_over)


def delete(guest: guests.Guest, record: domain_records.Record,
           records: domain_records.Records, host: hosts.Host) -> None:
    """Delete one from the disks of a guest, and its record.

    An external one as :func:`external_merge.delete` does. Of a guest that is
    gone nothing is deleted: ``records.forget()`` is for that.

    :raises GuestBusy: if a snapshot, a rollback, or a job of it is under way
    :raises UndoFailed: if it can't be deleted now; the next snapshot of the
        guest, or recovery, tries it again
    """
    if record.external:
        external_merge.delete(guest, record, records, host)
        return
    undo.finish_left_over(records.state_directory, guest, host)
    # No guard: whatever dies in this, the guest is neither paused nor taken
    # down, and can be started if it is off. QEMU, or qemu-img, takes the
    # snapshot out of the file's table by one write, before it frees what the
    # snapshot held. So nobody but the disk's room has to wait.
    with undo.UndoLog.create(records.state_directory, guest, host) as log:
        job = guest.job()
        if job is not None:
            raise exception.GuestBusy(
                f'Another job of {guest.name} is under way: {job}')
        # What is no disk of the guest any more may be another's.
        paths = {disk.path for disk in guest.disks()}
        log.push(delete_domain_snapshot, name=record.name, uuid=record.uuid,
                 paths=sorted(paths & set(record.disks.values())),
                 state_directory=records.state_directory)
