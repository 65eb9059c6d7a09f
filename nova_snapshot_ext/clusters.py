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

"""Which clusters of a disk hold data: one bit each.

Runs in the mover, whose interpreter has the standard library only.
"""

import collections.abc

#: bytes
CLUSTER = 64 * 1024
#: clusters that are looked at together; as many as a qcow2 L2 table has
GROUP = CLUSTER // 8

_GROUP_BYTES = GROUP // 8
#: of each byte, its bits from the lowest on, one byte each
_UNPACKED = tuple(bytes(byte >> bit & 1 for bit in range(8))
                  for byte in range(256))
_NONE = bytes(_GROUP_BYTES)
_NONE_UNPACKED = bytes(GROUP)


class _Uneven(Exception):
    """An extent ends within a cluster."""


class _Marks(dict[tuple[int, int], str]):
    """Of extents, by length and kind, a digit for each of its clusters."""

    def __init__(self, data: collections.abc.Callable[[int], bool]) -> None:
        super().__init__()
        self._data = data

    def __missing__(self, extent: tuple[int, int]) -> str:
        length, kind = extent
        if length % CLUSTER:
            raise _Uneven
        self[extent] = '01'[self._data(kind)] * (length // CLUSTER)
        return self[extent]


class Clusters:
    """A disk's clusters; none holds data until it is marked.

    A disk of 2 TiB takes 4 MiB.
    """

    def __init__(self, size: int) -> None:
        """:param size: of the disk in bytes"""
        self.size = size
        self.count = -(-size // CLUSTER)
        #: how many groups there are, at least one; the last one is filled
        #: up with holes
        self.groups = max(1, -(-self.count // GROUP))
        self._bits = bytearray(self.groups * _GROUP_BYTES)

    def mark(self, offset: int, length: int) -> None:
        """Mark every cluster that some of these bytes are in."""
        first = offset // CLUSTER
        end = -(-(offset + length) // CLUSTER)
        whole = min(end, -(-first // 8) * 8)
        rest = max(whole, end // 8 * 8)
        for cluster in range(first, whole):
            self._bits[cluster >> 3] |= 1 << (cluster & 7)
        self._bits[whole // 8:rest // 8] = b'\xff' * ((rest - whole) // 8)
        for cluster in range(rest, end):
            self._bits[cluster >> 3] |= 1 << (cluster & 7)

    def mark_extents(
            self, offset: int, lengths: collections.abc.Sequence[int],
            kinds: collections.abc.Sequence[int],
            data: collections.abc.Callable[[int], bool], end: int) -> None:
        """Mark what millions of extents hold that follow each other.

        :param offset: of the first one, in bytes
        :param kinds: what each is
        :param data: whether an extent of a kind holds data
        :param end: what lies beyond does not count
        """
        if offset % CLUSTER == 0 and offset + sum(lengths) <= end:
            try:
                self._mark_all(offset // CLUSTER, ''.join(map(
                    _Marks(data).__getitem__,
                    zip(lengths, kinds, strict=True))))
            except _Uneven:
                pass
            else:
                return
        for length, kind in zip(lengths, kinds, strict=True):
            if offset >= end:
                break
            if data(kind):
                self.mark(offset, min(length, end - offset))
            offset += length

    def _mark_all(self, first: int, marks: str) -> None:
        """:param marks: of each cluster from the first one on, ``1`` for data
        """
        if '1' not in marks:
            return
        # Large integers are what Python has for so many bits at once.
        start = first >> 3
        bits = int(marks[::-1], 2) << (first & 7)
        end = start + -(-bits.bit_length() // 8)
        bits |= int.from_bytes(self._bits[start:end], 'little')
        self._bits[start:end] = bits.to_bytes(end - start, 'little')

    def unmark(self, offset: int) -> None:
        """:param offset: of the first byte of a cluster"""
        cluster = offset // CLUSTER
        self._bits[cluster >> 3] &= ~(1 << (cluster & 7))

    def marked(self) -> int:
        """How many clusters hold data."""
        return sum(map(self.marked_in, range(self.groups)))

    def marked_of(self, offset: int, length: int) -> set[int]:
        """The offset of each cluster in these bytes that holds data.

        :param offset: of the first byte of a cluster
        """
        first = offset // CLUSTER
        end = -(-(offset + length) // CLUSTER)
        return {cluster * CLUSTER for cluster in range(first, end)
                if self._bits[cluster >> 3] >> (cluster & 7) & 1}

    def first_marked(self, offset: int, length: int) -> int | None:
        """The offset of the first cluster in these bytes that holds data.

        :param offset: a multiple of eight clusters, in bytes
        :param length: likewise
        """
        eight = 8 * CLUSTER
        bits = int.from_bytes(
            self._bits[offset // eight:(offset + length) // eight], 'little')
        if not bits:
            return None
        return offset + ((bits & -bits).bit_length() - 1) * CLUSTER

    def marked_in(self, group: int) -> int:
        """How many clusters of a group hold data."""
        return int.from_bytes(self._packed(group), 'little').bit_count()

    def marks(self, group: int) -> bytes:
        """A byte for each cluster of a group: 1 for data, 0 for a hole."""
        packed = self._packed(group)
        if packed == _NONE:
            return _NONE_UNPACKED
        return b''.join(map(_UNPACKED.__getitem__, packed))

    def runs(self) -> collections.abc.Iterator[tuple[int, int]]:
        """Offset and length in bytes of what holds data, in order.

        A run is as long as it can be, and ends at the disk's end at the
        latest.
        """
        start = -1
        for group in range(self.groups):
            marks = self.marks(group)
            base = group * GROUP
            position = 0
            while True:
                position = marks.find(1 if start < 0 else 0, position)
                if position < 0:
                    break
                if start < 0:
                    start = base + position
                else:
                    yield self._bytes(start, base + position)
                    start = -1
        if start >= 0:
            yield self._bytes(start, self.count)

    def _packed(self, group: int) -> bytearray:
        return self._bits[group * _GROUP_BYTES:(group + 1) * _GROUP_BYTES]

    def _bytes(self, first: int, end: int) -> tuple[int, int]:
        offset = first * CLUSTER
        return offset, min(end * CLUSTER, self.size) - offset
