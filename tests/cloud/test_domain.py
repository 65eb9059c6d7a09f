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

"""Snapshots that a server is rolled back to, on the small cloud."""

import json
import os
import pathlib
import re
import time
import typing as ty
from xml.etree import ElementTree

import fixtures
from testtools import content

from tests.cloud import base
from tests.functional import images

ROLLBACK = 'snapshot_ext_rollback'
VIRSH = ('virsh', '-c', 'qemu:///system')
# Seconds for which the guest may not run when it goes back: without KVM, and
# with the machine as busy as it may be.
DOWN_S = 60


class DomainTestCase(base.CloudTestCase):

    def take(self, server, **properties: str) -> ty.Any:
        """Take a snapshot that can be rolled back to.

        :returns: its image
        """
        self.wait_writes(server)
        image = self.snapshot(server, snapshot_flow='domain', **properties)
        self.assertEqual('domain', image.properties['snapshot_ext_flow'])
        self.assertEqual(server.id, image.properties['snapshot_ext_instance'])
        return image

    def instant(self, image) -> int:
        """The number that the guest had written last when it was taken."""
        path = self.image_file(image)
        images.qemu_img_check(path)
        counters = images.filesystem_counters(
            (path, 'qcow2'), images.DATA_PARTITION)
        images.check_order([counters])
        return counters[0]

    def rebuild(self, server, image, status: str = 'ACTIVE') -> None:
        self.compute.rebuild_server(server, image=image.id)
        self.wait_status(server, status)

    def roll_back(self, server, image) -> None:
        """Roll a running server back to a snapshot with its memory."""
        before, host = self.compute.get_server(server.id), self.host_of(server)
        log = self.compute_log(host)
        boots = self.console(server).count('booted from')
        instant = self.instant(image)
        began = time.monotonic()
        self.rebuild(server, image)
        took = time.monotonic() - began
        self.wait(lambda: bool(self._counted_since(server)), 'its counter')
        # It did not boot: it went on where it was.
        self.assertLessEqual(
            self.console(server).count('booted from'), boots)
        first = self._counted_since(server)[0]
        self.assertTrue(instant <= first <= instant + 1, (instant, first))
        self.assertSame(before, self.compute.get_server(server.id))
        [down] = re.findall(r'did not run for ([\d.]+) s',
                            self.compute_log(host).removeprefix(log))[-1:]
        self.addDetail(f'rolled back to {image.name}', content.text_content(
            f'in {took:.1f} s, of which the guest was down for {down} s'))
        self.assertLess(float(down), DOWN_S)
        self.assertEqual('Success', self.ended(server, ROLLBACK)['result'])

    def _counted_since(self, server) -> list[int]:
        """What it printed since it last began anew, or was put elsewhere."""
        found = [int(number) for number in re.findall(
            r'counter (\d+)\r?\n', self.console(server))]
        jumps = [at for at in range(1, len(found))
                 if found[at] != found[at - 1] + 1]
        return found[jumps[-1]:] if jumps else found

    def assertSame(self, before, after) -> None:
        """It is the same server, and not one of another image."""
        for name in ('id', 'image', 'flavor', 'addresses', 'created_at',
                     'status', 'vm_state'):
            self.assertEqual(getattr(before, name), getattr(after, name),
                             name)

    def ports(self, server) -> list[tuple[str, ...]]:
        """Its ports, as Neutron and as libvirt have them."""
        devices = ElementTree.fromstring(self.domain_xml(server)).findall(
            './devices/interface')
        found = {mac.get('address', ''): target.get('dev', '')
                 for device in devices
                 if (mac := device.find('mac')) is not None
                 and (target := device.find('target')) is not None}
        for name in found.values():
            self.assertTrue(pathlib.Path('/sys/class/net', name).exists())
        return [(port.id, port.mac_address, found.pop(port.mac_address))
                for port in self.cloud.network.ports(device_id=server.id)
                ] + [('without a port', mac) for mac in found]

    def ended(self, server, event: str) -> dict[str, ty.Any]:
        """How something ended that was done to a server last."""
        return next(found for found in self.events(server)
                    if found['event'] == event)

    def held(self, server) -> list[str]:
        """The names of the snapshots in a server's disk."""
        info = json.loads(base.run(
            'qemu-img', 'info', '-U', '--output=json', '-f', 'qcow2',
            self.disk(server)))
        return [each['name'] for each in info.get('snapshots', ())]


