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

"""The command nova-snapshot on real domains, with no Nova at all."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import fixtures

from nova_snapshot_ext import account as accounts
from nova_snapshot_ext.cmd import snapshot as cli
from tests.functional import guests
from tests.functional import images
from tests.functional import test_flows
from tests import own_flow

# Seconds, most of which Python takes to start on a busy machine.
REFUSED_S = 60
NOVA = ('<metadata><nova:instance xmlns:nova='
        '"http://openstack.org/xmlns/libvirt/nova/1.1"/></metadata>')


class CommandTestCase(test_flows.SnapshotTestCase):

    def setUp(self):
        super().setUp()
        self.configuration = self.work / 'snapshot.conf'
        self.configuration.write_text(
            f'[snapshot_ext]\nstate_directory = {self.state}\n')

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, '-m', 'nova_snapshot_ext.cmd.snapshot',
                '--connect', self.libvirtd.uri,
                '--config-file', str(self.configuration),
                *(str(word) for word in arguments)]

    def run_command(self, *arguments: object,
                    expect: int = 0) -> 'subprocess.CompletedProcess[str]':
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True)
        self.assertEqual(expect, done.returncode, done.stderr)
        self.assertNotIn('Traceback', done.stderr)
        return done


class CommandLineTest(CommandTestCase):

    def test_create_writes_an_image_and_its_document(self):
        guest = self.guest(guests.Disk('overlay'))
        before = guest.wait_writes_on()
        done = self.run_command(
            'create', guest.name, '--to', self.images, '--name', 'one',
            '--staging', self.staging, '--flow', 'cold', '--verify-hash',
            '--json')
        result = json.loads(done.stdout)
        self.assertEqual('cold', result['flow'])
        path = self.images / 'one.qcow2'
        self.assertEqual(str(path), result['location'])
        self.assert_good((path, 'qcow2'), before, guest.counter())
        document = json.loads(
            pathlib.Path(f'{path}.json').read_text())
        self.assertEqual(path.stat().st_size, document['size'])
        self.assertEqual(
            images.run('sha512sum', path).split()[0],
            document['os_hash_value'])
        self.assertEqual(
            'crash', document['properties']['snapshot_ext_consistency'])
        self.assertEqual(2, len(list(self.images.iterdir())))
        self.assert_whole(guest)

    def test_best_flow_serves_and_plain_lines_are_printed(self):
        guest = self.guest(guests.Disk('overlay'))
        done = self.run_command(
            'create', guest.uuid, '--to', self.images, '--staging',
            self.staging, '--format', 'raw')
        self.assertIn('flow backup, transfer streamed', done.stdout)
        self.assertNotIn('\r', done.stderr)

    def test_flows_says_what_can_serve(self):
        guest = self.guest(guests.Disk('overlay'))
        done = self.run_command('flows', guest.name, '--json')
        self.assertEqual(
            {'backup': {'serves': True, 'obstacle': None},
             'cold': {'serves': True, 'obstacle': None},
             'domain': {'serves': True, 'obstacle': None},
             'live': {'serves': True, 'obstacle': None}},
            json.loads(done.stdout)['flows'])
        guest.domain.destroy()
        done = self.run_command('flows', guest.name)
        self.assertIn('cold: can serve\n', done.stdout)
        self.assertIn('live: the guest is shut off\n', done.stdout)

    def test_log_says_how_it_ended(self):
        guest = self.guest(guests.Disk('overlay'))
        for flow, scratch in (('backup', True), ('live', True),
                              ('cold', False)):
            command = self.command(
                'create', guest.name, '--to', self.images, '--name', flow,
                '--staging', self.staging, '--flow', flow)
            command.insert(3, '--debug')
            done = subprocess.run(command, capture_output=True, text=True)
            self.assertEqual(0, done.returncode, done.stderr)
            [line] = [line for line in done.stderr.splitlines()
                      if 'Snapshot ended: ' in line]
            self.addDetail(flow, test_flows.text(line))
            values = accounts.parsed(line)
            path = self.images / f'{flow}.qcow2'
            size = str(path.stat().st_size)
            self.assertEqual(
                ('ok', guest.uuid, flow, 'streamed', str(path), size, size,
                 '-'),
                tuple(values[name] for name in (
                    'outcome', 'instance', 'flow', 'transfer', 'image',
                    'image_bytes', 'sent_bytes', 'staged_bytes')))
            # The image is what was read, its tables, and no zeroes.
            self.assertGreater(int(values['read_bytes']), int(size) // 2)
            self.assertEqual(scratch, values['scratch_bytes'] != '-')
            self.assertGreater(float(values['total_s']), sum(
                float(values[f'{phase}_s'])
                for phase in ('plan', 'freeze', 'publish')))

    def test_flow_of_another_package_serves(self):
        packages = self._directory('packages')
        own_flow.install(packages)
        self.useFixture(fixtures.EnvironmentVariable(
            'PYTHONPATH', f'{packages}:{os.environ.get("PYTHONPATH", "")}'))
        guest = self.guest(guests.Disk('overlay'))
        create = ('create', guest.name, '--to', self.images, '--name', 'own',
                  '--staging', self.staging, '--flow', 'off', '--json')
        done = self.run_command(*create, expect=cli.REFUSED)
        self.assertIn('off: the guest is running', done.stderr)
        guest.domain.destroy()
        result = json.loads(self.run_command(*create).stdout)
        self.assertEqual('off', result['flow'])
        self.assert_good((self.images / 'own.qcow2', 'qcow2'),
                         guest.counter(), guest.counter())
        self.assertFalse(guest.domain.isActive())

    def test_guest_that_nova_owns_is_only_stopped_by_force(self):
        guest = self.guest(guests.Disk('overlay'), start=False)
        self.connection.defineXML(
            guest.xml().replace('<memory', f'{NOVA}<memory', 1))
        guest.start()
        create = ('create', guest.name, '--to', self.images, '--staging',
                  self.staging, '--flow', 'cold')
        done = self.run_command(*create, expect=cli.REFUSED)
        self.assertIn('Nova owns', done.stderr)
        self.assertEqual([], list(self.images.iterdir()))
        self.run_command(*create, '--force')
        self.assert_whole(guest)

    def test_refusals_have_exit_codes_and_touch_nothing(self):
        guest = self.guest(guests.Disk('overlay'))
        create = ('create', guest.name, '--staging', self.staging)
        taken = self.images / 'taken.qcow2'
        taken.touch()
        for code, words, said in (
                (cli.NO_DOMAIN, ('flows', 'nobody'), 'no domain nobody'),
                (cli.REFUSED, (*create, '--to', self.images, '--flow',
                               'warm'),
                 'installed are backup, cold, domain, live'),
                (cli.REFUSED, (*create, '--to', self.images / 'none'),
                 'must be an existing directory'),
                (cli.REFUSED, (*create, '--to', self.images, '--name',
                               'taken'), 'exists already'),
                (cli.REFUSED, ('create', guest.name, '--to', self.images,
                               '--staging', '/nowhere'),
                 '--staging = /nowhere is not valid'),
                (cli.USAGE, ('create', guest.name), 'required: --to')):
            done = self.run_command(*words, expect=code)
            self.assertIn(said, done.stderr)
        self.assertEqual([taken], list(self.images.iterdir()))
        self.assert_whole(guest)

    def test_second_snapshot_of_a_guest_is_refused_at_once(self):
        guest = self.guest(guests.Disk('overlay'))
        before = guest.wait_writes_on()
        create = ('create', guest.name, '--to', self.images, '--staging',
                  self.staging)
        with subprocess.Popen(self.command(*create, '--name', 'first'),
                              stdout=subprocess.PIPE, text=True) as first:
            while not self._reads(guest):
                self.assertIsNone(first.poll())
                time.sleep(0.01)
            # However fast it is, it is in flight.
            first.send_signal(signal.SIGSTOP)
            begun = time.monotonic()
            try:
                done = self.run_command(*create, expect=cli.BUSY)
            finally:
                first.send_signal(signal.SIGCONT)
            took_s = time.monotonic() - begun
            self.addDetail('seconds', test_flows.text(f'{took_s:.2f}'))
            self.assertLess(took_s, REFUSED_S)
            self.assertEqual(
                f'nova-snapshot: Another snapshot of {guest.name} is in '
                f'flight\n', done.stderr)
            self.assertIn('flow backup', first.communicate()[0])
        self.assertEqual(0, first.returncode)
        self.assert_good((self.images / 'first.qcow2', 'qcow2'), before,
                         guest.counter())
        self.assertEqual(2, len(list(self.images.iterdir())))
        self.assert_whole(guest)

    def _reads(self, guest: guests.Guest) -> bool:
        """Whether the guest's disk is exported to a snapshot by now."""
        try:
            return 'end_mover' in (
                self.state / f'{guest.uuid}.undo').read_text()
        except FileNotFoundError:
            return False
