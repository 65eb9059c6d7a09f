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

"""External snapshots are deleted: two layers of a disk become one.

What was written after the instant of the snapshot is in the layer above; that
is committed into the layer which holds the instant. So the lower file stays,
down to the guest's first one, under its own path and in its own format. All
the while the upper layer shows the same content, and a merge that was cut off
goes on where it is found; but the instant is lost from its beginning on. So
there is no way back from it, only one to its end.
"""

import collections.abc
import contextlib
import dataclasses
import os
import time
import typing

from oslo_log import log as logging

from nova_snapshot_ext import disk as disks_
from nova_snapshot_ext import domain_records
from nova_snapshot_ext import exception
from nova_snapshot_ext import external_files
from nova_snapshot_ext import guard as guards
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext import internal_snapshot
from nova_snapshot_ext import power
from nova_snapshot_ext import qemu_img
from nova_snapshot_ext import undo
from nova_snapshot_ext import workspace

LOG = logging.getLogger(__name__)

_POLL_S = 0.1
# A guest may be started or stopped meanwhile; so often it is looked anew.
_TRIES = 5
# Of a commit: as long as the disk takes.
_COMMIT_TIMEOUT_S = 24 * 3600


@dataclasses.dataclass(frozen=True)
class Merge:
    """Two layers of one disk, and what else rests on the upper one."""

    target: str
    #: path of the upper layer, an overlay of ours
    top: str
    #: path of the lower one
    base: str
    #: of the lower one
    format: str
    #: paths of other overlays that are based on the upper one
    above: list[str]

    @property
    def note(self) -> str:
        """The path of what says that a pivot was begun."""
        return f'{self.top}.pivoting'

    @property
    def nowhere(self) -> disks_.Layer:
        """What is not there, so that a guest can't be started from it."""
        return disks_.Layer(f'{self.note}.unknown', external_files.FORMAT)

    @property
    def upper(self) -> disks_.Layer:
        return disks_.Layer(self.top, external_files.FORMAT)

    @property
    def lower(self) -> disks_.Layer:
        return disks_.Layer(self.base, self.format)

    def check(self) -> None:
        """:raises ValueError: if it is of other files than we make: a log may
            be another user's than who runs it
        """
        for path in (self.top, *self.above):
            if not external_files.is_ours(path) or os.path.islink(path):
                raise ValueError(f'{path} is not an overlay of ours')
        if os.path.dirname(self.top) != os.path.dirname(self.base) or (
                external_files.is_ours(self.base)
                and os.path.islink(self.base)):
            raise ValueError(f'{self.base} is not what {self.top} is made of')


@undo.step
def merge_external_snapshot(
        around: undo.Surroundings, name: str, uuid: str,
        state_directory: str, child: str | None,
        merges: list[dict[str, typing.Any]], files: list[str]) -> None:
    """Delete a snapshot: have what descends from it take its place.

    Also the undo of one that was not taken: then nothing is to be merged.

    :param child: the snapshot that descends from it, None if that is what
        the guest writes to, or if nothing does
    :param merges: fields of a :class:`Merge` for each of its disks
    :param files: what is of no use then
    :raises SnapshotError: if it is not done; it can be tried again
    """
    internal_snapshot.check_name(name)
    if power.is_gone(around):
        return
    records = domain_records.Records(state_directory, uuid)
    for fields in merges:
        merge = Merge(**fields)
        merge.check()
        _merge(around, merge, records.named(child))
        record = records.named(child)
        if record is not None:
            records.replace(_with_file(record, merge))
    used = used_files(around)
    for path in files:
        if path in used:
            raise exception.UndoFailed(
                f'{path} is not deleted: the guest is made of it')
    for path in files:
        external_files.delete(path)
    records.remove(name)


