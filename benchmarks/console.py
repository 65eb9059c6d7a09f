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

"""The guest's counter, as its console shows it, with times.

The file that libvirt keeps of the console is read, hundreds of times a
second: that costs less, and is finer, than to ask Nova.
"""

import collections.abc
import contextlib
import dataclasses
import os
import pathlib
import re
import threading
import time
import typing

#: seconds; what silences are known to
_POLL_S = 0.005
_COUNTER = re.compile(rb'counter (\d+)\r?\n')


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a counter was seen."""

    #: on the monotonic clock
    at: float
    counter: int


class Parser:
    """Counters in a console that comes in pieces."""

    def __init__(self) -> None:
        self._rest = b''

    def feed(self, piece: bytes) -> int | None:
        """:returns: the last counter that ends in this piece, None if none
        """
        text = self._rest + piece
        self._rest = text[text.rfind(b'\n') + 1:]
        found = _COUNTER.findall(text)
        return int(found[-1]) if found else None


def rounds_between(moments: collections.abc.Sequence[Moment],
                   begin: float, end: float) -> int:
    """How far the counter came between two times.

    Where none was seen before the first, from the first that was seen on.
    """
    before = [moment.counter for moment in moments if moment.at <= begin]
    until = [moment.counter for moment in moments if moment.at <= end]
    if not until:
        return 0
    return until[-1] - (before[-1] if before else moments[0].counter)


def longest_silence(moments: collections.abc.Sequence[Moment],
                    begin: float, end: float) -> float:
    """The longest time in which no counter came, in seconds.

    A silence counts if it overlaps the time between begin and end, from the
    counter before it to the one after it.
    """
    longest = 0.0
    for one, other in zip(moments, moments[1:]):
        if other.at > begin and one.at < end:
            longest = max(longest, other.at - one.at)
    if moments and moments[-1].at < end:
        longest = max(longest, end - moments[-1].at)
    return longest


class Follower(contextlib.AbstractContextManager['Follower']):
    """Notes when the counter moves, from a thread of its own.

    The file is another one, or begins anew, when the guest was started
    again or virtlogd has rotated it.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.moments: list[Moment] = []

    def __enter__(self) -> 'Follower':
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def wait_past(self, at: float, timeout_s: float) -> bool:
        """Wait until a counter comes after a time.

        :returns: whether one did
        """
        deadline = time.monotonic() + timeout_s
        while not (self.moments and self.moments[-1].at > at):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def _run(self) -> None:
        first = True
        while not self._ended.is_set():
            try:
                file: typing.BinaryIO = open(self._path, 'rb', buffering=0)
            except FileNotFoundError:
                self._ended.wait(_POLL_S)
                continue
            with file:
                if first:
                    file.seek(0, os.SEEK_END)
                    first = False
                self._follow(file)

    def _follow(self, file: typing.BinaryIO) -> None:
        """Read until the path is another file's."""
        parser = Parser()
        opened = os.fstat(file.fileno()).st_ino
        while not self._ended.is_set():
            piece = file.read(1 << 20)
            if piece:
                counter = parser.feed(piece)
                if counter is not None:
                    self.moments.append(Moment(time.monotonic(), counter))
                continue
            try:
                now = self._path.stat()
            except FileNotFoundError:
                return
            if now.st_ino != opened:
                return
            if now.st_size < file.tell():
                file.seek(0)
                parser = Parser()
                continue
            self._ended.wait(_POLL_S)
