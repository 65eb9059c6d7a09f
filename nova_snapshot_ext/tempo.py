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

#: however long something was under way; nothing asks for less by then
_LONGEST_REST_S = 2.0


class Tempo:
    """Says when the next read may be sent."""

    def __init__(self, most: int | None = None, rest: float = 0) -> None:
        """:param most: bytes a second, None for no limit

        :param rest: see :attr:`rest`
        """
        self._most = most
        self._paid_at = time.monotonic()
        self._answered_at = self._paid_at
        self._after_s = 0.0
        #: part of the time in which nothing is read, from 0 to less than 1;
        #: another thread may change it
        self.rest = rest

    def wait_s(self) -> float:
        """Seconds until the next read may be sent, 0 if it may now."""
        rest_s = min(_LONGEST_REST_S,
                     self._after_s * self.rest / (1 - self.rest))
        return max(0.0, max(self._paid_at, self._answered_at + rest_s)
                   - time.monotonic())

    def sent(self, length: int) -> None:
        """:param length: bytes that were asked for now"""
        if self._most:
            # What was not used of it before is not made up for.
            self._paid_at = max(self._paid_at, time.monotonic()) + (
                length / self._most)

    def answered(self, after_s: float) -> None:
        """Rest, as all that was asked for has been answered.

        :param after_s: for how many seconds something was under way
        """
        self._answered_at = time.monotonic()
        self._after_s = after_s
