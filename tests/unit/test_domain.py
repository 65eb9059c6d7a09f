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

"""A domain snapshot is taken, stays or goes, and its guest lives on."""

import contextlib
import os
import typing

import libvirt

from nova_snapshot_ext import domain_records
from nova_snapshot_ext import domain_snapshot
from nova_snapshot_ext import exception
from nova_snapshot_ext.flows import domain
from nova_snapshot_ext import frozen
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo
from tests.unit import base
from tests.unit import doubles
from tests.unit import fakes
from tests.unit import test_domain_records

NOVA = ('<metadata><instance xmlns='
        '"http://openstack.org/xmlns/libvirt/nova/1.1"/></metadata>')
MINE = 'snapshot-ext-' + 32 * 'd'


class DomainTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.path = self.new_file('disk', base.qcow2_header())
        self.domain.disks = fakes.disk_xml(
            self.path, 'qcow2', inside='<backingStore/>')
        self.patch_name('time.sleep', lambda seconds: None)
        self.qemu_img = doubles.QemuImg(self.journal)
        self.qemu_img.path = self.path
        self.qemu_nbd = doubles.QemuNbd(self.journal)
        self.patch_name('nova_snapshot_ext.qemu_img.run', self.qemu_img.run)
        self.patch_name('nova_snapshot_ext.qemu_nbd.serving',
                        self.qemu_nbd.serving)
        self.patch_name('libvirt_qemu.qemuMonitorCommand',
                        self.qemu_img.monitor)
        # QEMU's memory is in the disk with it.
        self.domain.before['snapshotCreateXML'] = (
            lambda: self.qemu_img.snapshots.append('taken'))
        self.patch_name(
            'nova_snapshot_ext.internal_snapshot.new_name', lambda: MINE)
        self.records = domain_records.Records(self.state, fakes.UUID)
        self.flow = domain.DomainFlow()

    def add_disk(self, fmt: str, target: str = 'vdb',
                 directory: str | None = None, **options: str) -> str:
        path = self.new_file(
            os.path.join(directory or '', f'{target}.{fmt}'),
            base.qcow2_header())
        self.domain.disks += fakes.disk_xml(path, fmt, target, **options)
        return path

    def wish(self, **changes: typing.Any) -> requests.Request:
        quiesce = changes.pop('quiesce', requests.Quiesce.NEVER)
        return self.request(
            quiesce=quiesce, domain=requests.DomainSnapshot(**changes))


