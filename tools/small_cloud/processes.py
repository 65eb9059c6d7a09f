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

"""Starting and ending processes by what was written down about them.

A process is known by its pid, its start time and the boot it belongs to, so
that a pid which the kernel has given to somebody else is never signalled.
Children that outlive their parent are found by a mark in their environment.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import grp
import json
import os
import pathlib
import pwd
import signal
import subprocess
import time
import uuid

from small_cloud import state as cloud_state

MARK = 'SMALL_CLOUD_SERVICE'


@dataclasses.dataclass(frozen=True)
class Record:
    """What is written down about a process."""

    pid: int
    start_ticks: int  # field 22 of /proc/PID/stat
    boot_id: str
    started_at: float  # seconds since the epoch
    argv: tuple[str, ...]
    # In the environment of the process, and so in that of its children. A
    # cloud in a container may have the same paths, and its processes are
    # seen from outside.
    mark: str = ''


def _boot_id() -> str:
    return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()


def _start_ticks(pid: int) -> int | None:
    """When a process started, or None if it is gone or waits to be reaped."""
    try:
        text = pathlib.Path(f'/proc/{pid}/stat').read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name stands in brackets and may hold blanks and brackets.
    fields = text[text.rindex(')') + 2:].split()
    return None if fields[0] in 'ZX' else int(fields[19])


def record(state: cloud_state.State, name: str) -> Record | None:
    """What was written down about a service, whether it lives or not."""
    try:
        data = json.loads((state.run / f'{name}.json').read_text())
    except FileNotFoundError:
        return None
    return Record(**{**data, 'argv': tuple(data['argv'])})


def alive(state: cloud_state.State, name: str) -> Record | None:
    """The record of a service that runs, else None."""
    known = record(state, name)
    if known is None or known.boot_id != _boot_id():
        return None
    return known if _start_ticks(known.pid) == known.start_ticks else None


def as_user(user: str) -> dict[str, object]:
    """The arguments of subprocess.Popen that make a process another user's."""
    entry = pwd.getpwnam(user)
    groups = [g.gr_gid for g in grp.getgrall() if user in g.gr_mem]
    return {
        'user': entry.pw_uid,
        'group': entry.pw_gid,
        'extra_groups': sorted({entry.pw_gid, *groups}),
    }


def can_read(user: str, path: pathlib.Path) -> bool:
    """Whether a user may read a file, every directory on the way included."""
    test = subprocess.Popen(
        ['test', '-r', str(path)],
        **as_user(user),  # type: ignore[call-overload]
    )
    return bool(test.wait() == 0)


def start(
    state: cloud_state.State,
    name: str,
    argv: Sequence[str],
    *,
    environment: Mapping[str, str],
    user: str | None = None,
) -> Record:
    """Start a service in a session of its own; its output goes to its log."""
    mark = f'{name}:{uuid.uuid4()}'
    with open(state.log / f'{name}.log', 'a') as log:
        child = subprocess.Popen(
            [str(a) for a in argv],
            cwd='/',
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o022,
            env={**environment, MARK: mark},
            **(as_user(user) if user else {}),
        )  # type: ignore[call-overload]
    # Popen returns once the program runs, so the start time is final. A child
    # that has died at once is written down too: alive() will tell.
    new = Record(
        pid=child.pid,
        start_ticks=_start_ticks(child.pid) or 0,
        boot_id=_boot_id(),
        started_at=time.time(),
        argv=tuple(str(a) for a in argv),
        mark=mark,
    )
    state.write(
        state.run / f'{name}.json', json.dumps(dataclasses.asdict(new)) + '\n'
    )
    return new


def _marked(known: Record) -> Iterator[int]:
    """The processes that carry a record's mark: itself and its children."""
    if not known.mark:
        return
    mark = f'{MARK}={known.mark}'.encode()
    for entry in pathlib.Path('/proc').iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if mark in (entry / 'environ').read_bytes().split(b'\0'):
                if _start_ticks(int(entry.name)) is not None:
                    yield int(entry.name)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue


def _wait_gone(state: cloud_state.State, name: str, timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while alive(state, name):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def stop(
    state: cloud_state.State,
    name: str,
    *,
    timeout_s: float = 20,
    first: signal.Signals = signal.SIGTERM,
) -> str | None:
    """End a service and what it has left behind.

    :param timeout_s: how long it may take before it is killed.
    :returns: how it ended in words, or None if it did not run.
    """
    known = record(state, name)
    if known is None:
        return None
    how = None
    if alive(state, name):
        begun = time.monotonic()
        os.kill(known.pid, first)
        how = 'killed' if first == signal.SIGKILL else 'ended'
        if not _wait_gone(state, name, timeout_s):
            os.kill(known.pid, signal.SIGKILL)
            _wait_gone(state, name, 10)
            how = 'killed'
        how += f' after {time.monotonic() - begun:.1f} s'
    for pid in _marked(known):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    (state.run / f'{name}.json').unlink(missing_ok=True)
    return how
