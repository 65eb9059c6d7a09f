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

"""Finish what dead processes left of their snapshots, without Nova."""

import collections.abc
import contextlib
import dataclasses
import enum
import fcntl
import os

import libvirt

from nova_snapshot_ext import exception
from nova_snapshot_ext import guard as guards
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext import plugins
from nova_snapshot_ext import undo


class Outcome(enum.Enum):
    """What became of a log."""

    DONE = 'done'
    #: what would be done; nothing was
    WOULD = 'would be done'
    #: its owner, or its guard, is at work
    BUSY = 'in flight'
    FAILED = 'failed'


@dataclasses.dataclass(frozen=True)
class Finding:
    """One log, and what became of it."""

    path: str
    outcome: Outcome
    #: the domain that it is of, as libvirt or the log names it; '' if that
    #: can't be said
    domain: str = ''
    #: what was left to undo, in the order in which it is
    steps: tuple[str, ...] = ()
    #: for an operator
    words: str = ''


class NovasGuest(hosts.PlainHost):
    """Whoever is not Nova does not start a guest of Nova's, and writes to no
    disk that Nova may be at work on."""

    def may_start(self) -> contextlib.AbstractContextManager[bool]:
        """:raises UndoFailed: always, so that the undo stays in the log"""
        raise exception.UndoFailed(
            'it is not started, because whether it should run is for Nova to '
            'say: start nova-compute, or use --force')

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """:raises UndoFailed: always"""
        raise exception.UndoFailed(
            'its disk is not written to, because it is off, and Nova may be '
            'moving it: start nova-compute, or use --force')


def host_for(guest: guests.Guest | None, force: bool) -> hosts.PlainHost:
    """The rights that the command line has on a guest."""
    if guest is not None and not force and guest.belongs_to_nova():
        return NovasGuest()
    return hosts.PlainHost()


def recover(directory: str, dry_run: bool, force: bool,
            ) -> collections.abc.Iterator[Finding]:
    """Run what is left in the logs of a directory whose owners are dead.

    :param dry_run: only look
    :param force: start guests of Nova's too
    """
    plugins.load_all()
    for path in undo.logs_in(directory):
        try:
            found = (_look if dry_run else _finish)(path, force)
        except FileNotFoundError:
            continue        # its owner, or its guard, has just ended
        except exception.GuestBusy:
            found = Finding(path, Outcome.BUSY, words=(
                'a living process takes this snapshot, or undoes it'))
        except ValueError as error:
            found = Finding(path, Outcome.FAILED, words=(
                f'it can not be understood: {error}. Undo by hand what its '
                f'lines without "done" say, and delete it'))
        except (exception.SnapshotError, libvirt.libvirtError,
                OSError) as error:
            found = Finding(path, Outcome.FAILED, words=str(error))
        yield found


def _look(path: str, force: bool) -> Finding:
    with open(path, 'rb') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise exception.GuestBusy(path) from None
        contents = undo.read(path, file.fileno())
    words = ''
    if contents.boot_id != undo.boot_id():
        words = 'from before a reboot: nothing is done to the guest itself'
    elif contents.uri:
        guest = guards.find_guest(contents.uri, contents.domain)
        if guest is None:
            words = 'the guest is gone'
        elif isinstance(host_for(guest, force), NovasGuest):
            words = ("the guest is Nova's: while it is off, it is not "
                     "started and its disk is not written to without "
                     "--force")
    return Finding(path, Outcome.WOULD, contents.domain, _steps(contents),
                   words)


def _finish(path: str, force: bool) -> Finding:
    log = undo.UndoLog.adopt(path, guards.find_guest,
                             lambda guest: host_for(guest, force))
    domain = os.path.basename(path).removesuffix(undo.SUFFIX)
    steps = log.steps
    try:
        log.unwind()
    except exception.UndoFailed as error:
        return Finding(path, Outcome.FAILED, domain, steps, str(error))
    return Finding(path, Outcome.DONE, domain, steps)


def _steps(contents: undo.Contents) -> tuple[str, ...]:
    return tuple(str(pending) for _, pending in
                 sorted(contents.pending.items(), reverse=True))
