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

"""Servers that go to a second host: what becomes of their snapshots."""

import dataclasses
import json
import os
import pathlib

import fixtures
from openstack import exceptions

from tests.cloud import base
from tests.cloud import test_domain

COMPUTE = 'nova-compute'


class TwoHostsTestCase(test_domain.DomainTestCase):

    #: what the second host is started with
    OPTIONS: tuple[str, ...] = ()
    placed = {'host': base.FIRST.name}

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.addClassCleanup(base.run, base.TOOL, 'second-host', '--end')
        base.run(base.TOOL, 'second-host', *cls.OPTIONS)

    def server_with_snapshots(self, network: str | None = None):
        """One that went back to the first of its two snapshots."""
        server = self.server(network=network)
        first = self.take(server)
        self.take(server)
        self.roll_back(server, first)
        self.assertEqual(2, len(self.held(server)))
        return server

    def wait_host(self, server, host: base.Host, status: str) -> None:
        self.wait(lambda: self.host_of(server).name == host.name,
                  f'{server.name} to be on {host.name}')
        self.wait_status(server, status)

    def flat(self, server, name: str) -> pathlib.Path:
        """The bytes of the disk of a server that is off."""
        path = pathlib.Path(self.useFixture(
            fixtures.TempDir('/var/tmp')).path) / name
        disk = self.disk(server)
        about = json.loads(base.run(
            'qemu-img', 'info', '--output=json', '-f', 'qcow2', disk))
        # Each host has it at the same path.
        backing = (self.host_of(server).instances / '_base'
                   / os.path.basename(about['backing-filename']))
        tree = {'driver': 'qcow2',
                'file': {'driver': 'file', 'filename': str(disk)},
                'backing': {
                    'driver': 'raw',
                    'file': {'driver': 'file', 'filename': str(backing)}}}
        base.run('qemu-img', 'convert', '-O', 'raw',
                 f'json:{json.dumps(tree)}', path)
        return path

    def assert_serves(self, server) -> None:
        """It is snapshotted where it is, and goes back to where it was."""
        before = self.wait_writes(server)
        image = self.snapshot(server)
        self.assert_good(image, before, self.wait_writes(server))
        image = self.take(server)
        self.assertNotIn('snapshot_ext_parent', image.properties)
        self.roll_back(server, image)

    def lose_host(self, server) -> None:
        """As a power cut would have it."""
        self.addCleanup(self._force_down, False)
        self.addCleanup(base.run, base.TOOL, 'restart-compute')
        base.run(base.TOOL, 'stop-compute', '--kill')
        if base.FIRST.virsh('domstate', server.id).strip() != 'shut off':
            base.FIRST.virsh('destroy', server.id)
        self._force_down(True)

    def _force_down(self, forced: bool) -> None:
        [service] = self.compute.services(
            binary=COMPUTE, host=base.FIRST.name)
        self.compute.update_service_forced_down(service, forced=forced)

    def evacuate(self, server) -> None:
        self.compute.evacuate_server(server, host=base.SECOND.name)
        self.wait_host(server, base.SECOND, 'ACTIVE')
        self.wait_writes(server)

    def regain_host(self, server) -> None:
        base.run(base.TOOL, 'restart-compute')
        self._force_down(False)
        self.wait(lambda: not base.FIRST.state_files(), 'what it had to go')
        self.assertNotIn(server.id, base.FIRST.virsh(
            'list', '--all', '--uuid'))


