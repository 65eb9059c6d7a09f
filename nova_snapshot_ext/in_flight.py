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

"""What is on disk of Nova's snapshots in flight: for after nova-compute died.

The undo log says how a guest comes back, and its guard may finish that while
nova-compute is dead. What only nova-compute can see to, the image in Glance
and what Nova says of the server, is in a file of its own, one for each image:
it is there from before the snapshot begins until nova-compute has seen its
end. A lock tells whether the one that wrote it lives, as that of an undo log
does.
"""

import contextlib
import dataclasses
import os
import types
import typing

from oslo_log import log as logging

from nova_snapshot_ext import rights
from nova_snapshot_ext import undo

LOG = logging.getLogger(__name__)

VERSION = 1
SUFFIX = '.in-flight'


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One that Nova asked for."""

    image_id: str
    instance_uuid: str
    #: whose request it was
    project_id: str | None
    user_id: str | None
    request_id: str
    #: what the server did when it was asked for
    task_state: str | None


class Record(contextlib.AbstractContextManager['Record']):
    """A snapshot in flight, as long as the process lives that holds it."""

    def __init__(self, path: str, descriptor: int, snapshot: Snapshot,
                 announced: list[int]) -> None:
        """Use :meth:`begin` or :meth:`adopt`."""
        self.path = path
        self._descriptor = descriptor
        self.snapshot = snapshot
        #: the length of each body that Glance was sent, or was to be
        self.announced = announced

    @classmethod
    def begin(cls, directory: str, snapshot: Snapshot) -> 'Record':
        """Write that a snapshot is begun, and flush it.

        :param directory: where undo logs are kept; made if it is not there
        :raises GuestBusy: if a living process fills the same image
        """
        # Sockets may be made below it, which QEMU passes to.
        rights.make_passable(directory)
        path = os.path.join(directory, snapshot.image_id + SUFFIX)
        descriptor = undo.open_locked(path, os.O_CREAT, path)
        try:
            os.ftruncate(descriptor, 0)
            undo.append(descriptor, path, {
                'in_flight': VERSION, **dataclasses.asdict(snapshot)})
            undo.flush_directory(directory)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, snapshot, [])

    @classmethod
    def adopt(cls, path: str) -> 'Record | None':
        """Take over what a dead process left.

        :returns: None if it had not begun
        :raises GuestBusy: if it is not dead
        :raises FileNotFoundError: if there is nothing (any more)
        :raises ValueError: if it can't be understood
        """
        descriptor = undo.open_locked(path, 0, path)
        try:
            records = undo.read_records(path)
            if not records:
                os.unlink(path)
                os.close(descriptor)
                return None
            return cls(path, descriptor, *_understood(path, records))
        except BaseException:
            os.close(descriptor)
            raise

    def announce(self, length: int) -> None:
        """Write that a body is about to be sent, and flush it."""
        undo.append(self._descriptor, self.path, {'announced': length})
        self.announced.append(length)

    def forget(self) -> None:
        """Nothing is left to see to."""
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            # No reason for a snapshot to fail: a whole image is left alone.
            LOG.warning('%s could not be deleted, and will be taken for that '
                        'of a dead nova-compute: %s', self.path, error)
        self.close()

    def close(self) -> None:
        """Let go of it; it stays for the next start of nova-compute."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __exit__(self, kind: type[BaseException] | None,
                 error: BaseException | None,
                 traceback: types.TracebackType | None) -> None:
        if kind is None or issubclass(kind, Exception):
            self.forget()
        else:
            # The process ends, and Nova does not delete the image.
            self.close()


def left_in(directory: str) -> list[str]:
    """The path of every record in a directory, which need not exist."""
    return undo.logs_in(directory, SUFFIX)


def _understood(path: str, records: list[typing.Any],
                ) -> tuple[Snapshot, list[int]]:
    try:
        head = dict(records[0])
        version = head.pop('in_flight')
        if version != VERSION:
            raise ValueError(
                f'{path} is a record of version {version}; this is for '
                f'version {VERSION}')
        return (Snapshot(**head),
                [int(record['announced']) for record in records[1:]])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'{path} is not a record of a snapshot: {error}') from error
