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

"""Who competes: what takes a snapshot, and with which settings."""

import collections.abc
import dataclasses

FLOWS = ('backup', 'live', 'cold')
TRANSFERS = ('streamed', 'staged')

FLOOR = 'floor'
NOVA_LIVE = 'nova-live'
NOVA_COLD = 'nova-cold'
#: what serves where nobody chooses
DEFAULT = 'backup-streamed'
#: the snapshot comes first
FIRST = 'backup-streamed-share-0'


@dataclasses.dataclass(frozen=True)
class Setup:
    """How nova-compute is set up; to change it takes a restart."""

    #: ``ours`` or ``nova``, as tools/cloud calls them
    driver: str
    #: ``section.option=value``
    settings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to get a guest's disk into Glance."""

    name: str
    #: as people call it
    label: str
    #: None if nova-compute does not take part
    setup: Setup | None
    #: what the image property ``snapshot_flow`` asks for
    flow: str | None = None
    #: what must have served, or it was not this contestant
    transfer: str | None = None


def _ours(transfer: str, *more: str) -> Setup:
    return Setup('ours', (
        f'snapshot_ext.flows={",".join(FLOWS)}',
        f'snapshot_ext.request_flows={",".join(FLOWS)}',
        f'snapshot_ext.transfers={transfer}', *more))


def every(shares: collections.abc.Iterable[int] = (),
          ) -> tuple[Contestant, ...]:
    """All contestants, those of one setup next to each other.

    :param shares: settings of guest_share beside the default one
    """
    return (
        Contestant(NOVA_LIVE, "Nova's driver, live", Setup('nova')),
        Contestant(NOVA_COLD, "Nova's driver, forced cold", Setup(
            'nova', ('workarounds.disable_libvirt_livesnapshot=true',))),
        Contestant(FLOOR, 'upload of the finished file', None),
        *(Contestant(
            f'{DEFAULT}-share-{share}',
            f'backup, streamed, guest_share={share}',
            _ours('streamed', f'snapshot_ext.guest_share={share}'),
            'backup', 'streamed') for share in shares),
        *(Contestant(f'{flow}-{transfer}', f'{flow}, {transfer}',
                     _ours(transfer), flow, transfer)
          for transfer in TRANSFERS for flow in FLOWS),
    )


def chosen(contestants: collections.abc.Iterable[Contestant],
           names: collections.abc.Iterable[str]) -> list[Contestant]:
    """Those of these names.

    :raises ValueError: if there is none of some name
    """
    known = {each.name: each for each in contestants}
    for name in names:
        if name not in known:
            raise ValueError(
                f'{name} is no contestant; there are {", ".join(known)}')
    return [each for name, each in known.items() if name in set(names)]


def round_of(contestants: collections.abc.Sequence[Contestant],
             number: int) -> list[Contestant]:
    """The order of one round, the first being 1.

    Every second round goes backwards: who came late comes early, and the
    setup of one round's end serves at the next one's beginning.
    """
    return list(contestants if number % 2 else reversed(contestants))
