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

"""Processes that a snapshot started, ended by whoever undoes it."""

import contextlib
import os
import signal
import time

from nova_snapshot_ext import exception

# When a process that ignores SIGTERM is killed, and when that is given up.
_KILL_AFTER_S = 5.0
_END_TIMEOUT_S = 30.0


def end(argument: str, what: str) -> None:
    """End the processes of ours that have an argument in their command line.

    :param argument: whole, and of no other process's
    :param what: what the process is, for the message
    :raises UndoFailed: if one can't be ended
    """
    begun = time.monotonic()
    while pids := having(argument):
        waited = time.monotonic() - begun
        if waited > _END_TIMEOUT_S:
            raise exception.UndoFailed(f'The {what} does not end: {pids}')
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if waited < _KILL_AFTER_S
                        else signal.SIGKILL)
        time.sleep(0.05)


def having(argument: str) -> list[int]:
    """The ids of the processes of our user with an argument."""
    wanted = argument.encode()
    found = []
    for name in os.listdir('/proc'):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.stat(f'/proc/{name}').st_uid != os.geteuid():
                    continue
                with open(f'/proc/{name}/cmdline', 'rb') as cmdline:
                    if wanted in cmdline.read().split(b'\0'):
                        found.append(int(name))
    return found
