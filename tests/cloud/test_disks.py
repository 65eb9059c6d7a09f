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

"""All disks of a tenant's server at one instant, on the small cloud."""

import json
import time
import typing as ty
import uuid

from tests.cloud import base
from tests.functional import images

# Root, ephemeral and swap disk of the flavor, in bytes.
SIZES = {'vda': 1024 ** 3, 'vdb': 1024 ** 3, 'vdc': 64 * 1024 ** 2}
KINDS = {'vda': 'root', 'vdb': 'ephemeral', 'vdc': 'swap'}
# The root disk has some 25 MiB, and the others next to nothing.
SLOW = ('snapshot_ext.transfers=streamed', 'snapshot_ext.bandwidth=8')
# Makes the guest count on its ephemeral disk as well, after its root disk.
COUNT_ON_BOTH = '''
kill $(cat /run/writer.pid)
/sbin/mke2fs -q -F -t ext4 -b 4096 /dev/vdb
mkdir -p /mnt/vdb
mount -t ext4 -o noinit_itable /dev/vdb /mnt/vdb
exec writer fs 80 /mnt/vda /mnt/vdb > /dev/ttyS0 2>&1
'''


class AllDisksTestCase(base.CloudTestCase):
    """A tenant without any rights but its own.

    :ivar project: its id
    """

    def setUp(self) -> None:
        super().setUp()
        admin = self.cloud
        name = f'tenant-{uuid.uuid4().hex[:8]}'
        project = admin.identity.create_project(
            name=name, domain_id='default')
        self.addCleanup(admin.identity.delete_project, project)
        self.project = project.id
        user = admin.identity.create_user(
            name=name, domain_id='default', password=name)
        self.addCleanup(admin.identity.delete_user, user)
        admin.identity.assign_project_role_to_user(
            project, user, admin.identity.find_role('member'))
        self.flavor = f'flavor-{uuid.uuid4().hex[:8]}'
        flavor = self.compute.create_flavor(
            name=self.flavor, ram=256, vcpus=1, disk=1, ephemeral=1, swap=64)
        self.addCleanup(self.compute.delete_flavor, flavor)
        self.cloud = admin.connect_as(
            username=name, password=name, project_name=name)
        self.compute = self.cloud.compute
        self.compute.default_microversion = '2.90'
        self.addCleanup(self._delete_images)

    def _delete_images(self) -> None:
        for image in self.own_images():
            self.cloud.image.delete_image(image.id, ignore_missing=True)

    def own_images(self) -> list[ty.Any]:
        """All of the project, hidden ones too."""
        return [image for hidden in (False, True)
                for image in self.cloud.image.images(
                    visibility='private', is_hidden=hidden)]

    def counting_server(self) -> ty.Any:
        server = self.server(flavor=self.flavor)
        # The agent's process would take its output, and end with it.
        self.agent(server, 'guest-exec', path='/bin/sh',
                   arg=['-c', COUNT_ON_BOTH])
        self.wait(lambda: self.console(server).count('booted from') > 1,
                  'the second writer')
        self.wait_writes(server)
        return server

    def agent(self, server: ty.Any, command: str, **arguments: object,
              ) -> None:
        base.run('virsh', '-c', 'qemu:///system', 'qemu-agent-command',
                 server.id, json.dumps(
                     {'execute': command, 'arguments': arguments}))

    def group(self, image: ty.Any) -> dict[str, ty.Any]:
        """The images of a snapshot as a tenant finds them, by device."""
        found = self.cloud.image.get(
            f'/images?snapshot_ext_group={image.id}').json()['images']
        return {each['snapshot_ext_device']:
                self.cloud.image.get_image(each['id']) for each in found}

    def assert_one_instant(self, server: ty.Any, image: ty.Any, before: int,
                           after: int, flow: str) -> None:
        group = self.group(image)
        self.assertEqual(KINDS, {
            device: each.properties['snapshot_ext_kind']
            for device, each in group.items()})
        self.assertEqual(image.id, group['vda'].id)
        for device, each in group.items():
            found = each.properties
            self.assertEqual(
                ('active', self.project, 'private', False, 'qcow2'),
                (each.status, each.owner_id, each.visibility,
                 bool(each.is_hidden), each.disk_format))
            self.assertEqual(
                (str(SIZES[device]), '3', flow, server.id),
                (found['snapshot_ext_size'], found['snapshot_ext_disks'],
                 found['snapshot_ext_flow'], each.instance_uuid))
            path = self.image_file(each)
            images.qemu_img_check(path)
            self.assertEqual(SIZES[device],
                             images.virtual_size((path, 'qcow2')))
            self.assertEqual(each.size, path.stat().st_size)
        for device in ('vdb', 'vdc'):
            self.assertEqual(f'{image.name}-{device}', group[device].name)
            # Nothing that Nova or Horizon would take for a root disk.
            raw = self.cloud.image.get(f'/images/{group[device].id}').json()
            self.assertEqual([], [name for name in raw if name.startswith((
                'hw_', 'image_', 'img_', 'base_image', 'boot_roles'))])
        counters = images.check_filesystems_point_in_time(
            [(self.image_file(group['vda']), 'qcow2')],
            images.DATA_PARTITION)
        counters.append(images.filesystem_counters(
            (self.image_file(group['vdb']), 'qcow2')))
        images.check_order(counters)
        self.assertTrue(before <= counters[0][0] <= after + 1,
                        f'{before} {counters} {after}')
        # mkswap's signature at the end of the first page
        self.assertIn('SWAPSPACE2', base.run(
            'qemu-io', '-r', '-f', 'qcow2', '-c', 'read -v 4080 16',
            self.image_file(group['vdc'])).replace('.', ''))


