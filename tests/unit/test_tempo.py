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

from nova_snapshot_ext import tempo as tempos
from tests.unit import base

MIB = 1024 ** 2


class TestTempo(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.now = 100.0
        self.patch_name('nova_snapshot_ext.tempo.time.monotonic',
                        lambda: self.now)

    def read(self, tempo: tempos.Tempo, seconds: float,
             *lengths: int) -> float:
        """Read at once, as soon as that may be.

        :returns: for how long it had to wait
        """
        waited_s = tempo.wait_s()
        self.now += waited_s
        for length in lengths:
            tempo.sent(length)
        self.now += seconds
        tempo.answered()
        return waited_s

    def test_nothing_is_waited_for_at_first(self) -> None:
        for rest in 0, 0.99:
            self.assertEqual(0, self.read(tempos.Tempo(rest=rest), 1, MIB))

    def test_rest_is_in_proportion_to_the_reading(self) -> None:
        for rest, expected_s in ((0, 0), (0.5, 0.04), (0.8, 0.16)):
            tempo = tempos.Tempo(rest=rest)
            self.read(tempo, 0.04, *[MIB] * 8)
            self.assertAlmostEqual(expected_s, tempo.wait_s())

    def test_there_is_no_rest_before_all_is_answered(self) -> None:
        tempo = tempos.Tempo(rest=0.5)
        self.read(tempo, 0.1, *[MIB] * 8)
        tempo.sent(MIB)
        self.now += 1
        self.assertEqual(0, tempo.wait_s())
        tempo.answered()
        self.assertGreater(tempo.wait_s(), 0)

    def test_however_long_it_rests_something_is_read(self) -> None:
        # Large reads, and small ones of a disk in pieces.
        for length, count in ((MIB, 8), (64 * 1024, 8), (4096, 1)):
            tempo = tempos.Tempo(rest=0.99)
            bursts = 100
            began = self.now
            for _ in range(bursts):
                self.read(tempo, 0.1, *[length] * count)
            rested_s = self.now - began - bursts * 0.1
            self.assertGreater(rested_s, 0)
            self.assertLessEqual(
                rested_s, bursts * count * length / (8 * MIB))

    def test_time_without_rests_is_not_made_up_for(self) -> None:
        tempo = tempos.Tempo()
        for _ in range(100):
            tempo.sent(MIB)
            self.now += 1
        tempo.sent(MIB)
        self.now += 0.01
        tempo.rest = 0.5
        tempo.answered()
        self.assertAlmostEqual(0.01, tempo.wait_s())

    def test_bandwidth_that_was_not_used_is_not_made_up_for(self) -> None:
        tempo = tempos.Tempo(most=MIB)
        self.now += 100
        self.assertEqual(0, self.read(tempo, 0, MIB))
        self.assertAlmostEqual(1, self.read(tempo, 0, MIB, MIB))
        self.assertAlmostEqual(2, tempo.wait_s())