class RollBackTest(DomainTestCase):

    def test_server_goes_back_and_forth(self):
        server = self.server(network=self.network())
        ports = self.ports(server)
        self.assertEqual(1, len(ports))
        first, second, third = (self.take(server) for _ in range(3))
        self.roll_back(server, first)
        branch = self.take(server)
        self.roll_back(server, third)
        fourth = self.take(server)
        self.assertEqual(5, len(self.held(server)))
        self.assertEqual(ports, self.ports(server))
        for image, parent in ((first, None), (second, first.id),
                              (third, second.id), (branch, first.id),
                              (fourth, third.id)):
            self.assertEqual('memory',
                             image.properties['snapshot_ext_rollback'])
            self.assertEqual(
                parent, image.properties.get('snapshot_ext_parent'))
        instant = self.instant(first)
        other = self.server(first.id)
        self.assertEqual(instant, self.booted_from(other))
        # It is of another server's snapshot, and has none of its own.
        self.rebuild(other, second)
        self.wait_writes(other)
        self.assertEqual(self.instant(second), self.booted_from(other))
        self.assertEqual(
            second.id, self.compute.get_server(other.id).image.id)

    def test_disks_alone_are_booted_from(self):
        server = self.server()
        before = self.compute.get_server(server.id)
        image = self.take(server, snapshot_memory='false')
        self.assertEqual('disk', image.properties['snapshot_ext_rollback'])
        instant = self.instant(image)
        self.wait_writes(server)
        self.rebuild(server, image)
        self.wait(lambda: f'booted from {instant}' in self.console(server),
                  'its boot')
        self.assertSame(before, self.compute.get_server(server.id))

    def test_stopped_server_stays_stopped(self):
        server = self.server()
        image = self.take(server)
        instant = self.instant(image)
        self.wait_writes(server)
        self.compute.stop_server(server)
        self.wait_status(server, 'SHUTOFF')
        self.rebuild(server, image, 'SHUTOFF')
        self.assertEqual('shut off', self.domain_state(server))
        self.assertEqual('Success', self.ended(server, ROLLBACK)['result'])
        self.compute.start_server(server)
        self.wait_status(server, 'ACTIVE')
        self.wait(lambda: 'booted from' in self.console(server), 'its boot')
        # It was on its way for a moment before Nova stopped it again.
        self.assertTrue(
            instant <= self.booted_from(server) < instant + 100)

    def test_snapshot_that_is_gone_is_rebuilt_from(self):
        server = self.server()
        image = self.take(server)
        instant = self.instant(image)
        self.rebuild(server, self.cloud.image.find_image(
            'guest', ignore_missing=False))
        self.wait_writes(server)
        self.assertEqual([], self.state_files())
        self.rebuild(server, image)
        self.wait(lambda: f'booted from {instant}' in self.console(server),
                  'its boot')
        self.assertEqual(image.id,
                         self.compute.get_server(server.id).image.id)


class RefusalTest(DomainTestCase):

    def test_server_that_can_not_go_back_stays_as_it_was(self):
        server = self.server()
        image = self.take(server)
        before = self.compute.get_server(server.id)
        disk = pathlib.Path(self.useFixture(
            fixtures.TempDir('/var/tmp')).path) / 'disk'
        disk.parent.chmod(0o755)
        base.run('qemu-img', 'create', '-f', 'qcow2', disk, '1M')
        base.run(*VIRSH, 'attach-disk', '--live', '--subdriver', 'qcow2',
                 server.id, disk, 'vdb')
        at = self.wait_writes(server)
        self.rebuild(server, image)
        self.assertGreaterEqual(self.wait_writes(server), at)
        self.assertSame(before, self.compute.get_server(server.id))
        for event in (ROLLBACK, 'compute_rebuild_instance'):
            ended = self.ended(server, event)
            self.assertEqual('Error', ended['result'])
            self.assertIn('vdb', ended['details'])
        base.run(*VIRSH, 'detach-disk', '--live', server.id, 'vdb')
        self.wait(lambda: 'vdb' not in self.domain_xml(server), 'the detach')
        self.roll_back(server, image)


