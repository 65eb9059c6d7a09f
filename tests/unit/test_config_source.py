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

import importlib
import subprocess
import sys

from oslo_config import cfg
from oslo_config import sources

from nova_snapshot_ext import config_source
from tests.unit import base

NOVA_CONF = """
[DEFAULT]
config_source = snapshot_ext
{}
[snapshot_ext]
driver = snapshot_ext
"""


class TestSource(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.finders = list(sys.meta_path)
        self.addCleanup(self.restore)

    def restore(self) -> None:
        sys.meta_path[:] = self.finders

    def parsed(self, more: str = '') -> cfg.ConfigOpts:
        path = self.new_file('nova.conf', NOVA_CONF.format(more).encode())
        configuration = cfg.ConfigOpts()
        configuration.register_opts([
            cfg.StrOpt('compute_driver'), cfg.StrOpt('host', default='a')])
        configuration.register_opts(
            [cfg.StrOpt('compute_driver')], group='other')
        configuration([], default_config_files=[path])
        return configuration

    def test_it_answers_for_the_compute_driver(self) -> None:
        self.assertEqual('snapshot_ext.SnapshotLibvirtDriver',
                         self.parsed().compute_driver)

    def test_value_in_the_file_wins(self) -> None:
        self.assertEqual('fake.FakeDriver', self.parsed(
            'compute_driver = fake.FakeDriver').compute_driver)

    def test_it_answers_for_nothing_else(self) -> None:
        configuration = self.parsed()
        self.assertEqual('a', configuration.host)
        self.assertIsNone(configuration.other.compute_driver)

    def test_unset_is_told_as_oslo_config_wants_it(self) -> None:
        source = config_source.SnapshotExtSource()
        self.assertEqual((sources._NoValue, None),
                         source.get('DEFAULT', 'host', None))
        self.assertEqual(config_source.COMPUTE_DRIVER,
                         source.get(None, 'compute_driver', None)[0])

    def count(self) -> int:
        return len([finder for finder in sys.meta_path if isinstance(
            finder, config_source._DriverModule)])

    def test_parsing_twice_adds_one_finder(self) -> None:
        before = self.count()
        self.parsed()
        self.parsed()
        self.assertLessEqual(self.count(), max(before, 1))
        self.assertEqual(1, self.count())

    def test_finder_knows_one_name(self) -> None:
        finder = config_source._DriverModule()
        self.assertIsNone(finder.find_spec('nova.virt.snapshot', None))
        self.assertIsNone(finder.find_spec('nova.virt.libvirt', None))
        self.assertIsNotNone(finder.find_spec(config_source.MODULE, None))

    def test_name_that_nova_asks_for_is_our_driver(self) -> None:
        self.parsed()
        sys.modules.pop(config_source.MODULE, None)
        module = importlib.import_module('nova.virt.snapshot_ext')
        self.addCleanup(sys.modules.pop, config_source.MODULE, None)
        driver = importlib.import_module('nova_snapshot_ext.driver')
        self.assertIs(driver.SnapshotLibvirtDriver,
                      module.SnapshotLibvirtDriver)

    def test_nothing_of_nova_is_imported(self) -> None:
        # Nova parses before it decides on its concurrency backend.
        program = (
            'import sys, oslo_config.cfg, oslo_config.sources\n'
            'before = set(sys.modules)\n'
            'import nova_snapshot_ext.config_source\n'
            'new = {name.partition(".")[0] for name in sys.modules}\n'
            'new -= {name.partition(".")[0] for name in before}\n'
            'print(*sorted(new - set(sys.stdlib_module_names)))\n')
        output = subprocess.run(
            [sys.executable, '-c', program], check=True,
            capture_output=True, text=True).stdout
        self.assertEqual('nova_snapshot_ext', output.strip())
