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


from nova_snapshot_ext import progress
from nova_snapshot_ext import request as requests
from tests.unit import base

MIB = 1024 ** 2
MADE = progress.Phase('made', 0, 50)
SENT = progress.Phase('sent', 50, 100)


class ProgressTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.told: list[tuple[int, int]] = []
        self.meter = progress.Meter(lambda *told: self.told.append(told))
        self.now = 100.0
        self.patch_name('nova_snapshot_ext.progress.time.monotonic',
                        lambda: self.now)


class TestPercent(ProgressTestCase):

    def percents(self, tell: requests.Progress, total: int,
                 *dones: int) -> list[int]:
        found = []
        for done in dones:
            tell(done, total)
            found.append(self.meter.percent)
        return found

    def test_one_phase_is_the_whole_way(self) -> None:
        tell = self.meter.phase(progress.Phase('sent', 0, 100))
        self.assertEqual(0, self.meter.percent)
        self.assertEqual(
            [0, 10, 99, 100], self.percents(tell, 1000, 0, 100, 999, 1000))

    def test_phases_follow_each_other(self) -> None:
        self.assertEqual([25, 50], self.percents(
            self.meter.phase(MADE), 10, 5, 10))
        self.assertEqual([50, 75, 100], self.percents(
            self.meter.phase(SENT), 10, 0, 5, 10))

    def test_upload_that_begins_again_does_not_go_back(self) -> None:
        tell = self.meter.phase(SENT)
        self.assertEqual([90, 90, 90, 95], self.percents(
            tell, 10, 8, 0, 3, 9))

    def test_flow_that_begins_anew_does_not_go_back(self) -> None:
        self.percents(self.meter.phase(SENT), 10, 5)
        self.assertEqual([75], self.percents(
            self.meter.phase(MADE), 10, 10))

    def test_total_may_be_wrong(self) -> None:
        tell = self.meter.phase(MADE)
        self.assertEqual([50], self.percents(tell, 10, 12))
        self.assertEqual([50], self.percents(tell, 0, 0))

    def test_listener_is_told_all_of_it(self) -> None:
        self.percents(self.meter.phase(SENT), 10, 1, 5)
        self.assertEqual([(1, 10), (5, 10)], self.told)


class TestLine(ProgressTestCase):

    def tell(self, seconds: float, mib: int,
             phase: progress.Phase = SENT) -> None:
        self.now += seconds
        self.meter.phase(phase)(mib * MIB, 1000 * MIB)

    def test_there_is_none_before_the_first_byte(self) -> None:
        self.assertIsNone(self.meter.line())

    def test_bytes_rate_and_time_left(self) -> None:
        self.tell(0, 0)
        self.tell(60, 600)
        self.assertEqual('600 of 1000 MiB sent, 10.0 MiB/s, about 40 s left',
                         self.meter.line())

    def test_rate_is_that_since_the_last_line(self) -> None:
        self.tell(0, 0)
        self.tell(60, 600)
        self.meter.line()
        self.tell(60, 660)
        self.assertEqual('660 of 1000 MiB sent, 1.0 MiB/s, about 340 s left',
                         self.meter.line())

    def test_upload_that_began_again_has_a_rate_of_its_own(self) -> None:
        self.tell(0, 0)
        self.tell(60, 600)
        self.meter.line()
        self.tell(10, 0)
        self.tell(50, 100)
        self.assertEqual('100 of 1000 MiB sent, 2.0 MiB/s, about 450 s left',
                         self.meter.line())

    def test_next_phase_has_a_rate_of_its_own(self) -> None:
        self.tell(0, 0, MADE)
        self.tell(60, 100, MADE)
        self.assertIn('MiB made', self.meter.line() or '')
        self.tell(0, 200)
        self.tell(60, 1000)
        self.assertIn('16.7 MiB/s, about 0 s left', self.meter.line() or '')

    def test_stand_still(self) -> None:
        self.tell(0, 0)
        self.tell(60, 600)
        self.meter.line()
        self.now += 60
        self.assertEqual('600 of 1000 MiB sent, 0.0 MiB/s, nothing moves',
                         self.meter.line())


class TestTogether(ProgressTestCase):

    def test_all_bytes_count(self) -> None:
        together = progress.Together(
            lambda *told: self.told.append(told), [100, 50])
        first, second = together.part(0), together.part(1)
        first(0, 80)
        first(80, 80)
        second(10, 20)
        second(20, 20)
        self.assertEqual([(0, 130), (80, 130), (90, 100), (100, 100)],
                         self.told)

    def test_one_that_begins_again(self) -> None:
        together = progress.Together(
            lambda *told: self.told.append(told), [10, 10])
        together.part(1)(10, 10)
        together.part(0)(5, 10)
        together.part(0)(0, 10)
        self.assertEqual([(10, 20), (15, 20), (10, 20)], self.told)
