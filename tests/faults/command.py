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

"""The command line, as whoever holds it at its steps sees it."""

import collections.abc
import contextlib
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys

# Seconds that a step may take to be reached; libvirt waits for 30 for a lock.
STEP_TIMEOUT_S = 90.0


class Stuck(Exception):
    """The command line neither went on nor ended."""


class Command:
    """One command line."""

    def __init__(self, pid: int, peer: socket.socket,
                 wait: collections.abc.Callable[[], int]) -> None:
        self.pid = pid
        self._peer = peer
        self._wait = wait
        self._rest = b''
        #: negative: the number of the signal that ended it
        self.code: int | None = None

    def step(self, timeout_s: float = STEP_TIMEOUT_S) -> str | None:
        """Wait until it is held at a step.

        :returns: which, None if it has ended
        :raises Stuck: if neither comes
        """
        while b'\n' not in self._rest:
            if not select.select([self._peer], [], [], timeout_s)[0]:
                raise Stuck(f'no step within {timeout_s} s')
            try:
                some = self._peer.recv(4096)
            except ConnectionError:
                some = b''
            if not some:
                self._end()
                return None
            self._rest += some
        name, _, self._rest = self._rest.partition(b'\n')
        return name.decode()

    def go(self) -> None:
        """Let it go on from where it is held."""
        try:
            self._peer.sendall(b'.')
        except ConnectionError:
            pass

    def signal(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def abandon(self) -> None:
        """End it, wherever it is."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                self.signal()
            while self.step() is not None:
                self.go()

    def _end(self) -> None:
        self._peer.close()
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(self._wait())


class Runner:
    """Starts command lines, one after the other."""

    def __init__(self, directory: pathlib.Path,
                 environment: dict[str, str] | None = None) -> None:
        """:param directory: for the socket and the output

        :param environment: of all of them, None for ours
        """
        self.output = directory / 'output'
        path = directory / 'steps.sock'
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(60)
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'tests.faults.stepping', str(path)],
            cwd=pathlib.Path(__file__).parents[2], text=True,
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._last: Command | None = None
        self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError('what runs the command line has ended')
        return line.strip()

    def start(self, arguments: list[str],
              environment: dict[str, str]) -> Command:
        """Start the command line; it is held at its first step."""
        self.abandon()
        self.output.write_text('')
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({
            'arguments': arguments, 'environment': environment,
            'output': str(self.output)}) + '\n')
        self._process.stdin.flush()
        pid = int(self._line())
        peer, _ = self._listener.accept()
        self._last = Command(pid, peer, lambda: int(self._line()))
        return self._last

    def abandon(self) -> None:
        """End the last one, if it has not ended."""
        if self._last is not None:
            self._last.abandon()

    def said(self) -> str:
        """What the last one printed."""
        return self.output.read_text(errors='replace')

    def close(self) -> None:
        self.abandon()
        self._listener.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
