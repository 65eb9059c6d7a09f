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

"""External snapshots, whoever dies and when: nothing reads other data."""

import contextlib
import itertools
import json
import os
import types
import typing
from unittest import mock

import fixtures
import libvirt

from nova_snapshot_ext import disk
from nova_snapshot_ext import domain_records
from nova_snapshot_ext import domain_snapshot
from nova_snapshot_ext import exception
from nova_snapshot_ext import external_files
from nova_snapshot_ext import external_merge
from nova_snapshot_ext import external_rollback
from nova_snapshot_ext.flows import base as base_flow
from nova_snapshot_ext.flows import domain
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import rollback
from nova_snapshot_ext import undo
from tests.unit import base
from tests.unit import doubles
from tests.unit import fakes
from tests.unit import overlays
from tests.unit import test_domain

REST = "<os><type arch='x86_64' machine='pc-1'>hvm</type></os>"


class ExternalTestCase(base.TestCase):

    formats: tuple[str, ...] = ('qcow2', 'raw')

    def setUp(self) -> None:
        super().setUp()
        self.files = overlays.Files(self.journal)
        self.domain = self.overlaid = overlays.OverlayDomain(self.files)
        self.domain.rest = REST
        self.guest = fakes.guest_of(self.domain)
        self.disks = self.new_directory('disks')
        for target, fmt in zip(('vda', 'vdb'), self.formats):
            self.overlaid.add_disk(
                target, os.path.join(self.disks, target), fmt)
        self.numbers = iter(range(10 ** 6))
        self.patch_name(
            'nova_snapshot_ext.internal_snapshot.new_name',
            lambda: f'snapshot-ext-{next(self.numbers):032x}')
        self.now = 0.0
        self.patch_name('time.monotonic', self.tick)
        self.patch_name('time.sleep', lambda seconds: None)
        self.patch_name('nova_snapshot_ext.qemu_img.run', self.files.run)
        self.patch_name('libvirt_qemu.qemuMonitorCommand',
                        self.overlaid.monitor)
        self.qemu_nbd = doubles.QemuNbd(self.journal)
        self.patch_name('nova_snapshot_ext.qemu_nbd.serving',
                        self.qemu_nbd.serving)
        self.patch_name('nova_snapshot_ext.guard.Guard.watch',
                        lambda guard, log: None)
        self.patch_name('nova_snapshot_ext.guard.bring_back',
                        lambda *arguments: True)
        append, unlink, rename = undo.append, os.unlink, os.rename

        def appending(descriptor: int, path: str,
                      record: dict[str, typing.Any]) -> None:
            self.files.event('log')
            append(descriptor, path, record)

        def unlinking(path: str, **more: typing.Any) -> None:
            if os.path.dirname(path) == self.disks and os.path.exists(path):
                self.files.event(f'unlink {path}')
                opened, _ = self.files.opened()
                assert path not in opened, f'{path} is in use'
                self.files.content.pop(path, None)
            unlink(path, **more)
        self.patch_name('nova_snapshot_ext.undo.append', appending)

        def renaming(old: str, new: str) -> None:
            self.files.event('record')
            rename(old, new)
        self.patch_name('os.unlink', unlinking)
        # They are many, and on a disk that others have busy.
        self.patch_name('os.fsync', lambda descriptor: None)
        self.patch_name('os.rename', renaming)
        self.records = domain_records.Records(self.state, fakes.UUID)
        self.flow = domain.DomainFlow()
        #: what each snapshot held, by title
        self.held: dict[str, dict[str, overlays.Content]] = {}

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    def wish(self, **changes: typing.Any) -> requests.Request:
        return self.request(domain=requests.DomainSnapshot(
            **{'external': True} | changes))

    def take(self, title: str, memory: bool = False,
             keep: bool = True) -> None:
        """Take one after another write, which comes to another place."""
        if self.overlaid.is_up:
            self.overlaid.write(f'before {title}')
        self.held[title] = self.present = self.overlaid.reads()
        request = self.wish(title=title, memory=memory)
        log = undo.UndoLog.create(self.state, self.guest, self.host)
        with log, self.flow.freeze(
                self.guest, (self.guest.root_disk(),), request,
                log) as frozen:
            if self.overlaid.is_up:
                self.overlaid.write(f'while {title} is read')
            self.present = self.overlaid.reads()
            if keep:
                frozen.keep(title)
            self.consistency = frozen.consistency.value

    def record(self, title: str) -> domain_records.Record:
        found = self.records.find(title)
        assert found is not None, title
        return found

    def delete(self, title: str) -> None:
        domain_snapshot.delete(
            self.guest, self.record(title), self.records, self.host)

    def revert(self, title: str) -> rollback.Result:
        return rollback.revert(
            self.guest, self.record(title), self.records, self.host)

    def assert_right(self, *titles: str) -> None:
        """Those are there, hold what they held, and nothing else is left."""
        self.assertEqual(sorted(titles), sorted(
            record.title for record in self.records.all()))
        wanted = {path for path, _ in self.overlaid.made_of.values()}
        for record in self.records.all():
            assert record.files is not None
            self.assertEqual(self.held[record.title], {
                target: self.files.read(path)
                for target, path in record.disks.items()})
            wanted |= set(record.disks.values())
            if record.files.memory:
                wanted.add(record.files.memory)
        self.assertEqual(sorted(wanted), sorted(
            os.path.join(self.disks, name)
            for name in os.listdir(self.disks)))
        self.assertEqual(self.overlaid.made_of, self.overlaid.defined)
        self.assertFalse(self.overlaid.managed_save)
        self.assertEqual({}, self.overlaid.commits)
        current = self.records.current
        for target, (path, _) in self.overlaid.made_of.items():
            below = self.files.bases.get(path, ('', ''))[0]
            if current is not None:
                self.assertEqual(next(
                    record for record in self.records.all()
                    if record.name == current).disks[target], below)
        self.assertEqual([], [name for name in os.listdir(self.state)
                              if name.endswith(undo.SUFFIX)])

    def assert_clean(self) -> None:
        """As before there was any."""
        self.assert_right()
        self.assertEqual(
            {target: (os.path.join(self.disks, target), fmt)
             for target, fmt in zip(('vda', 'vdb'), self.formats)},
            self.overlaid.made_of)
        self.assertEqual([], os.listdir(self.state))