class TestObstacle(DomainTestCase):

    def obstacle(self, **changes: typing.Any) -> str:
        why = self.flow.obstacle(self.guest, (self.guest.root_disk(),),
                                 self.wish(**changes))
        self.assertEqual(
            [], self.journal.of('snapshot', 'define', 'suspend', 'destroy',
                                'qemu-img', 'fsFreeze'))
        return why or ''

    def test_running_paused_and_stopped_guests_are_served(self) -> None:
        self.assertEqual('', self.obstacle())
        self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED, 1]
        self.assertEqual('', self.obstacle())
        self.domain.off()
        self.assertEqual('', self.obstacle())

    def test_guest_that_could_not_go_back(self) -> None:
        self.domain.current_state = [libvirt.VIR_DOMAIN_SHUTDOWN, 0]
        self.assertIn('in transition', self.obstacle())
        self.domain.current_state = [libvirt.VIR_DOMAIN_RUNNING, 1]
        self.domain.persistent = False
        self.assertIn('transient', self.obstacle())

    def test_root_disk_must_hold_it(self) -> None:
        for disk in (fakes.disk_xml(self.path, 'raw'),
                     fakes.disk_xml(self.path, 'qcow2', kind='block'),
                     fakes.disk_xml('x', 'raw', kind='network'),
                     fakes.disk_xml(self.path, 'qcow2',
                                    inside='<shareable/>'),
                     fakes.disk_xml(self.path, 'qcow2',
                                    inside='<transient/>')):
            self.domain.disks = disk
            for memory in (True, False):
                self.assertIn('vda can not hold an internal snapshot',
                              self.obstacle(memory=memory))

    def test_memory_needs_all_that_can_be_written_to(self) -> None:
        for fmt, options in (('raw', {}), ('raw', {'kind': 'network'}),
                             ('raw', {'kind': 'block'}),
                             ('raw', {'device': 'floppy'}),
                             ('raw', {'device': 'lun', 'kind': 'block'}),
                             ('qcow2', {'inside': '<shareable/>'})):
            disks = self.domain.disks
            self.add_disk(fmt, **options)
            self.assertIn('vdb is not a qcow2 file', self.obstacle())
            self.assertIn('snapshot_memory=false', self.obstacle())
            self.assertEqual('', self.obstacle(memory=False))
            self.domain.disks = disks

    def test_what_can_not_be_written_to_is_no_matter(self) -> None:
        self.add_disk('raw', 'vdb', inside='<readonly/>')
        self.add_disk('raw', 'hda', device='cdrom')
        self.add_disk('raw', 'hdb', device='cdrom', kind='network')
        self.domain.disks += (
            '<disk type="file" device="floppy"><target dev="fda"/></disk>')
        self.assertEqual('', self.obstacle())

    def test_volume_in_a_file_is_none_of_novas_disks(self) -> None:
        self.add_disk('qcow2', directory=self.new_directory('volumes'))
        self.assertEqual('', self.obstacle())
        self.domain.rest = NOVA
        self.assertIn('vdb is not a qcow2 file', self.obstacle())
        self.assertEqual(['vda'], [disk.target for disk in
                                   domain_snapshot.held_disks(self.guest)])

    def test_state_that_would_not_go_back_with_the_memory(self) -> None:
        for devices, rest, said in (
                ('<tpm><backend type="emulator"/></tpm>', '', 'TPM'),
                ('<hostdev type="pci"/>', '', 'device of the host'),
                ('<hostdev type="mdev"/>', '', 'device of the host'),
                ('<filesystem/>', '', 'shared file system'),
                ('<graphics passwd="x"/>', '', 'password'),
                ('', '<os><loader type="pflash"/></os>', 'UEFI'),
                ('', '<os><nvram>x</nvram></os>', 'UEFI')):
            self.domain.devices, self.domain.rest = devices, rest
            self.assertIn(said, self.obstacle())
            self.assertEqual('', self.obstacle(memory=False))

    def test_job_is_in_the_way(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        self.domain.job_operation = (
            libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT)
        self.assertIn('migration', self.obstacle())
        self.domain.job = libvirt.VIR_DOMAIN_JOB_NONE
        self.domain.copies['vda'] = 'x'
        self.assertIn('block job', self.obstacle(memory=False))

    def test_memory_is_never_quiesced(self) -> None:
        self.assertIn('os_require_quiesce', self.obstacle(
            quiesce=requests.Quiesce.REQUIRED))
        self.assertIn('no guest agent', self.obstacle(
            quiesce=requests.Quiesce.REQUIRED, memory=False))

    def test_number_has_a_limit(self) -> None:
        self.records.add(test_domain_records.record(
            test_domain_records.ONE))
        self.assertEqual('', self.obstacle(most=2))
        self.assertIn('max_domain_snapshots = 1', self.obstacle(most=1))

    def test_bytes_have_a_limit(self) -> None:
        # 512 MiB of memory, beside a disk of 1 MiB that takes nothing
        self.assertEqual('', self.obstacle(most_gb=1))
        self.domain.kib = 2 * 1024 ** 2
        self.assertIn('max_domain_snapshots_gb = 1', self.obstacle(most_gb=1))
        self.assertEqual('', self.obstacle(most_gb=1, memory=False))
        self.assertEqual('', self.obstacle(most_gb=0))

    def test_memory_needs_room(self) -> None:
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: 512 * 1024 ** 2 - 1)
        self.assertIn('memory may take', self.obstacle())
        self.assertEqual('', self.obstacle(memory=False))


