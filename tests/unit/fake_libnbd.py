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

"""libnbd's binding, as far as it is used, on a disk in memory.

Reads are completed in another order than they were sent in.
"""

import collections.abc
import time
import typing

CONTEXT_BASE_ALLOCATION = 'base:allocation'
STATE_HOLE = 1
STATE_ZERO = 2


class Error(Exception):
    pass


class Buffer:
    def __init__(self, view: memoryview) -> None:
        self.view = view

    @classmethod
    def from_buffer(cls, view: memoryview) -> 'Buffer':
        return cls(view)


class Disk:
    """What the handles of a test are connected to.

    :ivar extents: length and flags of each, up to the disk's end or beyond
    :ivar at_once: how many extents an answer has at most
    :ivar bad: reads of these offsets fail
    :ivar answers_after_s: how long an answer takes
    :ivar dumb: it gives no answer any more, only signs of life
    :ivar size: what it says that it has
    :ivar answers: what it says that is where, in turn: how far from what it
        was asked for it begins, and lengths and flags
    """

    def __init__(self, content: bytes,
                 extents: list[tuple[int, int]] | None) -> None:
        self.content = content
        self.extents = extents
        self.at_once = 3
        self.bad: set[int] = set()
        self.reads: list[tuple[int, int]] = []
        self.most_in_flight = 0
        self.refuses = False
        self.dumb = False
        self.answers_after_s = 0.0
        self.size: int | None = None
        self.answers: list[tuple[int, list[int]]] | None = None


disk = Disk(b'', [])


class NBD:

    def __init__(self) -> None:
        self._sent: list[tuple[int, Buffer, int]] = []
        self._done: set[int] = set()
        self._count = 0

    def set_export_name(self, name: str) -> None:
        pass

    def add_meta_context(self, name: str) -> None:
        pass

    def set_pread_initialize(self, wanted: bool) -> None:
        pass

    def aio_connect_unix(self, path: str) -> None:
        if disk.refuses:
            raise Error('refused')

    def aio_is_connecting(self) -> bool:
        return disk.dumb

    def get_size(self) -> int:
        return len(disk.content) if disk.size is None else disk.size

    def can_meta_context(self, name: str) -> bool:
        return disk.extents is not None

    def aio_block_status(self, count: int, offset: int,
                         callback: collections.abc.Callable[
                             [str, int, list[int], object], object]) -> int:
        answer: list[int] = []
        position = 0
        for length, flags in disk.extents or []:
            end = position + length
            if end > offset and len(answer) < 2 * disk.at_once and (
                    position < offset + count):
                answer += [end - max(position, offset), flags]
            position = end
        if disk.answers is not None:
            away, answer = (disk.answers.pop(0) if disk.answers else (0, []))
            offset += away
        callback('another:context', offset, [1, 0], None)
        if answer:
            callback(CONTEXT_BASE_ALLOCATION, offset, answer, None)
        self._count += 1
        self._done.add(self._count)
        return self._count

    def aio_pread(self, buffer: Buffer, offset: int) -> int:
        self._count += 1
        disk.reads.append((offset, len(buffer.view)))
        self._sent.append((self._count, buffer, offset))
        disk.most_in_flight = max(disk.most_in_flight, len(self._sent))
        return self._count

    def poll(self, timeout: int) -> int:
        if disk.dumb:
            time.sleep(0.001)
            return 1
        time.sleep(disk.answers_after_s)
        cookie, buffer, offset = self._sent.pop()
        content = disk.content[offset:offset + len(buffer.view)]
        buffer.view[:] = content.ljust(len(buffer.view), b'?')
        self._done.add(cookie)
        if offset in disk.bad:
            self._done.remove(cookie)
            self._failed = cookie
        return 1

    _failed = 0

    def aio_command_completed(self, cookie: int) -> bool:
        if cookie == self._failed:
            raise Error('read: command failed: Input/output error')
        return cookie in self._done


def __getattr__(name: str) -> typing.Any:
    raise AttributeError(f'the fake of libnbd has no {name}')
