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

"""A qcow2 file as QEMU's docs/interop/qcow2.txt says, and no more of it.

It shares nothing with what it checks, and knows only files of version 3 with
clusters of 64 KiB and no backing file, snapshots or features.
"""

import struct
import typing as ty

CLUSTER = 65536
COPIED = 1 << 63


class BadFile(AssertionError):
    """Something is where it must not be."""


def _require(condition: object, words: str) -> None:
    if not condition:
        raise BadFile(words)


class Parsed:
    """A file that was looked through.

    :ivar size: of the disk in bytes
    :ivar where: of each cluster of the disk that is there, its offset
    """

    def __init__(self, file: ty.BinaryIO) -> None:
        self._file = file
        self._used: dict[int, int] = {}
        self._header()
        self.where = dict(self._mapping())
        self._refcounts()

    def _at(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(length)
        _require(len(data) == length, f'cut off before {offset + length}')
        return data

    def _numbers(self, offset: int, count: int) -> tuple[int, ...]:
        return struct.unpack(f'>{count}Q', self._at(offset, 8 * count))

    def _use(self, offset: int, clusters: int = 1) -> None:
        _require(offset % CLUSTER == 0 and offset > 0, f'not at {offset}')
        for number in range(clusters):
            cluster = offset // CLUSTER + number
            self._used[cluster] = self._used.get(cluster, 0) + 1

    def _header(self) -> None:
        head = self._at(0, 104)
        _require(head[:4] == b'QFI\xfb', 'no magic')
        (version, backing, backing_length, cluster_bits, self.size, crypt,
         self.l1_size, self.l1_offset, self.refcount_offset,
         self.refcount_clusters, snapshots, snapshots_offset, incompatible,
         compatible, autoclear, order, length) = struct.unpack(
             '>IQIIQIIQQIIQQQQII', head[4:])
        _require((version, cluster_bits, order) == (3, 16, 4), 'other kind')
        _require(not any((backing, backing_length, crypt, snapshots,
                          snapshots_offset, incompatible, compatible,
                          autoclear)), 'something that it must not have')
        _require(length == 104 and self._at(104, 8) == bytes(8),
                 'header extensions')
        self._used[0] = 1
        self._file.seek(0, 2)
        self.length = self._file.tell()
        _require(self.length % CLUSTER == 0, 'part of a cluster at the end')

    def _mapping(self) -> ty.Iterator[tuple[int, int]]:
        reach = CLUSTER // 8
        clusters = -(-self.size // CLUSTER)
        _require(self.l1_size * reach >= clusters, 'L1 table is too short')
        _require(self.l1_size * 8 <= 32 << 20, 'L1 table is too long')
        self._use(self.l1_offset, -(-self.l1_size * 8 // CLUSTER))
        l1 = self._numbers(self.l1_offset, self.l1_size)
        for index, table in enumerate(l1):
            if not table:
                continue
            _require(table & COPIED, 'no COPIED in L1')
            self._use(table ^ COPIED)
            entries = self._numbers(table ^ COPIED, reach)
            for number, entry in enumerate(entries, index * reach):
                if entry:
                    _require(entry & COPIED, 'no COPIED in L2')
                    _require(number < clusters, 'beyond the disk')
                    self._use(entry ^ COPIED)
                    yield number, entry ^ COPIED

    def _refcounts(self) -> None:
        self._use(self.refcount_offset, self.refcount_clusters)
        table = self._numbers(self.refcount_offset,
                              self.refcount_clusters * CLUSTER // 8)
        for block in filter(None, table):
            self._use(block)
        found: dict[int, int] = {}
        for index, block in enumerate(table):
            if block:
                counts = struct.unpack('>32768H', self._at(block, CLUSTER))
                found.update((index * 32768 + number, count)
                             for number, count in enumerate(counts) if count)
        _require(found == self._used, 'wrong refcounts')
        _require(set(found) == set(range(self.length // CLUSTER)),
                 'clusters that are not in use, or beyond the end')

    def content(self) -> bytes:
        """The whole disk."""
        disk = bytearray(-(-self.size // CLUSTER) * CLUSTER)
        for number, offset in self.where.items():
            disk[number * CLUSTER:(number + 1) * CLUSTER] = self._at(
                offset, CLUSTER)
        _require(not any(disk[self.size:]), 'bytes behind the disk')
        return bytes(disk[:self.size])
