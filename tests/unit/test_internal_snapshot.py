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


"""An internal snapshot is deleted, and it is seen whether it was."""

import contextlib
import os
import typing

import fixtures
import libvirt

from nova_snapshot_ext import exception
from nova_snapshot_ext import internal_snapshot
from nova_snapshot_ext import undo
from tests.unit import base
from tests.unit import doubles
from tests.unit import fakes


MINE = 'snapshot-ext-' + 32 * 'a'


class InternalSnapshotTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.path = self.new_file('disk', base.qcow2_header())
        self.domain.disks = fakes.disk_xml(self.path, 'qcow2')
        self.patch_name('time.sleep', lambda seconds: None)
        self.qemu_img = doubles.QemuImg(self.journal)
        self.patch_name('nova_snapshot_ext.qemu_img.run', self.qemu_img.run)
        self.patch_name('libvirt_qemu.qemuMonitorCommand',
                        self.qemu_img.monitor)
        self.qemu_img.path = self.path
        self.qemu_img.snapshots = [MINE, 'theirs']


class TestDelete(InternalSnapshotTestCase):

    def delete(self, guest: object = 0, owner_died: bool = False) -> None:
        internal_snapshot.delete_internal_snapshot(
            undo.Surroundings(self.guest if guest == 0 else None, self.host,
                              owner_died=owner_died),
            path=self.path, name=MINE)

    def test_qemu_img_of_a_dead_owner_is_ended_before_it_is_looked(
            self) -> None:
        # It makes the snapshot in the moment of its end.
        self.qemu_img.snapshots.remove(MINE)
        self.domain.off()

        def end(argument: str, what: str, program: str) -> None:
            self.journal.append(f'end {argument}')
            self.qemu_img.snapshots.append(argument)
        self.patch_name('nova_snapshot_ext.processes.end', end)
        self.delete()
        self.assertEqual([], self.journal)
        self.delete(owner_died=True)
        self.assertEqual([f'end {MINE}', 'qemu-img snapshot -d'], self.journal)

    def test_running_guests_is_deleted_by_qemu(self) -> None:
        self.delete()
        self.assertEqual(['theirs'], self.qemu_img.snapshots)
        self.assertEqual(['delete by monitor'], self.journal.of('delete'))

    def test_guest_that_stops_meanwhile_is_kept_as_it_is(self) -> None:
        @contextlib.contextmanager
        def undisturbed() -> typing.Iterator[None]:
            self.journal.append('locked')
            yield
            self.journal.append('unlocked')
        self.patch(self.host, 'undisturbed', undisturbed)
        real = self.domain.state

        def state() -> list[int]:
            # It ran at the first look.
            self.patch(self.domain, 'state', real)
            now = real()
            self.domain.off()
            return now
        self.patch(self.domain, 'state', state)

        def monitor(*arguments: object) -> typing.NoReturn:
            raise fakes.libvirt_error(libvirt.VIR_ERR_OPERATION_INVALID)
        self.patch_name('libvirt_qemu.qemuMonitorCommand', monitor)
        self.delete()
        self.assertEqual(['theirs'], self.qemu_img.snapshots)
        self.assertEqual(['locked', 'qemu-img snapshot -d', 'unlocked'],
                         self.journal[:3])

    def test_guest_that_nova_holds_is_waited_for_once(self) -> None:
        def undisturbed() -> typing.NoReturn:
            self.journal.append('asked')
            raise exception.UndoFailed('Nova has held it')
        self.domain.off()
        self.patch(self.host, 'undisturbed', undisturbed)
        self.assertRaisesRegex(
            exception.UndoFailed, 'Nova has held it', self.delete)
        self.assertEqual(['asked'], self.journal)

    def test_disk_that_left_with_its_server_is_another_hosts(self) -> None:
        def undisturbed() -> typing.NoReturn:
            raise exception.GuestElsewhere('Server 7 is on the host h')
        self.patch(self.host, 'undisturbed', undisturbed)
        logged = self.useFixture(fixtures.FakeLogger())
        # As long as its domain is here, it may not have left for good.
        self.domain.off()
        self.assertRaises(exception.UndoFailed, self.delete)
        self.domain.gone()
        self.delete()
        self.assertEqual([MINE, 'theirs'], self.qemu_img.snapshots)
        self.assertIn(f'Server 7 is on the host h, and is not here any more: '
                      f'if its disk {self.path} went with it, the internal '
                      f'snapshot {MINE} is still in there', logged.output)

    def test_stopped_guests_is_deleted_by_qemu_img(self) -> None:
        self.domain.off()
        self.delete()
        self.assertEqual(['theirs'], self.qemu_img.snapshots)
        self.assertEqual(['qemu-img snapshot -d'],
                         self.journal.of('qemu-img snapshot'))

    def test_twice_does_no_harm(self) -> None:
        self.delete()
        self.delete()
        self.assertEqual(['delete by monitor'], self.journal.of('delete'))

    def test_way_that_lies_is_found_out(self) -> None:
        self.qemu_img.lies = True
        self.assertRaisesRegex(
            exception.SnapshotError, 'can not be deleted', self.delete)

    def test_file_of_a_guest_that_is_gone_is_left_alone(self) -> None:
        self.delete(None)
        self.assertEqual([MINE, 'theirs'], self.qemu_img.snapshots)

    def test_guest_that_is_being_rebooted_is_waited_for(self) -> None:
        def defined_anew() -> None:
            self.domain.errors.clear()
            self.domain.createWithFlags(0)
        self.domain.gone()
        self.host.waited = defined_anew
        self.delete()
        self.assertEqual(['theirs'], self.qemu_img.snapshots)
        self.assertEqual(['delete by monitor'],
                         self.journal.of('delete', 'qemu-img'))

    def test_file_that_is_gone_has_none(self) -> None:
        os.unlink(self.path)
        self.delete(None)
        self.assertEqual([], self.journal.of('delete', 'qemu-img snapshot'))

    def test_disk_that_libvirt_gave_to_root_is_taken_back(self) -> None:
        self.domain.off()
        self.patch_name('os.access', lambda path, mode: False)
        self.delete()
        uid = os.stat(self.path).st_uid
        self.assertEqual(
            [f'chown {self.path} {os.getuid()} -1',
             'qemu-img snapshot -d', f'chown {self.path} {uid} -1'],
            self.journal.of('chown', 'qemu-img snapshot'))

    def test_guest_that_stops_meanwhile(self) -> None:
        self.qemu_img.before_delete = self.domain.off
        self.qemu_img.fails.add('monitor')
        self.delete()
        self.assertEqual(['theirs'], self.qemu_img.snapshots)

    def test_nothing_else_is_deleted_or_ended(self) -> None:
        around = undo.Surroundings(self.guest, self.host, owner_died=True)
        for name in ('theirs', '-D', MINE + '0', ''):
            self.assertRaises(
                ValueError, internal_snapshot.delete_internal_snapshot,
                around, path=self.path, name=name)
        self.assertEqual([], self.journal)


