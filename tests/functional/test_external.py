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

"""External snapshots of real guests: taken, gone back to, merged, killed."""

import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import typing

import fixtures
import libvirt

from nova_snapshot_ext.cmd import snapshot as cli
from nova_snapshot_ext import disk as disks
from nova_snapshot_ext import domain_records
from nova_snapshot_ext import domain_snapshot
from nova_snapshot_ext import exception
from nova_snapshot_ext import guard
from nova_snapshot_ext import guest as our_guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import rollback
from tests.functional import guests
from tests.functional import images
from tests.functional import test_cli
from tests.functional import test_domain
from tests.functional import test_killed

EVERY = test_domain.EVERY
SOME = test_domain.SOME


# Has QEMU pivot and forget its job, as libvirt does in the end.
_PIVOT = textwrap.dedent('''
    import glob, json, socket, sys, time

    [path] = glob.glob(
        f'/var/lib/libvirt/qemu/domain-*-{sys.argv[1]}*/monitor.sock')
    monitor = socket.socket(socket.AF_UNIX)
    monitor.connect(path)
    lines = monitor.makefile('rw')

    def tell(command, **arguments):
        lines.write(json.dumps(
            {'execute': command, 'arguments': arguments}) + '\\n')
        lines.flush()
        while 'event' in (answer := json.loads(lines.readline())):
            pass
        return answer['return']

    lines.readline()
    tell('qmp_capabilities')
    [job] = tell('query-jobs')
    tell('job-complete', id=job['id'])
    while tell('query-jobs')[0]['status'] != 'concluded':
        time.sleep(0.02)
    tell('job-dismiss', id=job['id'])
''')


def digest(path: typing.Any) -> str:
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


class ExternalTestCase(test_domain.DomainTestCase):

    def keep(self, guest: guests.Guest, title: str, memory: bool = True,
             transfer: str = 'streamed', **changes: typing.Any,
             ) -> tuple[domain_records.Record, images.Image, int]:
        before = guest.counter()
        result, image = self.take(
            guest, 'domain', title, transfer,
            domain=requests.DomainSnapshot(
                memory=memory, title=title, external=True), **changes)
        self.assertEqual('domain', result.flow)
        self.assert_good(image, before, guest.counter())
        record = self.records(guest).find(title)
        assert record is not None
        self.assert_libvirt_knows_none(guest)
        print(f'{title}: paused {result.guest_pause_s:.2f} s', flush=True)
        return record, image, images.counters(image)[0]

    def now(self, guest: guests.Guest) -> list[images.Image]:
        """What its disks are made of, as libvirt says."""
        return [(disk.path, disk.format)
                for disk in self.ours(guest).disks()]

    def frozen(self, record: domain_records.Record) -> list[images.Image]:
        assert record.files is not None
        return [(path, record.files.formats[target])
                for target, path in record.disks.items()]

    def assert_lives(self, guest: guests.Guest) -> None:
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING, guest.domain.state()[0])
        self.assertTrue(guest.domain.isPersistent())
        self.assertFalse(guest.domain.hasManagedSaveImage(0))
        with guest.console.changed:
            guest.console.counter = 0
        guest.wait_counter(1)
        guest.wait_writes_on(SOME)
        guest.domain.suspend()
        images.check_point_in_time(self.now(guest), in_use=True)
        guest.domain.resume()
        self.assert_files(guest)

    def assert_files(self, guest: guests.Guest) -> None:
        """Only what is of use is there, and the definition agrees."""
        ours = self.ours(guest)
        wanted = {disk.path for disk in ours.disks()}
        for record in self.records(guest).all():
            assert record.files is not None
            wanted |= {*record.disks.values(), record.files.memory}
        self.assertEqual(
            sorted(name for path in wanted
                   if (name := os.path.basename(path)).startswith(
                       'snapshot-ext-')),
            sorted(path.name for path in guest.directory.iterdir()
                   if path.name.startswith('snapshot-ext-')))
        self.assertEqual({disk.target: disk.path for disk in ours.disks()},
                         ours.defined_disks())
        for disk in ours.disks():
            self.assertIsNone(
                ours.block_job(disk.target) if guest.domain.isActive()
                else None)

    def delete(self, guest: guests.Guest, title: str) -> None:
        records = self.records(guest)
        record = records.find(title)
        assert record is not None, title
        begun = time.monotonic()
        domain_snapshot.delete(
            self.ours(guest), record, records, hosts.PlainHost())
        print(f'{title} merged in {time.monotonic() - begun:.2f} s',
              flush=True)
        self.assert_files(guest)

    def delete_all(self, guest: guests.Guest) -> None:
        for record in reversed(self.records(guest).all()):
            self.delete(guest, record.title)
        self.assert_as_before(guest)

    def assert_as_before(self, guest: guests.Guest) -> None:
        """Its disks are the files that they were, in their formats."""
        self.assertEqual(
            [(str(disk.path), disk.format) for disk in guest.disks],
            self.now(guest))
        self.assert_files(guest)
        self.assertEqual([], list(self.state.iterdir()))