def used_files(around: undo.Surroundings) -> set[str]:
    """The paths of what a guest would be started with, and of all that it is
    made of while it is off.

    While it is up QEMU's locks tell, and better than libvirt where that died
    in a pivot.
    """
    guest = around.guest
    assert guest is not None
    paths = set(guest.defined_disks().values())
    if power.running_guest(around) is None:
        for disk in guest.disks():
            with contextlib.suppress(exception.UnsafeDisk):
                paths |= {layer.path for layer in disks_.chain_of(disk)}
    return paths


def _with_file(record: domain_records.Record,
               merge: Merge) -> domain_records.Record:
    """The record of what is in the lower layer now."""
    assert record.files is not None
    return dataclasses.replace(
        record, disks=record.disks | {merge.target: merge.base},
        files=dataclasses.replace(
            record.files, formats=record.files.formats | {
                merge.target: merge.format}))


def _merge(around: undo.Surroundings, merge: Merge,
           child: domain_records.Record | None) -> None:
    """See that the lower layer has all that the upper one has."""
    failure: exception.SnapshotError | None = None
    for _ in range(_TRIES):
        try:
            with internal_snapshot.as_it_is(around) as guest:
                if _is_merged(around, guest, merge, child):
                    _remove_note(merge)
                    return
            continue
        except exception.UndoFailed:
            raise
        except exception.SnapshotError as error:
            failure = error
            time.sleep(_POLL_S)
    raise exception.UndoFailed(
        f'{merge.top} is not committed into {merge.base} yet: {failure}')


def _is_merged(around: undo.Surroundings, guest: guests.Guest | None,
               merge: Merge, child: domain_records.Record | None) -> bool:
    """Take the next step to it.

    :param guest: None if it is off
    :returns: whether it was the last one
    """
    assert around.guest is not None
    if guest is None:
        _check_known(around.guest, merge)
    chain = _chain(around.guest, merge.target)
    paths = [layer.path for layer in chain]
    if merge.top in paths:
        upper = chain[paths.index(merge.top):]
        if guest is not None:
            if _commit_by_job(guest, merge, merge.top == paths[0]):
                return True
        else:
            _commit(around, merge, upper)
            _put_on_base(around, merge, paths[:0])
            if merge.top == paths[0]:
                around.guest.define_disks({merge.target: merge.lower})
        return False        # looked at once more
    if child is None and merge.base not in paths:
        raise exception.UndoFailed(
            f'{merge.target} is not made of {merge.base} any more: what was '
            f'written since is left in {merge.top}')
    if merge.base not in paths and child is not None and (
            child.disks.get(merge.target) == merge.top):
        # Nobody has it open.
        _commit(around, merge, disks_.chain_from_headers(
            disks_.Layer(merge.top, external_files.FORMAT)))
    if child is not None:
        _put_on_base(around, merge, paths)
    else:
        _define_lower(around.guest, merge)
    return True


def _check_known(guest: guests.Guest, merge: Merge) -> None:
    """See that it is known what a guest that is off has written to.

    :raises UndoFailed: if it is not
    """
    if guest.defined_disks().get(merge.target) == merge.nowhere.path:
        raise exception.UndoFailed(
            f'libvirt died when {merge.target} was about to be written to '
            f'{merge.base} in place of {merge.top}, and the guest is off '
            f'now: nobody knows which of them is newer, and it is not '
            f'started from either ({merge.note})')
    if _is_of_first_version(merge):
        raise exception.UndoFailed(
            f'{merge.target} may have been written to {merge.base} in place '
            f'of {merge.top} when libvirt died, unknown to it, and the guest '
            f'is off now: nothing is committed. Once it is known which of '
            f'them is newer, and the domain is defined with that, delete '
            f'{merge.note}')


def _is_of_first_version(merge: Merge) -> bool:
    """Whether its note is of the version that left the definition alone in a
    pivot: it wrote nothing into the note."""
    try:
        return os.lstat(merge.note).st_size == 0
    except FileNotFoundError:
        return False


def _define_lower(guest: guests.Guest, merge: Merge) -> None:
    if guest.defined_disks().get(merge.target) in (
            merge.top, merge.nowhere.path):
        guest.define_disks({merge.target: merge.lower})


