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

"""The guard: a process that brings a guest back when its owner can not.

It watches a pipe to the process that takes the snapshot. When that closes,
the process is dead or done; the guard takes the undo log's lock and runs what
is left in it. While the process lives, it runs only what is overdue: a guest
is not left frozen because something else hangs.
"""

import argparse
import collections.abc
import contextlib
import fcntl
import functools
import os
import select
import signal
import subprocess
import sys
import termios
import threading
import time
import types

import libvirt
from oslo_log import log as logging

from nova_snapshot_ext import exception
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext import plugins
from nova_snapshot_ext import processes
from nova_snapshot_ext import undo

LOG = logging.getLogger(__name__)

_READY = b'r'
_START_TIMEOUT_S = 60.0
_POLL_S = 0.25
# How long an owner waits for its guard to end. A guard with something left
# to do goes on by itself.
_END_TIMEOUT_S = 10.0
# How long a guard goes on trying: a libvirt that is restarted or upgraded
# comes back in that time. Recovery at Nova's start is what remains then.
_RETRY_TIMEOUT_S = 3600.0
_RETRY_S = 1.0
# The first time at once: whoever dies lets go of the guard a moment before
# its log.
_FIRST_RETRY_S = 0.05
_LONGEST_RETRY_S = 60.0
# How often a guard looks whether it still hears of the guest.
_LISTEN_AGAIN_S = 1.0
# How long it tries what an owner that lives is late with. It does so anew
# when that one ends.
_LATE_TIMEOUT_S = 600.0
# How long a guard may start a guest, or write to its disk, on its own, once
# it is off and nothing is under way: nobody can have decided otherwise about
# a guest whose snapshot has just ended. Later only Nova knows.
_START_TIMEOUT_OF_GUEST_S = 120.0


class Guard(contextlib.AbstractContextManager['Guard']):
    """The guard's life, in the process that it guards.

    Enter it before the undo log and start it with :meth:`watch`: it then
    ends after the log.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._log: undo.UndoLog | None = None
        self._said = b''

    def watch(self, log: undo.UndoLog) -> None:
        """Start the guard of a log, and wait until it stands.

        :raises FreezeFailed: if it can't be started
        """
        self._log = log
        # A session of its own: a signal for our group is not for the guard.
        self._process = subprocess.Popen(  # nosec B603 # ourselves, no shell
            [sys.executable, '-P', '-m', 'nova_snapshot_ext.guard',
             log.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True)
        assert self._process.stdout is not None
        answer = self._process.stdout.fileno()
        # Asked for now and then, not waited for: under eventlet a read
        # would hold up every greenlet.
        os.set_blocking(answer, False)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                if os.read(answer, 1) == _READY:
                    return
                break
            except BlockingIOError:
                time.sleep(0.02)
        raise exception.FreezeFailed(
            f'The guard of {log.path} did not start')

    def __exit__(self, kind: type[BaseException] | None,
                 error: BaseException | None,
                 traceback: types.TracebackType | None) -> None:
        if self._log is not None and self._log.pending:
            # Not left to the guard, which would not ask its owner's host
            # whether the guest is still to be started.
            threading.Thread(target=self._go_on, args=(self._log,),
                             daemon=True).start()
        else:
            self._end()

    def _go_on(self, log: undo.UndoLog) -> None:
        """Try again what could not be undone, with the guard at its post."""
        done = bring_back(log.path, lambda uri, uuid: log.surroundings.guest,
                          log.surroundings.host, self._reset_at)
        if not done and self._process is not None:
            self._process.kill()
        self._end()

    def _reset_at(self) -> float | None:
        """What the guard says of it: see :class:`Resets`."""
        if self._process is not None and self._process.stdout is not None:
            pipe = self._process.stdout.fileno()
            # Under eventlet a read would wait until something is said.
            there = int.from_bytes(fcntl.ioctl(
                pipe, termios.FIONREAD, bytes(4)), sys.byteorder)
            self._said += os.read(pipe, there) if there else b''
        lines = self._said.split(b'\n')[:-1]
        return float(lines[-1]) if lines else None

    def _end(self) -> None:
        if self._process is None:
            return
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        if not processes.ends_within(self._process, _END_TIMEOUT_S):
            LOG.error('The guard %d does not end', self._process.pid)


class GuardHost(hosts.PlainHost):
    """What a guard may do with a guest that is off: to start it, or write to
    its disk, only soon after that could be done.

    A guest that is up and paused may be resumed at any time.
    """

    def __init__(self) -> None:
        self._deadline: float | None = None

    def may_start(self) -> contextlib.AbstractContextManager[bool]:
        """:raises UndoFailed: when it is too late for that"""
        self._check_soon('The guest is not started: whether it should run')
        return super().may_start()

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """:raises UndoFailed: when it is too late for that"""
        self._check_soon('Nothing is written to the disk of a guest that is '
                         'off: whether it is here, and left alone,')
        return super().undisturbed()

    def _check_soon(self, what: str) -> None:
        now = time.monotonic()
        if self._deadline is None:
            # How long its memory was saved does not count.
            self._deadline = now + _START_TIMEOUT_OF_GUEST_S
        if now > self._deadline:
            raise exception.UndoFailed(f'{what} by now is for Nova to say')


def find_guest(uri: str, uuid: str) -> guests.Guest | None:
    """A domain of a libvirt, None if it does not exist.

    :raises libvirt.libvirtError: if libvirt can't be asked
    """
    try:
        return guests.Guest.find(libvirt.open(uri), uri, uuid)
    except exception.GuestGone:
        return None


class Resets:
    """Sees that a guest is reset, for as long as this process lives.

    Its QEMU and its number for libvirt stay the same then: only libvirt's
    event tells. Its owner gets a line for each, with the uptime in seconds.
    """

    def __init__(self, path: str) -> None:
        """:param path: of the undo log of a snapshot of the guest"""
        self._path = path
        self._connection: libvirt.virConnect | None = None
        self._try_at = time.monotonic()
        self._at: float | None = None

    def at(self) -> float | None:
        """The uptime in seconds at which it was seen last."""
        return self._at

    def listen(self) -> None:
        """Begin, or begin anew where the connection broke."""
        if time.monotonic() < self._try_at:
            return
        self._try_at = time.monotonic() + _LISTEN_AGAIN_S
        try:
            if self._connection is not None and self._connection.isAlive():
                return
            log = undo.read(self._path)
            if log.uri:
                self._listen(log.uri, log.domain)
        except (libvirt.libvirtError, exception.SnapshotError, OSError,
                ValueError) as error:
            LOG.debug('It is not seen whether the guest of %s is reset: %s',
                      self._path, error)

    def _listen(self, uri: str, uuid: str) -> None:
        run_event_loop()
        connection = libvirt.open(uri)
        if not guests.Guest.find(connection, uri, uuid).has_agent():
            # It is never frozen: nobody wants to know.
            connection.close()
            self._try_at = float('inf')
            return
        connection.domainEventRegisterAny(
            connection.lookupByUUIDString(uuid),
            libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, self._is_reset, None)
        # Where that failed it is tried again.
        self._connection = connection

    def _is_reset(self, connection: object, domain: object,
                  nothing: object) -> None:
        self._at = undo.uptime()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.buffer.write(f'{self._at}\n'.encode())
            sys.stdout.buffer.flush()


@functools.cache
def run_event_loop() -> None:
    """Run libvirt's event loop in a thread; before the first connection."""
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()
    threading.Thread(target=run, daemon=True).start()


