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

"""The undo log: an ExitStack that survives a crash.

One JSON-lines file for each guest whose snapshot is in flight. Its first line
says whose it is; then each step that changes a guest or leaves something
behind has the line of its undo, flushed to the disk before the step is taken,
and a second line when that undo was run. Leaving the scope, an error, and a
later process that finds the log of a dead one all run the same functions over
the same list, newest first. Every undo may run twice.
"""

import collections.abc
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import json
import os
import stat
import time
import types
import typing

from oslo_log import log as logging

from nova_snapshot_ext import exception
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext import rights

LOG = logging.getLogger(__name__)

VERSION = 1
SUFFIX = '.undo'


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What the undo functions may touch."""

    #: None if the guest is gone
    guest: guests.Guest | None
    host: hosts.Host
    #: the host was booted since: guests are Nova's to start, not ours
    rebooted: bool = False
    #: who pushed the undo is dead, and may have left a call under way; or
    #: lives, and the connection broke that it was made by
    owner_died: bool = False
    #: the uptime in seconds at which the guest was last seen to be reset: its
    #: QEMU is the same since, and its kernel another
    reset_at: float | None = None


Step = collections.abc.Callable[..., None]
#: gives the guest of a libvirt URI and a domain's UUID, None if it is gone
FindGuest = collections.abc.Callable[[str, str], guests.Guest | None]
#: gives the rights on a guest, None for one that is gone
HostFor = collections.abc.Callable[[guests.Guest | None], hosts.Host]
_STEPS: dict[str, Step] = {}


def step(function: Step) -> Step:
    """Register an undo by its name.

    It is called with the :class:`Surroundings` and the arguments that were
    pushed. It may be called twice, and when what it undoes was never done.
    """
    if function.__name__ in _STEPS:
        raise ValueError(f'There are two undo steps {function.__name__}')
    _STEPS[function.__name__] = function
    return function


def uptime() -> float:
    """Seconds since the host was booted, its sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """What names this boot of the host (proc(5), sys/kernel/random)."""
    with open('/proc/sys/kernel/random/boot_id') as file:
        return file.read().strip()


class Entry:
    """One pushed undo."""

    def __init__(self, log: 'UndoLog', number: int, name: str,
                 arguments: dict[str, typing.Any]) -> None:
        self._log = log
        self.number = number
        self.name = name
        self.arguments = arguments
        #: the scope that it was pushed in, None outside of all
        self.scope: object = None

    def run(self) -> None:
        """Run it now and mark it done; nothing if it was run before.

        :raises Exception: whatever the undo raises; it stays in the log
        """
        self._log._run(self)

    def outlive_scope(self) -> None:
        """Let the end of its scope leave it alone; that of the log does not.

        For what stays if all that comes after goes well, and is dropped then.
        """
        self.scope = None

    def drop(self) -> None:
        """Mark it done without running it: nothing is left to undo."""
        self._log._mark_done(self)

    def __str__(self) -> str:
        return str(Pending(self.name, self.arguments, None))


