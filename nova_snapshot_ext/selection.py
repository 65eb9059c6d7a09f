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

"""Which flow serves: a request by name, or the first without an obstacle."""

import collections.abc
import dataclasses

from oslo_log import log as logging

from nova_snapshot_ext import exception
from nova_snapshot_ext.flows import base
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import plugins
from nova_snapshot_ext import request as requests

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Wish:
    """Flows by name, and who named them."""

    names: tuple[str, ...]
    #: for messages: ``image property snapshot_flow``, ``[snapshot_ext]
    #: flows`` …
    source: str
    #: one flow asked for by name: nothing else serves in its place
    exact: bool


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A flow that may serve now."""

    name: str
    flow: base.Flow


def wish(asked: str | None, flavor: str | None,
         configured: collections.abc.Sequence[str],
         allowed: collections.abc.Sequence[str]) -> Wish:
    """Whose word counts: the request's, else the flavor's, else the
    configuration's.

    :param asked: the image property ``snapshot_flow``
    :param flavor: the extra spec ``snapshot_ext:flow``
    :param configured: [snapshot_ext] flows
    :param allowed: [snapshot_ext] request_flows
    :raises InvalidSetting: if the request's flow is not allowed
    """
    if asked is not None:
        if asked not in allowed:
            raise exception.InvalidSetting(
                'image property snapshot_flow', asked,
                'this cloud allows ' + (', '.join(allowed) or 'no requests'))
        return Wish((asked,), 'image property snapshot_flow', True)
    if flavor is not None:
        return Wish((flavor,), 'flavor extra spec snapshot_ext:flow', True)
    return Wish(tuple(configured), '[snapshot_ext] flows', False)


def candidates(
        wished: Wish, guest: guests.Guest, disks: base.Disks,
        request: requests.Request) -> list[Candidate]:
    """The wished flows that have no obstacle, best first.

    :raises InvalidSetting: if one of them is not installed
    :raises NoFlowServes: if none can serve
    """
    found: list[Candidate] = []
    obstacles = {}
    for name in wished.names:
        flow = plugins.load(plugins.FLOWS, name, wished.source)()
        why = request.disabled_flows.get(name) or flow.obstacle(
            guest, disks, request)
        if why is not None:
            obstacles[name] = why
            continue
        if obstacles and not found:
            LOG.info('%s: %s serves; %s', guest.name, name,
                     '; '.join(f'{passed} can not serve, {reason}'
                               for passed, reason in obstacles.items()))
        found.append(Candidate(name, flow))
    if not found:
        raise exception.NoFlowServes(wished.source, obstacles)
    return found
