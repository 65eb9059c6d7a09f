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

"""Files served as NBD exports by qemu-nbd, read-only, formats named."""

import collections.abc
import contextlib
import os
import subprocess
import time
import typing

from nova_snapshot_ext import disk
from nova_snapshot_ext import exception
from nova_snapshot_ext import frozen
from nova_snapshot_ext import processes
from nova_snapshot_ext import rights
from nova_snapshot_ext import undo

_START_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 5.0


@undo.step
def end_server(around: undo.Surroundings, socket: str) -> None:
    """End the qemu-nbd of a socket; its command line tells which it is.

    :param socket: in a directory of ours
    :raises UndoFailed: if it can't be ended
    """
    if not rights.is_ours(os.path.dirname(socket)):
        raise ValueError(f'{socket} is not a socket of ours')
    processes.end(f'--socket={socket}', f'qemu-nbd of {socket}')
    with contextlib.suppress(FileNotFoundError):
        os.unlink(socket)


@contextlib.contextmanager
def serving(
        options: dict[str, typing.Any], socket: str, target: str,
        capacity: int, log: undo.UndoLog, snapshot: str | None = None,
) -> collections.abc.Iterator[frozen.FrozenDisk]:
    """Serve a file until the scope ends.

    :param options: QEMU's block options of the file
    :param socket: path of the socket, in a directory of ours
    :param target: the disk's name, which the export gets too
    :param capacity: the disk's size in bytes
    :param snapshot: name of the internal snapshot to serve
    :raises FreezeFailed: if qemu-nbd does not serve it
    """
    command = [
        'qemu-nbd', '--read-only', '--persistent', '--shared=0',
        f'--socket={socket}', f'--export-name={target}']
    if snapshot is not None:
        command.append(f'--load-snapshot=snapshot.name={snapshot}')
    command.append(disk.json_name(options))
    entry = log.push(end_server, socket=socket)
    with open(f'{socket}.log', 'w+') as messages:
        process = subprocess.Popen(  # nosec B603 # no shell, names are ours
            command, stdin=subprocess.DEVNULL, stdout=messages,
            stderr=messages)
        try:
            _wait_for(socket, process)
            yield frozen.FrozenDisk(target, capacity, socket, target)
        except _NotServing as error:
            messages.seek(0)
            raise exception.FreezeFailed(
                f'qemu-nbd does not serve {target}: {error} '
                f'{messages.read().strip()}') from error
        finally:
            process.terminate()
            processes.ends_within(process, _END_TIMEOUT_S)
            entry.run()


class _NotServing(Exception):
    pass


def _wait_for(socket: str, process: 'subprocess.Popen[bytes]') -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not os.path.exists(socket):
        if process.poll() is not None:
            raise _NotServing(f'it ended with {process.returncode}.')
        if time.monotonic() > deadline:
            raise _NotServing(f'it made no socket in {_START_TIMEOUT_S} s.')
        time.sleep(0.01)
