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

"""How much of the time a frozen disk is not read, so that its guest is served.

Reading takes from the guest: the same QEMU, or at least the same storage,
serves both. libvirt counts the requests that a guest's disk has completed and
how long they took, so for which part of the time the guest waited for its
disk. More than that it can't lose by our reading. While it is less than what
the guest may lose, the disk is read without a rest; a guest that waits longer
has the disk for itself for its share of the time.
"""

import collections.abc
import contextlib
import time

from oslo_log import log as logging

from nova_snapshot_ext import beside
from nova_snapshot_ext import exception
from nova_snapshot_ext import guest as guests

LOG = logging.getLogger(__name__)

POLL_S = 0.5


def rest(before: guests.IoTimes, after: guests.IoTimes, elapsed_s: float,
         share: float) -> float:
    """The part of the time in which a guest's disk is left alone.

    :param before: what the disk had done
    :param after: what it had done so many seconds later
    :param share: of the time that it waits for its disk, the guest's part
    """
    # Several requests at the same time wait no longer than one.
    waiting = min(1.0, (after.seconds - before.seconds) / elapsed_s)
    # In between it is in proportion: what it waits for depends on what is
    # read, which would swing to and fro.
    return share * min(1.0, max(0.0, waiting) / (1 - share))


@contextlib.contextmanager
def kept(guest: guests.Guest, target: str, share: float,
         obey: collections.abc.Callable[[float], None],
         ) -> collections.abc.Iterator[None]:
    """Leave a guest its share until the scope ends.

    :param target: the guest's disk that is read
    :param share: as of :func:`rest`
    :param obey: called by another thread with the part of the time in which
        the disk is to be left alone from now on; with 0 when there is no
        guest any more to be spared
    """
    at = 0.0
    before: guests.IoTimes | None = None
    said = ''

    def look() -> bool:
        nonlocal at, before, said
        try:
            now, after = time.monotonic(), guest.io_times(target)
            if after is None:
                obey(0.0)
            elif before is not None:
                obey(rest(before, after, now - at, share))
            at, before = now, after
            return True
        except exception.GuestGone:
            obey(0.0)
            return False
        except exception.SnapshotError as error:
            # libvirt is restarted, say: it is asked again.
            if str(error) != said:
                said = str(error)
                LOG.warning('What %s does on %s is not known: %s',
                            guest.name, target, error)
            return True

    with beside.repeated(look, POLL_S):
        yield
