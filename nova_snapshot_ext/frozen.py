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

"""A point in time of a guest's disks, as flows give it to transfers."""

import collections.abc
import contextlib
import dataclasses
import enum
import time
import typing


class Consistency(enum.Enum):
    """What an image promises to whoever boots from it."""

    #: the guest had shut down
    STOPPED = 'stopped'
    #: its file systems were frozen by the guest agent
    FILESYSTEM = 'filesystem'
    #: as if the power had been cut
    CRASH = 'crash'


class Pause:
    """How long the guest did not run, or could not write."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None
        self._depth = 0

    def begin(self) -> None:
        """Begin to count; each begin has its end, the outermost counts."""
        if not self._depth:
            self._since = time.monotonic()
        self._depth += 1

    def end(self) -> None:
        self._depth -= 1
        if not self._depth and self._since is not None:
            self._seconds += time.monotonic() - self._since
            self._since = None

    @contextlib.contextmanager
    def measured(self) -> collections.abc.Iterator[None]:
        self.begin()
        try:
            yield
        finally:
            self.end()

    @property
    def seconds(self) -> float:
        """Up to now, if the guest is not back yet."""
        since = 0.0 if self._since is None else (
            time.monotonic() - self._since)
        return self._seconds + since


@dataclasses.dataclass(frozen=True)
class FrozenDisk:
    """One disk at one instant: a read-only NBD export on a unix socket."""

    target: str
    #: size of the disk in bytes
    capacity: int
    #: path of the socket
    socket: str
    #: name of the export
    export: str

    def block_options(self) -> dict[str, typing.Any]:
        """QEMU's block options that open it (qemu(1), -blockdev)."""
        return {
            'driver': 'raw',
            'file': {
                'driver': 'nbd',
                'server': {'type': 'unix', 'path': self.socket},
                'export': self.export,
            },
        }


@dataclasses.dataclass(frozen=True)
class Frozen:
    """All chosen disks at one instant."""

    disks: tuple[FrozenDisk, ...]
    consistency: Consistency
    pause: Pause
    #: asked after a transfer failed: why the disks were not frozen any more
    why_lost: collections.abc.Callable[[], str | None] = lambda: None
    #: whether the guest's own QEMU serves the disks, for as long as it runs
    by_guest: bool = False
    #: what the image says of the flow's doing, by names without our prefix
    properties: dict[str, str] = dataclasses.field(default_factory=dict)
    #: called with where the image is once it is whole: what the flow made to
    #: stay on the host stays from then on
    keep: collections.abc.Callable[[str], None] = lambda location: None
    #: bytes that the flow has put on the host's disk for the disks to stay
    #: frozen, None where that is not known; asked before they are thawed
    scratch_bytes: collections.abc.Callable[[], int | None] = lambda: None
