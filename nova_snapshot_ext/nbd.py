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

"""Reading an NBD export: what holds data, and the data in order.

Runs in the mover, whose interpreter has the standard library and libnbd's
binding only.
"""

import collections
import collections.abc
import contextlib
import queue
import threading
import time

import nbd

from nova_snapshot_ext import clusters as clusters_
from nova_snapshot_ext import tempo as tempos

#: bytes of a read; smaller ones cost a quarter of the speed, larger ones win
#: nothing
REQUEST = 1024 ** 2
#: bytes whose extents are asked for at once. A server answers with up to a
#: million extents, each of which is a Python object for a moment.
_STRIDE = 128 * 1024 ** 2
#: questions in flight: the server looks for extents while we mark others
_QUESTIONS = 2
#: sizes that differ by less are of one disk: QEMU counts sectors
_SECTOR = 512
#: buffers that are written while as many requests as allowed are in flight
_SPARE_BUFFERS = 8

#: offset and length in bytes
Piece = tuple[int, int]


class NbdError(Exception):
    """The export can't be read."""


class Export:
    """A read-only connection to an export on a unix socket."""

    def __init__(self, socket: str, name: str,
                 patience_s: float = 300) -> None:
        """:param patience_s: seconds in which a server must answer what it
            is asked

        :raises NbdError: if it can't be opened
        """
        self._nbd = nbd.NBD()
        self._patience_s = patience_s
        self._buffers: list[_Buffer] = []
        try:
            self._nbd.set_export_name(name)
            self._nbd.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
            # A failed read ends us: nobody sees what a buffer held before.
            self._nbd.set_pread_initialize(False)
            self._nbd.aio_connect_unix(socket)
            began = time.monotonic()
            while self._nbd.aio_is_connecting():
                self._wait(began)
            #: bytes
            self.size: int = self._nbd.get_size()
            self._has_extents: bool = self._nbd.can_meta_context(
                nbd.CONTEXT_BASE_ALLOCATION)
        except nbd.Error as error:
            raise NbdError(
                f'The export {name} of {socket} can not be opened: '
                f'{error}') from error

    def check_size(self, size: int) -> None:
        """:param size: of the disk in bytes

        :raises NbdError: if the export has another
        """
        if abs(self.size - size) >= _SECTOR:
            raise NbdError(f'The export has {self.size} bytes, and the disk '
                           f'{size}')

    def mark_data(self, clusters: clusters_.Clusters,
                  answered: collections.abc.Callable[[], None] = (
                      lambda: None)) -> None:
        """Mark what does not read as zeroes.

        Everything, if the server does not say.

        :param answered: called for each answer
        :raises NbdError: if the server can't be asked
        """
        if not self._has_extents:
            if self.size:
                clusters.mark(0, self.size)
            return
        flight: collections.deque[_Question] = collections.deque()
        strides = iter(range(0, self.size, _STRIDE))
        try:
            while True:
                while len(flight) < _QUESTIONS and (
                        offset := next(strides, None)) is not None:
                    flight.append(_Question(
                        self._nbd, clusters, offset,
                        min(offset + _STRIDE, self.size)))
                if not flight:
                    return
                question = flight.popleft()
                while not self._nbd.aio_command_completed(question.cookie):
                    self._wait(question.asked)
                answered()
                if question.position < question.end:
                    flight.append(question.rest())
        except nbd.Error as error:
            raise NbdError(
                f'The server does not say where there is data: '
                f'{error}') from error

    def read_now(self, pieces: collections.abc.Sequence[Piece],
                 ) -> list[bytearray]:
        """Read a few pieces of at most REQUEST bytes, and wait for them all.

        :returns: for each piece a buffer that begins with it, until the next
            call
        :raises NbdError: if a read fails
        """
        while len(self._buffers) < len(pieces):
            self._buffers.append(_Buffer())
        buffers = self._buffers[:len(pieces)]
        try:
            for buffer, piece in zip(buffers, pieces, strict=True):
                buffer.ask(self._nbd, piece)
            for buffer in buffers:
                while not buffer.is_filled(self._nbd):
                    self._wait(buffer.asked)
        except nbd.Error as error:
            raise _read_failed(error) from error
        return [buffer.content for buffer in buffers]

    def read(self, pieces: collections.abc.Iterable[Piece], in_flight: int,
             tempo: tempos.Tempo,
             ) -> collections.abc.Iterator[tuple[int, memoryview]]:
        """Read pieces of at most REQUEST bytes, in their order.

        :param in_flight: how many requests are under way at most
        :returns: offset and bytes of each piece. The bytes stay valid until
            the next ones are asked for.
        :raises NbdError: if a read fails
        """
        pipeline = _Pipeline(
            self._nbd, iter(pieces), in_flight, tempo, self._wait)
        pipeline.start()
        return pipeline.results()

    def _wait(self, since: float, most_s: float | None = None) -> None:
        """Let the connection go on.

        A sign of life is no answer: a server could give one for ever.

        :param since: when it was asked what is waited for
        :param most_s: come back after so many seconds at the latest
        :raises NbdError: if the server has had time enough to answer
        """
        left_s = since + self._patience_s - time.monotonic()
        if left_s <= 0:
            raise NbdError(f'The server has not answered for '
                           f'{self._patience_s:.0f} s')
        if most_s is not None:
            left_s = min(left_s, most_s)
        self._nbd.poll(int(left_s * 1000) + 1)


