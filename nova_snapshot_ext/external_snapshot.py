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

"""External domain snapshots: from one instant on, a guest writes elsewhere.

The files of its disks stay as they are at that instant; overlays are made
beside them, which the guest writes to from then on, and with memory libvirt
writes that into a file of its own. libvirt keeps no metadata of it. So it is
for raw files as well, costs no more however large they are, and its image is
read from files that nobody writes to.
"""

import dataclasses
import os
from xml.etree import ElementTree

from nova_snapshot_ext import disk as disks_
from nova_snapshot_ext import domain_obstacles
from nova_snapshot_ext import domain_records
from nova_snapshot_ext import domain_snapshot
from nova_snapshot_ext import exception
from nova_snapshot_ext import external_files
from nova_snapshot_ext import external_merge
from nova_snapshot_ext.flows import base
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import internal_snapshot
from nova_snapshot_ext import power
from nova_snapshot_ext import quiesce
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo


def held_disks(guest: guests.Guest) -> tuple[disks_.Disk, ...]:
    """The disks that are part of an external snapshot: files.

    As for internal ones, what is elsewhere than the root disk of a guest of
    Nova's is a volume, and left alone.
    """
    root = os.path.dirname(guest.root_disk().path)
    elsewhere = not guest.belongs_to_nova()
    return tuple(
        disk for disk in guest.disks()
        if (disk.device == 'disk' and disk.kind == 'file' and disk.path
            and disk.format in ('raw', 'qcow2')
            and external_files.has_file_name(disk.target)
            and not (disk.readonly or disk.shared or disk.transient
                     or disk.encrypted)
            and (elsewhere or os.path.dirname(disk.path) == root)))


def obstacle(guest: guests.Guest, disks: base.Disks,
             request: requests.Request) -> str | None:
    """Why none can be taken, None if one can. As of a flow."""
    if not request.may_stop:
        return ('Nova owns it, and would start it from the file below the '
                'overlay at its next hard reboot, which would destroy both '
                '(--force)')
    up = guest.state() is not guests.State.SHUTOFF
    held = held_disks(guest)
    targets = {disk.target for disk in held}
    for disk in disks:
        if disk.target not in targets:
            return (f'{disk.target} can have no overlay: that takes a raw or '
                    f'qcow2 file which is not shared, transient or encrypted')
    with_memory = up and request.domain.memory
    return ((base.why_no_job_can_start(guest, held) if up
             else _why_not_off(guest))
            or base.why_not_readable(held)
            or _why_no_file(held)
            or _why_not_by_headers(guest, held)
            or (domain_obstacles.why_no_memory(guest, request, held)
                if with_memory
                else quiesce.obstacle(guest, request) if up else None)
            or domain_obstacles.why_no_room(
                guest, held, with_memory, request))


def _why_not_off(guest: guests.Guest) -> str | None:
    if guest.has_managed_save():
        return ('its memory is saved (suspended), and would be started with '
                'the files that are to stay as they are')
    return None


def _why_no_file(held: base.Disks) -> str | None:
    for disk in held:
        directory = os.path.dirname(disk.path)
        if not os.access(directory, os.W_OK | os.X_OK):
            return (f'user {os.getuid()} can not make an overlay of '
                    f'{disk.target} in {directory}')
        why = external_files.why_not_given(disk.path)
        if why is not None:
            return why
    return None


def _why_not_by_headers(guest: guests.Guest, held: base.Disks) -> str | None:
    """What a definition says of a disk beyond its path and its format is lost
    with an overlay: what is below that is what headers say.
    """
    parts = {disks_.target_of(element) for element in
             guest.description().findall('./devices/disk')
             if element.find('./source/slices') is not None}
    for disk in held:
        if disk.target in parts:
            return (f'{disk.target} is a part (slice) of its file, and an '
                    f'overlay would be of all of it')
        try:
            by_headers = disks_.chain_from_headers(
                disks_.Layer(disk.path, disk.format))
            as_it_is = disks_.chain_of(disk)
        except exception.SnapshotError as error:
            return str(error)
        if _names(by_headers) != _names(as_it_is):
            return (f'what {disk.target} is based on is said by its '
                    f'definition (backingStore), which an overlay does not '
                    f'keep, and otherwise in the header of {disk.path}')
    return None


def _names(chain: tuple[disks_.Layer, ...]) -> list[tuple[str, str]]:
    return [(os.path.realpath(layer.path), layer.format) for layer in chain]


