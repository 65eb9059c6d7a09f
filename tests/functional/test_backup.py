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

"""The flow backup on real libvirt, QEMU and guests that write."""

import contextlib
import os
import pathlib
import pwd
import shutil
import stat
import subprocess
import tempfile
import time

import fixtures
import libvirt
import testtools

from nova_snapshot_ext import exception
from nova_snapshot_ext import guest as our_guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext import plugins
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo
from tests.functional import guests
from tests.functional import images
from tests.functional import test_flows


# Programs that another user runs, with the socket's path.
_CONNECT = '''
import socket, sys
socket.socket(socket.AF_UNIX).connect(sys.argv[1])
'''
_REPLACE = '''
import os, sys
os.symlink('/etc/passwd', sys.argv[1] + '.mine')
os.rename(sys.argv[1] + '.mine', sys.argv[1])
'''


class BackupTest(test_flows.SnapshotTestCase):

    def test_disks_of_every_kind(self):
        for kind, transfer in (
                ('overlay', 'streamed'), ('qcow2', 'staged'),
                ('raw', 'streamed'), ('block', 'streamed')):
            guest = self.guest(guests.Disk(kind), churn=kind == 'overlay')
            before = guest.wait_writes_on()
            result, image = self.take(
                guest, 'backup', kind, transfer=transfer)
            self.assertEqual(transfer, result.transfer)
            self.assert_good(image, before, guest.counter())
            self.assertEqual('crash', result.consistency.value)
            self.assert_whole(guest)
            guest.destroy()

    def test_libvirtd_is_restarted_while_the_disk_is_read(self):
        guest = self.guest(guests.Disk('overlay'))
        before = guest.wait_writes_on()
        restarts = []

        def restart(done, total):
            if done and not restarts:
                restarts.append((done, total))
                self.libvirtd.kill()
                self.libvirtd.start()
        result, image = self.take(
            guest, 'backup', transfer='streamed', bandwidth=16,
            progress=restart)
        self.assertEqual('backup', result.flow)
        [(done, total)] = restarts
        self.assertLess(done, total)
        connection = self.libvirtd.connect()
        self.addCleanup(connection.close)
        guest.domain = connection.lookupByUUIDString(guest.uuid)
        self.assert_good(image, before, guest.counter())
        self.assertIsNone(self.ours(guest).job())
        self.assert_whole(guest)

    def test_paused_guest_stays_paused(self):
        guest = self.guest(guests.Disk('overlay'))
        guest.domain.suspend()
        _, image = self.take(guest, 'backup')
        self.assert_good(image, guest.counter(), guest.counter())
        self.assertEqual(libvirt.VIR_DOMAIN_PAUSED, guest.domain.state()[0])
        guest.domain.resume()
        self.assert_whole(guest)

    def test_guest_that_was_restored_paused(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        self.restore_paused(guest)
        _, image = self.take(guest, 'backup')
        self.assert_good(image, 0, guest.counter())
        self.assertEqual(libvirt.VIR_DOMAIN_PAUSED, guest.domain.state()[0])
        guest.domain.resume()
        self.assert_whole(guest)

    def test_several_disks_are_frozen_at_one_instant(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        ours = self.ours(guest)
        flow = plugins.load(plugins.FLOWS, 'backup', 'test')()
        guest.wait_writes_on()
        with undo.UndoLog.create(
                str(self.state), ours, hosts.PlainHost()) as log:
            with flow.freeze(ours, ours.disks(), self.request(),
                             log) as frozen:
                guest.wait_writes_on(20)
                images.check_point_in_time([
                    (f'nbd+unix:///{disk.export}?socket={disk.socket}',
                     'raw') for disk in frozen.disks])
                status = os.lstat(frozen.disks[0].socket)
                self.assertTrue(stat.S_ISSOCK(status.st_mode))
                self.assertEqual(os.getuid(), status.st_uid)
                directory = os.stat(os.path.dirname(frozen.disks[0].socket))
                self.assertEqual(0o700, stat.S_IMODE(directory.st_mode))
        self.assert_whole(guest)

    def test_file_systems_are_quiesced(self):
        guest = self.guest(guests.Disk('overlay'), mode='fs', agent=True)
        guest.wait_agent()
        before = guest.wait_writes_on()
        result, image = self.take(
            guest, 'backup', quiesce=requests.Quiesce.REQUIRED)
        self.assertEqual('filesystem', result.consistency.value)
        counters = images.check_filesystems_point_in_time(
            [image], must_be_clean=True)
        self.assertTrue(before <= counters[0][0] <= guest.counter() + 1)
        self.assert_whole(guest)

    def test_guest_that_thaws_first_is_crash_consistent(self):
        guest = self.guest(guests.Disk('overlay'), mode='fs', agent=True)
        guest.wait_agent()
        connection = self.libvirtd.connect()
        self.addCleanup(connection.close)
        another = connection.lookupByUUIDString(guest.uuid)
        begin = our_guests.Guest.begin_backup

        def thawed(ours, description):
            another.fsThaw()
            begin(ours, description)
        self.useFixture(fixtures.MonkeyPatch(
            'nova_snapshot_ext.guest.Guest.begin_backup', thawed))
        result, _ = self.take(guest, 'backup')
        self.assertEqual('crash', result.consistency.value)
        error = self.assertRaises(
            exception.FreezeFailed, self.take, guest, 'backup', 'second',
            quiesce=requests.Quiesce.REQUIRED)
        self.assertIn('0 still were', str(error))
        self.assert_whole(guest)

    def test_foreign_block_copy_is_an_obstacle_and_goes_on(self):
        guest = self.guest(guests.Disk('overlay'))
        target = guest.directory / 'foreign'
        guest.domain.blockCopy(
            'vda', f'<disk type="file"><source file="{target}"/>'
            '<driver type="raw"/></disk>', {},
            libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)
        error = self.assertRaises(
            exception.NoFlowServes, self.take, guest, 'backup')
        self.assertIn('block job (copy)', str(error))
        self.assertTrue(guest.domain.blockJobInfo('vda', 0))
        guest.domain.blockJobAbort('vda', 0)

    def test_foreign_backup_is_an_obstacle_and_goes_on(self):
        guest = self.guest(guests.Disk('overlay'))
        guest.domain.backupBegin(
            '<domainbackup mode="pull"><server transport="unix" '
            'socket="/var/tmp/foreign.sock"/></domainbackup>', None)
        began = time.monotonic()
        for flow in ('backup', 'live', 'cold'):
            error = self.assertRaises(
                exception.NoFlowServes, self.take, guest, flow)
            self.assertIn('another job of the guest is under way: backup',
                          str(error))
        # libvirt's lock holds whoever asks for another job 30 seconds.
        self.assertLess(time.monotonic() - began, 10)
        self.assertEqual('/var/tmp/foreign.sock',
                         self.ours(guest).backup_socket())
        self.ours(guest).end_backup('/var/tmp/foreign.sock')

    def test_nobody_else_gets_at_the_socket(self):
        guest = self.guest(guests.Disk('overlay'))
        ours = self.ours(guest)
        flow = plugins.load(plugins.FLOWS, 'backup', 'test')()
        sockets = self._directory('run')
        qemu = pwd.getpwnam('libvirt-qemu')
        nobody = pwd.getpwnam('nobody')
        with undo.UndoLog.create(
                str(self.state), ours, hosts.PlainHost()) as log:
            with flow.freeze(
                    ours, ours.disks(),
                    self.request(socket_directory=str(sockets)),
                    log) as frozen:
                socket = frozen.disks[0].socket
                self.assertEqual(str(sockets), os.path.dirname(
                    os.path.dirname(socket)))
                self.assertEqual('', self._as_user(0, 0, _CONNECT, socket))
                for user, group in ((nobody.pw_uid, nobody.pw_gid),
                                    (nobody.pw_uid, ours.qemu_gid()),
                                    (qemu.pw_uid, ours.qemu_gid())):
                    for attempt in (_CONNECT, _REPLACE):
                        self.assertIn('PermissionError', self._as_user(
                            user, group, attempt, socket))
                self.assertEqual('', self._as_user(0, 0, _CONNECT, socket))
        self.assertEqual([], list(sockets.iterdir()))

    def _as_user(self, uid, gid, program, *arguments) -> str:
        """:returns: what it says on its standard error"""
        return subprocess.run(
            ['/usr/bin/python3', '-c', program, *arguments], user=uid,
            group=gid, extra_groups=[], stderr=subprocess.PIPE, text=True,
            check=False).stderr


class ScratchTest(test_flows.SnapshotTestCase):
    """The scratch on a small file system, of a guest that writes hard."""

    def setUp(self):
        super().setUp()
        self._use_guest()
        self.set('_LEAST_AHEAD', 16 * guests.MIB)

    def _use_guest(self, **changes):
        self.used_guest = self.guest(
            guests.Disk('raw', size=256 * guests.MIB, **changes), churn=True,
            pace_ms=0, start=False)
        # Overwriting what was never written takes no room in the scratch.
        images.run('qemu-io', '-f', 'raw', '-c', 'write -q -P 0x5a 0 256M',
                   self.used_guest.disks[0].path)
        self.used_guest.start()
        self.ours_ = self.ours(self.used_guest)

    def set(self, name, value):
        self.useFixture(fixtures.MonkeyPatch(
            f'nova_snapshot_ext.scratch.{name}', value))

    @contextlib.contextmanager
    def frozen_disk(self, scratch):
        flow = plugins.load(plugins.FLOWS, 'backup', 'test')()
        with undo.UndoLog.create(
                str(self.state), self.ours_, hosts.PlainHost()) as log:
            with flow.freeze(
                    self.ours_, self.ours_.disks(),
                    self.request(scratch_directory=str(scratch)),
                    log) as frozen:
                yield frozen

    def wait(self, condition, what):
        deadline = time.monotonic() + 120
        while not condition():
            self.assertLess(time.monotonic(), deadline, what)
            time.sleep(0.1)

    def assert_ended_in_time(self, frozen, reason):
        """The job is, by us, and the guest never stood still for it."""
        self.wait(lambda: frozen.why_lost() is not None, 'it is not ended')
        self.assertIn(reason, frozen.why_lost())
        self.wait(lambda: self.ours_.backup_socket() is None, 'it is there')

    def assert_unharmed(self):
        self.used_guest.wait_writes_on(20)
        self.assert_whole(self.used_guest)
        self.assertNotIn('I/O error',
                         self.used_guest.console.log.read_text())

    def test_full_scratch_ends_the_job_and_the_guest_writes_on(self):
        states = []
        paused = our_guests.Guest.is_paused_by_io_error

        def watched(ours):
            states.append(paused(ours))
            return states[-1]
        self.useFixture(fixtures.MonkeyPatch(
            'nova_snapshot_ext.guest.Guest.is_paused_by_io_error', watched))
        with self.frozen_disk(self._small_filesystem(48)) as frozen:
            self.assert_ended_in_time(frozen, 'No space left on device')
            self.assert_unharmed()
        self.assertEqual({False}, set(states))

    def test_guest_that_was_paused_is_resumed_at_the_end(self):
        # As if its owner did nothing for it, or were too slow.
        self.useFixture(fixtures.MonkeyPatch(
            'nova_snapshot_ext.scratch.Watch.look', lambda watch: True))
        with self.frozen_disk(self._small_filesystem(48)):
            self.wait(self.ours_.is_paused_by_io_error, 'it is not full')
        self.assert_unharmed()

    def test_guest_that_was_paused_is_resumed_at_the_next_look(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova_snapshot_ext.scratch.Files.reserve_ahead',
            lambda files: None))
        with self.frozen_disk(self._small_filesystem(48)) as frozen:
            self.assert_ended_in_time(frozen, 'paused by an I/O error')
            self.assert_unharmed()

    def test_scratch_that_has_all_it_can_need_is_never_ended(self):
        # More than its file system has, were it not for the disk's size.
        self.set('_LEAST_AHEAD', 1024 * guests.MIB)
        with self.frozen_disk(self._small_filesystem(300)) as frozen:
            self.used_guest.wait_writes_on(100)
            self.assertIsNone(frozen.why_lost())
            self.assertIsNotNone(self.ours_.backup_socket())
        self.assert_unharmed()

    def test_quota_ends_the_job_and_the_guest_writes_on(self):
        # Not of a user: those are not for root, who runs this.
        scratch = self._mounted('mkfs.btrfs', '-q', mib=256)
        images.run('btrfs', 'quota', 'enable', scratch)
        images.run('btrfs', 'qgroup', 'limit', '48M', scratch)
        with self.frozen_disk(scratch) as frozen:
            self.assert_ended_in_time(frozen, 'Disk quota exceeded')
            self.assert_unharmed()

    def test_read_only_scratch_ends_the_job_before_the_guest_writes(self):
        scratch = self._damageable()
        guest = self.used_guest
        guest.domain.suspend()
        with self._directory_left(), self.frozen_disk(scratch) as frozen:
            self._damage(scratch)
            self.assert_ended_in_time(frozen, 'Read-only file system')
            guest.domain.resume()
            self.assert_unharmed()

    def test_guest_whose_disk_stops_at_errors_sees_none_of_the_scratch(self):
        # As if it wrote before anybody looked, which it does for sure then.
        self.set('_CHECK_S', 1000.0)
        self.useFixture(fixtures.MonkeyPatch(
            'nova_snapshot_ext.scratch.Files.check_at_no_cost',
            lambda files: None))
        self.used_guest.destroy()
        self._use_guest(error_policy='stop')
        scratch = self._damageable()
        with self._directory_left(), self.frozen_disk(scratch) as frozen:
            self._damage(scratch)
            self.assert_ended_in_time(frozen, 'paused by an I/O error')
            self.assert_unharmed()

    def test_scratch_in_memory(self):
        scratch = pathlib.Path(tempfile.mkdtemp(dir='/dev/shm'))
        self.addCleanup(shutil.rmtree, scratch)
        scratch.chmod(0o755)
        self.assertEqual('tmpfs', images.run(
            'stat', '-f', '-c', '%T', scratch).strip())
        before = self.used_guest.wait_writes_on()
        result, image = self.take(
            self.used_guest, 'backup', scratch_directory=str(scratch))
        self.assertEqual('backup', result.flow)
        self.assert_good(image, before, self.used_guest.counter())
        self.assertEqual([], list(scratch.iterdir()))
        self.assert_unharmed()

    def _damageable(self) -> pathlib.Path:
        return self._mounted(
            'mkfs.ext4', '-q', '-e', 'remount-ro', '-O', '^has_journal',
            mib=300)

    def _damage(self, scratch: pathlib.Path) -> None:
        """As the kernel does when it finds the file system damaged."""
        device = images.run('findmnt', '-no', 'SOURCE', scratch).strip()
        pathlib.Path('/sys/fs/ext4', os.path.basename(device),
                     'trigger_fs_error').write_text('1')

    @contextlib.contextmanager
    def _directory_left(self):
        """Its directory is not removed before it can be."""
        with testtools.ExpectedException(
                exception.UndoFailed, '.*remove_directory'):
            yield
        [log] = self.state.iterdir()
        [left] = undo.read(str(log)).pending.values()
        self.assertEqual('remove_directory', left.step)
        log.unlink()

    def test_live_serves_where_the_scratch_ran_short(self):
        guest = self.used_guest
        before = guest.wait_writes_on()
        small = self._small_filesystem(48)
        changes = dict(transfer='streamed', others=('live',), bandwidth=4,
                       scratch_directory=str(small))
        error = self.assertRaises(
            exception.DiskThawed, self.take, guest, 'backup', **changes)
        self.assertIn('No space left on device', str(error))
        self.assertEqual([], list(self.images.iterdir()))
        self.assert_whole(guest)
        changes['bandwidth'] = 16
        result, image = self.take(
            guest, 'backup', on_scratch_full='live', **changes)
        self.assertEqual('live', result.flow)
        self.assert_good(image, before, guest.counter())
        self.assertEqual([], list(small.iterdir()))
        self.assert_unharmed()

    def _small_filesystem(self, mib: int) -> pathlib.Path:
        directory = self._mounted(
            'mke2fs', '-q', '-t', 'ext4', '-m', '0', mib=mib)
        (directory / 'lost+found').rmdir()
        return directory

    def _mounted(self, *mkfs: str, mib: int) -> pathlib.Path:
        """A directory with little room that QEMU sees too."""
        directory = self._directory('scratch')
        file = self.work / 'small'
        with open(file, 'wb') as blocks:
            blocks.truncate(mib * guests.MIB)
        images.run(*mkfs, file)
        device = images.run('losetup', '--find', '--show', file).strip()
        self.addCleanup(images.run, 'losetup', '--detach', device)
        mount = ('mount', device, directory)
        images.run(*mount)
        self.addCleanup(images.run, 'umount', directory)
        images.run(*self.libvirtd.inside(*mount))
        self.addCleanup(images.run, *self.libvirtd.inside(
            'umount', directory))
        directory.chmod(0o755)
        return directory