class TestObstacle(ExternalTestCase):

    def obstacle(self, **changes: typing.Any) -> str:
        return self.flow.obstacle(
            self.guest, (self.guest.root_disk(),),
            self.wish(**changes)) or ''

    def test_raw_and_qcow2_files_are_served(self) -> None:
        for memory in (True, False):
            self.assertEqual('', self.obstacle(memory=memory))
        self.domain.off()
        self.assertEqual('', self.obstacle())

    def test_novas_guest_is_served_by_force_only(self) -> None:
        self.domain.rest += test_domain.NOVA
        request = self.request(
            may_stop=False, domain=requests.DomainSnapshot(external=True))
        self.assertIn('hard reboot', self.flow.obstacle(
            self.guest, (self.guest.root_disk(),), request) or '')
        self.assertEqual('', self.obstacle())

    def test_disk_that_can_have_no_overlay(self) -> None:
        for fmt in ('vmdk', ''):
            self.overlaid.live['vda'] = (self.overlaid.live['vda'][0], fmt)
            self.assertIn('vda can have no overlay', self.obstacle())

    def test_disk_that_would_not_go_back_with_the_memory(self) -> None:
        self.domain.devices = fakes.disk_xml(
            '/dev/x', 'raw', 'vdc', kind='block')
        self.assertIn('vdc is not a file of its own', self.obstacle())
        self.assertIn('--no-memory', self.obstacle())
        self.assertEqual('', self.obstacle(memory=False))

    def test_saved_memory_would_write_below_the_overlay(self) -> None:
        self.domain.off()
        self.domain.managed_save = True
        self.assertIn('suspended', self.obstacle())

    def test_kinds_are_not_mixed(self) -> None:
        self.take('one')
        self.assertIn('external snapshots', self.obstacle(external=False))
        self.assertEqual('', self.obstacle(memory=False))
        self.records.forget()
        self.records.add(test_domain.test_domain_records.record(
            test_domain.MINE))
        self.assertIn('internal snapshots', self.obstacle())

    def test_volume_in_a_file_is_none_of_novas_disks(self) -> None:
        self.domain.rest += test_domain.NOVA
        volumes = self.new_directory('volumes')
        self.overlaid.add_disk('vdc', os.path.join(volumes, 'vdc'), 'raw')
        self.assertIn('vdc is not a file of its own', self.obstacle())
        self.take('one')
        self.assertEqual({'vda', 'vdb'}, set(self.record('one').disks))
        self.assertEqual(os.path.join(volumes, 'vdc'),
                         self.overlaid.live['vdc'][0])
        self.assertEqual(['vdc'], os.listdir(volumes))

    def test_limits(self) -> None:
        self.take('one')
        self.assertIn('max_domain_snapshots = 1', self.obstacle(most=1))
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: 1)
        self.assertIn('its memory may take', self.obstacle())
        self.patch_name(
            'nova_snapshot_ext.domain_obstacles._taken_bytes',
            lambda held, records: 2 * 1024 ** 3)
        self.assertIn('max_domain_snapshots_gb = 1', self.obstacle(
            memory=False, most_gb=1))

    def test_definition_that_says_more_than_headers(self) -> None:
        top, below = self.overlaid.live['vda'][0], os.path.join(
            self.disks, 'below')
        self.files.make(below, 'raw')
        store = self.overlaid._store
        for said in (f'<backingStore type="file"><format type="raw"/>'
                     f'<source file="{below}"/><backingStore/>'
                     f'</backingStore>', '<backingStore/>'):
            self.overlaid._store = (  # type: ignore[method-assign]
                lambda path: said if path == top else store(path))
            self.assertEqual(below in said,
                             'backingStore' in self.obstacle())
            self.files.bases[top] = (below, 'raw')
            self.assertEqual(below not in said,
                             'backingStore' in self.obstacle())
            del self.files.bases[top]

    def test_part_of_a_file(self) -> None:
        words = self.overlaid.XMLDesc
        self.domain.XMLDesc = (  # type: ignore[method-assign]
            lambda flags: words(flags).replace(
                'vdb" />', 'vdb"><slices><slice type="storage" offset="512" '
                'size="512"/></slices></source>'))
        self.assertIn('vdb is a part (slice)', self.obstacle())

    def test_disk_of_another_user(self) -> None:
        """Nobody gives it the overlay where libvirt does not."""
        self.take('one')
        self.journal.clear()
        path = self.overlaid.live['vda'][0]
        self.patch_name('os.geteuid', lambda: os.getuid() + 1000)
        self.assertIn('can not give an overlay', self.obstacle())
        error = self.assertRaises(
            exception.RollbackRefused, self.revert, 'one')
        self.assertIn(f'whom {path} belongs to', str(error))
        self.assertEqual([], self.journal.of(
            'qemu-img c', 'destroy', 'managedSave', 'define'))

    def test_directory_that_is_not_ours(self) -> None:
        self.patch_name('os.access', lambda path, mode: not mode & os.W_OK)
        self.assertIn('can not make an overlay', self.obstacle())


