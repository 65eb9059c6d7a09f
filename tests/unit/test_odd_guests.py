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

"""Guests, requests and flavors of any kind: a plan, or one clear line."""

import dataclasses
import os
from xml.etree import ElementTree

import hypothesis
from hypothesis import strategies

from nova_snapshot_ext.cmd import snapshot as cmd
from nova_snapshot_ext import disk as disks
from nova_snapshot_ext import exception
from nova_snapshot_ext.flows import base as flows
from nova_snapshot_ext import selection
from tests.unit import base
from tests.unit import fakes
from tests.unit import test_cmd_snapshot

KINDS = ('file', 'block', 'network', 'dir', 'volume', 'nvme', 'vhostuser', '')
DEVICES = ('disk', 'cdrom', 'floppy', 'lun', '')
FORMATS = ('raw', 'qcow2', 'vmdk', 'luks', 'host_device', '')
TARGETS = ('vda', 'vda', 'vdb', 'sda', 'hda', '', '../vda', 'a"]/..',
           'x' * 30)
#: words that XML can hold
words = strategies.text(strategies.characters(
    min_codepoint=32, max_codepoint=0xd7ff), max_size=20)

settings = hypothesis.settings(
    max_examples=50, deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck))


def mostly(usual: tuple[str, ...],
           odd: strategies.SearchStrategy[str],
           ) -> strategies.SearchStrategy[str]:
    """Odd now and then, so that the rest of a disk is looked at, too."""
    return strategies.integers(0, 7).flatmap(
        lambda chance: strategies.sampled_from(usual) if chance else odd)


def one_of(values: tuple[str, ...]) -> strategies.SearchStrategy[str]:
    return strategies.sampled_from(values)


@strategies.composite
def odd_disks(draw: strategies.DrawFn,
              paths: tuple[str, ...]) -> ElementTree.Element:
    kind = draw(mostly(('file', 'block'), one_of(KINDS)))
    fmt = draw(mostly(('raw', 'qcow2'), one_of(FORMATS)))
    disk = ElementTree.Element(
        'disk', type=kind, device=draw(mostly(('disk',), one_of(DEVICES))))
    if draw(strategies.integers(0, 7)):
        source = ElementTree.SubElement(disk, 'source')
        source.set(
            draw(mostly(('dev' if kind == 'block' else 'file',),
                        one_of(('protocol', 'name', 'dir')))),
            draw(mostly((paths[0] if fmt == 'raw' else paths[-1],),
                        one_of(paths) | words)))
        if draw(strategies.integers(0, 9)) == 9:
            ElementTree.SubElement(source, 'encryption', format='luks')
    if draw(strategies.integers(0, 9)):
        ElementTree.SubElement(disk, 'driver', name='qemu', type=fmt)
    if draw(strategies.integers(0, 9)):
        ElementTree.SubElement(disk, 'target', dev=draw(mostly(
            ('vda', 'vdb', 'vdc'), one_of(TARGETS) | words)))
    for name in ('shareable', 'transient', 'readonly'):
        if draw(strategies.integers(0, 7)) == 7:
            ElementTree.SubElement(disk, name)
    store = disk
    for _ in range(draw(strategies.sampled_from((0, 1, 2, 150, 1500)))):
        store = ElementTree.SubElement(store, 'backingStore', type='file')
        ElementTree.SubElement(store, 'format', type='qcow2')
        ElementTree.SubElement(store, 'source', file=paths[-1])
    if draw(strategies.booleans()):
        ElementTree.SubElement(store, 'backingStore')
    return disk


