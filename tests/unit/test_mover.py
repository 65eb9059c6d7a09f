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

import argparse
import ast
import hashlib
import io
import json
import os
import random
import sys
import time
import typing
from unittest import mock

import hypothesis
from hypothesis import strategies

import nova_snapshot_ext
from nova_snapshot_ext import qcow2
from tests import qcow2 as independent
from tests.unit import base
from tests.unit import fake_libnbd
from tests.unit import test_clusters

# What needs no libnbd is imported before, and so for all tests.
with mock.patch.dict(sys.modules, nbd=fake_libnbd):
    from nova_snapshot_ext import mover
    from nova_snapshot_ext import nbd

MIB = 1024 ** 2
HOLE = fake_libnbd.STATE_HOLE | fake_libnbd.STATE_ZERO


@strategies.composite
def disks(draw: strategies.DrawFn) -> fake_libnbd.Disk:
    extents = draw(strategies.lists(strategies.tuples(
        strategies.integers(1, 400_000) | strategies.sampled_from(
            [512, 65536, 131072, 3 * MIB]),
        strategies.sampled_from([0, 1, 2, 3])), max_size=20))
    content = b''.join(
        bytes(length) if flags & fake_libnbd.STATE_ZERO
        else random.Random(length).randbytes(length)
        for length, flags in extents)
    if extents and draw(strategies.booleans()):
        # An answer may reach beyond the disk's end.
        content = content[:-draw(strategies.integers(0, extents[-1][0]))
                          or None]
    disk = fake_libnbd.Disk(content, extents)
    disk.at_once = draw(strategies.integers(1, 5))
    return disk


class MoverTestCase(base.TestCase):

    def move(self, disk: fake_libnbd.Disk, image_format: str,
             **options: object) -> bytes:
        self.said: list[dict[str, typing.Any]] = []
        self.patch_name('tests.unit.fake_libnbd.disk', disk)
        path = os.path.join(self.directory, 'image')
        arguments = {'unix': '/s', 'export': 'vda', 'in_flight': 4,
                     'bandwidth': 0, 'digest': 'sha256', **options}
        with open(path, 'wb') as file:
            mover.move(
                argparse.Namespace(format=image_format, **arguments),
                mover.Output(
                    file.fileno(), typing.cast(str, arguments['digest'])),
                lambda **words: self.said.append(words))
        with open(path, 'rb') as file:
            return file.read()


