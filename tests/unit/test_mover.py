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
import collections.abc
import contextlib
import hashlib
import io
import json
import os
import random
import sys
import threading
import time
import typing
from unittest import mock

import hypothesis
from hypothesis import strategies

import nova_snapshot_ext
from nova_snapshot_ext import qcow2
from nova_snapshot_ext import tempo as tempos
from nova_snapshot_ext import zeroes
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


def _bytes_of(reads: list[tuple[int, int]]) -> int:
    return sum(length for _, length in reads)


class MoverTestCase(base.TestCase):

    def move(self, disk: fake_libnbd.Disk, image_format: str,
             tempo: tempos.Tempo | None = None,
             digest: str | None = 'sha256', **options: object) -> bytes:
        self.said: list[dict[str, typing.Any]] = []
        self.patch_name('tests.unit.fake_libnbd.disk', disk)
        path = os.path.join(self.directory, 'image')
        arguments = {'unix': '/s', 'export': 'vda', 'in_flight': 4,
                     'patience': 60, 'size': None, 'tell': False, **options}
        with open(path, 'wb') as file:
            mover.move(
                argparse.Namespace(format=image_format, **arguments),
                tempo or tempos.Tempo(), mover.Output(file.fileno()),
                lambda **words: self.said.append(words), lambda: digest)
        with open(path, 'rb') as file:
            return file.read()

    @contextlib.contextmanager
    def later(self, wait_s: float, call: collections.abc.Callable[[], None],
              ) -> collections.abc.Iterator[None]:
        timer = threading.Timer(wait_s, call)
        timer.start()
        try:
            yield
        finally:
            timer.join()


