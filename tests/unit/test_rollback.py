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

"""A guest goes back, or is what it was; whoever dies and when."""

import collections.abc
import contextlib
import dataclasses
import itertools
import os
import typing

import libvirt

from nova_snapshot_ext import domain_records
from nova_snapshot_ext import domain_snapshot
from nova_snapshot_ext import exception
from nova_snapshot_ext import rollback
from nova_snapshot_ext import undo
from tests.unit import base
from tests.unit import doubles
from tests.unit import fakes
from tests.unit import test_domain_records

TARGET = test_domain_records.ONE
SAFETY = 'snapshot-ext-' + 32 * 'e'
OS = "<os><type arch='x86_64' machine='pc-1'>hvm</type></os>"
REST = f'{OS}<memory>1024</memory><vcpu>2</vcpu>'


class RollbackTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.path = self.new_file('disk', base.qcow2_header())
        self.domain.disks = fakes.disk_xml(
            self.path, 'qcow2', inside='<backingStore/>')
        self.domain.rest = REST
        self.qemu_img = doubles.QemuImg(self.journal)
        self.qemu_img.path = self.path
        self.qemu_img.snapshots = [TARGET]
        self.patch_name('time.sleep', lambda seconds: None)
        self.patch_name('nova_snapshot_ext.qemu_img.run', self.qemu_img.run)
        self.patch_name('libvirt_qemu.qemuMonitorCommand',
                        self.qemu_img.monitor)
        self.patch_name(
            'nova_snapshot_ext.internal_snapshot.new_name', lambda: SAFETY)
        self.patch_name('nova_snapshot_ext.guard.Guard.watch',
                        lambda guard, log: self.journal.append('guarded'))
        # What can't be undone is tried again in a thread.
        self.patch_name('nova_snapshot_ext.guard.bring_back',
                        lambda *arguments: True)
        self.domain.before['snapshotCreateXML'] = (
            lambda: self.qemu_img.snapshots.append(SAFETY))
        self.records = domain_records.Records(self.state, fakes.UUID)
        self.record = test_domain_records.record(
            TARGET, disks={'vda': self.path}, domain_xml=(
                f'<domainsnapshot><name>{TARGET}</name>'
                f'{self.domain.XMLDesc(0)}</domainsnapshot>'))
        self.records.add(self.record)
        self.records.set_current(None)
        self.journal.clear()

    def use_disks_alone(self) -> None:
        self.record = dataclasses.replace(
            self.record, rollback=domain_records.Rollback.DISK)

    def revert(self) -> rollback.Result:
        return rollback.revert(
            self.guest, self.record, self.records, self.host)

    def left(self) -> list[str]:
        return [name for name in os.listdir(self.state)
                if name.endswith(undo.SUFFIX)]

    def steps(self) -> list[str]:
        return self.journal.of(
            'guarded', 'may_start', 'start lock', 'snapshotCreateXML',
            'halted', 'define', 'revert', 'forget', 'destroy', 'create',
            'qemu-img snapshot', 'delete by', 'setTime')


