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

"""What reading a frozen disk leaves to its guest, which writes all the time.

Ratios within one run: a guest's rounds while its disk is read, against its
rounds while nothing is.
"""

import contextlib
import statistics
import threading
import time
import typing as ty

from nova_snapshot_ext import host as hosts
from nova_snapshot_ext import plugins
from nova_snapshot_ext.transfers import streamed
from nova_snapshot_ext import undo
from tests.functional import guests
from tests.functional import images
from tests.functional import test_flows

SIZE = 2048 * guests.MIB
#: seconds of each look
LOOK_S = 4.0


class PaceTest(test_flows.SnapshotTestCase):

    def setUp(self):
        super().setUp()
        self.busy = self.guest(
            guests.Disk('raw', size=SIZE), pace_ms=0, start=False)
        # Stored, and not zeroes.
        for offset in range(0, SIZE, SIZE // 2):
            images.run('qemu-io', '-f', 'raw', '-c',
                       f'write -q -P 0x5a {offset} {SIZE // 2}',
                       self.busy.disks[0].path)
        self.busy.start()

    def rounds(self) -> float:
        """How many the guest does in a second, as of now."""
        began, before = time.monotonic(), self.busy.counter()
        time.sleep(LOOK_S)
        return (self.busy.counter() - before) / (time.monotonic() - began)

    @contextlib.contextmanager
    def read(self, **changes: ty.Any) -> ty.Iterator[list[float]]:
        """Read the frozen disk from end to end, again and again.

        :returns: gets MiB a second, at the end
        """
        ours = self.ours(self.busy)
        request = self.request(**changes)
        flow = plugins.load(plugins.FLOWS, 'backup', 'test')()
        ended = threading.Event()
        speed: list[float] = []
        with undo.UndoLog.create(
                str(self.state), ours, hosts.PlainHost()) as log:
            with flow.freeze(ours, ours.disks(), request, log) as frozen:
                with streamed.StreamedTransfer().image(
                        frozen.disks[0], request, log) as image:

                    def swallow() -> None:
                        began, done = time.monotonic(), 0
                        while not ended.is_set():
                            with image.open() as file:
                                while not ended.is_set() and (
                                        chunk := file.read(1024 ** 2)):
                                    done += len(chunk)
                        speed.append(done / 1024 ** 2
                                     / (time.monotonic() - began))
                    thread = threading.Thread(target=swallow)
                    thread.start()
                    try:
                        # It finds its pace first.
                        time.sleep(2)
                        yield speed
                    finally:
                        ended.set()
                        thread.join()

    def test_guest_keeps_its_share_while_its_disk_is_read(self):
        found: dict[int | None, list[float]] = {
            None: [], 0: [], 60: [], 95: []}
        speeds: dict[int, list[float]] = {0: [], 60: [], 95: []}
        for _ in range(3):
            found[None].append(self.rounds())
            for share, read in speeds.items():
                with self.read(guest_share=share) as speed:
                    found[share].append(self.rounds())
                read += speed
        idle, *read = [statistics.median(each) for each in found.values()]
        starved, usual, most = [each / idle for each in read]
        print('guest_share 0, 60, 95: the guest kept '
              f'{starved:.0%}, {usual:.0%}, {most:.0%} of {idle:.0f} rounds '
              'a second, and ' + ', '.join(
                  f'{statistics.median(each):.0f}'
                  for each in speeds.values())
              + ' MiB a second were read', flush=True)
        # It goes on: a second of rest for 8 MiB, and the first seconds are
        # for the layout.
        self.assertGreater(statistics.median(speeds[95]), 2)
        self.assertGreater(usual, 1.5 * starved)
        self.assertGreater(most, usual * 0.8)
        self.assert_whole(self.busy)