def _stand_guard(path: str, resets: Resets) -> None:
    """Return when the owner's end of the pipe closes."""
    sys.stdout.buffer.write(_READY)
    sys.stdout.buffer.flush()
    resets.listen()
    # What the undos need takes longer than all else: nobody waits for it.
    plugins.load_all()
    late: dict[int, _Late] = {}
    while not select.select([sys.stdin], [], [], _POLL_S)[0]:
        resets.listen()
        try:
            log = undo.read(path)
        except (FileNotFoundError, ValueError):
            continue
        for number, pending in sorted(log.pending.items(), reverse=True):
            if pending.overdue is None or pending.overdue > undo.uptime():
                continue
            late.setdefault(number, _Late()).run(
                pending, log, path, resets.at())


class _Late:
    """An undo whose owner lives, and is late."""

    def __init__(self) -> None:
        #: None when it is done, or given up
        self._next: float | None = time.monotonic()
        self._wait_s = _RETRY_S
        self._deadline = time.monotonic() + _LATE_TIMEOUT_S

    def run(self, pending: undo.Pending, log: undo.Contents,
            path: str, reset_at: float | None) -> None:
        """Run it, if it is time to.

        What fails is tried again less and less often: whoever does not
        answer, such as a guest agent that is dead, is not kept busy, nor is
        the guard when its owner dies.
        """
        if self._next is None or time.monotonic() < self._next:
            return
        LOG.warning('Its owner is late: running %s of %s',
                    pending.step, path)
        try:
            pending.run(undo.Surroundings(
                find_guest(log.uri, log.domain), hosts.PlainHost(),
                reset_at=reset_at))
        except Exception as error:
            now = time.monotonic()
            if now > self._deadline:
                self._next = None
                LOG.error('%s of %s is left to its owner, or to when that '
                          'ends: %s', pending.step, path, error)
            else:
                self._next = now + self._wait_s
                self._wait_s = _longer(self._wait_s)
                LOG.warning('%s of %s failed: %s', pending.step, path, error)
        else:
            self._next = None


def _longer(wait_s: float) -> float:
    return min(max(wait_s * 1.5, _RETRY_S), _LONGEST_RETRY_S)


def main() -> int:
    """The process: one argument, the undo log's path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('undo_log')
    path = parser.parse_args().undo_log
    # A service manager signals the whole group when it stops the owner,
    # which may go on for minutes: the pipe tells when it is dead.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    resets = Resets(path)
    _stand_guard(path, resets)
    return 0 if bring_back(
        path, find_guest, GuardHost(), resets.at) else 1


def _never() -> float | None:
    return None


def bring_back(path: str, find: undo.FindGuest,
               host: hosts.Host | undo.HostFor,
               reset_at: collections.abc.Callable[[], float | None] = _never,
               ) -> bool:
    """Run what is left in the log of an owner that is dead or done.

    What fails is tried again for an hour.

    :param reset_at: gives the uptime in seconds at which the guest was last
        seen to be reset
    :returns: whether nothing is left
    """
    deadline = time.monotonic() + _RETRY_TIMEOUT_S
    wait_s = _FIRST_RETRY_S
    while True:
        try:
            undo.UndoLog.adopt(
                path, find, host, reset_at=reset_at()).unwind()
            return True
        except FileNotFoundError:
            return True
        except ValueError:
            LOG.exception('%s can not be understood', path)
            return False
        except (libvirt.libvirtError, exception.SnapshotError,
                OSError) as error:
            if time.monotonic() > deadline:
                LOG.error("%s is left for nova-compute's next start: %s",
                          path, error)
                return False
            LOG.warning('%s is tried again in %.2f s: %s', path, wait_s,
                        error)
            time.sleep(wait_s)
            wait_s = _longer(wait_s)


if __name__ == '__main__':
    result = main()
    sys.stderr.flush()
    # To take down what was imported takes time that our owner waits for.
    os._exit(result)