class TestObstacle(RollbackTestCase):

    def obstacle(self) -> str:
        why = rollback.obstacle(self.guest, self.record) or ''
        self.assertEqual([], self.steps())
        if why:
            error = self.assertRaises(
                exception.RollbackRefused, self.revert)
            self.assertIn(why, str(error))
            self.assertEqual([], self.steps())
            self.assertEqual([], self.left())
        return why

    def test_guest_can_go_back(self) -> None:
        for power in (lambda: None, self.guest.suspend, self.domain.off):
            power()
            self.journal.clear()
            self.assertEqual('', self.obstacle())

    def test_guest_that_must_not_be_turned_off(self) -> None:
        self.domain.persistent = False
        self.assertIn('transient', self.obstacle())
        self.domain.persistent = True
        self.domain.current_state = [libvirt.VIR_DOMAIN_SHUTDOWN, 0]
        self.assertIn('in transition', self.obstacle())

    def test_saved_memory_is_not_thrown_away(self) -> None:
        self.domain.off()
        self.domain.managed_save = True
        self.assertIn('suspended', self.obstacle())

    def test_job_is_in_the_way(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        self.assertIn('save', self.obstacle())

    def test_disk_that_is_another(self) -> None:
        self.domain.disks = fakes.disk_xml(
            self.new_file('other', base.qcow2_header()), 'qcow2')
        for memory in (True, False):
            self.assertIn('not the disk any more', self.obstacle())
            self.use_disks_alone()

    def test_disk_that_was_resized(self) -> None:
        self.domain.capacity *= 2
        for memory in (True, False):
            self.assertIn('from 1048576 to 2097152', self.obstacle())
            self.use_disks_alone()

    def test_snapshot_that_is_gone(self) -> None:
        self.assertTrue(rollback.is_there(self.guest, self.record))
        self.qemu_img.snapshots = ['theirs']
        for power in (lambda: None, self.domain.off):
            power()
            self.assertIn('do not hold', self.obstacle())
            self.assertFalse(rollback.is_there(self.guest, self.record))

    def test_disk_that_was_attached_since(self) -> None:
        more = self.new_file('more', base.qcow2_header())
        for fmt, said in (('qcow2', 'vdb was attached since'),
                          ('raw', 'vdb is not a qcow2 file')):
            disks = self.domain.disks
            self.domain.disks += fakes.disk_xml(more, fmt, 'vdb')
            self.assertIn(said, self.obstacle())
            record = self.record
            self.use_disks_alone()
            self.assertEqual('', self.obstacle())
            self.record, self.domain.disks = record, disks

    def test_flavor_that_is_another(self) -> None:
        for new, said in (
                (REST.replace('1024', '2048'), 'memory were 1024'),
                (REST.replace('2</vcpu', '4</vcpu'), 'CPUs were 2')):
            self.domain.rest = new
            self.assertIn(said, self.obstacle())

    def test_place_on_the_host_that_is_another(self) -> None:
        def place(cpu: int) -> tuple[str, ...]:
            return (
                f'<cputune><vcpupin vcpu="0" cpuset="{cpu}"/></cputune>',
                f'<numatune><memory nodeset="{cpu}" mode="strict"/>'
                f'</numatune>',
                f'<memoryBacking><hugepages><page size="{cpu}"/></hugepages>'
                f'</memoryBacking>',
                f'<cpu><numa><cell id="{cpu}"/></numa></cpu>')
        record = self.record
        for said, then, now in zip(
                ('cputune', 'numatune', 'memoryBacking', '(cpu)'),
                place(1), place(2)):
            self.record = dataclasses.replace(
                record, domain_xml=record.domain_xml.replace(
                    '<os>', f'\n  {then.replace("><", ">  <")}<os>'))
            self.domain.rest = REST + then
            self.assertEqual('', self.obstacle())
            for self.domain.rest in (REST, REST + now):
                self.assertIn(said, self.obstacle())

    def test_network_interface_that_is_another(self) -> None:
        self.domain.devices = (
            '<interface type="bridge"><mac address="x"/></interface>')
        self.assertIn('network interfaces', self.obstacle())

    def test_machine_that_the_host_does_not_offer(self) -> None:
        self.domain.connection.machines_gone.add('pc-1')
        self.assertIn('machine pc-1', self.obstacle())
        self.use_disks_alone()
        self.assertEqual('', self.obstacle())

    def test_cpu_that_the_host_does_not_offer(self) -> None:
        self.domain.connection.cpu_compares = (
            libvirt.VIR_CPU_COMPARE_INCOMPATIBLE)
        self.assertEqual('', self.obstacle())
        self.record = dataclasses.replace(
            self.record, domain_xml=self.record.domain_xml.replace(
                '<os>', '<cpu><model>Best</model></cpu><os>'))
        self.assertIn('CPU Best', self.obstacle())

    def test_cpu_of_the_host_that_is_another(self) -> None:
        self.domain.rest += '<cpu mode="host-passthrough"/>'
        self.record = dataclasses.replace(
            self.record, host_cpu=self.guest.host_cpu())
        self.assertEqual('', self.obstacle())
        self.domain.connection.host_cpu = '<cpu><model>x</model></cpu>'
        self.assertIn('another CPU', self.obstacle())

    def test_room_for_its_present_memory(self) -> None:
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: 0)
        self.assertIn('present memory', self.obstacle())
        self.domain.off()
        self.assertEqual('', self.obstacle())

    def test_guest_that_is_not_ours_to_start(self) -> None:
        self.host.allowed = False
        for memory in (True, False):
            self.assertRaises(exception.RollbackRefused, self.revert)
            self.assertEqual([], self.journal.of(
                'snapshotCreateXML', 'destroy', 'revert'))
            self.assertEqual([], self.left())
            self.use_disks_alone()