class RoomTest(DomainTestCase):

    def test_snapshot_goes_with_its_image_and_with_its_server(self):
        server = self.server()
        first, second = self.take(server), self.take(server)
        self.assertEqual(2, len(self.held(server)))
        self.cloud.image.delete_image(first)
        self.take(server)
        self.assertEqual(2, len(self.held(server)))
        self.roll_back(server, second)
        disk = self.disk(server)
        self._delete_server(server)
        self.assertEqual([], self.state_files())
        self.assertFalse(disk.exists())

    def test_limit_makes_room_for_nothing_but_deleted_images(self):
        self.configure('snapshot_ext.max_domain_snapshots=1')
        server = self.server()
        first = self.take(server)
        details = self.refused_snapshot(server, snapshot_flow='domain')
        self.assertIn('max_domain_snapshots = 1', details)
        self.cloud.image.delete_image(first)
        self.take(server)
        self.assertEqual(1, len(self.held(server)))


class LifeTest(DomainTestCase):
    """What else Nova does to a server that has snapshots."""

    def test_snapshots_stay(self):
        server = self.server()
        image = self.take(server)
        held = self.held(server)
        for do, status, undo in (
                (self._reboot, 'ACTIVE', None),
                (self.compute.stop_server, 'SHUTOFF',
                 self.compute.start_server),
                (self.compute.pause_server, 'PAUSED',
                 self.compute.unpause_server),
                (self.compute.suspend_server, 'SUSPENDED',
                 self.compute.resume_server),
                (self.compute.rescue_server, 'RESCUE',
                 self.compute.unrescue_server)):
            do(server)
            self.wait_status(server, status)
            self.assertEqual(held, self.held(server), status)
            if undo is not None:
                undo(server)
                self.wait_status(server, 'ACTIVE')
            self.assertEqual(held, self.held(server), status)
        self.roll_back(server, image)

    def _reboot(self, server) -> None:
        self.compute.reboot_server(server, 'HARD')

    def test_other_snapshots_beside_them(self):
        server = self.server()
        image = self.take(server)
        for flow in ('backup', 'live', 'cold'):
            before = self.wait_writes(server)
            other = self.snapshot(server, snapshot_flow=flow)
            self.assert_good(other, before, self.wait_writes(server))
            self.assertEqual(1, len(self.held(server)))
        self.roll_back(server, image)

    def test_shelved_server_has_none(self):
        server = self.server()
        self.take(server)
        self.compute.shelve_server(server)
        self.wait(lambda: self.status(server) == 'SHELVED_OFFLOADED',
                  'the server to be shelved')
        shelved = self.cloud.image.find_image(f'{server.name}-shelved')
        self.addCleanup(self.cloud.image.delete_image, shelved.id,
                        ignore_missing=True)
        self.assertEqual([], self.state_files())
        self.compute.unshelve_server(server)
        self.wait_status(server, 'ACTIVE')
        self.wait_writes(server)
        self.assertEqual([], self.held(server))

    def test_resize_after_a_rollback_finds_the_base_of_the_disk(self):
        server = self.server()
        image = self.take(server)
        self.roll_back(server, image)
        self.wait_writes(server)
        self.compute.stop_server(server)
        self.wait_status(server, 'SHUTOFF')
        before = self._flat(server, 'before')
        for path in (base.ROOT / 'nova' / 'instances' / '_base').iterdir():
            path.unlink()
        self.compute.resize_server(server, self.compute.find_flavor(
            'small', ignore_missing=False))
        self.wait_status(server, 'VERIFY_RESIZE')
        after = self._flat(server, 'after')
        # What is behind the old end is QEMU's: see the documentation.
        os.truncate(after, before.stat().st_size)
        base.run('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', before,
                 after)
        self.compute.confirm_server_resize(server)
        self.wait_status(server, 'SHUTOFF')
        self.assertEqual(1, len(self.held(server)))
        self.compute.start_server(server)
        self.wait_status(server, 'ACTIVE')
        self.wait_writes(server)
        # Its memory would not fit into the new flavor.
        self.rebuild(server, image)
        self.assertIn('flavor', self.ended(server, ROLLBACK)['details'])
        self.wait_writes(server)

    def _flat(self, server, name: str) -> pathlib.Path:
        path = pathlib.Path(self.useFixture(
            fixtures.TempDir('/var/tmp')).path) / name
        base.run('qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw',
                 self.disk(server), path)
        return path
