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

"""Snapshots beside each other, and beside what else is done to a guest."""

import collections.abc
import concurrent.futures
import threading
import time

import libvirt

from nova_snapshot_ext import exception
from tests.functional import guests
from tests.functional import test_flows

#: read through the guest's QEMU, from a copy of the disk, and from an internal
#: snapshot in it
FLOWS = ('backup', 'live', 'cold')


class ParallelTest(test_flows.SnapshotTestCase):

    def test_two_guests_at_the_same_time(self):
        pair = [self.guest(guests.Disk('overlay')) for _ in range(2)]
        for flow, transfer in zip(FLOWS, ('streamed', 'staged', 'streamed')):
            # Neither goes on before both are on their way.
            both = threading.Barrier(2, timeout=120)

            def take(guest, flow=flow, transfer=transfer, both=both):
                before = guest.wait_writes_on()
                _, image = self.take(
                    guest, flow, f'{flow}-{guest.name}', transfer,
                    before_upload=both.wait)
                self.assert_good(image, before, guest.counter())

            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                list(pool.map(take, pair))
            for guest in pair:
                self.assert_whole(guest)


class MeanwhileTest(test_flows.SnapshotTestCase):
    """What is done to a guest whose frozen disk is being read."""

    def setUp(self):
        super().setUp()
        self.counting = self.guest(guests.Disk('overlay'))

    def take_meanwhile(
            self, flow: str,
            call: collections.abc.Callable[[], object]) -> str:
        """Take a snapshot, with something done before its bytes are read.

        What is not read through the guest's QEMU must not mind.

        :returns: what was said of one that is
        """
        before = self.counting.wait_writes_on()
        taken = (self.counting, flow, flow, 'streamed')
        if flow == 'backup':
            error = self.assertRaises(
                exception.TransferFailed, self.take, *taken,
                before_upload=call)
            self.assertEqual([], list(self.images.iterdir()))
            return str(error)
        _, image = self.take(*taken, before_upload=call)
        self.assert_good(image, before, self.counting.counter())
        return ''

    def test_guest_is_made_anew(self):
        for flow in FLOWS:
            said = self.take_meanwhile(flow, self.make_anew)
            if flow == 'backup':
                self.assertIn('was started anew', said)
            self.assert_whole(self.counting)

    def make_anew(self) -> None:
        """As a hard reboot by Nova does."""
        old = self.counting.domain
        xml = old.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        old.destroy()
        old.undefine()
        self.counting.domain = self.connection.defineXML(xml)
        self.counting.start()

    def test_guest_shuts_itself_off(self):
        for flow in FLOWS:
            said = self.take_meanwhile(flow, self.shut_off)
            if flow == 'backup':
                self.assertIn('was shut off', said)
            self.assertFalse(self.counting.domain.isActive())
            self.assertFalse(self.counting.domain.hasManagedSaveImage(0))
            self.assert_no_internal_snapshot(self.counting.disks[0])
            self.counting.start()
        self.assert_whole(self.counting)

    def shut_off(self) -> None:
        self.counting.domain.shutdown()
        deadline = time.monotonic() + 60
        while self.counting.domain.isActive():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.1)