class TestMemory(RollbackTestCase):

    def test_running_guest(self) -> None:
        result = self.revert()
        self.assertEqual(
            ['guarded', 'may_start', 'snapshotCreateXML', 'halted',
             f'define {TARGET}', f'revertToSnapshot {TARGET}',
             f'forget {TARGET}', f'forget {SAFETY}', 'start lock is free',
             'delete by monitor'], self.steps())
        self.assertIs(domain_records.Rollback.MEMORY, result.rollback)
        self.assertGreater(result.guest_pause_s, 0)
        self.assertEqual([TARGET], self.qemu_img.snapshots)
        self.assertEqual(TARGET, self.records.current)
        self.assertEqual([], self.left())

    def test_guest_that_is_off(self) -> None:
        self.domain.off()
        result = self.revert()
        self.assertEqual(0, result.guest_pause_s)
        self.assertEqual(
            ['qemu-img snapshot -c', f'define {TARGET}',
             f'revertToSnapshot {TARGET}', f'forget {TARGET}',
             'delete by monitor'],
            self.journal.of('qemu-img snapshot', 'define', 'revert',
                            'delete', 'forget'))
        self.assertEqual([TARGET], self.qemu_img.snapshots)

    def test_rollback_that_fails_brings_the_guest_back(self) -> None:
        def fail() -> None:
            del self.domain.before['revertToSnapshot']
            raise fakes.libvirt_error(libvirt.VIR_ERR_OPERATION_FAILED)
        self.domain.before['revertToSnapshot'] = fail
        self.assertRaises(exception.SnapshotError, self.revert)
        self.assertEqual(
            [f'revertToSnapshot {TARGET}', f'revertToSnapshot {SAFETY}',
             f'forget {TARGET}', f'forget {SAFETY}', 'start lock is free',
             'delete by monitor'],
            self.journal.of('revert', 'forget', 'start lock', 'delete'))
        self.assertIsNone(self.records.current)
        self.assertEqual([TARGET], self.qemu_img.snapshots)
        self.assertEqual([], self.left())

    def test_snapshot_that_fails_leaves_the_guest_alone(self) -> None:
        for name in ('snapshotCreateXML', 'define'):
            self.domain.errors[name] = fakes.libvirt_error(
                libvirt.VIR_ERR_OPERATION_FAILED)
            self.journal.clear()
            self.assertRaises(exception.SnapshotError, self.revert)
            self.assertEqual(
                [] if name == 'snapshotCreateXML' else
                [f'revertToSnapshot {SAFETY}'], self.journal.of('revert'))
            self.assertEqual(libvirt.VIR_DOMAIN_RUNNING,
                             self.domain.state()[0])
            self.assertEqual([], self.left())
            self.domain.errors.clear()

    def test_what_can_not_be_cleaned_up_is_no_failure(self) -> None:
        self.qemu_img.lies = True
        self.revert()
        self.assertEqual(TARGET, self.records.current)
        self.assertIn('is tried again', self.output.output)
        self.assertEqual(1, len(self.left()))

    def test_clock_is_set_where_an_agent_answers(self) -> None:
        self.domain.devices = (
            '<channel><target name="org.qemu.guest_agent.0" '
            'state="connected"/></channel>')
        self.domain.errors['setTime'] = fakes.libvirt_error(
            libvirt.VIR_ERR_AGENT_UNRESPONSIVE)
        self.revert()
        self.assertEqual('setTime', self.steps()[-1])
        self.assertIn('clock of', self.output.output)

    def break_connection(self, name: str, state: list[int]) -> None:
        """libvirt dies in a call, which leaves the guest in a state."""
        def die() -> None:
            del self.domain.before[name]
            self.domain.current_state = state
            self.domain.number += state[0] == libvirt.VIR_DOMAIN_RUNNING
            raise fakes.libvirt_error(
                libvirt.VIR_ERR_INTERNAL_ERROR,
                domain=libvirt.VIR_FROM_RPC)
        self.domain.before[name] = die
        ticks = itertools.count()
        self.patch_name('time.monotonic', lambda: float(next(ticks)))

    def test_guest_is_not_left_paused_when_libvirt_dies(self) -> None:
        self.break_connection('snapshotCreateXML', [
            libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_SAVE])
        self.assertRaises(exception.SnapshotError, self.revert)
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING, self.domain.state()[0])
        self.assertEqual([], self.left())

    def test_guest_is_not_left_off_when_its_memory_is_not_held(self) -> None:
        self.break_connection('snapshotCreateXML', [
            libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_CRASHED])
        self.assertRaises(exception.SnapshotError, self.revert)
        self.assertEqual(['createWithFlags'], self.journal.of('create'))
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING, self.domain.state()[0])
        self.assertEqual([], self.left())

    def test_guest_that_arrived_unheard_is_there(self) -> None:
        self.break_connection(
            'revertToSnapshot', self.domain.reverted_state)
        self.revert()
        self.assertEqual([f'revertToSnapshot {TARGET}'],
                         self.journal.of('revert'))
        self.assertEqual(TARGET, self.records.current)
        self.assertEqual([], self.left())

    def test_guest_that_somebody_else_started_is_not_there(self) -> None:
        """libvirtd died in the rollback, and it was booted meanwhile."""
        self.break_connection('revertToSnapshot', [
            libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_BOOTED])
        error = self.assertRaises(exception.StartedByAnother, self.revert)
        self.assertIn(f'kept as the domain snapshot {SAFETY}', str(error))
        self.assertEqual([f'revertToSnapshot {TARGET}'],
                         self.journal.of('revert', 'destroy', 'create'))
        self.assertIsNone(self.records.current)
        # Its disks may be of then by now: what it was is not thrown away.
        self.assertEqual([TARGET, SAFETY], self.qemu_img.snapshots)
        kept = self.records.named(SAFETY)
        assert kept is not None
        self.assertEqual(f'before going back to {self.record.title}',
                         kept.title)
        self.assertIs(domain_records.Rollback.MEMORY, kept.rollback)
        self.assertEqual({'vda': self.path}, kept.disks)
        self.assertIn(kept.title, self.output.output)
        self.assertEqual({}, self.domain.snapshots)
        self.assertEqual([], self.left())
        # It can be gone back to like others, and deleted.
        self.record = kept
        self.patch_name(
            'nova_snapshot_ext.internal_snapshot.new_name',
            lambda: 'snapshot-ext-' + 32 * 'f')
        self.domain.before['snapshotCreateXML'] = (
            lambda: self.qemu_img.snapshots.append(
                'snapshot-ext-' + 32 * 'f'))
        self.revert()
        self.assertEqual(f'revertToSnapshot {SAFETY}',
                         self.journal.of('revert')[-1])
        domain_snapshot.delete(self.guest, kept, self.records, self.host)
        self.assertEqual([TARGET], self.qemu_img.snapshots)

    def test_guest_that_did_not_come_up_comes_back(self) -> None:
        self.break_connection('revertToSnapshot', [
            libvirt.VIR_DOMAIN_SHUTOFF, 0])
        self.assertRaises(exception.SnapshotError, self.revert)
        self.assertEqual(
            [f'revertToSnapshot {TARGET}', f'revertToSnapshot {SAFETY}'],
            self.journal.of('revert'))
        self.assertEqual([], self.left())

    def test_present_state_is_held_until_the_guest_is_back(self) -> None:
        self.domain.errors['revertToSnapshot'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_FAILED)
        self.assertRaises(exception.SnapshotError, self.revert)
        self.assertIn(SAFETY, self.qemu_img.snapshots)
        self.assertEqual([], self.journal.of('create'))
        self.assertEqual(1, len(self.left()))
        self.domain.errors.clear()
        undo.finish_left_over(self.state, self.guest, self.host)
        self.assertEqual(f'revertToSnapshot {SAFETY}',
                         self.journal.of('revert')[-1])
        self.assertEqual([TARGET], self.qemu_img.snapshots)
        self.assertEqual([], self.left())


