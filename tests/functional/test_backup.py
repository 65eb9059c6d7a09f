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

import os
import pathlib
import stat
import time

import libvirt

from nova_snapshot_ext import exception
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext import plugins
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo
from tests.functional import guests
from tests.functional import images
from tests.functional import test_flows


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
                self.assertEqual(0o710, stat.S_IMODE(directory.st_mode))
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

    def test_foreign_backup_is_an_obstacle_and_goes_on(self):
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

    def test_full_scratch_ends_the_job_and_the_guest_writes_on(self):
        guest = self.guest(
            guests.Disk('raw', size=256 * guests.MIB), churn=True, pace_ms=0,
            start=False)
        # Overwriting what was never written takes no room in the scratch.
        images.run('qemu-io', '-f', 'raw', '-c', 'write -q -P 0x5a 0 256M',
                   guest.disks[0].path)
        guest.start()
        small = self._small_filesystem(48)
        ours = self.ours(guest)
        flow = plugins.load(plugins.FLOWS, 'backup', 'test')()
        with undo.UndoLog.create(
                str(self.state), ours, hosts.PlainHost()) as log:
            with flow.freeze(
                    ours, ours.disks(),
                    self.request(scratch_directory=str(small)),
                    log) as frozen:
                for _ in range(600):
                    if frozen.why_lost() is not None:
                        break
                    guest.wait_writes_on(5)
                self.assertIn('free for the scratch', frozen.why_lost())
                for _ in range(100):
                    if ours.backup_socket() is None:
                        break
                    time.sleep(0.1)
                self.assertIsNone(ours.backup_socket())
                guest.wait_writes_on(20)
        self.assert_whole(guest)
        self.assertNotIn('I/O error', guest.console.log.read_text())

    def _small_filesystem(self, mib: int) -> pathlib.Path:
        """A directory with little room that QEMU sees too."""
        directory = self._directory('scratch')
        file = self.work / 'small.ext4'
        with open(file, 'wb') as blocks:
            blocks.truncate(mib * guests.MIB)
        images.run('mke2fs', '-q', '-t', 'ext4', '-m', '0', file)
        device = images.run('losetup', '--find', '--show', file).strip()
        self.addCleanup(images.run, 'losetup', '--detach', device)
        mount = ('mount', device, directory)
        images.run(*mount)
        self.addCleanup(images.run, 'umount', directory)
        images.run(*self.libvirtd.inside(*mount))
        self.addCleanup(images.run, *self.libvirtd.inside(
            'umount', directory))
        (directory / 'lost+found').rmdir()
        directory.chmod(0o755)
        return directory
