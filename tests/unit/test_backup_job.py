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


"""A backup job: its scratch, its socket, and its end."""

import errno
import os
import stat
import threading

import libvirt

from nova_snapshot_ext import backup_job
from nova_snapshot_ext import exception
from nova_snapshot_ext import frozen
from nova_snapshot_ext import scratch
from nova_snapshot_ext import undo
from tests.unit import base
from tests.unit import doubles
from tests.unit import fakes


class TestObstacle(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.domain.disks = fakes.disk_xml('/a')

    def obstacle(self, **changes: object) -> str:
        return backup_job.obstacle(self.guest, self.guest.disks(),
                                   self.request(**changes)) or ''

    def test_scratch_needs_its_directory(self) -> None:
        self.assertEqual('', self.obstacle())
        self.assertIn(
            '[snapshot_ext] scratch_directory = /none is not valid',
            self.obstacle(scratch_directory='/none'))

    def test_scratch_needs_room_to_begin_with(self) -> None:
        self.domain.capacity = 1024 ** 4
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: 128 * 1024 ** 2 - 1)
        self.assertIn(f'needs {128 * 1024 ** 2} bytes in {self.staging}',
                      self.obstacle())

    def test_small_disk_needs_no_more_than_it_can_fill(self) -> None:
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: 3 * 1024 ** 2)
        self.assertEqual('', self.obstacle())

    def test_mode_that_keeps_qemu_out_is_an_obstacle(self) -> None:
        os.chmod(self.state, 0o700)
        self.domain.rest = (
            '<seclabel model="dac"><label>+64055:+108</label></seclabel>')
        self.assertIn(
            f'[snapshot_ext] socket_directory = {self.state} is not valid: '
            f'its mode 700 lets nobody but its owner pass', self.obstacle())
        for mode in (0o701, 0o710, 0o750):
            os.chmod(self.state, mode)
            self.assertEqual('', self.obstacle())
            self.assertEqual(mode, os.stat(self.state).st_mode & 0o777)

    def test_directory_of_qemus_own_user_is_none(self) -> None:
        os.chmod(self.state, 0o700)
        self.domain.rest = (
            f'<seclabel model="dac"><label>+{os.getuid()}:+108</label>'
            f'</seclabel>')
        self.assertEqual('', self.obstacle())


