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

"""The installed nova-snapshot-ext-status, on the host of nova-compute.

It runs as nova-compute's user, of nova-compute's files.
"""

import dataclasses
import json
import pathlib
import subprocess
import tempfile

import fixtures

from tests.cloud import base

SUCCESS, WARNING, FAILURE = 0, 1, 2

#: What is checked, in order. The names are written out: the module of the
#: checks takes Nova, which is in the small cloud's environment alone.
NAMES = ('Loading of the driver', 'Settings', 'Nova', 'libvirt and QEMU',
         'Programs', 'Directories', 'Rights', 'Guests', 'Security modules')


@dataclasses.dataclass(frozen=True)
class Status:
    """What it found."""

    exit_code: int
    #: of each check's name, its result
    results: dict[str, int]
    details: dict[str, str]


class StatusTest(base.CloudTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.etc = base.ROOT / 'etc' / 'nova'

    def check(self, *settings: str) -> Status:
        """Run the checks.

        :param settings: lines of one more file, that is read last
        """
        files = [self.etc / 'nova.conf', self.etc / 'nova-cpu.conf']
        if settings:
            path = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
            path.chmod(0o755)
            files.append(path / 'more.conf')
            files[-1].write_text('\n'.join(settings) + '\n')
        done = self.run_it(*(
            word for path in files for word in ('--config-file', path)),
            'upgrade', 'check', '--json')
        found = json.loads(done.stdout)['checks']
        return Status(
            done.returncode,
            {each['check']: each['result'] for each in found},
            {each['check']: each['details'] or '' for each in found})

    def run_it(self, *arguments: object,
               ) -> 'subprocess.CompletedProcess[str]':
        done = subprocess.run(
            ['runuser', '-u', 'nova', '--',
             base.ROOT / 'venv' / 'bin' / 'nova-snapshot-ext-status',
             *map(str, arguments)],
            cwd=tempfile.gettempdir(), capture_output=True, text=True)
        self.assertNotIn('Traceback', done.stdout + done.stderr)
        return done

    def test_host_that_serves_is_ready(self) -> None:
        server = self.server()
        found = self.check()
        self.assertEqual(list(NAMES), list(found.results))
        self.assertEqual(max(found.results.values()), found.exit_code)
        self.assertLess(found.exit_code, FAILURE, found.details)
        for name in ('Loading of the driver', 'Settings', 'Nova',
                     'Programs', 'Rights', 'Guests'):
            self.assertEqual(SUCCESS, found.results[name],
                             found.details[name])
        self.assertIn('snapshot_ext.SnapshotLibvirtDriver',
                      found.details['Loading of the driver'])
        self.assertRegex(found.details['Guests'], 'backup would serve [1-9]')
        # It touches nothing.
        self.wait_writes(server)

    def test_settings_that_would_not_serve_are_failures(self) -> None:
        for section, setting, name, words in (
                ('DEFAULT', 'compute_driver = libvirt.LibvirtDriver',
                 'Loading of the driver', 'compute_driver is libvirt'),
                ('snapshot_ext', 'flows = warm', 'Settings',
                 '[snapshot_ext] flows = warm is not valid'),
                ('snapshot_ext', 'mover_python = /none', 'Programs',
                 '/none can not be run'),
                ('snapshot_ext', 'scratch_directory = /none',
                 'Directories', 'scratch_directory = ')):
            found = self.check(f'[{section}]', setting)
            self.assertIn(words, found.details[name])
            self.assertGreater(found.results[name], SUCCESS, setting)
            self.assertEqual(max(found.results.values()), found.exit_code)

    def test_table_is_for_people(self) -> None:
        done = self.run_it(
            '--config-file', self.etc / 'nova.conf', '--config-file',
            self.etc / 'nova-cpu.conf', 'upgrade', 'check')
        for name in NAMES:
            self.assertIn(f'Check: {name}', done.stdout)

    def test_file_that_is_not_there(self) -> None:
        done = self.run_it('--config-file', '/none', 'upgrade', 'check')
        self.assertEqual(255, done.returncode)
        self.assertIn('/none', done.stderr)
