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

"""A whole run: which guest, who in turn, and what is kept of it."""

import collections.abc
import contextlib
import dataclasses
import pathlib
import time

from openstack import exceptions as sdk_exceptions

from benchmarks import cloud as clouds
from benchmarks import contestants
from benchmarks import errors
from benchmarks import freezing
from benchmarks import guests
from benchmarks import measuring
from benchmarks import memory
from benchmarks import piping
from benchmarks import progress
from benchmarks import results
from nova_snapshot_ext import exception

PARTS = ('snapshots', 'growth', 'freezes', 'pipes', 'memory')
#: who is measured over all sizes
GROWING = (contestants.NOVA_LIVE, contestants.FLOOR, contestants.FIRST,
           contestants.DEFAULT)


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What a run can be told."""

    rounds: int
    #: random data in the disk of the guest that all contestants have
    data_gib: float
    #: other guests, for growth
    growth_gib: tuple[float, ...]
    growth_rounds: int
    #: settings of guest_share beside the default one
    shares: tuple[int, ...]
    #: seconds in which a guest is watched alone before each snapshot
    idle_s: float
    drop_caches: bool
    #: of Glance: ``memory`` or ``disk``
    store: str
    #: names of contestants; all if empty
    only: tuple[str, ...]
    parts: tuple[str, ...]


class Run:
    """Takes all measurements, and saves each as soon as it is there."""

    def __init__(self, parameters: Parameters, taken: results.Results,
                 path: pathlib.Path) -> None:
        """:param taken: what an earlier run of the same file has already"""
        self._parameters = parameters
        self._results = taken
        self._path = path
        taken.skipped.clear()
        known = contestants.every(self._shares())
        self._contestants = contestants.chosen(
            known, parameters.only or [each.name for each in known])

    def _shares(self) -> tuple[int, ...]:
        if 'guest_share' in {name for name in freezing.settings()}:
            return self._parameters.shares
        if self._parameters.shares:
            self._skip('guest_share: this version has no such option')
        return ()

    def take(self, cloud: clouds.Cloud) -> None:
        parts = self._parameters.parts
        if 'memory' in parts and not self._results.memory:
            self._take_memory()
        if set(parts) == {'memory'}:
            return
        with cloud.ours(self._parameters.store == 'memory'):
            guests.upload_image(cloud)
            with guests.practising(cloud):
                self._take_main(cloud)
                if 'growth' in parts:
                    for data_gib in self._parameters.growth_gib:
                        self._take_growth(cloud, data_gib)

    def _take_main(self, cloud: clouds.Cloud) -> None:
        parameters = self._parameters
        with guests.writing(cloud, parameters.data_gib) as guest:
            if 'snapshots' in parameters.parts:
                self._take_rounds(cloud, guest, self._contestants,
                                  parameters.rounds)
            self._take_freezes(cloud, guest)
            if 'pipes' in parameters.parts and not self._results.pipes:
                with self._going_on('pipes'):
                    self._results.pipes += piping.measure(
                        cloud, guest, parameters.rounds,
                        parameters.drop_caches)

    def _take_growth(self, cloud: clouds.Cloud, data_gib: float) -> None:
        with guests.writing(cloud, data_gib) as guest:
            self._take_rounds(
                cloud, guest,
                [each for each in self._contestants if each.name in GROWING],
                self._parameters.growth_rounds)
            self._take_freezes(cloud, guest)

    def _take_rounds(
            self, cloud: clouds.Cloud, guest: guests.Guest,
            names: collections.abc.Sequence[contestants.Contestant],
            rounds: int) -> None:
        for number in range(1, rounds + 1):
            began = time.monotonic()
            for each in contestants.round_of(names, number):
                if self._results.has(each.name, guest.data_gib, number):
                    continue
                with self._going_on(f'{each.name}, round {number}'):
                    self._results.snapshots.append(measuring.measure(
                        cloud, guest, each, number,
                        idle_s=self._parameters.idle_s,
                        drop_caches=self._parameters.drop_caches))
            minutes = (time.monotonic() - began) / 60
            progress.say(f'round {number} took {minutes:.1f} minutes; '
                         f'{rounds - number} more with {guest.data_gib:g} '
                         f'GiB')

    def _take_freezes(self, cloud: clouds.Cloud, guest: guests.Guest,
                      ) -> None:
        if 'freezes' not in self._parameters.parts:
            return
        done = sum(each.data_gib == guest.data_gib
                   for each in self._results.freezes)
        for _ in range(done, self._parameters.rounds):
            with self._going_on('freezes'):
                frozen = freezing.measure(cloud, guest)
                self._results.freezes.append(frozen)
                progress.say(
                    f'{guest.data_gib:g} GiB frozen by backup: '
                    f'{1000 * frozen.pause_s:.0f} ms, guest silent for '
                    f'{1000 * frozen.silence_s:.0f} ms')

    def _take_memory(self) -> None:
        why = memory.why_not()
        if why is not None:
            self._skip(f'memory: {why}')
            return
        with self._going_on('memory'):
            self._results.memory.append(memory.measure())

    @contextlib.contextmanager
    def _going_on(self, what: str) -> collections.abc.Iterator[None]:
        """Save what was measured; without it, go on with the rest."""
        try:
            yield
        except (errors.BenchmarkError, exception.SnapshotError,
                sdk_exceptions.SDKException) as error:
            self._skip(f'{what}: {error}')
        finally:
            self._results.save(self._path)

    def _skip(self, what: str) -> None:
        progress.say(f'not measured: {what}')
        self._results.skipped.append(what)
