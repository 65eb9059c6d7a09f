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

"""How much of its disk a guest writes to meanwhile, as QEMU counts it."""

import collections.abc
import contextlib
import json
import typing

from benchmarks import commands

_CLUSTER = 64 * 1024
_NAME = 'benchmark'


class Touched:
    """A dirty bitmap of a guest's root disk.

    :ivar bytes: of the 64 KiB clusters that were written to; known at the
        end
    """

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self._node: str = self._root()['node-name']
        self.bytes = 0

    def begin(self) -> None:
        self._command('block-dirty-bitmap-add', node=self._node, name=_NAME,
                      granularity=_CLUSTER)

    def end(self) -> None:
        self.bytes = next(
            int(bitmap['count']) for bitmap in self._root()['dirty-bitmaps']
            if bitmap.get('name') == _NAME)
        self._command('block-dirty-bitmap-remove', node=self._node,
                      name=_NAME)

    def _root(self) -> dict[str, typing.Any]:
        """What QEMU shows of the first disk."""
        first: dict[str, typing.Any] = self._command('query-block')[0]
        inserted: dict[str, typing.Any] = first['inserted']
        return inserted

    def _command(self, execute: str, /, **arguments: object) -> typing.Any:
        answer = json.loads(commands.run(
            'virsh', '-c', 'qemu:///system', 'qemu-monitor-command',
            self._uuid, json.dumps({'execute': execute,
                                    'arguments': arguments})))
        return answer['return']


@contextlib.contextmanager
def counted(uuid: str) -> collections.abc.Iterator[Touched]:
    """Count until the scope ends; QEMU's monitor says it, at no cost."""
    touched = Touched(uuid)
    touched.begin()
    try:
        yield touched
    finally:
        touched.end()
