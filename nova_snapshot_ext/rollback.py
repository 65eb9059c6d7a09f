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

"""The recipe of a rollback: a guest goes back to a domain snapshot."""

import dataclasses

from nova_snapshot_ext import domain_records
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import host as hosts


@dataclasses.dataclass(frozen=True)
class Result:
    """What was done."""

    rollback: domain_records.Rollback
    #: seconds for which the guest did not run
    guest_pause_s: float


def is_there(guest: guests.Guest, record: domain_records.Record) -> bool:
    """Whether every disk that a snapshot was taken of still holds it."""
    raise NotImplementedError


def obstacle(guest: guests.Guest,
             record: domain_records.Record) -> str | None:
    """Say why a guest can't go back to a snapshot, or None.

    Never touches the guest.

    :returns: words that an operator understands
    :raises GuestGone: if there is no guest any more
    """
    raise NotImplementedError


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
    :raises SnapshotError: if it failed; the guest is as it was
    """
    raise NotImplementedError