def take(guest: guests.Guest, request: requests.Request, log: undo.UndoLog,
         pause: frozen.Pause) -> domain_snapshot.Taken:
    """Take one, which its undo merges again.

    :param pause: gets the time for which the guest stands still
    """
    up = guest.state() is not guests.State.SHUTOFF
    with_memory = up and request.domain.memory
    name = internal_snapshot.new_name()
    held = held_disks(guest)
    overlays = {disk.target: external_files.overlay_beside(
        disk.path, name, disk.target) for disk in held}
    memory = external_files.memory_beside(
        held[0].path, name) if with_memory else ''
    records = domain_records.Records(request.state_directory, guest.uuid)
    entry = log.push(
        external_merge.merge_external_snapshot, name=name, uuid=guest.uuid,
        state_directory=request.state_directory, child=None,
        merges=[{'target': disk.target, 'top': overlays[disk.target],
                 'base': disk.path, 'format': disk.format, 'above': []}
                for disk in held],
        files=[*overlays.values(), *[memory] * with_memory])
    record = domain_snapshot.new_record(
        guest, dataclasses.replace(request.domain, memory=with_memory),
        records, name, held, domain_records.Files(
            {disk.target: disk.format for disk in held}, memory))
    for disk in held:
        external_files.create_overlay(
            overlays[disk.target], disks_.Layer(disk.path, disk.format),
            record.capacities[disk.target], disk.path,
            log.surroundings.host)
    consistency = frozen.Consistency.CRASH
    if up:
        consistency = _of_guest_that_is_up(
            guest, overlays, memory, request, log, pause)
    else:
        if guest.was_shut_down():
            consistency = frozen.Consistency.STOPPED
        guest.define_disks({
            target: disks_.Layer(path, external_files.FORMAT)
            for target, path in overlays.items()})
    record = dataclasses.replace(
        record, domain_xml=f'<domainsnapshot>{record.domain_xml}'
        f'</domainsnapshot>')
    return domain_snapshot.Taken(record, consistency, entry, records)


def _of_guest_that_is_up(
        guest: guests.Guest, overlays: dict[str, str], memory: str,
        request: requests.Request, log: undo.UndoLog,
        pause: frozen.Pause) -> frozen.Consistency:
    call = log.push(let_overlays_be_taken, overlays=overlays)
    words = _description(guest, overlays, memory)
    consistency = frozen.Consistency.CRASH
    if memory:
        with pause.measured(), log.calling():
            guest.take_external_snapshot(words, memory=True)
    else:
        with quiesce.quiesced(guest, request, log, pause) as outcome:
            with log.calling():
                guest.take_external_snapshot(words, memory=False)
        consistency = outcome.consistency
    if not _writes_to(guest, overlays):
        raise exception.FreezeFailed(
            f'{guest.name} does not write to its overlays, though libvirt '
            f'has taken the snapshot')
    call.drop()
    return consistency


def _description(guest: guests.Guest, overlays: dict[str, str],
                 memory: str) -> str:
    """What libvirt is told to take
    (https://libvirt.org/formatsnapshot.html): every disk named."""
    root = ElementTree.Element('domainsnapshot')
    if memory:
        ElementTree.SubElement(
            root, 'memory', snapshot='external', file=memory)
    else:
        ElementTree.SubElement(root, 'memory', snapshot='no')
    disks = ElementTree.SubElement(root, 'disks')
    for disk in guest.disks():
        if disk.target not in overlays:
            ElementTree.SubElement(
                disks, 'disk', name=disk.target, snapshot='no')
            continue
        element = ElementTree.SubElement(
            disks, 'disk', name=disk.target, snapshot='external',
            type='file')
        ElementTree.SubElement(
            element, 'driver', type=external_files.FORMAT)
        ElementTree.SubElement(
            element, 'source', file=overlays[disk.target])
    return ElementTree.tostring(root, encoding='unicode')


def _writes_to(guest: guests.Guest, overlays: dict[str, str]) -> bool:
    now = {disk.target: disk.path for disk in guest.disks()}
    return all(now.get(target) == path for target, path in overlays.items())


@undo.step
@undo.with_guest
def let_overlays_be_taken(
        around: undo.Surroundings, guest: guests.Guest,
        overlays: dict[str, str]) -> None:
    """Wait for a snapshot that a dead owner left libvirt to take, and see
    that the guest goes on after it.

    :param overlays: by target
    """
    if around.owner_died and power.running_guest(around) is not None:
        domain_snapshot.wait_for_call(
            guest, lambda: _writes_to(guest, overlays))
    if guest.is_paused_by_snapshot():
        guest.resume()