def _chain(guest: guests.Guest, target: str) -> tuple[disks_.Layer, ...]:
    """The layers of a disk that a guest has, none of one that it has not."""
    for disk in guest.disks():
        if disk.target == target:
            return disks_.chain_of(disk)
    return ()


def _commit_by_job(guest: guests.Guest, merge: Merge,
                   active: bool) -> bool:
    """Have QEMU commit while it is up; one that is under way goes on.

    :returns: whether QEMU had done it before, unknown to libvirt
    :raises UndoFailed: if the job ends before it is done
    """
    if guest.block_job(merge.target) is None:
        if os.path.exists(merge.note):
            if _is_done_by_qemu(guest, merge):
                return True
            _call_off(guest, merge)
        try:
            guest.start_commit(merge.target, merge.base, merge.top, active)
        except guests.LibvirtError as error:
            if error.of_connection or not _is_done_by_qemu(guest, merge):
                raise
            return True
    deadline = time.monotonic() + _COMMIT_TIMEOUT_S
    while (job := guest.block_job(merge.target)) is not None:
        if time.monotonic() > deadline:
            raise exception.UndoFailed(
                f'The commit of {merge.top} into {merge.base} does not end')
        if job.mirror not in ('', merge.base):
            raise exception.UndoFailed(
                f'{merge.target} has another block job: {job.kind}')
        if active and job.ready:
            _pivot(guest, merge)
        time.sleep(_POLL_S)
    if merge.top in [layer.path for layer in _chain(guest, merge.target)]:
        raise exception.UndoFailed(
            f'The commit of {merge.top} into {merge.base} ended early: there '
            f'may be no room, or somebody ended it')
    return False


def _pivot(guest: guests.Guest, merge: Merge) -> None:
    """Have the guest write to the lower layer from now on.

    If libvirtd dies in this, QEMU may have done it and libvirt not know, from
    then on (seen with libvirt 9.0 and 11.3): what is in the upper layer gets
    old, and with newer data below it is neither. Before, the lower one lacks
    what QEMU has not copied yet. So there must be no moment in which the
    guest could be started from the wrong one, whoever does that: until it is
    known, its definition names a file that is not there. libvirt leaves that
    alone in the pivot, because it is not what the guest runs from.
    """
    is_first = not os.path.lexists(merge.note)
    _write_note(guest, merge)
    # Somebody may have said that it is something else from its next start on.
    if guest.is_persistent() and (
            guest.defined_disks().get(merge.target) == merge.top):
        guest.define_disks({merge.target: merge.nowhere})
    try:
        guest.pivot(merge.target)
    except guests.LibvirtError as error:
        if (is_first and error.was_not_up
                and guest.state() is guests.State.SHUTOFF):
            # It was shut down meanwhile, and QEMU never asked to.
            _take_back(guest, merge)
        elif not error.of_connection and not _is_done_by_qemu(guest, merge):
            _call_off(guest, merge)
        raise
    _define_lower(guest, merge)
    _remove_note(merge)


def _write_note(guest: guests.Guest, merge: Merge) -> None:
    """It is whole when it is there. Nothing is written through a link: the
    directory may be another user's."""
    new = f'{merge.note}.new'
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    descriptor = os.open(
        new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        | os.O_CLOEXEC, 0o644)
    with open(descriptor, 'w') as note:
        note.write(
            f'{merge.target} of {guest.name} was about to be written to '
            f'{merge.base} in place of {merge.top}. Until it is known '
            f'whether it was, the domain is not started from either.\n')
        note.flush()
        os.fsync(note.fileno())
    os.rename(new, merge.note)
    undo.flush_directory(os.path.dirname(merge.note))


def _call_off(guest: guests.Guest, merge: Merge) -> None:
    """There is no job that could have the guest write to the lower layer.

    Nothing is changed unless QEMU has the upper one open.
    """
    if any(merge.top in chain for chain in guest.open_chains()):
        _take_back(guest, merge)


