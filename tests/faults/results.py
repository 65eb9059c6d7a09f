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

"""What was tried, as it is kept in a file."""

import collections
import collections.abc
import dataclasses
import datetime
import json
import os
import pathlib
import random
import typing

from tests.faults import faults
from tests.faults import plan

Cell = tuple[plan.Scenario, plan.Moment, faults.Fault]


@dataclasses.dataclass
class Results:
    """Everything of one run, or of several that add up.

    :ivar steps: of each scenario, by its name
    :ivar seconds: that it took
    :ivar versions: of libvirt and QEMU
    """

    begun: str = dataclasses.field(default_factory=lambda: (
        datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')))
    steps: dict[str, list[plan.Moment]] = dataclasses.field(
        default_factory=dict)
    tries: list[plan.Try] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    versions: str = ''

    def least_tried(self, cells: collections.abc.Sequence[Cell],
                    chance: random.Random) -> list[Cell]:
        """Cells in the order in which they are to be tried.

        Those first that were tried least, and of these by chance, but so
        that ways and faults take turns: a few show something of everything.
        """
        tried = collections.Counter(each.cell for each in self.tries)
        shuffled = list(cells)
        chance.shuffle(shuffled)
        turns: collections.Counter[tuple[plan.Scenario, str]] = (
            collections.Counter())
        order: list[tuple[int, int, int]] = []
        for scenario, moment, fault in shuffled:
            turn = scenario, fault.name
            order.append((tried[scenario, moment.number, fault.name],
                          turns[turn], len(order)))
            turns[turn] += 1
        ranked = sorted(zip(order, shuffled), key=lambda each: each[0])
        return [cell for _, cell in ranked]

    def save(self, path: pathlib.Path) -> None:
        """Write all of it, whole or not at all."""
        new = path.with_name(f'{path.name}.new')
        new.write_text(json.dumps({
            'begun': self.begun,
            'seconds': round(self.seconds),
            'versions': self.versions,
            'steps': {name: [_flat(each) for each in found]
                      for name, found in self.steps.items()},
            'tries': [dataclasses.asdict(each) for each in self.tries],
        }, indent=1) + '\n')
        os.replace(new, path)


def _flat(moment: plan.Moment) -> dict[str, typing.Any]:
    return dataclasses.asdict(moment) | {
        'processes': sorted(moment.processes)}


def load(path: pathlib.Path) -> Results:
    """Read what :meth:`Results.save` wrote."""
    saved: dict[str, typing.Any] = json.loads(path.read_text())
    return Results(saved['begun'], {
        name: [plan.Moment(**each | {
            'processes': frozenset(each['processes'])}) for each in found]
        for name, found in saved['steps'].items()
    }, [
        plan.Try(**each | {
            'scenario': plan.Scenario(**each['scenario']),
            'harm': tuple(each['harm']), 'wrong': tuple(each['wrong'])})
        for each in saved['tries']], saved['seconds'], saved['versions'])


def joined(found: collections.abc.Sequence[Results]) -> Results:
    """What several runs have found that were made side by side."""
    steps: dict[str, list[plan.Moment]] = {}
    for each in found:
        steps.update(each.steps)
    return Results(
        min(each.begun for each in found), steps,
        [tried for each in found for tried in each.tries],
        max(each.seconds for each in found), found[0].versions)
