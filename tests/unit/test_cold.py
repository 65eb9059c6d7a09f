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

import os

import libvirt

from nova_snapshot_ext import disk
from nova_snapshot_ext import exception
from nova_snapshot_ext.flows import cold
from nova_snapshot_ext import frozen
from nova_snapshot_ext import request as requests
from tests.unit import base
from tests.unit import doubles
from tests.unit import fakes
from tests.unit import test_power


class ColdTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.path = self.new_file('disk', base.qcow2_header())
        self.domain.disks = fakes.disk_xml(
            self.path, 'qcow2', inside='<backingStore/>')
        self.flow = cold.ColdFlow()

    def use_raw_disk(self) -> None:
        self.domain.disks = fakes.disk_xml(self.path, 'raw')


class TestObstacle(ColdTestCase):

    def obstacle(self, **changes: object) -> str:
        why = self.flow.obstacle(self.guest, (self.guest.root_disk(),),
                                 self.request(**changes))
        self.assertEqual([], self.journal, 'the guest was touched')
        return why or ''

    def test_running_guest_can_be_stopped(self) -> None:
        self.assertEqual('', self.obstacle())

    def test_guest_in_transition_can_not(self) -> None:
        self.domain.current_state = [libvirt.VIR_DOMAIN_SHUTDOWN, 0]
        self.assertIn('in transition', self.obstacle())

    def test_only_files_and_block_devices_are_read(self) -> None:
        self.domain.disks = fakes.disk_xml('x', 'raw', kind='network')
        self.assertIn('network disk', self.obstacle())

    def test_encrypted_disk_is_not_read(self) -> None:
        self.domain.disks = fakes.disk_xml(
            self.path, 'raw', inside="<encryption format='luks'/>")
        for stop in (lambda: None, self.domain.off):
            stop()
            self.assertIn('vda is encrypted', self.obstacle())

    def test_every_layer_must_be_readable(self) -> None:
        self.patch_name('os.access', lambda path, mode: False)
        self.assertIn(f'can not read {self.path}', self.obstacle())
        self.use_raw_disk()
        self.domain.off()
        self.assertIn(f'can not read {self.path}', self.obstacle())

    def test_raw_disk_of_a_running_guest_is_read_by_qemu(self) -> None:
        self.use_raw_disk()
        os_access = os.access
        self.patch_name('os.access', lambda path, mode: (
            path != self.path and os_access(path, mode)))
        self.assertEqual('', self.obstacle())
        self.assertIn('scratch_directory = /none',
                      self.obstacle(scratch_directory='/none'))

    def test_guest_that_may_not_be_stopped_is_left_alone(self) -> None:
        self.assertIn('Nova owns', self.obstacle(may_stop=False))

    def test_paused_guest_can_let_go_of_no_device(self) -> None:
        self.domain.devices = (
            '<hostdev type="pci"><source><address bus="1"/></source>'
            '</hostdev>')
        self.assertEqual('', self.obstacle())
        self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED, 1]
        self.assertIn('can not let go', self.obstacle())
        self.domain.devices = ''
        self.assertEqual('', self.obstacle())

    def test_stopped_guest_may_be_read_whatever_may_be_stopped(
            self) -> None:
        self.domain.off()
        self.domain.persistent = False
        self.assertEqual('', self.obstacle(
            may_stop=False, quiesce=requests.Quiesce.REQUIRED))

    def test_guest_that_must_be_quiesced_is_not_stopped(self) -> None:
        self.assertIn('os_require_quiesce', self.obstacle(
            quiesce=requests.Quiesce.REQUIRED))

    def test_transient_guest_is_not_stopped(self) -> None:
        self.domain.persistent = False
        self.assertIn('transient', self.obstacle())

    def test_job_of_the_guest_is_not_disturbed(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        self.domain.errors['blockJobInfo'] = AssertionError('asked')
        self.assertIn('another job of the guest is under way: save',
                      self.obstacle())
        self.domain.job_operation = (
            libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT)
        self.assertIn('under way: migration', self.obstacle())

    def test_job_of_any_disk_is_not_disturbed(self) -> None:
        self.domain.disks += fakes.disk_xml('/b', target='vdb')
        self.domain.copies['vdb'] = '/theirs'
        self.assertIn('vdb has a block job (copy)', self.obstacle())

    def test_device_that_can_not_be_saved_is_an_obstacle(self) -> None:
        self.domain.devices = '<shmem/>'
        self.assertIn('shared memory', self.obstacle())

    def test_memory_needs_its_room(self) -> None:
        self.domain.kib = 2 ** 60
        self.assertIn(f'its memory may take {2 ** 70} bytes in {self.save}',
                      self.obstacle())


class TestFreeze(ColdTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.watch_flushes()
        self.qemu_img = doubles.QemuImg(self.journal)
        self.nbd = doubles.QemuNbd(self.journal)
        self.patch_name('nova_snapshot_ext.qemu_img.run', self.qemu_img.run)
        self.patch_name('nova_snapshot_ext.qemu_nbd.serving',
                        self.nbd.serving)
        self.patch_name('libvirt_qemu.qemuMonitorCommand',
                        self.qemu_img.monitor)
        self.log = self.new_log()
        self.journal.clear()

    def freeze(self, disks: tuple[disk.Disk, ...] = ()) -> frozen.Frozen:
        with self.flow.freeze(
                self.guest, disks or (self.guest.root_disk(),),
                self.request(), self.log) as found:
            self.journal.append('read here')
        return found

    def steps(self, *more: str) -> list[str]:
        return self.journal.of(
            'managedSave', 'createWithFlags', 'detach', 'attach', 'serve',
            'end serve', 'read', 'qemu-img snapshot', 'may_start', 'delete',
            *more)

    def test_guest_runs_again_before_its_disk_is_read(self) -> None:
        found = self.freeze()
        self.assertEqual(
            ['managedSave', 'qemu-img snapshot -c', 'may_start',
             'createWithFlags', 'serve snapshot', 'read here', 'end serve',
             'delete by monitor'], self.steps())
        self.assertEqual(frozen.Consistency.CRASH, found.consistency)
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING,
                         self.domain.current_state[0])

    def test_each_undo_is_written_before_its_step(self) -> None:
        self.domain.devices = test_power.PCI
        self.freeze()
        for before, after in (
                ('flushed attach_device', 'detachDeviceFlags'),
                ('flushed start_guest', 'managedSave'),
                ('flushed delete_internal_snapshot',
                 'qemu-img snapshot -c')):
            self.assertLess(self.journal.index(before),
                            self.journal.index(after))

    def test_devices_come_back_after_the_guest(self) -> None:
        self.domain.devices = test_power.PCI + test_power.PORT
        self.freeze()
        self.assertEqual(
            ['detachDeviceFlags', 'detachDeviceFlags', 'managedSave',
             'createWithFlags', 'attachDeviceFlags', 'attachDeviceFlags'],
            self.journal.of('detach', 'managed', 'create', 'attach'))

    def test_nothing_is_left_to_undo(self) -> None:
        self.freeze()
        self.assertEqual(0, self.log.pending)
        self.assertEqual([], self.qemu_img.snapshots)
        self.assertEqual([], [each for each in os.listdir(self.state)
                              if not each.endswith('.undo')])

    def test_job_on_a_raw_disk_begins_before_the_guest_runs(self) -> None:
        self.use_raw_disk()
        found = self.freeze()
        self.assertEqual(
            ['qemu-img create', 'flushed end_backup', 'managedSave',
             'may_start', 'createWithFlags paused', 'backupBegin', 'resume',
             'read here', 'abortJob'],
            self.steps('qemu-img create', 'flushed end', 'backup', 'resume',
                       'abort'))
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING,
                         self.domain.current_state[0])
        self.assertEqual(frozen.Consistency.CRASH, found.consistency)
        self.assertLess(0, found.pause.seconds)
        self.assertEqual(found.pause.seconds, found.pause.seconds)
        self.assertEqual([], os.listdir(self.staging))
        self.assertEqual(0, self.log.pending)

    def test_one_disk_that_is_raw_has_all_read_by_a_job(self) -> None:
        self.domain.disks += fakes.disk_xml(self.new_file('b'), target='vdb')
        self.freeze(self.guest.disks())
        self.assertEqual(['backupBegin'], self.journal.of('backup'))
        self.assertEqual([], self.journal.of('qemu-img snapshot'))

    def test_qcow2_on_a_block_device_is_read_by_a_job(self) -> None:
        self.domain.disks = fakes.disk_xml(self.path, 'qcow2', kind='block')
        self.freeze()
        self.assertEqual(['backupBegin'], self.journal.of('backup'))

    def test_job_of_a_paused_guest_leaves_it_paused(self) -> None:
        self.use_raw_disk()
        self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED, 1]
        self.freeze()
        self.assertEqual(['backupBegin'],
                         self.journal.of('backup', 'resume'))
        self.assertEqual(libvirt.VIR_DOMAIN_PAUSED,
                         self.domain.current_state[0])

    def test_scratch_of_a_full_file_system_stops_no_guest(self) -> None:
        self.use_raw_disk()
        self.qemu_img.fails.add('create')
        self.assertRaises(exception.CommandFailed, self.freeze)
        self.assertEqual([], self.steps())
        self.assertEqual(0, self.log.pending)

    def test_paused_guest_comes_back_paused(self) -> None:
        self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED, 1]
        self.freeze()
        self.assertEqual(libvirt.VIR_DOMAIN_PAUSED,
                         self.domain.current_state[0])

    def test_stopped_guest_stays_off(self) -> None:
        self.domain.off()
        found = self.freeze()
        self.assertEqual(['serve disk', 'read here', 'end serve'],
                         self.steps())
        self.assertEqual(frozen.Consistency.STOPPED, found.consistency)

    def test_suspended_guest_keeps_its_save(self) -> None:
        self.domain.off(libvirt.VIR_DOMAIN_SHUTOFF_SAVED)
        self.domain.managed_save = True
        found = self.freeze()
        self.assertEqual(['serve disk', 'read here', 'end serve'],
                         self.steps())
        self.assertTrue(self.domain.managed_save)
        self.assertEqual(frozen.Consistency.CRASH, found.consistency)

    def test_save_means_that_the_guest_was_not_shut_down(self) -> None:
        self.domain.off()
        self.domain.managed_save = True
        self.assertEqual(frozen.Consistency.CRASH,
                         self.freeze().consistency)

    def test_guest_that_was_killed_is_crash_consistent(self) -> None:
        self.domain.off(libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED)
        self.assertEqual(frozen.Consistency.CRASH,
                         self.freeze().consistency)

    def test_guest_is_started_when_the_snapshot_can_not_be_made(
            self) -> None:
        self.domain.devices = test_power.PCI
        self.qemu_img.fails.add('-c')
        self.assertRaises(exception.CommandFailed, self.freeze)
        self.assertEqual(
            ['managedSave', 'createWithFlags', 'attachDeviceFlags'],
            self.journal.of('managed', 'create', 'attach'))
        self.assertEqual(0, self.log.pending)

    def test_devices_come_back_when_the_save_fails(self) -> None:
        self.domain.devices = test_power.PCI
        self.domain.errors['managedSave'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_FAILED)
        self.assertRaises(exception.SnapshotError, self.freeze)
        self.assertEqual(
            ['detachDeviceFlags', 'managedSave', 'attachDeviceFlags'],
            self.journal.of('detach', 'managed', 'create', 'attach'))

    def test_guest_runs_on_when_the_job_can_not_begin(self) -> None:
        self.use_raw_disk()
        self.domain.errors['backupBegin'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_FAILED)
        self.assertRaises(exception.SnapshotError, self.freeze)
        self.assertEqual(
            ['createWithFlags paused', 'backupBegin', 'resume'],
            self.journal.of('create', 'backup', 'resume', 'abort'))
        self.assertEqual(0, self.log.pending)

    def test_guest_runs_on_when_reading_fails(self) -> None:
        self.nbd.error = exception.FreezeFailed('no socket')
        self.assertRaises(exception.FreezeFailed, self.freeze)
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING,
                         self.domain.current_state[0])
        self.assertEqual(0, self.log.pending)

    def test_save_is_kept_when_the_start_fails(self) -> None:
        self.domain.errors['createWithFlags'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_FAILED)
        self.assertRaises(exception.SnapshotError, self.freeze)
        self.assertTrue(self.domain.managed_save)
        self.assertEqual(1, self.log.pending)

    def test_pause_ends_with_the_start(self) -> None:
        found = self.freeze()
        self.assertEqual(found.pause.seconds, found.pause.seconds)
        self.assertLess(0, found.pause.seconds)

    def test_internal_snapshot_is_read_past_the_guests_locks(self) -> None:
        self.freeze()
        self.assertEqual(
            (True, 'off'), (self.nbd.options['force-share'],
                            self.nbd.options['file']['locking']))

    def test_disk_of_a_stopped_guest_is_read_under_its_lock(self) -> None:
        self.domain.off()
        self.freeze()
        self.assertNotIn('force-share', self.nbd.options)
