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
"""What our wheel brings to a host, and what it must not."""

import sys
import zipfile

import testtools

from tests.loading import installations


class TestWheel(testtools.TestCase):

    def setUp(self) -> None:
        super().setUp()
        with zipfile.ZipFile(installations.our_wheel()) as wheel:
            self.names = wheel.namelist()

    def test_nothing_is_installed_beside_the_package(self) -> None:
        # A nova/ of ours breaks an editable Nova, and a .pth file runs in
        # every Python of the host.
        tops = {name.partition('/')[0] for name in self.names}
        package, metadata = sorted(tops, key=len)
        self.assertEqual('nova_snapshot_ext', package)
        self.assertRegex(
            metadata, r'^nova_snapshot_ext-[^/]+\.dist-info$')
        self.assertEqual(
            [], [name for name in self.names if name.endswith('.pth')])

    def test_every_plug_point_is_in_it(self) -> None:
        entry_points, = (name for name in self.names
                         if name.endswith('entry_points.txt'))
        with zipfile.ZipFile(installations.our_wheel()) as wheel:
            text = wheel.read(entry_points).decode()
        for group in ('oslo.config.driver', 'oslo.config.opts',
                      'nova.api.extra_spec_validators',
                      'nova_snapshot_ext.flows',
                      'nova_snapshot_ext.transfers',
                      'nova_snapshot_ext.image_services'):
            self.assertIn(f'[{group}]\n', text)


class TestConfigSource(testtools.TestCase):

    def test_it_imports_the_standard_library_and_oslo_config_only(
            self) -> None:
        # A fresh interpreter, in which oslo.config alone was imported.
        found = installations.nova_as_wheel().script(
            'imports_of_config_source.py').stdout.split()
        self.assertIn('nova_snapshot_ext.config_source', found)
        foreign = {name for name in found
                   if name.partition('.')[0] not in sys.stdlib_module_names
                   and name not in ('nova_snapshot_ext',
                                    'nova_snapshot_ext.config_source')}
        self.assertEqual(set(), foreign)


class TestExtraSpec(testtools.TestCase):

    def test_nova_api_accepts_our_extra_spec(self) -> None:
        self.assertEqual('accepted', installations.nova_as_wheel().script(
            'check_extra_spec.py', 'snapshot_ext:flow', 'cold',
        ).stdout.strip())

    def test_nova_api_refuses_what_is_no_name_of_a_flow(self) -> None:
        self.assertIn('refused', installations.nova_as_wheel().script(
            'check_extra_spec.py', 'snapshot_ext:flow', 'Not a name',
        ).stdout)
