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


"""How a snapshot that nobody wants any more is ended, whatever it waits for.

Who moves bytes in a loop asks :meth:`Cancellation.check`. Who waits for
something that does not come back by itself says by
:meth:`Cancellation.ending` how it is made to. What comes of that is an error
like any other, after which everything is undone as after any other.
"""

import collections.abc
import contextlib
import threading

from oslo_log import log as logging

from nova_snapshot_ext import exception

LOG = logging.getLogger(__name__)


class Cancellation:
    """Whether one snapshot is to end early; for any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason: exception.SnapshotError | None = None
        self._endings: list[collections.abc.Callable[[], object]] = []

    @property
    def reason(self) -> exception.SnapshotError | None:
        """Why it ends early, None if it does not."""
        return self._reason

    def check(self) -> None:
        """:raises SnapshotError: the reason, if there is one"""
        if self._reason is not None:
            raise self._reason

    @contextlib.contextmanager
    def ending(self, end: collections.abc.Callable[[], object],
               ) -> collections.abc.Iterator[None]:
        """Have something ended if the snapshot is, while the scope lasts.

        :param end: called from another thread, and more than once
        :raises SnapshotError: the reason, if there is one already
        """
        with self._lock:
            self.check()
            self._endings.append(end)
        try:
            yield
        finally:
            with self._lock:
                self._endings.remove(end)

    def cancel(self, reason: exception.SnapshotError) -> None:
        """End the snapshot; the first reason counts."""
        with self._lock:
            if self._reason is None:
                self._reason = reason
        self.interrupt()

    def interrupt(self) -> None:
        """End what is waited for.

        May be called again: what was ended may have been about to start
        what would be waited for next.
        """
        with self._lock:
            endings = list(self._endings)
        for end in endings:
            try:
                end()
            except Exception as error:
                LOG.warning('What a snapshot waits for can not be ended: %s',
                            error)
