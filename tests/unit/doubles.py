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

"""Doubles of QEMU's programs, for tests of what is said to them."""

import collections.abc
import contextlib
import json
import os
import typing

from nova_snapshot_ext import exception
from nova_snapshot_ext import frozen
from nova_snapshot_ext import undo
from tests.unit import fakes


class QemuImg:
    """qemu-img, and the monitor, on one qcow2 file with its snapshots."""

    def __init__(self, journal: fakes.Journal) -> None:
        self.journal = journal
        self.path = ''
        self.snapshots: list[str] = []
        self.size = 4096
        #: those that the file was made as, in order
        self.applied: list[str] = []
        #: actions that fail: ``-c``, ``-d``, ``monitor``, ``create`` …
        self.fails: set[str] = set()
        #: says that it deleted, and did not
        self.lies = False
        self.before_delete: collections.abc.Callable[[], object] = (
            lambda: None)
        self.commands: list[tuple[str, ...]] = []

    def run(self, *arguments: str, limits: object = None,
            timeout: int | None = None) -> str:
        self.commands.append(arguments)
        if arguments[0] == 'info':
            self._may_fail('info')
            return json.dumps(self._info())
        if arguments[0] == 'snapshot':
            self._snapshot(arguments[1], arguments[2], arguments[-1])
        else:
            self.journal.append(f'qemu-img {arguments[0]}')
            self._may_fail(arguments[0])
            if arguments[0] == 'create':
                with open(arguments[-2], 'xb'):
                    pass
            if arguments[0] == 'convert':
                with open(arguments[-1], 'xb') as file:
                    file.write(b'image')
        return ''

    def _may_fail(self, action: str) -> None:
        if action in self.fails:
            raise exception.CommandFailed(f'qemu-img {action} failed')

    def _info(self) -> dict[str, object]:
        return {'filename': self.path, 'virtual-size': self.size,
                'snapshots': [{'name': name} for name in self.snapshots]}

    def _snapshot(self, action: str, name: str, options: str) -> None:
        opened = json.loads(options.removeprefix('json:'))
        assert opened['driver'] == 'qcow2', options
        self._may_fail(action)
        self.journal.append(f'qemu-img snapshot {action}')
        if action == '-c':
            self.path = opened['file']['filename']
            self.snapshots.append(name)
        elif action == '-a':
            assert name in self.snapshots, name
            self.applied.append(name)
        else:
            self._deleted(name)

    def _deleted(self, name: str) -> None:
        if not self.lies:
            self.snapshots.remove(name)

    def monitor(self, domain: object, request: str, flags: int) -> str:
        command = json.loads(request)
        if command['execute'] == 'query-named-block-nodes':
            return json.dumps({'return': [{
                'drv': 'qcow2', 'node-name': 'node',
                'image': self._info()}]})
        if command['execute'] == 'transaction':
            self.journal.append('take by monitor')
            self.snapshots += [each['data']['name'] for each in
                               command['arguments']['actions']]
            return '{"return": {}}'
        self.before_delete()
        if 'monitor' in self.fails:
            return json.dumps({'error': {'desc': 'it stops'}})
        self.journal.append('delete by monitor')
        self._deleted(command['arguments']['name'])
        return '{"return": {}}'


class QemuNbd:
    """qemu-nbd: what it was told to serve."""

    def __init__(self, journal: fakes.Journal) -> None:
        self.journal = journal
        self.options: dict[str, typing.Any] = {}
        self.error: Exception | None = None

    @contextlib.contextmanager
    def serving(
            self, options: dict[str, typing.Any], socket: str, target: str,
            capacity: int, log: undo.UndoLog, snapshot: str | None = None,
    ) -> collections.abc.Iterator[frozen.FrozenDisk]:
        assert os.path.isdir(os.path.dirname(socket)), socket
        if self.error is not None:
            raise self.error
        self.options = options
        self.journal.append(
            'serve disk' if snapshot is None else 'serve snapshot')
        try:
            yield frozen.FrozenDisk(target, capacity, socket, target)
        finally:
            self.journal.append('end serve')
