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

"""What unit tests stand on."""

import json
import os
import typing

import fixtures
import testtools

from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo
from tests.unit import fakes

#: the head of a qcow2 file, version 3 (QEMU, docs/interop/qcow2.txt)
_MAGIC = b'QFI\xfb'


def qcow2_header(incompatible: int = 0, size: int = 1024 ** 2) -> bytes:
    """The first bytes of a qcow2 file without backing file."""
    return b''.join((
        _MAGIC, (3).to_bytes(4, 'big'), bytes(8), bytes(4),
        (16).to_bytes(4, 'big'), size.to_bytes(8, 'big'), bytes(4),
        (1).to_bytes(4, 'big'), (0x30000).to_bytes(8, 'big'),
        (0x10000).to_bytes(8, 'big'), (1).to_bytes(4, 'big'), bytes(12),
        incompatible.to_bytes(8, 'big'), bytes(16),
        (4).to_bytes(4, 'big'), (104).to_bytes(4, 'big'),
    )).ljust(1024, b'\0')


class TestCase(testtools.TestCase):
    """A test with a journal, a guest and directories of its own.

    :ivar journal: what happened, in order
    :ivar domain: the guest's fake domain
    :ivar guest: the wrapper that is tested with it
    :ivar staging, state: directories
    """

    def setUp(self) -> None:
        super().setUp()
        self.output = self.useFixture(fixtures.FakeLogger())
        self.useFixture(fixtures.Timeout(60, gentle=True))
        # Short: a socket's path has its limit.
        self.directory = self.useFixture(fixtures.TempDir()).path
        self.staging = self.new_directory('staging')
        self.state = self.new_directory('state')
        self.save = self.new_directory('save')
        self.journal = fakes.Journal()
        self.domain = fakes.FakeDomain(self.journal)
        self.guest: guests.Guest = fakes.guest_of(self.domain)
        self.host = fakes.FakeHost(self.journal)

    def new_directory(self, name: str) -> str:
        path = os.path.join(self.directory, name)
        os.mkdir(path)
        return path

    def new_file(self, name: str, content: bytes = b'') -> str:
        path = os.path.join(self.directory, name)
        with open(path, 'wb') as file:
            file.write(content)
        return path

    def patch_name(self, name: str, value: object) -> None:
        self.useFixture(fixtures.MonkeyPatch(name, value))

    def request(self, **changes: typing.Any) -> requests.Request:
        return requests.Request(**{
            'image_format': 'qcow2',
            'compress': False,
            'quiesce': requests.Quiesce.NEVER,
            'staging_directory': self.staging,
            'staging_setting': '--staging',
            'scratch_directory': self.staging,
            'state_directory': self.state,
            'socket_directory': self.state,
            'managed_save_directory': self.save,
            'freeze_timeout': 10,
            'copy_timeout': 60,
            'convert_timeout': 60,
            **changes})

    def new_log(self) -> undo.UndoLog:
        log = undo.UndoLog.create(self.state, self.guest, self.host)
        self.addCleanup(log.close)
        return log

    def watch_flushes(self) -> None:
        """Write into the journal what an undo log holds at each fsync."""
        real = os.fsync

        def fsync(descriptor: int) -> None:
            real(descriptor)
            path = os.readlink(f'/proc/self/fd/{descriptor}')
            if path.endswith(undo.SUFFIX):
                with open(path, 'rb') as file:
                    record = json.loads(file.read().splitlines()[-1])
                if 'step' in record:
                    self.journal.append(f'flushed {record["step"]}')

        self.patch_name('os.fsync', fsync)
