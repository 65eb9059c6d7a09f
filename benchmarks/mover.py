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

"""The mover alone, into a pipe that somebody empties for nothing."""

import collections.abc
import contextlib
import fcntl
import json
import os
import subprocess

from benchmarks import errors
from benchmarks import freezing
from nova_snapshot_ext import frozen
from nova_snapshot_ext import mover_stream

#: of the pipe that snapshots use
_PIPE = 1024 ** 2


class Mover:
    """A mover that has said the length of its image.

    :ivar length: in bytes
    """

    def __init__(self, process: 'subprocess.Popen[bytes]') -> None:
        self._process = process
        self.pid = process.pid
        assert process.stderr is not None
        said = b''
        try:
            while 'looked' in (words := json.loads(
                    said := process.stderr.readline())):
                pass
            self.length = int(words['length'])
        except (ValueError, KeyError):
            raise errors.BenchmarkError(
                f'the mover failed: {said!r} '
                f'{process.stderr.read()[-2000:]!r}') from None

    def drain(self, length: int) -> None:
        """Have it write, and take so many bytes; nothing copies them."""
        assert self._process.stdin is not None
        self._process.stdin.write(b'{"begin": null}\n')
        self._process.stdin.flush()
        assert self._process.stdout is not None
        source = self._process.stdout.fileno()
        with open(os.devnull, 'wb', buffering=0) as nowhere:
            left = length
            while left:
                moved = os.splice(source, nowhere.fileno(), min(left, _PIPE))
                if not moved:
                    raise errors.BenchmarkError(
                        f'the mover ended {left} bytes early')
                left -= moved

    def wait(self) -> None:
        """Wait for its end after the last byte."""
        if self._process.wait(60):
            raise errors.BenchmarkError(
                f'the mover ended with {self._process.returncode}')


@contextlib.contextmanager
def running(disk: frozen.FrozenDisk) -> collections.abc.Iterator[Mover]:
    """Have a mover that makes a qcow2 image."""
    python = freezing.settings().mover_python
    why = mover_stream.why_not(python)
    if why is not None:
        raise errors.BenchmarkError(why)
    process = subprocess.Popen(
        mover_stream.command(
            python, f'--unix={disk.socket}', f'--export={disk.export}',
            '--format=qcow2'),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, cwd='/')
    try:
        assert process.stdout is not None
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, _PIPE)
        yield Mover(process)
    finally:
        process.kill()
        process.communicate()
