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

"""The scratch is watched: the job ends before the guest runs into it."""

import libvirt

from nova_snapshot_ext import scratch
from tests.unit import base

JOB = "<domainbackup><server socket='/ours'/></domainbackup>"
MIB = 1024 ** 2


class TestWatch(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.domain.backup = JOB
        self.free = 1024 * MIB
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: self.free)
        self.used = 0
        self.patch_name('nova_snapshot_ext.scratch.Watch._used_bytes',
                        lambda watch: self.used)
        self.watch = scratch.Watch(self.guest, self.staging)

    def test_job_goes_on_while_there_is_room(self) -> None:
        self.used = 10 * MIB
        self.assertTrue(self.watch.look())
        self.assertIsNone(self.watch.why_lost())
        self.assertEqual([], self.journal)

    def test_job_is_ended_before_the_room_is(self) -> None:
        self.free = 31 * MIB
        self.assertFalse(self.watch.look())
        self.assertEqual(['abortJob'], self.journal)
        self.assertIn(f'{31 * MIB} bytes are free', self.watch.why_lost())

    def test_margin_grows_with_the_highest_rate(self) -> None:
        self.used = 100 * MIB
        self.assertTrue(self.watch.look())
        self.free = 401 * MIB
        self.assertTrue(self.watch.look())
        self.free = 399 * MIB
        self.assertFalse(self.watch.look())

    def test_guest_that_was_paused_by_it_is_resumed_without_the_job(
            self) -> None:
        self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED,
                                     libvirt.VIR_DOMAIN_PAUSED_IOERROR]
        self.assertFalse(self.watch.look())
        self.assertEqual(['abortJob', 'resume'], self.journal)
        self.assertIn('paused by an I/O error', self.watch.why_lost())

    def test_guest_that_was_paused_by_someone_is_not(self) -> None:
        self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED,
                                     libvirt.VIR_DOMAIN_PAUSED_USER]
        self.assertTrue(self.watch.look())
        self.assertEqual([], self.journal)
