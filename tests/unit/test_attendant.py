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


import threading

import fixtures

from nova_snapshot_ext import attendant
from nova_snapshot_ext import cancellation
from nova_snapshot_ext import exception
from nova_snapshot_ext import progress
from tests.unit import base

SENT = progress.Phase('sent', 0, 100)


class AttendantTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.patch_name('nova_snapshot_ext.attendant._IMAGE_S', 0)
        self.patch_name('nova_snapshot_ext.attendant._REPORT_S', 0)
        self.meter = progress.Meter(lambda done, total: None)
        self.cancellation = cancellation.Cancellation()
        self.image_error: Exception | None = None
        self.report_error: Exception | None = None
        self.reports: list[int] = []
        self.asked = 0
        self.attendant = attendant.Attendant(
            'guest', self.meter, self.cancellation, self.check_image,
            self.report)

    def check_image(self) -> None:
        self.asked += 1
        if self.image_error is not None:
            raise self.image_error

    def report(self, percent: int) -> None:
        self.reports.append(percent)
        if self.report_error is not None:
            raise self.report_error


class TestLook(AttendantTestCase):

    def test_progress_is_reported(self) -> None:
        for done in (0, 40, 10):
            self.meter.phase(SENT)(done, 100)
            self.attendant.look()
        self.assertEqual([0, 40, 40], self.reports)

    def test_image_that_is_gone_ends_the_snapshot(self) -> None:
        self.image_error = exception.ImageGone('deleted')
        self.attendant.look()
        self.assertIs(self.image_error, self.cancellation.reason)

    def test_server_that_goes_ends_the_snapshot(self) -> None:
        self.report_error = exception.GuestGone('deleted')
        self.attendant.look()
        self.assertIs(self.report_error, self.cancellation.reason)

    def test_server_that_has_other_things_to_do_ends_the_snapshot(
            self) -> None:
        self.report_error = exception.Preempted('reset')
        self.attendant.look()
        self.assertIs(self.report_error, self.cancellation.reason)

    def test_anything_else_ends_nothing(self) -> None:
        for error in (exception.ImageRefused('403'),
                      exception.ImageServiceUnreachable('cut'),
                      TimeoutError('slow'), KeyError('status')):
            self.image_error = self.report_error = error
            self.attendant.look()
            self.assertIsNone(self.cancellation.reason)
        self.assertEqual(4, self.asked)
        self.assertEqual(4, len(self.reports))

    def test_trouble_is_said_once(self) -> None:
        self.image_error = exception.ImageServiceUnreachable('cut')
        self.attendant.look()
        self.attendant.look()
        self.assertEqual(1, self.output.output.count('cut'))
        self.image_error = None
        self.attendant.look()
        self.image_error = exception.ImageServiceUnreachable('cut')
        self.attendant.look()
        self.assertEqual(2, self.output.output.count('cut'))

    def test_what_is_waited_for_is_ended_until_nothing_waits(self) -> None:
        self.cancellation.cancel(exception.ImageGone('deleted'))
        with fixtures.MonkeyPatch(
                'nova_snapshot_ext.cancellation.Cancellation.interrupt',
                lambda cancelled: self.journal.append('interrupt')):
            self.attendant.look()
            self.attendant.look()
        self.assertEqual(['interrupt'] * 2, self.journal)
        self.assertEqual([], self.reports)

    def test_others_are_bothered_less_often_than_it_looks(self) -> None:
        now = 1000.0
        self.patch_name('nova_snapshot_ext.attendant.time.monotonic',
                        lambda: now)
        self.patch_name('nova_snapshot_ext.attendant._IMAGE_S', 6.0)
        self.patch_name('nova_snapshot_ext.attendant._REPORT_S', 4.0)
        asked = []
        for _ in range(7):
            self.attendant.look()
            asked.append((self.asked, len(self.reports)))
            now += 2.0
        self.assertEqual(
            [(1, 1), (1, 1), (1, 2), (2, 2), (2, 3), (2, 3), (3, 4)], asked)

    def test_line_is_logged_once_a_minute(self) -> None:
        now = 1000.0
        self.patch_name('nova_snapshot_ext.attendant.time.monotonic',
                        lambda: now)
        self.attendant = attendant.Attendant(
            'guest', self.meter, self.cancellation, self.check_image,
            self.report)
        for _ in range(90):
            self.meter.phase(SENT)(1024 ** 2, 2 * 1024 ** 2)
            self.attendant.look()
            now += 2.0
        lines = [line for line in self.output.output.splitlines()
                 if '1 of 2 MiB sent' in line]
        self.assertEqual(2, len(lines))
        self.assertIn('Snapshot of guest', lines[0])


class TestAttending(AttendantTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.patch_name('nova_snapshot_ext.attendant._LOOK_S', 0.01)
        self.reported = threading.Event()

    def report(self, percent: int) -> None:
        super().report(percent)
        if percent:
            self.reported.set()

    def test_it_looks_by_itself_and_ends_at_0(self) -> None:
        self.meter.phase(SENT)(40, 100)
        with attendant.attending(self.attendant):
            self.assertTrue(self.reported.wait(30))
        self.assertEqual((40, 0), (self.reports[-2], self.reports[-1]))

    def test_it_ends_at_0_after_an_error(self) -> None:
        self.report_error = OSError('no conductor')
        with self.assertRaisesRegex(exception.TransferFailed, 'broken'):
            with attendant.attending(self.attendant):
                raise exception.TransferFailed('broken')
        self.assertEqual(0, self.reports[-1])

    def test_end_that_can_not_be_reported_is_said_and_tried_again(
            self) -> None:
        self.report_error = OSError('no conductor')
        self.attendant.end()
        self.assertEqual([0, 0], self.reports)
        self.assertIn('The progress of guest was not taken back: no '
                      'conductor', self.output.output)

    def test_guest_that_is_gone_or_has_other_things_to_do_shows_nothing(
            self) -> None:
        for error in (exception.GuestGone('deleted'),
                      exception.Preempted('reset')):
            self.report_error = error
            self.reports.clear()
            self.attendant.end()
            self.assertEqual([0], self.reports)
        self.assertNotIn('not taken back', self.output.output)

    def test_report_that_hangs_does_not_hold_up_the_end(self) -> None:
        self.patch_name('nova_snapshot_ext.beside._END_TIMEOUT_S', 0.01)
        release = threading.Event()
        self.addCleanup(release.set)
        self.attendant._report = (  # type: ignore[method-assign]
            lambda percent: (self.reported.set(), release.wait(50)) and None)
        with attendant.attending(self.attendant):
            self.assertTrue(self.reported.wait(30))
        self.assertFalse(release.is_set())
