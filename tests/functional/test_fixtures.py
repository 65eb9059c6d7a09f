#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""The fixtures do what the other tests believe of them."""

import libvirt
import libvirt_qemu

from tests.functional import base
from tests.functional import guests
from tests.functional import images

MIB = 1024 * 1024


class GuestTest(base.FunctionalTestCase):

    def test_a_guest_counts_on_disks_of_every_kind(self):
        guest = self.guest(
            guests.Disk('overlay', serial='root'), guests.Disk('qcow2'),
            guests.Disk('raw', cache='writeback'), guests.Disk('block'),
            churn=True)
        guest.wait_writes_on(20)
        self.assertLess(guest.longest_silence(), 10)
        guest.domain.suspend()
        read = images.check_point_in_time(guest.images, in_use=True)
        self.assertIn(read[0][0], (guest.counter(), guest.counter() + 1))

    def test_a_paused_guest_is_silent(self):
        guest = self.guest(guests.Disk('raw'))
        guest.mark()
        guest.wait_writes_on()
        before = guest.longest_silence()
        guest.domain.suspend()
        self.assertRaises(AssertionError, guest.wait_writes_on, 1000, 1)
        guest.domain.resume()
        guest.wait_writes_on()
        self.assertGreater(guest.longest_silence(), before)
        self.assertGreater(guest.longest_silence(), 0.9)

    def test_a_guest_that_starts_again_counts_on(self):
        guest = self.guest(guests.Disk('overlay'))
        guest.wait_writes_on()
        guest.domain.destroy()
        at = guest.counter()
        guest.start()
        self.assertGreater(guest.counter(), at)
        self.assertIn('booted from', guest.console.log.read_text())

    def test_a_guest_obeys_the_power_button(self):
        guest = self.guest(guests.Disk('raw'))
        guest.domain.shutdown()
        for _try in range(200):
            if not guest.domain.isActive():
                break
            guest.console.changed.acquire()
            guest.console.changed.wait(0.1)
            guest.console.changed.release()
        self.assertFalse(guest.domain.isActive())

    def test_a_guest_outlives_libvirtd(self):
        guest = self.guest(guests.Disk('raw'))
        self.libvirtd.kill()
        guest.wait_writes_on()
        self.libvirtd.start()
        connection = self.libvirtd.connect()
        self.addCleanup(connection.close)
        domain = connection.lookupByUUIDString(guest.uuid)
        self.assertEqual([libvirt.VIR_DOMAIN_RUNNING,
                          libvirt.VIR_DOMAIN_RUNNING_BOOTED],
                         domain.state())


class AgentTest(base.FunctionalTestCase):

    def test_the_agent_freezes_and_thaws(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'),
                           mode='fs', agent=True)
        guest.wait_agent()
        self.assertIn('thawed', libvirt_qemu.qemuAgentCommand(
            guest.domain, '{"execute": "guest-fsfreeze-status"}', 10, 0))
        guest.mark()
        self.assertEqual(2, guest.domain.fsFreeze())
        at = guest.counter()
        self.assertRaises(AssertionError, guest.wait_writes_on, 3, 1)
        copies = []
        for disk in guest.disks:
            copy = guest.directory / f'copy.{disk.target}'
            images.run('qemu-img', 'convert', '-U', '-f', disk.format,
                       '-O', 'qcow2', disk.path, copy)
            copies.append((copy, 'qcow2'))
        self.assertEqual(2, guest.domain.fsThaw())
        guest.wait_writes_on()
        read = images.check_filesystems_point_in_time(
            copies, must_be_clean=True)
        self.assertIn(read[0][0], (at, at + 1, at + 2))
        # The same without a freeze has a journal to replay.
        guest.domain.suspend()
        images.check_filesystems_point_in_time(
            self._copies(guest), must_be_clean=False)
        self.assertRaises(
            AssertionError, images.check_filesystems_point_in_time,
            self._copies(guest), must_be_clean=True)

    def _copies(self, guest):
        copies = []
        for disk in guest.disks:
            copy = guest.directory / f'crash.{disk.target}'
            images.run('qemu-img', 'convert', '-U', '-f', disk.format,
                       '-O', 'qcow2', disk.path, copy)
            copies.append((copy, 'qcow2'))
        return copies


class ImageTest(base.FunctionalTestCase):

    def _copy(self, guest, disk, name):
        copy = guest.directory / name
        images.run('qemu-img', 'convert', '-U', '-f', disk.format,
                   '-O', 'qcow2', disk.path, copy)
        return copy, 'qcow2'

    def test_a_copy_of_a_stopped_guest_is_one_point_in_time(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'),
                           churn=True)
        guest.wait_writes_on()
        guest.domain.destroy()
        copies = [self._copy(guest, disk, f'copy.{disk.target}')
                  for disk in guest.disks]
        read = images.check_point_in_time(copies)
        self.assertIn(read[0][0], (guest.counter(), guest.counter() + 1))
        for copy, disk in zip(copies, guest.disks):
            images.qemu_img_check(copy[0])
            images.compare(copy, disk.image)
        self.assertRaises(AssertionError, images.compare, *copies)

    def test_copies_of_two_moments_are_told(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        copies = []
        for disk in guest.disks:
            guest.wait_writes_on()
            guest.domain.suspend()
            copies.append(self._copy(guest, disk, f'copy.{disk.target}'))
            guest.domain.resume()
        self.assertRaises(images.InconsistentImage,
                          images.check_point_in_time, copies)

    def test_the_backing_files_data_is_in_a_copy(self):
        guest = self.guest(guests.Disk('overlay'))
        guest.domain.destroy()
        copy, _format = self._copy(guest, guest.disks[0], 'copy')
        images.run('qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', copy,
                   guest.directory / 'raw')
        with open(guest.directory / 'raw', 'rb') as raw:
            raw.seek(guests.BACKING_OFFSET)
            self.assertEqual(guests.BACKING_DATA,
                             raw.read(len(guests.BACKING_DATA)))