class TestMove(MoverTestCase):

    @test_clusters.SETTINGS
    @hypothesis.given(disks(), strategies.integers(1, 9))
    def check_images(self, disk: fake_libnbd.Disk, in_flight: int) -> None:
        raw = self.move(disk, 'raw', in_flight=in_flight)
        self.assertEqual(disk.content, raw)
        self.assertEqual([0, _bytes_of(disk.reads)],
                         [words['read'] for words in self.said])
        image = self.move(disk, 'qcow2', in_flight=in_flight)
        parsed = independent.Parsed(io.BytesIO(image))
        self.assertEqual(
            disk.content,
            parsed.content()[:len(disk.content)])
        self.assertEqual(
            [{'length': len(image), 'read': self.said[0]['read']},
             {'written': len(image), 'read': self.said[1]['read'],
              'digest': hashlib.sha256(image).hexdigest()}], self.said)
        self.assertLessEqual(disk.most_in_flight, in_flight)

    def test_images_hold_what_the_disk_holds(self) -> None:
        self.check_images()

    def test_signs_of_life_are_given(self) -> None:
        self.patch(mover, '_TELL_S', 0.0)
        disk = fake_libnbd.Disk(b'x' * 2 * MIB, [(2 * MIB, 0)])
        self.move(disk, 'raw', digest=None)
        looked = {'looked': 0, 'of': 2 * MIB}
        length = {'length': 2 * MIB, 'read': 0}
        written = {'written': 2 * MIB, 'digest': None, 'read': 2 * MIB}
        self.assertEqual(
            [looked, length, written], self.said)
        self.move(disk, 'raw', digest=None, tell=True)
        self.assertEqual(
            [looked, length, {'moved': MIB}, {'moved': 2 * MIB}, written],
            self.said)

    def test_holes_are_signs_of_life(self) -> None:
        """To hash zeroes takes longer than a mover may give nothing."""
        self.patch(mover, '_TELL_S', 0.0)
        self.move(fake_libnbd.Disk(bytes(3 * MIB), [(3 * MIB, HOLE)]),
                  'raw', digest=None, tell=True)
        self.assertEqual(
            [{'moved': (1 + done) * MIB} for done in range(3)],
            [said for said in self.said if 'moved' in said])

    def test_holes_are_not_read(self) -> None:
        disk = fake_libnbd.Disk(
            bytes(4 * MIB) + b'x' * 65536 + bytes(5 * MIB - 65536), [
                (4 * MIB, HOLE), (65536, 0), (5 * MIB - 65536, HOLE)])
        for image_format in ('raw', 'qcow2'):
            disk.reads.clear()
            self.move(disk, image_format)
            self.assertEqual({(4 * MIB, 65536)}, set(disk.reads))

    def test_hole_that_need_not_read_as_zeroes_is_read(self) -> None:
        disk = fake_libnbd.Disk(b'x' * 512, [(512, fake_libnbd.STATE_HOLE)])
        self.assertEqual(b'x' * 512, self.move(disk, 'raw'))

    def test_all_is_read_of_a_server_that_knows_no_extents(self) -> None:
        disk = fake_libnbd.Disk(b'x' * 3 * MIB, None)
        self.assertEqual(disk.content, self.move(disk, 'raw'))
        self.assertEqual(b'', self.move(fake_libnbd.Disk(b'', None), 'raw'))

    def test_requests_are_large_and_as_many_as_allowed(self) -> None:
        disk = fake_libnbd.Disk(b'x' * 20 * MIB, [(20 * MIB, 0)])
        self.move(disk, 'raw', in_flight=8)
        self.assertEqual([nbd.REQUEST] * (20 * MIB // nbd.REQUEST),
                         [length for _, length in disk.reads
                          if length > 65536])
        self.assertEqual(8, disk.most_in_flight)

    def test_disk_is_read_in_bursts_for_whoever_is_slower(self) -> None:
        disk = fake_libnbd.Disk(b'x' * 40 * MIB, [(40 * MIB, 0)])
        self.patch_name('tests.unit.fake_libnbd.disk', disk)
        export = nbd.Export('/s', 'vda')
        reader = nbd._Pipeline(
            export._nbd, ((number * MIB, MIB) for number in range(40)), 8,
            tempos.Tempo(), export._wait)
        reader.start()
        taken = reader.results()
        next(taken)
        self.wait(lambda: len(disk.reads) == 16 and not reader._flight)
        # Seven of the sixteen buffers come back, and wait for an eighth.
        for _ in range(7):
            next(taken)
        time.sleep(0.1)
        self.assertEqual(16, len(disk.reads))
        next(taken)
        self.wait(lambda: len(disk.reads) == 24)
        self.assertEqual([number * MIB for number in range(9, 40)],
                         [offset for offset, _ in taken])

    def wait(self, true: collections.abc.Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not true():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)

    def test_read_that_fails_ends_the_image(self) -> None:
        disk = fake_libnbd.Disk(b'x' * 8 * MIB, [(8 * MIB, 0)])
        disk.bad.add(5 * MIB)
        for image_format in ('raw', 'qcow2'):
            self.assertRaisesRegex(nbd.NbdError, 'Input/output error',
                                   self.move, disk, image_format)
            # Nothing that looks like the end.
            self.assertEqual(['length', 'read'], [
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

    def test_server_that_does_not_answer_is_not_waited_for_without_end(
            self) -> None:
        disk = fake_libnbd.Disk(b'x' * MIB, [(MIB, 0)])
        disk.dumb = True
        self.assertRaisesRegex(nbd.NbdError, 'has not answered for 1 s',
                               self.move, disk, 'raw', patience=1)

    def test_size_is_that_of_the_disk(self) -> None:
        disk = fake_libnbd.Disk(b'x' * 4096, [(4096, 0)])
        for size in (4096, 4096 - 511, 4096 + 511):
            self.assertEqual(disk.content,
                             self.move(disk, 'raw', size=size))
        for size in (0, 4096 - 512, 4096 + 512, 2 ** 62):
            self.assertRaisesRegex(
                nbd.NbdError, f'has 4096 bytes, and the disk {size}',
                self.move, disk, 'raw', size=size)

    @test_clusters.SETTINGS
    @hypothesis.given(
        size=strategies.integers(0, 3 * MIB),
        answers=strategies.lists(strategies.tuples(
            strategies.sampled_from((0, 0, 0, 1, -512, MIB)),
            strategies.lists(strategies.tuples(
                strategies.integers(0, 2 ** 32) | strategies.sampled_from(
                    (0, 1, 65536, MIB, 2 ** 63 - 1)),
                strategies.integers(0, 7)), max_size=5).map(
                    lambda extents: [number for extent in extents
                                     for number in extent])),
            max_size=12))
    def check_liars(self, size: int,
                    answers: list[tuple[int, list[int]]]) -> None:
        for image_format in ('raw', 'qcow2'):
            disk = fake_libnbd.Disk(b'x' * MIB, [(MIB, 0)])
            disk.size, disk.answers = size, list(answers)
            try:
                image = self.move(disk, image_format)
            except nbd.NbdError:
                continue
            self.assertEqual(len(image), self.said[0]['length'])
            self.assertEqual(len(image), self.said[-1]['written'])
            if image_format == 'raw':
                self.assertEqual(size, len(image))
            else:
                independent.Parsed(io.BytesIO(image))

    def test_server_that_lies_gives_an_error_or_a_whole_image(self) -> None:
        self.check_liars()

    def test_bandwidth_is_a_ceiling(self) -> None:
        disk = fake_libnbd.Disk(b'x' * 8 * MIB, [(8 * MIB, 0)])
        began = time.monotonic()
        self.move(disk, 'raw', tempo=tempos.Tempo(10 * MIB))
        # The last request is sent when those before were paid for.
        self.assertGreaterEqual(time.monotonic() - began, 0.7)

    def test_disk_is_left_alone_for_a_part_of_the_time(self) -> None:
        disk = fake_libnbd.Disk(b'x' * 16 * MIB, [(16 * MIB, 0)])
        disk.answers_after_s = 0.01
        tempo = tempos.Tempo(rest=0.75)
        bursts = []
        real = tempo.answered

        def answered() -> None:
            bursts.append(tempo.burst)
            real()
        self.patch(tempo, 'answered', answered)
        began = time.monotonic()
        self.move(disk, 'raw', tempo=tempo, in_flight=4)
        # After all but the last burst, for three times as long as it took.
        self.assertGreaterEqual(
            time.monotonic() - began, (16 + 3 * 12) * 0.01)
        self.assertEqual(16, sum(bursts))
        self.assertLessEqual(max(bursts), 4)

    def test_rest_may_change_meanwhile(self) -> None:
        disk = fake_libnbd.Disk(b'x' * 64 * MIB, [(64 * MIB, 0)])
        disk.answers_after_s = 0.005
        tempo = tempos.Tempo(rest=0.99)
        began = time.monotonic()

        def hurry() -> None:
            tempo.rest = 0.0
        with self.later(0.3, hurry):
            self.move(disk, 'raw', tempo=tempo)
        # Resting for 99 times as long as it reads would take half a minute.
        self.assertLess(time.monotonic() - began, 10)

    def test_digest_is_said_only_if_it_is_asked_for(self) -> None:
        self.move(fake_libnbd.Disk(b'', []), 'raw', digest=None)
        self.assertEqual({'written': 0, 'digest': None, 'read': 0},
                         self.said[-1])

    def test_disk_too_large_for_qcow2_takes_no_memory(self) -> None:
        class Huge(bytes):
            def __len__(self) -> int:
                return 2 ** 62
        self.assertRaises(qcow2.TooLarge, self.move,
                          fake_libnbd.Disk(Huge(), []), 'qcow2')


class TestStoredZeroes(MoverTestCase):
    """Zeroes that the server gives as data."""

    def image_of(self, content: bytes) -> tuple[list[int], int]:
        """:returns: the clusters that the image holds, and how many bytes
            were read more than once
        """
        disk = fake_libnbd.Disk(content, [(len(content), 0)])
        image = self.move(disk, 'qcow2')
        parsed = independent.Parsed(io.BytesIO(image))
        self.assertEqual(content, parsed.content()[:len(content)])
        self.assertEqual(content, self.move(disk, 'raw'))
        disk.reads.clear()
        self.move(disk, 'qcow2')
        read = _bytes_of(disk.reads)
        self.assertEqual(read, self.said[-1]['read'])
        # To lay the image out, zeroes were looked for.
        self.assertEqual(read - 65536 * len(parsed.where),
                         self.said[0]['read'])
        return sorted(parsed.where), read - 65536 * len(parsed.where)

    def test_long_stretches_take_no_room_in_the_image(self) -> None:
        for start, length in ((0, 12), (3, 10), (5, 27), (20, 12)):
            content = bytearray(b'x' * 32 * MIB)
            content[start * MIB:(start + length) * MIB] = bytes(length * MIB)
            stored, _ = self.image_of(bytes(content))
            # A megabyte at either end may be left.
            self.assertLessEqual(len(stored), (32 - length) * 16 + 2 * 16)
            self.assertTrue({0, 511} - set(stored)
                            if start in (0, 20) else stored)

    def test_disk_of_zeroes_is_empty(self) -> None:
        stored, _ = self.image_of(bytes(9 * MIB))
        self.assertEqual([], stored)

    def test_dense_data_are_read_once_and_a_little(self) -> None:
        stored, again = self.image_of(b'x' * 32 * MIB)
        self.assertEqual(512, len(stored))
        self.assertLessEqual(again, 32 * MIB // 64)

    def test_a_few_zeroes_do_not_have_all_read_twice(self) -> None:
        content = bytearray(b'x' * 32 * MIB)
        for offset in range(0, 32 * MIB, MIB):
            content[offset:offset + 65536] = bytes(65536)
        _, again = self.image_of(bytes(content))
        self.assertLess(again, 32 * MIB * 0.7)

    def test_places_are_looked_at_together(self) -> None:
        disk = fake_libnbd.Disk(bytes(32 * MIB), [(32 * MIB, 0)])
        for in_flight in 1, 5:
            self.move(disk, 'qcow2', in_flight=in_flight)
            self.assertEqual(in_flight, disk.most_in_flight)

    def test_looking_is_told_while_it_takes_long(self) -> None:
        self.patch(zeroes, '_TELL_S', 0.0)
        size = 64 * MIB
        disk = fake_libnbd.Disk(bytes(size), [(size, 0)])
        self.move(disk, 'qcow2')
        *looked, length, _ = self.said
        self.assertIn('length', length)
        self.assertEqual({size}, {words['of'] for words in looked})
        # A few megabytes, and then four at a time, up to the end.
        offsets = [words['looked'] for words in looked]
        self.assertEqual(sorted(offsets), offsets)
        self.assertGreaterEqual(len(offsets), size // (4 * MIB))
        self.assertEqual(size, offsets[-1])

    def test_read_that_fails_while_zeroes_are_looked_for(self) -> None:
        disk = fake_libnbd.Disk(bytes(MIB), [(MIB, 0)])
        disk.bad.add(0)
        self.assertRaisesRegex(nbd.NbdError, 'Input/output error',
                               self.move, disk, 'qcow2')


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
        self.assertEqual({'mover', 'nbd', 'qcow2', 'clusters', 'tempo',
                          'zeroes'}, seen)


class TestWords(base.TestCase):

    def test_words_are_lines_of_json_on_standard_error(self) -> None:
        error = io.StringIO()
        self.patch_name('sys.stderr', error)
        mover._say(length=5)
        self.assertEqual({'length': 5}, json.loads(error.getvalue()))
        self.assertEqual('\n', error.getvalue()[-1])
