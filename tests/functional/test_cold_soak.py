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

"""What the flow cold rests on: an internal snapshot does not change.

Read while the guest runs on, writes, allocates and discards, it must be what
the disk was while the guest was stopped, bit by bit. How often that is tried
is COLD_SOAK_ROUNDS (default 3).
"""

import os

from nova_snapshot_ext import guest as our_guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext import plugins
from nova_snapshot_ext import undo
from tests.functional import guests
from tests.functional import images
from tests.functional import test_flows

ROUNDS = int(os.environ.get('COLD_SOAK_ROUNDS', '3'))


class CopyingGuest(our_guests.Guest):
    """Copies its disk each time before it is started, so while stopped."""

    disk: guests.MadeDisk
    copy: str

    def start(self) -> None:
        images.run('qemu-img', 'convert', '-f', self.disk.format, '-O',
                   'raw', self.disk.path, self.copy)
        super().start()


class ColdSoakTest(test_flows.SnapshotTestCase):

    def test_extraction_from_a_running_image_is_what_it_was_stopped(self):
        guest = self.guest(
            guests.Disk('overlay', size=128 * guests.MIB), churn=True,
            pace_ms=0)
        ours = CopyingGuest(guest.domain, self.libvirtd.uri)
        ours.disk = guest.disks[0]
        ours.copy = str(self.staging / 'stopped')
        for number in range(ROUNDS):
            self._round(guest, ours)
            print(f'cold soak: {number + 1} of {ROUNDS} identical',
                  flush=True)
        guest.domain.destroy()
        images.qemu_img_check(guest.disks[0].path)

    def _round(self, guest: guests.Guest, ours: CopyingGuest) -> None:
        guest.wait_writes_on(3)
        flow = plugins.load(plugins.FLOWS, 'cold', 'test')()
        running = str(self.staging / 'running')
        with undo.UndoLog.create(
                str(self.state), ours, hosts.PlainHost()) as log:
            with flow.freeze(ours, ours.disks(), self.request(),
                             log) as frozen:
                guest.wait_writes_on(20)
                export = frozen.disks[0]
                images.run(
                    'qemu-img', 'convert', '-f', 'raw', '-O', 'raw',
                    f'nbd+unix:///{export.export}?socket={export.socket}',
                    running)
                guest.wait_writes_on(1)
        images.compare((running, 'raw'), (ours.copy, 'raw'))
        images.check_point_in_time([(running, 'raw')])
        self.assert_no_internal_snapshot(guest.disks[0])
        for path in (running, ours.copy):
            os.unlink(path)