def _take_back(guest: guests.Guest, merge: Merge) -> None:
    """What the guest writes to is the upper layer, and known."""
    if guest.defined_disks().get(merge.target) == merge.nowhere.path:
        guest.define_disks({merge.target: merge.upper})
    _remove_note(merge)


def _is_done_by_qemu(guest: guests.Guest, merge: Merge) -> bool:
    """Whether QEMU has merged what libvirt says it has not.

    Then the definition is put right at least: libvirt's own picture of the
    running guest gets right when that is started anew.
    """
    chains = guest.open_chains()
    if any(merge.top in chain for chain in chains) or not any(
            merge.base in chain for chain in chains):
        return False
    _define_lower(guest, merge)
    LOG.warning(
        'QEMU of %s has committed %s into %s, and libvirt, which died '
        'meanwhile, does not know it: other jobs of %s fail until the guest '
        'is shut down and started again', guest.name, merge.top, merge.base,
        merge.target)
    guest.close_file(merge.top)
    return True


def _remove_note(merge: Merge) -> None:
    for path in (merge.note, f'{merge.note}.new'):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _commit(around: undo.Surroundings, merge: Merge,
            upper: collections.abc.Sequence[disks_.Layer]) -> None:
    """Commit a layer that nobody has open.

    :param upper: it, and all below it
    :raises UndoFailed: if it is not based on the other one
    """
    if len(upper) < 2 or upper[1].path != merge.base:
        raise exception.UndoFailed(
            f'{merge.top} is not based on {merge.base} any more')
    # The format of what is below is the one that libvirt said then.
    layers = (upper[0], merge.lower, *upper[2:])
    with contextlib.ExitStack() as stack:
        for layer in layers[:2]:
            stack.enter_context(internal_snapshot.own(around, layer.path))
        qemu_img.run('commit', '-q', '-d', disks_.json_name(
            disks_.chain_options(layers)), timeout=_COMMIT_TIMEOUT_S)


def _put_on_base(around: undo.Surroundings, merge: Merge,
                 in_use: collections.abc.Container[str]) -> None:
    """Have the other overlays be based on the lower layer, which holds the
    same.

    :param in_use: paths of those that QEMU has seen to
    """
    for path in merge.above:
        if path not in in_use and os.path.exists(path):
            with internal_snapshot.own(around, path):
                qemu_img.run('rebase', '-u', '-f', external_files.FORMAT,
                             '-b', merge.base, '-F', merge.format, path)


def delete(guest: guests.Guest, record: domain_records.Record,
           records: domain_records.Records, host: hosts.Host) -> None:
    """Delete one, and its record.

    :raises DeletionRefused: if it can't be as things are
    :raises GuestBusy: if a snapshot, a rollback, or a job of it is under way
    :raises UndoFailed: if it is not done now; its guard, the next snapshot of
        the guest, or recovery, goes on
    """
    undo.finish_left_over(records.state_directory, guest, host)
    with guards.Guard() as guard, undo.UndoLog.create(
            records.state_directory, guest, host) as log:
        # What was left over may have changed it, or been its deletion.
        found = records.named(record.name)
        if found is None:
            return
        record = found
        _check_no_job(guest, record)
        arguments = _plan(guest, record, records)
        guard.watch(log)
        log.push(merge_external_snapshot, name=record.name, uuid=record.uuid,
                 state_directory=records.state_directory, **arguments)


def _check_no_job(guest: guests.Guest,
                  record: domain_records.Record) -> None:
    job = guest.job()
    if job is None and guest.state() is not guests.State.SHUTOFF:
        job = next((f'a block job of {target}' for target in record.disks
                    if guest.block_job(target) is not None), None)
    if job is not None:
        raise exception.GuestBusy(
            f'Another job of {guest.name} is under way: {job}')
    if guest.has_managed_save():
        raise exception.DeletionRefused(
            f'The memory of {guest.name} is saved, and it would start from '
            f'files that are merged then: start it before')


