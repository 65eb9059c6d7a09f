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

import hypothesis
from hypothesis import strategies

from nova_snapshot_ext import clusters
from tests.unit import base

CLUSTER = clusters.CLUSTER

SETTINGS = hypothesis.settings(deadline=None, database=None, max_examples=50)


@strategies.composite
def extents(draw: strategies.DrawFn, clusters_at_most: int = 20000,
            ) -> tuple[int, list[tuple[int, int]]]:
    """A disk's size and its extents of data, offset and length."""
    size = draw(strategies.integers(0, clusters_at_most * CLUSTER))
    found = []
    if size:
        for _ in range(draw(strategies.integers(0, 12))):
            offset = draw(strategies.integers(0, size - 1))
            longest = size - offset
            length = draw(strategies.integers(1, longest)
                          | strategies.integers(1, min(longest, 999999)))
            found.append((offset, length))
    return size, found


def marked(size: int, found: list[tuple[int, int]]) -> clusters.Clusters:
    made = clusters.Clusters(size)
    for offset, length in found:
        made.mark(offset, length)
    return made


class TestClusters(base.TestCase):

    @SETTINGS
    @hypothesis.given(extents())
    def check_marks_and_runs(
            self, disk: tuple[int, list[tuple[int, int]]]) -> None:
        size, found = disk
        made = marked(size, found)
        wanted = set()
        for offset, length in found:
            wanted.update(range(offset // CLUSTER,
                                (offset + length - 1) // CLUSTER + 1))
        marks = b''.join(map(made.marks, range(made.groups)))
        self.assertEqual(
            wanted, {number for number, mark in enumerate(marks) if mark})
        self.assertEqual(len(wanted), sum(
            map(made.marked_in, range(made.groups))))
        read: list[int] = []
        end = -1
        for offset, length in made.runs():
            self.assertEqual(0, offset % CLUSTER)
            self.assertTrue(length > 0 and end < offset)
            end = offset + length
            self.assertTrue(end % CLUSTER == 0 or end == size)
            read += range(offset // CLUSTER, -(-end // CLUSTER))
        self.assertEqual(sorted(wanted), read)

    @SETTINGS
    @hypothesis.given(
        strategies.integers(0, 40),
        strategies.integers(0, 3) | strategies.integers(0, 3 * CLUSTER),
        strategies.lists(strategies.tuples(
            strategies.integers(1, 40).map(CLUSTER.__mul__),
            strategies.integers(0, 2))),
        strategies.lists(strategies.integers(1, 3 * CLUSTER), max_size=3),
        strategies.integers(0, 40 * CLUSTER))
    def check_extents(
            self, first: int, more: int, even: list[tuple[int, int]],
            uneven: list[int], beyond: int) -> None:
        """:param more: bytes of the disk after all clusters that are even"""
        found = even + [(length, 1) for length in uneven]
        start = first * CLUSTER
        size = start + sum(length for length, _ in even) + more
        end = max(start, size - beyond)
        one_by_one, together = (clusters.Clusters(size) for _ in range(2))
        # What is marked stays so.
        for each in (one_by_one, together):
            each.mark(0, start // 2)
        offset = start
        for length, kind in found:
            if kind == 1 and offset < end:
                one_by_one.mark(offset, min(length, end - offset))
            offset += length
        together.mark_extents(
            start, [length for length, _ in found],
            [kind for _, kind in found], lambda kind: kind == 1, end)
        self.assertEqual(list(one_by_one.runs()), list(together.runs()))

    def test_extents_are_marked_together_as_one_by_one(self) -> None:
        self.check_extents()

    @SETTINGS
    @hypothesis.given(extents(), strategies.integers(0, 40),
                      strategies.integers(1, 40))
    def check_marked_within(
            self, disk: tuple[int, list[tuple[int, int]]], start: int,
            length: int) -> None:
        size, found = disk
        made = marked(size, found)
        wanted = {number * CLUSTER for number, mark in enumerate(
            b''.join(map(made.marks, range(made.groups)))) if mark}
        self.assertEqual(len(wanted), made.marked())
        eight = 8 * CLUSTER
        within = {offset for offset in wanted if (
            start * eight <= offset < (start + length) * eight)}
        self.assertEqual(within, made.marked_of(
            start * eight, min(length * eight, max(0, size - start * eight))))
        self.assertEqual(min(within, default=None), made.first_marked(
            start * eight, length * eight))
        for offset in within:
            made.unmark(offset)
            made.unmark(offset)
        self.assertEqual(len(wanted) - len(within), made.marked())
        self.assertEqual(set(), made.marked_of(
            start * eight, max(0, min(length * eight, size - start * eight))))

    def test_clusters_are_found_and_unmarked(self) -> None:
        self.check_marked_within()

    def test_marks_are_those_of_the_extents_and_runs_are_longest(
            self) -> None:
        self.check_marks_and_runs()

    def test_nothing_is_marked_at_first(self) -> None:
        for size in (0, 1, CLUSTER, 10 ** 10):
            self.assertEqual([], list(clusters.Clusters(size).runs()))

    def test_run_goes_on_over_groups(self) -> None:
        size = 3 * clusters.GROUP * CLUSTER
        self.assertEqual([(0, size)], list(marked(
            size, [(0, size // 2), (size // 2, size // 2)]).runs()))

    def test_run_ends_where_the_disk_ends(self) -> None:
        self.assertEqual([(CLUSTER, 1)], list(marked(
            CLUSTER + 1, [(CLUSTER, 1)]).runs()))