class TestDisks(RollbackTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.use_disks_alone()

    def test_running_guest(self) -> None:
        self.revert()
        self.assertEqual(
            ['guarded', 'may_start', 'destroy', 'qemu-img snapshot -c',
             'qemu-img snapshot -a', 'createWithFlags',
             'start lock is free', 'delete by monitor'],
            self.steps())
        self.assertEqual([TARGET], self.qemu_img.applied)
        self.assertEqual([TARGET], self.qemu_img.snapshots)
        self.assertEqual(TARGET, self.records.current)

    def test_snapshot_is_current_when_all_disks_are_of_then(self) -> None:
        """Also if the guest's state descended from it before."""
        self.records.set_current(TARGET)
        seen: list[str | None] = []
        real = self.qemu_img.run

        def run(*arguments: str, **more: typing.Any) -> str:
            if arguments[1] == '-a':
                seen.append(self.records.current)
            return real(*arguments, **more)
        self.patch_name('nova_snapshot_ext.qemu_img.run', run)
        self.domain.before['createWithFlags'] = (
            lambda: seen.append(self.records.current))
        self.revert()
        self.assertEqual([None, TARGET], seen)

    def test_guest_that_can_not_be_started_is_what_it_was(self) -> None:
        def fail() -> None:
            del self.domain.before['createWithFlags']
            raise fakes.libvirt_error(libvirt.VIR_ERR_OPERATION_FAILED)
        self.domain.before['createWithFlags'] = fail
        self.assertRaises(exception.SnapshotError, self.revert)
        self.assertEqual([TARGET, SAFETY], self.qemu_img.applied)
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING, self.domain.state()[0])
        self.assertIsNone(self.records.current)
        self.assertEqual([], self.left())

    def test_guest_that_was_brought_back_was_not_started_by_another(
            self) -> None:
        """What held its state can't be deleted at once."""
        self.qemu_img.snapshots = [TARGET]

        def fail() -> None:
            del self.domain.before['createWithFlags']
            raise fakes.libvirt_error(libvirt.VIR_ERR_OPERATION_FAILED)
        self.domain.before['createWithFlags'] = fail
        self.qemu_img.lies = True
        error = self.assertRaises(exception.SnapshotError, self.revert)
        self.assertNotIsInstance(error, exception.StartedByAnother)
        self.assertNotIn('started by somebody else', self.output.output)
        self.assertEqual(1, len(self.left()))

    def test_guest_that_another_starts_is_not_called_what_it_was(
            self) -> None:
        def start() -> None:
            self.domain.current_state = [libvirt.VIR_DOMAIN_RUNNING, 1]
            self.domain.number += 1
        real = self.qemu_img.run

        def run(*arguments: str, **more: typing.Any) -> str:
            if arguments[1:3] == ('-a', TARGET):
                start()
                raise exception.CommandFailed('it is in use')
            return real(*arguments, **more)
        self.patch_name('nova_snapshot_ext.qemu_img.run', run)
        error = self.assertRaises(exception.StartedByAnother, self.revert)
        self.assertIn('it is in use', str(error))
        self.assertEqual([TARGET, SAFETY], self.qemu_img.snapshots)
        self.assertEqual([], self.qemu_img.applied)
        self.assertEqual([], self.left())

    def test_guest_that_was_started_unheard_is_there(self) -> None:
        def die() -> None:
            self.domain.current_state = [libvirt.VIR_DOMAIN_RUNNING, 1]
            self.domain.number += 1
            raise fakes.libvirt_error(
                libvirt.VIR_ERR_INTERNAL_ERROR, domain=libvirt.VIR_FROM_RPC)
        self.domain.before['createWithFlags'] = die
        self.revert()
        self.assertEqual([TARGET], self.qemu_img.applied)
        self.assertEqual(TARGET, self.records.current)
        self.assertEqual([], self.left())

    def test_guest_that_was_paused(self) -> None:
        self.guest.suspend()
        self.revert()
        self.assertEqual(['createWithFlags paused'],
                         self.journal.of('create'))

    def test_guest_that_is_off_stays_off(self) -> None:
        self.domain.off()
        self.assertEqual(0, self.revert().guest_pause_s)
        self.assertEqual([], self.journal.of('create', 'destroy'))
        self.assertEqual([TARGET], self.qemu_img.applied)

    def test_rollback_that_fails_brings_the_disks_back(self) -> None:
        real = self.qemu_img.run

        def run(*arguments: str, **more: typing.Any) -> str:
            if arguments[1:3] == ('-a', TARGET):
                self.qemu_img.applied.append('half')
                raise exception.CommandFailed('no')
            return real(*arguments, **more)
        self.patch_name('nova_snapshot_ext.qemu_img.run', run)
        self.assertRaises(exception.CommandFailed, self.revert)
        self.assertEqual(['half', SAFETY], self.qemu_img.applied)
        self.assertEqual([TARGET], self.qemu_img.snapshots)
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING, self.domain.state()[0])
        self.assertIsNone(self.records.current)
        self.assertEqual([], self.left())