class TwoHostsTest(TwoHostsTestCase):

    # Cold migration

    def test_disk_moves_without_its_snapshots(self):
        server = self.server_with_snapshots(self.network())
        self.compute.stop_server(server)
        self.wait_status(server, 'SHUTOFF')
        before = self.flat(server, 'before')
        # Its base is not there yet: it is fetched by the server's image.
        self.compute.migrate_server(server, host=base.SECOND.name)
        self.wait_host(server, base.SECOND, 'VERIFY_RESIZE')
        base.run('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', before,
                 self.flat(server, 'after'))
        self.assertEqual([], self.held(server))
        self.assertEqual([], base.FIRST.state_files())
        self.compute.confirm_server_resize(server)
        self.wait_status(server, 'SHUTOFF')
        self.compute.start_server(server)
        self.wait_status(server, 'ACTIVE')
        self.assert_serves(server)

    def test_running_server_comes_back_without_its_snapshots(self):
        server = self.server_with_snapshots()
        at = self.wait_writes(server)
        self.compute.migrate_server(server, host=base.SECOND.name)
        self.wait_host(server, base.SECOND, 'VERIFY_RESIZE')
        self.wait_writes(server)
        self.assertGreaterEqual(self.booted_from(server), at)
        self.compute.revert_server_resize(server)
        self.wait_host(server, base.FIRST, 'ACTIVE')
        self.assertEqual([], self.held(server))
        self.assert_serves(server)

    # Live migration

    def test_guest_moves_without_its_snapshots(self):
        server = self.server_with_snapshots()
        at = self.wait_writes(server)
        self.compute.live_migrate_server(
            server, host=base.SECOND.name, block_migration='auto')
        self.assertRaises(
            exceptions.ConflictException, self.request_snapshot, server)
        self.wait_host(server, base.SECOND, 'ACTIVE')
        self.assertEqual('running', self.domain_state(server))
        self.assertEqual([], self.held(server))
        self.assertEqual([], base.FIRST.state_files())
        # On a busy machine QEMU's emulation may hang once it was moved, also
        # without any snapshot. What it wrote before is there.
        self.compute.reboot_server(server, 'HARD')
        self.wait_status(server, 'ACTIVE')
        self.wait_writes(server)
        self.assertGreaterEqual(self.booted_from(server), at)
        self.assert_serves(server)

    def test_server_whose_snapshot_is_taken_stays(self):
        self.configure('snapshot_ext.bandwidth=10')
        server = self.server()
        image_id = self.request_snapshot(server)
        self.assertRaises(
            exceptions.ConflictException, self.compute.live_migrate_server,
            server, host=base.SECOND.name, block_migration='auto')
        self.assertRaises(
            exceptions.ConflictException, self.compute.migrate_server,
            server, host=base.SECOND.name)
        self.wait_image(server, image_id)

    # Evacuation: the first host is lost, and comes back

    def test_server_with_snapshots_is_made_anew_elsewhere(self):
        server = self.server_with_snapshots()
        image = self.compute.get_server(server.id).image.id
        self.lose_host(server)
        self.evacuate(server)
        self.assertEqual(image, self.compute.get_server(server.id).image.id)
        self.assertEqual(0, self.booted_from(server))
        self.assertEqual([], self.held(server))
        self.assert_serves(server)
        self.regain_host(server)
        self.assertFalse((base.FIRST.instances / server.id).exists())

    def test_host_that_was_lost_in_a_snapshot_starts_nothing(self):
        server = self.server()
        image_id = self.request_snapshot(server, snapshot_flow='cold')
        self.wait(lambda: base.FIRST.virsh('domstate', server.id).strip()
                  == 'shut off', 'the guest to be off', interval_s=0)
        self.lose_host(server)
        self.assertNotEqual([], base.FIRST.state_files())
        self.evacuate(server)
        self.regain_host(server)
        self.assertIsNone(self.cloud.image.find_image(image_id))
        self.wait_writes(server)


class SharedInstancesTest(TwoHostsTestCase):
    """But for live migration: libvirt 9 wants a file system of the network."""

    OPTIONS = ('--shared',)
    hosts = (base.FIRST, dataclasses.replace(
        base.SECOND, instances=base.FIRST.instances))

    def test_server_is_evacuated_with_its_disk(self):
        # What is kept of snapshots of a server that left goes by then.
        self.configure('image_cache.manager_interval=10')
        server = self.server_with_snapshots()
        at = self.wait_writes(server)
        self.lose_host(server)
        self.evacuate(server)
        self.assertGreaterEqual(self.booted_from(server), at)
        self.assert_serves(server)
        held = self.held(server)
        self.regain_host(server)
        # The disk is the other host's now.
        self.assertEqual(held, self.held(server))
        self.wait_writes(server)
