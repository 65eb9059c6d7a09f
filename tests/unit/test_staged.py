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

import json
import os
import threading
import time

import fixtures

from nova_snapshot_ext import exception
from nova_snapshot_ext import frozen
from nova_snapshot_ext.transfers import staged
from tests.unit import base
from tests.unit import doubles


class TestStaged(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.qemu_img = doubles.QemuImg(self.journal)
        self.limits: list[tuple[object, object]] = []
        self.patch_name('nova_snapshot_ext.qemu_img.run', self.run_limited)
        self.transfer = staged.StagedTransfer()
        self.disk = frozen.FrozenDisk('vda', 4096, '/run/a,b', 'vda')
        self.log = self.new_log()

    def run_limited(self, *arguments: str, limits: object = None,
                    timeout: object = None,
                    cancellation: object = None) -> str:
        self.limits.append((limits, timeout))
        self.cancellation = cancellation
        return self.qemu_img.run(*arguments)

    def convert(self, **changes: object) -> tuple[str, ...]:
        with self.transfer.image(
                self.disk, self.request(**changes), self.log):
            pass
        return self.qemu_img.commands[-1]

    def test_formats(self) -> None:
        for fmt in ('qcow2', 'raw', 'vmdk', 'vdi'):
            request = self.request(image_format=fmt)
            self.assertIsNone(self.transfer.obstacle(request))
            command = self.convert(image_format=fmt)
            self.assertEqual(fmt, command[command.index('-O') + 1])

    def test_other_formats_are_an_obstacle(self) -> None:
        for fmt in ('', 'ploop', 'luks', 'vhd'):
            self.assertIn('qcow2, raw, vmdk, vdi', self.transfer.obstacle(
                self.request(image_format=fmt)) or '')

    def test_only_qcow2_is_compressed(self) -> None:
        self.assertIn('-c', self.convert(compress=True))
        self.assertNotIn('-c', self.convert())
        self.assertNotIn(
            '-c', self.convert(compress=True, image_format='raw'))

    def test_source_is_the_frozen_disk_and_no_format_is_guessed(
            self) -> None:
        command = self.convert()
        self.assertEqual(
            {'driver': 'raw', 'file': {
                'driver': 'nbd', 'export': 'vda',
                'server': {'type': 'unix', 'path': '/run/a,b'}}},
            json.loads(command[-2].removeprefix('json:')))

    def test_program_has_its_limits(self) -> None:
        self.convert(convert_timeout=7, read_timeout=8)
        self.assertEqual([8, 7], [timeout for _, timeout in self.limits])
        self.assertNotIn(None, [limits for limits, _ in self.limits])

    def test_export_of_another_size_is_no_image_of_the_disk(self) -> None:
        for size in (4096 - 512, 4096 + 512, 0):
            self.qemu_img.size = size
            self.assertRaisesRegex(
                exception.TransferFailed,
                f'vda has {size} bytes, and the disk 4096', self.convert)
        self.assertEqual([], self.journal.of('qemu-img convert'))
        # QEMU counts sectors.
        self.qemu_img.size = 4096 + 511
        self.convert()

    def test_size_that_is_not_known_is_not_compared(self) -> None:
        self.qemu_img.size = 12345
        self.disk = frozen.FrozenDisk('vda', 0, '/run/a,b', 'vda')
        self.convert()

    def test_export_that_can_not_be_read_is_an_error(self) -> None:
        self.qemu_img.fails.add('info')
        self.assertRaisesRegex(
            exception.TransferFailed, 'vda can not be read', self.convert)
        self.assertEqual([], os.listdir(self.staging))

    def test_bandwidth_is_limited_if_that_is_asked_for(self) -> None:
        self.assertNotIn('-r', self.convert())
        command = self.convert(bandwidth=7)
        self.assertEqual('7M', command[command.index('-r') + 1])

    def test_program_ends_with_the_snapshot(self) -> None:
        request = self.request()
        with self.transfer.image(self.disk, request, self.log):
            pass
        self.assertIs(request.cancellation, self.cancellation)

    def test_image_can_be_read_from_its_first_byte_twice(self) -> None:
        with self.transfer.image(
                self.disk, self.request(), self.log) as image:
            self.assertTrue(image.independent)
            self.assertEqual(5, image.length)
            for _ in range(2):
                with image.open() as file:
                    self.assertEqual(b'image', file.read())
            self.assertEqual(
                '6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a'
                '43e3d', image.digest('sha256'))

    def hash_slowly(self) -> None:
        path = self.new_file(
            'sha256sum', b'#!/bin/sh\nexec sleep 50\n')
        os.chmod(path, 0o755)
        self.useFixture(fixtures.EnvironmentVariable(
            'PATH', f'{self.directory}:{os.environ["PATH"]}'))

    def test_hashing_ends_with_the_snapshot(self) -> None:
        self.hash_slowly()
        request = self.request()
        with self.transfer.image(self.disk, request, self.log) as image:
            timer = threading.Timer(
                1.0, request.cancellation.cancel,
                [exception.ImageGone('deleted')])
            timer.start()
            self.addCleanup(timer.join)
            began = time.monotonic()
            self.assertRaisesRegex(
                exception.TransferFailed, 'was not hashed', image.digest,
                'sha256')
            self.assertLess(time.monotonic() - began, 30)

    def test_hashing_has_a_limit(self) -> None:
        self.hash_slowly()
        with self.transfer.image(
                self.disk, self.request(convert_timeout=1),
                self.log) as image:
            self.assertRaisesRegex(
                exception.TransferFailed, 'took longer than 1 seconds',
                image.digest, 'sha256')

    def test_unknown_hash_is_an_error(self) -> None:
        with self.transfer.image(
                self.disk, self.request(), self.log) as image:
            self.assertRaisesRegex(
                exception.TransferFailed, 'crc32', image.digest, 'crc32')

    def test_nothing_is_left(self) -> None:
        self.convert()
        self.assertEqual([], os.listdir(self.staging))
        self.assertEqual(0, self.log.pending)

    def test_nothing_is_left_when_it_fails(self) -> None:
        self.qemu_img.fails.add('convert')
        self.assertRaisesRegex(
            exception.TransferFailed, 'vda was not made', self.convert)
        self.assertEqual([], os.listdir(self.staging))

    def test_directory_is_for_its_owner_alone(self) -> None:
        modes = []
        real = self.qemu_img.run

        def run(*arguments: str) -> str:
            if arguments[0] == 'convert':
                directory = os.path.dirname(arguments[-1])
                modes.append(os.stat(directory).st_mode)
            return real(*arguments)
        self.qemu_img.run = run  # type: ignore[method-assign]
        self.convert()
        self.assertEqual([0o40700], modes)

    def test_it_needs_the_room_of_the_image(self) -> None:
        self.assertEqual(12345, self.transfer.staging_bytes(12345))
