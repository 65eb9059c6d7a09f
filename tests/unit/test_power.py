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


"""A guest that is stopped comes back, whoever dies and when."""

import threading
import typing

import libvirt

from nova_snapshot_ext import cancellation as cancellations
from nova_snapshot_ext import exception
from nova_snapshot_ext import frozen
from nova_snapshot_ext import power
from nova_snapshot_ext import undo
from tests.unit import base
from tests.unit import fakes

PCI = '<hostdev type="pci"><source><address bus="1" /></source></hostdev>'
PORT = ('<interface type="hostdev"><source><address bus="2" /></source>'
        '</interface>')


class TestUndo(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.patch_name('time.sleep', lambda seconds: None)
        self.around = undo.Surroundings(self.guest, self.host)
        self.rebooted = undo.Surroundings(self.guest, self.host, True)
        self.orphaned = undo.Surroundings(
            self.guest, self.host, owner_died=True)
        self.now = 0.0
        self.patch_name('time.monotonic', lambda: self.now)

    def stop(self) -> None:
        self.guest.save_memory()
        self.journal.clear()

    def test_guest_is_started_while_nobody_deletes_it(self) -> None:
        self.stop()
        power.start_guest(self.around)
        self.assertEqual(
            ['may_start', 'createWithFlags', 'start lock is free'],
            self.journal)

    def test_start_twice_starts_once(self) -> None:
        self.stop()
        power.start_guest(self.around)
        power.start_guest(self.around)
        self.assertEqual(['createWithFlags'], self.journal.of('create'))

    def test_guest_that_is_no_longer_ours_is_not_started(self) -> None:
        self.stop()
        self.host.allowed = False
        power.start_guest(self.around)
        self.assertEqual([], self.journal.of('create'))
        self.assertTrue(self.domain.managed_save)

    def test_guest_is_not_started_after_a_reboot(self) -> None:
        self.stop()
        power.start_guest(self.rebooted)
        power.attach_device(self.rebooted, device=PCI, life='0')
        self.assertEqual([], self.journal)
        self.assertTrue(self.domain.managed_save)

    def test_guest_that_someone_shut_off_is_not_started(self) -> None:
        self.domain.off()
        power.start_guest(self.around)
        self.assertEqual([], self.journal.of('create'))

    def test_guest_that_was_not_stopped_is_left_alone(self) -> None:
        power.start_guest(self.around)
        self.assertEqual([], self.journal)

    def test_save_that_is_under_way_is_waited_for(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED

        def saved(seconds: float) -> None:
            self.domain.job = libvirt.VIR_DOMAIN_JOB_NONE
            self.guest.save_memory()
        self.patch_name('time.sleep', saved)
        power.start_guest(self.orphaned)
        self.assertEqual(['managedSave', 'createWithFlags'],
                         self.journal.of('managed', 'create'))

    def test_job_of_another_is_not_waited_for_by_an_owner(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        power.start_guest(self.around)
        self.assertEqual([], self.journal)

    def test_save_of_a_dead_owner_may_still_wait_for_its_turn(self) -> None:
        def saved(seconds: float) -> None:
            self.now += 10.0
            if self.now == 30.0:
                self.guest.save_memory()
        self.patch_name('time.sleep', saved)
        power.start_guest(self.orphaned)
        self.assertEqual(['managedSave', 'createWithFlags'],
                         self.journal.of('managed', 'create'))

    def test_save_that_never_came_is_not_waited_for_without_end(
            self) -> None:
        def tick(seconds: float) -> None:
            self.now += 10.0
        self.patch_name('time.sleep', tick)
        power.start_guest(self.orphaned)
        self.assertEqual([], self.journal)

    def test_save_that_ended_with_libvirtd_leaves_nothing(self) -> None:
        # Its next cancels it, and lets the guest run on.
        self.domain.managed_save = True

        def tick(seconds: float) -> None:
            self.now += 10.0
        self.patch_name('time.sleep', tick)
        power.start_guest(self.around)
        self.assertEqual([], self.journal)
        power.start_guest(self.orphaned)
        self.assertEqual(['managedSaveRemove'], self.journal)

    def test_save_that_nobody_waits_for_is_ended(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        self.domain.job_operation = libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE

        def tick(seconds: float) -> None:
            self.domain.job = libvirt.VIR_DOMAIN_JOB_NONE
            self.now += 10.0
        self.patch_name('time.sleep', tick)
        power.start_guest(self.orphaned)
        self.assertEqual(['abortJob'], self.journal)
        # It is known how it ended.
        self.assertEqual(10.0, self.now)

    def test_guest_that_did_not_live_to_be_resumed_is(self) -> None:
        def tick(seconds: float) -> None:
            self.now += 10.0
        self.patch_name('time.sleep', tick)
        self.guest.save_memory()
        self.guest.start(paused=True)
        self.journal.clear()
        power.start_guest(self.orphaned, was_running=False)
        self.assertEqual([], self.journal.of('resume'))
        power.start_guest(self.orphaned, was_running=True)
        self.assertEqual(['resume'], self.journal.of('resume'))

    def test_save_without_end_is_tried_again_later(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED

        def tick(seconds: float) -> None:
            self.now += 100.0
        self.patch_name('time.sleep', tick)
        self.assertRaises(exception.UndoFailed, power.start_guest,
                          self.orphaned)

    def test_device_waits_for_a_guest_that_will_be_started(self) -> None:
        self.stop()
        self.assertRaises(exception.UndoFailed, power.attach_device,
                          self.around, device=PCI, life='0')

    def test_device_is_not_attached_to_a_guest_that_is_off(self) -> None:
        self.domain.off()
        power.attach_device(self.around, device=PCI, life='0')
        self.assertEqual([], self.journal)

    def test_device_that_is_let_go_late_is_given_back(self) -> None:
        self.domain.devices = PCI

        def tick(seconds: float) -> None:
            self.now += 10.0
            if self.now == 30.0:
                self.domain.devices = ''
        self.patch_name('time.sleep', tick)
        power.attach_device(self.around, device=PCI, life='1')
        self.assertEqual(['attachDeviceFlags'], self.journal)

    def test_device_that_is_never_let_go_is_said(self) -> None:
        self.domain.devices = PCI

        def tick(seconds: float) -> None:
            self.now += 10.0
        self.patch_name('time.sleep', tick)
        power.attach_device(self.around, device=PCI, life='1')
        self.assertEqual([], self.journal)
        self.assertIn('its next start gives it back', self.output.output)

    def test_guest_that_was_started_anew_has_its_device_for_good(
            self) -> None:
        self.domain.devices = PCI
        self.patch_name('time.sleep', lambda seconds: 1 / 0)
        power.attach_device(self.around, device=PCI, life='0')
        self.assertEqual('', self.output.output)

    def test_device_is_attached_once(self) -> None:
        for _ in range(2):
            power.attach_device(self.around, device=PCI, life='0')
        self.assertEqual(['attachDeviceFlags'], self.journal)


class TestLetRun(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        # It must not wait for a save that is known to be whole.
        self.patch_name('time.sleep', lambda seconds: 1 / 0)
        self.around = undo.Surroundings(
            self.guest, self.host, owner_died=True)

    def let_run(self, was_running: bool = True) -> list[str]:
        power.let_run(self.around, was_running=was_running)
        return self.journal.of('create', 'resume')

    def start_paused(self) -> None:
        self.guest.save_memory()
        self.guest.start(paused=True)
        self.journal.clear()

    def test_guest_that_was_started_runs_on_under_the_lock(self) -> None:
        self.start_paused()
        self.let_run()
        self.assertEqual(['may_resume', 'resume', 'lock for resume is free'],
                         self.journal)
        self.assertEqual(['resume'], self.let_run())

    def test_guest_that_was_not_started_yet_is(self) -> None:
        self.guest.save_memory()
        self.assertEqual(['createWithFlags'], self.let_run())
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING,
                         self.domain.current_state[0])

    def test_guest_that_was_paused_stays_so(self) -> None:
        self.start_paused()
        self.assertEqual([], self.let_run(was_running=False))
        self.assertEqual(libvirt.VIR_DOMAIN_PAUSED,
                         self.domain.current_state[0])

    def test_guest_that_another_paused_meanwhile_stays_so(self) -> None:
        self.start_paused()
        self.let_run()
        self.guest.suspend()
        self.assertEqual(['resume'], self.let_run())
        self.assertEqual(libvirt.VIR_DOMAIN_PAUSED,
                         self.domain.current_state[0])

    def test_guest_that_is_no_longer_ours_is_left_alone(self) -> None:
        self.start_paused()
        self.host.allowed = False
        self.assertEqual([], self.let_run())

    def test_guest_without_a_save_was_shut_off_by_another(self) -> None:
        self.domain.off()
        self.assertEqual([], self.let_run())

    def test_long_restore_is_waited_for(self) -> None:
        self.start_paused()
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        self.domain.job_operation = libvirt.VIR_DOMAIN_JOB_OPERATION_RESTORE
        rounds: list[float] = []

        def restored(seconds: float) -> None:
            rounds.append(seconds)
            if len(rounds) == 2:
                self.domain.job = libvirt.VIR_DOMAIN_JOB_NONE
                # Then libvirt's lock is held, and it can't be asked.
                self.domain.errors['jobStats'] = fakes.libvirt_error(
                    libvirt.VIR_ERR_OPERATION_TIMEOUT)
            elif len(rounds) == 4:
                del self.domain.errors['jobStats']
        self.patch_name('time.sleep', restored)
        self.assertEqual(['resume'], self.let_run())
        self.assertEqual(4, len(rounds))

    def test_backup_job_that_had_begun_is_not_waited_for(self) -> None:
        self.start_paused()
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        self.domain.job_operation = libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP
        self.assertEqual(['resume'], self.let_run())

    def test_restore_without_end_is_tried_again_later(self) -> None:
        self.start_paused()
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        self.now = 0.0
        self.patch_name('time.monotonic', lambda: self.now)

        def tick(seconds: float) -> None:
            self.now += 100.0
        self.patch_name('time.sleep', tick)
        self.assertRaises(exception.UndoFailed, self.let_run)

    def test_start_that_is_still_under_way_is_tried_again(self) -> None:
        self.guest.save_memory()
        self.domain.errors['createWithFlags'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_INVALID, 'domain is already running')
        self.assertRaises(exception.SnapshotError, self.let_run)


BROKEN = fakes.libvirt_error(
    libvirt.VIR_ERR_SYSTEM_ERROR, 'end of file', libvirt.VIR_FROM_RPC)


class TestBrokenConnection(base.TestCase):
    """A save, or a start, goes on whose connection broke."""

    def setUp(self) -> None:
        super().setUp()
        self.log = self.new_log()
        self.now = 0.0
        self.patch_name('time.monotonic', lambda: self.now)
        self.patch_name('libvirt.open',
                        lambda uri: self.domain.connection)

    def go(self) -> None:
        with self.log.scope():
            power.Stopped(self.guest, self.request(), self.log,
                          frozen.Pause()).start()

    def test_guest_is_started_when_its_save_ends(self) -> None:
        def broken() -> None:
            # libvirtd goes on with it, and then lets the next one wait.
            self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
            raise BROKEN
        self.domain.before['managedSave'] = broken

        def sleep(seconds: float) -> None:
            self.now += 1
            if self.now == 3:
                self.domain.job = libvirt.VIR_DOMAIN_JOB_NONE
                del self.domain.before['managedSave']
                self.guest.save_memory()
        self.patch_name('time.sleep', sleep)
        self.assertRaises(exception.SnapshotError, self.go)
        # Not repeated: the second is that of sleep().
        self.assertEqual(
            ['managedSave', 'managedSave', 'createWithFlags'],
            self.journal.of('managedSave', 'create'))
        self.assertEqual(0, self.log.pending)

    def test_save_that_is_refused_is_not_waited_for(self) -> None:
        self.patch_name('time.sleep', lambda seconds: 1 / 0)
        self.domain.errors['managedSave'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_FAILED)
        self.assertRaises(exception.SnapshotError, self.go)
        self.assertEqual([], self.journal.of('create'))
        self.assertEqual(0, self.log.pending)

    def test_start_is_not_taken_for_done_that_may_yet_fail(self) -> None:
        def broken() -> None:
            # libvirtd is killed, and its next ends what was being started.
            del self.domain.before['createWithFlags']
            self.domain.current_state = [
                libvirt.VIR_DOMAIN_PAUSED,
                libvirt.VIR_DOMAIN_PAUSED_STARTING_UP]
            self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
            raise BROKEN
        self.domain.before['createWithFlags'] = broken

        def sleep(seconds: float) -> None:
            self.domain.job = libvirt.VIR_DOMAIN_JOB_NONE
            self.domain.off()
        self.patch_name('time.sleep', sleep)
        self.assertRaises(exception.SnapshotError, self.go)
        self.assertEqual(['createWithFlags'] * 2, self.journal.of('create'))
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING,
                         self.domain.current_state[0])
        self.assertEqual(0, self.log.pending)


class TestSaveInTime(base.TestCase):
    """A guest stands still while it is saved."""

    def setUp(self) -> None:
        super().setUp()
        self.patch_name('nova_snapshot_ext.power._END_SAVE_POLL_S', 0.001)
        self.log = self.new_log()
        self.ended = threading.Event()
        self.domain.before['managedSave'] = self.saving
        self.domain.before['abortJob'] = self.end

    def saving(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        if self.ended.wait(30):
            raise fakes.libvirt_error(libvirt.VIR_ERR_OPERATION_ABORTED,
                                      'canceled by client')

    def end(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_NONE
        self.ended.set()

    def stop(self, **changes: typing.Any) -> None:
        with self.log.scope():
            power.Stopped(self.guest, self.request(**changes), self.log,
                          frozen.Pause())

    def test_save_has_its_limit(self) -> None:
        self.assertRaisesRegex(
            exception.FreezeFailed, 'save_timeout = 0 seconds', self.stop,
            save_timeout=0)
        self.assertEqual(['managedSave', 'abortJob'],
                         self.journal.of('managedSave', 'abort', 'create'))
        self.assertEqual(0, self.log.pending)

    def test_save_ends_with_the_snapshot(self) -> None:
        cancellation = cancellations.Cancellation()
        cancellation.cancel(exception.GuestGone('It is being deleted'))
        self.assertRaisesRegex(
            exception.GuestGone, 'being deleted', self.stop,
            cancellation=cancellation)
        self.assertEqual(1, len(self.journal.of('abortJob')))

    def test_job_of_another_is_left_alone(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        for operation in (libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP,
                          libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT):
            self.domain.job_operation = operation
            self.guest.end_save()
        self.assertEqual([], self.journal)

    def test_save_that_has_just_ended_is_no_error(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        self.domain.before['abortJob'] = lambda: None
        self.domain.errors['abortJob'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_INVALID)
        self.guest.end_save()


class TestStartAfter(base.TestCase):
    """A guest that is started for something to begin before it runs."""

    def setUp(self) -> None:
        super().setUp()
        self.watch_flushes()
        self.log = self.new_log()
        self.pause = frozen.Pause()
        self.journal.clear()

    def go(self) -> None:
        with self.log.scope():
            power.Stopped(self.guest, self.request(), self.log,
                          self.pause).start_after(self.begin)

    def begin(self) -> None:
        self.journal.append('begin')

    def steps(self) -> list[str]:
        return self.journal.of(
            'flushed', 'managedSave', 'may_start', 'createWithFlags',
            'begin', 'resume', 'start lock', 'attach')

    def test_it_runs_after_the_beginning_and_under_one_lock(self) -> None:
        self.domain.devices = PCI
        self.go()
        self.assertEqual(
            ['flushed attach_device', 'flushed start_guest', 'managedSave',
             'flushed let_run', 'may_start', 'createWithFlags paused',
             'begin', 'resume', 'start lock is free', 'attachDeviceFlags'],
            self.steps())
        self.assertEqual(0, self.log.pending)
        self.assertLess(0, self.pause.seconds)
        self.assertEqual(self.pause.seconds, self.pause.seconds)

    def test_paused_guest_is_not_resumed(self) -> None:
        self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED, 1]
        self.go()
        self.assertEqual([], self.journal.of('resume'))
        self.assertEqual(libvirt.VIR_DOMAIN_PAUSED,
                         self.domain.current_state[0])
        self.assertEqual(0, self.log.pending)

    def test_undo_of_the_save_is_gone_before_the_start(self) -> None:
        # It would wait for the save of a dead owner, with the guest paused.
        self.domain.before['createWithFlags'] = lambda: self.journal.append(
            str([each.step for each in
                 undo.read(self.log.path).pending.values()]))
        self.go()
        self.assertIn("['let_run']", self.journal)

    def test_it_runs_on_when_the_beginning_fails(self) -> None:
        self.domain.devices = PCI
        self.patch_name('tests.unit.test_power.TestStartAfter.begin',
                        lambda test: 1 / 0)
        self.assertRaises(ZeroDivisionError, self.go)
        self.assertEqual(['resume', 'attachDeviceFlags'],
                         self.journal.of('resume', 'attach'))
        self.assertEqual(0, self.log.pending)

    def test_paused_guest_stays_paused_when_the_beginning_fails(
            self) -> None:
        self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED, 1]
        self.patch_name('tests.unit.test_power.TestStartAfter.begin',
                        lambda test: 1 / 0)
        self.assertRaises(ZeroDivisionError, self.go)
        self.assertEqual([], self.journal.of('resume'))
        self.assertEqual(0, self.log.pending)

    def test_guest_that_is_no_longer_ours_is_not_started(self) -> None:
        self.host.allowed = False
        self.assertRaisesRegex(exception.FreezeFailed, 'not ours to start',
                               self.go)
        self.assertEqual([], self.journal.of('create', 'begin'))
        self.assertTrue(self.domain.managed_save)
        self.assertEqual(0, self.log.pending)

    def test_guest_whose_save_is_gone_is_not_booted(self) -> None:
        save = self.domain.managedSave

        def taken(flags: int) -> None:
            save(flags)
            self.domain.managed_save = False
        self.domain.managedSave = taken  # type: ignore[method-assign]
        self.assertRaises(exception.FreezeFailed, self.go)
        self.assertEqual([], self.journal.of('create', 'begin'))

    def test_start_whose_connection_broke_is_waited_for(self) -> None:
        def broken() -> None:
            self.domain.current_state = [
                libvirt.VIR_DOMAIN_PAUSED,
                libvirt.VIR_DOMAIN_PAUSED_STARTING_UP]
            self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
            raise BROKEN
        self.domain.before['createWithFlags'] = broken
        self.domain.job_operation = libvirt.VIR_DOMAIN_JOB_OPERATION_RESTORE
        self.patch_name('libvirt.open',
                        lambda uri: self.domain.connection)

        def sleep(seconds: float) -> None:
            self.journal.append('wait')
            self.domain.job = libvirt.VIR_DOMAIN_JOB_NONE
        self.patch_name('time.sleep', sleep)
        self.assertRaises(exception.SnapshotError, self.go)
        self.assertEqual(['wait', 'resume'],
                         self.journal.of('wait', 'resume'))
        self.assertEqual(0, self.log.pending)

    def test_save_is_kept_when_the_start_fails(self) -> None:
        self.domain.errors['createWithFlags'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_FAILED)
        self.assertRaises(exception.SnapshotError, self.go)
        self.assertTrue(self.domain.managed_save)
        self.assertEqual(1, self.log.pending)