class TestComeBack(RollbackTestCase):
    """The undo, by whoever finds it."""

    def setUp(self) -> None:
        super().setUp()
        self.qemu_img.snapshots = [TARGET, SAFETY]
        self.domain.snapshots = {SAFETY: '<domainsnapshot/>',
                                 TARGET: '<domainsnapshot/>'}
        self.records.set_current(TARGET)
        self.ended: list[str] = []
        self.patch_name(
            'nova_snapshot_ext.processes.end',
            lambda argument, what, program: self.ended.append(argument))
        self.now = 0.0
        self.patch_name('time.monotonic', lambda: self.now)
        self.patch_name('time.sleep', self.tick)

    def tick(self, seconds: float) -> None:
        self.now += 1.0

    def come_back(self, life: str | None = '1', paused: bool = False,
                  current: str | None = None, **around: bool) -> None:
        domain_snapshot.come_back(
            undo.Surroundings(self.guest, self.host, **around),
            target=TARGET, safety=SAFETY, paths=[self.path], life=life,
            paused=paused, current=current, uuid=fakes.UUID,
            state_directory=self.state)

    def done(self) -> list[str]:
        return self.journal.of('revert', 'destroy', 'resume',
                               'qemu-img snapshot')

    def test_guest_that_was_not_taken_down(self) -> None:
        for owner_died in (False, True):
            self.come_back(owner_died=owner_died)
            self.assertEqual([], self.done())

    def test_guest_that_libvirt_left_paused_goes_on(self) -> None:
        for owner_died in (False, True):
            self.domain.current_state = [
                libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_SAVE]
            self.come_back(owner_died=owner_died)
            self.assertEqual(['resume'], self.done())
            self.journal.clear()

    def test_guest_that_its_owner_paused_stays_so(self) -> None:
        self.guest.suspend()
        self.come_back(owner_died=True)
        self.assertEqual([], self.done())

    def test_guest_whose_memory_was_not_held_boots_from_its_disks(
            self) -> None:
        for paused in (False, True):
            self.domain.off()
            self.domain.snapshots = {TARGET: '<domainsnapshot/>'}
            self.journal.clear()
            self.come_back(paused=paused, owner_died=True)
            self.assertEqual(
                ['qemu-img snapshot -a', f'forget {TARGET}',
                 'createWithFlags' + ' paused' * paused],
                self.journal.of('revert', 'qemu-img snapshot -a', 'forget',
                                'create'))
            self.qemu_img.snapshots = [TARGET, SAFETY]

    def test_guest_that_was_off_is_not_started(self) -> None:
        self.domain.off()
        self.domain.snapshots.clear()
        self.come_back(life=None)
        self.assertEqual([SAFETY], self.qemu_img.applied)
        self.assertEqual([], self.journal.of('create', 'revert'))

    def test_libvirt_knows_neither_when_nova_may_go_on(self) -> None:
        self.domain.off()
        self.come_back()
        self.assertEqual(
            ['may_start', f'revertToSnapshot {SAFETY}', f'forget {TARGET}',
             f'forget {SAFETY}', 'start lock is free'], self.steps()[:5])

    def test_guest_that_is_off_comes_back_with_its_memory(self) -> None:
        for owner_died in (False, True):
            self.domain.off()
            self.domain.snapshots = {SAFETY: '<domainsnapshot/>',
                                     TARGET: '<domainsnapshot/>'}
            self.come_back(owner_died=owner_died)
            self.assertEqual([f'revertToSnapshot {SAFETY}'], self.done())
            self.assertIsNone(self.records.current)
            self.journal.clear()
            # It may run twice.
            self.come_back(owner_died=owner_died)
            self.assertEqual([], self.done())

    def test_guest_that_arrived_when_its_owner_died_stays_there(
            self) -> None:
        self.domain.number = 2
        self.domain.current_snapshot = TARGET
        self.come_back(owner_died=True)
        self.assertEqual([], self.done())
        self.assertEqual(TARGET, self.records.current)

    def test_guest_that_came_up_by_halves_is_brought_back(self) -> None:
        self.domain.number = 2
        self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED, 7]
        self.come_back()
        self.assertEqual(['destroy', f'revertToSnapshot {SAFETY}'],
                         self.done())

    def test_guest_that_another_started_is_left_alone(self) -> None:
        # A rollback of disks alone: libvirt knows no snapshot.
        self.domain.number = 2
        self.domain.snapshots.clear()
        for owner_died in (False, True):
            self.come_back(owner_died=owner_died)
            self.assertEqual([], self.done())

    def test_guest_that_another_started_before_it_went_back(self) -> None:
        """Its owner died when it was off."""
        for memory in (True, False):
            self.domain.number = 2
            self.domain.current_snapshot = SAFETY
            if not memory:
                # Not all of its disks were made what they were then.
                self.domain.snapshots.clear()
                self.records.set_current(None)
            for again in (False, True):
                self.come_back(owner_died=True)
                self.assertEqual([], self.done())
                self.assertIsNone(self.records.current)
                self.assertEqual([TARGET, SAFETY], self.qemu_img.snapshots)
                kept = self.records.named(SAFETY)
                assert kept is not None
                self.assertIs(
                    domain_records.Rollback.MEMORY if memory
                    else domain_records.Rollback.DISK, kept.rollback)
                self.assertEqual({}, self.domain.snapshots)
            # It writes since: it is never made what it was by itself.
            self.domain.off()
            self.come_back(owner_died=True)
            self.assertEqual([], self.done())
            self.domain.current_state = [libvirt.VIR_DOMAIN_RUNNING, 1]
            self.records.remove(SAFETY)

    def test_guest_that_was_to_go_back_to_its_last_snapshot(self) -> None:
        """Its state descends from that one in any case."""
        for snapshots, now in (({SAFETY: '<domainsnapshot/>'}, TARGET),
                               ({}, None)):
            self.domain.number = 2
            self.domain.snapshots = dict(snapshots)
            self.records.set_current(now)
            self.come_back(owner_died=True, current=TARGET)
            self.assertEqual([], self.done())
            self.assertEqual(TARGET, self.records.current)
            self.assertIsNotNone(self.records.named(SAFETY))
            self.records.remove(SAFETY)

    def test_life_that_is_named_as_an_earlier_one(self) -> None:
        """libvirtd, or the host, was restarted while the guest was off."""
        for rebooted, current in ((False, SAFETY), (True, None)):
            self.domain.current_snapshot = current
            self.come_back(owner_died=True, rebooted=rebooted)
            self.assertEqual([], self.done())
            self.assertIsNotNone(self.records.named(SAFETY))
            self.assertEqual([TARGET, SAFETY], self.qemu_img.snapshots)
            self.records.remove(SAFETY)
            self.domain.snapshots = {SAFETY: '<domainsnapshot/>',
                                     TARGET: '<domainsnapshot/>'}

    def use_disks_alone(self) -> None:
        """Its owner died when it had begun to make the disks those of then.
        """
        super().use_disks_alone()
        self.domain.snapshots.clear()
        self.records.replace(self.record)
        self.records.set_current(None)

    def test_disks_alone_and_a_life_that_is_named_as_an_earlier_one(
            self) -> None:
        self.use_disks_alone()
        self.come_back(owner_died=True)
        self.assertEqual([], self.done())
        self.assertIsNotNone(self.records.named(SAFETY))
        self.assertEqual([TARGET, SAFETY], self.qemu_img.snapshots)

    def test_guest_that_another_starts_from_disks_that_did_not_come_back(
            self) -> None:
        """It was to go back to the one that its state descends from."""
        self.use_disks_alone()
        self.domain.off()
        self.qemu_img.fails.add('-a')
        for _ in range(2):
            self.assertRaises(exception.SnapshotError, self.come_back,
                              current=TARGET, owner_died=True)
            self.assertIsNone(self.records.current)
        self.domain.createWithFlags(0)
        self.come_back(current=TARGET, owner_died=True)
        self.assertEqual(TARGET, self.records.current)
        self.assertIsNotNone(self.records.named(SAFETY))
        self.assertEqual([TARGET, SAFETY], self.qemu_img.snapshots)

    def test_guest_that_another_starts_while_its_lock_is_waited_for(
            self) -> None:
        """Nothing of it is changed, and what it was is kept."""
        def start() -> None:
            if self.domain.state()[0] == libvirt.VIR_DOMAIN_SHUTOFF:
                self.domain.createWithFlags(0)

        @contextlib.contextmanager
        def may_start() -> collections.abc.Iterator[bool]:
            start()
            yield True
        for memory in (True, False):
            if not memory:
                self.use_disks_alone()
            self.domain.off()
            self.host.waited = start
            self.patch(self.host, 'may_start', may_start)
            self.assertRaisesRegex(
                exception.UndoFailed, 'by somebody else', self.come_back,
                owner_died=True)
            self.come_back(owner_died=True)
            self.assertEqual([], self.done())
            self.assertIsNotNone(self.records.named(SAFETY))
            self.assertEqual([TARGET, SAFETY], self.qemu_img.snapshots)
            self.records.remove(SAFETY)

    def test_guest_that_was_brought_back_is_not_started_by_another(
            self) -> None:
        """Its state is not kept when what held it can be deleted later."""
        for memory, current in itertools.product(
                (True, False), (None, TARGET)):
            if not memory:
                self.use_disks_alone()
            self.domain.off()
            self.qemu_img.lies = True
            self.assertRaises(exception.UndoFailed, self.come_back,
                              current=current, owner_died=True)
            self.assertEqual(current, self.records.current)
            self.qemu_img.lies = False
            self.come_back(current=current, owner_died=True)
            self.assertEqual(
                [f'revertToSnapshot {SAFETY}' if memory
                 else 'qemu-img snapshot -a'], self.done())
            self.assertIsNone(self.records.named(SAFETY))
            self.assertEqual([TARGET], self.qemu_img.snapshots)
            self.assertEqual(current, self.records.current)
            self.assertNotIn('by somebody else', self.output.output)
            self.qemu_img.snapshots.append(SAFETY)
            self.domain.snapshots = {SAFETY: '<domainsnapshot/>',
                                     TARGET: '<domainsnapshot/>'}
            self.journal.clear()

    def test_memory_that_came_back_when_its_owner_died(self) -> None:
        """When nothing of ours said so, but libvirt."""
        for known in ([SAFETY], [SAFETY, TARGET]):
            self.domain.snapshots = dict.fromkeys(known, '<domainsnapshot/>')
            self.domain.number = 2
            self.domain.current_snapshot = SAFETY
            self.domain.current_state = self.domain.reverted_state
            self.records.set_current(None)
            self.qemu_img.snapshots = [TARGET, SAFETY]
            self.come_back(current=TARGET, owner_died=True)
            self.assertEqual([], self.done())
            self.assertEqual(TARGET, self.records.current)
            self.assertEqual([TARGET], self.qemu_img.snapshots)

    def test_record_that_can_not_be_read_keeps_no_guest_off(self) -> None:
        self.use_disks_alone()
        self.domain.off()
        self.new_file(f'state/domain-snapshots/{fakes.UUID}/'
                      f'snapshot-ext-{7:032x}.json', b'{')
        self.come_back(owner_died=True)
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING, self.domain.state()[0])
        self.assertEqual([TARGET], self.qemu_img.snapshots)

    def test_disks_of_what_is_kept_are_those_of_then(self) -> None:
        """In a rescue its disk has another name."""
        self.use_disks_alone()
        self.domain.number = 2
        self.domain.disks = fakes.disk_xml(
            self.new_file('rescue', base.qcow2_header()), 'qcow2', 'vda',
        ) + fakes.disk_xml(
            self.path, 'qcow2', 'vdb', inside='<backingStore/>')
        self.come_back(owner_died=True)
        kept = self.records.named(SAFETY)
        assert kept is not None
        self.assertEqual(self.record.disks, kept.disks)
        self.assertEqual(self.record.capacities, kept.capacities)

    def test_what_does_not_hold_all_is_not_kept(self) -> None:
        self.domain.number = 2
        self.domain.snapshots.pop(SAFETY)
        self.qemu_img.snapshots = [TARGET]
        self.come_back(owner_died=True)
        self.assertIsNone(self.records.named(SAFETY))

    def test_guest_that_stays_is_not_brought_back_later(self) -> None:
        """What held its state can't be deleted while it is up."""
        for number, current in ((2, TARGET), (1, None)):
            self.domain.number = number
            self.domain.current_snapshot = current
            self.qemu_img.fails.add('monitor')
            self.assertRaises(
                exception.UndoFailed, self.come_back, owner_died=True)
            self.domain.off()
            self.come_back(owner_died=True)
            self.assertEqual(['qemu-img snapshot -d'], self.done())
            self.assertEqual([TARGET], self.qemu_img.snapshots)
            self.assertIsNone(self.records.named(SAFETY))
            self.domain.current_state = [libvirt.VIR_DOMAIN_RUNNING, 1]
            self.qemu_img.snapshots.append(SAFETY)
            self.qemu_img.fails.clear()
            self.journal.clear()

    def test_disks_alone_come_back(self) -> None:
        self.domain.off()
        self.domain.snapshots.clear()
        self.come_back(owner_died=True)
        self.assertEqual([SAFETY], self.qemu_img.applied)
        self.assertIsNone(self.records.current)
        self.assertEqual([TARGET, SAFETY, SAFETY], self.ended)

    def test_disks_whose_state_was_not_held_are_left_alone(self) -> None:
        self.domain.off()
        self.domain.snapshots.clear()
        self.qemu_img.snapshots = [TARGET]
        self.come_back()
        self.assertEqual([], self.qemu_img.applied)

    def test_disks_come_back_where_the_guest_must_not_be_started(
            self) -> None:
        self.domain.off()
        self.host.allowed = False
        self.come_back()
        self.assertEqual([SAFETY], self.qemu_img.applied)

    def test_disks_come_back_after_a_reboot(self) -> None:
        self.domain.off()
        self.come_back(rebooted=True, owner_died=True)
        self.assertEqual(['qemu-img snapshot -a', 'qemu-img snapshot -d'],
                         self.done())
        self.assertEqual([SAFETY], self.qemu_img.applied)

    def test_guest_that_was_started_after_a_reboot_is_left_alone(
            self) -> None:
        self.domain.number = 3
        self.come_back(rebooted=True, owner_died=True)
        self.assertEqual([], self.done())

    def test_guest_that_is_gone(self) -> None:
        self.domain.gone()
        self.come_back(owner_died=True)
        self.assertEqual([], self.done())

    def test_call_that_is_under_way_is_waited_for(self) -> None:
        self.domain.off()
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED

        def arrived(seconds: float) -> None:
            self.now += 1.0
            if self.now == 3.0:
                self.domain.job = libvirt.VIR_DOMAIN_JOB_NONE
                self.domain.current_snapshot = TARGET
                self.domain.current_state = self.domain.reverted_state
                self.domain.number = 2
        self.patch_name('time.sleep', arrived)
        self.come_back(owner_died=True)
        self.assertEqual([], self.done())
        self.assertEqual(TARGET, self.records.current)

    def test_guest_that_libvirt_did_not_start_wholly_is_waited_for(
            self) -> None:
        """libvirtd died in that; the next one turns it off."""
        self.domain.number = 2
        self.domain.current_state = [
            libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP]

        def ended(seconds: float) -> None:
            self.now += 1.0
            if self.now == 3.0:
                self.domain.off()
        self.patch_name('time.sleep', ended)
        self.come_back(owner_died=True)
        self.assertEqual([f'revertToSnapshot {SAFETY}'], self.done())

    def test_call_that_may_still_wait_is_waited_for(self) -> None:
        def halted(seconds: float) -> None:
            self.now += 10.0
            if self.now == 30.0:
                self.domain.off()
        self.patch_name('time.sleep', halted)
        self.come_back(owner_died=True)
        self.assertEqual([f'revertToSnapshot {SAFETY}'], self.done())

    def test_way_back_that_fails_stays_to_be_tried_again(self) -> None:
        self.domain.off()
        self.domain.errors['revertToSnapshot'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_FAILED)
        self.assertRaises(exception.SnapshotError, self.come_back)
        # What it is made of stays, and nothing starts it without.
        self.assertIn(SAFETY, self.qemu_img.snapshots)
        self.assertEqual([], self.journal.of('create', 'delete'))
        self.domain.errors.clear()
        self.come_back()
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING, self.domain.state()[0])


