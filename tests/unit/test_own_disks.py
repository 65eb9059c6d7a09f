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

"""What a snapshot of all disks is of, and what it never is of."""

from nova_snapshot_ext import exception
from nova_snapshot_ext import own_disks
from nova_snapshot_ext import request as requests
from tests.unit import base
from tests.unit import fakes

NOVA = ('<metadata><nova:instance xmlns:nova='
        '"http://openstack.org/xmlns/libvirt/nova/1.1"/></metadata>')
INSTANCE = '/var/lib/nova/instances/1'


class OwnDisksTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.count = 0

    def add(self, path: str, **more: str) -> None:
        target = f'vd{"abcdefghijkl"[self.count]}'
        self.count += 1
        self.domain.disks += fakes.disk_xml(
            path, **{'target': target, **more})

    def chosen(self, which: requests.Disks = requests.Disks.ALL,
               ) -> list[tuple[str, str]]:
        return [(each.disk.target, each.kind.value)
                for each in own_disks.chosen(self.guest, which)]


class TestOfNova(OwnDisksTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.domain.rest = NOVA
        self.add(f'{INSTANCE}/disk')

    def test_ephemeral_disks_and_swap(self) -> None:
        for name in ('local', 'eph0', 'eph1', 'eph10', 'swap'):
            self.add(f'{INSTANCE}/disk.{name}')
        self.assertEqual(
            [('vda', 'root'), ('vdb', 'ephemeral'), ('vdc', 'ephemeral'),
             ('vdd', 'ephemeral'), ('vde', 'ephemeral'), ('vdf', 'swap')],
            self.chosen())

    def test_root_disk_alone_is_what_is_asked_for(self) -> None:
        self.add(f'{INSTANCE}/disk.eph0')
        self.assertEqual([('vda', 'root')],
                         self.chosen(requests.Disks.ROOT))

    def test_disks_that_write_into_overlays(self) -> None:
        self.domain.disks, self.count = '', 0
        names = [f'{INSTANCE}/snapshot-ext-{digit * 32}' for digit in '21']
        self.patch_name('nova_snapshot_ext.disk._check_header',
                        lambda layer: None)
        for path in ('disk', 'disk.eph0', 'volume-1'):
            target = f'vd{"abc"[self.count]}'
            below = [f'{names[1]}.{target}', f'{INSTANCE}/{path}']
            self.add(f'{names[0]}.{target}', fmt='qcow2', inside=''.join(
                f'<backingStore type="file"><format type="qcow2"/>'
                f'<source file="{each}"/>' for each in below)
                + '<backingStore/>' + '</backingStore>' * len(below))
        self.assertEqual([('vda', 'root'), ('vdb', 'ephemeral')],
                         self.chosen())

    def test_logical_volumes_of_nova(self) -> None:
        self.domain.disks = ''
        for name in ('', '.eph0', '.swap', '.config'):
            self.add(f'/dev/vg/1_disk{name}', kind='block')
        self.assertEqual(
            ['root', 'ephemeral', 'swap'],
            [kind for _, kind in self.chosen()])

    def test_no_volume(self) -> None:
        for path, kind in (('/var/lib/nova/mnt/0f/volume-1', 'file'),
                           (f'{INSTANCE}/volume-1', 'file'),
                           (f'{INSTANCE}/disk.eph0/volume-1', 'file'),
                           ('/dev/disk/by-path/ip-1', 'block'),
                           ('volumes/1', 'network')):
            self.add(path, kind=kind)
        self.assertEqual([('vda', 'root')], self.chosen())

    def test_no_config_drive(self) -> None:
        self.add(f'{INSTANCE}/disk.config')
        self.add(f'{INSTANCE}/disk.config', device='cdrom')
        self.assertEqual([('vda', 'root')], self.chosen())

    def test_no_rescue_disk_and_none_of_another_server(self) -> None:
        for path in (f'{INSTANCE}/disk.rescue', f'{INSTANCE}/disk.ephemeral',
                     f'{INSTANCE}/disk.eph', f'{INSTANCE}2/disk.eph0',
                     f'{INSTANCE}/disk.eph0.swap'):
            self.add(path)
        self.assertEqual([('vda', 'root')], self.chosen())

    def test_nothing_read_only(self) -> None:
        self.add(f'{INSTANCE}/disk.eph0', inside='<readonly/>')
        self.add(f'{INSTANCE}/disk.swap', device='cdrom')
        self.assertEqual([('vda', 'root')], self.chosen())


class TestOfOthers(OwnDisksTestCase):

    def test_all_that_are_written_to(self) -> None:
        self.add('/a/root')
        self.add('/b/data')
        self.add('/dev/vg/other', kind='block')
        self.add('/c/iso', device='cdrom')
        self.add('/c/floppy', device='floppy')
        self.add('/c/read', inside='<readonly/>')
        self.assertEqual([('vda', 'root'), ('vdb', 'data'), ('vdc', 'data')],
                         self.chosen())

    def test_one_that_no_flow_can_serve_is_not_left_out(self) -> None:
        self.add('/a/root')
        self.add('pool/image', kind='network')
        self.assertEqual(['root', 'data'],
                         [kind for _, kind in self.chosen()])

    def test_names_are_looked_at(self) -> None:
        self.add('/a/root')
        self.add('/b/data', target='../vdb')
        self.assertRaises(exception.UnsafeDisk, self.chosen)
        self.assertEqual(1, len(self.chosen(requests.Disks.ROOT)))

    def test_names_are_of_one_disk(self) -> None:
        self.add('/a/root')
        self.add('/b/data', target='vdb')
        self.add('/c/data', target='vdb')
        self.assertRaises(exception.UnsafeDisk, self.chosen)
