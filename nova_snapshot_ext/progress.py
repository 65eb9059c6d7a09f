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


"""How far a snapshot is: told by who moves bytes, read by who shows it."""

import collections.abc
import dataclasses
import functools
import time

from nova_snapshot_ext import request as requests

_MIB = 1024 ** 2


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the work, and where on the way it begins and ends."""

    #: what is done to the bytes: ``sent`` …
    verb: str
    first_percent: int
    last_percent: int


@dataclasses.dataclass(frozen=True)
class _Told:
    phase: Phase
    done: int
    total: int
    #: when this try of the phase began, on the monotonic clock
    began: float


class Meter:
    """Never goes back, also when an upload begins again."""

    def __init__(self, listener: requests.Progress) -> None:
        """:param listener: is told all that this is"""
        self._listener = listener
        self._told: _Told | None = None
        self._percent = 0
        self._shown: _Told | None = None
        self._shown_at = 0.0

    @property
    def percent(self) -> int:
        return self._percent

    def phase(self, phase: Phase) -> requests.Progress:
        """What the progress of a phase is told to."""
        return functools.partial(self._tell, phase)

    def _tell(self, phase: Phase, done: int, total: int) -> None:
        before = self._told
        began = (before.began if before is not None and before.phase == phase
                 and before.done <= done else time.monotonic())
        self._told = _Told(phase, done, total, began)
        way = phase.last_percent - phase.first_percent
        self._percent = max(
            self._percent,
            phase.first_percent + way * min(done, total) // max(total, 1))
        self._listener(done, total)

    def line(self) -> str | None:
        """What to log now, None while there is nothing to say.

        The rate is that since the last line.
        """
        told, shown, since = self._told, self._shown, self._shown_at
        if told is None:
            return None
        self._shown, self._shown_at = told, time.monotonic()
        before = 0
        if shown is not None and shown.began == told.began:
            before = shown.done
        else:
            since = told.began
        rate = (told.done - before) / max(self._shown_at - since, 1e-3)
        left = (f'about {max(told.total - told.done, 0) / rate:.0f} s left'
                if rate else 'nothing moves')
        return (f'{told.done / _MIB:.0f} of {told.total / _MIB:.0f} '
                f'MiB {told.phase.verb}, {rate / _MIB:.1f} MiB/s, {left}')


class Together:
    """How far several are that come one after the other, told as one."""

    def __init__(self, tell: requests.Progress,
                 expected: collections.abc.Sequence[int]) -> None:
        """:param expected: the bytes of each, until it tells them itself"""
        self._tell = tell
        self._parts = [(0, total) for total in expected]

    def part(self, number: int) -> requests.Progress:
        """What the progress of one of them is told to."""
        return functools.partial(self._told, number)

    def _told(self, number: int, done: int, total: int) -> None:
        self._parts[number] = done, total
        self._tell(sum(done for done, _ in self._parts),
                   sum(total for _, total in self._parts))
