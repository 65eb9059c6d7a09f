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

"""Faults at steps of domain snapshots: taken, gone back to, deleted.

Usage: python -m tests.faults.rollbacks [--seed N] [--minutes M] [--way TEXT]
       [--fault TEXT] [--results FILE]

Whatever dies, the guest is at one of the two instants, and what is left of
its snapshots is whole. Printed is what came of each fault; a file gets it
beside what the other harness found.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import random
import sys
import time

import libvirt

from nova_snapshot_ext import guest as our_guests
from tests.faults import cli
from tests.faults import command
from tests.faults import faults
from tests.faults import harness
from tests.faults import plan
from tests.faults import results
from tests.functional import guests
from tests.functional import images

FAULTS = tuple(faults.BY_NAME[name] for name in (
    'command line killed', 'command line terminated',
    'command line and guard killed', 'guard killed', 'qemu-img killed',
    'libvirtd killed, restarted', 'libvirtd and command line killed',
    'QEMU killed', 'guest destroyed', 'host rebooted'))
# What may be off in the end, and is started then
_MAY_BE_OFF = ('QEMU killed', 'guest destroyed', 'host rebooted')
_CLEAN_TIMEOUT_S = 180.0


@dataclasses.dataclass(frozen=True)
class Way:
    """What is done, with which kind of snapshot.

    :ivar action: ``take``, ``revert`` or ``delete``
    """

    action: str
    external: bool
    memory: bool

    def __str__(self) -> str:
        return (f'{self.action}, {"external" if self.external else "internal"}'
                f', {"memory" if self.memory else "disk"}')

    @property
    def scenario(self) -> plan.Scenario:
        return plan.Scenario('domain', 'streamed',
                             'raw' if self.external else 'qcow2',
                             action=str(self))


WAYS = tuple(Way(action, external, memory)
             for action in ('revert', 'delete', 'take')
             for external in (False, True) for memory in (True, False))


class Trial(harness.Trial):
    """One of them that is held at a step, and what comes of a fault there."""

    def __init__(self, bench: harness.Bench, way: Way, seed: int) -> None:
        super().__init__(bench, way.scenario, seed)
        self.way = way

    # The command lines

    def _common(self) -> list[str]:
        return ['--connect', self.bench.libvirtd.uri, '--config-file',
                str(self.bench.configuration(self.scenario))]

    def _start(self, action: str, title: str) -> command.Command:
        uuid = self.subject.guest.uuid
        if action != 'take':
            return self.bench.runner.start(
                [*self._common(), action, uuid, title], {})
        return self.bench.runner.start(
            self.bench.arguments(self.scenario, title)
            + ['--external'] * self.way.external
            + ['--no-memory'] * (not self.way.memory), {})

    def _through(self, action: str, title: str) -> None:
        """Do it without a fault."""
        self.command = self._start(action, title)
        while self.command.step() is not None:
            self.command.go()
        if self.command.code:
            raise AssertionError(
                f'{action} of {title}: {self.bench.runner.said()}')

    @property
    def _title(self) -> str:
        return 'taken' if self.way.action == 'take' else 'then'

    def _prepare(self) -> None:
        if self.way.action != 'take':
            self._through('take', 'then')
            self.subject.guest.wait_writes_on(20)

    def moments(self) -> list[plan.Moment]:
        """Do it with no fault, and note each step."""
        self._prepare()
        found: list[plan.Moment] = []
        seen: collections.Counter[str] = collections.Counter()
        self.command = self._start(self.way.action, self._title)
        while (name := self.command.step()) is not None:
            found.append(plan.Moment(
                len(found) + 1, name, seen[name], self.subject.state(),
                frozenset(self.bench.processes().values())))
            seen[name] += 1
            self.command.go()
        if self.command.code:
            raise AssertionError(
                f'{self.way} failed without a fault: '
                f'{self.bench.runner.said()}')
        self._end()
        return found

    def tried(self, moment: plan.Moment, fault: faults.Fault) -> str | None:
        """Apply a fault at a step.

        :returns: what came of it, None if the step was not reached
        :raises AssertionError: if something does not hold
        """
        #: how it ended, by whom and in how many seconds it was undone, and
        #: whether what does not hold is the guest's harm
        self.ended, self.by, self.seconds = 'unknown', 'itself', 0.0
        self.is_harm = False
        self.moment = moment
        self._prepare()
        self.subject.guest.wait_writes_on()
        self._at = self.subject.guest.counter()
        if not self._reach(moment):
            self._end()
            return None
        fault.inject(self)
        self._let_end(fault)
        ended = time.monotonic()
        self.ended = harness._word(self.command.code)
        self.by = self._wait_done()
        self.seconds = round(time.monotonic() - ended, 2)
        if self._wrong:
            raise AssertionError(self._wrong)
        self.is_harm = True
        state = self._check_guest(fault)
        self.is_harm = False
        left = self._check_snapshots()
        self._end()
        return (f'{self.ended}, {state}, {left}, '
                f'by {self.by} in {self.seconds:.1f} s')

    def outcome(self, fault: faults.Fault, seed: int,
                error: Exception | None) -> plan.Try:
        """What came of it, as it is kept.

        :param error: what does not hold
        """
        wrong = () if error is None else (
            f'{type(error).__name__} {error}'.removeprefix(
                'AssertionError '),)
        return plan.Try(
            self.scenario, self.moment.number, self.moment.name, fault.name,
            seed, self.ended, self.by, 'as it was', self.seconds,
            wrong if self.is_harm else (), () if self.is_harm else wrong)

    def _reach(self, moment: plan.Moment) -> bool:
        seen: collections.Counter[str] = collections.Counter()
        self.command = self._start(self.way.action, self._title)
        while (name := self.command.step()) is not None:
            if (name, seen[name]) == (moment.name, moment.again):
                return True
            seen[name] += 1
            self.command.go()
        return False

    def _left(self) -> list[str]:
        """Without what is to stay."""
        return [each for each in self.bench.left()
                if 'domain-snapshots' not in each]

    def _wait_done(self) -> str:
        """:returns: who undid the last of it"""
        by = 'itself' if not self._left() else 'guard'
        deadline = time.monotonic() + _CLEAN_TIMEOUT_S
        while left := self._left():
            if time.monotonic() > deadline:
                raise AssertionError(f'left: {left}')
            if 'guard' not in self.bench.processes().values() and any(
                    each.endswith('.undo') for each in left):
                by = 'recovery'
                self.bench.recover(self.scenario)
            time.sleep(0.1)
        return by

    # What must hold

    def _images(self) -> list[images.Image]:
        domain = self.subject.guest.domain
        return [(disk.path, disk.format) for disk in
                our_guests.Guest(domain, self.bench.libvirtd.uri).disks()]

    def _check_guest(self, fault: faults.Fault) -> str:
        guest = self.subject.guest
        state = self.subject.wait_state(
            'running', 10 if fault.name in _MAY_BE_OFF else 60)
        if not guest.domain.isPersistent():
            raise AssertionError('it is not persistent')
        if guest.domain.snapshotNum(0):
            raise AssertionError('libvirt knows snapshots of it')
        if state == 'off' and fault.name in _MAY_BE_OFF:
            if not guest.domain.hasManagedSaveImage(0):
                # Nobody wrote to it since: all of one instant.
                images.check_point_in_time(self._images())
            self._forget_counter()
            guest.start()
        elif state != 'running':
            raise AssertionError(f'it is {state}')
        if guest.domain.hasManagedSaveImage(0):
            raise AssertionError('it runs and has a managed save')
        self._see_writing()
        guest.domain.suspend()
        try:
            images.check_point_in_time(self._images(), in_use=True)
        finally:
            guest.domain.resume()
        first = guest.console.first
        return f'{state}, first counter {first} ({self._at} before)'

    def _check_snapshots(self) -> str:
        """What is said to be there is there, and nothing else."""
        titles = [each['title'] for each in self._tree()]
        if self.way.action == 'revert' and titles != ['then']:
            raise AssertionError(f'it has {titles}')
        if self.way.action == 'take' and titles and not (
                self.bench.images / 'taken.qcow2').exists():
            raise AssertionError('a snapshot without its image')
        directory = self.subject.guest.directory
        overlays = [path.name for path in directory.iterdir()
                    if path.name.startswith('snapshot-ext-')]
        if self.way.external:
            wanted = len(titles) * (1 + self.way.memory)
            if len(overlays) != wanted:
                raise AssertionError(f'{titles} and {overlays}')
        else:
            found = json.loads(images.run(
                'qemu-img', 'info', '-U', '--output=json', '-f', 'qcow2',
                self.subject.disk.path)).get('snapshots', [])
            if len(found) != len(titles):
                raise AssertionError(f'{titles} and {found}')
        for path in self.bench.images.glob('*.qcow2'):
            images.qemu_img_check(path)
            images.check_point_in_time([(path, 'qcow2')])
        return f'{len(titles)} left'

    def _tree(self) -> list[dict[str, str]]:
        self.command = self.bench.runner.start(
            [*self._common(), 'tree', self.subject.guest.uuid, '--json'], {})
        while self.command.step() is not None:
            self.command.go()
        found: list[dict[str, str]] = json.loads(
            self.bench.runner.said())['snapshots']
        return found

    def _end(self) -> None:
        """Delete what is left; all is as before then."""
        code = self.command.code
        for each in self._tree():
            self._through('delete', each['name'])
        for path in self.bench.images.iterdir():
            path.unlink()
        if (left := self.bench.left()) or self._images() != [
                (str(self.subject.disk.path), self.subject.disk.format)]:
            raise AssertionError(f'not as before: {left} {self._images()}')
        guest = self.subject.guest
        guest.domain.suspend()
        wrong = list(self.subject.harm_to_disk())
        guest.domain.resume()
        if wrong:
            raise AssertionError(wrong)
        self._see_writing()
        self.command.code = code

    def _forget_counter(self) -> None:
        """It may count from an earlier instant on."""
        console = self.subject.guest.console
        with console.changed:
            console.counter = 0

    def _see_writing(self) -> None:
        self._forget_counter()
        self.subject.guest.wait_counter(1, guests.BOOT_TIMEOUT)
        self.subject.guest.wait_writes_on()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--minutes', type=float, default=10.0)
    parser.add_argument('--way', default='')
    parser.add_argument('--fault', default='')
    parser.add_argument('--results', type=pathlib.Path)
    return parser


def main() -> int:
    options = _parser().parse_args()
    chance = random.Random(options.seed)
    begun = time.monotonic()
    passed = failed = 0
    bench = harness.Bench()
    found_all = results.Results(versions=bench.versions())
    try:
        cells: list[results.Cell] = []
        ways = {way.scenario: way for way in WAYS}
        for way in WAYS:
            if options.way in str(way):
                moments = Trial(bench, way, 0).moments()
                found_all.steps[str(way.scenario)] = moments
                print(f'{way}: {len(moments)} steps', flush=True)
                cells += [(way.scenario, moment, fault) for moment in moments
                          for fault in FAULTS
                          if fault.applies(moment)
                          and options.fault in fault.name]
        for scenario, moment, fault in found_all.least_tried(cells, chance):
            way = ways[scenario]
            if time.monotonic() - begun > options.minutes * 60:
                break
            words = f'{way}: {moment}: {fault.name}'
            wrong: Exception | None = None
            trial: Trial | None = None
            try:
                trial = Trial(bench, way, 0)
                found = trial.tried(moment, fault)
            except (AssertionError, libvirt.libvirtError,
                    command.Stuck) as error:
                failed += 1
                wrong, found = error, f'WRONG {error}'
                bench.clear(way.scenario.guest)
            if found is None:
                continue
            passed += wrong is None
            print(f'{words}: {found}', flush=True)
            if trial is None:
                continue
            found_all.tries.append(trial.outcome(
                fault, options.seed, wrong))
            found_all.seconds = time.monotonic() - begun
            if options.results is not None:
                found_all.save(options.results)
        print(f'{passed + failed} of {len(cells)} tried')
    finally:
        bench.close()
    return cli.counted(passed, failed)


if __name__ == '__main__':
    sys.exit(main())
