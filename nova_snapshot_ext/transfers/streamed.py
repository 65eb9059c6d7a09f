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

"""The transfer ``streamed``: read once, sent at once, no file on the host.

Another process, the mover, reads the frozen disk and writes an image whose
length it knows first into a pipe.
"""

import collections.abc
import contextlib
import functools
import secrets
import typing

from nova_snapshot_ext import exception
from nova_snapshot_ext import frozen
from nova_snapshot_ext import image_bytes
from nova_snapshot_ext import mover_stream
from nova_snapshot_ext import pace
from nova_snapshot_ext import processes
from nova_snapshot_ext import request as requests
from nova_snapshot_ext.transfers import base
from nova_snapshot_ext import undo

FORMATS = ('qcow2', 'raw')

#: how much the guest's processors go before a mover's, where the guest keeps
#: a share (nice(2))
_NICE = 10


@undo.step
def end_mover(around: undo.Surroundings, token: str) -> None:
    """End the movers of one image; their command line tells which they are.

    :raises UndoFailed: if one can't be ended
    """
    processes.end(f'--token={token}', f'mover {token}')


class StreamedImage(image_bytes.ImageBytes):
    """An image that does not exist before it is read."""

    independent = False

    def __init__(self, arguments: collections.abc.Sequence[str],
                 rest: float, progress: requests.Progress,
                 tell_read: collections.abc.Callable[[int], None],
                 read_timeout: int = 300) -> None:
        """:param arguments: what starts a mover

        :param rest: part of the time in which it leaves the disk alone, see
            :meth:`rest`
        :param progress: told how far the disk was looked through
        :param tell_read: told how many bytes more were read of the disk
        :param read_timeout: seconds in which the disk must answer a mover
        """
        self._read_timeout = read_timeout
        self._arguments = list(arguments)
        self._rest = rest
        self._progress = progress
        self._tell_read = tell_read
        self._waiting: mover_stream.MoverStream | None = None
        self._last: mover_stream.MoverStream | None = None
        self._algorithm: str | None = None

    def start(self) -> None:
        """Have the image laid out for whoever opens it first.

        That takes a while, which others may use.

        :raises TransferFailed: if no mover can be run
        """
        self._waiting = self._start()

    def rest(self, rest: float) -> None:
        """Leave the disk alone for another part of the time from now on.

        :param rest: from 0 to less than 1
        """
        self._rest = rest
        if self._last is not None:
            self._last.rest(rest)

    def open(self, algorithm: str | None = None) -> typing.BinaryIO:
        stream, self._waiting = self._waiting or self._start(), None
        stream.prepare(self._progress)
        stream.begin(algorithm)
        self._algorithm = algorithm
        # What the server knows of holes may change while the disk is frozen
        # (never what is in it), and so the image that is made of it.
        self.length = stream.length
        return typing.cast(typing.BinaryIO, stream)

    def digest(self, algorithm: str) -> str:
        if algorithm != self._algorithm or self._last is None or (
                self._last.digest is None):
            stream = self._start(discard=True)
            stream.prepare()
            if stream.length != self.length:
                raise exception.TransferFailed(
                    f'The image of {self.length} bytes can not be made again '
                    f'to compute its {algorithm}: it has {stream.length} now')
            stream.begin(algorithm)
            stream.finish()
            self._algorithm = algorithm
        assert self._last is not None and self._last.digest is not None
        return self._last.digest

    def close(self) -> None:
        """End the mover, if one is left."""
        if self._last is not None:
            self._last.close()

    def _start(self, discard: bool = False) -> mover_stream.MoverStream:
        self.close()
        self._last = mover_stream.MoverStream(
            [*self._arguments, f'--rest={self._rest}',
             *['--tell'] * discard], discard, self._read_timeout,
            self._tell_read)
        return self._last


class StreamedTransfer(base.Transfer):
    """Writes nothing to the host's disks."""

    independent = False

    def obstacle(self, request: requests.Request) -> str | None:
        if request.image_format not in FORMATS:
            return (f'it can not make {request.image_format} images, only '
                    f'{", ".join(FORMATS)}')
        if request.compress and request.image_format == 'qcow2':
            return 'it does not compress'
        return mover_stream.why_not(request.mover_python)

    @contextlib.contextmanager
    def image(
            self, disk: frozen.FrozenDisk, request: requests.Request,
            log: undo.UndoLog,
    ) -> collections.abc.Iterator[image_bytes.ImageBytes]:
        guest = log.surroundings.guest if request.guest_share else None
        share = request.guest_share / 100
        with log.scope(), contextlib.ExitStack() as stack:
            token = secrets.token_hex(8)
            log.push(end_mover, token=token)
            arguments = [
                f'--unix={disk.socket}', f'--export={disk.export}',
                f'--format={request.image_format}',
                f'--patience={request.read_timeout}',
                f'--nice={0 if guest is None else _NICE}',
                f'--token={token}']
            if disk.capacity:
                arguments.append(f'--size={disk.capacity}')
            if request.bandwidth:
                arguments.append(
                    f'--bandwidth={request.bandwidth * 1024 ** 2}')
            stack.enter_context(request.cancellation.ending(
                functools.partial(end_mover, log.surroundings, token)))
            image = stack.enter_context(contextlib.closing(StreamedImage(
                mover_stream.command(request.mover_python, *arguments),
                share, request.progress, request.account.read,
                request.read_timeout)))
            if guest is not None:
                stack.enter_context(
                    pace.kept(guest, disk.target, share, image.rest))
            image.start()
            yield image
