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

"""Room is reserved ahead of the guest, and what that comes to in time."""

import errno
import os
import time

import fixtures
import libvirt

from nova_snapshot_ext import exception
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import scratch
from tests.unit import base
from tests.unit import doubles
from tests.unit import fakes

JOB = "<domainbackup><server socket='/ours'/></domainbackup>"
MIB = 1024 ** 2
CAPACITY = 10 * 1024 * MIB


class ScratchTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.domain.backup = JOB
        self.patch_name('nova_snapshot_ext.qemu_img.run',
                        doubles.QemuImg(self.journal).run)
        #: the room of the file system; None: it has no fallocate
        self.room: int | None = 1024 * MIB
        self.reserved = 0
        self.calls = 0
        #: what the file system says of room that is there
        self.broken = 0
        self.patch_name('nova_snapshot_ext.scratch._allocate', self.allocate)

    def allocate(self, descriptor: int, offset: int, length: int) -> None:
        if length == 1:
            if self.broken:
                raise OSError(self.broken, '')
            return
        self.calls += 1
        if self.room is None:
            raise OSError(errno.EOPNOTSUPP, '')
        self.assertEqual(self.reserved, offset)
        if offset + length > self.room:
            raise OSError(errno.EDQUOT, '')
        self.reserved = offset + length

    def files(self, capacity: int = CAPACITY) -> scratch.Files:
        made = scratch.made(self.staging, {'vda': capacity})
        files = made.__enter__()
        self.addCleanup(made.__exit__, None, None, None)
        self.journal.clear()
        return files

    def written(self, length: int) -> None:
        """The guest has overwritten so much."""
        os.truncate(os.path.join(self.staging, 'vda'), length)


class TestReserve(ScratchTestCase):

    def test_room_to_begin_with_is_there_before_the_job(self) -> None:
        self.files()
        self.assertEqual(scratch.least_bytes(CAPACITY), self.reserved)
        self.assertEqual(128 * MIB, self.reserved)

    def test_job_is_not_begun_without_it(self) -> None:
        self.room = 127 * MIB
        self.assertRaisesRegex(
            exception.FreezeFailed,
            f'{self.staging}/vda holds 0 bytes, and can not be given room '
            f'for {128 * MIB} more: Disk quota exceeded', self.files)

    def test_reserve_stays_ahead_of_the_guest(self) -> None:
        files = self.files()
        self.written(10 * MIB)
        files.reserve_ahead()
        self.assertEqual(160 * MIB, self.reserved)
        self.written(90 * MIB)
        files.reserve_ahead()
        self.assertEqual(250 * MIB, self.reserved)

    def test_reserve_is_not_made_up_in_small_change(self) -> None:
        files = self.files()
        self.calls = 0
        for size in range(1, 33):
            self.written(size * MIB)
            files.reserve_ahead()
        self.assertEqual(1, self.calls)
        self.assertEqual(160 * MIB, self.reserved)

    def test_reserve_is_twice_what_was_written_between_two_looks(
            self) -> None:
        files = self.files()
        self.written(100 * MIB)
        files.reserve_ahead()
        self.assertEqual(300 * MIB, self.reserved)
        self.written(101 * MIB)
        files.reserve_ahead()
        self.assertEqual(332 * MIB, self.reserved)

    def test_no_more_is_reserved_than_can_be_filled(self) -> None:
        most = scratch.most_bytes(200 * MIB)
        files = self.files(200 * MIB)
        self.room = most
        self.written(150 * MIB)
        files.reserve_ahead()
        self.assertEqual(most, self.reserved)
        self.assertLess(200 * MIB, most)
        # Now it has all it can ever need: nothing is left to fail.
        self.room = 0
        self.written(190 * MIB)
        files.reserve_ahead()

    def test_guest_that_writes_nothing_costs_nothing(self) -> None:
        files = self.files()
        self.calls = 0
        files.reserve_ahead()
        self.assertEqual(0, self.calls)

    def test_free_room_counts_where_none_can_be_reserved(self) -> None:
        self.room = None
        self.free = 128 * MIB
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: self.free)
        files = self.files()
        files.reserve_ahead()
        self.free -= 1
        error = self.assertRaises(OSError, files.reserve_ahead)
        self.assertIn('No space left on device', error.strerror)

    def test_file_system_that_takes_no_writes_is_found_without_any(
            self) -> None:
        self.patch_name('nova_snapshot_ext.scratch._CHECK_S', 0.0)
        files = self.files()
        for self.broken in errno.EROFS, errno.EIO:
            error = self.assertRaises(OSError, files.reserve_ahead)
            self.assertIn(f'{self.staging}/vda can not be written to any '
                          f'more', error.strerror)

    def test_file_system_without_room_takes_what_is_reserved(self) -> None:
        files = self.files()
        for self.broken in (errno.ENOSPC, errno.EDQUOT, errno.EOPNOTSUPP,
                            errno.EINTR):
            files.reserve_ahead()

    def test_files_are_closed_at_the_end(self) -> None:
        before = os.listdir('/proc/self/fd')
        with scratch.made(self.staging, {'vda': CAPACITY}):
            self.assertLess(len(before), len(os.listdir('/proc/self/fd')))
        self.assertEqual(before, os.listdir('/proc/self/fd'))


