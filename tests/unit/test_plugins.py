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

import stevedore

from nova_snapshot_ext import exception
from nova_snapshot_ext.flows import base as flows
from nova_snapshot_ext.images import base as images
from nova_snapshot_ext import plugins
from nova_snapshot_ext.transfers import base as transfers
from nova_snapshot_ext import undo
from tests.unit import base


class TestInstalled(base.TestCase):

    def test_every_plugin_is_of_its_base_class(self) -> None:
        for namespace, kind, names in (
                (plugins.FLOWS, flows.Flow, {'cold', 'live'}),
                (plugins.TRANSFERS, transfers.Transfer,
                 {'staged', 'streamed'}),
                (plugins.IMAGE_SERVICES, images.ImageService,
                 {'directory', 'glance'})):
            self.assertLessEqual(names, set(plugins.names(namespace)))
            for name in names:
                self.assertTrue(issubclass(
                    plugins.load(namespace, name, 'a test'), kind))

    def test_what_exists_is_named_where_a_name_is_unknown(self) -> None:
        for namespace, installed in (
                (plugins.FLOWS, 'cold, domain, live'),
                (plugins.TRANSFERS, 'staged, streamed'),
                (plugins.IMAGE_SERVICES, 'directory, glance')):
            self.assertRaisesRegex(
                exception.InvalidSetting,
                f'^setting = nothing is not valid.*{installed}',
                plugins.load, namespace, 'nothing', 'setting')

    def test_undo_steps_of_all_are_known(self) -> None:
        plugins.load_all()
        for name in ('thaw', 'start_guest', 'attach_device', 'end_copy',
                     'delete_internal_snapshot', 'restore_owner',
                     'resume_guest', 'end_server', 'end_mover',
                     'remove_directory'):
            self.assertIn(name, undo._STEPS)


class TestBroken(base.TestCase):

    def test_plugin_that_can_not_be_imported(self) -> None:
        def fail(namespace: str, name: str) -> None:
            raise ImportError('no module named left_pad')
        self.patch_name('stevedore.DriverManager', fail)
        self.assertRaisesRegex(
            exception.InvalidSetting, 'left_pad', plugins.load,
            plugins.FLOWS, 'cold', 'setting')

    def test_broken_plugin_is_named_when_all_are_loaded(self) -> None:
        def manager(namespace: str, on_load_failure_callback: object,
                    **more: object) -> None:
            entry = type('EntryPoint', (), {'name': 'rotten'})()
            on_load_failure_callback(  # type: ignore[operator]
                None, entry, ImportError('no module named left_pad'))
        self.patch_name('stevedore.ExtensionManager', manager)
        self.assertRaisesRegex(
            exception.InvalidSetting, 'rotten.*left_pad', plugins.names,
            plugins.FLOWS)
        # The undo steps of the others must be known all the same.
        plugins.load_all()
        self.assertIn('rotten can not be loaded', self.output.output)

    def test_nothing_is_made_of_a_class_to_find_it(self) -> None:
        made: list[object] = []
        self.patch_name(
            'nova_snapshot_ext.flows.cold.ColdFlow.__init__',
            lambda flow: made.append(flow))
        plugins.load(plugins.FLOWS, 'cold', 'setting')
        plugins.load_all()
        self.assertEqual([], made)
        self.assertTrue(stevedore)