class TestTake(ExternalTestCase):

    def test_overlay_belongs_to_whom_the_disk_does(self) -> None:
        """libvirt may be told not to see to that (dynamic_ownership)."""
        real = os.stat
        theirs = {self.overlaid.live['vdb'][0]}

        def stat(path: typing.Any, **more: typing.Any) -> typing.Any:
            found = real(path, **more)
            if path not in theirs:
                return found
            return types.SimpleNamespace(
                st_mode=found.st_mode, st_blocks=found.st_blocks,
                st_uid=64055, st_gid=108)
        self.patch_name('os.stat', stat)
        self.patch_name('os.geteuid', lambda: 0)
        for disk_mode, mode in ((0o600, 0o600), (0o644, 0o640),
                                (0o660, 0o660), (0o666, 0o666)):
            for path, _ in self.overlaid.live.values():
                os.chmod(path, disk_mode)
            self.journal.clear()
            self.take('one')
            made = {target: path for target, (path, _)
                    in self.overlaid.live.items()}
            self.assertEqual([f'chown {made["vdb"]} 64055 108'],
                             self.journal.of('chown'))
            theirs.add(made['vdb'])
            self.journal.clear()
            self.revert('one')
            self.assertEqual(
                [f'chown {self.overlaid.live["vdb"][0]} 64055 108'],
                self.journal.of('chown'))
            for path, _ in self.overlaid.live.values():
                self.assertEqual(mode, real(path).st_mode & 0o777)
            self.delete('one')

    def test_guest_writes_to_overlays_and_below_is_read(self) -> None:
        for memory in (False, True):
            self.take(f'memory={memory}', memory)
        self.assert_right('memory=False', 'memory=True')
        first, second = (self.record(f'memory={memory}')
                         for memory in (False, True))
        self.assertEqual(first.name, second.parent)
        self.assertIs(domain_records.Rollback.DISK, first.rollback)
        self.assertIs(domain_records.Rollback.MEMORY, second.rollback)
        self.assertEqual(
            second.disks['vda'],
            self.qemu_nbd.options['file']['filename'])
        self.assertNotIn('force-share', self.qemu_nbd.options)
        # Formats are libvirt's.
        assert first.files is not None
        self.assertEqual({'vda': 'qcow2', 'vdb': 'raw'}, first.files.formats)
        self.assertEqual('raw', self.files.bases[second.disks['vdb']][1])

    def test_guest_that_is_off(self) -> None:
        self.domain.off()
        self.take('off')
        self.assertEqual('stopped', self.consistency)
        self.assert_right('off')
        self.domain.createWithFlags(0)
        self.overlaid.write('later')
        self.assert_right('off')

    def test_image_that_fails_leaves_nothing(self) -> None:
        for memory, power in ((True, lambda: None), (False, lambda: None),
                              (False, self.domain.off)):
            power()
            self.take('gone', memory, keep=False)
            self.assert_clean()
            self.assertEqual(self.present, self.overlaid.reads())

    def test_undo_is_written_before(self) -> None:
        self.watch_flushes()
        self.journal.clear()
        self.take('one')
        steps = self.journal.of('flushed', 'qemu-img', 'snapshotCreateXML')
        self.assertEqual(
            ['flushed merge_external_snapshot', 'qemu-img create',
             'qemu-img create', 'flushed let_overlays_be_taken',
             'snapshotCreateXML'],
            [step for step in steps if 'directory' not in step])

    def test_snapshot_that_libvirt_refuses(self) -> None:
        self.domain.errors['snapshotCreateXML'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_FAILED)
        self.assertRaises(exception.SnapshotError, self.take, 'one')
        self.assert_clean()

    def test_guest_that_libvirt_left_paused_goes_on(self) -> None:
        def die() -> None:
            self.domain.current_state = [
                libvirt.VIR_DOMAIN_PAUSED,
                libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT]
            raise fakes.libvirt_error(libvirt.VIR_ERR_INTERNAL_ERROR,
                                      domain=libvirt.VIR_FROM_RPC)
        self.domain.before['snapshotCreateXML'] = die
        self.assertRaises(exception.SnapshotError, self.take, 'one', True)
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING,
                         self.domain.current_state[0])
        self.assert_clean()


