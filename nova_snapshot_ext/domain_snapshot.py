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

"""Domain snapshots: internal ones of all disks of a guest at one instant,
with its memory or without, that stay."""

from nova_snapshot_ext import domain_records
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import host as hosts


def delete(guest: guests.Guest, record: domain_records.Record,
           records: domain_records.Records, host: hosts.Host) -> None:
    """Delete one from the disks of a guest, and its record.

    Of a guest that is gone nothing is deleted: ``records.forget()`` is for
    that.

    :raises GuestBusy: if a snapshot, or a rollback, of it is under way
    :raises UndoFailed: if it can't be deleted now; the next snapshot of the
        guest, or recovery, tries it again
    """
    raise NotImplementedError
