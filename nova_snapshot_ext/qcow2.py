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

"""The layout of a qcow2 file, written strictly forward.

QEMU's docs/interop/qcow2.txt says what is in the file; sections of it are
named here. Which clusters of the disk hold data says where everything goes,
so the length of the file is known before its first byte. In order: header,
refcount table, refcount blocks, L1 table, L2 tables, data clusters in the
disk's order. Every cluster of the file is in use once. Tables are computed as
they are written.

Runs in the mover, whose interpreter has the standard library only.
"""

import array
import collections.abc
import itertools
import struct
import sys

from nova_snapshot_ext import clusters as clusters_
from nova_snapshot_ext.clusters import CLUSTER

_CLUSTER_BITS = 16
#: "Host cluster management": refcounts of 2 ** 4 bits, as QEMU's own
_REFCOUNT_ORDER = 4
_REFCOUNTS_IN_BLOCK = CLUSTER // 2
_ENTRY = 8
_ENTRIES_IN_CLUSTER = CLUSTER // _ENTRY
#: "L1 table entry", "Standard Cluster Descriptor": bit 63, "refcount is
#: exactly one"
_COPIED = 1 << 63
#: what QEMU reads at most (block/qcow2.h: QCOW_MAX_L1_SIZE,
#: QCOW_MAX_REFTABLE_SIZE), in bytes
_MAX_L1 = 32 * 1024 ** 2
_MAX_REFCOUNT_TABLE = 8 * 1024 ** 2
#: QEMU cuts the disk's size down to a multiple of it
_SECTOR = 512
#: "Header", version 3, up to header_length
_HEADER = struct.Struct('>4sIQIIQIIQQIIQQQQII')

#: clusters of the disk that an L2 table maps
L2_REACH = _ENTRIES_IN_CLUSTER


class TooLarge(Exception):
    """The disk is larger than QEMU's limits of a qcow2 file's tables."""


def check_size(size: int) -> None:
    """:raises TooLarge: if no qcow2 file of 64 KiB clusters has this size"""
    if _l1_entries(size) * _ENTRY > _MAX_L1:
        raise TooLarge(
            f'{size} bytes are more than a qcow2 file with clusters of '
            f'{CLUSTER} bytes can hold')


class Layout:
    """Where everything is in the file."""

    def __init__(self, clusters: clusters_.Clusters) -> None:
        """:raises TooLarge: if QEMU would refuse the file"""
        check_size(clusters.size)
        self._clusters = clusters
        marked = [clusters.marked_in(group)
                  for group in range(clusters.groups)]
        self._l1_entries = _l1_entries(clusters.size)
        self._l1_clusters = _clusters_of(self._l1_entries * _ENTRY)
        self._l2_tables = sum(1 for count in marked if count)
        self._data_clusters = sum(marked)
        self._find_refcounts()
        self._l1_offset = CLUSTER * (
            1 + self._refcount_table_clusters + self._refcount_blocks)
        self._l2_offset = self._l1_offset + CLUSTER * self._l1_clusters
        #: where the first byte of data is in the file
        self.data_offset = self._l2_offset + CLUSTER * self._l2_tables
        #: of the file, in bytes
        self.length = CLUSTER * self._file_clusters

    def _find_refcounts(self) -> None:
        """Refcount blocks count themselves, and the table of them, too."""
        others = (1 + self._l1_clusters + self._l2_tables
                  + self._data_clusters)
        blocks = table = 0
        while True:
            self._file_clusters = others + blocks + table
            self._refcount_blocks = -(
                -self._file_clusters // _REFCOUNTS_IN_BLOCK)
            self._refcount_table_clusters = _clusters_of(
                self._refcount_blocks * _ENTRY)
            if (blocks, table) == (self._refcount_blocks,
                                   self._refcount_table_clusters):
                break
            blocks = self._refcount_blocks
            table = self._refcount_table_clusters
        if table * CLUSTER > _MAX_REFCOUNT_TABLE:
            raise TooLarge(
                f'{self._data_clusters} clusters of data are more than the '
                f'refcount table of a qcow2 file can have')

    def metadata(self) -> collections.abc.Iterator[bytes]:
        """All that comes before the data, in pieces of a cluster."""
        yield self._header().ljust(CLUSTER, b'\0')
        blocks = range((1 + self._refcount_table_clusters) * CLUSTER,
                       self._l1_offset, CLUSTER)
        yield from _table(iter(blocks))
        yield from self._refcounts()
        yield from _table(self._l1())
        yield from self._l2()

    def _header(self) -> bytes:
        """The section "Header".

        What follows it in its cluster are zeroes, which also say "End of the
        header extension area".
        """
        return _HEADER.pack(
            b'QFI\xfb', 3,
            0, 0,                                   # no backing file
            _CLUSTER_BITS,
            -(-self._clusters.size // _SECTOR) * _SECTOR,
            0,                                      # no encryption
            self._l1_entries, self._l1_offset,
            CLUSTER, self._refcount_table_clusters,
            0, 0,                                   # no snapshots
            0, 0, 0,                                # no features
            _REFCOUNT_ORDER, _HEADER.size)

    def _refcounts(self) -> collections.abc.Iterator[bytes]:
        """Entries of "Refcount block": 1 for each cluster of the file."""
        one = (1).to_bytes(2, 'big')
        full = one * _REFCOUNTS_IN_BLOCK
        left = self._file_clusters
        for _ in range(self._refcount_blocks):
            yield full if left >= _REFCOUNTS_IN_BLOCK else (
                (one * left).ljust(CLUSTER, b'\0'))
            left -= _REFCOUNTS_IN_BLOCK

    def _l1(self) -> collections.abc.Iterator[int]:
        """The "L1 table entry": 0 where nothing in reach has data."""
        offset = self._l2_offset
        for group in range(self._clusters.groups):
            if self._clusters.marked_in(group):
                yield offset | _COPIED
                offset += CLUSTER
            else:
                yield 0

    def _l2(self) -> collections.abc.Iterator[bytes]:
        """The "L2 table entry": 0 for a cluster that reads as zeroes."""
        descriptors = itertools.count(self.data_offset | _COPIED, CLUSTER)
        for group in range(self._clusters.groups):
            marks = self._clusters.marks(group)
            if 1 in marks:
                yield _big_endian(
                    [next(descriptors) if mark else 0 for mark in marks])


def _l1_entries(size: int) -> int:
    return max(1, -(-size // (L2_REACH * CLUSTER)))


def _clusters_of(length: int) -> int:
    return -(-length // CLUSTER)


def _table(entries: collections.abc.Iterator[int],
           ) -> collections.abc.Iterator[bytes]:
    """A table's clusters, the last one filled up with zeroes."""
    while part := list(itertools.islice(entries, _ENTRIES_IN_CLUSTER)):
        yield _big_endian(part).ljust(CLUSTER, b'\0')


def _big_endian(entries: list[int]) -> bytes:
    """As "General" says: all numbers are in big endian."""
    numbers = array.array('Q', entries)
    if sys.byteorder == 'little':
        numbers.byteswap()
    return numbers.tobytes()
