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

"""A snapshot is killed at every step, and its guest is whole again.

A step is where a snapshot writes a line into its undo log, and where it has
just done something to its guest. There it is killed, and nothing is started
again. First the guard lives, then it is killed too and ``nova-snapshot
recover`` is run. What each took is printed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
import typing

import libvirt

from nova_snapshot_ext import undo
from tests.functional import guests
from tests.functional import images
from tests.functional import test_flows

# Seconds in which a guest that was not stopped is whole, where there are
# processors for all that runs; to one that was stopped, those come that it
# On a quiet machine it takes less than 2, as is printed.
LIMIT_S = 5.0
#: each so many steps is tried; all by KILLED_EVERY=1, which takes half an hour
EVERY = int(os.environ.get('KILLED_EVERY', '6'))

# Takes a snapshot, and stops at the step of a number for the test to kill it;
# at 0 it takes all steps, and says what they are.
STOPPING = textwrap.dedent('''
    import sys, time
    import libvirt
    from nova_snapshot_ext import guest as guests, host, request, selection
    from nova_snapshot_ext import snapshot, undo
    from nova_snapshot_ext.images import base, directory

    last = sys.argv[-1]
    step = 0

    def reached(what):
        global step
        step += 1
        if last == '0':
            print(what, flush=True)
        elif step == int(last):
            print('here', flush=True)
            time.sleep(600)

    write = undo.append

    def append(descriptor, path, record):
        what = (record.get('step') or
                f'entry {record["entry"]} done' if 'entry' in record
                else 'header')
        if 'undo_log' not in record:
            reached(f'before {what}')
        write(descriptor, path, record)
        reached(f'after {what}')
    undo.append = append

    def noted(name):
        real = getattr(guests.Guest, name)

        def call(self, *arguments, **more):
            found = real(self, *arguments, **more)
            reached(f'{name} done')
            return found
        setattr(guests.Guest, name, call)
    for name in ('save_memory', 'start', 'resume', 'suspend', 'begin_backup',
                 'end_backup', 'start_copy', 'end_block_job',
                 'freeze_filesystems', 'thaw_filesystems', 'destroy',
                 'take_domain_snapshot', 'define_domain_snapshot',
                 'forget_domain_snapshot', 'revert_to',
                 'take_external_snapshot', 'define_disks', 'restore_memory',
                 'start_commit', 'pivot'):
        noted(name)
''')
TAKE = STOPPING + textwrap.dedent('''
    uri, uuid, flow, staging, state, images, last = sys.argv[1:]
    ours = guests.Guest.find(libvirt.open(uri), uri, uuid)
''') + test_flows.WANTED + textwrap.dedent('''\
    planned = snapshot.plan(
        ours, host.PlainHost(), selection.Wish((flow,), 'test', True),
        ['streamed'], wanted)
    snapshot.take(
        ours, host.PlainHost(), planned, wanted,
        directory.DirectoryService(base.Destination(directory=images)),
        base.Description('killed', 'qcow2', 'bare', {}))
''')


class KilledTestCase(test_flows.SnapshotTestCase):
    """Kills who works on a guest, and sees what becomes of it."""

    #: takes a snapshot
    script = TAKE

    def setUp(self) -> None:
        os.environ.setdefault('OS_TEST_TIMEOUT', '1500')
        super().setUp()
        self.configuration = self.work / 'snapshot.conf'
        self.configuration.write_text(
            f'[snapshot_ext]\nstate_directory = {self.state}\n')

    def _taking(self, guest: guests.Guest, flow: str,
                last: int) -> 'subprocess.Popen[str]':
        process = subprocess.Popen(
            [sys.executable, '-c', self.script, self.libvirtd.uri, guest.uuid,
             flow, str(self.staging), str(self.state), str(self.images),
             str(last)], stdout=subprocess.PIPE, text=True)
        self.addCleanup(self._end, process)
        return process

    def _end(self, process: 'subprocess.Popen[str]') -> None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()

    def _steps(self, guest: guests.Guest, flow: str) -> list[str]:
        process = self._taking(guest, flow, 0)
        assert process.stdout is not None
        steps = process.stdout.read().splitlines()
        self.assertEqual(0, process.wait())
        self._forget_image()
        return steps

    def _forget_image(self) -> None:
        for path in self.images.iterdir():
            path.unlink()

    def _killed_at(self, guest: guests.Guest, flow: str, number: int,
                   guard_too: bool) -> bool:
        """:returns: whether the guest was off when the snapshot was killed"""
        process = self._taking(guest, flow, number)
        assert process.stdout is not None
        self.assertEqual('here\n', process.stdout.readline())
        off = not guest.domain.isActive()
        if guard_too:
            for pid in self._guards():
                os.kill(pid, signal.SIGKILL)
        process.send_signal(signal.SIGKILL)
        process.wait()
        return off

    def _guards(self) -> list[int]:
        found = []
        for pid in os.listdir('/proc'):
            if pid.isdigit():
                with contextlib.suppress(OSError):
                    with open(f'/proc/{pid}/cmdline') as cmdline:
                        words = cmdline.read().split('\0')
                    if 'nova_snapshot_ext.guard' in words and any(
                            str(self.state) in word for word in words):
                        found.append(int(pid))
        return found

    def _wait_whole(self, guest: guests.Guest, since: float) -> float:
        """:returns: seconds until the guest ran, wrote and had no job"""
        at = guest.counter()
        while not self._is_whole(guest):
            self.assertLess(time.monotonic() - since, 60)
            time.sleep(0.02)
        guest.wait_counter(at + 1, 60)
        return time.monotonic() - since

    def _is_whole(self, guest: guests.Guest) -> bool:
        try:
            return (guest.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
                    and bool(guest.domain.isPersistent())
                    and not guest.domain.hasManagedSaveImage(0)
                    and guest.domain.jobStats()['type']
                    == libvirt.VIR_DOMAIN_JOB_NONE
                    and not guest.domain.blockJobInfo('vda', 0))
        except libvirt.libvirtError:
            return False

    def _wait_clean(self, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while list(self.state.iterdir()) or list(self.staging.iterdir()):
            self.assertLess(time.monotonic(), deadline,
                            'something was left')
            time.sleep(0.05)
        for path in self.images.iterdir():
            # Whole, since it has its name, or else not there.
            self.assertIn(path.name, ('killed.qcow2', 'killed.qcow2.json'))
        self._forget_image()

    def _recover(self, *arguments: str, expect: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, '-m', 'nova_snapshot_ext.cmd.snapshot',
             '--config-file', str(self.configuration), 'recover',
             *arguments], capture_output=True, text=True)
        self.assertEqual(expect, done.returncode, done.stderr)
        self.assertNotIn('Traceback', done.stderr)
        return done.stdout


class KilledTest(KilledTestCase):

    def _start_s(self, guest: guests.Guest) -> float:
        """Seconds that libvirt takes to start it from its saved memory."""
        guest.domain.managedSave(0)
        begun = time.monotonic()
        guest.domain.create()
        return time.monotonic() - begun

    def _kill_at_each(self, flow: str, guard_too: bool,
                      disk: typing.Any = 'overlay',
                      agent: bool = False) -> None:
        guest = (self.guest(guests.Disk(disk), mode='fs', agent=True)
                 if agent else self.guest(guests.Disk(disk)))
        if agent:
            guest.wait_agent()
        start_s = self._start_s(guest)
        steps = self._steps(guest, flow)
        self.assertLess(10, len(steps))
        missed = []
        # Other steps where the guard is killed, too.
        first = EVERY // 2 if guard_too else 0
        for number, step in list(enumerate(steps, 1))[first::EVERY]:
            off = self._killed_at(guest, flow, number, guard_too)
            since = time.monotonic()
            if guard_too:
                self.assertIn('would be done', self._recover('--dry-run'))
                since = time.monotonic()
                self.assertIn(': done', self._recover())
            seconds = self._wait_whole(guest, since)
            load = os.getloadavg()[0] / (os.cpu_count() or 1)
            limit = LIMIT_S * max(1.0, load) + start_s * off
            print(f'{flow} {disk} killed at {number:2} {step}: whole after '
                  f'{seconds:.2f} s{" (it was off)" * off}', flush=True)
            if seconds > limit and not guard_too:
                missed.append((step, seconds, limit))
            if step == 'after header' and not guard_too:
                # No guard stands yet; nothing was done, and nothing is left
                # but the log, which the next snapshot takes for none.
                self._recover()
            self._wait_clean()
            if agent:
                self.assertEqual(0, guest.domain.fsThaw())
        self.assert_no_internal_snapshot(guest.disks[0])
        self.assertEqual([], missed)
        guest.domain.destroy()
        if guest.disks[0].format == 'qcow2':
            images.qemu_img_check(guest.disks[0].path)

    def _stopped(self, guest: guests.Guest) -> str:
        """Kill a snapshot and its guard when they have stopped the guest.

        :returns: the path of its undo log
        """
        steps = self._steps(guest, 'cold')
        self.assertTrue(self._killed_at(
            guest, 'cold', steps.index('save_memory done') + 1, True))
        [path] = self.state.glob('*.undo')
        return str(path)

    def test_nothing_is_started_after_a_reboot(self):
        guest = self.guest(guests.Disk('overlay'))
        path = self._stopped(guest)
        with open(path) as file:
            content = file.read()
        self.assertIn(undo.boot_id(), content)
        with open(path, 'w') as file:
            file.write(content.replace(undo.boot_id(), 'another'))
        self.assertIn('from before a reboot', self._recover('--dry-run'))
        self.assertIn(': done', self._recover('--force'))
        self._wait_clean()
        # Whether it runs is Nova's to say; its memory is there for that.
        self.assertFalse(guest.domain.isActive())
        self.assertTrue(guest.domain.hasManagedSaveImage(0))
        guest.domain.create()
        self.assert_whole(guest)

    def test_guest_that_another_paused_stays_paused(self):
        guest = self.guest(guests.Disk('raw'))
        steps = self._steps(guest, 'cold')
        self._killed_at(guest, 'cold', steps.index('resume done') + 1, True)
        guest.domain.suspend()
        self.assertIn('let_run', self._recover('--dry-run'))
        self.assertIn(': done', self._recover())
        self._wait_clean()
        self.assertEqual([libvirt.VIR_DOMAIN_PAUSED,
                          libvirt.VIR_DOMAIN_PAUSED_USER],
                         guest.domain.state())
        guest.domain.resume()
        self.assert_whole(guest)

    def test_frozen_guest_that_was_reset_is_not_asked_for_ever(self):
        guest = self.guest(guests.Disk('overlay'), mode='fs', agent=True)
        guest.wait_agent()
        steps = self._steps(guest, 'backup')
        process = self._taking(
            guest, 'backup', steps.index('begin_backup done') + 1)
        assert process.stdout is not None
        self.assertEqual('here\n', process.stdout.readline())
        guest.domain.reset(0)
        process.kill()
        # libvirt itself is busy for a minute with the agent that ended.
        self._wait_clean(180)
        guest.wait_writes_on(3, guests.BOOT_TIMEOUT)
        self.assertTrue(self._is_whole(guest))

    def test_libvirt_that_is_away_is_said_and_waited_for(self):
        guest = self.guest(guests.Disk('overlay'))
        path = self._stopped(guest)
        self.libvirtd.kill()
        self.assertIn(f'{path}: failed', self._recover(expect=1))
        self.libvirtd.start()
        self.assertIn(f'{path}: done', self._recover())
        self._wait_clean()
        connection = self.libvirtd.connect()
        self.addCleanup(connection.close)
        domain = connection.lookupByUUIDString(guest.uuid)
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING, domain.state()[0])
        guest.wait_writes_on(2)

    def test_backup_and_its_guard_lives(self):
        self._kill_at_each('backup', False, agent=True)

    def test_live_and_its_guard_lives(self):
        self._kill_at_each('live', False, agent=True)

    def test_cold_and_its_guard_lives(self):
        self._kill_at_each('cold', False)

    def test_cold_of_a_raw_disk_and_its_guard_lives(self):
        self._kill_at_each('cold', False, disk='raw')

    def test_backup_and_its_guard(self):
        self._kill_at_each('backup', True, agent=True)

    def test_live_and_its_guard(self):
        self._kill_at_each('live', True, agent=True)

    def test_cold_and_its_guard(self):
        self._kill_at_each('cold', True)

    def test_cold_of_a_raw_disk_and_its_guard(self):
        self._kill_at_each('cold', True, disk='raw')