class UndoLog(contextlib.AbstractContextManager['UndoLog']):
    """The written way back of one guest's snapshot; holds its lock."""

    def __init__(self, path: str, descriptor: int,
                 surroundings: Surroundings) -> None:
        """Use :meth:`create` or :meth:`adopt`."""
        self.path = path
        self._descriptor = descriptor
        self.surroundings = surroundings
        self._entries: list[Entry] = []
        self._scopes: list[object] = []
        self._count = 0

    @classmethod
    def create(cls, directory: str, guest: guests.Guest,
               host: hosts.Host) -> 'UndoLog':
        """Begin the log of a guest.

        :param directory: where logs are kept; made if it is not there
        :raises GuestBusy: if another snapshot of the guest is in flight, or
            the way back of a dead one is not finished
        """
        # Sockets may be made below it, which QEMU passes to.
        rights.make_passable(directory)
        path = os.path.join(directory, guest.uuid + SUFFIX)
        descriptor = open_locked(path, os.O_CREAT, guest.name)
        try:
            give_to_owner_of(directory, descriptor)
            try:
                left = read(path, descriptor).pending
            except ValueError as error:
                raise exception.GuestBusy(
                    f'{path} says how to undo a snapshot of {guest.name} '
                    f'that was cut off, and can not be understood: '
                    f'{error}') from error
            if left:
                raise exception.GuestBusy(
                    f'{path} says how to undo a snapshot of {guest.name} '
                    f'that was cut off, which was not finished')
            os.ftruncate(descriptor, 0)
            log = cls(path, descriptor, Surroundings(guest, host))
            log._append({
                'undo_log': VERSION,
                'boot_id': boot_id(),
                'uri': guest.uri,
                'domain': guest.uuid,
                'name': guest.name,
                'pid': os.getpid(),
                'begun': datetime.datetime.now(datetime.UTC).isoformat(),
            })
            flush_directory(directory)
        except BaseException:
            os.close(descriptor)
            raise
        return log

    @classmethod
    def adopt(cls, path: str, find_guest: FindGuest,
              host: hosts.Host | HostFor,
              name: str | None = None,
              reset_at: float | None = None) -> 'UndoLog':
        """Take over the log of a dead process.

        :param host: or what gives one for the guest that was found
        :param name: of the guest, for the message where it is known
        :param reset_at: as in :class:`Surroundings`
        :raises GuestBusy: if its owner lives
        :raises FileNotFoundError: if there is none (any more)
        :raises ValueError: if it can't be understood
        """
        descriptor = open_locked(path, 0, name or path)
        try:
            found = read(path, descriptor)
            drop_cut_line(descriptor)
            guest = find_guest(found.uri, found.domain) if found.uri else None
            surroundings = Surroundings(
                guest, host(guest) if callable(host) else host,
                rebooted=found.boot_id != boot_id(), owner_died=True,
                reset_at=reset_at)
        except BaseException:
            os.close(descriptor)
            raise
        log = cls(path, descriptor, surroundings)
        for number, pending in sorted(found.pending.items()):
            log._entries.append(
                Entry(log, number, pending.step, pending.arguments))
        log._count = max(found.pending, default=0)
        return log

    def push(self, function: Step, within_s: float | None = None,
             **arguments: typing.Any) -> Entry:
        """Write how to undo the step that comes next, and flush it.

        :param function: one registered by :func:`step`
        :param within_s: seconds after which the guard runs it even though
            the owner of the log lives
        :param arguments: for it, of JSON's types
        """
        if _STEPS.get(function.__name__) is not function:
            raise ValueError(f'{function} is not an undo step')
        self._count += 1
        entry = Entry(self, self._count, function.__name__, arguments)
        record = {'entry': entry.number, 'step': entry.name,
                  'arguments': arguments}
        if within_s is not None:
            record['overdue'] = uptime() + within_s
        self._append(record)
        if self._scopes:
            entry.scope = self._scopes[-1]
        self._entries.append(entry)
        return entry

    @contextlib.contextmanager
    def scope(self) -> collections.abc.Iterator['UndoLog']:
        """At its end whatever was pushed within is undone, newest first.

        An outer scope may end before one that was opened within: what was
        pushed in that one stays. So a disk is thawed while its image is kept.
        """
        scope = object()
        self._scopes.append(scope)
        try:
            yield self
        except BaseException:
            self._end_scope(scope, quiet=True)
            raise
        self._end_scope(scope, quiet=False)

    def _end_scope(self, scope: object, quiet: bool) -> None:
        self._scopes.remove(scope)
        self._unwind([entry for entry in self._entries
                      if entry.scope is scope], quiet)

    @property
    def pending(self) -> int:
        """How many steps are left to undo."""
        return len(self._entries)

    @property
    def steps(self) -> tuple[str, ...]:
        """What is left to undo, in the order in which it is."""
        return tuple(str(entry) for entry in reversed(self._entries))

    @contextlib.contextmanager
    def calling(self) -> collections.abc.Iterator[None]:
        """While a call of libvirt is made that may go on without us.

        If its connection breaks, nobody knows how it ends: the way back has
        to look, as it does for an owner that died.
        """
        try:
            yield
        except guests.LibvirtError as error:
            if error.of_connection:
                self.surroundings = dataclasses.replace(
                    self.surroundings, owner_died=True)
            raise

    def unwind(self) -> None:
        """Undo everything, newest first; the log goes if all of it worked.

        :raises UndoFailed: if some of it did not
        """
        try:
            self._unwind(self._entries, quiet=False)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the log; it is deleted if nothing is left to undo."""
        if self._descriptor < 0:
            return
        if not self._entries:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        os.close(self._descriptor)
        self._descriptor = -1

    def __exit__(self, kind: type[BaseException] | None,
                 error: BaseException | None,
                 traceback: types.TracebackType | None) -> None:
        try:
            self._unwind(self._entries, quiet=error is not None)
        finally:
            self.close()

    def _unwind(self, entries: list[Entry], quiet: bool) -> None:
        failures = []
        for entry in reversed(list(entries)):
            try:
                entry.run()
            except Exception as error:
                LOG.exception('Undoing failed, and stays in %(log)s: '
                              '%(entry)s',
                              {'log': self.path, 'entry': entry})
                failures.append(f'{entry.name}: {error}')
        if failures and not quiet:
            raise exception.UndoFailed(
                f'{self.path} is kept; ' + '; '.join(failures))

    def _run(self, entry: Entry) -> None:
        if entry not in self._entries:
            return
        Pending(entry.name, entry.arguments, None).run(self.surroundings)
        self._mark_done(entry)

    def _mark_done(self, entry: Entry) -> None:
        if entry in self._entries:
            self._entries.remove(entry)
            # Without room for the mark, whoever reads the log runs the undo
            # again, which does no harm.
            with contextlib.suppress(OSError):
                self._append({'entry': entry.number, 'done': True})

    def _append(self, record: dict[str, typing.Any]) -> None:
        append(self._descriptor, self.path, record)


def append(descriptor: int, path: str,
           record: dict[str, typing.Any]) -> None:
    """Append a line to a file of JSON lines, and flush it.

    One write: a reader, or a crash, finds a whole line or a last one without
    its end, which was then not followed by its step.

    :raises OSError: if it could not be written whole; the file is as before
    """
    line = json.dumps(record).encode() + b'\n'
    if os.write(descriptor, line) != len(line):
        drop_cut_line(descriptor)
        raise OSError(f'{path} could not be written')
    os.fsync(descriptor)


def drop_cut_line(descriptor: int) -> None:
    """Cut a last line without its end: what is appended would join it."""
    os.ftruncate(descriptor, _content(descriptor).rfind(b'\n') + 1)


def _content(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def open_locked(path: str, flags: int, name: str) -> int:
    """Open a log and take its lock, as long as it is the one in the folder.

    The lock goes with the last descriptor, and children get none: a lock
    that can be had says that its owner is dead.

    :raises GuestBusy: if somebody has it
    :raises NotOurs: if it is no file, or has another name as well: who is
        root must not write or give away what a link leads to
    """
    while True:
        descriptor = os.open(
            path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            | flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(descriptor)
            if os.path.samestat(status, os.stat(path)):
                _check_plain(status, path)
                return descriptor
        except exception.NotOurs:
            os.close(descriptor)
            raise
        except BlockingIOError:
            os.close(descriptor)
            raise exception.GuestBusy(
                f'Another snapshot of {name} is in flight') from None
        except FileNotFoundError:
            pass
        # Its owner deleted it between our open and our lock.
        os.close(descriptor)


def _check_plain(status: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise exception.NotOurs(path, 'it is not a file')
    if status.st_nlink != 1:
        raise exception.NotOurs(path, 'it has other names as well')


@dataclasses.dataclass(frozen=True)
class Pending:
    """An undo that a log holds and that was not run."""

    step: str
    arguments: dict[str, typing.Any]
    #: the uptime in seconds after which it must not wait for its owner
    overdue: float | None

    def run(self, around: Surroundings) -> None:
        """Run it, without a mark in the log."""
        function = _STEPS.get(self.step)
        if function is None:
            raise exception.UndoFailed(
                f'No installed flow or transfer knows how to {self.step}')
        function(around, **self.arguments)

    def __str__(self) -> str:
        return f'{self.step} {json.dumps(self.arguments)}'


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a log says."""

    #: of libvirt's connection; '' in a log without a whole first line
    uri: str
    #: the domain's UUID
    domain: str
    boot_id: str
    #: what is left to undo, by number
    pending: dict[int, Pending]


