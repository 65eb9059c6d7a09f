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

import collections.abc
import contextlib
import os
import signal
import subprocess
import sys
import time

import nova_snapshot_ext
from nova_snapshot_ext import exception
from nova_snapshot_ext import mover_stream
from nova_snapshot_ext import processes
from tests.unit import base

#: a mover that says what it is told, and writes so many bytes
MOVER = """\
import json, os, select, sys, time
def say(**words): print(json.dumps(words), file=sys.stderr, flush=True)
def write(count): sys.stdout.buffer.write(b'x' * count)
def end(code=0):
    sys.stdout.buffer.flush()
    sys.stderr.flush()
    os._exit(code)
exec(sys.argv[1])
end()
"""

#: prints the longest time that another greenlet had to wait
EVENTLET = """\
import sys
import eventlet
eventlet.monkey_patch()
import time
from nova_snapshot_ext import mover_stream
longest = 0
def tick():
    global longest
    while True:
        began = time.monotonic()
        eventlet.sleep(0.01)
        longest = max(longest, time.monotonic() - began)
eventlet.spawn(tick)
eventlet.sleep(0.1)
stream = mover_stream.MoverStream([
    sys.executable, '-I', '-c', sys.argv[1],
    'time.sleep(1); say(length=5); write(4); sys.stdout.buffer.flush();'
    'time.sleep(1); write(1); sys.stdout.buffer.flush(); time.sleep(1);'
    'say(written=5); sys.stderr.flush(); os.close(2); time.sleep(1)'])
stream.prepare()
stream.begin()
eventlet.sleep(0.1)
print(longest)
longest = 0
assert stream.read() == b'xxxxx'
stream.close()
eventlet.sleep(0.1)
print(longest)
longest = 0
stream = mover_stream.MoverStream(
    [sys.executable, '-I', '-c', sys.argv[1], 'say(length=5); end(1)'])
stream.prepare()
eventlet.sleep(1)
eventlet.spawn(stream.rest, 0.5)
eventlet.sleep(0.1)
stream.close()
print(longest)
"""


def _ends() -> int:
    """How many ends of pipes and sockets this process has open."""
    found = 0
    for name in os.listdir('/proc/self/fd'):
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(f'/proc/self/fd/{name}').startswith(
                ('pipe:', 'socket:'))
    return found


class StreamTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.descriptors = _ends()

    def stream(self, code: str,
               discard: bool = False) -> mover_stream.MoverStream:
        made = mover_stream.MoverStream(
            [sys.executable, '-I', '-c', MOVER, code,
             f'--token={self.id()}'], discard)
        self.addCleanup(made.close)
        made.prepare()
        return made

    def assertNothingLeft(self) -> None:
        # Those of other tests may go at any time.
        self.assertLessEqual(_ends(), self.descriptors)

    def assertFails(self, code: str, words: str = '') -> None:
        """Whatever is read of it is less than the image."""
        stream = self.stream(code)
        got = []

        def read() -> None:
            while chunk := stream.read(1000):
                got.append(len(chunk))
        self.assertRaisesRegex(exception.TransferFailed, words, read)
        self.assertLess(sum(got), stream.length)
        stream.close()