class TakeTest(AllDisksTestCase):

    def test_each_flow(self):
        server = self.counting_server()
        for flow in ('backup', 'live', 'cold'):
            before = self.wait_writes(server)
            image = self.snapshot(server, snapshot_disks='all',
                                  snapshot_flow=flow)
            after = self.wait_writes(server)
            self.assertNotIn('snapshot_disks', image.properties)
            self.assert_one_instant(server, image, before, after, flow)
            self.assertEqual('ACTIVE', self.status(server))
        self.assertIn(' disks=3 ', self.compute_log())

    def test_server_that_is_booted_from_that_of_the_root_disk(self):
        server = self.server(flavor=self.flavor)
        before = self.counter(server)
        image = self.snapshot(server, snapshot_disks='all')
        after = self.wait_writes(server)
        # What it inherits is not taken for the next snapshot's own.
        second = self.server(image.id)
        self.assertTrue(before <= self.booted_from(second) <= after + 1)
        again = self.snapshot(second)
        self.assertNotIn('snapshot_ext_group', again.properties)
        self.assertEqual(3, len(self.group(image)))

    def test_value_that_is_none(self):
        server = self.server()
        image_id = self.request_snapshot(server, snapshot_disks='some')
        self.wait(lambda: self.cloud.image.find_image(
            image_id, ignore_missing=True) is None, 'the image to go')
        self.assertIn('image property snapshot_disks = some is not valid: it '
                      'must be root or all', self.compute_log())
        self.assertEqual([], self.own_images())

    def test_backups_are_rotated(self):
        self.configure('snapshot_ext.disks=all')
        server = self.server(flavor=self.flavor)
        groups = []
        for number in range(3):
            name = f'{server.name}-{number}'
            self.compute.backup_server(server, name, 'daily', 1)
            self.wait(lambda name=name: getattr(
                self.cloud.image.find_image(name), 'status', '') == 'active',
                'the backup')
            self.wait_idle(server)
            groups.append(self.cloud.image.find_image(name).id)
        # Nova has kept one, and this package what belongs to it and to the
        # one that was deleted when it was taken.
        self.wait(lambda: {
            image.properties.get('snapshot_ext_group')
            for image in self.own_images()} == set(groups[1:]),
            'the first backup to go')
        self.assertEqual(
            [groups[2]], [image.id for image in self.own_images()
                          if image.id in groups])


class EndTest(AllDisksTestCase):
    """Whatever ends a snapshot, none of its images is left."""

    def test_it_is_ended(self):
        self.configure(*SLOW)
        server = self.server(flavor=self.flavor)
        for whole in (0, 2):
            image_id = self.begin(server, whole)
            self.cloud.image.delete_image(image_id)
            self.wait_idle(server)
            self.assertEqual([], self.own_images())
            self.assert_host_is_clean()
        for whole in (0, 2):
            image_id = self.begin(server, whole)
            base.run(base.TOOL, 'restart-compute', '--kill')
            self.wait_idle(server)
            self.wait(lambda: not self.own_images(), 'the images to go')
            self.wait(lambda: not self.state_files(), 'the records to go')
            self.assert_host_is_clean()
            self.wait_writes(server)
        # And the next one works.
        self.configure()
        image = self.snapshot(server, snapshot_disks='all')
        self.assertEqual(3, len(self.group(image)))

    def begin(self, server: ty.Any, whole: int) -> str:
        """Ask for a snapshot, and wait until so many images of further disks
        are whole, or more, and the next one is filled; none of them may be
        seen."""
        image_id = self.request_snapshot(server, snapshot_disks='all')
        deadline = time.monotonic() + base.TIMEOUT_S
        while True:
            found = self.own_images()
            self.assertEqual([image_id], [
                image.id for image in found if not image.is_hidden])
            states = [image.status for image in found]
            if states.count('active') >= whole and 'saving' in states:
                return image_id
            self.assertLess(time.monotonic(), deadline, states)
            time.sleep(0.1)
