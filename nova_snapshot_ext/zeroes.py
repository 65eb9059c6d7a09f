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
import itertools
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
_TELL_S = 1.0
_ZEROES = bytes(clusters_.CLUSTER)


class Source(typing.Protocol):
    """What zeroes are looked for in."""

    #: bytes
    size: int

    def read_now(self, pieces: collections.abc.Sequence[tuple[int, int]],
                 ) -> collections.abc.Sequence[bytearray]:
        """:param pieces: offset and length of each in bytes

        :returns: what is in each, which stays valid until the next call, and
            perhaps more behind it
        """


class Finder:
    """Looks for stored zeroes in one disk, and unmarks their clusters."""

    def __init__(self, source: Source, clusters: clusters_.Clusters,
                 tempo: tempos.Tempo, together: int,
                 tell: collections.abc.Callable[[int], None]) -> None:
        """:param together: how many reads are under way at most

        :param tell: called with the offset that is looked at, every second
        """
        self._source = source
        self._clusters = clusters
        self._tempo = tempo
        self._together = together
        self._tell = tell
        self._told_at = time.monotonic()

    def run(self) -> None:
        """Look once over the whole disk."""
        reach = 0
        places = self._places()
        while some := list(itertools.islice(places, self._together)):
            for offset in self._find([
                    self._piece(place, clusters_.CLUSTER)
                    for place in some if place >= reach]):
                if offset >= reach:
                    self._go_back(offset)
                    reach = self._go_on(offset + clusters_.CLUSTER)
            self._look_at(max(some[-1], reach))

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
        step = _STEP
        while offset < self._source.size and self._unmark(offset, step):
            self._look_at(offset)
            offset += step
            step = min(2 * step, self._together * _STEP)
        return offset

    def _look_at(self, offset: int) -> None:
        if time.monotonic() >= self._told_at + _TELL_S:
            self._told_at = time.monotonic()
            self._tell(min(offset, self._source.size))

    def _unmark(self, offset: int, length: int) -> bool:
        """:returns: whether half of what is stored there were zeroes"""
        stored = self._clusters.marked_of(*self._piece(offset, length))
        if not stored:
            return False
        found = self._find([
            self._piece(offset + done, _STEP)
            for done in range(0, length, _STEP)
            if offset + done < self._source.size])
        return 2 * len(found) >= len(stored)

    def _find(self, pieces: list[tuple[int, int]]) -> list[int]:
        """Read some pieces, and unmark the clusters that hold zeroes.

        :returns: the offsets of those that were marked
        """
        pieces = [piece for piece in pieces
                  if self._clusters.marked_of(*piece)]
        if not pieces:
            return []
        time.sleep(self._tempo.wait_s())
        for _, length in pieces:
            self._tempo.sent(length)
        contents = self._source.read_now(pieces)
        self._tempo.answered()
        # The last cluster of a disk, if it is cut off, counts as data.
        zeroes = [
            cluster for (offset, length), content in zip(
                pieces, contents, strict=True)
            for cluster in sorted(self._clusters.marked_of(offset, length))
            if content.startswith(_ZEROES, cluster - offset, length)]
        for cluster in zeroes:
            self._clusters.unmark(cluster)
        return zeroes

    def _piece(self, offset: int, length: int) -> tuple[int, int]:
        return offset, min(length, self._source.size - offset)
