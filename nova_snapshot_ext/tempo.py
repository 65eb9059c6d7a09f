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

"""How fast something is read, and how much of the time it is left alone.

Runs in the mover, whose interpreter has the standard library only.
"""

import time

#: bytes a second: what is read of something fast however much it is left
#: alone. All rests together take no longer than this rate would.
_LEAST = 8 * 1024 ** 2


class Tempo:
    """Says when the next read may be sent."""

    def __init__(self, most: int | None = None, rest: float = 0) -> None:
        """:param most: bytes a second, None for no limit

        :param rest: see :attr:`rest`
        """
        self._most = most
        self._paid_at = time.monotonic()
        self._began = self._answered_at = self._paid_at
        self._answered = True
        self._bytes = 0
        #: bytes that were asked for in all
        self.total = 0
        #: how many reads were sent since the last rest, while there are any
        self.burst = 0
        #: part of the time in which nothing is read, from 0 to less than 1;
        #: another thread may change it
        self.rest = rest

    def wait_s(self) -> float:
        """Seconds until the next read may be sent, 0 if it may now."""
        earliest = self._paid_at
        if self._answered:
            after_s = self._answered_at - self._began
            earliest = max(earliest, self._answered_at + min(
                self._bytes / _LEAST, after_s * self.rest / (1 - self.rest)))
        return max(0.0, earliest - time.monotonic())

    def sent(self, length: int) -> None:
        """:param length: bytes that are asked for now"""
        now = time.monotonic()
        if self._most:
            # What was not used of it before is not made up for.
            self._paid_at = max(self._paid_at, now) + length / self._most
        if self._answered or not self.rest:
            # Time without rests is not made up for either.
            self._answered = False
            self._began, self._bytes, self.burst = now, 0, 0
        self._bytes += length
        self.total += length
        self.burst += 1

    def answered(self) -> None:
        """Rest, as all that was asked for has been answered."""
        self._answered_at = time.monotonic()
        self._answered = True
        self.burst = 0
