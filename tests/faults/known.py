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

"""What does not hold, and why that is so.

A guest that is harmed for a reason that is named here is counted on its own,
as the documentation says what an operator can do about it; a run fails for
what is not named.
"""

import dataclasses
import re

from tests.faults import plan


@dataclasses.dataclass(frozen=True)
class Shortfall:
    """One thing that faults do, and that nobody can undo.

    :ivar faults: their names
    :ivar ways: of the snapshot
    :ivar what: that is wrong: a regular expression
    :ivar why: for the documentation
    """

    faults: tuple[str, ...]
    ways: tuple[str, ...]
    what: str
    why: str

    def explains(self, tried: plan.Try, what: str) -> bool:
        return (tried.fault in self.faults
                and tried.scenario.way in self.ways
                and re.search(self.what, what) is not None)


SHORTFALLS = (
    Shortfall(
        ('guest undefined', 'guest destroyed, undefined'),
        ('cold', 'domain', 'domain, disks alone'),
        '^its disk holds snapshots',
        'the disk of a guest that is gone is left alone: it may be deleted at '
        'this moment, or another host\'s by now'),
    Shortfall(
        ('scratch read-only',), ('backup', 'cold, backup job'),
        '^it does not (write|come back)',
        'QEMU gives the guest the error of the scratch for the write of its '
        'own that it came with, before anybody can end the job; '
        ':ref:`scratch` says how likely that is, and what helps'),
    Shortfall(
        ('guest is reset',), ('backup',),
        '^its agent can not be asked: ',
        'libvirt does not take in that an agent ends, or comes, while a '
        'backup job is under way, and can not ask it any more afterwards; '
        'the guest itself runs and writes'),
)


def why(tried: plan.Try, what: str) -> str | None:
    """Why something does not hold, None if it has to."""
    for each in SHORTFALLS:
        if each.explains(tried, what):
            return each.why
    return None


def is_harmed(tried: plan.Try) -> bool:
    """Whether a guest is harmed in a way that is not named here."""
    return any(why(tried, what) is None for what in tried.harm)


def is_harmed_as_named(tried: plan.Try) -> bool:
    """Whether a guest is harmed, and in no other way than is named here."""
    return bool(tried.harm) and not is_harmed(tried)


def is_known(tried: plan.Try) -> bool:
    """Whether a try holds, but for what is named here."""
    return all(why(tried, what) is not None
               for what in (*tried.harm, *tried.wrong))
