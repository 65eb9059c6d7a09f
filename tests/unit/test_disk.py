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

import json
import os
from xml.etree import ElementTree

from nova_snapshot_ext import disk as disks
from nova_snapshot_ext import exception
from tests.unit import base
from tests.unit import fakes

# Incompatible features (QEMU, docs/interop/qcow2.txt).
DATA_FILE = 1 << 2
UNHEARD_OF = 1 << 9


def parsed(xml: str) -> disks.Disk:
    return disks.Disk.from_element(ElementTree.fromstring(xml))


class FakeQemuImg:
    """Answers ``qemu-img info`` by the path, and keeps the commands."""

    def __init__(self, **backing: object) -> None:
        self.answers: dict[str, dict[str, object]] = {}
        self.commands: list[tuple[str, ...]] = []

    def run(self, *arguments: str, limits: object = None) -> str:
        self.commands.append(arguments)
        options = json.loads(arguments[-1].removeprefix('json:'))
        return json.dumps(self.answers.get(options['file']['filename'], {}))


class TestElement(base.TestCase):

    def test_file_disk(self) -> None:
        disk = parsed(fakes.disk_xml('/disks/a', 'qcow2'))
        self.assertEqual(
            ('vda', 'file', 'disk', '/disks/a', 'qcow2', False, False),
            (disk.target, disk.kind, disk.device, disk.path, disk.format,
             disk.encrypted, disk.block))

    def test_block_disk(self) -> None:
        disk = parsed(fakes.disk_xml('/dev/vg/a', kind='block'))
        self.assertEqual(('/dev/vg/a', True), (disk.path, disk.block))

    def test_network_disk_has_no_path(self) -> None:
        disk = parsed("<disk type='network' device='disk'>"
                      "<source protocol='rbd' name='vms/a'/>"
                      "<target dev='vda'/></disk>")
        self.assertEqual(('network', '', ''),
                         (disk.kind, disk.path, disk.format))

    def test_empty_drive(self) -> None:
        disk = parsed("<disk type='file' device='cdrom'/>")
        self.assertEqual(('', '', 'cdrom'),
                         (disk.path, disk.target, disk.device))

    def test_encryption_is_seen_wherever_libvirt_shows_it(self) -> None:
        for inside in ("<encryption format='luks'/>",
                       "<backingStore type='file'><source file='/b'>"
                       "<encryption format='luks'/></source>"
                       "</backingStore>"):
            self.assertTrue(parsed(
                fakes.disk_xml('/a', inside=inside)).encrypted)

    def test_encryption_below_libvirt_is_seen(self) -> None:
        self.patch_name('nova_snapshot_ext.disk.is_dm_crypt',
                        lambda path: path == '/dev/mapper/a')
        self.assertTrue(parsed(
            fakes.disk_xml('/dev/mapper/a', kind='block')).encrypted)
        self.assertFalse(parsed(
            fakes.disk_xml('/dev/mapper/b', kind='block')).encrypted)

    def test_plain_file_is_not_dm_crypt(self) -> None:
        self.assertFalse(disks.is_dm_crypt(self.new_file('a')))
        self.assertFalse(disks.is_dm_crypt('/dev/null'))


class TestBacking(base.TestCase):

    STORE = ("<backingStore type='file'><format type='{}'/>"
             "<source file='{}'/>{}</backingStore>")

    def backing(self, inside: str) -> tuple[disks.Layer, ...] | None:
        return parsed(fakes.disk_xml('/a', inside=inside)).backing

    def test_empty_element_ends_the_chain(self) -> None:
        self.assertEqual((), self.backing('<backingStore/>'))

    def test_no_element_means_unknown(self) -> None:
        self.assertIsNone(self.backing(''))

    def test_nearest_layer_is_first(self) -> None:
        inner = self.STORE.format('raw', '/c', '<backingStore/>')
        self.assertEqual(
            (disks.Layer('/b', 'qcow2'), disks.Layer('/c', 'raw')),
            self.backing(self.STORE.format('qcow2', '/b', inner)))

    def test_chain_without_its_end_is_unknown(self) -> None:
        self.assertIsNone(self.backing(self.STORE.format('raw', '/b', '')))

    def test_layer_without_format_or_path_is_unknown(self) -> None:
        self.assertIsNone(self.backing(
            "<backingStore type='file'><source file='/b'/>"
            "<backingStore/></backingStore>"))
        self.assertIsNone(self.backing(
            "<backingStore type='network'><format type='raw'/>"
            "<source name='b'/><backingStore/></backingStore>"))

    def test_block_layer(self) -> None:
        self.assertEqual((disks.Layer('/dev/b', 'raw', True),), self.backing(
            "<backingStore type='block'><format type='raw'/>"
            "<source dev='/dev/b'/><backingStore/></backingStore>"))