class TestFreeze(DomainTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.watch_flushes()
        self.log = self.new_log()
        self.journal.clear()

    @contextlib.contextmanager
    def frozen(self, **changes: typing.Any) -> typing.Iterator[frozen.Frozen]:
        with self.flow.freeze(self.guest, (self.guest.root_disk(),),
                              self.wish(**changes), self.log) as found:
            yield found

    def kept(self, **changes: typing.Any) -> domain_records.Record:
        with self.frozen(**changes) as found:
            pass
        found.keep('/images/one')
        [record] = self.records.all()
        self.assertEqual(0, self.log.pending)
        return record

    def test_memory_is_libvirts(self) -> None:
        with self.frozen() as found:
            self.assertEqual(
                ['flushed delete_domain_snapshot', 'flushed let_taking_end',
                 'snapshotCreateXML', f'forget {MINE}', 'serve snapshot'],
                self.journal.of('flushed d', 'flushed l', 'snapshot',
                                'forget', 'serve'))
            self.assertEqual({}, self.domain.snapshots)
            self.assertIs(frozen.Consistency.CRASH, found.consistency)
        self.assertEqual({'instance': fakes.UUID, 'rollback': 'memory'},
                         found.properties)

    def test_what_is_known_of_it(self) -> None:
        first = self.kept(image_id='i', title='t', extra={'a': 1})
        self.assertEqual(
            (MINE, fakes.UUID, 'i', 't', None, {'vda': self.path},
             {'vda': 1024 ** 2}, {'a': 1}),
            (first.name, first.uuid, first.image_id, first.title,
             first.parent, first.disks, first.capacities, first.extra))
        self.assertIn(f'<name>{MINE}</name>', first.domain_xml)
        self.assertIn('<domain id="1">', first.domain_xml)
        self.patch_name('nova_snapshot_ext.internal_snapshot.new_name',
                        lambda: test_domain_records.ONE)
        with self.frozen() as found:
            pass
        self.assertEqual('i', found.properties['parent'])
        found.keep('/images/two')
        two = self.records.find('/images/two')
        assert two is not None
        self.assertEqual(MINE, two.parent)
        self.assertEqual(two.name, self.records.current)

    def test_what_a_rollback_kept_is_no_images_parent(self) -> None:
        """No image was made of it."""
        self.records.add(test_domain_records.record(
            test_domain_records.ONE, image_id=''))
        with self.frozen() as found:
            pass
        self.assertNotIn('parent', found.properties)

    def test_it_goes_when_the_log_ends_unless_it_is_kept(self) -> None:
        with self.frozen(memory=False):
            self.assertEqual([MINE], self.qemu_img.snapshots)
        self.assertEqual([MINE], self.qemu_img.snapshots)
        self.assertEqual(1, self.log.pending)
        self.log.unwind()
        self.assertEqual([], self.qemu_img.snapshots)
        self.assertEqual([], self.records.all())

    def test_it_goes_at_once_when_what_is_done_with_it_fails(self) -> None:
        def fail() -> None:
            with self.frozen(memory=False):
                raise exception.TransferFailed('no')
        self.assertRaises(exception.TransferFailed, fail)
        self.assertEqual([], self.qemu_img.snapshots)
        self.assertEqual(0, self.log.pending)

    def test_it_goes_when_it_was_kept_and_nobody_could_say_so(self) -> None:
        with self.frozen(memory=False) as found:
            pass
        self.patch_name('nova_snapshot_ext.undo.Entry.drop',
                        lambda entry: None)
        found.keep('/images/one')
        self.log.unwind()
        self.assertEqual([], self.qemu_img.snapshots)
        self.assertEqual([], os.listdir(self.state))

    def test_disks_of_a_running_guest_are_held_by_qemu(self) -> None:
        record = self.kept(memory=False)
        self.assertIs(domain_records.Rollback.DISK, record.rollback)
        self.assertEqual(['take by monitor'], self.journal.of(
            'take', 'snapshotCreateXML', 'qemu-img'))

    def test_file_systems_are_frozen_for_disks_alone(self) -> None:
        self.domain.devices = (
            '<channel><target name="org.qemu.guest_agent.0" '
            'state="connected"/></channel>')
        for memory, steps, consistency in (
                (False, ['fsFreeze', 'take by monitor', 'fsThaw'],
                 frozen.Consistency.FILESYSTEM),
                (True, ['snapshotCreateXML'], frozen.Consistency.CRASH)):
            self.journal.clear()
            with self.frozen(memory=memory, quiesce=(
                    requests.Quiesce.IF_POSSIBLE)) as found:
                self.assertEqual(steps, self.journal.of(
                    'fs', 'take', 'snapshot'))
                self.assertIs(consistency, found.consistency)
            self.log._unwind(self.log._entries, quiet=False)

    def test_guest_that_is_off(self) -> None:
        self.domain.off()
        with self.frozen() as found:
            self.assertIs(frozen.Consistency.STOPPED, found.consistency)
            self.assertEqual('disk', found.properties['rollback'])
        self.assertEqual(['qemu-img snapshot -c'],
                         self.journal.of('qemu-img snapshot'))
        self.domain.managed_save = True
        with self.frozen() as found:
            self.assertIs(frozen.Consistency.CRASH, found.consistency)

    def test_disks_that_are_no_part_are_named_so(self) -> None:
        self.add_disk('qcow2', 'vdb')
        self.add_disk('raw', 'hda', device='cdrom')
        self.kept()
        said = domain_snapshot.description(
            self.guest, MINE, domain_snapshot.held_disks(self.guest))
        for target, how in (('vda', 'internal'), ('vdb', 'internal'),
                            ('hda', 'no')):
            self.assertIn(
                f'<disk name="{target}" snapshot="{how}" />', said)

    def test_libvirt_that_refuses_leaves_nothing(self) -> None:
        self.domain.errors['snapshotCreateXML'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_FAILED)
        with contextlib.ExitStack() as stack:
            self.assertRaises(exception.SnapshotError, stack.enter_context,
                              self.frozen())
        self.assertEqual(0, self.log.pending)


class TestUndo(DomainTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.around = undo.Surroundings(self.guest, self.host)
        self.orphaned = undo.Surroundings(
            self.guest, self.host, owner_died=True)
        self.now = 0.0
        self.patch_name('time.monotonic', lambda: self.now)
        self.patch_name('time.sleep', self.tick)
        self.patch_name('nova_snapshot_ext.processes.end',
                        lambda argument, what, program: None)
        self.waits: typing.Callable[[], object] = lambda: None

    def tick(self, seconds: float) -> None:
        self.now += 5.0
        self.waits()

    def test_snapshot_that_libvirt_takes_is_waited_for(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED

        def taken() -> None:
            self.domain.job = libvirt.VIR_DOMAIN_JOB_NONE
            self.domain.snapshots[MINE] = '<domainsnapshot/>'
        self.waits = taken
        domain_snapshot.let_taking_end(self.orphaned, name=MINE)
        self.assertEqual(5.0, self.now)

    def test_call_that_never_came_is_not_waited_for_without_end(
            self) -> None:
        domain_snapshot.let_taking_end(self.orphaned, name=MINE)
        self.assertEqual(40.0, self.now)

    def test_guest_that_stands_still_for_nothing_goes_on_at_once(
            self) -> None:
        # libvirtd died in the middle of it.
        for reason, waited in ((libvirt.VIR_DOMAIN_PAUSED_SAVE, 5.0),
                               (libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT, 5.0),
                               (libvirt.VIR_DOMAIN_PAUSED_USER, 40.0)):
            self.now = 0.0
            self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED, reason]
            domain_snapshot.let_taking_end(self.orphaned, name=MINE)
            self.assertEqual(waited, self.now)
        self.assertEqual(2, len(self.journal.of('resume')))

    def test_guest_that_is_paused_with_a_job_is_waited_for(self) -> None:
        self.domain.current_state = [
            libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_SAVE]
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        self.assertRaises(
            exception.UndoFailed, domain_snapshot.let_taking_end,
            self.orphaned, name=MINE)
        self.assertEqual([], self.journal.of('resume'))

    def test_call_without_end_is_tried_again_later(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        self.assertRaises(
            exception.UndoFailed, domain_snapshot.let_taking_end,
            self.orphaned, name=MINE)

    def test_guest_that_libvirt_left_paused_goes_on(self) -> None:
        for reason, steps in (
                (libvirt.VIR_DOMAIN_PAUSED_SAVE, ['resume']),
                (libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT, ['resume']),
                (libvirt.VIR_DOMAIN_PAUSED_USER, [])):
            self.journal.clear()
            self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED, reason]
            domain_snapshot.let_taking_end(self.around, name=MINE)
            self.assertEqual(steps, self.journal)

    def delete(self) -> None:
        domain_snapshot.delete_domain_snapshot(
            self.around, name=MINE, uuid=fakes.UUID, paths=[self.path],
            state_directory=self.state)

    def test_deletion_twice_does_no_harm(self) -> None:
        self.records.add(test_domain_records.record(MINE))
        self.domain.snapshots[MINE] = '<domainsnapshot/>'
        self.qemu_img.snapshots = [MINE]
        for _ in range(2):
            self.delete()
            self.assertEqual([], self.qemu_img.snapshots)
            self.assertEqual({}, self.domain.snapshots)
            self.assertEqual([], os.listdir(self.state))

    def test_record_stays_as_long_as_the_snapshot_does(self) -> None:
        self.records.add(test_domain_records.record(MINE))
        self.qemu_img.snapshots = [MINE]
        self.qemu_img.lies = True
        self.assertRaises(exception.UndoFailed, self.delete)
        self.assertEqual(1, len(self.records.all()))

    def test_snapshots_of_others_are_left_alone(self) -> None:
        for step in (
                lambda name: domain_snapshot.delete_domain_snapshot(
                    self.around, name=name, uuid=fakes.UUID,
                    paths=[self.path], state_directory=self.state),
                lambda name: domain_snapshot.forget_domain_snapshot(
                    self.around, name=name),
                lambda name: domain_snapshot.come_back(
                    self.around, target=MINE, safety=name, paths=[],
                    life=None, paused=False, current=None,
                    uuid=fakes.UUID, state_directory='/')):
            self.assertRaises(ValueError, step, 'theirs')

    def test_guest_that_is_gone_needs_nothing(self) -> None:
        self.domain.gone()
        self.delete()
        domain_snapshot.let_taking_end(self.around, name=MINE)


class TestDelete(DomainTestCase):

    def delete(self, **changes: typing.Any) -> None:
        record = test_domain_records.record(
            MINE, disks={'vda': self.path}, **changes)
        self.records.add(record)
        domain_snapshot.delete(
            self.guest, record, self.records, self.host)

    def test_it_goes_from_the_disks_and_from_the_records(self) -> None:
        for power in (lambda: None, self.domain.off):
            power()
            self.qemu_img.snapshots = [MINE, 'theirs']
            self.delete()
            self.assertEqual(['theirs'], self.qemu_img.snapshots)
            self.assertEqual([], os.listdir(self.state))

    def test_one_that_can_not_be_deleted_now_is_tried_again(self) -> None:
        self.qemu_img.snapshots = [MINE]
        self.qemu_img.fails.add('monitor')
        self.assertRaises(exception.UndoFailed, self.delete)
        self.assertEqual(1, len(self.records.all()))
        self.qemu_img.fails.clear()
        undo.finish_left_over(self.state, self.guest, self.host)
        self.assertEqual([], self.qemu_img.snapshots)
        self.assertEqual([], os.listdir(self.state))

    def test_disk_that_is_no_longer_the_guests_is_left_alone(self) -> None:
        self.qemu_img.snapshots = [MINE]
        self.domain.disks = fakes.disk_xml(
            self.new_file('other', base.qcow2_header()), 'qcow2')
        self.delete()
        self.assertEqual([MINE], self.qemu_img.snapshots)
        self.assertEqual([], self.records.all())

    def test_job_is_not_disturbed(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        self.assertRaisesRegex(
            exception.GuestBusy, 'Another job', self.delete)
        self.assertEqual(1, len(self.records.all()))

    def test_snapshot_in_flight_is_not_disturbed(self) -> None:
        self.new_log()
        self.assertRaises(exception.GuestBusy, self.delete)
