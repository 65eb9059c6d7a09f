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

"""The scratch of a backup job, watched so that it never stops a guest.

QEMU keeps there what the guest overwrites while its disk is frozen. Without
room it would pause the guest, which then sees time stand still; so the job
is ended before that, and the snapshot fails instead.
"""

import collections.abc
import contextlib
import os
import threading

from oslo_log import log as logging

from nova_snapshot_ext import exception
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import workspace

LOG = logging.getLogger(__name__)

POLL_S = 0.5
# What may be written between two looks, at the highest rate seen so far: so
# many times over, and so much at least.
_MARGIN_POLLS = 4
_LEAST_MARGIN = 32 * 1024 ** 2


class Watch:
    """Ends a guest's backup job in time; one thread of its own."""

    def __init__(self, guest: guests.Guest, directory: str) -> None:
        """:param directory: holds the scratch files and nothing else"""
        self._guest = guest
        self._directory = directory
        self._used = self._used_bytes()
        self._rate = 0
        self._lost: str | None = None

    def why_lost(self) -> str | None:
        """Why the disks are not frozen any more, None while they are."""
        return self._lost

    def look(self) -> bool:
        """:returns: whether there is anything left to watch"""
        used = self._used_bytes()
        self._rate = max(self._rate, used - self._used)
        self._used = used
        free = workspace.free_bytes(self._directory)
        margin = max(self._rate * _MARGIN_POLLS, _LEAST_MARGIN)
        if self._guest.is_paused_by_io_error():
            self._end(f'the guest was paused by an I/O error, with {free} '
                      f'bytes free for its scratch')
        elif free < margin:
            self._end(f'{free} bytes are free for the scratch, which held '
                      f'{used} bytes and may grow by {margin}')
        return self._lost is None

    def _used_bytes(self) -> int:
        with os.scandir(self._directory) as files:
            return sum(file.stat().st_blocks * 512 for file in files)

    def _end(self, why: str) -> None:
        self._lost = f'{self._directory}: {why}'
        LOG.warning('The backup job of %s is ended: %s', self._guest.name,
                    self._lost)
        end_job(self._guest)


def end_job(guest: guests.Guest) -> None:
    """End a guest's backup job; the guest goes on if its scratch paused it.

    In this order: with the job there, it would be paused again.
    """
    guest.end_backup()
    if guest.is_paused_by_io_error():
        guest.resume()


@contextlib.contextmanager
def watching(guest: guests.Guest,
             directory: str) -> collections.abc.Iterator[Watch]:
    """Watch the scratch of a guest's backup job until the scope ends."""
    watch = Watch(guest, directory)
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(POLL_S):
            try:
                if not watch.look():
                    return
            except (exception.SnapshotError, OSError) as error:
                LOG.warning('The scratch of %s can not be looked at: %s',
                            guest.name, error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join()