class TestMake(InternalSnapshotTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.domain.off()
        self.watch_flushes()
        self.log = self.new_log()
        self.journal.clear()

    def steps(self) -> list[str]:
        return self.journal.of('flushed', 'chown', 'qemu-img snapshot')

    def test_disk_of_root_is_borrowed_with_its_way_back_in_the_log(
            self) -> None:
        self.patch_name('os.access', lambda path, mode: False)
        status = os.stat(self.path)
        internal_snapshot.make(self.path, self.log)
        self.assertEqual(
            ['flushed restore_owner', f'chown {self.path} {os.getuid()} -1',
             'flushed delete_internal_snapshot', 'qemu-img snapshot -c',
             f'chown {self.path} {status.st_uid} {status.st_gid}'],
            self.steps())
        self.assertEqual(1, self.log.pending)

    def test_disk_goes_back_when_the_snapshot_can_not_be_made(self) -> None:
        self.patch_name('os.access', lambda path, mode: False)
        self.qemu_img.fails.add('-c')
        self.assertRaises(exception.SnapshotError, internal_snapshot.make,
                          self.path, self.log)
        status = os.stat(self.path)
        self.assertEqual(f'chown {self.path} {status.st_uid} {status.st_gid}',
                         self.steps()[-1])

    def test_disk_of_our_own_is_left_alone(self) -> None:
        with self.log.scope():
            internal_snapshot.make(self.path, self.log)
        self.assertEqual(
            ['flushed delete_internal_snapshot', 'qemu-img snapshot -c',
             'qemu-img snapshot -d'], self.steps())
