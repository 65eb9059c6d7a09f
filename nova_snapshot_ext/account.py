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

"""What one snapshot did and how it ended, in one line of the log.

The line is for programs as much as for people: ``Snapshot ended:`` and then
``name=value`` for each of :data:`NAMES`, all of them, in this order, ``-``
where something is not known. Names stay as they are; new ones come at the end.
"""

import collections.abc
import contextlib
import dataclasses
import json
import re
import time
import typing

from oslo_log import log as logging

from nova_snapshot_ext import exception

LOG = logging.getLogger(__name__)

OK = 'ok'
FAILED = 'failed'
#: nobody wanted it any more
CANCELLED = 'cancelled'

#: as flow, where none of ours served
NOVA = 'nova'

#: the phases, in the order in which they come
PHASES = ('wait', 'plan', 'freeze', 'transfer', 'publish', 'release')

#: the names of the line, as documented in doc/source/admin/monitoring.rst
NAMES = (
    'outcome', 'instance', 'image', 'request', 'flow', 'transfer',
    'consistency', 'guest_pause_ms', 'disks', 'image_bytes', 'read_bytes',
    'sent_bytes', 'staged_bytes', 'scratch_bytes', 'read_mib_s',
    'sent_mib_s', *(f'{phase}_s' for phase in PHASES), 'total_s', 'error',
    'reason')

Value = str | int | float | None
Errors = tuple[type[BaseException], ...]

_P = typing.ParamSpec('_P')
_R = typing.TypeVar('_R')

_MIB = 1024 ** 2
_UNWANTED = (exception.GuestGone, exception.ImageGone, exception.Preempted,
             KeyboardInterrupt)
_PLAIN = re.compile(r'[!#-<>-~]+')