class TestMove(MoverTestCase):

    @test_clusters.SETTINGS
    @hypothesis.given(disks(), strategies.integers(1, 9))
    def check_images(self, disk: fake_libnbd.Disk, in_flight: int) -> None:
        raw = self.move(disk, 'raw', in_flight=in_flight)
        self.assertEqual(disk.content, raw)
        image = self.move(disk, 'qcow2', in_flight=in_flight)
        parsed = independent.Parsed(io.BytesIO(image))
        self.assertEqual(
            disk.content,
            parsed.content()[:len(disk.content)])
        self.assertEqual(
            [{'length': len(image)},
             {'written': len(image),
              'digest': hashlib.sha256(image).hexdigest()}], self.said)
        self.assertLessEqual(disk.most_in_flight, in_flight)

    def test_images_hold_what_the_disk_holds(self) -> None:
        self.check_images()

    def test_holes_are_not_read(self) -> None:
        disk = fake_libnbd.Disk(bytes(9 * MIB), [
            (4 * MIB, HOLE), (65536, 0), (5 * MIB - 65536, HOLE)])
        for image_format in ('raw', 'qcow2'):
            disk.reads.clear()
            self.move(disk, image_format)
            self.assertEqual([(4 * MIB, 65536)], disk.reads)

    def test_hole_that_need_not_read_as_zeroes_is_read(self) -> None:
        disk = fake_libnbd.Disk(b'x' * 512, [(512, fake_libnbd.STATE_HOLE)])
        self.assertEqual(b'x' * 512, self.move(disk, 'raw'))

    def test_all_is_read_of_a_server_that_knows_no_extents(self) -> None:
        disk = fake_libnbd.Disk(b'x' * 3 * MIB, None)
        self.assertEqual(disk.content, self.move(disk, 'raw'))
        self.assertEqual(b'', self.move(fake_libnbd.Disk(b'', None), 'raw'))

    def test_requests_are_large_and_as_many_as_allowed(self) -> None:
        disk = fake_libnbd.Disk(bytes(20 * MIB), [(20 * MIB, 0)])
        self.move(disk, 'raw', in_flight=8)
        self.assertEqual([MIB] * 20, [length for _, length in disk.reads])
        self.assertEqual(8, disk.most_in_flight)

    def test_read_that_fails_ends_the_image(self) -> None:
        disk = fake_libnbd.Disk(b'x' * 8 * MIB, [(8 * MIB, 0)])
        disk.bad.add(5 * MIB)
        for image_format in ('raw', 'qcow2'):
            self.assertRaisesRegex(nbd.NbdError, 'Input/output error',
                                   self.move, disk, image_format)
            # Nothing that looks like the end.
            self.assertEqual(['length'], [
                word for words in self.said for word in words])

    def test_server_that_does_not_answer_with_extents(self) -> None:
        self.assertRaisesRegex(
            nbd.NbdError, 'data at byte 512', self.move,
            fake_libnbd.Disk(bytes(1024), [(512, 0)]), 'raw')

    def test_export_that_can_not_be_opened(self) -> None:
        disk = fake_libnbd.Disk(b'', [])
        disk.refuses = True
        self.assertRaisesRegex(nbd.NbdError, 'vda of /s can not be opened',
                               self.move, disk, 'raw')

    def test_bandwidth_is_a_ceiling(self) -> None:
        disk = fake_libnbd.Disk(bytes(8 * MIB), [(8 * MIB, 0)])
        began = time.monotonic()
        self.move(disk, 'raw', bandwidth=10)
        # The last request is sent when seven were paid for.
        self.assertGreaterEqual(time.monotonic() - began, 0.7)

    def test_digest_is_said_only_if_it_is_asked_for(self) -> None:
        self.move(fake_libnbd.Disk(b'', []), 'raw', digest=None)
        self.assertEqual({'written': 0, 'digest': None}, self.said[-1])

    def test_disk_too_large_for_qcow2_takes_no_memory(self) -> None:
        class Huge(bytes):
            def __len__(self) -> int:
                return 2 ** 62
        self.assertRaises(qcow2.TooLarge, self.move,
                          fake_libnbd.Disk(Huge(), []), 'qcow2')


class TestImports(base.TestCase):

    def test_mover_imports_the_standard_library_libnbd_and_itself(
            self) -> None:
        directory = os.path.dirname(nova_snapshot_ext.__file__)
        seen: set[str] = set()
        left = ['mover']
        while left:
            name = left.pop()
            seen.add(name)
            with open(os.path.join(directory, f'{name}.py')) as file:
                tree = ast.parse(file.read())
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    for each in node.names:
                        self.assertIn(each.name.partition('.')[0],
                                      sys.stdlib_module_names | {'nbd'})
                elif isinstance(node, ast.ImportFrom):
                    package, _, module = (node.module or '').partition('.')
                    self.assertEqual('nova_snapshot_ext', package)
                    left += {module} if module else {
                        each.name for each in node.names}
            left = [each for each in left if each not in seen]
        self.assertEqual({'mover', 'nbd', 'qcow2', 'clusters'}, seen)


class TestWords(base.TestCase):

    def test_words_are_lines_of_json_on_standard_error(self) -> None:
        error = io.StringIO()
        self.patch_name('sys.stderr', error)
        mover._say(length=5)
        self.assertEqual({'length': 5}, json.loads(error.getvalue()))
        self.assertEqual('\n', error.getvalue()[-1])
