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

"""A mover that runs, as a file that it can be read from.

What is read is the whole image or ends in an error: the last bytes are given
only when the mover has ended in good order and said the same number of bytes.
A mover that gives nothing for too long, such as one that was stopped by a
signal, is killed: nobody waits for it any longer.

Pipes are read by os.read(): in threads it blocks the thread alone, and under
eventlet it is a green one that lets other greenlets run meanwhile. Nothing is
written to a pipe: eventlet's os.write() goes on for ever when nobody reads it
any more (eventlet.green.os, EPIPE).
"""

import collections.abc
import contextlib
import fcntl
import io
import json
import os
import socket
import subprocess
import threading
import time
import typing

from nova_snapshot_ext import beside
from nova_snapshot_ext import exception
from nova_snapshot_ext import processes
from nova_snapshot_ext import request as requests

#: run as PYTHON -I -c BOOTSTRAP DIRECTORY ARGUMENT...: our modules by a bare
#: package, so that nothing else of our site-packages gets into an interpreter
#: that may be of another version
BOOTSTRAP = """\
import sys, types
package = types.ModuleType('nova_snapshot_ext')
package.__path__ = [sys.argv.pop(1)]
sys.modules[package.__name__] = package
from nova_snapshot_ext import mover
mover.main()
"""
_PACKAGE = os.path.dirname(os.path.abspath(__file__))

#: the largest that an ordinary user may have (proc(5), pipe-max-size)
_PIPE = 1024 ** 2
_END_TIMEOUT_S = 5.0
_TRY_TIMEOUT_S = 60.0
# What a mover may take beyond the answer of the server that it reads: for its
# rests, of a second at most, and for its turn on the processors.
_MARGIN_S = 30.0
# How often it is looked whether one is late.
_LOOK_S = 1.0
#: what is kept of its words
_WORDS = 2000

#: interpreters that can run a mover
_able: set[str] = set()


def command(python: str, *arguments: str) -> list[str]:
    """What starts a mover.

    :param python: an interpreter that has libnbd's binding
    """
    return [python, '-I', '-c', BOOTSTRAP, _PACKAGE, *arguments]


def why_not(python: str) -> str | None:
    """Why an interpreter can't run a mover, None if it can.

    One that can is not asked again before a mover of it has failed.
    """
    if python in _able:
        return None
    try:
        done = subprocess.run(  # nosec B603 # [snapshot_ext] mover_python
            command(python, '--help'), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            errors='replace', timeout=_TRY_TIMEOUT_S)
    except Exception as error:
        if not (isinstance(error, OSError)
                or processes.took_too_long(error)):
            raise
        return f'{python} can not be run: {error}'
    if not done.returncode:
        _able.add(python)
        return None
    words = done.stderr.strip()
    if "No module named 'nbd'" in words:
        return (f"{python} does not have libnbd's Python binding; install "
                f"python3-libnbd (Debian, Ubuntu, Fedora, RHEL)")
    return f'{python} can not run the mover: {words[-_WORDS:]}'


