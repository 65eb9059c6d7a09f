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

"""What is tried: which snapshot of which guest, at which step, which fault."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One way to take a snapshot, or what else is done with one.

    :ivar flow: its name
    :ivar guest: of which guest: a key of :data:`subjects.KINDS`
    :ivar service: ``directory`` or ``glance``
    :ivar action: ``create``, or in words what else is done
    """

    flow: str
    transfer: str
    guest: str
    service: str = 'directory'
    action: str = 'create'

    @property
    def way(self) -> str:
        """The flow, and what of it this guest takes."""
        if self.action != 'create':
            return f'{self.flow}, {self.action}'
        more = {('cold', 'raw'): 'backup job', ('cold', 'off'): 'guest off',
                ('domain', 'agent'): 'disks alone'}.get(
                    (self.flow, self.guest))
        return self.flow if more is None else f'{self.flow}, {more}'

    def __str__(self) -> str:
        if self.action != 'create':
            return self.way
        return f'{self.way}, {self.transfer}, {self.service}'


SCENARIOS = tuple(
    Scenario(flow, transfer, guest, service)
    for service in ('directory', 'glance')
    for flow, guest in (('backup', 'agent'), ('live', 'agent'),
                        ('cold', 'qcow2'), ('cold', 'raw'), ('cold', 'off'),
                        ('domain', 'qcow2'), ('domain', 'agent'))
    for transfer in ('streamed', 'staged')
    # Glance sees no difference between these and the first.
    if not (service == 'glance' and (
        guest in ('raw', 'off') or flow == 'domain' and guest == 'agent')))


@dataclasses.dataclass(frozen=True)
class Moment:
    """A step, and what is there when the command line is held at it.

    :ivar number: from 1
    :ivar again: how often a step of that name came before
    :ivar state: of the guest: ``running``, ``paused``, ``off``
    :ivar processes: what kinds of process there are
    """

    number: int
    name: str
    again: int
    state: str
    processes: frozenset[str]

    def __str__(self) -> str:
        return f'{self.number} {self.name}'


@dataclasses.dataclass(frozen=True)
class Try:
    """One fault at one step, and what came of it.

    :ivar ended: how the command line did: its exit code as words
    :ivar by: who undid the rest: ``itself``, ``guard``, ``recovery``
    :ivar image: ``complete``, ``none``, ``queued``; ``as it was`` where none
        was to be made
    :ivar seconds: from the end of the command line until all was undone
    :ivar harm: what is wrong with the guest
    :ivar wrong: what else is not as it has to be
    """

    scenario: Scenario
    number: int
    step: str
    fault: str
    seed: int
    ended: str
    by: str
    image: str
    seconds: float
    harm: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()

    @property
    def cell(self) -> tuple[Scenario, int, str]:
        return self.scenario, self.number, self.fault

    @property
    def holds(self) -> bool:
        return not self.harm and not self.wrong