class TestDelete(ExternalTestCase):

    def branch(self) -> None:
        """one - two - three, and four from one; the guest is at four."""
        self.take('one', memory=True)
        self.take('two')
        self.take('three')
        self.revert('one')
        self.take('four')
        self.present = self.overlaid.reads()
        self.assert_right('one', 'two', 'three', 'four')

    def assert_present(self) -> None:
        self.assertEqual(self.present, self.overlaid.reads())

    def test_last_one_is_merged_into_the_disk(self) -> None:
        for power in (lambda: None, self.guest.suspend, self.domain.off):
            self.take('one')
            power()
            self.delete('one')
            self.assert_present()
            self.assert_clean()
            self.domain.current_state = [libvirt.VIR_DOMAIN_RUNNING, 1]
            self.overlaid.live = dict(self.overlaid.defined)

    def test_any_of_a_chain(self) -> None:
        for power in (lambda: None, self.domain.off):
            for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)):
                titles = ['one', 'two', 'three']
                for title in titles:
                    self.take(title)
                power()
                for index in order:
                    gone = ['one', 'two', 'three'][index]
                    titles.remove(gone)
                    self.delete(gone)
                    self.assert_present()
                    self.assert_right(*titles)
                self.assert_clean()
                self.domain.current_state = [libvirt.VIR_DOMAIN_RUNNING, 1]
                self.overlaid.live = dict(self.overlaid.defined)

    def test_branch_that_the_guest_is_not_in(self) -> None:
        for power in (lambda: None, self.domain.off):
            self.branch()
            power()
            self.delete('two')
            self.assert_right('one', 'three', 'four')
            self.assertEqual(self.record('one').name,
                             self.record('three').parent)
            self.delete('three')
            self.assert_right('one', 'four')
            self.delete('one')
            self.assert_right('four')
            self.delete('four')
            self.assert_present()
            self.assert_clean()
            self.domain.current_state = [libvirt.VIR_DOMAIN_RUNNING, 1]
            self.overlaid.live = dict(self.overlaid.defined)

    def test_others_that_rest_on_the_child_are_put_on_its_new_file(
            self) -> None:
        """one - two - (three, four, the present): one is deleted."""
        for power in (lambda: None, self.domain.off):
            for title in ('one', 'two', 'three'):
                self.take(title)
            self.revert('two')
            self.take('four')
            self.revert('two')
            self.present = self.overlaid.reads()
            power()
            self.delete('one')
            self.assert_present()
            self.assert_right('two', 'three', 'four')
            for title in ('three', 'four', 'two'):
                self.delete(title)
            self.assert_clean()
            self.domain.current_state = [libvirt.VIR_DOMAIN_RUNNING, 1]
            self.overlaid.live = dict(self.overlaid.defined)

    def refused(self, title: str,
                error: type[Exception] = exception.DeletionRefused) -> str:
        before = (dict(self.files.content), self.records.all())
        self.journal.clear()
        found = str(self.assertRaises(error, self.delete, title))
        self.assertEqual([], self.journal.of('blockCommit', 'qemu-img c',
                                             'unlink', 'define'))
        self.assertEqual(
            before, (dict(self.files.content), self.records.all()))
        return found

    def test_one_that_two_descend_from_is_refused(self) -> None:
        self.branch()
        self.assertIn('two, four; all but one', self.refused('one'))
        self.delete('four')
        self.assertIn('two, its present one', self.refused('one'))

    def test_disk_that_somebody_changed(self) -> None:
        self.take('one')
        path = os.path.join(self.disks, 'other')
        self.files.make(path, 'qcow2')
        self.overlaid.live['vda'] = self.overlaid.defined['vda'] = (
            path, 'qcow2')
        self.assertIn('changed by somebody else', self.refused('one'))

    def test_disk_that_was_attached_later_rests_on_it(self) -> None:
        self.take('one')
        self.overlaid.add_disk('vdc', os.path.join(self.disks, 'vdc'), 'raw')
        self.take('two')
        self.revert('one')
        self.assertIn('vdc', self.refused('two'))

    def test_titles_need_not_be_unique(self) -> None:
        self.take('one')
        self.overlaid.add_disk('vdc', os.path.join(self.disks, 'vdc'), 'raw')
        self.take('two')
        self.revert('one')
        self.take('same')
        # That is based on a file of two no more, and is of the same title.
        del self.overlaid.live['vdc'], self.overlaid.defined['vdc']
        self.take('same')
        self.assertIn('vdc of instance-00000001 in same', self.refused('two'))

    def test_disk_that_was_detached_rests_on_it(self) -> None:
        """No record tells of that, and no domain has it."""
        self.take('one')
        self.overlaid.add_disk('vdc', os.path.join(self.disks, 'vdc'), 'raw')
        for title in ('two', 'three'):
            self.take(title)
        detached = self.overlaid.live.pop('vdc')[0]
        del self.overlaid.defined['vdc']
        self.revert('one')
        self.assertIn(f'{detached} is based on', self.refused('three'))
        os.remove(detached)
        for title in ('three', 'two'):
            self.delete(title)
        self.assertTrue(os.path.exists(os.path.join(self.disks, 'vdc')))

    def test_overlay_of_somebody_else_above_the_child(self) -> None:
        """It would be put on what it was never based on."""
        for title in ('one', 'two'):
            self.take(title)
        mine = self.overlaid.live['vda'][0]
        for name in ('other', f'{test_domain.MINE}.vda'):
            path = os.path.join(self.disks, name)
            self.files.make(path, 'qcow2')
            self.files.bases[path] = (mine, 'qcow2')
            self.overlaid.live['vda'] = self.overlaid.defined['vda'] = (
                path, 'qcow2')
            self.assertIn('changed by somebody else', self.refused('one'))
            self.overlaid.live['vda'] = self.overlaid.defined['vda'] = (
                mine, 'qcow2')
            os.remove(path)
        self.delete('one')
        self.assert_right('two')

    def test_job_that_does_not_end(self) -> None:
        self.take('one')
        self.patch_name('nova_snapshot_ext.external_merge._COMMIT_TIMEOUT_S',
                        5)
        self.domain.blockJobInfo = (  # type: ignore[method-assign]
            lambda target, flags: {'type': 3})
        self.overlaid._mirror = (  # type: ignore[method-assign]
            lambda target: '')
        around = undo.Surroundings(self.guest, self.host)
        record = self.record('one')
        self.assertRaisesRegex(
            exception.UndoFailed, 'does not end',
            external_merge.merge_external_snapshot, around,
            name=record.name, uuid=fakes.UUID, state_directory=self.state,
            child=None, merges=[{
                'target': 'vda', 'top': self.overlaid.live['vda'][0],
                'base': record.disks['vda'], 'format': 'qcow2',
                'above': []}], files=[])

    def test_job_saved_memory_and_no_room(self) -> None:
        self.take('one')
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        self.assertIn('Another job', self.refused(
            'one', exception.GuestBusy))
        self.domain.job = libvirt.VIR_DOMAIN_JOB_NONE
        self.domain.managedSave(0)
        self.assertIn('is saved', self.refused('one'))
        self.domain.createWithFlags(0)
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: -1)
        self.assertIn('more in', self.refused('one'))

    def test_commit_that_ends_early_is_tried_again(self) -> None:
        self.take('one')
        real = self.overlaid.blockCommit
        self.domain.blockCommit = (  # type: ignore[method-assign]
            lambda *arguments: None)
        self.assertRaisesRegex(
            exception.UndoFailed, 'ended early', self.delete, 'one')
        self.assertEqual(1, len(self.records.all()))
        self.domain.blockCommit = real  # type: ignore[method-assign]
        undo.finish_left_over(self.state, self.guest, self.host)
        self.assert_present()
        self.assert_clean()

    def die_in_pivot(self, done: bool) -> None:
        """libvirtd dies in the pivot of vda.

        :param done: QEMU has done it, and libvirt does not know
        """
        pivot = self.overlaid.blockJobAbort

        def die(target: str, flags: int) -> None:
            self.overlaid.blockJobAbort = pivot  # type: ignore
            before = dict(self.overlaid.live)
            if done:
                pivot(target, flags)
                self.overlaid.stale = before
                # What the overlay has gets old.
                self.overlaid.write('later')
                self.present = self.overlaid.reads()
            raise fakes.libvirt_error(libvirt.VIR_ERR_INTERNAL_ERROR,
                                      domain=libvirt.VIR_FROM_RPC)
        self.overlaid.blockJobAbort = die  # type: ignore[method-assign]

    def test_pivot_that_libvirt_does_not_know(self) -> None:
        self.take('one')
        self.die_in_pivot(True)
        self.delete('one')
        self.assertIn('does not know it', self.output.output)
        self.assert_present()
        # Saved and started again, it would be made of the wrong file.
        self.assertIn('shut the guest down', base_flow.why_block_job(
            self.guest, self.guest.disks()) or '')
        self.overlaid.stale = None
        self.assertIsNone(base_flow.why_block_job(
            self.guest, self.guest.disks()))
        self.assert_clean()

    def die_both_in_pivot(self, done: bool) -> tuple[str, str]:
        """libvirtd and whoever deletes die in the pivot of vda, and the guest
        runs on until it is shut down.

        :returns: the upper and the lower file of vda
        """
        self.take('one')
        pivot = self.overlaid.blockJobAbort

        def die(target: str, flags: int) -> None:
            self.overlaid.blockJobAbort = pivot  # type: ignore
            defined = dict(self.overlaid.defined)
            if done:
                pivot(target, flags)
                self.overlaid.defined = defined
            self.files.dead = True
            raise overlays.Killed
        self.overlaid.blockJobAbort = die  # type: ignore[method-assign]
        files = (self.overlaid.live['vda'][0],
                 self.record('one').disks['vda'])
        with contextlib.suppress(overlays.Killed):
            self.delete('one')
        self.files.dead = False
        self.overlaid.write('later')
        self.present = self.overlaid.reads()
        self.overlaid.commits.clear()
        self.domain.off()
        return files

    def test_guest_is_never_started_from_what_may_be_old(self) -> None:
        """Before anybody has seen what QEMU has done."""
        for done, up in itertools.product((True, False), repeat=2):
            upper, lower = self.die_both_in_pivot(done)
            self.assertRaisesRegex(
                libvirt.libvirtError, r'\.pivoting',
                self.domain.createWithFlags, 0)
            self.assertRaisesRegex(
                exception.UndoFailed, 'nobody knows', self.finish)
            # Who does know has the definition say so.
            self.guest.define_disks({'vda': disk.Layer(
                *((lower, 'qcow2') if done else (upper, 'qcow2')))})
            if up:
                self.domain.createWithFlags(0)
            self.assert_present()
            self.finish()
            self.assert_present()
            self.assert_clean()
            self.domain.current_state = [libvirt.VIR_DOMAIN_RUNNING, 1]
            self.overlaid.live = dict(self.overlaid.defined)

    def finish(self) -> None:
        undo.finish_left_over(self.state, self.guest, self.host)

    def test_nothing_is_between_the_note_and_the_pivot(self) -> None:
        """Its definition names the upper layer, or what is not there."""
        self.take('one')
        upper = self.overlaid.live['vda'][0]
        seen: list[tuple[str, bool]] = []

        def look(*words: object) -> None:
            seen.append((self.overlaid.defined['vda'][0],
                         os.path.exists(f'{upper}.pivoting')))
        for name in ('define', 'pivot'):
            self.domain.before[name] = look
        self.delete('one')
        self.assertEqual(
            [(upper, True), (f'{upper}.pivoting.unknown', True),
             (f'{upper}.pivoting.unknown', True)], seen[:3])
        self.assertFalse(os.path.exists(f'{upper}.pivoting.unknown'))
        self.assert_clean()

    def test_pivot_that_is_refused_is_called_off(self) -> None:
        self.take('one')
        upper = self.overlaid.live['vda'][0]
        self.domain.errors['pivot'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_FAILED)
        self.assertRaises(exception.UndoFailed, self.delete, 'one')
        self.assertEqual(upper, self.overlaid.defined['vda'][0])
        self.assertFalse(os.path.exists(f'{upper}.pivoting'))
        self.domain.errors.clear()
        self.finish()
        self.assert_present()
        self.assert_clean()

    def shut_down_at_pivot(self) -> None:
        """libvirt takes the call when the guest is off by then."""
        def stop() -> None:
            del self.domain.before['pivot']
            self.domain.off()
            self.overlaid.commits.clear()
            raise fakes.libvirt_error(libvirt.VIR_ERR_OPERATION_INVALID)
        self.domain.before['pivot'] = stop

    def test_guest_that_is_shut_down_before_a_pivot(self) -> None:
        """QEMU was not asked: what is newer is known."""
        self.take('one')
        self.shut_down_at_pivot()
        self.delete('one')
        self.assertEqual(2, len(self.journal.of('qemu-img commit')))
        self.assert_present()
        self.assert_clean()
        self.domain.createWithFlags(0)

    def test_guest_that_is_shut_down_before_a_second_pivot(self) -> None:
        """What became of the first one nobody knows."""
        self.take('one')
        upper = self.overlaid.live['vda'][0]
        with open(f'{upper}.pivoting', 'w') as note:
            note.write('vda was about to be written to …')
        self.patch_name(
            'nova_snapshot_ext.external_merge._call_off',
            lambda guest, merge: None)
        self.shut_down_at_pivot()
        self.assertRaisesRegex(
            exception.UndoFailed, 'nobody knows', self.delete, 'one')
        self.assertEqual(f'{upper}.pivoting.unknown',
                         self.overlaid.defined['vda'][0])
        self.assertEqual([], self.journal.of('qemu-img commit'))

    def test_note_of_the_first_version_says_nothing(self) -> None:
        """It let the definition name the upper layer; what QEMU has done
        nobody knows."""
        upper, lower = self.die_both_in_pivot(True)
        with open(f'{upper}.pivoting', 'w'):
            pass
        self.overlaid.defined['vda'] = (upper, 'qcow2')
        before = dict(self.files.content[lower])
        self.assertRaisesRegex(
            exception.UndoFailed, r'delete .*\.pivoting', self.finish)
        self.assertEqual(before, self.files.content[lower])
        # Who knows says so.
        self.overlaid.defined['vda'] = (lower, 'qcow2')
        os.unlink(f'{upper}.pivoting')
        self.finish()
        self.assert_present()
        self.assert_clean()

    def test_what_the_definition_names_by_somebodys_will_stays(self) -> None:
        """From its next start on."""
        self.take('one')
        other = (os.path.join(self.disks, 'other'), 'qcow2')
        self.files.make(*other)
        self.overlaid.defined['vda'] = other
        self.domain.before['pivot'] = lambda: self.assertEqual(
            other, self.overlaid.defined['vda'])
        self.delete('one')
        self.assertEqual(other, self.overlaid.defined['vda'])
        self.assertEqual(os.path.join(self.disks, 'vda'),
                         self.overlaid.live['vda'][0])

    def test_note_is_not_written_through_a_link(self) -> None:
        self.take('one')
        upper = self.overlaid.live['vda'][0]
        precious = self.new_file('precious', b'precious')
        for name in ('.pivoting', '.pivoting.new'):
            os.symlink(precious, upper + name)
        self.patch_name(
            'nova_snapshot_ext.external_merge._is_done_by_qemu',
            lambda guest, merge: False)
        self.patch_name(
            'nova_snapshot_ext.external_merge._call_off',
            lambda guest, merge: None)
        self.delete('one')
        with open(precious, 'rb') as file:
            self.assertEqual(b'precious', file.read())
        self.assert_present()
        self.assert_clean()

    def test_copy_that_was_ended_is_in_nobodys_way(self) -> None:
        """libvirt still shows it; the guest writes to what it says."""
        self.overlaid._mirror = (  # type: ignore[method-assign]
            lambda target: '<mirror type="file" job="copy"/>')
        self.assertIsNone(base_flow.why_block_job(
            self.guest, self.guest.disks()))

    def test_guest_whose_definition_is_gone_gets_none(self) -> None:
        self.take('one')
        self.domain.persistent = False
        self.overlaid.defined = self.overlaid.live
        self.delete('one')
        self.assertEqual([], self.journal.of('define'))
        self.assert_present()

    def test_names_of_qemu_with_options(self) -> None:
        """So it calls what is opened otherwise than its header says."""
        name = json.dumps({
            'driver': 'qcow2', 'backing': {'driver': 'raw', 'file': {
                'driver': 'file', 'filename': '/base'}},
            'file': {'driver': 'file', 'filename': '/top'}})
        answer = json.dumps({'return': [{'inserted': {'image': {
            'filename': f'json:{name}',
            'backing-image': {'filename': '/base'}}}}, {}]})
        self.patch_name('libvirt_qemu.qemuMonitorCommand',
                        lambda *arguments: answer)
        self.assertEqual([['/top', '/base'], []], self.guest.open_chains())

    def test_pivot_that_did_not_begin(self) -> None:
        self.take('one')
        self.die_in_pivot(False)
        self.delete('one')
        self.assert_present()
        self.assert_clean()

    def test_guest_that_is_off_before_a_pivot_is_known(self) -> None:
        """What is newer nobody knows; nothing is overwritten."""
        self.take('one')
        self.die_in_pivot(True)
        self.patch_name(
            'nova_snapshot_ext.external_merge._is_done_by_qemu',
            lambda guest, merge: self.domain.off())
        self.journal.clear()
        self.assertRaisesRegex(
            exception.UndoFailed, 'nobody knows', self.delete, 'one')
        self.assertEqual([], self.journal.of('qemu-img', 'unlink'))
        self.overlaid.stale = None

    def test_only_overlays_of_ours_are_merged(self) -> None:
        self.take('one')
        good = {'target': 'vdb', 'top': self.overlaid.live['vdb'][0],
                'base': self.record('one').disks['vdb'], 'format': 'raw',
                'above': []}
        os.symlink('/etc/passwd', link := os.path.join(
            self.disks, f'{test_domain.MINE}.vdb'))
        for wrong in ({'top': '/etc/passwd'}, {'top': link},
                      {'base': '/etc/passwd'}, {'base': link},
                      {'above': ['/etc/passwd']}, {'above': [link]}):
            self.assertRaises(
                ValueError, external_merge.merge_external_snapshot,
                undo.Surroundings(self.guest, self.host),
                name=self.record('one').name, uuid=fakes.UUID,
                state_directory=self.state, child=None,
                merges=[good | wrong], files=[])
        self.assertEqual([], self.journal.of('blockCommit', 'qemu-img com',
                                             'qemu-img reb'))

    def test_overlay_of_a_disk_that_is_detached_is_not_deleted(self) -> None:
        self.take('one')
        top = self.overlaid.live['vdb'][0]
        del self.overlaid.live['vdb'], self.overlaid.defined['vdb']
        before = sorted(os.listdir(self.disks))
        self.assertRaises(exception.UndoFailed,
                          external_merge.merge_external_snapshot,
                          undo.Surroundings(self.guest, self.host),
                          name=self.record('one').name, uuid=fakes.UUID,
                          state_directory=self.state, child=None,
                          merges=[{'target': 'vdb', 'top': top,
                                   'base': self.record('one').disks['vdb'],
                                   'format': 'raw', 'above': []}],
                          files=before)
        self.assertEqual(before, sorted(os.listdir(self.disks)))

    def test_definition_that_libvirt_did_not_change_is_changed(self) -> None:
        self.take('one')
        pivot = self.overlaid.blockJobAbort

        def pivoting(target: str, flags: int) -> None:
            before = dict(self.overlaid.defined)
            pivot(target, flags)
            self.overlaid.defined = before
        self.domain.blockJobAbort = pivoting  # type: ignore[method-assign]
        self.delete('one')
        self.assert_clean()

    def test_only_files_of_snapshots_are_deleted(self) -> None:
        path = os.path.join(self.disks, 'vda')
        self.assertRaises(exception.NotOurs, external_files.delete, path)
        self.take('one')

    def test_overlay_that_libvirt_did_not_know_is_kept_for_good(self) -> None:
        """QEMU writes there, and libvirtd died before it wrote that down."""
        self.take('one')
        path = self.overlaid.live['vda'][0]
        self.assertRaises(
            exception.UndoFailed, external_files.delete, path)
        self.domain.off()
        self.assertRaisesRegex(
            exception.UndoFailed, 'was in use', external_files.delete, path)
        self.assertTrue(os.path.exists(path))
        os.remove(path + external_files.KEPT)
        external_files.delete(path)
        self.assertFalse(os.path.exists(path))

    def test_overlay_that_can_not_be_looked_at_is_not_kept_for_good(
            self) -> None:
        self.take('one')
        path = self.overlaid.live['vda'][0]
        with mock.patch('os.access', autospec=True,
                        return_value=False):
            self.assertRaisesRegex(
                exception.UndoFailed, 'can not see', external_files.delete,
                path)
        self.assertFalse(os.path.exists(path + external_files.KEPT))

    def test_what_the_guest_is_made_of_is_never_deleted(self) -> None:
        for title in ('one', 'two'):
            self.take(title)
        self.domain.off()
        record = self.record('two')
        for path in (self.overlaid.defined['vda'][0], record.disks['vda']):
            self.assertRaisesRegex(
                exception.UndoFailed, 'is made of it',
                external_merge.merge_external_snapshot,
                undo.Surroundings(self.guest, self.host), name=record.name,
                uuid=fakes.UUID, state_directory=self.state, child=None,
                merges=[], files=[path])
        self.assert_right('one', 'two')

    def test_guest_that_is_gone_needs_nothing(self) -> None:
        self.take('one')
        before = sorted(os.listdir(self.disks))
        self.domain.gone()
        external_merge.merge_external_snapshot(
            undo.Surroundings(self.guest, self.host),
            name=self.record('one').name, uuid=fakes.UUID,
            state_directory=self.state, child=None, merges=[], files=before)
        self.assertEqual(before, sorted(os.listdir(self.disks)))


