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

"""Processes that a snapshot starts, and how they end."""

import contextlib
import os
import signal
import subprocess
import time
import typing

from oslo_concurrency import processutils

from nova_snapshot_ext import cancellation as cancellations
from nova_snapshot_ext import exception

# When a process that ignores SIGTERM is killed, and when that is given up.
_KILL_AFTER_S = 5.0
_END_TIMEOUT_S = 30.0


def run(*command: str, limits: processutils.ProcessLimits | None = None,
        timeout: int | None = None,
        cancellation: cancellations.Cancellation | None = None) -> str:
    """Run a program to its end.

    :param timeout: seconds after which it is killed
    :param cancellation: ends it, too
    :returns: what it printed
    :raises CommandFailed: if it could not be run, failed or was killed
    """
    started: list['subprocess.Popen[bytes]'] = []
    ending = contextlib.ExitStack()
    name = ' '.join(command[:2])

    def may_be_ended(process: 'subprocess.Popen[bytes]') -> None:
        started.append(process)
        if cancellation is not None:
            ending.enter_context(cancellation.ending(process.terminate))

    try:
        output, _ = processutils.execute(
            *command, prlimit=limits, timeout=timeout,
            on_execute=may_be_ended)
    except processutils.ProcessExecutionError as error:
        raise exception.CommandFailed(
            f'{name} failed: '
            f'{(error.stderr or "").strip() or error}') from error
    except OSError as error:
        raise exception.CommandFailed(
            f'{command[0]} can not be run: {error}') from error
    except Exception as error:
        if not took_too_long(error):
            raise
        raise exception.CommandFailed(
            f'{name} took longer than {timeout} seconds') from error
    finally:
        ending.close()
        for process in started:
            if process.poll() is None:
                process.kill()
                # One that its storage keeps from ending goes on without us.
                ends_within(process, _END_TIMEOUT_S)
    return str(output)


def took_too_long(error: Exception) -> bool:
    """Whether it is subprocess.TimeoutExpired: under eventlet that is a class
    of eventlet's own.
    """
    return type(error).__name__ == subprocess.TimeoutExpired.__name__


def ends_within(process: 'subprocess.Popen[typing.Any]',
                seconds: float) -> bool:
    """Wait for a process; whether it has ended."""
    try:
        process.wait(seconds)
    except Exception as error:
        if not took_too_long(error):
            raise
        return False
    return True


def end(argument: str, what: str, program: str | None = None) -> None:
    """End the processes of ours that have an argument in their command line.

    :param argument: whole, and of no other process's
    :param what: what the process is, for the message
    :param program: the only one that is meant, where others may have it too
    :raises UndoFailed: if one can't be ended
    """
    begun = time.monotonic()
    while pids := having(argument, program):
        waited = time.monotonic() - begun
        if waited > _END_TIMEOUT_S:
            raise exception.UndoFailed(f'The {what} does not end: {pids}')
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if waited < _KILL_AFTER_S
                        else signal.SIGKILL)
        time.sleep(0.05)


def having(argument: str, program: str | None = None) -> list[int]:
    """The ids of the processes of our user with an argument; root's are
    all, since root may end what Nova's user left.

    :param program: its name, None for any
    """
    wanted = argument.encode()
    found = []
    user = os.geteuid()
    for name in os.listdir('/proc'):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if user not in (0, os.stat(f'/proc/{name}').st_uid):
                    continue
                with open(f'/proc/{name}/cmdline', 'rb') as cmdline:
                    words = cmdline.read().split(b'\0')
                if wanted in words and program in (
                        None, os.path.basename(os.fsdecode(words[0]))):
                    found.append(int(name))
    return found
