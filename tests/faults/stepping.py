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

"""The process whose children are the command line, held at each step.

Usage: python -m tests.faults.stepping SOCKET

It reads one JSON document a line, forks the command line with that, and
prints the child's process id, and in the end its wait status. It has imported
everything already, which takes a second.

A child tells each step at SOCKET by a line, and goes on when it is sent a
byte. A step is a line of the undo log, a call that changes the guest, or a
part of the upload.
"""

import collections.abc
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import typing

from oslo_concurrency import processutils

from nova_snapshot_ext.cmd import snapshot as cli
from nova_snapshot_ext import domain_records
from nova_snapshot_ext import guard
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext.images import base as images
from nova_snapshot_ext.images import directory
from nova_snapshot_ext.images import glance
from nova_snapshot_ext import plugins
from nova_snapshot_ext import snapshot
from nova_snapshot_ext import undo

#: what changes a guest
CALLS = ('save_memory', 'start', 'suspend', 'resume', 'begin_backup',
         'start_copy', 'end_block_job', 'end_backup', 'freeze_filesystems',
         'thaw_filesystems', 'take_domain_snapshot', 'revert_to',
         'define_domain_snapshot', 'forget_domain_snapshot', 'destroy',
         'take_external_snapshot', 'restore_memory', 'define_disks',
         'start_commit', 'pivot')
#: what is worth being held at of qemu-img's commands
COMMANDS = ('create', 'snapshot', 'convert', 'commit', 'rebase')

#: the exit code of one that ended by an error that it should have caught
FAILED = 70

Function = collections.abc.Callable[..., typing.Any]


class Steps:
    """Tells each step, and waits to go on."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        #: the log is there: what comes before changes nothing
        self._begun = False
        self._names: dict[int, str] = {}

    def reached(self, name: str) -> None:
        # The threads beside a snapshot go on while it is held.
        if (not self._begun
                or threading.current_thread() is not threading.main_thread()):
            return
        self._socket.sendall(f'{name}\n'.encode())
        self._socket.recv(1)

    def wrote(self, record: dict[str, typing.Any]) -> None:
        """A line of the undo log is on the disk."""
        if 'undo_log' in record:
            self._begun = True
            self.reached('log begun')
        elif 'done' in record:
            name = self._names.get(record['entry'], "a dead one's step")
            self.reached(f'{name} done')
        else:
            self._names[record['entry']] = record['step']
            self.reached(f'{record["step"]} written')

    def after(self, function: Function, name: str) -> Function:
        """Make a function one that is a step when it returns."""
        @functools.wraps(function)
        def stepping(*arguments: typing.Any, **more: typing.Any) -> typing.Any:
            result = function(*arguments, **more)
            self.reached(name)
            return result
        return stepping

    def install(self) -> None:
        """Patch what has steps."""
        for name in CALLS:
            setattr(guests.Guest, name, self.after(
                getattr(guests.Guest, name), f'{name} returned'))
        for owner, name, step in (
                (guard.Guard, 'watch', 'guard stands'),
                (snapshot._Taking, '_freeze', 'frozen'),
                (domain_records.Records, 'add', 'record added'),
                (directory.DirectoryService, 'publish', 'published'),
                (glance.GlanceService, 'publish', 'published')):
            setattr(owner, name, self.after(getattr(owner, name), step))
        self._watch_log()
        self._watch_upload()
        self._watch_glance()
        self._watch_qemu_img()

    def _watch_log(self) -> None:
        append = undo.UndoLog._append

        def appending(log: undo.UndoLog,
                      record: dict[str, typing.Any]) -> None:
            append(log, record)
            self.wrote(record)

        setattr(undo.UndoLog, '_append', appending)

    def _watch_upload(self) -> None:
        read = images.CountedReader.read

        def reading(reader: typing.Any, size: int = -1) -> bytes:
            before = reader._done
            chunk: bytes = read(reader, size)
            if not before:
                self.reached('upload begun')
            if before < reader._length / 2 <= reader._done:
                self.reached('half of it sent')
            return chunk

        setattr(images.CountedReader, 'read', reading)

    def _watch_glance(self) -> None:
        request = glance.GlanceService._request

        def requesting(service: typing.Any, method: str, path: str,
                       **arguments: typing.Any) -> typing.Any:
            what = 'bytes' if path.endswith('/file') else 'image'
            self.reached(f'{method} of the {what}')
            return request(service, method, path, **arguments)

        setattr(glance.GlanceService, '_request', requesting)

    def _watch_qemu_img(self) -> None:
        execute = processutils.execute

        def executing(*command: str, on_execute: Function,
                      **more: typing.Any) -> typing.Any:
            def started(process: typing.Any) -> None:
                on_execute(process)
                if command[0] == 'qemu-img' and command[1] in COMMANDS:
                    self._hold(process, f'qemu-img {command[1]}')
            return execute(*command, on_execute=started, **more)

        setattr(processutils, 'execute', executing)

    def _hold(self, process: typing.Any, name: str) -> None:
        """Hold qemu-img too, which would be at its end at once."""
        try:
            # Until it is itself: something may set its limits before.
            while not _runs(process.pid, 'qemu-img'):
                time.sleep(0.002)
            os.kill(process.pid, signal.SIGSTOP)
            self.reached(name)
            os.kill(process.pid, signal.SIGCONT)
        except (FileNotFoundError, ProcessLookupError):
            # It has ended.
            self.reached(name)


def _runs(pid: int, name: str) -> bool:
    with open(f'/proc/{pid}/stat') as file:
        found = file.read()
    return f'({name})' in found or ') Z ' in found


def _child(path: str, wanted: dict[str, typing.Any]) -> int:
    with open(wanted['output'], 'ab') as output, open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(wanted['environment'])
    try:
        Steps(path).install()
        return cli.main(wanted['arguments'])
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return FAILED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> None:
    plugins.load_all()
    print('ready', flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os._exit(_child(sys.argv[1], json.loads(line)))
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == '__main__':
    main()
