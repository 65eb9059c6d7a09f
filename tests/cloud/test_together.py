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

"""Snapshots beside each other, and beside what else is done to a server."""

import json
import pathlib
import signal
import subprocess
import sys
import time
import typing as ty

import fixtures
from testtools import content

from nova_snapshot_ext.cmd import snapshot as cli
from tests.cloud import base

# All that is stored of the guest's disk, 256 MiB, is read at least once, to
# find the zeroes in it.
STREAMED = 'snapshot_ext.transfers=streamed'
VIRSH = ('virsh', '-c', 'qemu:///system')
# Seconds for a refusal, most of which Python takes to start on a busy machine.
REFUSED_S = 60
# Seconds in which a snapshot ends that something else came before.
ENDED_S = 60


def seconds(took: float) -> content.Content:
    """What a test adds to its details."""
    return content.text_content(f'{took:.1f} s')


class OneServerTest(base.CloudTestCase):
    """What happens to a server's snapshot when something else is asked for.

    One server and one start of nova-compute serve all of it: each takes
    longer than any of the checks.
    """

    def setUp(self):
        super().setUp()
        # QEMU passes through it to its scratch.
        self.target = pathlib.Path(self.useFixture(
            fixtures.TempDir('/var/tmp')).path)
        self.target.chmod(0o755)

    def test_one_server(self):
        self.configure(STREAMED, 'snapshot_ext.bandwidth=8')
        server = self.server()
        self._see_what_is_refused(server)
        self._begin_beside_the_command_line(server)
        for flow in ('backup', 'cold'):
            self._reset_and_reboot(server, flow)
        self._shut_off_from_within(server)

    def _see_what_is_refused(self, server) -> None:
        before = self.wait_writes(server)
        image_id = self._begin(server)
        for name, body in self._requests(server).items():
            answer = self._act(server, body)
            self.assertEqual(409, answer.status_code, (name, answer.text))
            self.assertIn('task_state image_uploading', answer.text, name)
        # Its host is up.
        answer = self._act(server, {'evacuate': {}})
        self.assertEqual(400, answer.status_code, answer.text)
        self.assertEqual('image_uploading',
                         self.compute.get_server(server.id).task_state)
        took_s, done = self._command(server)
        self.addDetail('command line refused after', seconds(took_s))
        self.assertEqual(cli.BUSY, done.returncode, done.stderr)
        self.assertIn('is in flight', done.stderr)
        self.assertLess(took_s, REFUSED_S)
        image = self.wait_image(server, image_id)
        self.assert_good(image, before, self.wait_writes(server))

    def _requests(self, server) -> dict[str, dict[str, ty.Any]]:
        """What Nova refuses a server whose snapshot is in flight."""
        flavor = self.compute.find_flavor('small', ignore_missing=False)
        return {
            'soft reboot': {'reboot': {'type': 'SOFT'}},
            'hard reboot': {'reboot': {'type': 'HARD'}},
            'stop': {'os-stop': None},
            'pause': {'pause': None},
            'suspend': {'suspend': None},
            'resize': {'resize': {'flavorRef': flavor.id}},
            'cold migration': {'migrate': None},
            'live migration': {'os-migrateLive': {
                'host': None, 'block_migration': 'auto'}},
            'rebuild': {'rebuild': {'imageRef': server.image.id}},
            'rescue': {'rescue': None},
            'shelve': {'shelve': None},
            'snapshot': {'createImage': {'name': 'second'}},
            'backup': {'createBackup': {
                'name': 'second', 'backup_type': 'daily', 'rotation': 1}},
        }

    def _act(self, server, body: dict[str, ty.Any]) -> ty.Any:
        return self.compute.post(f'/servers/{server.id}/action', json=body,
                                 microversion='2.90')

    def _begin_beside_the_command_line(self, server) -> None:
        before = self.wait_writes(server)
        with self._begun_command(server) as first:
            # It is in flight for as long as that is looked at.
            first.send_signal(signal.SIGSTOP)
            try:
                self._see_two_refused(server)
            finally:
                first.send_signal(signal.SIGCONT)
            out, _ = first.communicate()
        self.assertEqual(0, first.returncode, out)
        path = self.target / 'first.qcow2'
        counters = base.images.filesystem_counters(
            (path, 'qcow2'), base.images.DATA_PARTITION)
        base.images.check_order([counters])
        after = self.wait_writes(server)
        self.assertTrue(before <= counters[0] <= after + 1,
                        f'{before} {counters} {after}')
        self.assertEqual('ACTIVE', self.status(server))

    def _see_two_refused(self, server) -> None:
        begun = time.monotonic()
        details = self.refused_snapshot(server)
        took_s = time.monotonic() - begun
        self.addDetail("Nova's refused after", seconds(took_s))
        self.assertIn('is in flight', details)
        self.assertLess(took_s, REFUSED_S)
        took_s, second = self._command(server)
        self.assertEqual(cli.BUSY, second.returncode, second.stderr)
        self.assertLess(took_s, REFUSED_S)

    def _begun_command(self, server) -> 'subprocess.Popen[str]':
        process = subprocess.Popen(
            self._words(server, 'first'), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True)
        self.wait(lambda: self._is_sent(server), 'the command line')
        return process

    def _command(self, server) -> tuple[
            float, 'subprocess.CompletedProcess[str]']:
        """Take a snapshot by the command line.

        :returns: the seconds that it took, and how it ended
        """
        begun = time.monotonic()
        done = subprocess.run(self._words(server, 'second'),
                              capture_output=True, text=True)
        return time.monotonic() - begun, done

    def _words(self, server, name: str) -> list[str]:
        configuration = self.target / 'snapshot.conf'
        configuration.write_text(
            f'[snapshot_ext]\nstate_directory = {self.state_directory}\n'
            f'bandwidth = 8\n')
        return [sys.executable, '-m', 'nova_snapshot_ext.cmd.snapshot',
                '--config-file', str(configuration), 'create', server.id,
                '--to', str(self.target), '--staging', str(self.target),
                '--name', name]

    def _reset_and_reboot(self, server, flow: str) -> None:
        """The way of an operator who does not wait for a snapshot."""
        image_id = self._begin(server, snapshot_flow=flow)
        domain = self._domain_id(server)
        begun = time.monotonic()
        self.compute.reset_server_state(server, 'active')
        answer = self._act(server, {'reboot': {'type': 'HARD'}})
        self.assertEqual(202, answer.status_code, answer.text)
        self.wait(lambda: self.cloud.image.find_image(
            image_id, ignore_missing=True) is None, 'the image to go')
        self.wait(lambda: not self.state_files(),
                  'the undo log to go')
        self.assertIn('was reset', self.why_failed(server))
        self.addDetail(f'{flow} ended after',
                       seconds(time.monotonic() - begun))
        self.assertLess(time.monotonic() - begun, ENDED_S)
        self.wait_status(server, 'ACTIVE')
        self.assertNotEqual(domain, self._domain_id(server))
        self.wait_writes(server)
        self.assertEqual('running', self.domain_state(server))
        self.assertIn(server.id, base.run(
            *VIRSH, 'list', '--persistent', '--uuid'))
        self.assertEqual(0, self.compute.get_server(server.id).progress)
        self.assertNotIn('snapshots', json.loads(base.run(
            'qemu-img', 'info', '-U', '--output=json', '-f', 'qcow2',
            self.disk(server))))
        self.assert_host_is_clean()

    def _domain_id(self, server) -> str:
        return base.run(*VIRSH, 'domid', server.id).strip()

    def _shut_off_from_within(self, server) -> None:
        image_id = self._begin(server)
        # The guest obeys its power button.
        base.run(*VIRSH, 'shutdown', '--mode', 'acpi', server.id)
        self.wait(lambda: self.cloud.image.find_image(
            image_id, ignore_missing=True) is None, 'the image to go')
        self.wait_idle(server)
        self.assertNotEqual('', self.why_failed(server))
        self.assert_host_is_clean()
        self.assertEqual('shut off', self.domain_state(server))
        self.wait_status(server, 'SHUTOFF')

    def _begin(self, server, **properties: str) -> str:
        """Ask for a snapshot, and wait until its bytes are sent."""
        image_id = self.request_snapshot(server, **properties)
        self.wait(lambda: self.compute.get_server(server.id).task_state
                  == 'image_uploading' and self._is_sent(server),
                  'the first bytes')
        return image_id

    def _is_sent(self, server) -> bool:
        try:
            return 'end_mover' in (
                self.state_directory / f'{server.id}.undo').read_text()
        except FileNotFoundError:
            return False