class TestJob(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.watch_flushes()
        self.domain.disks = fakes.disk_xml('/a')
        self.domain.rest = (
            '<seclabel model="dac"><label>+64055:+108</label></seclabel>')
        self.patch_name('nova_snapshot_ext.qemu_img.run',
                        doubles.QemuImg(self.journal).run)
        self.sockets = os.path.join(self.directory, 'sockets')
        self.log = self.new_log()
        self.journal.clear()

    def run_job(self) -> frozen.Frozen:
        with self.log.scope(), backup_job.prepared(
                self.guest, self.guest.disks(),
                self.request(socket_directory=self.sockets),
                self.log) as job:
            self.modes = [self.mode(self.sockets), *self.own_modes()]
            self.before_begin()
            job.begin()
            self.modes += self.own_modes()
            self.while_it_runs()
            return job.frozen(frozen.Consistency.CRASH, frozen.Pause())

    def before_begin(self) -> None:
        pass

    def while_it_runs(self) -> None:
        pass

    def mode(self, path: str) -> int:
        return stat.S_IMODE(os.stat(path).st_mode)

    def own_modes(self) -> list[int]:
        return [self.mode(os.path.join(self.sockets, name))
                for name in os.listdir(self.sockets)]

    def test_qemu_makes_the_socket_and_is_shut_out_then(self) -> None:
        found = self.run_job()
        self.assertEqual([0o711, 0o770, 0o700], self.modes)
        socket = found.disks[0].socket
        self.assertEqual(self.sockets,
                         os.path.dirname(os.path.dirname(socket)))
        chowns = [each.split()[1:] for each in self.journal.of('chown')]
        self.assertEqual(
            [['-1', '108'], ['-1', '108'], [str(os.getuid()), '-1']],
            [each[1:] for each in chowns])
        self.assertEqual(socket, chowns[-1][0])
        self.assertEqual([], os.listdir(self.sockets))

    def test_disks_are_served_by_the_guest(self) -> None:
        self.assertTrue(self.run_job().by_guest)

    def test_what_the_guest_overwrites_is_counted(self) -> None:
        with self.log.scope(), backup_job.prepared(
                self.guest, self.guest.disks(),
                self.request(socket_directory=self.sockets),
                self.log) as job:
            job.begin()
            found = job.frozen(frozen.Consistency.CRASH, frozen.Pause())
            for written in (0, 65536):
                [directory] = os.listdir(self.staging)
                os.truncate(os.path.join(self.staging, directory, 'vda'),
                            written)
                self.assertEqual(written, found.scratch_bytes())

    def test_directory_is_closed_before_the_socket_is_taken_over(
            self) -> None:
        modes = []
        take_socket = self.host.take_socket

        def look(path: str) -> None:
            modes.append(os.stat(os.path.dirname(path)).st_mode & 0o777)
            take_socket(path)
        self.host.take_socket = look  # type: ignore[method-assign]
        self.run_job()
        self.assertEqual([0o700], modes)

    def test_link_in_place_of_the_socket_is_not_followed(self) -> None:
        target = self.new_file('theirs')
        self.domain.bind = lambda path: os.symlink(target, path)
        owners = os.stat(target)
        self.assertRaisesRegex(exception.NotOurs, 'is not a socket',
                               self.run_job)
        self.assertEqual(owners, os.stat(target))
        self.assertEqual(['abortJob'], self.journal.of('abort'))

    def test_socket_is_taken_over_in_the_moment_of_the_beginning(
            self) -> None:
        self.while_it_runs = (  # type: ignore[method-assign]
            lambda: self.journal.append('begun'))
        self.run_job()
        after = self.journal[self.journal.index('backupBegin') + 1:]
        self.assertEqual(['chown', 'begun'],
                         [each.split()[0] for each in after[:2]])

    def test_scratch_is_watched_from_before_the_job_to_its_end(self) -> None:
        looked = threading.Event()
        self.patch_name('nova_snapshot_ext.scratch.POLL_S', 0.001)

        def look(watch: scratch.Watch) -> bool:
            looked.set()
            return True
        self.patch_name('nova_snapshot_ext.scratch.Watch.look', look)

        def wait() -> None:
            looked.clear()
            self.assertTrue(looked.wait(10))
            self.journal.append('watched')
        self.before_begin = wait  # type: ignore[method-assign]
        self.domain.before['abortJob'] = wait
        self.run_job()
        self.assertEqual(
            ['watched', 'backupBegin', 'abortJob', 'watched'],
            self.journal.of('watched', 'backupBegin', 'abortJob'))

    def test_job_is_not_begun_on_a_scratch_that_takes_no_writes(self) -> None:
        def refuse(files: scratch.Files) -> None:
            raise OSError(errno.EROFS, 'Read-only file system')

        def break_it() -> None:
            self.patch(scratch.Files, 'check_at_no_cost', refuse)
        self.before_begin = break_it  # type: ignore[method-assign]
        self.assertRaisesRegex(
            exception.FreezeFailed, 'Read-only file system', self.run_job)
        self.assertEqual([], self.journal.of('backupBegin'))

    def test_job_is_not_begun_for_good_on_a_scratch_that_ran_short(
            self) -> None:
        self.patch_name('nova_snapshot_ext.scratch.Watch.why_lost',
                        lambda watch: 'No space left on device')
        self.assertRaisesRegex(
            exception.FreezeFailed, 'No space left', self.run_job)
        self.assertIsNone(self.domain.backup)


class TestEndBackup(base.TestCase):

    def end(self, socket: str) -> None:
        backup_job.end_backup(undo.Surroundings(self.guest, self.host),
                              socket=socket)

    def test_job_of_another_is_not_ended(self) -> None:
        self.domain.backup = (
            "<domainbackup><server socket='/theirs'/></domainbackup>")
        self.end('/ours')
        self.assertEqual([], self.journal)
        self.end('/theirs')
        self.assertEqual(['abortJob'], self.journal)

    def test_no_job_and_no_guest_are_undone(self) -> None:
        self.end('/ours')
        self.domain.off()
        self.end('/ours')
        self.domain.gone()
        self.end('/ours')
        self.assertEqual([], self.journal)

    def test_guest_that_its_scratch_paused_goes_on(self) -> None:
        self.domain.backup = (
            "<domainbackup><server socket='/ours'/></domainbackup>")
        self.pause()
        self.end('/ours')
        self.assertEqual(['abortJob', 'resume'], self.journal)

    def pause(self) -> None:
        self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED,
                                     libvirt.VIR_DOMAIN_PAUSED_IOERROR]

    def test_guest_goes_on_though_its_job_was_ended_before(self) -> None:
        # By an owner that died then, or by an operator.
        self.pause()
        self.end('/ours')
        self.assertEqual(['resume'], self.journal)

    def test_guest_that_another_job_may_have_paused_is_left_alone(
            self) -> None:
        for server in "<server socket='/theirs'/>", '':
            self.pause()
            self.domain.backup = f'<domainbackup>{server}</domainbackup>'
            self.end('/ours')
        self.assertEqual([], self.journal)

    def test_guest_that_runs_by_then_is_no_failure(self) -> None:
        def resumed() -> None:
            self.domain.current_state = [libvirt.VIR_DOMAIN_RUNNING, 1]
        self.domain.errors['resume'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_INVALID)
        self.pause()
        self.assertRaises(exception.SnapshotError, self.end, '/ours')
        self.domain.before['resume'] = resumed
        self.end('/ours')
