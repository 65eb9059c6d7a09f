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

import fcntl
import os
import threading

import fixtures

from nova_snapshot_ext import exception
from nova_snapshot_ext import in_flight
from tests.unit import base

SNAPSHOT = in_flight.Snapshot(
    'image-1', 'server-1', 'project', 'user', 'req-1', 'image_snapshot')


class TestRecord(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.patch_name('threading.Timer.start', lambda timer: None)

    def begin(self) -> in_flight.Record:
        record = in_flight.Record.begin(self.state, SNAPSHOT)
        self.addCleanup(record.close)
        return record

    def test_process_that_ends_leaves_it_to_the_next(self) -> None:
        def end() -> None:
            with self.begin():
                raise SystemExit
        self.assertRaises(SystemExit, end)
        self.assertEqual(1, len(in_flight.left_in(self.state)))

    def test_it_is_there_as_long_as_the_snapshot(self) -> None:
        with self.begin() as record:
            self.assertEqual([record.path], in_flight.left_in(self.state))
        self.assertEqual([], in_flight.left_in(self.state))

    def fail(self) -> in_flight.Record:
        record = self.begin()
        record.announce(7)
        error = exception.FreezeFailed('no socket')
        record.__exit__(type(error), error, None)
        return record

    def test_it_stays_until_nova_has_deleted_the_image(self) -> None:
        timers: list[threading.Timer] = []
        self.patch_name('threading.Timer.start',
                        lambda timer: timers.append(timer))
        record = self.fail()
        # It is this process's meanwhile.
        self.assertRaises(exception.GuestBusy, in_flight.Record.adopt,
                          record.path)
        [timer] = timers
        self.assertLessEqual(60, timer.interval)
        # The process need not wait for it.
        self.assertTrue(timer.daemon)
        timer.function()
        self.assertEqual([], os.listdir(self.state))

    def test_process_that_dies_before_leaves_it_to_the_next(self) -> None:
        record = self.fail()
        record.close()
        adopted = in_flight.Record.adopt(record.path)
        assert adopted is not None
        self.addCleanup(adopted.close)
        self.assertEqual(([7], 'no socket'),
                         (adopted.announced, adopted.failure))

    def test_same_image_may_be_tried_once_more(self) -> None:
        failed = self.fail()
        again = self.begin()
        failed.forget()
        self.assertTrue(os.path.exists(again.path))

    def test_it_stays_where_there_is_no_room_for_the_reason(self) -> None:
        def full(*arguments: object) -> None:
            raise OSError('No space left on device')
        record = self.begin()
        with fixtures.MonkeyPatch('nova_snapshot_ext.undo.append', full):
            error = exception.FreezeFailed('no socket')
            record.__exit__(type(error), error, None)
        record.close()
        adopted = in_flight.Record.adopt(record.path)
        assert adopted is not None
        self.addCleanup(adopted.close)
        self.assertIsNone(adopted.failure)

    def test_snapshot_does_not_fail_because_it_stays(self) -> None:
        def refuse(path: str) -> None:
            raise OSError('read-only')
        with fixtures.MonkeyPatch('os.unlink', refuse), self.begin():
            pass
        self.assertIn('could not be deleted', self.output.output)
        adopted = in_flight.Record.adopt(in_flight.left_in(self.state)[0])
        assert adopted is not None
        adopted.forget()

    def test_what_a_dead_process_left_can_be_read(self) -> None:
        with self.begin() as record:
            record.announce(10)
            record.announce(20)
            record.close()
            adopted = in_flight.Record.adopt(record.path)
            assert adopted is not None
            self.assertEqual((SNAPSHOT, [10, 20]),
                             (adopted.snapshot, adopted.announced))
            adopted.close()

    def test_images_of_further_disks_are_named(self) -> None:
        record = self.begin()
        record.begin_further('image-2')
        record.begin_further('image-3')
        record.announce(10)
        record.end_further('image-2')
        record.end_further('image-2')
        record.close()
        adopted = in_flight.Record.adopt(record.path)
        assert adopted is not None
        self.addCleanup(adopted.close)
        self.assertEqual((['image-3'], [10]),
                         (adopted.further, adopted.announced))
        self.assertEqual((False, True), (record.adopted, adopted.adopted))

    def fail_with(self, *further: str) -> tuple[
            in_flight.Record, list[in_flight.Record], threading.Timer]:
        """:returns: what failed, what was given to be settled, its timer"""
        timers: list[threading.Timer] = []
        self.patch_name('threading.Timer.start',
                        lambda timer: timers.append(timer))
        given: list[in_flight.Record] = []
        record = in_flight.Record.begin(self.state, SNAPSHOT, given.append)
        self.addCleanup(record.close)
        for image_id in further:
            record.begin_further(image_id)
        error = exception.FreezeFailed('no socket')
        record.__exit__(type(error), error, None)
        return record, given, timers[0]

    def test_what_nova_does_not_delete_is_given_to_be_settled(self) -> None:
        record, given, timer = self.fail_with('image-2')
        timer.function()
        self.assertEqual([record], given)
        self.assertEqual('no socket', record.failure)
        # Until that is done it is on disk.
        self.assertEqual([record.path], in_flight.left_in(self.state))

    def test_what_is_gone_by_then_is_not(self) -> None:
        record, given, timer = self.fail_with('image-2')
        record.end_further('image-2')
        timer.function()
        self.assertEqual(([], []), (given, in_flight.left_in(self.state)))

    def test_snapshot_that_went_well_leaves_none(self) -> None:
        with self.begin() as record:
            record.begin_further('image-2')
        self.assertEqual([], in_flight.left_in(self.state))

    def test_it_is_flushed_before_it_counts(self) -> None:
        flushed: list[str] = []
        real = os.fsync

        def fsync(descriptor: int) -> None:
            real(descriptor)
            flushed.append(os.readlink(f'/proc/self/fd/{descriptor}'))
        self.patch_name('os.fsync', fsync)
        record = self.begin()
        self.assertEqual([record.path, self.state], flushed)
        record.announce(1)
        self.assertEqual([record.path, self.state, record.path], flushed)
        record.begin_further('image-2')
        self.assertEqual(4, len(flushed))

    def test_line_that_was_cut_off_spoils_no_later_one(self) -> None:
        record = self.begin()
        record.begin_further('image-2')
        record.close()
        with open(record.path, 'a') as file:
            file.write('{"announced": 12')
        for further in ['image-2'], []:
            adopted = in_flight.Record.adopt(record.path)
            assert adopted is not None
            self.assertEqual(further, adopted.further)
            adopted.end_further('image-2')
            adopted.close()

    def test_that_of_a_living_process_is_not_adopted(self) -> None:
        record = self.begin()
        self.assertRaises(exception.GuestBusy, in_flight.Record.adopt,
                          record.path)
        self.assertRaises(exception.GuestBusy, in_flight.Record.begin,
                          self.state, SNAPSHOT)

    def test_children_do_not_hold_it(self) -> None:
        record = self.begin()
        self.assertTrue(fcntl.fcntl(record._descriptor, fcntl.F_GETFD)
                        & fcntl.FD_CLOEXEC)

    def test_cut_at_any_byte_it_is_whole_or_had_not_begun(self) -> None:
        record = self.begin()
        record.announce(1234)
        record.close()
        with open(record.path, 'rb') as file:
            content = file.read()
        head = content.index(b'\n') + 1
        for length in range(len(content) + 1):
            with open(record.path, 'wb') as file:
                file.write(content[:length])
            adopted = in_flight.Record.adopt(record.path)
            self.assertEqual(length >= head, adopted is not None, length)
            self.assertEqual(length >= head, os.path.exists(record.path))
            if adopted is not None:
                self.assertEqual(SNAPSHOT, adopted.snapshot)
                self.assertEqual(
                    [1234] * (length == len(content)), adopted.announced)
                adopted.forget()

    def test_what_makes_no_sense_is_said_and_kept(self) -> None:
        path = os.path.join(self.state, f'a{in_flight.SUFFIX}')
        for content in (b'\xff\n', b'{\n', b'[]\n', b'3\n', b'{}\n',
                        b'{"in_flight": 2}\n',
                        b'{"in_flight": 1, "more": 1}\n',
                        b'{"in_flight": 1}\n3\n'):
            with open(path, 'wb') as file:
                file.write(content)
            self.assertRaises(ValueError, in_flight.Record.adopt, path)
            with open(path, 'rb') as file:
                self.assertEqual(content, file.read())

    def test_there_may_be_none(self) -> None:
        self.assertEqual([], in_flight.left_in('/none'))