class TestReading(StreamTestCase):

    def test_whole_image_is_read(self) -> None:
        stream = self.stream(
            'say(length=3000000); write(3000000);'
            'say(written=3000000, digest="abc")')
        self.assertEqual(3000000, stream.length)
        with stream:
            self.assertEqual(b'x' * 3000000, stream.read())
            self.assertEqual(b'', stream.read(10))
        self.assertEqual('abc', stream.digest)

    def test_how_far_the_disk_is_looked_through_is_told(self) -> None:
        stream = mover_stream.MoverStream(
            [sys.executable, '-I', '-c', MOVER,
             'say(looked=1, of=9); say(looked=7, of=9); say(length=0);'
             'say(written=0)'])
        self.addCleanup(stream.close)
        told: list[tuple[int, int]] = []
        stream.prepare(lambda *each: told.append(each))
        self.assertEqual([(1, 9), (7, 9)], told)
        self.assertEqual(b'', stream.read())

    def test_empty_image(self) -> None:
        stream = self.stream('say(length=0); say(written=0)')
        self.assertEqual(b'', stream.read())

    def test_last_byte_waits_for_a_good_end(self) -> None:
        # Whoever has all bytes may take the image for whole.
        for code in (
                'say(length=5); write(5); end(1)',
                'say(length=5); write(5); end()',
                'say(length=5); write(5); say(written=4)',
                'say(length=5); write(5); say(error="no")',
                'say(length=5); write(5); say(written=5); end(3)',
                'say(length=5); write(6); say(written=6)'):
            self.assertFails(code)

    def test_early_end_is_no_end(self) -> None:
        for code in (
                'say(length=5000); write(3000)',
                'say(length=5000); write(3000); say(written=3000)',
                'say(length=5000); write(3000); say(written=5000)',
                'say(length=5000)',
                'say(length=5000); write(4999); os.kill(os.getpid(), 9)'):
            self.assertFails(code)

    def test_its_words_are_told(self) -> None:
        self.assertFails('say(length=5); say(error="read: bad disk")',
                         'The mover failed: read: bad disk')
        self.assertFails('say(length=5); raise ValueError("a fault")',
                         'ValueError: a fault')

    def test_mover_that_fails_before_it_knows_the_length(self) -> None:
        for code, words in (('say(error="no such export")', 'no such export'),
                            ('end(1)', 'crashed'),
                            ('os.kill(os.getpid(), 9)', 'ended'),
                            ('print("words", file=sys.stderr)', 'words')):
            self.assertRaisesRegex(
                exception.TransferFailed, words, self.stream, code)
        self.assertNothingLeft()

    def test_program_that_is_not_there(self) -> None:
        self.assertRaisesRegex(
            exception.TransferFailed, '/none can not be run',
            mover_stream.MoverStream, ['/none'])
        self.assertNothingLeft()

    def test_nobody_reads_what_only_the_hash_counts_of(self) -> None:
        stream = self.stream(
            'say(length=9000000); write(9000000);'
            'say(written=9000000, digest="abc")', discard=True)
        stream.finish()
        self.assertEqual('abc', stream.digest)
        self.assertRaises(
            exception.TransferFailed,
            self.stream('say(length=9); end(1)', discard=True).finish)


class TestLate(StreamTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.patch_name('nova_snapshot_ext.mover_stream._MARGIN_S', 0.1)
        self.patch_name('nova_snapshot_ext.mover_stream._LOOK_S', 0.05)

    def late(self, code: str, discard: bool = False,
             ) -> mover_stream.MoverStream:
        stream = mover_stream.MoverStream(
            [sys.executable, '-I', '-c', MOVER, code,
             f'--token={self.id()}'], discard, read_timeout=1)
        self.addCleanup(stream.close)
        return stream

    def assertKilled(self, call: collections.abc.Callable[[], object],
                     ) -> None:
        began = time.monotonic()
        self.assertRaisesRegex(
            exception.TransferFailed,
            r'gave nothing for 0 s more than \[snapshot_ext\] read_timeout '
            r'= 1, and was killed$', call)
        self.assertLess(time.monotonic() - began, 30)

    def test_mover_that_was_stopped_is_killed(self) -> None:
        stop = 'os.kill(os.getpid(), signal.SIGSTOP)'
        stream = self.late(f'import signal; {stop}')
        self.assertKilled(stream.prepare)
        stream.close()
        for code in (
                f'say(length=9); write(4); sys.stdout.flush(); {stop}',
                f'say(length=9); write(9); sys.stdout.flush(); {stop}',
                f'say(length=9); write(9); sys.stdout.flush(); '
                f'say(written=9); {stop}'):
            stream = self.late(f'import signal; {code}')
            stream.prepare()
            self.assertKilled(stream.read)
            stream.close()
        self.assertEqual([], processes.having(f'--token={self.id()}'))
        self.assertNothingLeft()

    def test_slow_reader_is_not_a_late_mover(self) -> None:
        stream = self.late(
            'say(length=9000000); write(9000000); say(written=9000000)')
        stream.prepare()
        time.sleep(1.5)
        first = stream.read(1)
        time.sleep(1.5)
        self.assertEqual(9000000, len(first + stream.read()))

    def test_signs_of_life_are_no_silence(self) -> None:
        stream = self.late(
            'for done in range(8): time.sleep(0.3); say(looked=done, of=9)\n'
            'say(length=9)\n'
            'for done in range(8): time.sleep(0.3); say(moved=done)\n'
            'say(written=9, digest="abc")', discard=True)
        stream.prepare()
        stream.finish()
        self.assertEqual('abc', stream.digest)
        silent = self.late('say(length=9); time.sleep(60)', discard=True)
        silent.prepare()
        self.assertKilled(silent.finish)


class TestControl(StreamTestCase):

    def test_image_is_begun_by_a_word(self) -> None:
        stream = self.stream(
            'say(length=5); told = json.loads(sys.stdin.readline());'
            'write(5); say(written=5, digest=told["begin"])')
        stream.begin('sha256')
        self.assertEqual(b'xxxxx', stream.read())
        self.assertEqual('sha256', stream.digest)

    def test_mover_is_told(self) -> None:
        stream = self.stream(
            'say(length=5); lines = [sys.stdin.readline() for _ in "12"];'
            'ok = [json.loads(line)["rest"] for line in lines] == [0.5, 0];'
            'write(5) if ok else end(1); say(written=5)')
        stream.rest(0.5)
        stream.rest(0)
        self.assertEqual(b'xxxxx', stream.read())

    def test_mover_that_ended_is_told_nothing(self) -> None:
        stream = self.stream('say(length=5); end(1)')
        self.assertRaises(exception.TransferFailed, stream.read)
        stream.rest(0.5)
        stream.close()
        stream.rest(0.5)

    def test_mover_that_stands_still_holds_nobody_up(self) -> None:
        stream = self.stream('say(length=5); time.sleep(60)')
        [pid] = processes.having(f'--token={self.id()}')
        os.kill(pid, signal.SIGSTOP)
        self.addCleanup(os.kill, pid, signal.SIGCONT)
        for _ in range(10_000):
            stream.rest(0.5)
        os.kill(pid, signal.SIGKILL)


class TestGreenlets(base.TestCase):

    def test_waiting_for_bytes_holds_up_no_greenlet(self) -> None:
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', EVENTLET, MOVER],
            cwd=os.path.dirname(os.path.dirname(nova_snapshot_ext.__file__)),
            stdout=subprocess.PIPE, text=True, check=True, timeout=60)
        waits = [float(wait) for wait in done.stdout.split()]
        self.assertEqual(3, len(waits))
        for wait in waits:
            self.assertLess(wait, 0.5, 'the hub stood still')