class TestChain(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.qemu_img = FakeQemuImg()
        self.patch_name(
            'nova_snapshot_ext.qemu_img.run', self.qemu_img.run)

    def chain(self, path: str, fmt: str = 'qcow2',
              inside: str = '') -> tuple[disks.Layer, ...]:
        return disks.chain_of(parsed(
            fakes.disk_xml(path, fmt, inside=inside)))

    def test_raw_disk_is_not_looked_at(self) -> None:
        # A guest wrote this header into its own raw disk.
        path = self.new_file('disk', base.qcow2_header(DATA_FILE))
        opened = []
        real = open
        self.patch_name('builtins.open', lambda file, *rest, **more: (
            opened.append(file), real(file, *rest, **more))[1])
        self.assertEqual(
            (disks.Layer(path, 'raw'),), self.chain(path, 'raw'))
        self.assertEqual(([], []), (opened, self.qemu_img.commands))

    def test_other_formats_are_refused(self) -> None:
        for fmt in ('', 'vmdk', 'luks'):
            self.assertRaisesRegex(
                exception.UnsafeDisk, 'only raw and qcow2',
                self.chain, '/a', fmt)

    def test_qcow2_without_backing_file(self) -> None:
        path = self.new_file('disk', base.qcow2_header())
        self.assertEqual((disks.Layer(path, 'qcow2'),), self.chain(path))

    def test_data_file_is_refused(self) -> None:
        path = self.new_file('disk', base.qcow2_header(DATA_FILE))
        for inside in ('', '<backingStore/>'):
            self.assertRaisesRegex(
                exception.UnsafeDisk, 'not safe', self.chain, path,
                inside=inside)

    def test_unknown_feature_is_refused(self) -> None:
        path = self.new_file('disk', base.qcow2_header(UNHEARD_OF))
        self.assertRaises(exception.UnsafeDisk, self.chain, path)

    def test_qcow2_without_its_header_is_refused(self) -> None:
        path = self.new_file('disk', b'\0' * 4096)
        self.assertRaisesRegex(
            exception.UnsafeDisk, 'no qcow2 header', self.chain, path)

    def test_header_that_can_not_be_read_is_refused(self) -> None:
        self.assertRaisesRegex(
            exception.UnsafeDisk, 'can not be read', self.chain,
            os.path.join(self.directory, 'none'))

    def test_data_file_of_a_lower_layer_is_refused(self) -> None:
        top = self.new_file('disk', base.qcow2_header())
        low = self.new_file('base', base.qcow2_header(DATA_FILE))
        self.qemu_img.answers[top] = {
            'full-backing-filename': low,
            'backing-filename-format': 'qcow2'}
        self.assertRaises(exception.UnsafeDisk, self.chain, top)
        self.assertRaises(
            exception.UnsafeDisk, self.chain, top,
            inside=TestBacking.STORE.format('qcow2', low, '<backingStore/>'))

    def test_running_guests_chain_comes_from_libvirt(self) -> None:
        path = self.new_file('disk', base.qcow2_header())
        self.assertEqual(
            (disks.Layer(path, 'qcow2'), disks.Layer('/b', 'raw')),
            self.chain(path, inside=TestBacking.STORE.format(
                'raw', '/b', '<backingStore/>')))
        self.assertEqual([], self.qemu_img.commands)

    def test_chain_from_headers(self) -> None:
        top = self.new_file('disk', base.qcow2_header())
        middle = self.new_file('middle', base.qcow2_header())
        self.qemu_img.answers[top] = {
            'full-backing-filename': middle,
            'backing-filename-format': 'qcow2'}
        self.qemu_img.answers[middle] = {
            'full-backing-filename': '/base',
            'backing-filename-format': 'raw'}
        self.assertEqual(
            (disks.Layer(top, 'qcow2'), disks.Layer(middle, 'qcow2'),
             disks.Layer('/base', 'raw')), self.chain(top))
        for command in self.qemu_img.commands:
            options = json.loads(command[-1].removeprefix('json:'))
            self.assertEqual(('qcow2', True), (
                options['driver'], options['force-share']))

    def test_backing_device_is_a_block_layer(self) -> None:
        top = self.new_file('disk', base.qcow2_header())
        self.qemu_img.answers[top] = {
            'full-backing-filename': '/dev/null',
            'backing-filename-format': 'raw'}
        self.assertEqual(disks.Layer('/dev/null', 'raw', True),
                         self.chain(top)[1])

    def test_backing_file_of_no_recorded_format_is_refused(self) -> None:
        top = self.new_file('disk', base.qcow2_header())
        self.qemu_img.answers[top] = {'full-backing-filename': '/base'}
        self.assertRaisesRegex(
            exception.UnsafeDisk, 'not recorded', self.chain, top)

    def test_backing_file_of_another_format_is_refused(self) -> None:
        top = self.new_file('disk', base.qcow2_header())
        self.qemu_img.answers[top] = {
            'full-backing-filename': '/base',
            'backing-filename-format': 'vmdk'}
        self.assertRaisesRegex(
            exception.UnsafeDisk, 'vmdk', self.chain, top)

    def test_backing_file_that_is_no_path_is_refused(self) -> None:
        top = self.new_file('disk', base.qcow2_header())
        for name in ('json:{"driver": "nbd"}', 'nbd://host/export'):
            self.qemu_img.answers[top] = {
                'full-backing-filename': name,
                'backing-filename-format': 'raw'}
            self.assertRaisesRegex(
                exception.UnsafeDisk, 'not a plain path', self.chain, top)

    def test_chain_that_never_ends_is_refused(self) -> None:
        top = self.new_file('disk', base.qcow2_header())
        self.qemu_img.answers[top] = {
            'full-backing-filename': top,
            'backing-filename-format': 'qcow2'}
        self.assertRaises(exception.UnsafeDisk, self.chain, top)


class TestOptions(base.TestCase):

    def test_every_layer_has_its_driver_named(self) -> None:
        self.assertEqual({
            'driver': 'qcow2',
            'file': {'driver': 'file', 'filename': '/a'},
            'backing': {
                'driver': 'qcow2',
                'file': {'driver': 'file', 'filename': '/b'},
                'backing': {
                    'driver': 'raw',
                    'file': {'driver': 'host_device', 'filename': '/dev/c'},
                }},
        }, disks.chain_options((
            disks.Layer('/a', 'qcow2'), disks.Layer('/b', 'qcow2'),
            disks.Layer('/dev/c', 'raw', True))))

    def test_backing_file_of_the_last_header_is_not_opened(self) -> None:
        options = disks.chain_options((disks.Layer('/a', 'qcow2'),))
        self.assertIsNone(options['backing'])

    def test_path_can_add_no_options(self) -> None:
        path = '/a,driver=qcow2","driver":"qcow2'
        name = disks.json_name(
            disks.layer_options(disks.Layer(path, 'raw')))
        self.assertTrue(name.startswith('json:'))
        self.assertEqual(
            {'driver': 'raw', 'file': {'driver': 'file', 'filename': path}},
            json.loads(name.removeprefix('json:')))


class TestSize(base.TestCase):

    MIB = 1024 ** 2

    def test_block_device_may_be_full(self) -> None:
        self.assertEqual(9 * self.MIB, disks.allocated_bytes(
            disks.Layer('/dev/null', 'raw', True), 9 * self.MIB))

    def test_sparse_file_takes_what_it_has(self) -> None:
        path = self.new_file('a')
        os.truncate(path, 9 * self.MIB)
        self.assertEqual(0, disks.allocated_bytes(
            disks.Layer(path, 'raw'), 9 * self.MIB))

    def test_file_that_can_not_be_seen_may_be_full(self) -> None:
        self.assertEqual(9 * self.MIB, disks.allocated_bytes(
            disks.Layer('/none', 'raw'), 9 * self.MIB))

    def test_compressed_base_may_grow_to_the_whole_disk(self) -> None:
        path = self.new_file('a')
        chain = (disks.Layer(path, 'qcow2'), disks.Layer(path, 'qcow2'))
        self.assertLess(9 * self.MIB,
                        disks.image_bytes(chain, 9 * self.MIB))
        self.assertGreater(9 * self.MIB,
                           disks.image_bytes(chain[:1], 9 * self.MIB))
