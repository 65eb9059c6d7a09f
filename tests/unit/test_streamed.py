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

import contextlib
import os
import sys
import threading
import time
import typing

from nova_snapshot_ext import account as accounts
from nova_snapshot_ext import exception
from nova_snapshot_ext import frozen
from nova_snapshot_ext import image_bytes
from nova_snapshot_ext import processes
from nova_snapshot_ext.transfers import streamed
from nova_snapshot_ext import undo
from tests.unit import base

#: a mover whose image is what a file says, with a word of how it was started
MOVER = """\
import hashlib, json, sys
arguments = sys.argv[1:]
with open({path!r}, 'rb') as file: image = file.read()
with open({path!r} + '.log', 'a') as log: print(*arguments, file=log)
def say(**words): print(json.dumps(words), file=sys.stderr, flush=True)
say(looked=1, of=4)
say(length=len(image), read=3)
name = None
for line in sys.stdin:
    told = json.loads(line)
    if 'begin' in told:
        name = told['begin']
        break
else:
    sys.exit(1)
sys.stdout.buffer.write(image)
sys.stdout.buffer.flush()
say(written=len(image),
    digest=hashlib.new(name, image).hexdigest() if name else None, read=10)
"""


class TestStreamed(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.transfer = streamed.StreamedTransfer()
        self.disk = frozen.FrozenDisk('vda', 4096, '/run/a,b', 'vda')
        self.log = self.new_log()
        self.why: str | None = None
        self.path = self.new_file('image', b'image')
        self.patch_name('nova_snapshot_ext.mover_stream.command',
                        self.command)
        self.patch_name('nova_snapshot_ext.mover_stream.why_not',
                        lambda python: self.why)

    def command(self, python: str, *arguments: str) -> list[str]:
        self.python = python
        return [sys.executable, '-I', '-c', MOVER.format(path=self.path),
                *arguments]

    def started(self) -> list[list[str]]:
        with open(f'{self.path}.log') as log:
            return [line.split() for line in log]

    def image(self, **changes: object) -> typing.ContextManager[
            image_bytes.ImageBytes]:
        return self.transfer.image(
            self.disk, self.request(**changes), self.log)

    def test_formats(self) -> None:
        for image_format in ('qcow2', 'raw'):
            self.assertIsNone(self.transfer.obstacle(
                self.request(image_format=image_format)))
        for image_format in ('vmdk', 'vdi', 'ploop', ''):
            self.assertIn('only qcow2, raw', self.transfer.obstacle(
                self.request(image_format=image_format)) or '')

    def test_compression_is_an_obstacle(self) -> None:
        self.assertIn('compress', self.transfer.obstacle(
            self.request(compress=True)) or '')
        self.assertIsNone(self.transfer.obstacle(
            self.request(compress=True, image_format='raw')))

    def test_interpreter_without_libnbd_is_an_obstacle(self) -> None:
        self.why = 'install something'
        self.assertEqual(
            self.why, self.transfer.obstacle(self.request()))

    def test_mover_is_told_what_to_read(self) -> None:
        with self.image(mover_python='/opt/python', read_timeout=9,
                        image_format='raw') as image:
            image.open().read()
        [arguments] = self.started()
        self.assertEqual('/opt/python', self.python)
        self.assertEqual(
            ['--unix=/run/a,b', '--export=vda', '--format=raw',
             '--patience=9', '--nice=0'], arguments[:5])

    def test_bandwidth_holds_for_every_mover(self) -> None:
        with self.image(bandwidth=7) as image:
            image.open().read()
            image.open().read()
        self.assertEqual(2, len(self.started()))
        for arguments in self.started():
            self.assertIn(f'--bandwidth={7 * 1024 ** 2}', arguments)

    def test_guest_that_keeps_a_share_sets_the_pace(self) -> None:
        told = []
        kept = []
        self.patch_name('nova_snapshot_ext.mover_stream.MoverStream.rest',
                        lambda stream, rest: told.append(rest))

        @contextlib.contextmanager
        def keep(*arguments):
            kept.append(arguments)
            yield
        self.patch_name('nova_snapshot_ext.pace.kept', keep)
        with self.image(guest_share=80) as image:
            self.assertEqual((self.guest, 'vda', 0.8), kept[0][:3])
            image.open().read()
            kept[0][-1](0.5)
            image.open().read()
        self.assertEqual([0.5], told)
        # Until the guest was looked at it has all that it may have; the next
        # attempt goes on at the pace that was found.
        for rest, arguments in zip(('0.8', '0.5'), self.started()):
            self.assertIn(f'--rest={rest}', arguments)
            self.assertIn('--nice=10', arguments)

    def test_snapshot_that_comes_first_looks_at_no_guest(self) -> None:
        self.patch_name('nova_snapshot_ext.pace.kept', None)
        with self.image(guest_share=0) as image:
            image.open().read()
        [arguments] = self.started()
        self.assertIn('--rest=0.0', arguments)
        self.assertIn('--nice=0', arguments)

    def test_image_is_read_while_the_disk_is_frozen(self) -> None:
        with self.image() as image:
            self.assertFalse(image.independent)
            with image.open() as file:
                self.assertEqual(5, image.length)
                self.assertEqual(b'image', file.read())
        self.assertEqual(1, len(self.started()), 'extents were read twice')

    def test_how_far_the_disk_is_looked_through_is_told(self) -> None:
        told = []
        with self.image(progress=lambda *each: told.append(each)) as image:
            image.open().read()
        self.assertEqual([(1, 4)], told)

    def test_what_is_read_of_the_disk_is_put_down(self) -> None:
        account = accounts.Account()
        with self.image(account=account) as image:
            image.open().read()
            self.assertEqual(10, account.read_bytes)
            # One that is cut off has told what it took to lay it out.
            image.open().read(1)
            self.assertEqual(13, account.read_bytes)
            image.digest('sha256')
        self.assertEqual(23, account.read_bytes)

    def test_disk_is_laid_out_before_anybody_asks(self) -> None:
        with self.image():
            deadline = time.monotonic() + 30
            while not os.path.exists(f'{self.path}.log'):
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.01)

    def test_each_attempt_is_a_new_mover_from_the_first_byte_on(
            self) -> None:
        with self.image() as image:
            with image.open() as file:
                self.assertEqual(b'im', file.read(2))
            with image.open() as file:
                self.assertEqual(b'image', file.read())
        self.assertEqual(2, len(self.started()))

    def test_length_is_that_of_the_attempt(self) -> None:
        with self.image() as image:
            image.open()
            self.new_file('image', b'longer image')
            self.assertEqual(b'longer image', image.open().read())
            self.assertEqual(12, image.length)

    def test_hash_is_computed_on_the_way_if_it_is_asked_for(self) -> None:
        expected = ('6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917'
                    'd7a43e3d')
        with self.image() as image:
            with image.open('sha256') as file:
                file.read()
            self.assertEqual(expected, image.digest('sha256'))
            self.assertEqual(1, len(self.started()), 'it was read twice')
            with image.open() as file:
                file.read()
            self.assertEqual(expected, image.digest('sha256'))
            self.assertEqual(3, len(self.started()))

    def test_hash_of_another_image_is_none(self) -> None:
        with self.image() as image:
            with image.open() as file:
                file.read()
            self.new_file('image', b'longer image')
            self.assertRaisesRegex(
                exception.TransferFailed, 'can not be made again',
                image.digest, 'sha256')

    def test_unknown_hash_is_an_error(self) -> None:
        with self.image() as image:
            with image.open() as file:
                file.read()
            self.assertRaises(
                exception.TransferFailed, image.digest, 'crc32')

    def test_mover_is_in_the_log_before_it_is_started(self) -> None:
        self.watch_flushes()
        real = self.command

        def command(python: str, *arguments: str) -> list[str]:
            self.journal.append('start')
            return real(python, *arguments)
        self.patch_name('nova_snapshot_ext.mover_stream.command', command)
        with self.image():
            [pending] = undo.read(self.log.path).pending.values()
        self.assertEqual(['flushed end_mover', 'start'], self.journal)
        self.assertEqual('end_mover', pending.step)
        [arguments] = self.started()
        self.assertIn(f'--token={pending.arguments["token"]}', arguments)

    def test_nothing_is_left(self) -> None:
        with self.image() as image:
            image.open().read(1)
        [token] = [word for word in self.started()[0]
                   if word.startswith('--token=')]
        self.assertEqual([], processes.having(token))
        self.assertEqual(0, self.log.pending)
        self.assertEqual(0, self.transfer.staging_bytes(12345))

    def have_mover_wait(self) -> None:
        """Have a mover that says its length, and no more."""
        self.patch_name('nova_snapshot_ext.mover_stream.command',
                        lambda python, *arguments: [
                            sys.executable, '-I', '-c',
                            'import sys, time;'
                            'print(\'{"length": 5}\', file=sys.stderr,'
                            ' flush=True); time.sleep(60)', *arguments])

    def test_mover_that_is_waited_for_ends_with_the_snapshot(self) -> None:
        self.have_mover_wait()
        request = self.request()
        with self.transfer.image(self.disk, request, self.log) as image:
            stream = image.open()
            timer = threading.Timer(
                0.2, request.cancellation.cancel,
                [exception.ImageGone('deleted')])
            timer.start()
            self.addCleanup(timer.join)
            self.assertRaises(
                exception.TransferFailed, stream.read)
        self.assertEqual(0, self.log.pending)

    def test_undo_ends_the_mover_of_a_dead_owner(self) -> None:
        self.have_mover_wait()
        with self.image() as image:
            [pending] = undo.read(self.log.path).pending.values()
            for _ in range(2):
                pending.run(undo.Surroundings(None, self.host))
            self.assertRaises(exception.TransferFailed, image.open)
