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

"""What can only be seen while it happens, looked at several times a second."""

import collections.abc
import contextlib
import os
import pathlib
import threading

from benchmarks import proc

_POLL_S = 0.1


def _files(directory: pathlib.Path,
           ) -> collections.abc.Iterator[os.stat_result]:
    """What is below a directory; files, and directories, may go meanwhile."""
    for parent, _, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                yield os.lstat(os.path.join(parent, name))


def held_bytes(directory: pathlib.Path) -> int:
    """What the files below a directory take of the disk."""
    return sum(each.st_blocks * 512 for each in _files(directory))


def filled_bytes(directory: pathlib.Path) -> int:
    """How long the files below a directory are.

    What a file was given of the disk beyond its end was never written.
    """
    return sum(each.st_size for each in _files(directory))


class Qemu:
    """The processor that a guest takes, also when its process is replaced."""

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._known: list[int] = []
        self.look()
        self._first = dict(self._last)

    def look(self) -> None:
        """Note what each of its processes has taken so far."""
        if not self._known:
            self._known = proc.with_argument(self._uuid)
        for pid in list(self._known):
            try:
                self._last[pid] = proc.used(pid).own_s
            except OSError:
                self._known.remove(pid)

    @property
    def seconds(self) -> float:
        return sum(last - self._first.get(pid, 0.0)
                   for pid, last in self._last.items())


class Watch(contextlib.AbstractContextManager['Watch']):
    """Peaks of directories, and QEMU, from a thread of its own.

    :ivar staged_bytes: what the first took of the disk at most
    :ivar scratch_bytes: what was written into the second at most
    :ivar reserved_bytes: what the second took of the disk at most
    """

    def __init__(self, staging: pathlib.Path, scratch: pathlib.Path,
                 qemu: Qemu) -> None:
        self._staging = staging
        self._scratch = scratch
        self._qemu = qemu
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.staged_bytes = 0
        self.scratch_bytes = 0
        self.reserved_bytes = 0

    def __enter__(self) -> 'Watch':
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._ended.wait(_POLL_S):
            self._look()

    def _look(self) -> None:
        self.staged_bytes = max(self.staged_bytes, held_bytes(self._staging))
        self.scratch_bytes = max(self.scratch_bytes,
                                 filled_bytes(self._scratch))
        self.reserved_bytes = max(self.reserved_bytes,
                                  held_bytes(self._scratch))
        self._qemu.look()
