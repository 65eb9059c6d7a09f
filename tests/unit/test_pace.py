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

from nova_snapshot_ext import exception
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import pace
from tests.unit import base


class TestRest(base.TestCase):

    def rest(self, waited_s: float, share: float = 0.8) -> float:
        return pace.rest(guests.IoTimes(5, 10.0),
                         guests.IoTimes(9, 10.0 + waited_s), 2.0, share)

    def test_guest_that_waits_has_its_share_of_the_time(self) -> None:
        # It may lose a fifth: who waits for longer could lose more.
        for waited_s in (0.4, 1.0, 2.0):
            self.assertAlmostEqual(0.8, self.rest(waited_s))
        self.assertAlmostEqual(0.5, self.rest(2.0, 0.5))

    def test_guest_that_waits_now_and_then_has_less(self) -> None:
        self.assertAlmostEqual(0.2, self.rest(0.1))
        self.assertAlmostEqual(0.4, self.rest(0.2))

    def test_guest_that_asks_for_nothing_costs_nothing(self) -> None:
        self.assertEqual(0, self.rest(0.0))

    def test_many_requests_at_a_time_are_no_longer_than_one(self) -> None:
        self.assertAlmostEqual(0.8, self.rest(64.0))

    def test_counters_of_a_guest_that_was_started_anew(self) -> None:
        self.assertEqual(0, self.rest(-10.0))


class TestKept(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.patch_name('nova_snapshot_ext.pace.POLL_S', 0.01)
        self.told: list[float] = []
        self.enough = threading.Event()

    def obey(self, rest: float) -> None:
        self.told.append(rest)
        if len(self.told) == 3 or not rest:
            self.enough.set()

    def test_rest_is_told_again_and_again(self) -> None:
        looks = []

        def io_times(target: str) -> guests.IoTimes:
            looks.append(target)
            return guests.IoTimes(len(looks), 1000.0 * len(looks))
        self.guest.io_times = io_times  # type: ignore[method-assign]
        with pace.kept(self.guest, 'vdb', 0.5, self.obey):
            self.assertTrue(self.enough.wait(10))
        self.assertEqual({0.5}, set(self.told))
        self.assertEqual({'vdb'}, set(looks))
        told = len(self.told)
        self.assertFalse(threading.Event().wait(0.05))
        self.assertEqual(told, len(self.told))

    def test_guest_is_looked_at_again_when_libvirt_is_back(self) -> None:
        looks = []

        def io_times(target: str) -> guests.IoTimes:
            looks.append(target)
            if len(looks) in (2, 3):
                raise exception.SnapshotError('libvirt is restarted')
            return guests.IoTimes(len(looks), 1000.0 * len(looks))
        self.guest.io_times = io_times  # type: ignore[method-assign]
        with pace.kept(self.guest, 'vda', 0.5, self.obey):
            self.assertTrue(self.enough.wait(10))
        self.assertEqual({0.5}, set(self.told))
        self.assertEqual(1, self.output.output.count('is restarted'))

    def test_guest_that_is_gone_is_not_spared(self) -> None:
        def gone(target: str) -> guests.IoTimes:
            raise exception.GuestGone('gone')
        self.guest.io_times = gone  # type: ignore[method-assign]
        with pace.kept(self.guest, 'vda', 0.8, self.obey):
            self.assertTrue(self.enough.wait(10))
        self.assertEqual([0.0], self.told)

    def test_guest_that_does_not_run_is_not_spared(self) -> None:
        self.guest.io_times = lambda target: None  # type: ignore
        with pace.kept(self.guest, 'vda', 0.8, self.obey):
            self.assertTrue(self.enough.wait(10))
        self.assertEqual({0.0}, set(self.told))

    def test_times_are_those_of_the_guests_own_requests(self) -> None:
        self.domain.blockStatsFlags = lambda target, flags: {
            'rd_operations': 1, 'wr_operations': 2, 'flush_operations': 4,
            'rd_total_times': 1000000000, 'wr_total_times': 500000000,
            'flush_total_times': 250000000, 'wr_bytes': 99, 'errs': -1}
        self.assertEqual(
            guests.IoTimes(7, 1.75), self.guest.io_times('vda'))