def _plan(guest: guests.Guest, record: domain_records.Record,
          records: domain_records.Records) -> dict[str, typing.Any]:
    """What is to be done, as arguments of the step.

    :raises DeletionRefused: if nothing right can be
    """
    assert record.files is not None
    now = {disk.target: disk.path for disk in guest.disks()}
    children = [each for each in records.all() if each.parent == record.name]
    is_current = records.current == record.name
    files = [record.files.memory] if record.files.memory else []
    if len(children) + is_current > 1:
        raise exception.DeletionRefused(
            f'More than one state of {guest.name} descends from '
            f'{record.title}: ' + ', '.join(
                [each.title for each in children]
                + ['its present one'] * is_current)
            + '; all but one of them have to be deleted before')
    _check_alone(guest, record, records, now)
    if not children and not is_current:
        _check_no_other(record, set())
        # The first file of a disk that was attached later stays.
        return {'child': None, 'merges': [],
                'files': [*filter(external_files.is_ours,
                                  record.disks.values()), *files]}
    child = children[0] if children else None
    merges = []
    for target, base in record.disks.items():
        top = (now if child is None else child.disks).get(target)
        if top is None or external_files.base_of(top) != base:
            raise exception.DeletionRefused(
                f'{target} of {guest.name} is not based on {base} any more: '
                f'it was changed by somebody else')
        above = _above(records, child, now, target)
        for path in above:
            if not external_files.is_ours(path) or (
                    external_files.base_of(path) != top):
                raise exception.DeletionRefused(
                    f'{target} of {guest.name}, {path}, is not based on '
                    f'{top} any more: it was changed by somebody else')
        merges.append(dataclasses.asdict(Merge(
            target, top, base, record.files.formats[target], above)))
        _check_room(top, base)
    _check_no_other(record, {merge['top'] for merge in merges})
    return {'child': child and child.name, 'merges': merges,
            'files': [merge['top'] for merge in merges] + files}


def _check_alone(guest: guests.Guest, record: domain_records.Record,
                 records: domain_records.Records,
                 now: dict[str, str]) -> None:
    """See that nothing rests on its files but what descends from it.

    A disk that was attached later stays what it is in a rollback of disks
    alone.

    :raises DeletionRefused: if something does
    """
    # Titles need not be unique.
    states = [(each.title, each.disks) for each in records.all()
              if each.parent != record.name]
    if records.current != record.name:
        states.append(('its present state', now))
    for title, disks in states:
        for target, path in disks.items():
            if external_files.is_ours(path) and external_files.base_of(
                    path) in record.disks.values():
                raise exception.DeletionRefused(
                    f'{target} of {guest.name} in {title} is based on what '
                    f'{record.title} is made of')


def _check_no_other(record: domain_records.Record,
                    known: collections.abc.Container[str]) -> None:
    """See that no other overlay rests on its files, such as that of a disk
    that was detached: it would be lost, and no record tells of it.

    :param known: paths of those that are merged
    :raises DeletionRefused: if one does
    """
    bases = set(record.disks.values())
    for directory in sorted(set(map(os.path.dirname, bases))):
        for path in external_files.overlays_in(directory):
            if path not in known and external_files.base_of(path) in bases:
                raise exception.DeletionRefused(
                    f'{path} is based on what {record.title} is made of, and '
                    f'is no disk of a state that is known: if nobody needs '
                    f'it, delete it before')


def _above(records: domain_records.Records,
           child: domain_records.Record | None, now: dict[str, str],
           target: str) -> list[str]:
    """The overlays that are based on a child's file."""
    if child is None:
        return []
    found = [each.disks.get(target) for each in records.all()
             if each.parent == child.name]
    if records.current == child.name:
        found.append(now.get(target))
    return [path for path in found if path is not None]


def _check_room(top: str, base: str) -> None:
    needed = os.stat(top).st_blocks * 512
    free = workspace.free_bytes(os.path.dirname(base))
    if free < needed:
        raise exception.DeletionRefused(
            f'What is in {top} may take {needed} bytes more in '
            f'{os.path.dirname(base)}, where {free} are free')