class TestAllocate(base.TestCase):

    def test_blocks_come_and_the_size_stays(self) -> None:
        path = self.new_file('scratch', b'data')
        with open(path, 'r+b') as file:
            for offset in 0, MIB:
                scratch._allocate(file.fileno(), offset, MIB)
        status = os.stat(path)
        self.assertEqual(4, status.st_size)
        self.assertLessEqual(2 * MIB, status.st_blocks * 512)

    def test_what_is_not_possible_is_an_error(self) -> None:
        path = self.new_file('scratch')
        with open(path, 'rb') as file:
            error = self.assertRaises(
                OSError, scratch._allocate, file.fileno(), 0, MIB)
        self.assertEqual(errno.EBADF, error.errno)


class TestWatch(ScratchTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.watch = scratch.Watch(self.guest, self.files(), '/ours')
        self.calls_of_state = 0
        self.domain.before['state'] = self.count

    def count(self) -> None:
        self.calls_of_state += 1

    def pause(self, reason: int) -> None:
        self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED, reason]

    def test_job_goes_on_while_there_is_room(self) -> None:
        self.written(10 * MIB)
        self.assertTrue(self.watch.look())
        self.assertIsNone(self.watch.why_lost())
        self.assertEqual([], self.journal)

    def test_job_is_ended_before_the_room_is(self) -> None:
        self.room = 137 * MIB
        self.written(10 * MIB)
        self.assertFalse(self.watch.look())
        self.assertEqual(['abortJob'], self.journal)
        self.assertIn('Disk quota exceeded', self.watch.why_lost() or '')

    def test_job_is_ended_when_the_scratch_is_read_only(self) -> None:
        self.patch_name('nova_snapshot_ext.scratch._CHECK_S', 0.0)
        self.broken = errno.EROFS
        self.assertFalse(self.watch.look())
        self.assertEqual(['abortJob'], self.journal)
        self.assertIn('Read-only file system', self.watch.why_lost() or '')

    def refuse_writes(self, error: int = errno.EROFS) -> None:
        real = os.pwrite

        def pwrite(descriptor: int, data: bytes, offset: int) -> int:
            if not data:
                raise OSError(error, '')
            return real(descriptor, data, offset)
        self.patch_name('os.pwrite', pwrite)

    def test_writes_that_are_refused_are_seen_between_two_looks(
            self) -> None:
        self.assertTrue(self.watch.glance())
        looked = self.calls_of_state
        for _ in range(3):
            self.assertTrue(self.watch.glance())
        # libvirt is not asked so often.
        self.assertEqual(looked, self.calls_of_state)
        self.refuse_writes()
        self.assertFalse(self.watch.glance())
        self.assertEqual(['abortJob'], self.journal)
        self.assertIn('vda can not be written to any more: Read-only file '
                      'system', self.watch.why_lost() or '')

    def test_writes_that_are_refused_for_now_end_nothing(self) -> None:
        self.refuse_writes(errno.EINTR)
        self.watch.glance()
        self.assertTrue(self.watch.glance())
        self.assertEqual([], self.journal)

    def test_job_that_can_not_be_ended_is_ended_later(self) -> None:
        self.watch.glance()
        self.refuse_writes()
        logged = self.useFixture(fixtures.FakeLogger())
        self.domain.errors['abortJob'] = fakes.libvirt_error(
            libvirt.VIR_ERR_NO_CONNECT)
        self.assertRaises(guests.LibvirtError, self.watch.glance)
        for _ in range(3):
            self.assertTrue(self.watch.glance())
        self.assertRaises(guests.LibvirtError, self.watch.look)
        self.domain.errors.clear()
        self.assertFalse(self.watch.look())
        self.assertEqual(3, len(self.journal.of('abortJob')))
        self.assertEqual(1, logged.output.count('is ended'))

    def test_job_is_not_begun_on_what_takes_no_writes(self) -> None:
        self.watch.check()
        self.refuse_writes()
        self.assertRaisesRegex(
            exception.FreezeFailed, 'can not be written to', self.watch.check)
        self.assertEqual([], self.journal)

    def test_guest_that_was_paused_by_it_is_resumed_without_the_job(
            self) -> None:
        self.pause(libvirt.VIR_DOMAIN_PAUSED_IOERROR)
        self.assertFalse(self.watch.look())
        self.assertEqual(['abortJob', 'resume'], self.journal)
        self.assertIn('paused by an I/O error', self.watch.why_lost() or '')

    def test_guest_that_was_paused_by_someone_is_not(self) -> None:
        self.pause(libvirt.VIR_DOMAIN_PAUSED_USER)
        self.assertTrue(self.watch.look())
        self.assertEqual([], self.journal)

    def test_job_of_another_is_left_alone(self) -> None:
        self.domain.backup = JOB.replace('/ours', '/theirs')
        self.pause(libvirt.VIR_DOMAIN_PAUSED_IOERROR)
        self.assertTrue(self.watch.look())
        self.room = 137 * MIB
        self.written(10 * MIB)
        self.assertFalse(self.watch.look())
        self.assertEqual([], self.journal)
        self.assertIsNotNone(self.watch.why_lost())

    def test_guest_that_was_paused_before_the_job_is_left_alone(
            self) -> None:
        self.domain.backup = None
        self.pause(libvirt.VIR_DOMAIN_PAUSED_IOERROR)
        self.assertTrue(self.watch.look())
        self.assertEqual([], self.journal)


class TestWatching(ScratchTestCase):

    def wait(self) -> None:
        time.sleep(5 * scratch.POLL_S)

    def test_libvirt_that_is_away_is_asked_again(self) -> None:
        self.domain.errors['state'] = fakes.libvirt_error(
            libvirt.VIR_ERR_NO_CONNECT)
        logged = self.useFixture(fixtures.FakeLogger())
        with scratch.watching(self.guest, self.files(),
                              '/ours') as watch:
            self.wait()
            self.domain.errors.clear()
            self.room = 0
            self.written(10 * MIB)
            self.wait()
            self.assertIsNotNone(watch.why_lost())
        self.assertEqual(1, logged.output.count('can not be looked after'))
        self.assertEqual(['abortJob'], self.journal.of('abort'))

    def test_guest_that_is_gone_needs_no_watch(self) -> None:
        self.domain.gone()
        logged = self.useFixture(fixtures.FakeLogger())
        with scratch.watching(self.guest, self.files(), '/ours'):
            self.wait()
        self.assertEqual('', logged.output)
