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
    @hypothesis.given(extents(), strategies.integers(0, 20000 * CLUSTER))
    def check_extents(self, disk: tuple[int, list[tuple[int, int]]],
                      end: int) -> None:
        size, found = disk
        end = min(end, size)
        one_by_one = marked(size, [(offset, min(length, end - offset))
                                   for offset, length in found
                                   if offset < end])
        together = clusters.Clusters(size)
        together.mark_extents(sorted(found), end)
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
