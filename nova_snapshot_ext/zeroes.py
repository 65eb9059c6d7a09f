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

"""Zeroes that are stored as data, as in a base image that was written whole.

Only long stretches of them are found: one cluster here and there is looked
at, and what is around it if that holds zeroes. To read everything twice would
take longer than it could save.

Runs in the mover, whose interpreter has the standard library only.
"""

import collections.abc
import time
import typing

from nova_snapshot_ext import clusters as clusters_
from nova_snapshot_ext import tempo as tempos

#: a place is looked at in each so many bytes of the disk, and in each of more
#: bytes where there would be more places with data, or without
_DISTANCE = 4 * 1024 ** 2
_PLACES = 16 * 1024
_WINDOWS = 1024 ** 2
#: bytes of a read where zeroes were found
_STEP = 1024 ** 2
_ZEROES = bytes(clusters_.CLUSTER)


class Source(typing.Protocol):
    """What zeroes are looked for in."""

    #: bytes
    size: int

    def read_now(self, offset: int, length: int) -> bytearray:
        """:returns: the bytes, which stay valid until the next call, and
            perhaps more behind them
        """


class Finder:
    """Looks for stored zeroes in one disk, and unmarks their clusters."""

    def __init__(self, source: Source, clusters: clusters_.Clusters,
                 tempo: tempos.Tempo) -> None:
        self._source = source
        self._clusters = clusters
        self._tempo = tempo

    def run(self) -> None:
        """Look once over the whole disk."""
        reach = 0
        for offset in self._places():
            if offset >= reach and self._unmark(offset, clusters_.CLUSTER):
                self._go_back(offset)
                reach = self._go_on(offset + clusters_.CLUSTER)

    def _places(self) -> collections.abc.Iterator[int]:
        """Offsets of clusters that hold data, far apart from each other."""
        data = self._clusters.marked() * clusters_.CLUSTER
        distance = _DISTANCE * max(
            1, -(-data // (_PLACES * _DISTANCE)),
            -(-self._source.size // (_WINDOWS * _DISTANCE)))
        for offset in range(0, self._source.size, distance):
            found = self._clusters.first_marked(offset, distance)
            if found is not None:
                yield found

    def _go_back(self, offset: int) -> None:
        while offset > 0:
            step = min(_STEP, offset)
            offset -= step
            if not self._unmark(offset, step):
                return

    def _go_on(self, offset: int) -> int:
        """:returns: up to where it was looked"""
        while offset < self._source.size and self._unmark(offset, _STEP):
            offset += _STEP
        return offset

    def _unmark(self, offset: int, length: int) -> bool:
        """:returns: whether half of what is stored there were zeroes"""
        length = min(length, self._source.size - offset)
        stored = self._clusters.marked_of(offset, length)
        if not stored:
            return False
        time.sleep(self._tempo.wait_s())
        began = time.monotonic()
        self._tempo.sent(length)
        content = self._source.read_now(offset, length)
        self._tempo.answered(time.monotonic() - began)
        # The last cluster of a disk, if it is cut off, counts as data.
        zeroes = [cluster for cluster in stored if content.startswith(
            _ZEROES, cluster - offset, length)]
        for cluster in zeroes:
            self._clusters.unmark(cluster)
        return 2 * len(zeroes) >= len(stored)