def read(path: str, descriptor: int | None = None) -> Contents:
    """Read a log, whoever holds it.

    A last line that was cut off counts as not written: its step was not
    taken.

    :param descriptor: where its lock is held, which is read then: another
        file may have its path by now
    :raises FileNotFoundError: if there is none
    :raises ValueError: if a whole line can't be understood
    """
    records = read_records(path, descriptor)
    if not records:
        return Contents('', '', '', {})
    try:
        head = records[0]
        if head['undo_log'] != VERSION:
            raise ValueError(
                f'{path} is an undo log of version {head["undo_log"]}; '
                f'this is for version {VERSION}')
        pending: dict[int, Pending] = {}
        for record in records[1:]:
            if record.get('done'):
                pending.pop(record['entry'], None)
            else:
                pending[_typed(record, 'entry', int)] = Pending(
                    _typed(record, 'step', str),
                    _typed(record, 'arguments', dict),
                    record.get('overdue') and float(record['overdue']))
        return Contents(
            _typed(head, 'uri', str), _typed(head, 'domain', str),
            _typed(head, 'boot_id', str), pending)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f'{path} is not an undo log: {error}') from error


def _typed(record: dict[str, typing.Any], name: str,
           kind: type) -> typing.Any:
    if type(record[name]) is not kind:
        raise TypeError(f'{name} is {record[name]!r}')
    return record[name]