def _read_failed(error: Exception) -> NbdError:
    return NbdError(f'A read failed: {error}')


class _Question:
    """What holds data between two offsets, asked and marked when answered."""

    def __init__(self, handle: nbd.NBD, clusters: clusters_.Clusters,
                 offset: int, end: int) -> None:
        self._nbd = handle
        self._clusters = clusters
        self._offset = offset
        self.end = end
        #: up to where there was an answer
        self.position = offset
        self.asked = time.monotonic()
        self.cookie: int = handle.aio_block_status(
            end - offset, offset, self._mark)

    def rest(self) -> '_Question':
        """Ask for what was not answered.

        :raises NbdError: if nothing was
        """
        if self.position <= self._offset:
            raise NbdError(f'The server does not say whether there is data '
                           f'at byte {self._offset}')
        return _Question(self._nbd, self._clusters, self.position, self.end)

    def _mark(self, context: str, start: int, entries: list[int],
              error: object) -> int:
        if context != nbd.CONTEXT_BASE_ALLOCATION or start != self.position:
            return 0
        # Lengths and flags in turn; millions of them at a time. The last
        # extent may reach beyond what was asked for.
        lengths = entries[::2]
        self._clusters.mark_extents(
            start, lengths, entries[1::2], _holds_data, self.end)
        self.position = start + sum(lengths)
        return 0


def _holds_data(flags: int) -> bool:
    return not flags & nbd.STATE_ZERO


class _Buffer:
    """Memory that is allocated once: fresh pages for every request made
    reading three times slower.
    """

    def __init__(self) -> None:
        self.content = bytearray(REQUEST)
        self._views: dict[int, tuple[memoryview, nbd.Buffer]] = {}
        self.offset = 0
        self.view = memoryview(self.content)
        self.asked = 0.0
        self._cookie = 0

    def ask(self, handle: nbd.NBD, piece: Piece) -> None:
        """Have a piece read into it."""
        self.offset, length = piece
        if length not in self._views:
            # Each Buffer that is read into is never freed, with what it is
            # made of (libnbd 1.14): so there are few, one of each length.
            view = memoryview(self.content)[:length]
            self._views[length] = view, nbd.Buffer.from_buffer(view)
        self.view, target = self._views[length]
        self.asked = time.monotonic()
        self._cookie = handle.aio_pread(target, self.offset)

    def is_filled(self, handle: nbd.NBD) -> bool:
        """:raises nbd.Error: if the read failed"""
        return bool(handle.aio_command_completed(self._cookie))


class _Pipeline(threading.Thread):
    """Keeps requests in flight, while another thread writes what was read.

    libnbd and os.write() let go of Python's lock, so the two copies into and
    out of our memory go on at the same time.
    """

    def __init__(self, handle: nbd.NBD,
                 pieces: collections.abc.Iterator[Piece], in_flight: int,
                 tempo: tempos.Tempo,
                 wait: collections.abc.Callable[
                     [float, float | None], None],
                 ) -> None:
        super().__init__(daemon=True)
        self._nbd = handle
        self._pieces = pieces
        self._in_flight = in_flight
        self._tempo = tempo
        self._wait = wait
        self._flight: collections.deque[_Buffer] = collections.deque()
        self._count = in_flight + _SPARE_BUFFERS
        self._empty = [_Buffer() for _ in range(self._count)]
        self._free: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[_Buffer | Exception | None] = (
            queue.SimpleQueue())

    def results(self) -> collections.abc.Iterator[tuple[int, memoryview]]:
        while (result := self._read.get()) is not None:
            if isinstance(result, Exception):
                raise _read_failed(result) from result
            yield result.offset, result.view
            self._free.put(result)

    def run(self) -> None:
        try:
            self._run()
            self._read.put(None)
        except Exception as error:
            self._read.put(error)

    def _run(self) -> None:
        piece = next(self._pieces, None)
        while piece is not None or self._flight:
            wait_s = self._tempo.wait_s()
            if piece is not None and not wait_s and self._send(piece):
                piece = next(self._pieces, None)
            elif self._flight:
                self._receive(wait_s if piece is not None else 0)
            else:
                time.sleep(wait_s)

    def _send(self, piece: Piece) -> bool:
        """:returns: whether it could be: it may, and a buffer was free"""
        if len(self._flight) >= self._in_flight or (
                # All of these are answered before there can be a rest.
                self._tempo.rest and self._tempo.burst >= self._in_flight):
            return False
        self._take_free()
        if not self._empty:
            return False
        buffer = self._empty.pop()
        self._tempo.sent(piece[1])
        buffer.ask(self._nbd, piece)
        self._flight.append(buffer)
        return True

    def _take_free(self) -> None:
        """Take the buffers that have been written.

        Whoever reads the image slower than we read the disk makes us wait for
        half of them: reads that come together leave the guest's disk alone
        for longer than as many that come one by one.
        """
        if not self._empty and not self._flight:
            self._empty += [self._free.get() for _ in range(self._count // 2)]
        with contextlib.suppress(queue.Empty):
            while True:
                self._empty.append(self._free.get_nowait())

    def _receive(self, wait_s: float) -> None:
        """Hand over what is complete, or wait for what comes next.

        :param wait_s: for so long at most, if it is more than 0
        """
        if not self._flight[0].is_filled(self._nbd):
            self._wait(self._flight[0].asked, wait_s or None)
            return
        self._read.put(self._flight.popleft())
        if not self._flight:
            self._tempo.answered()
