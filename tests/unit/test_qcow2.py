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

import io
import shutil
import subprocess

import hypothesis

from nova_snapshot_ext import clusters
from nova_snapshot_ext import qcow2
from tests import qcow2 as independent
from tests.unit import base
from tests.unit import test_clusters

CLUSTER = clusters.CLUSTER
REACH = qcow2.L2_REACH * CLUSTER


class TestLayout(base.TestCase):

    def file_of(self, made: clusters.Clusters) -> bytes:
        """The file, whose data clusters hold their number in the disk."""
        layout = qcow2.Layout(made)
        content = b''.join(layout.metadata())
        self.assertEqual(layout.data_offset, len(content))
        parts = [content]
        for offset, length in made.runs():
            parts += ((offset // CLUSTER + number).to_bytes(8, 'big').ljust(
                CLUSTER, b'\0') for number in range(-(-length // CLUSTER)))
        content = b''.join(parts)
        self.assertEqual(layout.length, len(content))
        return content

    def parsed(self, made: clusters.Clusters) -> independent.Parsed:
        return independent.Parsed(io.BytesIO(self.file_of(made)))

    @test_clusters.SETTINGS
    @hypothesis.given(test_clusters.extents(2 * qcow2.L2_REACH + 99))
    def check_any_disk(self, disk: tuple[
            int, list[tuple[int, int]]]) -> None:
        size, found = disk
        made = test_clusters.marked(size, [
            (offset, min(length, 99 * CLUSTER)) for offset, length in found])
        file = io.BytesIO(self.file_of(made))
        parsed = independent.Parsed(file)
        self.assertEqual(-(-size // 512) * 512, parsed.size)
        self.assertEqual(
            {offset // CLUSTER + number
             for offset, length in made.runs()
             for number in range(-(-length // CLUSTER))}, set(parsed.where))
        for number, offset in parsed.where.items():
            file.seek(offset)
            self.assertEqual(number, int.from_bytes(file.read(8), 'big'))
        self.check_by_qemu(file.getvalue())

    def check_by_qemu(self, content: bytes) -> None:
        program = shutil.which('qemu-img')
        if program is not None:
            path = self.new_file('image', content)
            subprocess.run([program, 'check', '-q', '-f', 'qcow2', path],
                           check=True)

    def test_any_disk(self) -> None:
        self.check_any_disk()

    def test_empty_disk(self) -> None:
        parsed = self.parsed(clusters.Clusters(0))
        self.assertEqual((0, {}), (parsed.size, parsed.where))
        self.check_by_qemu(self.file_of(clusters.Clusters(0)))

    def test_disk_without_data(self) -> None:
        for size in (512, REACH, REACH + 512, 2 ** 41, 2 ** 45):
            made = clusters.Clusters(size)
            self.assertEqual({}, self.parsed(made).where)
            self.check_by_qemu(self.file_of(made))

    def test_size_is_rounded_up_to_a_sector(self) -> None:
        # QEMU would cut it down, and with it the last bytes of the disk.
        self.assertEqual(1024, self.parsed(clusters.Clusters(513)).size)

    def test_one_byte_over_the_reach_of_an_l2_table(self) -> None:
        made = test_clusters.marked(REACH + 1, [(REACH, 1)])
        parsed = self.parsed(made)
        self.assertEqual(2, parsed.l1_size)
        self.assertEqual({qcow2.L2_REACH}, set(parsed.where))
        made.mark(REACH - 1, 1)
        self.assertEqual({qcow2.L2_REACH - 1, qcow2.L2_REACH},
                         set(self.parsed(made).where))
        self.check_by_qemu(self.file_of(made))

    def test_file_of_more_clusters_than_a_refcount_block_has(self) -> None:
        # Around the border: the second block counts itself, too.
        for data in range(32768 - 12, 32768 + 3):
            made = test_clusters.marked(2 ** 32, [(0, data * CLUSTER)])
            layout = qcow2.Layout(made)
            head = b''.join(layout.metadata())
            self.assertEqual(layout.data_offset, len(head))
            used = layout.length // CLUSTER
            blocks = -(-used // 32768)
            counts = head[2 * CLUSTER:(2 + blocks) * CLUSTER]
            self.assertEqual((b'\0\1' * used).ljust(blocks * CLUSTER, b'\0'),
                             counts)
            self.assertEqual(layout.data_offset + data * CLUSTER,
                             layout.length)

    def test_largest_l1_table(self) -> None:
        largest = 32 * 1024 ** 2 // 8 * REACH
        qcow2.check_size(largest)
        self.assertRaises(qcow2.TooLarge, qcow2.check_size, largest + 1)

    def test_layout_of_a_disk_that_is_too_large_is_refused(self) -> None:
        self.patch_name('nova_snapshot_ext.qcow2._MAX_L1', 8)
        made = clusters.Clusters(REACH + 1)
        self.assertRaises(qcow2.TooLarge, qcow2.Layout, made)

    def test_largest_refcount_table(self) -> None:
        self.patch_name('nova_snapshot_ext.qcow2._MAX_REFCOUNT_TABLE', 0)
        self.assertRaises(
            qcow2.TooLarge, qcow2.Layout, clusters.Clusters(512))