@dataclasses.dataclass
class Account:
    """What is known of one snapshot by now; None where nothing is."""

    #: ids, as far as there are such
    instance: str | None = None
    image: str | None = None
    request: str | None = None
    #: the flow that served, or was tried last
    flow: str | None = None
    transfer: str | None = None
    consistency: str | None = None
    #: how many it is of
    disks: int | None = None
    #: of the images of all disks
    image_bytes: int | None = None
    #: of the frozen disk, zeroes that were looked for included
    read_bytes: int | None = None
    #: to the image service, by all attempts together
    sent_bytes: int | None = None
    #: into the staging directory
    staged_bytes: int | None = None
    #: each says, when it is asked, for how many seconds the guest stood still,
    #: or could not write
    pauses: list[collections.abc.Callable[[], float]] = dataclasses.field(
        default_factory=list)
    #: what the flow put on the host's disk for the disk to stay frozen
    scratch_bytes: int | None = None
    outcome: str = OK
    #: the name of the error's class, and its words
    error: str | None = None
    reason: str | None = None
    #: whether it was begun by this process, which knows how long it took
    ours: bool = True

    def __post_init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._began = self._phase_ended = time.monotonic()
        self._ended: float | None = None
        #: of each image, what this attempt has sent, and how long it is
        self._sending: dict[int, tuple[int, int]] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> collections.abc.Iterator[None]:
        """Count the seconds of a scope as those of a phase."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._phase_ended = time.monotonic()
            self._seconds[name] = self._spent(name) + (
                self._phase_ended - began)

    def _spent(self, phase: str) -> float:
        return self._seconds.get(phase, 0.0)

    def timed(self, name: str, do: collections.abc.Callable[_P, _R],
              ) -> collections.abc.Callable[_P, _R]:
        """A function whose seconds count as those of a phase."""
        def timed(*arguments: _P.args, **named: _P.kwargs) -> _R:
            with self.phase(name):
                return do(*arguments, **named)
        return timed

    @contextlib.contextmanager
    def waited(self, turn: contextlib.AbstractContextManager[object],
               ) -> collections.abc.Iterator[None]:
        """Have one's turn while the scope lasts.

        :param turn: a lock; how long it is waited for counts
        """
        with contextlib.ExitStack() as stack:
            with self.phase('wait'):
                stack.enter_context(turn)
            yield

    def read(self, more: int) -> None:
        """So many bytes more were read of the frozen disk."""
        self.read_bytes = (self.read_bytes or 0) + more

    def sent(self, image: int, done: int, total: int) -> None:
        """So many bytes of an image were sent, by this attempt.

        :param image: which of the snapshot's it is
        """
        before, _ = self._sending.get(image, (0, 0))
        if done < before:
            before = 0
        self.sent_bytes = (self.sent_bytes or 0) + done - before
        self._sending[image] = done, total
        self.image_bytes = sum(
            length for _, length in self._sending.values())

    def fail(self, error: BaseException, unwanted: Errors = ()) -> None:
        """It ends by an error, which may be ours as Nova knows it.

        :param unwanted: kinds of errors, beside ours, that say that nobody
            wants it any more
        """
        # One of ours may have another as its cause, which says less.
        if not isinstance(error, exception.SnapshotError) and isinstance(
                error.__cause__, exception.SnapshotError):
            error = error.__cause__
        self.outcome = CANCELLED if isinstance(
            error, (*_UNWANTED, *unwanted)) else FAILED
        self.error = type(error).__name__
        self.reason = exception.shown(error) or None

    def end(self) -> None:
        """Nothing more is done: the release ends here."""
        self._ended = time.monotonic()

    def values(self) -> dict[str, Value]:
        """Of each name of :data:`NAMES`, what is known now."""
        now = time.monotonic() if self._ended is None else self._ended
        seconds: dict[str, float | None] = {
            phase: self._seconds.get(phase) for phase in PHASES}
        if self.ours:
            # What comes after all else, and what was let go before it.
            seconds['release'] = (
                self._spent('release') + now - self._phase_ended)
        sending_s = seconds['publish']
        found: dict[str, Value] = {
            name: getattr(self, name) for name in NAMES
            if name in self.__dataclass_fields__}
        found |= {f'{phase}_s': _rounded(spent)
                  for phase, spent in seconds.items()}
        found |= {
            'guest_pause_ms': round(1000 * sum(
                pause() for pause in self.pauses)) if self.pauses else None,
            'read_mib_s': _rate(self.read_bytes, sending_s),
            'sent_mib_s': _rate(self.sent_bytes, sending_s),
            'total_s': _rounded(now - self._began) if self.ours else None}
        return {name: found[name] for name in NAMES}

    def line(self) -> str:
        """What is logged."""
        return 'Snapshot ended: ' + ' '.join(
            f'{name}={_written(value)}'
            for name, value in self.values().items())


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _rate(bytes_: int | None, seconds: float | None) -> float | None:
    if not bytes_ or not seconds:
        return None
    return round(bytes_ / _MIB / seconds, 1)


def _written(value: Value) -> str:
    """A value without blanks, or in quotes."""
    if value is None:
        return '-'
    words = str(value)
    return words if _PLAIN.fullmatch(words) else json.dumps(
        words, ensure_ascii=False)


def _tell_nobody(account: Account) -> None:
    """For whoever reads the log only."""


@contextlib.contextmanager
def told(account: Account,
         tell: collections.abc.Callable[[Account], object] = _tell_nobody,
         unwanted: Errors = ()) -> collections.abc.Iterator[Account]:
    """Say at the end of the scope, whatever the end, what was done.

    :param tell: is given the account too; what it raises changes nothing
    :param unwanted: see :meth:`Account.fail`
    """
    try:
        yield account
    except BaseException as error:
        account.fail(error, unwanted)
        raise
    finally:
        say(account, tell)


def say(account: Account,
        tell: collections.abc.Callable[[Account], object] = _tell_nobody,
        ) -> None:
    """Say what one did that has ended; see :func:`told`."""
    account.end()
    LOG.info('%s', account.line())
    try:
        tell(account)
    except Exception as error:
        LOG.warning('Nobody but the log is told how a snapshot ended: %s',
                    error)


def parsed(line: str) -> dict[str, str]:
    """The names and values of a line, quotes taken off.

    :param line: as :meth:`Account.line` writes it, whatever is before it
    """
    _, _, words = line.partition('Snapshot ended: ')
    found: dict[str, typing.Any] = {}
    for name, quoted, plain in re.findall(
            r'(\w+)=(?:("(?:[^"\\]|\\.)*")|(\S+))', words):
        found[name] = json.loads(quoted) if quoted else plain
    return found
