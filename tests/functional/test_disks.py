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

"""All disks of a guest at one instant, each an image: all of them or none."""

import json
import pathlib
import signal
import subprocess
import textwrap
import time

import libvirt

from nova_snapshot_ext import exception
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import snapshot
from tests.functional import guests
from tests.functional import images
from tests.functional import test_cli
from tests.functional import test_domain
from tests.functional import test_flows
from tests.functional import test_killed

ALL = requests.Disks.ALL


class AllDisksTestCase(test_flows.SnapshotTestCase):

    def filled_guest(self, *disks: guests.Disk) -> guests.Guest:
        """A guest with 32 MiB in each disk, which take a while to be read."""
        guest = self.guest(*disks, start=False)
        for disk in guest.disks:
            images.run('qemu-io', '-f', disk.format, '-c',
                       'write -q -P 0x5a 1M 32M', disk.path)
        guest.start()
        return guest

    def take_all(self, guest: guests.Guest, flow: str, name: str,
                 transfer: str, **changes) -> snapshot.Result:
        """Take a snapshot of all disks, and see that it is one instant."""
        before = guest.wait_writes_on()
        result, _ = self.take(guest, flow, name, transfer, disks=ALL,
                              **changes)
        after = guest.counter()
        self.assertEqual((flow, transfer), (result.flow, result.transfer))
        self.assert_one_instant(result, guest, before, after,
                                changes.get('image_format', 'qcow2'))
        return result

    def assert_one_instant(self, result: snapshot.Result,
                           guest: guests.Guest, before: int, after: int,
                           form: str = 'qcow2') -> None:
        self.assertEqual([disk.target for disk in guest.disks],
                         [image.device for image in result.images])
        counters = images.check_point_in_time(
            [(image.location, form) for image in result.images])
        self.assertTrue(before <= counters[0][0] <= after + 1,
                        f'{before} {counters} {after}')
        groups = set()
        for image, disk in zip(result.images, guest.disks, strict=True):
            path = pathlib.Path(image.location)
            if form == 'qcow2':
                images.qemu_img_check(path)
            self.assertEqual(image.length, path.stat().st_size)
            self.assertEqual(disk.disk.size,
                             images.virtual_size((path, form)))
            found = json.loads(
                pathlib.Path(f'{path}.json').read_text())['properties']
            groups.add(found['snapshot_ext_group'])
            self.assertEqual(
                (disk.target, str(len(guest.disks)), str(disk.disk.size),
                 result.flow),
                (found['snapshot_ext_device'], found['snapshot_ext_disks'],
                 found['snapshot_ext_size'], found['snapshot_ext_flow']))
        self.assertEqual(1, len(groups))
        self.assertEqual(sum(image.length for image in result.images),
                         result.length)


