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

"""Why no domain snapshot of either kind can be taken of a guest."""

import os

from nova_snapshot_ext import disk as disks_
from nova_snapshot_ext import domain_records
from nova_snapshot_ext import domain_snapshot
from nova_snapshot_ext.flows import base
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import workspace

_GIB = 1024 ** 3
_WITHOUT = '(snapshot_memory=false, --no-memory)'


def why_no_memory(guest: guests.Guest, request: requests.Request,
                  held: tuple[disks_.Disk, ...] | None = None) -> str | None:
    """Why its memory can't be part of one.

    :param held: the disks that are part of it, None for those of an internal
        one
    """
    if request.quiesce is requests.Quiesce.REQUIRED:
        # They would be frozen after each rollback.
        return (f'the guest must be quiesced (os_require_quiesce), which a '
                f'snapshot with memory is not {_WITHOUT}')
    why = domain_snapshot.why_no_memory(guest, held)
    return None if why is None else f'{why} {_WITHOUT}'


def why_no_room(guest: guests.Guest, held: base.Disks, with_memory: bool,
                request: requests.Request) -> str | None:
    """Why there is no room for another one beside those that it has.

    :param held: the disks that are part of it
    """
    wish = request.domain
    records = domain_records.Records(
        request.state_directory, guest.uuid).all()
    if any(record.external is not wish.external for record in records):
        other = 'internal' if wish.external else 'external'
        return (f'it has {other} snapshots, which it could not go back to '
                f'then: delete them before')
    if len(records) >= wish.most:
        return (f'it has {len(records)} domain snapshots, and [snapshot_ext] '
                f'max_domain_snapshots = {wish.most}: delete one (in Nova: '
                f'its image)')
    memory = guest.memory_bytes() if with_memory else 0
    directory = os.path.dirname(held[0].path)
    free = workspace.free_bytes(directory)
    if free < memory:
        return (f'its memory may take {memory} bytes in {directory}, where '
                f'{free} are free')
    size = sum(guest.capacity(disk.target) for disk in held)
    taken = _taken_bytes(held, records)
    if wish.most_gb and taken + memory - size > wish.most_gb * _GIB:
        return (f'its disks of {size} bytes take {taken} on the host, and its '
                f'memory may add {memory}; [snapshot_ext] '
                f'max_domain_snapshots_gb = {wish.most_gb} is what may be '
                f'beyond their size: delete a domain snapshot (in Nova: its '
                f'image)')
    return None


def _taken_bytes(held: base.Disks,
                 records: list[domain_records.Record]) -> int:
    """What its disks take, and all files of external snapshots of it."""
    paths = {disk.path for disk in held}
    for record in records:
        if record.files is not None:
            paths |= {*record.disks.values(), record.files.memory}
    return sum(os.stat(path).st_blocks * 512 for path in paths
               if os.path.exists(path))
