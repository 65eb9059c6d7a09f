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


"""A thread beside a snapshot: says how far it is, asks if it is wanted.

Neither holds the snapshot up: what can't be said or asked is said or asked
again later, and only a clear answer ends anything.
"""

import collections.abc
import contextlib
import time

from oslo_log import log as logging

from nova_snapshot_ext import beside
from nova_snapshot_ext import cancellation as cancellations
from nova_snapshot_ext import exception
from nova_snapshot_ext import progress

LOG = logging.getLogger(__name__)

#: called every few seconds with the percentage that is done, and with 0 at
#: the end; raises GuestGone or Preempted if nobody wants a snapshot of the
#: guest any more
Report = collections.abc.Callable[[int], None]

_LOOK_S = 2.0
#: how often the image service, and whoever is told, are bothered
_IMAGE_S = 6.0
_REPORT_S = 4.0
_LINE_S = 60.0


def no_report(percent: int) -> None:
    """For whoever does not want to know."""


class Attendant:
    """Looks after one snapshot."""

    def __init__(
            self, name: str, meter: progress.Meter,
            cancellation: cancellations.Cancellation,
            check_image: collections.abc.Callable[[], None], report: Report,
    ) -> None:
        """:param name: the guest's

        :param check_image: raises ImageGone if nobody wants the image
        """
        self._name = name
        self._meter = meter
        self._cancellation = cancellation
        self._check_image = check_image
        self._report = report
        self._failing: set[str] = set()
        self._lined = time.monotonic()
        self._asked = self._reported = float('-inf')

    def look(self) -> None:
        """Say how far it is, and end it if nobody wants it."""
        now = time.monotonic()
        if self._cancellation.reason is not None:
            self._cancellation.interrupt()
        else:
            if now - self._asked >= _IMAGE_S:
                self._asked = now
                self._ask('image service', self._check_image)
            if now - self._reported >= _REPORT_S:
                self._reported = now
                self.report()
        if now - self._lined >= _LINE_S:
            self._lined = now
            line = self._meter.line()
            if line is not None:
                LOG.info('Snapshot of %s: %s', self._name, line)

    def report(self) -> None:
        """Say how far it is to who may know that it is not wanted."""
        self._ask('guest', lambda: self._report(self._meter.percent))

    def end(self) -> None:
        """Take back what was shown."""
        try:
            self._report(0)
        except (exception.GuestGone, exception.Preempted):
            pass        # what it showed is gone, too
        except Exception as error:
            LOG.warning('The progress of %s was not taken back: %s',
                        self._name, error)
            with contextlib.suppress(Exception):
                self._report(0)

    def _ask(self, whom: str,
             question: collections.abc.Callable[[], None]) -> None:
        try:
            question()
        except (exception.GuestGone, exception.ImageGone,
                exception.Preempted) as error:
            self._cancellation.cancel(error)
        except Exception as error:
            if whom not in self._failing:
                LOG.warning('Whether the snapshot of %s is still wanted is '
                            'not known from the %s: %s', self._name, whom,
                            error)
            self._failing.add(whom)
        else:
            self._failing.discard(whom)


@contextlib.contextmanager
def attending(attendant: Attendant) -> collections.abc.Iterator[None]:
    """Have a thread look after a snapshot until the scope ends."""
    def look() -> bool:
        attendant.look()
        return True

    with beside.repeated(look, _LOOK_S, attendant.end):
        yield