class TestEnd(StreamTestCase):

    def test_mover_ends_with_its_stream_and_nothing_is_left(self) -> None:
        stream = self.stream('say(length=5); select.select([0], [], [])')
        self.assertEqual(1, len(processes.having(f'--token={self.id()}')))
        stream.close()
        stream.close()
        self.assertEqual([], processes.having(f'--token={self.id()}'))
        self.assertNothingLeft()

    def test_mover_that_does_not_end_is_killed(self) -> None:
        self.patch_name('nova_snapshot_ext.mover_stream._END_TIMEOUT_S', 0.1)
        stream = self.stream('say(length=5); time.sleep(60)')
        began = time.monotonic()
        stream.close()
        self.assertLess(time.monotonic() - began, 10)

    def test_process_is_found_by_its_argument_and_ended(self) -> None:
        stream = self.stream('say(length=5); time.sleep(60)')
        argument = f'--token={self.id()}'
        self.assertEqual([], processes.having(argument[:-1]))
        processes.end(argument, 'mover')
        self.assertEqual([], processes.having(argument))
        self.assertRaises(exception.TransferFailed, stream.read)

    def test_process_that_ignores_it_is_killed(self) -> None:
        self.patch_name('nova_snapshot_ext.processes._KILL_AFTER_S', 0.2)
        self.stream(
            f'import signal; signal.signal({int(signal.SIGTERM)}, '
            f'signal.SIG_IGN); say(length=5); time.sleep(60)')
        processes.end(f'--token={self.id()}', 'mover')

    def test_process_that_can_not_be_ended_is_an_error(self) -> None:
        self.patch_name('nova_snapshot_ext.processes._END_TIMEOUT_S', 0.1)
        self.patch_name('nova_snapshot_ext.processes.having',
                        lambda argument, program: [2 ** 22 + 1])
        self.assertRaisesRegex(
            exception.UndoFailed, 'The mover 7 does not end',
            processes.end, '--token=7', 'mover 7')


class TestInterpreter(base.TestCase):

    def test_what_to_install_is_said(self) -> None:
        # -I, so whatever a test environment has is not seen: this one here
        # has no libnbd, or it can run the mover.
        why = mover_stream.why_not(sys.executable)
        if why is not None:
            self.assertIn('install python3-libnbd', why)

    def test_able_interpreter_is_asked_again_when_its_mover_failed(
            self) -> None:
        path = self.new_file('python', b'#!/bin/sh\nexit 0\n')
        os.chmod(path, 0o755)
        self.assertIsNone(mover_stream.why_not(path))
        self.new_file('python', b'#!/bin/sh\nexit 1\n')
        self.assertIsNone(mover_stream.why_not(path))
        stream = mover_stream.MoverStream(['/bin/false'])
        self.assertRaises(exception.TransferFailed, stream.prepare)
        self.assertIn('can not run', mover_stream.why_not(path) or '')

    def test_interpreter_that_is_none(self) -> None:
        self.assertIn('/none can not be run',
                      mover_stream.why_not('/none') or '')
        self.assertIn('/bin/false can not run the mover',
                      mover_stream.why_not('/bin/false') or '')