class TestRevert(ExternalTestCase):

    def test_disks_alone(self) -> None:
        for power, up in ((lambda: None, True), (self.domain.off, False)):
            for title in ('one', 'two'):
                self.take(title)
            power()
            for title in ('one', 'two', 'one'):
                self.revert(title)
                self.assertEqual(self.held[title], self.overlaid.reads())
                self.assertEqual(up, self.overlaid.is_up)
                self.assert_right('one', 'two')
            for title in ('two', 'one'):
                self.delete(title)
            self.domain.current_state = [libvirt.VIR_DOMAIN_RUNNING, 1]
            self.overlaid.live = dict(self.overlaid.defined)

    def test_with_memory(self) -> None:
        self.take('one', memory=True)
        self.guest.suspend()
        self.take('two', memory=True)
        self.guest.resume()
        for power in (lambda: None, self.domain.off):
            for title, state in (('one', libvirt.VIR_DOMAIN_RUNNING),
                                 ('two', libvirt.VIR_DOMAIN_PAUSED)):
                power()
                self.revert(title)
                self.assertEqual(self.held[title], self.overlaid.reads())
                self.assertEqual(state, self.domain.current_state[0])
                self.assert_right('one', 'two')

    def test_guest_runs_on_with_its_memory_if_it_can_not(self) -> None:
        self.take('one', memory=True)
        self.overlaid.spoilt = True
        self.assertRaises(exception.SnapshotError, self.revert, 'one')
        self.assertTrue(self.overlaid.is_up)
        self.assertEqual(self.present, self.overlaid.reads())
        self.assert_right('one')
        self.assertEqual(
            ['managedSave', 'restore', 'createWithFlags'],
            self.journal.of('managedSave', 'restore', 'create'))

    def test_guest_that_somebody_else_started_stays_what_it_was(
            self) -> None:
        """libvirtd died in the restore, and it was started meanwhile."""
        self.take('one', memory=True)

        def die(path: str, xml: str, flags: int = 0) -> None:
            self.overlaid.createWithFlags(0)
            raise fakes.libvirt_error(libvirt.VIR_ERR_INTERNAL_ERROR,
                                      domain=libvirt.VIR_FROM_RPC)
        self.overlaid.connection.restoreFlags = (  # type: ignore
            die)
        self.assertRaises(exception.SnapshotError, self.revert, 'one')
        self.assertEqual(self.present, self.overlaid.reads())
        self.assert_right('one')

    def test_paused_guest_is_paused_again(self) -> None:
        self.take('one')
        self.guest.suspend()
        self.revert('one')
        self.assertEqual(libvirt.VIR_DOMAIN_PAUSED,
                         self.domain.current_state[0])

    def obstacle(self, title: str) -> str:
        self.journal.clear()
        error = self.assertRaises(
            exception.RollbackRefused, self.revert, title)
        self.assertEqual([], self.journal.of(
            'qemu-img', 'managedSave', 'destroy', 'define'))
        return str(error)

    def test_what_is_refused(self) -> None:
        self.take('one', memory=True)
        memory = self.record('one').files
        assert memory is not None
        self.domain.managed_save = True
        self.assertIn('suspended', self.obstacle('one'))
        self.domain.managed_save = False
        self.domain.rest = REST + '<memory>1</memory>'
        self.assertIn('memory were', self.obstacle('one'))
        self.domain.rest = REST
        self.overlaid.add_disk('vdc', os.path.join(self.disks, 'vdc'), 'raw')
        self.assertIn('vdc was attached since', self.obstacle('one'))
        del self.overlaid.live['vdc'], self.overlaid.defined['vdc']
        os.unlink(memory.memory)
        self.assertIn('is gone', self.obstacle('one'))
        self.overlaid.live['vda'] = (os.path.join(self.disks, 'vda'), 'qcow2')
        self.assertIn('somebody else changed', self.obstacle('one'))

    def test_file_system_that_is_not_mounted_is_not_given_up(self) -> None:
        """The host was booted in the middle of it."""
        self.take('one')
        now = {target: path for target, (path, _)
               in self.overlaid.live.items()}
        self.domain.off()
        self.assertRaisesRegex(
            exception.UndoFailed, 'mounted',
            external_rollback.come_back_to_overlays,
            undo.Surroundings(self.guest, self.host, rebooted=True,
                              owner_died=True),
            target=self.record('one').name,
            now=now | {'vdb': '/nonexistent/vdb'},
            new={target: f'{path}.new' for target, path in now.items()},
            life='1', paused=False, current=self.record('one').name,
            uuid=fakes.UUID, state_directory=self.state)
        self.assertTrue(all(map(os.path.exists, now.values())))

    def test_two_undos_do_not_contradict_each_other(self) -> None:
        """The later one fails, and is tried again after the other."""
        self.take('one')
        self.domain.off()
        paths = [path for path, _ in self.overlaid.defined.values()]
        external_rollback.delete_left_overlays(
            undo.Surroundings(self.guest, self.host), paths=paths,
            uuid=fakes.UUID, state_directory=self.state)
        self.assertEqual(self.present, self.overlaid.reads())
        self.assert_right('one')

    def test_files_of_snapshots_are_never_what_is_left(self) -> None:
        self.take('one')
        self.take('two')
        external_rollback.delete_left_overlays(
            undo.Surroundings(self.guest, self.host),
            paths=[self.record('two').disks['vda']], uuid=fakes.UUID,
            state_directory=self.state)
        self.assert_right('one', 'two')

    def test_guest_that_is_not_ours_to_start(self) -> None:
        self.take('one')
        self.host.allowed = False
        self.assertIn('not ours to start', self.obstacle('one'))
        self.assert_right('one')


