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

"""A token is in no process's command line, no file and no word of ours."""

import os
import pathlib
import threading

import fixtures

from tests import fake_glance
from tests.functional import guests
from tests.functional import test_cli

TOKEN = 'gAAAAA-this-is-the-token-of-the-operator'


class SecretsTest(test_cli.CommandTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.server = fake_glance.served(self)
        clouds = self.work / 'clouds.yaml'
        clouds.write_text(
            f'clouds: {{test: {{auth_type: admin_token, '
            f'image_api_version: "2", '
            f'image_endpoint_override: "{self.server.url}", '
            f'auth: {{endpoint: "{self.server.url}", '
            f'token: "{TOKEN}"}}}}}}\n')
        self.clouds = clouds
        self.useFixture(fixtures.EnvironmentVariable(
            'OS_CLIENT_CONFIG_FILE', str(clouds)))
        self.seen: set[bytes] = set()
        self.files: set[bytes] = set()

    def watch(self, ended: threading.Event) -> None:
        """See every command line and file of ours while a snapshot runs."""
        while not ended.wait(0.02):
            for process in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
                try:
                    self.seen.add(process.read_bytes())
                except OSError:
                    pass
            for directory, _, names in os.walk(self.work):
                for name in names:
                    path = pathlib.Path(directory, name)
                    try:
                        # An image may be long, and is not ours.
                        if path != self.clouds and path.is_file():
                            with path.open('rb') as file:
                                self.files.add(file.read(65536))
                    except OSError:
                        pass

    def test_token_is_only_sent(self) -> None:
        guest = self.guest(guests.Disk('overlay'), start=False)
        for what in ([], [500] * 9):
            self.server.plan = {'PUT /file': list(what)}
            ended = threading.Event()
            thread = threading.Thread(target=self.watch, args=[ended])
            thread.start()
            try:
                done = self.run_command(
                    '--debug', 'create', guest.name, '--to', 'glance',
                    '--cloud', 'test', '--staging', self.staging,
                    expect=1 if what else 0)
            finally:
                ended.set()
                thread.join()
            self.assertNotIn(TOKEN, done.stdout + done.stderr)
        self.assertEqual(TOKEN, self.server.headers[0]['X-Auth-Token'])
        # It was looked at the right moment.
        lines = b'\n'.join(self.seen)
        self.assertIn(b'qemu-nbd', lines)
        self.assertIn(b'nova_snapshot_ext.guard', lines)
        self.assertTrue(any(b'undo_log' in content
                            for content in self.files))
        self.assertNotIn(TOKEN.encode(), lines)
        self.assertNotIn(TOKEN.encode(), b'\n'.join(self.files))
