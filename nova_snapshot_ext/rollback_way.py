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

"""What the steps of a rollback to a snapshot of either kind share."""

import abc
import collections.abc
import contextlib
import dataclasses

from nova_snapshot_ext import domain_records
from nova_snapshot_ext import domain_snapshot
from nova_snapshot_ext import exception
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import undo


@dataclasses.dataclass
class Way(abc.ABC):
    """One rollback; see :func:`rollback.revert`."""

    guest: guests.Guest
    record: domain_records.Record
    records: domain_records.Records
    #: how long the guest did not run
    pause: frozen.Pause
    #: whether the guest is where it was to go
    done: bool = False

    @abc.abstractmethod
    def obstacle(self) -> str | None:
        """Say why the guest can't go, or None."""

    @abc.abstractmethod
    def go(self, log: undo.UndoLog) -> None:
        """Go, or come back; nothing of ours is left either way."""

    def kept_state(self) -> domain_records.Record | None:
        """The snapshot that holds what the guest was, if somebody else has
        started it meanwhile; None if it is what it was."""
        return None

    @contextlib.contextmanager
    def _allowed_to_start(
            self, log: undo.UndoLog) -> collections.abc.Iterator[None]:
        with log.surroundings.host.may_start() as allowed:
            if not allowed:
                raise exception.RollbackRefused(
                    f'{self.guest.name} is not ours to start: it is being '
                    f'stopped or deleted')
            yield

    def _come_up(self, call: collections.abc.Callable[[], None],
                 has_arrived: collections.abc.Callable[[], bool]) -> None:
        """Make the call that starts a guest that is off.

        If its connection breaks it goes on all the same, or did not begin:
        the guest shows which. Somebody else may have started it meanwhile.

        :param has_arrived: whether a guest that is up is where it was to go
        """
        try:
            call()
        except guests.LibvirtError as error:
            if not error.of_connection:
                raise
            domain_snapshot.let_call_end(self.guest, None)
            if (self.guest.state() is guests.State.SHUTOFF
                    or not has_arrived()):
                raise
