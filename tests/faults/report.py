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

"""The tables of the documentation."""

import collections
import collections.abc
import pathlib
import re

from benchmarks import table
from tests.faults import faults
from tests.faults import known
from tests.faults import plan
from tests.faults import results

DIRECTORY = (pathlib.Path(__file__).parents[2]
             / 'doc' / 'source' / 'reference' / 'faults')
#: how a cell shows what became of the image
LETTERS = {'complete': 'c', 'none': 'n', 'queued': 'q', 'wrong': 'w',
           'as it was': 'a'}
#: marks a cell in which something did not hold
MARK = '!'
_FAILURES = ('Harmed', 'Harmed as documented', 'Fails')
_OF_ONE_TRY = ((r'instance-[0-9a-f]{8}', 'the guest'),
               (r'[0-9a-f]{8,}', 'N'), (r'\d+', 'N'))

Tries = collections.abc.Sequence[plan.Try]


def codes() -> dict[str, str]:
    """A short name of each fault, for the head of a column."""
    return {fault.name: f'F{number}'
            for number, fault in enumerate(faults.FAULTS, 1)}


def counted(words: collections.abc.Iterable[str]) -> str:
    """``12 done, 3 failed``: the most frequent first."""
    found = collections.Counter(words)
    return ', '.join(f'{count} {word}' for word, count in sorted(
        found.items(), key=lambda each: (-each[1], each[0])))


def cell(tries: Tries) -> str:
    """``2c1n``: how many tries, and what became of the image; ``!`` if
    something did not hold.
    """
    found = collections.Counter(LETTERS[each.image] for each in tries)
    return ''.join(f'{count}{letter}' for letter, count in sorted(
        found.items())) + MARK * any(not each.holds for each in tries)


def by_fault(found: results.Results) -> table.Table:
    rows = []
    for name, code in codes().items():
        tries = [each for each in found.tries if each.fault == name]
        if tries:
            slowest = max(each.seconds for each in tries)
            rows.append((
                code, name, str(len(tries)),
                counted(each.ended for each in tries),
                counted(each.by for each in tries),
                counted(each.image for each in tries), f'{slowest:.1f}',
                *_failures(tries)))
    return table.Table(
        'by-fault', f'{summary(found)}; begun {found.begun}, '
        f'{found.seconds / 60:.0f} minutes, {found.versions}',
        ('', 'Fault', 'Tries', 'The command line ended', 'Undone by', 'Image',
         's at most', *_FAILURES), rows)


def _scenarios(found: results.Results) -> list[plan.Scenario]:
    """Those that were tried: ways to take a snapshot, then all else."""
    tried = {each.scenario for each in found.tries}
    others = sorted(tried - set(plan.SCENARIOS), key=str)
    return [*(each for each in plan.SCENARIOS if each in tried), *others]


def by_way(found: results.Results) -> table.Table:
    rows = []
    for scenario in _scenarios(found):
        tries = [t for t in found.tries if t.scenario == scenario]
        rows.append((
            scenario.way, *(
                (scenario.transfer, scenario.service)
                if scenario.action == 'create' else ('', '')),
            str(len(found.steps[str(scenario)])),
            str(len({t.number for t in tries})), str(len(tries)),
            *_failures(tries)))
    return table.Table(
        'by-way', 'Faults by the way of the snapshot',
        ('Flow', 'Transfer', 'Image service', 'Steps', 'with a fault',
         'Tries', *_FAILURES), rows)


def by_step(found: results.Results, scenario: plan.Scenario) -> table.Table:
    """Step by fault, for one way to take a snapshot."""
    cells: dict[tuple[int, str], list[plan.Try]] = (
        collections.defaultdict(list))
    for each in found.tries:
        if each.scenario == scenario:
            cells[each.number, each.fault].append(each)
    used = [(name, code) for name, code in codes().items()
            if any(name == fault for _, fault in cells)]
    rows = [
        (str(moment), *(
            cell(tries) if (tries := cells.get((moment.number, name))) else ''
            for name, _ in used))
        for moment in found.steps[str(scenario)]]
    return table.Table(
        str(scenario).replace(', ', '-').replace(' ', '-'),
        str(scenario), ('Step', *(code for _, code in used)), rows)


def failing(found: results.Results) -> table.Table:
    """What did not hold, one row for each kind."""
    kinds: dict[tuple[str, str, str, str], list[plan.Try]] = (
        collections.defaultdict(list))
    for each in found.tries:
        for what in (*each.harm, *each.wrong):
            kinds[each.fault, each.scenario.way, _first(what),
                  known.why(each, what) or 'not known'].append(each)
    return table.Table(
        'failing', 'What did not hold',
        ('Fault', 'Flow', 'Tries', 'Steps', 'What was wrong', 'Why'),
        [(fault, way, str(len(tries)),
          ', '.join(sorted({each.step for each in tries})), what, why)
         for (fault, way, what, why), tries in sorted(kinds.items())])


def _first(words: str) -> str:
    """The first line of what was wrong, as literal text without what is of
    one try only.
    """
    line = words.strip().partition('\n')[0]
    for pattern, instead in _OF_ONE_TRY:
        line = re.sub(pattern, instead, line)
    line = line[:160]
    return f'``{line.replace("`", "")}``'


def summary(found: results.Results) -> str:
    tries = found.tries
    harmed, as_named, failing = _failures(tries)
    return (f'{len(tries)} faults, {harmed} guests harmed, {as_named} harmed '
            f'as documented, {failing} where something did not hold')


def _failures(tries: Tries) -> tuple[str, str, str]:
    """What is below _FAILURES."""
    return (str(sum(known.is_harmed(each) for each in tries)),
            str(sum(known.is_harmed_as_named(each) for each in tries)),
            str(sum(not each.holds for each in tries)))


def write(found: results.Results) -> None:
    """Write every table to where the documentation includes it from."""
    DIRECTORY.mkdir(exist_ok=True)
    for old in DIRECTORY.glob('*.inc'):
        old.unlink()
    for each in (by_fault(found), by_way(found)):
        (DIRECTORY / f'{each.name}.inc').write_text(each.rst())
    (DIRECTORY / 'failing.inc').write_text(
        failing(found).rst() if any(not each.holds for each in found.tries)
        else 'Nothing: every cell holds.\n')
    steps = [by_step(found, scenario).rst()
             for scenario in _scenarios(found)]
    (DIRECTORY / 'by-step.inc').write_text('\n'.join(steps))