class TestBeforeEachStep(RollbackTestCase):
    """The way back is on the disk before a step is taken."""

    def logged(self) -> list[str]:
        path = os.path.join(self.state, fakes.UUID + undo.SUFFIX)
        return [pending.step for _, pending in
                sorted(undo.read(path).pending.items())]

    def test_memory(self) -> None:
        seen: list[list[str]] = []
        note = self.domain.before['snapshotCreateXML']
        for name in ('snapshotCreateXML', 'revertToSnapshot', 'define'):
            def before(name: str = name) -> None:
                seen.append(self.logged())
                if name == 'snapshotCreateXML':
                    note()
            self.domain.before[name] = before
        self.revert()
        self.assertEqual(
            [['forget_domain_snapshot', 'come_back']] * 3, seen)

    def test_disks(self) -> None:
        self.use_disks_alone()
        seen: dict[str, list[str]] = {}
        self.domain.before['destroy'] = lambda: seen.update(
            destroy=self.logged())
        real = self.qemu_img.run

        def run(*arguments: str, **more: typing.Any) -> str:
            if arguments[1] in ('-c', '-a'):
                seen[arguments[1]] = self.logged()
            return real(*arguments, **more)
        self.patch_name('nova_snapshot_ext.qemu_img.run', run)
        with contextlib.suppress(exception.SnapshotError):
            self.revert()
        self.assertEqual(
            dict.fromkeys(('destroy', '-c', '-a'), ['come_back']), seen)