class TestOddDisks(test_cmd_snapshot.CommandTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.paths = (
            self.path, self.new_file('empty'), '/none', self.staging, '/', '',
            self.new_file('qcow2', base.qcow2_header()))
        self.patch_name('nova_snapshot_ext.qemu_img.run',
                        lambda *arguments, limits=None: '{}')
        self.element = ElementTree.Element('domain')
        self.patch_name('nova_snapshot_ext.guest.Guest.description',
                        lambda guest: self.element)

    @settings
    @hypothesis.given(data=strategies.data())
    def test_snapshot_is_planned_or_refused_in_one_line(
            self, data: strategies.DataObject) -> None:
        self.element = ElementTree.Element('domain')
        devices = ElementTree.SubElement(self.element, 'devices')
        found = data.draw(
            strategies.lists(odd_disks(self.paths), max_size=3))
        devices.extend(found)
        if data.draw(strategies.booleans()):
            self.domain.off()
        else:
            self.domain.current_state = [1, 1]
        self.taken.clear()
        flow = data.draw(strategies.sampled_from(
            ('backup', 'live', 'cold', None)))
        code = self.create(
            '--disks', data.draw(strategies.sampled_from(('root', 'all'))),
            *([] if flow is None else ['--flow', flow]))
        if code:
            self.assertEqual((cmd.REFUSED, []), (code, self.taken))
            self.assertRegex(self.err.getvalue(), r'\Anova-snapshot: .+\n\Z')
        else:
            [taken] = self.taken
            for planned in taken[2].disks:
                self.assert_sane(planned.disk, found)
        code = self.run_command('flows', 'instance-00000001')
        self.assertIn(code, (0, cmd.REFUSED))
        for directory in (self.staging, self.state, self.target):
            self.assertEqual([], os.listdir(directory))
        self.assertEqual([], self.journal)

    def assert_sane(self, disk: disks.Disk,
                    found: list[ElementTree.Element]) -> None:
        self.assertIn(disk.kind, ('file', 'block'))
        self.assertIn(disk.format, ('raw', 'qcow2'))
        self.assertEqual('disk', disk.device)
        self.assertRegex(disk.target, '^[A-Za-z0-9]{1,12}$')
        self.assertFalse(disk.encrypted or disk.shared)
        self.assertFalse(disk.transient and self.domain.state()[0] == 1)
        self.assertTrue(disks.json_name(
            disks.chain_options(disks.chain_of(disk))))
        self.assertEqual(1, [disks.target_of(each)
                             for each in found].count(disk.target))


class TestDisks(base.TestCase):

    def why(self, inside: str) -> str | None:
        self.domain.disks = fakes.disk_xml(self.new_file('a'), inside=inside)
        return flows.why_no_job_can_start(self.guest, self.guest.disks())

    def test_shared_disk_is_an_obstacle_whether_the_guest_runs(self) -> None:
        self.assertIsNone(self.why(''))
        self.assertIn('vda is shared', self.why('<shareable/>') or '')
        self.domain.off()
        self.assertIn('vda is shared',
                      flows.why_not_readable(self.guest.disks()) or '')

    def test_transient_disk_is_one_while_the_guest_runs(self) -> None:
        self.assertIn('vda is transient', self.why('<transient/>') or '')
        self.domain.off()
        self.assertIsNone(flows.why_not_readable(self.guest.disks()))

    def test_several_disks_of_one_name_are_refused(self) -> None:
        self.domain.disks = fakes.disk_xml('/a') + fakes.disk_xml(
            '/b', device='cdrom')
        self.assertRaisesRegex(exception.UnsafeDisk,
                               'several disks with the name vda',
                               self.guest.root_disk)

    def test_name_that_leads_elsewhere_is_refused(self) -> None:
        self.domain.disks = fakes.disk_xml('/a', target='../vda')
        self.assertRaisesRegex(exception.UnsafeDisk, '"../vda"',
                               self.guest.root_disk)

    def test_chain_that_can_not_be_opened_is_refused(self) -> None:
        layer = disks.Layer(self.new_file('l', base.qcow2_header()), 'qcow2')
        disk = dataclasses.replace(
            disks.Disk.from_element(ElementTree.fromstring(
                fakes.disk_xml(layer.path, 'qcow2'))), backing=(layer,) * 99)
        chain = disks.chain_of(disk)
        self.assertIn('qcow2', disks.json_name(disks.chain_options(chain)))
        self.assertRaisesRegex(
            exception.UnsafeDisk, 'vda is made of more than 100 images',
            disks.chain_of, dataclasses.replace(disk, backing=(layer,) * 100))


class TestWish(base.TestCase):

    @settings
    @hypothesis.given(
        asked=strategies.none() | strategies.text() | strategies.integers()
        | strategies.lists(strategies.text(), max_size=2),
        flavor=strategies.none() | strategies.text(max_size=300))
    def test_property_and_extra_spec_name_a_flow_or_are_refused(
            self, asked: object, flavor: str | None) -> None:
        self.domain.disks = fakes.disk_xml(self.new_file('a'))
        try:
            wished = selection.wish(
                asked, flavor,  # type: ignore[arg-type]
                ['cold'], ['live', 'cold'])
            [found, *_] = selection.candidates(
                wished, self.guest, self.guest.disks(), self.request())
        except exception.InvalidSetting as error:
            self.assertTrue(str(error).isprintable(), str(error))
            self.assertLess(len(str(error)), 500)
            self.assertNotIn(asked, ('live', 'cold'))
        else:
            self.assertEqual(asked or flavor or 'cold', found.name)
