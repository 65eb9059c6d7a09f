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

"""Medians, and how far the rest lies from them."""

import collections.abc
import dataclasses
import statistics


@dataclasses.dataclass(frozen=True)
class Spread:
    """What several measurements of one thing gave."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: collections.abc.Iterable[float | None],
           ) -> 'Spread | None':
        """Of those that were measured; None if none was."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(statistics.median(known), min(known), max(known),
                   len(known))

    def text(self, digits: int = 1) -> str:
        """The median, and the least and the most where they differ."""
        middle, least, most = (
            f'{value:.{digits}f}'
            for value in (self.median, self.least, self.most))
        return middle if least == most else f'{middle} ({least} – {most})'


def ratio(first: Spread | None, second: Spread | None) -> float | None:
    """Of two medians; None if one is missing."""
    if first is None or second is None or not second.median:
        return None
    return first.median / second.median
