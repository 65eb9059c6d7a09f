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

from oslo_config import cfg

from nova_snapshot_ext import conf
from nova_snapshot_ext import plugins
from tests.unit import base


class TestOptions(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.configuration = cfg.ConfigOpts()
        conf.register_opts(self.configuration)

    def parsed(self, text: str) -> cfg.ConfigOpts:
        path = self.new_file('nova.conf', text.encode())
        self.configuration([], default_config_files=[path])
        return self.configuration.snapshot_ext

    def test_registering_twice_does_no_harm(self) -> None:
        conf.register_opts(self.configuration)

    def test_defaults_name_what_is_shipped(self) -> None:
        group = self.parsed('')
        for namespace, names in (
                (plugins.FLOWS, group.flows),
                (plugins.FLOWS, group.request_flows),
                (plugins.TRANSFERS, group.transfers),
                (plugins.IMAGE_SERVICES, [group.image_service])):
            self.assertNotEqual([], names)
            for name in names:
                plugins.load(namespace, name, 'default')

    def test_lists_have_an_order(self) -> None:
        self.assertEqual(['cold', 'live'], self.parsed(
            '[snapshot_ext]\nflows = cold, live\n').flows)

    def test_no_requests_may_be_allowed(self) -> None:
        self.assertEqual([], self.parsed(
            '[snapshot_ext]\nrequest_flows =\n').request_flows)

    def test_values_that_are_not_known_are_refused(self) -> None:
        for option, value in (('verify', 'maybe'), ('encrypted', 'decrypt'),
                              ('freeze_timeout', '0'),
                              ('copy_timeout', '0'),
                              ('save_timeout', '0'),
                              ('convert_timeout', '-1')):
            self.assertRaises(
                ValueError, lambda: self.parsed(
                    f'[snapshot_ext]\n{option} = {value}\n')[option])

    def test_every_option_is_listed_and_has_help(self) -> None:
        [(group, options)] = conf.list_opts()
        self.assertEqual('snapshot_ext', group.name)
        self.assertEqual(conf.OPTS, options)
        for option in options:
            self.assertTrue((option.help or '').strip(), option.name)