class ExternalTest(ExternalTestCase):

    def test_chain_with_memory_over_qcow2_and_raw(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'),
                           churn=True)
        taken = []
        for title, transfer in (
                ('one', 'streamed'), ('two', 'staged'), ('three', 'streamed')):
            guest.wait_writes_on(20)
            taken.append(self.keep(guest, title, transfer=transfer))
            record, image, counter = taken[-1]
            # All disks are of one instant, which is the image's.
            self.assertEqual(
                counter, images.check_point_in_time(
                    self.frozen(record), in_use=True)[0][0])
            images.compare(image, self.frozen(record)[0], in_use=True)
        one, two, three = (record for record, _, _ in taken)
        self.assertEqual([None, one.name, two.name],
                         [each.parent for each in (one, two, three)])
        self.assertEqual(
            [str(disk.path) for disk in guest.disks],
            list(one.disks.values()))
        document = json.loads(
            pathlib.Path(f'{taken[1][1][0]}.json').read_text())
        self.assertEqual(
            ('memory', guest.uuid, one.image_id, 'crash'),
            tuple(document['properties'][f'snapshot_ext_{name}'] for name in (
                'rollback', 'instance', 'parent', 'consistency')))
        digests = {path: digest(path) for record in (one, two, three)
                   for path in record.disks.values()}
        for index in (0, 2, 1):
            guest.wait_writes_on(20)
            record, _, counter = taken[index]
            self.back(guest, record, counter)
            # Nobody writes to what was frozen.
            self.assertEqual(digests, {
                path: digest(path) for path in digests})
        four, _, _ = self.keep(guest, 'four')
        self.assertEqual(two.name, four.parent)
        error = self.assertRaises(
            exception.DeletionRefused, self.delete, guest, 'two')
        self.assertIn('three, four', str(error))
        self.delete(guest, 'one')
        self.assert_lives(guest)
        self.assertEqual(str(guest.disks[1].path),
                         self.records(guest).find('two').disks['vdb'])
        # What rests on the merged one is put on it: three is in no chain
        # of the guest.
        three, _, counter = taken[2]
        self.back(guest, self.records(guest).find('three'), counter)
        self.delete(guest, 'four')
        self.delete(guest, 'two')
        self.back(guest, self.records(guest).find('three'), counter)
        self.delete(guest, 'three')
        self.assert_lives(guest)
        self.assert_as_before(guest)
        for _, image, counter in taken:
            self.assertEqual(
                counter, images.check_point_in_time([image])[0][0])
        guest.domain.destroy()
        images.qemu_img_check(guest.disks[0].path)
        guest.start()
        self.assert_lives(guest)

    def test_merges_while_it_is_paused_and_off(self):
        guest = self.guest(guests.Disk('qcow2'), guests.Disk('raw'),
                           churn=True)
        for power in (guest.domain.suspend, guest.domain.destroy):
            for order in (('one', 'two'), ('two', 'one')):
                for path in self.images.iterdir():
                    path.unlink()
                for title in ('one', 'two'):
                    guest.wait_writes_on(20)
                    self.keep(guest, title, memory=False)
                guest.wait_writes_on(20)
                power()
                at = [images.counters(image, in_use=True)
                      for image in self.now(guest)]
                for title in order:
                    self.delete(guest, title)
                    self.assertEqual(
                        at, [images.counters(image, in_use=True)
                             for image in self.now(guest)])
                self.assert_as_before(guest)
                if guest.domain.isActive():
                    guest.domain.resume()
                else:
                    guest.start()
                self.assert_lives(guest)
        guest.domain.destroy()
        images.qemu_img_check(guest.disks[0].path)

    def test_disks_alone_of_a_running_guest_and_of_one_that_is_off(self):
        guest = self.guest(guests.Disk('raw'), guests.Disk('overlay'))
        running, image, counter = self.keep(guest, 'running', memory=False)
        self.assertIs(domain_records.Rollback.DISK, running.rollback)
        guest.wait_writes_on(50)
        self.revert(guest, running)
        self.assert_lives(guest)
        guest.domain.destroy()
        off, image_off, _ = self.keep(guest, 'off')
        for record, of_then in ((running, image), (off, image_off),
                                (running, image)):
            result = self.revert(guest, record)
            self.assertEqual(0, result.guest_pause_s)
            self.assertFalse(guest.domain.isActive())
            images.compare(of_then, self.now(guest)[0])
            images.check_point_in_time(self.now(guest))
            self.assert_files(guest)
        guest.start()
        self.assert_lives(guest)
        self.delete_all(guest)
        self.assert_lives(guest)

    def test_paused_guest_is_paused_again(self):
        guest = self.guest(guests.Disk('overlay'))
        guest.domain.suspend()
        record, _, counter = self.keep(guest, 'paused')
        self.assertEqual(libvirt.VIR_DOMAIN_PAUSED, guest.domain.state()[0])
        guest.domain.resume()
        guest.wait_writes_on(20)
        self.revert(guest, record)
        self.assertEqual(libvirt.VIR_DOMAIN_PAUSED, guest.domain.state()[0])
        guest.domain.resume()
        self.assert_lives(guest)
        self.delete_all(guest)

    def test_guest_that_was_restored_paused(self):
        guest = self.guest(guests.Disk('overlay'))
        self.restore_paused(guest)
        self.keep(guest, 'paused', memory=False)
        self.delete(guest, 'paused')
        record, _, counter = self.keep(guest, 'again')
        guest.domain.resume()
        guest.wait_writes_on(20)
        self.revert(guest, record)
        guest.domain.resume()
        self.assert_lives(guest)
        self.delete_all(guest)

    def test_guest_that_is_off_comes_up_as_it_was(self):
        guest = self.guest(guests.Disk('overlay'))
        record, _, counter = self.keep(guest, 'before')
        guest.wait_writes_on(20)
        guest.domain.destroy()
        self.back(guest, record, counter)
        self.delete_all(guest)

    def test_file_systems_are_quiesced(self):
        guest = self.guest(guests.Disk('overlay'), mode='fs', agent=True)
        guest.wait_agent()
        result, image = self.take(
            guest, 'domain', quiesce=requests.Quiesce.REQUIRED,
            domain=requests.DomainSnapshot(
                memory=False, external=True, title='quiet'))
        self.assertEqual('filesystem', result.consistency.value)
        images.check_filesystems_point_in_time([image], must_be_clean=True)
        self.assertEqual(0, guest.domain.fsThaw())
        self.delete_all(guest)

    def test_disk_that_became_larger_is_merged(self):
        guest = self.guest(guests.Disk('raw'))
        self.keep(guest, 'before', memory=False)
        guest.domain.blockResize(
            'vda', 65 * guests.MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        self.delete(guest, 'before')
        self.assert_as_before(guest)
        self.assertEqual(65 * guests.MIB, os.stat(
            guest.disks[0].path).st_size)
        # Its counter is at the places of the smaller disk.
        guest.wait_writes_on()

    def test_failed_image_leaves_no_snapshot(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))

        def fail() -> None:
            guest.wait_writes_on(SOME)
            raise exception.TransferFailed('no image')
        for memory in (True, False):
            self.assertRaises(
                exception.TransferFailed, self.take, guest, 'domain',
                f'{memory}', before_upload=fail,
                domain=requests.DomainSnapshot(
                    memory=memory, external=True))
            self.assert_as_before(guest)
        self.assert_lives(guest)

    def test_guest_runs_on_when_its_memory_can_not_be_loaded(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        record, _, _ = self.keep(guest, 'spoilt')
        guest.wait_writes_on(50)
        at = guest.counter()
        assert record.files is not None
        with open(record.files.memory, 'r+b') as memory:
            # QEMU's stream is behind libvirt's header and XML.
            memory.seek(os.stat(record.files.memory).st_size // 2)
            memory.write(b'\xff' * 1024 ** 2)
        self.assertRaises(exception.SnapshotError, self.revert, guest, record)
        self.assertGreater(guest.first_counter(), at - 2)
        self.assert_lives(guest)
        self.delete_all(guest)

    def test_what_is_refused(self):
        guest = self.guest(guests.Disk('block'))
        error = self.assertRaises(
            exception.NoFlowServes, self.take, guest, 'domain',
            domain=requests.DomainSnapshot(memory=False, external=True))
        self.assertIn('vda can have no overlay', str(error))
        guest = self.guest(guests.Disk('overlay'))
        self.keep(guest, 'external', memory=False)
        error = self.assertRaises(
            exception.NoFlowServes, self.take, guest, 'domain', 'internal')
        self.assertIn('external snapshots', str(error))
        guest.domain.managedSave(0)
        error = self.assertRaises(
            exception.DeletionRefused, self.delete, guest, 'external')
        self.assertIn('is saved', str(error))
        guest.domain.create()
        self.delete_all(guest)

    def test_other_flows_serve_a_guest_that_has_some(self):
        guest = self.guest(guests.Disk('raw'))
        record, _, counter = self.keep(guest, 'kept')
        for flow in ('backup', 'live', 'cold'):
            before = guest.wait_writes_on()
            _, image = self.take(guest, flow, flow, 'streamed')
            self.assert_good(image, before, guest.counter())
        self.back(guest, record, counter)
        self.delete_all(guest)
        self.assert_lives(guest)


class OwnershipTest(ExternalTestCase):
    """libvirt changes the owner of no file (qemu.conf, dynamic_ownership)."""

    def setUp(self):
        super().setUp()
        self.host.configure('dynamic_ownership = 0')
        self.connection = self.host.connection

    def _guest(self, user: str, group: str, mode: int) -> guests.Guest:
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'),
                           start=False)
        for disk in guest.disks:
            shutil.chown(disk.path, user, group)
            disk.path.chmod(mode)
        guest.start()
        return guest

    def _serves(self, guest: guests.Guest) -> None:
        owner = [(status.st_uid, status.st_gid, status.st_mode) for status in
                 (disk.path.stat() for disk in guest.disks)]

        def assert_owner() -> None:
            self.assertEqual(owner, [
                (status.st_uid, status.st_gid, status.st_mode)
                for status in (os.stat(path) for path, _ in self.now(guest))])
        with_memory, _, counter = self.keep(guest, 'memory')
        assert_owner()
        guest.wait_writes_on(20)
        disks_alone, _, _ = self.keep(guest, 'disks', memory=False)
        guest.wait_writes_on(20)
        self.back(guest, with_memory, counter)
        assert_owner()
        self.revert(guest, disks_alone)
        self.assert_lives(guest)
        guest.domain.destroy()
        self.keep(guest, 'off')
        assert_owner()
        guest.start()
        self.assert_lives(guest)
        self.delete_all(guest)
        self.assert_lives(guest)
        guest.domain.destroy()
        guest.start()
        self.assert_lives(guest)

    def test_disks_of_qemus_user(self):
        self._serves(self._guest('libvirt-qemu', 'libvirt-qemu', 0o600))

    def test_disks_of_qemus_group(self):
        self._serves(self._guest('root', 'libvirt-qemu', 0o660))


class CommandTest(ExternalTestCase, test_cli.CommandTestCase):

    def test_create_tree_revert_and_delete(self):
        guest = self.guest(guests.Disk('raw'))
        create = ('create', guest.name, '--to', self.images, '--staging',
                  self.staging, '--flow', 'domain', '--external', '--name')
        self.run_command(*create, 'one')
        self.run_command(*create, 'two', '--no-memory')
        done = self.run_command('tree', guest.name)
        self.assertRegex(
            done.stdout, r'^one: memory, external, .*/one.qcow2\n'
            r'  two: disk, external, .*/two.qcow2\n    \(now\)\n$')
        self.run_command('revert', guest.name, 'one')
        self.assert_lives(guest)
        done = self.run_command('delete', guest.name, 'one',
                                expect=cli.REFUSED)
        self.assertIn('two, its present one', done.stderr)
        for title in ('two', 'one'):
            self.run_command('delete', guest.name, title)
        self.assertEqual('', self.run_command('tree', guest.name).stdout)
        self.assert_lives(guest)
        self.assert_as_before(guest)

    def test_guest_that_nova_owns(self):
        guest = self.guest(guests.Disk('overlay'), start=False)
        self.connection.defineXML(guest.xml().replace(
            '<memory', f'{test_cli.NOVA}<memory', 1))
        guest.start()
        create = ('create', guest.name, '--to', self.images, '--staging',
                  self.staging, '--flow', 'domain', '--external', '--name')
        done = self.run_command(*create, 'one', expect=cli.REFUSED)
        self.assertIn('hard reboot', done.stderr)
        self.run_command(*create, 'one', '--force')
        self.run_command('delete', guest.name, 'one', expect=cli.REFUSED)
        self.run_command('delete', guest.name, 'one', '--force')
        self.assertIn('nova:instance', guest.domain.XMLDesc())
        self.assert_lives(guest)
        self.assert_as_before(guest)


Test = typing.TypeVar('Test')


def _at_random(test: Test) -> Test | None:
    """A test that is there only where KILL_LIBVIRTD is set: libvirtd dies at
    random moments, and libvirt 9.0 may lose its guest in one of them."""
    return test if os.environ.get('KILL_LIBVIRTD') else None


class LibvirtdTest(ExternalTestCase):
    """libvirtd dies in the middle of its work; nobody reads other data."""

    def _killed(self, guest: guests.Guest, act: typing.Callable[[], object],
                when: typing.Callable[[], bool], kill: bool = True) -> None:
        def watch() -> None:
            deadline = time.monotonic() + 20
            try:
                while not when() and time.monotonic() < deadline:
                    time.sleep(0.003)
            except libvirt.libvirtError:
                pass
            time.sleep(random.uniform(0, 0.3))
            self.libvirtd.kill()
            self.libvirtd.start()
        thread = threading.Thread(target=watch)
        if kill:
            thread.start()
        try:
            act()
            print('it was done all the same', flush=True)
        except exception.SnapshotError as error:
            print(f'{error}', flush=True)
        if kill:
            thread.join()
        connection = self.libvirtd.connect()
        self.addCleanup(connection.close)
        guest.domain = connection.lookupByUUIDString(guest.uuid)
        self._finish(guest)
        for path in self.images.iterdir():
            path.unlink()
        self._start_anew(guest)

    def _finish(self, guest: guests.Guest) -> None:
        """Do what is left to be done."""
        for path in self.state.glob('*.undo'):
            ours = self.ours(guest)
            self.assertTrue(guard.bring_back(
                str(path), lambda uri, uuid: ours, hosts.PlainHost()))
        deadline = time.monotonic() + 120
        while list(self.state.glob('*.undo')):
            self.assertLess(time.monotonic(), deadline, 'something was left')
            time.sleep(0.1)

    def _start_anew(self, guest: guests.Guest) -> None:
        """Where libvirt does not know what QEMU has done."""
        if '<mirror' not in guest.domain.XMLDesc():
            return
        for flow in ('cold', 'backup', 'live'):
            # Saved and started again, it would be made of the wrong file.
            error = self.assertRaises(
                exception.NoFlowServes, self.take, guest, flow)
            self.assertIn('shut the guest down', str(error))
        at = guest.wait_writes_on(20)
        guest.domain.destroy()
        print('libvirt does not know of a pivot', flush=True)
        found = images.check_point_in_time(self.now(guest))
        self.assertGreaterEqual(found[0][0], at - 1)
        guest.start()

    @_at_random
    def test_taking(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        for number in range(4):
            self._killed(
                guest, lambda: self.take(
                    guest, 'domain', f'{number}',
                    domain=requests.DomainSnapshot(
                        memory=number % 2 == 0, external=True)),
                lambda: any(path.name.startswith('snapshot-ext-')
                            for path in guest.directory.iterdir()))
            self.assert_lives(guest)
            self.delete_all(guest)
        self.assert_lives(guest)

    def _pivot_unknown(self, guest: guests.Guest,
                       then: typing.Callable[[], object]) -> list[str]:
        """libvirtd dies in a pivot that QEMU does.

        :param then: is done before anybody looks
        :returns: the disks of which that was so
        """
        real = our_guests.Guest.pivot
        killed: list[str] = []

        def pivot(ours: our_guests.Guest, target: str) -> None:
            if not killed:
                killed.append(target)
                self.libvirtd.kill()
                images.run(*self.libvirtd.inside(
                    sys.executable, '-c', _PIVOT, guest.name))
                self.libvirtd.start()
                then()
            real(ours, target)
        self.useFixture(fixtures.MonkeyPatch(
            'nova_snapshot_ext.guest.Guest.pivot', pivot))
        return killed

    def test_guest_is_not_started_from_what_may_be_old(self):
        """It is shut down and started after that, before anybody looks."""
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        record, _, _ = self.keep(guest, 'one', memory=False)
        guest.wait_writes_on(20)
        at: list[int] = []

        def start_anew() -> None:
            connection = self.libvirtd.connect()
            self.addCleanup(connection.close)
            guest.domain = connection.lookupByUUIDString(guest.uuid)
            at.append(guest.wait_writes_on(50))
            guest.domain.destroy()
            error = self.assertRaises(
                libvirt.libvirtError, guest.domain.create)
            self.assertIn('.pivoting', str(error))
        self._pivot_unknown(guest, start_anew)
        error = self.assertRaises(
            exception.UndoFailed, domain_snapshot.delete, self.ours(guest),
            record, self.records(guest), hosts.PlainHost())
        self.assertIn('nobody knows', str(error))
        self.assertFalse(guest.domain.isActive())
        # Who knows says so.
        self.ours(guest).define_disks({'vda': disks.Layer(
            record.disks['vda'], 'qcow2')})
        found = images.check_point_in_time(
            [(record.disks['vda'], 'qcow2')], in_use=True)
        self.assertGreaterEqual(found[0][0], at[0] - 1)
        guest.start()
        self._finish(guest)
        self.assert_lives(guest)
        self.assert_as_before(guest)

    def test_guest_that_is_off_when_its_pivot_is_asked_for(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        record, _, _ = self.keep(guest, 'one', memory=False)
        at = guest.wait_writes_on(20)
        real = our_guests.Guest.pivot
        defined: list[str] = []

        def pivot(ours: our_guests.Guest, target: str) -> None:
            if not defined:
                guest.domain.destroy()
                defined.append(ours.defined_disks()[target])
            real(ours, target)
        self.useFixture(fixtures.MonkeyPatch(
            'nova_snapshot_ext.guest.Guest.pivot', pivot))
        domain_snapshot.delete(self.ours(guest), record, self.records(guest),
                               hosts.PlainHost())
        self.assertIn('.pivoting', defined[0])
        self.assert_as_before(guest)
        found = images.check_point_in_time(guest.images)
        self.assertGreaterEqual(found[0][0], at - 1)
        guest.start()
        self.assert_lives(guest)

    def test_pivot_that_libvirt_does_not_know(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        self.keep(guest, 'one', memory=False)
        guest.wait_writes_on(20)
        killed = self._pivot_unknown(guest, lambda: None)
        self._killed(guest, lambda: domain_snapshot.delete(
            self.ours(guest), self.records(guest).find('one'),
            self.records(guest), hosts.PlainHost()), lambda: True,
            kill=False)
        self.assertEqual(['vda'], killed)
        at = guest.wait_writes_on(20)
        guest.domain.destroy()
        self.assert_as_before(guest)
        found = images.check_point_in_time(guest.images)
        self.assertGreaterEqual(found[0][0], at - 1)
        images.qemu_img_check(guest.disks[0].path)

    @_at_random
    def test_merging(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'),
                           churn=True)
        for number in range(4):
            for title in ('one', 'two'):
                self.keep(guest, f'{title}{number}', memory=False)
            guest.wait_writes_on(50)
            [record] = [each for each in self.records(guest).all()
                        if each.title == ('one', 'two')[number % 2]
                        + str(number)]
            self._killed(
                guest, lambda: domain_snapshot.delete(
                    self.ours(guest), record, self.records(guest),
                    hosts.PlainHost()),
                lambda: bool(guest.domain.blockJobInfo('vda', 0)))
            self.assert_lives(guest)
            self.delete_all(guest)
        guest.domain.destroy()
        images.qemu_img_check(guest.disks[0].path)

    @_at_random
    def test_going_back(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        record, _, counter = self.keep(guest, 'then')
        for number in range(4):
            guest.wait_writes_on(50)
            self._killed(
                guest, lambda: rollback.revert(
                    self.ours(guest), record, self.records(guest),
                    hosts.PlainHost()),
                lambda: guest.domain.state()[0]
                != libvirt.VIR_DOMAIN_RUNNING)
            self.assert_lives(guest)
            print(f'first counter {guest.console.first} ({counter} then)',
                  flush=True)
        self.delete_all(guest)


class KilledTest(ExternalTestCase, test_killed.KilledTestCase):

    def _wait_done(self, guest: guests.Guest) -> None:
        deadline = time.monotonic() + 180
        while list(self.state.glob('*.undo')) or list(
                self.staging.iterdir()):
            self.assertLess(time.monotonic(), deadline, 'something was left')
            time.sleep(0.05)
        self.assert_files(guest)

    def _process(self, script: str, guest: guests.Guest, name: str,
                 last: int) -> 'subprocess.Popen[str]':
        process = subprocess.Popen(
            [sys.executable, '-c', script, self.libvirtd.uri, guest.uuid,
             name, str(self.state), str(last)],
            stdout=subprocess.PIPE, text=True)
        self.addCleanup(self._end, process)
        return process

    def _kill(self, process: 'subprocess.Popen[str]', step: str,
              guard_too: bool) -> None:
        assert process.stdout is not None
        self.assertEqual('here\n', process.stdout.readline())
        if guard_too:
            for pid in self._guards():
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
        if guard_too or step == 'after header':
            self._recover()

    def test_taking(self):
        for memory in (True, False):
            for guard_too in (False, True):
                self._kill_taking(memory, guard_too)

    def _kill_taking(self, memory: bool, guard_too: bool) -> None:
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        self.script = test_killed.TAKE.replace(
            'convert_timeout=60)', f'convert_timeout=60, '
            f'domain=request.DomainSnapshot(memory={memory}, '
            f'external=True))')
        steps = self._steps(guest, 'domain')
        self.assertLess(10, len(steps))
        self.delete_all(guest)
        first = EVERY // 2 if guard_too else 0
        for number, step in list(enumerate(steps, 1))[first::EVERY]:
            self._killed_at(guest, 'domain', number, guard_too)
            since = time.monotonic()
            if guard_too or step == 'after header':
                self._recover()
            self._wait_done(guest)
            self.assert_lives(guest)
            print(f'external memory={memory} killed at {number:2} {step}: '
                  f'whole after {time.monotonic() - since:.2f} s',
                  flush=True)
            if self.records(guest).all():
                self.assertEqual(1, len(list(self.images.glob('*.qcow2'))))
            self._forget_image()
            self.delete_all(guest)
        guest.domain.destroy()
        images.qemu_img_check(guest.disks[0].path)

    def test_going_back(self):
        for memory in (True, False):
            self._kill_reverting(memory)

    def _kill_reverting(self, memory: bool) -> None:
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        record, _, counter = self.keep(guest, f'then {memory}', memory=memory)
        process = self._process(test_domain.REVERT, guest, record.name, 0)
        assert process.stdout is not None
        steps = process.stdout.read().splitlines()
        self.assertEqual(0, process.wait())
        for guard_too in (False, True):
            first = EVERY // 2 if guard_too else 0
            for number, step in list(enumerate(steps, 1))[first::EVERY]:
                guest.wait_writes_on(50)
                since = time.monotonic()
                self._kill(self._process(
                    test_domain.REVERT, guest, record.name, number), step,
                    guard_too)
                self._wait_done(guest)
                self.assert_lives(guest)
                print(f'external {record.rollback.value} back killed at '
                      f'{number:2} {step}: all is done after '
                      f'{time.monotonic() - since:.2f} s, first counter '
                      f'{guest.console.first} ({counter} then)', flush=True)
        self.delete_all(guest)
        guest.domain.destroy()
        images.qemu_img_check(guest.disks[0].path)

    def test_deleting(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        for first_one in (True, False):
            process = self._process(
                test_domain.DELETE, guest, self._two(guest, first_one), 0)
            assert process.stdout is not None
            steps = process.stdout.read().splitlines()
            self.assertEqual(0, process.wait())
            self.delete_all(guest)
            for guard_too in (False, True):
                begin = EVERY // 2 if guard_too else 0
                for number, step in list(enumerate(steps, 1))[begin::EVERY]:
                    name = self._two(guest, first_one)
                    since = time.monotonic()
                    self._kill(self._process(
                        test_domain.DELETE, guest, name, number), step,
                        guard_too)
                    self._wait_done(guest)
                    self.assert_lives(guest)
                    print(f'merge killed at {number:2} {step}: all is done '
                          f'after {time.monotonic() - since:.2f} s',
                          flush=True)
                    self.delete_all(guest)
        guest.domain.destroy()
        images.qemu_img_check(guest.disks[0].path)

    def _two(self, guest: guests.Guest, first_one: bool) -> str:
        names = []
        for title in ('one', 'two'):
            record, image, _ = self.keep(
                guest, f'{title}-{time.monotonic_ns()}', memory=False)
            names.append(record.name)
        self._forget_image()
        return names[0] if first_one else names[1]
