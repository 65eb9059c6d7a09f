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

from nova_snapshot_ext import cancellation
from nova_snapshot_ext import exception
from nova_snapshot_ext.flows import live
from nova_snapshot_ext import frozen
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo
from tests.unit import base
from tests.unit import doubles
from tests.unit import fakes
from tests.unit import test_quiesce


class LiveTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.path = self.new_file('disk', base.qcow2_header())
        self.base = self.new_file('base')
        self.domain.disks = fakes.disk_xml(
            self.path, 'qcow2', inside=(
                "<backingStore type='file'><format type='raw'/>"
                f"<source file='{self.base}'/><backingStore/>"
                "</backingStore>"))
        self.flow = live.LiveFlow()


class TestObstacle(LiveTestCase):

    def obstacle(self, **changes: object) -> str:
        why = self.flow.obstacle(self.guest, (self.guest.root_disk(),),
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

    def test_job_of_the_guest_is_not_disturbed(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        self.domain.errors['blockJobInfo'] = AssertionError('asked')
        self.assertIn('another job of the guest is under way: save',
                      self.obstacle())
        self.domain.job_operation = (
            libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT)
        self.assertIn('under way: migration', self.obstacle())

    def test_encrypted_disk_is_not_served(self) -> None:
        self.domain.disks = fakes.disk_xml(
            self.path, inside="<encryption format='luks'/>")
        self.assertIn('vda is encrypted', self.obstacle())

    def test_job_that_is_not_ours_is_not_ended(self) -> None:
        self.domain.copies['vda'] = '/theirs'
        self.assertIn('block job (copy)', self.obstacle())

    def test_network_disk_is_not_served(self) -> None:
        self.domain.disks = fakes.disk_xml('x', 'raw', kind='network')
        self.assertIn('network disk', self.obstacle())

    def test_base_must_be_readable(self) -> None:
        self.patch_name('os.access', lambda path, mode: False)
        self.assertIn(f'can not read {self.base}', self.obstacle())

    def test_quiesce_that_is_required_needs_the_agent(self) -> None:
        self.assertIn('no guest agent', self.obstacle(
            quiesce=requests.Quiesce.REQUIRED))


class TestFreeze(LiveTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.watch_flushes()
        self.domain.devices = test_quiesce.CONNECTED
        self.qemu_img = doubles.QemuImg(self.journal)
        self.nbd = doubles.QemuNbd(self.journal)
        self.patch_name('nova_snapshot_ext.qemu_img.run', self.qemu_img.run)
        self.patch_name('nova_snapshot_ext.qemu_nbd.serving',
                        self.nbd.serving)
        self.patch_name('time.sleep', lambda seconds: None)
        self.log = self.new_log()
        self.journal.clear()
        self.quiesce = requests.Quiesce.IF_POSSIBLE

    def freeze(self, **changes: object) -> frozen.Frozen:
        with self.flow.freeze(
                self.guest, self.guest.disks(),
                self.request(quiesce=self.quiesce, **changes),
                self.log) as found:
            self.journal.append('read here')
        return found

    def steps(self) -> list[str]:
        return self.journal.of(
            'block', 'fs', 'serve', 'end serve', 'read', 'suspend',
            'resume', 'qemu-img')

    def test_guest_is_frozen_for_the_end_of_the_job_alone(self) -> None:
        found = self.freeze()
        self.assertEqual(
            ['qemu-img create', 'blockCopy vda', 'fsFreeze',
             'blockJobAbort vda', 'fsThaw', 'serve disk', 'read here',
             'end serve'], self.steps())
        self.assertEqual(frozen.Consistency.FILESYSTEM, found.consistency)

    def test_overlay_is_counted(self) -> None:
        with self.flow.freeze(
                self.guest, self.guest.disks(),
                self.request(quiesce=self.quiesce), self.log) as found:
            [directory] = os.listdir(self.staging)
            path = os.path.join(self.staging, directory, 'vda')
            with open(path, 'wb') as file:
                file.write(b'x' * 65536)
                file.flush()
                os.fsync(file.fileno())
            self.assertEqual(os.stat(path).st_blocks * 512,
                             found.scratch_bytes())
            self.assertNotEqual(0, found.scratch_bytes())

    def test_copy_that_is_waited_for_ends_with_the_snapshot(self) -> None:
        self.domain.copy_ready = False
        cancelled = cancellation.Cancellation()
        self.patch_name('time.sleep', lambda seconds: cancelled.cancel(
            exception.ImageGone('deleted')))
        self.assertRaises(exception.ImageGone, self.freeze,
                          cancellation=cancelled)
        self.assertEqual(
            ['qemu-img create', 'blockCopy vda', 'blockJobAbort vda'],
            self.steps())
        self.assertEqual(0, self.log.pending)
        self.assertEqual([], os.listdir(self.staging))

    def test_each_undo_is_written_before_its_step(self) -> None:
        self.freeze()
        for before, after in (
                ('flushed remove_directory', 'qemu-img create'),
                ('flushed end_copy', 'blockCopy vda'),
                ('flushed thaw', 'fsFreeze')):
            self.assertLess(self.journal.index(before),
                            self.journal.index(after))

    def test_nothing_is_left(self) -> None:
        self.freeze()
        self.assertEqual(0, self.log.pending)
        self.assertEqual([], os.listdir(self.staging))
        self.assertEqual(
            [os.path.basename(self.log.path)], os.listdir(self.state))

    def test_overlay_has_the_disks_own_backing_file(self) -> None:
        self.freeze()
        command = self.qemu_img.commands[0]
        self.assertEqual(
            ('-F', 'raw', '-b', self.base), command[4:8])
        self.assertEqual(
            {'driver': 'raw', 'file': {
                'driver': 'file', 'filename': self.base}},
            self.nbd.options['backing'])

    def test_qemu_may_reach_the_overlay(self) -> None:
        self.domain.rest = (
            '<seclabel model="dac"><label>+1:+108</label></seclabel>')
        self.freeze()
        [line] = self.journal.of('chown')
        self.assertTrue(line.startswith(f'chown {self.staging}/'), line)
        self.assertTrue(line.endswith(' -1 108'), line)

    def test_guest_is_not_frozen_when_the_job_can_not_start(self) -> None:
        self.domain.errors['blockCopy'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_FAILED)
        self.assertRaises(exception.SnapshotError, self.freeze)
        self.assertEqual(['qemu-img create', 'blockCopy vda'], self.steps())
        self.assertEqual(0, self.log.pending)
        self.assertEqual([], os.listdir(self.staging))

    def test_guest_is_thawed_when_the_job_can_not_be_ended(self) -> None:
        self.domain.errors['blockJobAbort'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_FAILED)
        self.assertRaises(exception.SnapshotError, self.freeze)
        self.assertEqual(0, self.domain.frozen)
        self.assertIn('fsThaw', self.journal)
        self.assertEqual(
            ['end_copy'], [each.step for each in
                           undo.read(self.log.path).pending.values()])

    def test_job_is_ended_when_the_guest_can_not_be_quiesced(self) -> None:
        self.quiesce = requests.Quiesce.REQUIRED
        self.domain.errors['fsFreeze'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_INVALID)
        self.assertRaises(exception.FreezeFailed, self.freeze)
        self.assertEqual({}, self.domain.copies)
        self.assertEqual(0, self.log.pending)

    def test_job_that_ended_early_is_an_error(self) -> None:
        self.domain.copy_ready = False
        self.patch_name('time.sleep',
                        lambda seconds: self.domain.copies.clear())
        self.assertRaisesRegex(
            exception.FreezeFailed, 'ended early', self.freeze)
        self.assertNotIn('fsFreeze', self.journal)

    def test_copy_is_not_waited_for_without_end(self) -> None:
        self.domain.copy_ready = False
        self.assertRaisesRegex(
            exception.FreezeFailed, 'copy_timeout = -1', self.freeze,
            copy_timeout=-1)
        self.assertEqual({}, self.domain.copies)

    def test_copy_is_ended_when_it_is_really_ready(self) -> None:
        self.domain.copy_ready = False

        def ready(seconds: float) -> None:
            self.journal.append('block copy is ready')
            self.domain.copy_ready = True
        self.patch_name('time.sleep', ready)
        self.freeze()
        self.assertLess(self.journal.index('block copy is ready'),
                        self.journal.index('fsFreeze'))

    def test_copy_that_fell_behind_is_not_taken(self) -> None:
        self.domain.before['fsFreeze'] = lambda: setattr(
            self.domain, 'copy_ready', False)
        self.assertRaisesRegex(
            exception.FreezeFailed, 'fell behind', self.freeze)
        self.assertEqual(0, self.domain.frozen)
        self.assertEqual({}, self.domain.copies)

    def use_two_disks(self) -> None:
        other = self.new_file('other')
        self.domain.disks += fakes.disk_xml(other, target='vdb')

    def test_several_disks_end_while_the_guest_stands_still(self) -> None:
        self.use_two_disks()
        self.quiesce = requests.Quiesce.NEVER
        found = self.freeze()
        self.assertEqual(
            ['suspend', 'blockJobAbort vda', 'blockJobAbort vdb', 'resume'],
            self.journal.of('suspend', 'blockJobAbort', 'resume'))
        self.assertLess(self.journal.index('flushed resume_guest'),
                        self.journal.index('suspend'))
        self.assertEqual(2, len(found.disks))

    def test_paused_guest_stays_paused(self) -> None:
        self.use_two_disks()
        self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED, 1]
        self.patch_name('libvirt_qemu.qemuMonitorCommand',
                        lambda domain, request, flags: '{"return": []}')
        self.freeze()
        self.assertEqual([], self.journal.of('suspend', 'resume', 'fs'))

    def test_guest_runs_on_when_the_second_job_can_not_be_ended(
            self) -> None:
        self.use_two_disks()
        self.domain.before['blockJobAbort'] = lambda: (
            self.domain.errors.update(
                blockJobAbort=fakes.libvirt_error(1))
            if 'vda' not in self.domain.copies else None)
        self.assertRaises(exception.SnapshotError, self.freeze)
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING,
                         self.domain.current_state[0])

    def test_pause_is_over_when_the_disk_is_read(self) -> None:
        found = self.freeze()
        self.assertLess(0, found.pause.seconds)
        self.assertEqual(found.pause.seconds, found.pause.seconds)


class TestUndo(LiveTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.around = undo.Surroundings(self.guest, self.host)

    def end_copy(self) -> None:
        live.end_copy(self.around, target='vda', overlay='/overlay')

    def test_copy_is_ended_once(self) -> None:
        self.domain.copies['vda'] = '/overlay'
        self.end_copy()
        self.end_copy()
        self.assertEqual(['blockJobAbort vda'], self.journal)

    def test_copy_that_is_not_ours_is_left_alone(self) -> None:
        self.domain.copies['vda'] = '/theirs'
        self.end_copy()
        self.assertEqual({'vda': '/theirs'}, self.domain.copies)

    def test_stopped_guest_has_no_job(self) -> None:
        self.domain.off()
        self.domain.errors['blockJobInfo'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_INVALID)
        self.end_copy()
        self.assertEqual([], self.journal)

    def test_guest_is_resumed_if_it_is_paused(self) -> None:
        live.resume_guest(self.around, life='1')
        self.assertEqual([], self.journal)
        self.guest.suspend()
        live.resume_guest(self.around, life='1')
        live.resume_guest(self.around, life='1')
        self.assertEqual(['suspend', 'resume'], self.journal)

    def test_guest_that_was_started_anew_is_not_resumed(self) -> None:
        frozen_as = self.guest.life()
        self.domain.off()
        self.domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        live.resume_guest(self.around, life=frozen_as)
        self.assertEqual([], self.journal.of('resume'))
        live.resume_guest(self.around, life=self.guest.life())
        self.assertEqual(['resume'], self.journal.of('resume'))

    def test_log_of_before_says_nothing_of_its_life(self) -> None:
        self.guest.suspend()
        live.resume_guest(self.around)
        self.assertEqual(['suspend', 'resume'], self.journal)

    def test_guest_is_not_resumed_after_a_reboot(self) -> None:
        self.guest.suspend()
        live.resume_guest(undo.Surroundings(self.guest, self.host, True),
                          life='1')
        self.assertEqual(['suspend'], self.journal)
