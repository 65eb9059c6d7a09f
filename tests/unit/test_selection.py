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

import fixtures

from nova_snapshot_ext import exception
from nova_snapshot_ext import selection
from tests.unit import base


class TestWish(base.TestCase):

    def wish(self, asked: str | None = None, flavor: str | None = None,
             allowed: tuple[str, ...] = ('live', 'cold')) -> selection.Wish:
        return selection.wish(asked, flavor, ['live', 'cold'], allowed)

    def test_request_counts_before_the_flavor(self) -> None:
        wished = self.wish('cold', 'live')
        self.assertEqual((('cold',), True), (wished.names, wished.exact))
        self.assertIn('snapshot_flow', wished.source)

    def test_flavor_counts_before_the_configuration(self) -> None:
        wished = self.wish(None, 'cold')
        self.assertEqual((('cold',), True), (wished.names, wished.exact))
        self.assertIn('snapshot_ext:flow', wished.source)

    def test_configuration_counts_when_nobody_asks(self) -> None:
        wished = self.wish()
        self.assertEqual(
            (('live', 'cold'), False), (wished.names, wished.exact))
        self.assertIn('[snapshot_ext] flows', wished.source)

    def test_request_that_is_not_allowed_is_refused(self) -> None:
        self.assertRaisesRegex(
            exception.InvalidSetting, 'allows live', self.wish, 'cold',
            None, ('live',))

    def test_cloud_may_allow_no_requests(self) -> None:
        self.assertRaisesRegex(
            exception.InvalidSetting, 'no requests', self.wish, 'cold',
            None, ())

    def test_empty_request_is_one(self) -> None:
        self.assertRaises(exception.InvalidSetting, self.wish, '')

    def test_flavor_may_name_what_a_request_may_not(self) -> None:
        self.assertEqual(
            ('cold',), self.wish(None, 'cold', ('live',)).names)


class DemoFlow:
    why: str | None = None

    def obstacle(self, guest: object, disks: object,
                 request: object) -> str | None:
        return self.why


class TestCandidates(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.obstacles: dict[str, str | None] = {
            'one': None, 'two': None, 'three': None}
        self.patch_name('nova_snapshot_ext.plugins.load', self.load)

    def load(self, namespace: str, name: str, setting: str) -> object:
        if name not in self.obstacles:
            raise exception.InvalidSetting(setting, name, 'not installed')
        return type(name, (DemoFlow,), {'why': self.obstacles[name]})

    def candidates(self, *names: str, **changes: object) -> list[str]:
        return [each.name for each in selection.candidates(
            selection.Wish(names, 'the test', False), self.guest, (),
            self.request(**changes))]

    def test_order_is_kept(self) -> None:
        self.assertEqual(['two', 'one'], self.candidates('two', 'one'))

    def test_flow_with_an_obstacle_is_left_out(self) -> None:
        self.obstacles['one'] = 'it rains'
        self.assertEqual(['two'], self.candidates('one', 'two'))

    def test_all_obstacles_are_in_one_line_of_the_log(self) -> None:
        self.obstacles.update(one='it rains', two='it snows')
        self.candidates('one', 'two', 'three')
        lines = [line for line in self.output.output.splitlines() if line]
        self.assertEqual(1, len(lines))
        self.assertIn('one can not serve, it rains; '
                      'two can not serve, it snows', lines[0])

    def test_flow_that_was_not_needed_is_not_logged(self) -> None:
        self.obstacles['two'] = 'it snows'
        self.assertEqual(['one', 'three'],
                         self.candidates('one', 'two', 'three'))
        self.assertEqual('', self.output.output)

    def test_nothing_is_logged_without_obstacles(self) -> None:
        self.candidates('one')
        self.assertEqual('', self.output.output)

    def test_obstacles_are_the_error_when_nothing_can_serve(self) -> None:
        self.obstacles.update(one='it rains', two='it snows')
        error = self.assertRaises(
            exception.NoFlowServes, self.candidates, 'one', 'two')
        self.assertEqual(
            {'one': 'it rains', 'two': 'it snows'}, error.obstacles)
        self.assertEqual(
            'No flow of the test can serve. one: it rains; two: it snows',
            str(error))

    def test_flow_that_is_switched_off_can_not_serve(self) -> None:
        self.assertEqual(['two'], self.candidates(
            'one', 'two', disabled_flows={'one': 'switched off'}))

    def test_unknown_flow_is_an_error_even_if_another_serves(self) -> None:
        self.assertRaises(
            exception.InvalidSetting, self.candidates, 'one', 'none')


class TestUnknownFlow(base.TestCase):

    def test_installed_flows_are_named(self) -> None:
        self.useFixture(fixtures.FakeLogger())
        wished = selection.wish(None, 'warm', [], [])
        error = self.assertRaises(
            exception.InvalidSetting, selection.candidates, wished,
            self.guest, (), self.request())
        self.assertEqual(
            'flavor extra spec snapshot_ext:flow = warm is not valid: '
            'installed are backup, cold, domain, live', str(error))
