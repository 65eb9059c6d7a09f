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
nova-compute is dead. What only nova-compute can see to, the images in Glance
and what Nova says of the server, is in a file of its own, one for each image
that Nova made; those of further disks are named in it. It is there from before
the snapshot begins until nova-compute has seen its end; and, if that is an
error, until Nova has had the time to delete its image. A lock tells whether
the one that wrote it lives, as that of an undo log does.
"""

import collections.abc
import contextlib
import dataclasses
import os
import threading
import types
import typing

from oslo_log import log as logging

from nova_snapshot_ext import exception
from nova_snapshot_ext import rights
from nova_snapshot_ext import undo

LOG = logging.getLogger(__name__)

VERSION = 1
SUFFIX = '.in-flight'
# How long Nova may take to delete the image of a snapshot that failed, which
# is the next that it does.
_NOVA_DELETES_S = 600.0
# By its path: one of this process that waits for that.
_left_to_nova: 'dict[str, Record]' = {}


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
                 announced: list[int], failure: str | None = None,
                 further: list[str] | None = None,
                 adopted: bool = False) -> None:
        """Use :meth:`begin` or :meth:`adopt`."""
        self.path = path
        self._descriptor = descriptor
        self.snapshot = snapshot
        #: the length of each body that Glance was sent, or was to be
        self.announced = announced
        #: why the snapshot failed, None while it had not
        self.failure = failure
        #: the images of further disks that there may be
        self.further = [] if further is None else further
        #: whether another process wrote it, which is dead
        self.adopted = adopted
        self._settle: collections.abc.Callable[
            [Record], object] = Record.close

    @classmethod
    def begin(
            cls, directory: str, snapshot: Snapshot,
            settle: 'collections.abc.Callable[[Record], object] | None' = None,
    ) -> 'Record':
        """Write that a snapshot is begun, and flush it.

        :param directory: where undo logs are kept; made if it is not there
        :param settle: called where the snapshot has failed, and images of
            further disks could not be deleted: Nova does not know of them
        :raises GuestBusy: if a living process fills the same image
        """
        # Sockets may be made below it, which QEMU passes to.
        rights.make_passable(directory)
        path = os.path.join(directory, snapshot.image_id + SUFFIX)
        earlier = _left_to_nova.get(path)
        if earlier is not None:
            earlier.forget()
        descriptor = undo.open_locked(path, os.O_CREAT, path)
        try:
            os.ftruncate(descriptor, 0)
            undo.append(descriptor, path, {
                'in_flight': VERSION, **dataclasses.asdict(snapshot)})
            undo.flush_directory(directory)
        except BaseException:
            os.close(descriptor)
            raise
        record = cls(path, descriptor, snapshot, [])
        if settle is not None:
            record._settle = settle
        return record

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
            records = undo.read_records(path, descriptor)
            if not records:
                os.unlink(path)
                os.close(descriptor)
                return None
            undo.drop_cut_line(descriptor)
            return cls(path, descriptor, *_understood(path, records),
                       adopted=True)
        except BaseException:
            os.close(descriptor)
            raise

    def announce(self, length: int) -> None:
        """Write that a body is about to be sent, and flush it."""
        undo.append(self._descriptor, self.path, {'announced': length})
        self.announced.append(length)

    def begin_further(self, image_id: str) -> None:
        """Write that an image of a further disk is about to be made, and
        flush it."""
        undo.append(self._descriptor, self.path, {'further': image_id})
        self.further.append(image_id)

    def end_further(self, image_id: str) -> None:
        """Write that an image of a further disk needs nothing any more."""
        if image_id in self.further:
            self.further.remove(image_id)
            # Without it the image is asked for once more.
            with contextlib.suppress(OSError):
                undo.append(self._descriptor, self.path,
                            {'further': image_id, 'done': True})

    def forget(self) -> None:
        """Nothing is left to see to."""
        if self._descriptor < 0:
            return
        _left_to_nova.pop(self.path, None)
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
        if kind is None:
            self.forget()
        elif issubclass(kind, Exception):
            self._leave_to_nova(exception.shown(error))
        else:
            # The process ends, and Nova does not delete the image.
            self.close()

    def _leave_to_nova(self, failure: str) -> None:
        """Forget it when Nova has had the time to delete the image; if the
        process dies before, the next one finds it."""
        self.failure = failure
        with contextlib.suppress(OSError):
            undo.append(self._descriptor, self.path, {'failed': failure})
        _left_to_nova[self.path] = self
        timer = threading.Timer(_NOVA_DELETES_S, self._end_of_wait)
        timer.daemon = True
        timer.start()

    def _end_of_wait(self) -> None:
        if self.further and self._descriptor >= 0:
            _left_to_nova.pop(self.path, None)
            self._settle(self)
        else:
            self.forget()


def left_in(directory: str) -> list[str]:
    """The path of every record in a directory, which need not exist."""
    return undo.logs_in(directory, SUFFIX)


def _understood(path: str, records: list[typing.Any],
                ) -> tuple[Snapshot, list[int], str | None, list[str]]:
    try:
        head = dict(records[0])
        version = head.pop('in_flight')
        if version != VERSION:
            raise ValueError(
                f'{path} is a record of version {version}; this is for '
                f'version {VERSION}')
        announced, failure = [], None
        further: dict[str, None] = {}
        for record in records[1:]:
            if 'failed' in record:
                failure = str(record['failed'])
            elif record.get('done'):
                further.pop(record['further'], None)
            elif 'further' in record:
                further[str(record['further'])] = None
            else:
                announced.append(int(record['announced']))
        return Snapshot(**head), announced, failure, list(further)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} is not a record of a snapshot: {error}') from error