class TestKilled(ExternalTestCase):
    """Each is killed before each of the things that it does."""

    #: more than anything here does
    MOST = 60

    def setUp(self) -> None:
        super().setUp()
        # Hundreds of them, on a machine that may be busy.
        self.useFixture(fixtures.Timeout(300, gentle=True))

    def killed_at_each(self, prepare: typing.Callable[[], None],
                       act: typing.Callable[[], None],
                       check: typing.Callable[[], None]) -> None:
        for number in range(self.MOST):
            prepare()
            self.files.left = number
            try:
                with contextlib.suppress(overlays.Killed):
                    act()
                died = self.files.dead
            finally:
                self.files.left, self.files.dead = None, False
            if not died:
                self.assertGreater(number, 4)
                check()
                return
            self.recover()
            check()
        self.fail('it does more than that')

    def recover(self) -> None:
        """As its guard does, or another process."""
        for path in undo.logs_in(self.state):
            undo.UndoLog.adopt(
                path, lambda uri, uuid: self.guest, self.host).unwind()

    def clear(self) -> None:
        """Begin anew."""
        self.records.forget()
        for name in os.listdir(self.disks):
            path = os.path.join(self.disks, name)
            if external_files.is_ours(path):
                os.remove(path)
        self.files.bases.clear()
        self.overlaid.live = {
            target: (os.path.join(self.disks, target), fmt)
            for target, fmt in zip(('vda', 'vdb'), self.formats)}
        self.overlaid.defined = dict(self.overlaid.live)
        self.domain.current_state = [libvirt.VIR_DOMAIN_RUNNING, 1]

    def test_taking(self) -> None:
        for memory, up in ((True, True), (False, True), (False, False)):
            def prepare() -> None:
                self.clear()
                self.overlaid.write('there')
                if not up:
                    self.domain.off()
                self.present = self.overlaid.reads()

            def check() -> None:
                self.assertEqual(self.present, self.overlaid.reads())
                self.assertEqual(up, self.overlaid.is_up)
                if self.records.all():
                    self.assert_right('one')
                else:
                    self.assert_clean()
            self.killed_at_each(
                prepare, lambda: self.take('one', memory), check)

    def test_deleting(self) -> None:
        for title in ('one', 'three', 'four'):
            for up in (True, False):
                def prepare() -> None:
                    self.clear()
                    for each in ('one', 'two', 'three'):
                        self.take(each)
                    self.revert('two')
                    self.take('four')
                    if not up:
                        self.domain.off()

                def check() -> None:
                    left = {'one', 'two', 'three', 'four'}
                    if title not in self.titles():
                        left.remove(title)
                    self.assertEqual(self.present, self.overlaid.reads())
                    self.assertEqual(up, self.overlaid.is_up)
                    self.assert_right(*left)
                self.killed_at_each(
                    prepare, lambda: self.delete(title), check)

    def test_deleting_again(self) -> None:
        """Who repeats what was killed finds what is left of it."""
        for title, other in (('one', 'two'), ('two', 'one')):
            for act in (self.delete, self.revert):
                for then in (title, other):
                    self.do_after_each(title, act, then)

    def do_after_each(self, title: str,
                      act: typing.Callable[[str], object],
                      then: str) -> None:
        for number in range(self.MOST):
            self.clear()
            for each in ('one', 'two'):
                self.take(each)
            self.domain.off()
            chosen = {each.title: each for each in self.records.all()}
            self.files.left = number
            with contextlib.suppress(overlays.Killed):
                self.delete(title)
            died = self.files.dead
            self.files.left, self.files.dead = None, False
            if not died:
                return
            # It was chosen before what was left over is finished.
            self.patch_name(
                'tests.unit.test_external.ExternalTestCase.record',
                lambda case, name: chosen[name])
            try:
                act(then)
            except exception.RollbackRefused as error:
                self.assertIn('deleted by now', str(error))
                self.assertNotIn(then, self.titles())
            self.assertIn(self.overlaid.reads(), (
                self.present, self.held['one'], self.held['two']))
            self.assert_right(*self.titles())
        self.fail('it does more than that')

    def test_deleting_the_only_one(self) -> None:
        for up in (True, False):
            def prepare() -> None:
                self.clear()
                self.take('one', memory=True)
                if not up:
                    self.domain.off()

            def check() -> None:
                self.assertEqual(self.present, self.overlaid.reads())
                if self.records.all():
                    self.assert_right('one')
                else:
                    self.assert_clean()
            self.killed_at_each(prepare, lambda: self.delete('one'), check)

    def test_merge_goes_on_though_the_guest_was_stopped(self) -> None:
        def prepare() -> None:
            self.clear()
            for each in ('one', 'two'):
                self.take(each)

        def act() -> None:
            try:
                self.delete('one')
            finally:
                if self.files.dead:
                    # libvirt ends its jobs with it.
                    self.domain.off()
                    self.overlaid.commits.clear()

        def check() -> None:
            self.assertEqual(self.present, self.overlaid.reads())
            self.assert_right('two', *{'one'} & self.titles())
        self.killed_at_each(prepare, act, check)

    def titles(self) -> set[str]:
        return {each.title for each in self.records.all()}

    def test_going_back(self) -> None:
        for memory, up in ((True, True), (True, False), (False, True),
                           (False, False)):
            def prepare() -> None:
                self.clear()
                for each in ('one', 'two'):
                    self.take(each, memory)
                if not up:
                    self.domain.off()
                self.present = self.overlaid.reads()

            def check() -> None:
                self.assertEqual(
                    self.held['one'] if self.records.current
                    == self.record('one').name else self.present,
                    self.overlaid.reads())
                if up:
                    self.assertEqual(libvirt.VIR_DOMAIN_RUNNING,
                                     self.domain.current_state[0])
                self.assert_right('one', 'two')
            self.killed_at_each(
                prepare, lambda: (self.revert('one'), None)[1], check)

    def test_nothing_is_started_after_a_reboot(self) -> None:
        for memory in (True, False):
            for number in range(self.MOST):
                self.clear()
                for each in ('one', 'two'):
                    self.take(each, memory)
                self.files.left = number
                with contextlib.suppress(overlays.Killed):
                    self.revert('one')
                died = self.files.dead
                self.files.left, self.files.dead = None, False
                if not died:
                    break
                self.domain.off()
                self.journal.clear()
                with contextlib.ExitStack() as stack:
                    stack.callback(setattr, undo, 'boot_id', undo.boot_id)
                    undo.boot_id = lambda: 'another'  # type: ignore
                    self.recover()
                self.assertEqual([], self.journal.of('create', 'restore'))
                current = self.records.current
                self.assertEqual(
                    self.held['one'] if current == self.record('one').name
                    else self.present, self.overlaid.reads())
                if self.overlaid.managed_save:
                    self.assertEqual(self.present, self.overlaid.reads())
                    self.domain.managedSaveRemove(0)
                self.assert_right('one', 'two')
