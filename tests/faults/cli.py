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

"""Try faults, and write the tables of the documentation."""

import argparse
import collections.abc
import pathlib
import random
import sys
import time

import libvirt

from tests.faults import command
from tests.faults import faults
from tests.faults import harness
from tests.faults import known
from tests.faults import mutants
from tests.faults import plan
from tests.faults import report
from tests.faults import results

# Steps that were not reached, one after the other
_MISSED_AT_MOST = 5
RESULTS = pathlib.Path(__file__).with_name('results.json')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m tests.faults', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    run = commands.add_parser(
        'run', help='apply faults, those first that were tried least')
    run.add_argument('--seed', type=int, default=1,
                     help='of what is chosen (default: %(default)s)')
    run.add_argument('--minutes', type=float,
                     help='end after so long (default: when each was tried)')
    run.add_argument('--sample', type=int, metavar='N',
                     help='so many, spread over all ways and faults')
    run.add_argument('--flow', action='append',
                     help='these flows only')
    run.add_argument('--fault', action='append',
                     help='faults only whose names contain this')
    run.add_argument('--step', action='append',
                     help='steps only whose names contain this')
    run.add_argument('--service', help='this image service only')
    run.add_argument('--transfer', help='this transfer only')
    run.add_argument('--results', type=pathlib.Path,
                     help='add to this file')
    mutate = commands.add_parser(
        'mutate', help='take out each undo, and see that it is missed')
    mutate.add_argument('undo', nargs='*',
                        help='these only (default: all that there are)')
    join = commands.add_parser(
        'join', help='put what runs side by side have found into one file')
    join.add_argument('found', nargs='+', type=pathlib.Path)
    join.add_argument('--results', type=pathlib.Path, default=RESULTS)
    show = commands.add_parser(
        'report', help='write the tables of the documentation')
    show.add_argument('--results', type=pathlib.Path, default=RESULTS)
    return parser


def main() -> int:
    options = _parser().parse_args()
    if options.command == 'report':
        found = results.load(options.results)
        report.write(found)
        print(report.summary(found))
        return 0
    if options.command == 'join':
        found = results.joined([results.load(each)
                                for each in options.found])
        found.save(options.results)
        print(report.summary(found))
        return 0
    bench = harness.Bench()
    try:
        if options.command == 'mutate':
            return _mutate(bench, options.undo)
        return _run(bench, options)
    finally:
        bench.close()


def counted(passed: int, failed: int) -> int:
    """Say it as stestr does, for whoever counts tests.

    :returns: the exit code: a run that tried nothing fails
    """
    print(f' - Passed: {passed}\n - Failed: {failed}', flush=True)
    return int(failed > 0 or not passed)


def _run(bench: harness.Bench, options: argparse.Namespace) -> int:
    chance = random.Random(options.seed)
    found = results.Results()
    if options.results is not None and options.results.exists():
        found = results.load(options.results)
    found.versions = bench.versions()
    before, took = len(found.tries), found.seconds
    begun = time.monotonic()
    missed = 0
    cells = _cells(bench, options, found, chance)
    for number, cell in enumerate(cells, 1):
        if options.minutes and (
                time.monotonic() - begun > options.minutes * 60):
            print(f'the time is over: {len(cells) - number + 1} are not '
                  f'tried', flush=True)
            break
        tried = _attempt(bench, *cell, chance.randrange(2 ** 31))
        missed = 0 if tried is not None else missed + 1
        if missed > _MISSED_AT_MOST:
            raise SystemExit('no step is reached any more')
        if tried is None:
            print(f'{number}: not reached: {cell[0]}, {cell[1]}',
                  flush=True)
            continue
        print(f'{number} {time.monotonic() - begun:.0f}s '
              f'{_line(tried)}', flush=True)
        found.tries.append(tried)
        found.seconds = took + time.monotonic() - begun
        if options.results is not None:
            found.save(options.results)
    new = found.tries[before:]
    print(report.summary(found))
    failed = sum(not known.is_known(each) for each in new)
    return counted(len(new) - failed, failed)


def _cells(bench: harness.Bench, options: argparse.Namespace,
           found: results.Results,
           chance: random.Random) -> list[results.Cell]:
    """What is to be tried, in that order."""
    moments = {}
    for scenario in plan.SCENARIOS:
        if _wanted(options, scenario):
            moments[scenario] = _steps(bench, scenario, found)
    cells = [cell for cell in harness.applicable(
        moments, lambda scenario, fault: not options.fault or any(
            part in fault for part in options.fault))
        if not options.step or any(
            part in cell[1].name for part in options.step)]
    cells = found.least_tried(cells, chance)
    if options.sample:
        cells = cells[:options.sample]
    print(f'{len(cells)} faults', flush=True)
    return cells


def _steps(bench: harness.Bench, scenario: plan.Scenario,
           found: results.Results) -> list[plan.Moment]:
    name = str(scenario)
    if name not in found.steps:
        found.steps[name] = harness.Trial(bench, scenario, 0).walk()
        print(f'{name}: {len(found.steps[name])} steps', flush=True)
    return found.steps[name]


def _attempt(bench: harness.Bench, scenario: plan.Scenario,
             moment: plan.Moment, fault: faults.Fault,
             seed: int) -> plan.Try | None:
    """:returns: what came of it, None if the step was not reached"""
    try:
        tried = harness.Trial(bench, scenario, seed).attempt(moment, fault)
    except (AssertionError, command.Stuck, libvirt.libvirtError,
            OSError) as error:
        # What can't be looked at does not hold; the others are tried.
        tried = plan.Try(
            scenario, moment.number, moment.name, fault.name, seed,
            'unknown', 'itself', 'none', 0.0, (),
            (f'it can not be looked at: {type(error).__name__} {error}',))
    if tried is not None and not tried.holds:
        bench.clear(scenario.guest)
    return tried


def _wanted(options: argparse.Namespace, scenario: plan.Scenario) -> bool:
    return ((not options.flow or scenario.flow in options.flow)
            and options.service in (None, scenario.service)
            and options.transfer in (None, scenario.transfer))


def _line(tried: plan.Try) -> str:
    words = (f'{tried.scenario}: {tried.number} {tried.step}: {tried.fault}: '
             f'{tried.ended}, undone by {tried.by} in {tried.seconds} s, '
             f'image {tried.image}')
    for name, found in (('GUEST', tried.harm), ('WRONG', tried.wrong)):
        for each in found:
            why = known.why(tried, each)
            words += f'\n    {name}: {each}' + (f' ({why})' if why else '')
    return words


def _mutate(bench: harness.Bench,
            names: collections.abc.Collection[str]) -> int:
    found = []
    for name in sorted(names or mutants.undos()):
        found.append(mutants.find(bench, name))
        print(f'{name}: {"missed" if found[-1].is_missed else "NOT missed"}',
              flush=True)
    print(mutants.shown(found).text())
    failed = sum(not each.is_missed for each in found)
    return counted(len(found) - failed, failed)


if __name__ == '__main__':
    sys.exit(main())