class AllDisksTest(AllDisksTestCase):

    def test_each_flow_by_each_transfer(self):
        guest = self.guest(
            guests.Disk('overlay'), guests.Disk('qcow2', 96 * guests.MIB),
            guests.Disk('overlay', 32 * guests.MIB), churn=True)
        for flow in ('backup', 'live', 'cold'):
            for transfer, form in test_flows.BOTH_TRANSFERS:
                self.take_all(guest, flow, f'{flow}-{transfer}-{form}',
                              transfer, image_format=form)
                self.assert_whole(guest)

    def test_disks_of_every_kind_together(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'),
                           guests.Disk('block'))
        for flow in ('backup', 'live', 'cold'):
            self.take_all(guest, flow, flow, 'streamed')
            self.assert_whole(guest)

    def test_guest_that_is_off(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        guest.domain.destroy()
        at = guest.counter()
        for transfer in ('staged', 'streamed'):
            result, _ = self.take(guest, 'cold', transfer, transfer,
                                  disks=ALL)
            self.assert_one_instant(result, guest, at, at)
            for image, disk in zip(result.images, guest.disks, strict=True):
                images.compare((image.location, 'qcow2'), disk.image)

    def test_file_systems_are_quiesced(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'),
                           mode='fs', agent=True)
        guest.wait_agent()
        before = guest.wait_writes_on()
        result, _ = self.take(guest, 'backup', disks=ALL,
                              quiesce=requests.Quiesce.REQUIRED)
        counters = images.check_filesystems_point_in_time(
            [(image.location, 'qcow2') for image in result.images],
            must_be_clean=True)
        self.assertTrue(before <= counters[0][0] <= guest.counter() + 1)
        self.assert_whole(guest)

    def test_progress_goes_on_over_all(self):
        guest = self.filled_guest(
            guests.Disk('overlay'), guests.Disk('qcow2'))
        told = []
        result = self.take_all(
            guest, 'backup', 'image', 'streamed',
            progress=lambda *each: told.append(each))
        self.assertEqual((result.length, result.length), told[-1])

    def test_disk_that_can_not_be_read_is_an_obstacle(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        error = self.assertRaises(
            exception.NoFlowServes, self.take, guest, 'domain', disks=ALL)
        self.assertIn('vdb can not hold an internal snapshot', str(error))
        # The best that can is taken where nobody asked for one by name.
        before = guest.wait_writes_on()
        result, _ = self.take(guest, 'domain', 'second', 'streamed',
                              others=('backup',), disks=ALL)
        self.assertEqual('backup', result.flow)
        self.assert_one_instant(result, guest, before, guest.counter())
        self.assert_whole(guest)

    def test_nothing_is_left_when_one_of_them_fails(self):
        guest = self.filled_guest(
            guests.Disk('overlay'), guests.Disk('qcow2'))
        for transfer in ('staged', 'streamed'):
            for flow in ('backup', 'live', 'cold'):
                parts = []

                def fail(done, total, parts=parts):
                    # The image of vdb is whole, and that of vda begun.
                    parts[:] = [path for path in self.images.iterdir()
                                if path.suffix != '.json']
                    if done and len(parts) == 2:
                        raise exception.ImageGone('nobody wants it')
                self.assertRaises(
                    exception.ImageGone, self.take, guest, flow, 'image',
                    transfer, disks=ALL, progress=fail)
                self.assertEqual(2, len(parts))
                self.assertEqual([], list(self.images.iterdir()))
                self.assert_whole(guest)

    def test_guest_that_ends_takes_all_of_them_with_it(self):
        guest = self.filled_guest(
            guests.Disk('overlay'), guests.Disk('qcow2'))

        def end(done, total):
            # What was read before may still be told of afterwards.
            if (done and len(list(self.images.glob('.*[0-9a-f]'))) == 2
                    and guest.domain.isActive()):
                guest.domain.destroy()
        self.assertRaises(
            exception.TransferFailed, self.take, guest, 'backup', 'image',
            'streamed', disks=ALL, progress=end, bandwidth=8)
        self.assertEqual([], list(self.images.iterdir()))


class DomainOfAllTest(test_domain.DomainTestCase, AllDisksTestCase):

    def test_it_stays_and_gives_an_image_of_each(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('qcow2'))
        for memory in (True, False):
            before = guest.wait_writes_on()
            title = f'memory-{memory}'
            result, _ = self.take(
                guest, 'domain', title, 'streamed', disks=ALL,
                domain=requests.DomainSnapshot(memory=memory, title=title))
            self.assert_one_instant(result, guest, before, guest.counter())
            root, further = (json.loads(pathlib.Path(
                f'{image.location}.json').read_text())['properties']
                for image in result.images)
            self.assertIn('snapshot_ext_rollback', root)
            self.assertNotIn('snapshot_ext_rollback', further)
            record = self.records(guest).find(title)
            self.assertEqual(result.location, record.image_id)
            self.assert_lives(guest)
        self.delete_all(guest)


class CommandLineTest(AllDisksTestCase, test_cli.CommandTestCase):

    def test_each_disk_is_an_image(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        before = guest.wait_writes_on()
        done = self.run_command(
            'create', guest.name, '--to', self.images, '--name', 'one',
            '--staging', self.staging, '--disks', 'all', '--json')
        result = json.loads(done.stdout)
        result['images'] = tuple(
            snapshot.DiskImage(**image) for image in result['images'])
        self.assertEqual(
            [str(self.images / name)
             for name in ('one.qcow2', 'one-vdb.qcow2')],
            [image.location for image in result['images']])
        del result['domain']
        self.assert_one_instant(
            snapshot.Result(**result), guest, before, guest.counter())
        self.assert_whole(guest)

    def test_lines_name_them(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        done = self.run_command(
            'create', guest.name, '--to', self.images, '--name', 'one',
            '--staging', self.staging, '--disks', 'all')
        self.assertEqual(
            [f'  vda: {self.images}/one.qcow2,',
             f'  vdb: {self.images}/one-vdb.qcow2,'],
            [' '.join(line.split(' ')[:4])
             for line in done.stdout.splitlines()[1:]])

    def test_taken_name_is_refused_before_the_guest_is_touched(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        taken = self.images / 'one-vdb.qcow2'
        taken.touch()
        done = self.run_command(
            'create', guest.name, '--to', self.images, '--name', 'one',
            '--staging', self.staging, '--disks', 'all', expect=3)
        self.assertIn(f'{taken} exists already', done.stderr)
        self.assertEqual([taken], list(self.images.iterdir()))

    def test_nothing_is_left_when_it_is_killed(self):
        guest = self.filled_guest(
            guests.Disk('overlay'), guests.Disk('qcow2'))
        self.configuration.write_text(
            f'{self.configuration.read_text()}bandwidth = 8\n')
        for what in (signal.SIGINT, signal.SIGKILL):
            with subprocess.Popen(
                    self.command('create', guest.name, '--to', self.images,
                                 '--name', 'one', '--staging', self.staging,
                                 '--disks', 'all'),
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    text=True,
                    # Whoever runs tests in the background ignores it.
                    preexec_fn=lambda: signal.signal(
                        signal.SIGINT, signal.SIG_DFL)) as process:
                # That of vdb is whole, and that of vda begun.
                self.wait(lambda: len(list(
                    self.images.glob('.*.json'))) == 1, process)
                process.send_signal(what)
                process.communicate()
            self.wait(lambda: not list(self.state.iterdir()))
            self.assertEqual([], list(self.images.iterdir()))
            self.assert_whole(guest)

    def wait(self, true, process=None) -> None:
        deadline = time.monotonic() + 120
        while not true():
            self.assertLess(time.monotonic(), deadline)
            if process is not None:
                self.assertIsNone(process.poll())
            time.sleep(0.02)


class KilledTest(test_killed.KilledTestCase):
    """Killed where all is sent: all images are there, or none."""

    script = test_killed.TAKE.replace(
        'planned = snapshot.plan(', textwrap.dedent('''\
            import dataclasses
            wanted = dataclasses.replace(wanted, disks=request.Disks.ALL)
            planned = snapshot.plan('''), 1)

    NAMES = {'killed.qcow2', 'killed.qcow2.json', 'killed-vdb.qcow2',
             'killed-vdb.qcow2.json'}

    def test_when_they_get_their_names(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('qcow2'))
        steps = self._steps(guest, 'backup')
        first = steps.index('before remove_unfinished') + 1
        # The last two of it, of the guest's way back.
        self.assertIn('end_backup done', steps[first:])
        seen = []
        # That all have their names is the fourth of them; what comes then
        # is the way back of the guest.
        numbers = list(range(first, len(steps) + 1))
        for number in [*numbers[:5], *numbers[5::5]]:
            self._killed_at(guest, 'backup', number, guard_too=number % 2 == 0)
            if number % 2 == 0:
                self._recover()
            deadline = time.monotonic() + 60
            while list(self.state.iterdir()) or list(self.staging.iterdir()):
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.05)
            names = {path.name for path in self.images.iterdir()}
            self.assertIn(names, (set(), self.NAMES), steps[number - 1])
            seen.append(bool(names))
            print(f'{steps[number - 1]}: {"all" if names else "none"}',
                  flush=True)
            self._forget_image()
            self.assertEqual(libvirt.VIR_DOMAIN_RUNNING,
                             guest.domain.state()[0])
        # None first, and all from some step on.
        self.assertEqual(sorted(seen), seen)
        self.assertEqual({False, True}, set(seen))