def read_records(path: str,
                 descriptor: int | None = None) -> list[typing.Any]:
    """The whole lines of a file of JSON lines.

    :param descriptor: as for :func:`read`
    :raises ValueError: if one is not JSON
    """
    if descriptor is None:
        with open(path, 'rb') as file:
            content = file.read()
    else:
        content = _content(descriptor)
    lines = content.split(b'\n')[:-1]
    try:
        return [json.loads(line) for line in lines]
    except RecursionError as error:
        raise ValueError(f'{path} holds no JSON') from error


def logs_in(directory: str, suffix: str = SUFFIX) -> list[str]:
    """The path of every log in a directory, which need not exist."""
    try:
        return sorted(os.path.join(directory, name)
                      for name in os.listdir(directory)
                      if name.endswith(suffix))
    except FileNotFoundError:
        return []


def finish_left_over(directory: str, guest: guests.Guest,
                     host: hosts.Host) -> None:
    """Run what a dead process left of an earlier snapshot of a guest.

    :raises GuestBusy: if it is not dead
    :raises UndoFailed: if something can't be undone
    """
    path = os.path.join(directory, guest.uuid + SUFFIX)
    try:
        log = UndoLog.adopt(
            path, lambda uri, uuid: guest, host, guest.name)
    except (FileNotFoundError, ValueError):
        return      # create() says what is wrong with it
    log.unwind()


def give_to_owner_of(directory: str, descriptor: int) -> None:
    """Let root make no log that the directory's owner could not finish."""
    owner = os.stat(directory)
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def flush_directory(directory: str) -> None:
    """Have what was made or renamed in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def with_guest(function: collections.abc.Callable[..., None]) -> Step:
    """For undo steps of a guest that runs: done if the guest is gone.

    Also done after a reboot of the host: whatever was changed in the guest
    went with it, and its power is Nova's to decide.
    """
    @functools.wraps(function)
    def wrapper(around: Surroundings, **arguments: typing.Any) -> None:
        if around.guest is None or around.rebooted:
            return
        try:
            function(around, around.guest, **arguments)
        except exception.GuestGone:
            pass
    return wrapper
