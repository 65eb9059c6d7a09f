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
from nova_snapshot_ext import processes
from nova_snapshot_ext import request as requests
from nova_snapshot_ext.transfers import base
from nova_snapshot_ext import undo

FORMATS = ('qcow2', 'raw')


@undo.step
def end_mover(around: undo.Surroundings, token: str) -> None:
    """End the movers of one image; their command line tells which they are.

    :raises UndoFailed: if one can't be ended
    """
    processes.end(f'--token={token}', f'mover {token}')


class StreamedImage(image_bytes.ImageBytes):
    """An image that does not exist before it is read."""

    independent = False

    def __init__(self, arguments: collections.abc.Sequence[str]) -> None:
        """:param arguments: what starts a mover

        :raises TransferFailed: if the disk can't be read
        """
        self._arguments = list(arguments)
        # Its length is asked for before its bytes are: it waits for whoever
        # opens first, so that extents are read once.
        self._waiting: mover_stream.MoverStream | None = self._start(None)
        self._last = self._waiting
        self._algorithm: str | None = None
        self.length = self._waiting.length

    def open(self, algorithm: str | None = None) -> typing.BinaryIO:
        stream, self._waiting = self._waiting, None
        if stream is None or algorithm is not None:
            self._last.close()
            stream = self._start(algorithm)
        self._last = stream
        self._algorithm = algorithm
        # What the server knows of holes may change while the disk is frozen
        # (never what is in it), and so the image that is made of it.
        self.length = stream.length
        return typing.cast(typing.BinaryIO, stream)

    def digest(self, algorithm: str) -> str:
        if algorithm == self._algorithm and self._last.digest is not None:
            return self._last.digest
        with self._start(algorithm, discard=True) as stream:
            if stream.length != self.length:
                raise exception.TransferFailed(
                    f'The image of {self.length} bytes can not be made again '
                    f'to compute its {algorithm}: it has {stream.length} now')
            stream.finish()
            assert stream.digest is not None
            return stream.digest

    def close(self) -> None:
        """End the mover, if one is left."""
        self._last.close()

    def _start(self, algorithm: str | None,
               discard: bool = False) -> mover_stream.MoverStream:
        arguments = list(self._arguments)
        if algorithm is not None:
            arguments.append(f'--digest={algorithm}')
        return mover_stream.MoverStream(arguments, discard)


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
        with log.scope():
            token = secrets.token_hex(8)
            log.push(end_mover, token=token)
            with request.cancellation.ending(
                    functools.partial(end_mover, log.surroundings, token)):
                image = StreamedImage(mover_stream.command(
                    request.mover_python, f'--unix={disk.socket}',
                    f'--export={disk.export}',
                    f'--format={request.image_format}',
                    f'--bandwidth={request.bandwidth}', f'--token={token}'))
                with contextlib.closing(image):
                    yield image
