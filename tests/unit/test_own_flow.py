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

"""The flow of the contributor's guide, as another package brings it."""

import os
import pathlib
import sys

from nova_snapshot_ext import frozen
from nova_snapshot_ext import plugins
from nova_snapshot_ext import selection
from tests import own_flow
from tests.unit import base
from tests.unit import doubles
from tests.unit import fakes


class TestOwnFlow(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        own_flow.install(pathlib.Path(self.new_directory('site-packages')))
        self.patch_name('sys.path', [
            os.path.join(self.directory, 'site-packages'), *sys.path])
        self.addCleanup(sys.modules.pop, 'off_flow', None)
        # stevedore keeps what it has found, for as long as a process lives.
        self.patch_name('stevedore.ExtensionManager.ENTRY_POINT_CACHE', {})
        self.path = self.new_file('disk', b'\0' * 4096)
        self.domain.disks = fakes.disk_xml(self.path)
        self.nbd = doubles.QemuNbd(self.journal)
        self.patch_name('nova_snapshot_ext.qemu_nbd.serving',
                        self.nbd.serving)

    def candidates(self) -> list[selection.Candidate]:
        return selection.candidates(
            selection.Wish(('off', 'cold'), '[snapshot_ext] flows', False),
            self.guest, self.guest.disks(), self.request())

    def test_it_is_installed_beside_ours(self) -> None:
        self.assertIn('off', plugins.names(plugins.FLOWS))
        self.assertIn('cold', plugins.names(plugins.FLOWS))

    def test_obstacle_is_said(self) -> None:
        self.assertEqual(['cold'], [
            each.name for each in self.candidates()])
        self.assertIn('cold serves; off can not serve, the guest is running',
                      self.output.output)

    def test_disk_of_a_guest_that_is_off_is_frozen(self) -> None:
        self.domain.off()
        chosen = self.candidates()[0]
        self.assertEqual('off', chosen.name)
        log = self.new_log()
        with chosen.flow.freeze(
                self.guest, self.guest.disks(), self.request(),
                log) as found:
            [disk] = found.disks
            self.assertEqual('vda', disk.target)
            self.assertEqual(frozen.Consistency.CRASH, found.consistency)
            self.assertEqual(self.path,
                             self.nbd.options['file']['filename'])
            self.assertNotEqual(0, log.pending)
        self.assertEqual(0, log.pending)
        self.assertEqual(['serve disk', 'end serve'],
                         self.journal.of('serve', 'end serve'))