class MoverStream(io.RawIOBase):
    """The image that one mover writes.

    :ivar length: of the image, in bytes, when :meth:`prepare` has returned
    :ivar position: how many of them were read
    :ivar digest: the hash that :meth:`begin` asked for, when all was read
    """

    def __init__(self, arguments: collections.abc.Sequence[str],
                 discard: bool = False, read_timeout: int = 300,
                 tell_read: collections.abc.Callable[[int], None] = (
                     lambda more: None)) -> None:
        """Start the mover.

        :param arguments: as :func:`command` gives them
        :param discard: let nobody have the image: only its hash counts
        :param read_timeout: seconds in which what it reads must answer it
        :param tell_read: told how many bytes more it has read of the disk,
            as far as it says
        :raises TransferFailed: if it can't be run
        """
        super().__init__()
        self._read_timeout = read_timeout
        # Since when the next bytes, or words, are waited for
        self._waits_since: float | None = None
        self._was_late = False
        self._beside = contextlib.ExitStack()
        self.length = 0
        self.position = 0
        self.digest: str | None = None
        self._words = ''
        self._tell_read = tell_read
        self._read_bytes = 0
        self._open: list[int] = []
        self._control, control = socket.socketpair()
        # A mover that is stopped holds nobody up.
        self._control.setblocking(False)
        # Another thread may tell it something while it is closed.
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with control:
                self._start(arguments, discard, control)
            self._beside.enter_context(
                beside.repeated(self._end_if_late, _LOOK_S))
        except BaseException:
            self.close()
            raise

    def prepare(self, progress: requests.Progress = requests.no_progress,
                ) -> None:
        """Wait until the mover knows the length.

        :param progress: told how many bytes of the disk were looked at
        :raises TransferFailed: if it fails before that
        """
        try:
            while 'looked' in (said := self._next_words()):
                progress(said['looked'], said['of'])
            self.length = int(said['length'])
            self._has_read(said)
        except BaseException:
            self.close()
            raise

    def _start(self, arguments: collections.abc.Sequence[str],
               discard: bool, control: socket.socket) -> None:
        # Pipes of our own, as eventlet would put objects of its own around
        # those of subprocess.
        self._image, image = self._pipe()
        self._status, status = self._pipe()
        with contextlib.suppress(OSError):
            # The user's share of pipe pages is used up: slower, no error.
            fcntl.fcntl(self._image, fcntl.F_SETPIPE_SZ, _PIPE)
        try:
            # The interpreter is the operator's, and all else ours; no shell.
            self._process = subprocess.Popen(  # nosec B603 # see above
                arguments, stdin=control.fileno(),
                stdout=subprocess.DEVNULL if discard else image,
                stderr=status, cwd='/')
        except OSError as error:
            raise exception.TransferFailed(
                f'{arguments[0]} can not be run: {error}') from error
        finally:
            for descriptor in (image, status):
                self._open.remove(descriptor)
                os.close(descriptor)

    def _pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        self._open += ends
        return ends

    def readable(self) -> bool:
        return True

    def begin(self, algorithm: str | None = None) -> None:
        """Have the image written; to be called once.

        :param algorithm: of the hash that is in :attr:`digest` at the end
        """
        self._tell(begin=algorithm)

    def rest(self, rest: float) -> None:
        """Have the mover leave the disk alone for a part of the time.

        :param rest: from 0 to less than 1, from now on
        """
        self._tell(rest=rest)

    def _tell(self, **words: object) -> None:
        line = json.dumps(words).encode() + b'\n'
        # It may have ended, well or not: that is for the reader to find.
        with self._lock, contextlib.suppress(OSError):
            self._control.send(line)

    def read(self, size: int = -1) -> bytes:
        """Some bytes, at most so many; none at the end only.

        :raises TransferFailed: if the mover did not give the whole image
        """
        if size < 0:
            return self.readall()
        if not size or self.position == self.length:
            return b''
        chunk = self._wait_for(self._image, size)
        self.position += len(chunk)
        if not chunk or self.position >= self.length:
            self._finish()
        return chunk

    def finish(self) -> None:
        """Wait for the end of an image that nobody reads.

        :raises TransferFailed: if it did not end well
        """
        self.position = self.length
        self._finish()

    def _finish(self) -> None:
        """:raises TransferFailed: if the image is not what was announced"""
        if self.position == self.length and self._wait_for(self._image, 1):
            self.position += 1
        while 'moved' in (said := self._next_words()):
            pass        # a sign of life
        self._drain()
        assert self._process is not None
        if not processes.ends_within(self._process, _END_TIMEOUT_S):
            raise self._failed('it does not end')
        code = self._process.returncode
        if code or self.position != self.length or (
                said.get('written') != self.length):
            raise self._failed(
                f'it ended with {code} after {self.position} bytes of '
                f'{self.length}')
        self.digest = said.get('digest')
        self._has_read(said)

    def _has_read(self, said: dict[str, typing.Any]) -> None:
        read: int = said.get('read', self._read_bytes)
        self._tell_read(read - self._read_bytes)
        self._read_bytes = read

    def _wait_for(self, pipe: int, size: int) -> bytes:
        """What comes next, nothing where nothing does any more."""
        self._waits_since = time.monotonic()
        try:
            return os.read(pipe, size)
        finally:
            self._waits_since = None

    def _end_if_late(self) -> bool:
        """Kill it, which ends a wait: a thread of its own does so.

        :returns: whether it is to be looked again
        """
        since = self._waits_since
        if since is None or self._process is None or (
                time.monotonic() < since + self._read_timeout + _MARGIN_S):
            return True
        self._was_late = True
        self._process.kill()
        return False

    def _next_words(self) -> dict[str, typing.Any]:
        """The next line that the mover says.

        :raises TransferFailed: if that is an error, or there is none
        """
        while '\n' not in self._words:
            chunk = self._wait_for(self._status, 4096)
            if not chunk:
                break
            self._words += chunk.decode(errors='replace')
        line, _, rest = self._words.partition('\n')
        try:
            said: dict[str, typing.Any] = json.loads(line)
        except ValueError:
            self._drain()
            raise self._failed('it crashed, or was ended') from None
        self._words = rest
        if 'error' in said:
            raise self._failed(str(said['error']))
        return said

    def _drain(self) -> None:
        """Take the rest of its words, up to where it ends."""
        while chunk := self._wait_for(self._status, 4096):
            self._words = (self._words
                           + chunk.decode(errors='replace'))[-_WORDS:]

    def _failed(self, why: str) -> exception.TransferFailed:
        _able.clear()
        if self._was_late:
            return exception.TransferFailed(
                f'The mover failed: it gave nothing for {_MARGIN_S:.0f} s '
                f'more than [snapshot_ext] read_timeout = '
                f'{self._read_timeout}, and was killed')
        words = self._words.strip()
        return exception.TransferFailed(
            f'The mover failed: {why}' + (f' ({words})' if words else ''))

    def close(self) -> None:
        """End the mover, if it did not end."""
        if self.closed:
            return
        super().close()
        self._beside.close()
        with self._lock:
            self._control.close()
        for descriptor in self._open:
            os.close(descriptor)
        self._open.clear()
        if self._process is None:
            return
        # It ends by itself: its control socket is closed.
        if not processes.ends_within(self._process, _END_TIMEOUT_S):
            self._process.kill()
            processes.ends_within(self._process, _END_TIMEOUT_S)
