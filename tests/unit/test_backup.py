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

"""The flow backup: what is begun, watched and ended, and in which order."""

import os
from xml.etree import ElementTree

import libvirt

from nova_snapshot_ext import exception
from nova_snapshot_ext.flows import backup
from nova_snapshot_ext import frozen
from nova_snapshot_ext import request as requests
from tests.unit import base
from tests.unit import doubles
from tests.unit import fakes
from tests.unit import test_quiesce


class BackupTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.domain.disks = (
            fakes.disk_xml(self.new_file('a'))
            + fakes.disk_xml(self.new_file('b'), target='vdb'))
        self.flow = backup.BackupFlow()


class TestObstacle(BackupTestCase):

    def obstacle(self, **changes: object) -> str:
        why = self.flow.obstacle(self.guest, self.guest.disks(),
                                 self.request(**changes))
        self.assertEqual([], self.journal, 'the guest was touched')
        return why or ''

    def test_running_and_paused_guests_are_served(self) -> None:
        self.assertEqual('', self.obstacle())
        self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED, 1]
        self.assertEqual('', self.obstacle())

    def test_stopped_guest_is_not(self) -> None:
        self.domain.off()
        self.assertIn('shut off', self.obstacle())

    def test_jobs_of_others_are_not_disturbed(self) -> None:
        self.domain.copies['vdb'] = '/theirs'
        self.assertIn('vdb has a block job (copy)', self.obstacle())
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        self.assertIn('another job of the guest is under way: save',
                      self.obstacle())

    def test_migrating_guest_is_not(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        self.domain.job_operation = (
            libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT)
        # What else is asked of libvirt would wait for the migration.
        self.domain.errors['blockJobInfo'] = AssertionError('asked')
        self.assertIn('under way: migration', self.obstacle())

    def test_encrypted_disk_is_not(self) -> None:
        self.domain.disks = fakes.disk_xml(
            '/a', inside="<encryption format='luks'/>")
        self.assertIn('vda is encrypted', self.obstacle())

    def test_scratch_must_have_its_place(self) -> None:
        self.assertIn('scratch_directory = /none', self.obstacle(
            scratch_directory='/none'))

    def test_quiesce_that_is_required_needs_the_agent(self) -> None:
        self.assertIn('no guest agent', self.obstacle(
            quiesce=requests.Quiesce.REQUIRED))


class TestFreeze(BackupTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.watch_flushes()
        self.domain.devices = test_quiesce.CONNECTED
        self.qemu_img = doubles.QemuImg(self.journal)
        self.patch_name('nova_snapshot_ext.qemu_img.run', self.qemu_img.run)
        self.log = self.new_log()
        self.journal.clear()

    def freeze(self, **changes: object) -> frozen.Frozen:
        with self.flow.freeze(
                self.guest, self.guest.disks(),
                self.request(**changes), self.log) as found:
            self.journal.append('read here')
            self.during = [os.stat(os.path.dirname(found.disks[0].socket))]
        return found

    def test_all_disks_are_in_one_job_with_scratch_made_before(self) -> None:
        found = self.freeze()
        self.assertEqual(
            ['qemu-img create', 'qemu-img create', 'flushed end_backup',
             'backupBegin', 'read here', 'abortJob'],
            self.journal.of('qemu-img', 'flushed end', 'backup', 'read',
                            'abort'))
        self.assertEqual(libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL,
                         self.domain.backup_flags)
        self.assertEqual(['vda', 'vdb'],
                         [disk.export for disk in found.disks])
        self.assertEqual(frozen.Consistency.CRASH, found.consistency)
        self.assertEqual([], os.listdir(self.staging))
        self.assertEqual(0, self.log.pending)

    def test_job_names_every_disk_and_no_other(self) -> None:
        seen = []
        self.domain.before['backupBegin'] = lambda: None
        original = self.domain.backupBegin

        def begin(xml: str, checkpoint: object, flags: int) -> None:
            seen.append(xml)
            original(xml, checkpoint, flags)
        self.domain.backupBegin = begin  # type: ignore[method-assign]
        self.freeze()
        job = ElementTree.fromstring(seen[0])
        self.assertEqual('pull', job.get('mode'))
        self.assertEqual(
            [('vda', 'vda'), ('vdb', 'vdb')],
            [(disk.get('name'), disk.get('exportname'))
             for disk in job.iter('disk')])

    def test_quiesced_for_the_begin_alone(self) -> None:
        found = self.freeze(quiesce=requests.Quiesce.IF_POSSIBLE)
        self.assertEqual(
            ['fsFreeze', 'backupBegin', 'fsThaw', 'read here'],
            self.journal.of('fs', 'backup', 'read'))
        self.assertEqual(frozen.Consistency.FILESYSTEM, found.consistency)

    def test_guest_is_thawed_when_the_job_cannot_start(self) -> None:
        self.domain.errors['backupBegin'] = fakes.libvirt_error(1)
        self.assertRaises(exception.SnapshotError, self.freeze,
                          quiesce=requests.Quiesce.IF_POSSIBLE)
        self.assertEqual(
            ['fsFreeze', 'backupBegin', 'fsThaw'],
            self.journal.of('fs', 'backup', 'abort'))
        self.assertEqual([], os.listdir(self.staging))
        self.assertEqual(0, self.log.pending)
