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

from nova_snapshot_ext import borrowed
from nova_snapshot_ext import undo
from tests.unit import base
from tests.unit import fakes


class TestBorrowed(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.path = self.new_file('disk')
        self.domain.disks = fakes.disk_xml(self.path)
        self.around = undo.Surroundings(self.guest, self.host)
        self.rebooted = undo.Surroundings(self.guest, self.host, True)

    def restore(self, around: undo.Surroundings | None = None,
                path: str | None = None) -> None:
        borrowed.restore_owner(around or self.around,
                               path=path or self.path, uid=1, gid=2)

    def test_owner_is_given_back_if_the_device_is_there(self) -> None:
        self.domain.off()
        self.restore()
        self.domain.disks += fakes.disk_xml('/none', target='vdb')
        self.restore(path='/none')
        self.assertEqual([f'chown {self.path} 1 2'], self.journal)

    def test_what_is_no_disk_of_the_guest_is_left_alone(self) -> None:
        self.domain.off()
        self.restore(path=self.new_file('shadow'))
        self.assertEqual([], self.journal)

    def test_libvirt_owns_the_disks_of_a_running_guest(self) -> None:
        self.restore()
        self.assertEqual([], self.journal)

    def test_disk_of_a_guest_that_is_gone_may_be_anothers(self) -> None:
        self.restore(undo.Surroundings(None, self.host))
        self.assertEqual([], self.journal)

    def test_device_is_another_after_a_reboot_and_a_file_is_not(
            self) -> None:
        self.domain.off()
        self.restore(self.rebooted)
        self.patch_name('stat.S_ISBLK', lambda mode: True)
        self.restore(self.rebooted)
        self.assertEqual([f'chown {self.path} 1 2'], self.journal)

    def test_link_is_followed_when_the_owner_is_given_back(self) -> None:
        # As /dev/GROUP/VOLUME is one to /dev/dm-N.
        link = os.path.join(self.directory, 'link')
        os.symlink(self.path, link)
        self.domain.disks = fakes.disk_xml(link)
        log = self.new_log()
        borrowed.borrow(link, log)
        self.assertEqual([f'chown {self.path} {os.getuid()} -1'],
                         self.journal)
        other = self.new_file('other')
        os.unlink(link)
        os.symlink(other, link)
        self.domain.off()
        log.unwind()
        status = os.stat(self.path)
        self.assertEqual(f'chown {other} {status.st_uid} {status.st_gid}',
                         self.journal[-1])

    def test_owner_is_given_back_by_the_log_of_an_older_release(
            self) -> None:
        # It has what the path leads to, and libvirt knows the link.
        link = os.path.join(self.directory, 'link')
        os.symlink(self.path, link)
        self.domain.disks = fakes.disk_xml(link)
        self.domain.off()
        self.restore(path=os.path.realpath(link))
        self.assertEqual([f'chown {self.path} 1 2'], self.journal)

    def test_way_back_is_flushed_before(self) -> None:
        self.watch_flushes()
        borrowed.borrow(self.path, self.new_log())
        self.assertEqual(['flushed restore_owner', 'chown'], [
            line.split(f' {self.path}')[0] for line in self.journal])
