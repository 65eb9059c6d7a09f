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

"""A guest is whole again within seconds after its snapshot was killed."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time

import libvirt

from tests.functional import guests
from tests.functional import images
from tests.functional import test_flows

# Begins a snapshot and stops at a place, for the test to kill it there.
_BEGIN = textwrap.dedent('''
    import sys, time
    import libvirt
    from nova_snapshot_ext import guard, guest, host, plugins, quiesce
    from nova_snapshot_ext import request, snapshot, undo

    uri, uuid, flow, place, staging, state = sys.argv[1:]

    def stop(*arguments):
        print('here', flush=True)
        time.sleep(600)

    ours = guest.Guest.find(libvirt.open(uri), uri, uuid)
''') + test_flows.WANTED + textwrap.dedent('''\
    if place != 'frozen':
        original = getattr(guest.Guest, place)
        if place == 'thaw_filesystems':
            setattr(guest.Guest, place, stop)
        else:
            def after(self, *arguments, **more):
                original(self, *arguments, **more)
                stop()
            setattr(guest.Guest, place, after)
    with guard.Guard() as guarding:
        with undo.UndoLog.create(state, ours, host.PlainHost()) as log:
            guarding.watch(log)
            served = plugins.load(plugins.FLOWS, flow, 'test')()
            with served.freeze(ours, ours.disks(), wanted, log):
                stop()
''')


class GuardTest(test_flows.SnapshotTestCase):

    def _begun(self, guest: guests.Guest, flow: str,
               place: str) -> 'subprocess.Popen[str]':
        process = subprocess.Popen(
            [sys.executable, '-c', _BEGIN, self.libvirtd.uri, guest.uuid,
             flow, place, str(self.staging), str(self.state)],
            stdout=subprocess.PIPE, text=True)
        self.addCleanup(self._end, process)
        self.assertEqual('here\n', process.stdout.readline())
        return process

    def _end(self, process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        process.stdout.close()

    def _killed(self, guest: guests.Guest, flow: str, place: str) -> float:
        """:returns: seconds until the guest wrote again"""
        process = self._begun(guest, flow, place)
        process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        process.wait()
        at = guest.counter()
        guest.wait_counter(at + 2, 60)
        return time.monotonic() - killed

    def _wait_clean(self) -> None:
        deadline = time.monotonic() + 60
        while list(self.state.iterdir()) or list(self.staging.iterdir()):
            self.assertLess(time.monotonic(), deadline,
                            'the guard left something')
            time.sleep(0.1)

    def test_stopped_guest_is_started(self):
        guest = self.guest(guests.Disk('overlay'))
        seconds = self._killed(guest, 'cold', 'save_memory')
        self.addDetail('seconds', test_flows.text(f'{seconds:.2f}'))
        self._wait_clean()
        self.assert_whole(guest)

    def test_guest_that_waits_for_its_job_runs_on(self):
        # Started paused; then with the job begun; then it runs and is read.
        for place in ('start', 'begin_backup', 'frozen'):
            guest = self.guest(guests.Disk('raw'))
            seconds = self._killed(guest, 'cold', place)
            self.addDetail(place, test_flows.text(f'{seconds:.2f}'))
            self._wait_clean()
            self.assert_whole(guest)
            self.assertIsNone(self.ours(guest).job())
            guest.destroy()

    def test_paused_guest_stays_paused_when_its_job_is_killed(self):
        for place in ('start', 'begin_backup', 'frozen'):
            guest = self.guest(guests.Disk('raw'))
            guest.domain.suspend()
            process = self._begun(guest, 'cold', place)
            process.send_signal(signal.SIGKILL)
            process.wait()
            self._wait_clean()
            self.assertEqual(libvirt.VIR_DOMAIN_PAUSED,
                             guest.domain.state()[0])
            self.assertIsNone(self.ours(guest).job())
            guest.domain.resume()
            self.assert_whole(guest)
            guest.destroy()

    def test_internal_snapshot_is_deleted(self):
        guest = self.guest(guests.Disk('overlay'))
        self._killed(guest, 'cold', 'frozen')
        self._wait_clean()
        self.assert_whole(guest)

    def test_block_copy_is_ended(self):
        guest = self.guest(guests.Disk('overlay'))
        self._killed(guest, 'live', 'start_copy')
        self._wait_clean()
        self.assert_whole(guest)

    def test_frozen_guest_is_thawed(self):
        guest = self.guest(guests.Disk('overlay'), mode='fs', agent=True)
        guest.wait_agent()
        self._killed(guest, 'live', 'freeze_filesystems')
        self._wait_clean()
        self.assertEqual(0, guest.domain.fsThaw())
        self.assert_whole(guest)

    def test_frozen_guest_is_thawed_though_its_owner_lives(self):
        guest = self.guest(guests.Disk('overlay'), mode='fs', agent=True)
        guest.wait_agent()
        process = self._begun(guest, 'live', 'freeze_filesystems')
        at = guest.counter()
        # Its time is over after freeze_timeout, 10 seconds.
        guest.wait_counter(at + 2, 40)
        self.assertIsNone(process.poll())
        self.assertEqual(0, guest.domain.fsThaw())
        process.kill()
        self._wait_clean()

    def test_guest_is_started_though_libvirtd_was_away(self):
        guest = self.guest(guests.Disk('overlay'))
        process = self._begun(guest, 'cold', 'save_memory')
        self.libvirtd.kill()
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(3)
        at = guest.counter()
        self.libvirtd.start()
        guest.wait_counter(at + 2, 60)
        self._wait_clean()
        connection = self.libvirtd.connect()
        self.addCleanup(connection.close)
        domain = connection.lookupByUUIDString(guest.uuid)
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING, domain.state()[0])
        self.assertTrue(domain.isPersistent())

    def test_guard_outlives_the_signals_of_a_service_manager(self):
        guest = self.guest(guests.Disk('overlay'))
        process = self._begun(guest, 'cold', 'save_memory')
        for pid in os.listdir('/proc'):
            if pid.isdigit():
                with contextlib.suppress(OSError):
                    with open(f'/proc/{pid}/cmdline') as cmdline:
                        words = cmdline.read().split('\0')
                    if 'nova_snapshot_ext.guard' in words and any(
                            str(self.state) in word for word in words):
                        os.kill(int(pid), signal.SIGTERM)
        process.send_signal(signal.SIGKILL)
        process.wait()
        guest.wait_writes_on(2)
        self._wait_clean()
        self.assert_whole(guest)
        images.qemu_img_check(self._off(guest))

    def _off(self, guest: guests.Guest) -> str:
        guest.domain.destroy()
        return str(guest.disks[0].path)
