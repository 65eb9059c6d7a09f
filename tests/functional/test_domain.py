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

"""Domain snapshots of real guests: taken, rolled back to, deleted, killed."""

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
from nova_snapshot_ext import domain_records
from nova_snapshot_ext import domain_snapshot
from nova_snapshot_ext import exception
from nova_snapshot_ext import guard
from nova_snapshot_ext import guest as our_guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext import internal_snapshot
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import rollback
from nova_snapshot_ext import undo
from tests.functional import guests
from tests.functional import images
from tests.functional import test_cli
from tests.functional import test_flows
from tests.functional import test_killed

#: of a rollback, each so many steps is tried; all by KILLED_EVERY=1
EVERY = int(os.environ.get('KILLED_EVERY', '3'))
# Rounds that the guest may do between two looks at it.
SOME = 3

REVERT = test_killed.STOPPING + textwrap.dedent('''
    from nova_snapshot_ext import domain_records, rollback

    uri, uuid, name, state, last = sys.argv[1:]
    ours = guests.Guest.find(libvirt.open(uri), uri, uuid)
    records = domain_records.Records(state, uuid)
    rollback.revert(ours, records.find(name), records, host.PlainHost())
''')


DELETE = test_killed.STOPPING + textwrap.dedent('''
    from nova_snapshot_ext import domain_records, domain_snapshot

    uri, uuid, name, state, last = sys.argv[1:]
    ours = guests.Guest.find(libvirt.open(uri), uri, uuid)
    records = domain_records.Records(state, uuid)
    domain_snapshot.delete(
        ours, records.find(name), records, host.PlainHost())
''')


# Says when QEMU, or qemu-img, is about to delete one.
DELETE_NOTED = DELETE.replace('uri, uuid, name', textwrap.dedent('''
    from nova_snapshot_ext import internal_snapshot

    delete = internal_snapshot._delete_snapshot

    def noted(*arguments):
        print('at work', flush=True)
        delete(*arguments)
    internal_snapshot._delete_snapshot = noted

    uri, uuid, name'''), 1)


class DomainTestCase(test_flows.SnapshotTestCase):

    def _assert_nothing_left(self) -> None:
        self.assertEqual([], list(self.staging.iterdir()))
        self.assertEqual(
            [], [path for path in self.state.iterdir()
                 if path.name != domain_records.DIRECTORY])
        shutil.rmtree(self.state / domain_records.DIRECTORY,
                      ignore_errors=True)

    def records(self, guest: guests.Guest) -> domain_records.Records:
        return domain_records.Records(str(self.state), guest.uuid)

    def keep(self, guest: guests.Guest, title: str, memory: bool = True,
             transfer: str = 'streamed', **changes: typing.Any,
             ) -> tuple[domain_records.Record, images.Image, int]:
        """Take one. :returns: it, its image, and the counter in that"""
        before = guest.counter()
        result, image = self.take(
            guest, 'domain', title, transfer,
            domain=requests.DomainSnapshot(
                memory=memory, title=title, extra={'image_ref': 'base'}),
            **changes)
        self.assertEqual('domain', result.flow)
        self.assert_good(image, before, guest.counter())
        record = self.records(guest).find(title)
        assert record is not None
        self.assertEqual(result.location, record.image_id)
        self.assert_libvirt_knows_none(guest)
        print(f'{title}: paused {result.guest_pause_s:.2f} s', flush=True)
        return record, image, images.counters(image)[0]

    def revert(self, guest: guests.Guest,
               record: domain_records.Record) -> rollback.Result:
        result = rollback.revert(
            self.ours(guest), record, self.records(guest),
            hosts.PlainHost())
        self.assert_libvirt_knows_none(guest)
        print(f'back to {record.title}: did not run for '
              f'{result.guest_pause_s:.2f} s', flush=True)
        return result

    def back(self, guest: guests.Guest, record: domain_records.Record,
             counter: int) -> None:
        """Roll back with memory, and see that it counts on from then."""
        result = self.revert(guest, record)
        self.assertIs(domain_records.Rollback.MEMORY, result.rollback)
        self.assertIn(guest.first_counter(),
                      range(counter - 1, counter + 2))
        self.assert_lives(guest)
        self.assertEqual(record.name, self.records(guest).current)

    def assert_libvirt_knows_none(self, guest: guests.Guest) -> None:
        """Nova could not undefine it otherwise, nor migrate it."""
        self.assertEqual(0, guest.domain.snapshotNum(0))

    def assert_lives(self, guest: guests.Guest) -> None:
        """Running, persistent, writing, disks of one instant."""
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING, guest.domain.state()[0])
        self.assertTrue(guest.domain.isPersistent())
        self.assertFalse(guest.domain.hasManagedSaveImage(0))
        with guest.console.changed:
            guest.console.counter = 0
        guest.wait_counter(1)
        guest.wait_writes_on(SOME)
        guest.domain.suspend()
        images.check_point_in_time(guest.images, in_use=True)
        guest.domain.resume()

    def held(self, guest: guests.Guest, disk: int = 0) -> list[str]:
        """The internal snapshots in a disk."""
        made = guest.disks[disk]
        if made.format != 'qcow2':
            return []
        found = json.loads(images.run(
            'qemu-img', 'info', '-U', '--output=json', '-f', 'qcow2',
            made.path))
        return [each['name'] for each in found.get('snapshots', ())]

    def delete_all(self, guest: guests.Guest) -> None:
        records = self.records(guest)
        for record in records.all():
            domain_snapshot.delete(
                self.ours(guest), record, records, hosts.PlainHost())
        for index in range(len(guest.disks)):
            self.assertEqual([], self.held(guest, index))
        self.assertEqual([], list(self.state.iterdir()))


class MemoryTest(DomainTestCase):

    def test_chain_of_three_and_back_to_any(self):
        guest = self.guest(guests.Disk('overlay'), churn=True)
        taken = []
        for title, transfer in (
                ('one', 'streamed'), ('two', 'staged'), ('three', 'streamed')):
            guest.wait_writes_on(20)
            taken.append(self.keep(guest, title, transfer=transfer))
        one, two, three = (record for record, _, _ in taken)
        self.assertEqual([None, one.name, two.name],
                         [each.parent for each in (one, two, three)])
        self.assertEqual([one.name, two.name, three.name], self.held(guest))
        document = json.loads(
            pathlib.Path(f'{taken[1][1][0]}.json').read_text())
        self.assertEqual(
            ('memory', guest.uuid, one.image_id, 'crash'),
            tuple(document['properties'][f'snapshot_ext_{name}'] for name in (
                'rollback', 'instance', 'parent', 'consistency')))
        for index in (0, 2, 1):
            guest.wait_writes_on(20)
            record, image, counter = taken[index]
            self.back(guest, record, counter)
        four, _, _ = self.keep(guest, 'four')
        self.assertEqual(two.name, four.parent)
        self.assertEqual({'image_ref': 'base'}, four.extra)
        self.assertEqual(['one', 'two', 'three', 'four'], [
            record.title for record in self.records(guest).all()])
        # An image stays as it is whatever becomes of the guest.
        for _, image, counter in taken:
            self.assertEqual(
                counter, images.check_point_in_time([image])[0][0])
        domain_snapshot.delete(self.ours(guest), two, self.records(guest),
                               hosts.PlainHost())
        self.assertEqual(
            [None, one.name, one.name],
            [record.parent for record in self.records(guest).all()])
        self.assertEqual([one.name, three.name, four.name], self.held(guest))
        self.delete_all(guest)
        self.assert_whole(guest)
        guest.domain.destroy()
        images.qemu_img_check(guest.disks[0].path)

    def test_paused_guest_is_paused_again(self):
        guest = self.guest(guests.Disk('overlay'))
        guest.domain.suspend()
        record, _, counter = self.keep(guest, 'paused')
        self.assertEqual(libvirt.VIR_DOMAIN_PAUSED, guest.domain.state()[0])
        guest.domain.resume()
        guest.wait_writes_on(20)
        self.revert(guest, record)
        self.assertEqual(libvirt.VIR_DOMAIN_PAUSED, guest.domain.state()[0])
        self.assertIn(
            images.check_point_in_time(guest.images, in_use=True)[0][0],
            range(counter, counter + 2))
        guest.domain.resume()
        self.assert_lives(guest)
        self.delete_all(guest)

    def test_guest_that_was_restored_paused(self):
        guest = self.guest(guests.Disk('overlay'))
        self.restore_paused(guest)
        record, _, counter = self.keep(guest, 'paused')
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

    def test_domain_is_the_one_of_then(self):
        guest = self.guest(guests.Disk('overlay'))
        record, _, counter = self.keep(guest, 'before')
        guest.domain.setMetadata(
            libvirt.VIR_DOMAIN_METADATA_DESCRIPTION, 'later', None, None,
            libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        self.back(guest, record, counter)
        for flags in (0, libvirt.VIR_DOMAIN_XML_INACTIVE):
            self.assertNotIn('later', guest.domain.XMLDesc(flags))
        self.delete_all(guest)

    def test_all_disks_go_back_together(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('qcow2'))
        record, _, counter = self.keep(guest, 'both')
        self.assertEqual({'vda', 'vdb'}, set(record.disks))
        guest.wait_writes_on(20)
        self.back(guest, record, counter)
        for index in (0, 1):
            self.assertEqual([record.name], self.held(guest, index))
        self.delete_all(guest)

    def test_agent_answers_again_and_is_asked_to_set_the_clock(self):
        guest = self.guest(guests.Disk('overlay'), mode='fs', agent=True)
        guest.wait_agent()
        result, image = self.take(guest, 'domain', 'then', domain=(
            requests.DomainSnapshot(title='then')))
        self.assertEqual('crash', result.consistency.value)
        record = self.records(guest).find('then')
        time.sleep(10)
        self.revert(guest, record)
        try:
            self.ours(guest).set_clock()
        except exception.SnapshotError as error:
            # Without hwclock(8) in the guest it does not, and nothing fails.
            self.assertIn('guest-set-time', str(error))
        else:
            self.assertAlmostEqual(
                time.time(), guest.domain.getTime()['seconds'], delta=5)
        self.assertEqual(0, guest.domain.fsThaw())
        self.delete_all(guest)

    def test_other_flows_serve_a_guest_that_has_some(self):
        guest = self.guest(guests.Disk('overlay'), churn=True)
        record, _, counter = self.keep(guest, 'kept')
        for flow in ('backup', 'live', 'cold'):
            before = guest.wait_writes_on()
            _, image = self.take(guest, flow, flow, 'streamed')
            self.assert_good(image, before, guest.counter())
            self.assertEqual([record.name], self.held(guest))
        self.back(guest, record, counter)
        self.delete_all(guest)
        self.assert_whole(guest)

    def test_failed_image_leaves_no_snapshot(self):
        guest = self.guest(guests.Disk('overlay'))

        def fail() -> None:
            raise exception.TransferFailed('no image')
        for transfer in ('staged', 'streamed'):
            self.assertRaises(
                exception.TransferFailed, self.take, guest, 'domain',
                transfer, transfer, before_upload=fail)
            self.assertEqual([], self.held(guest))
            self.assertEqual([], list(self.state.iterdir()))
        self.assert_whole(guest)


class DiskTest(DomainTestCase):

    def test_running_guest_boots_from_the_disk_as_it_was(self):
        guest = self.guest(guests.Disk('overlay'))
        record, image, counter = self.keep(guest, 'disk', memory=False)
        self.assertIs(domain_records.Rollback.DISK, record.rollback)
        guest.wait_writes_on(50)
        self.revert(guest, record)
        self.assert_lives(guest)
        self.delete_all(guest)

    def test_guest_that_is_off_stays_off_with_the_disk_of_then(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('qcow2'))
        running, image, _ = self.keep(guest, 'running', memory=False)
        guest.domain.destroy()
        off, image_off, _ = self.keep(guest, 'off')
        self.assertIs(domain_records.Rollback.DISK, off.rollback)
        for record, of_then in ((running, image), (off, image_off),
                                (running, image)):
            result = self.revert(guest, record)
            self.assertEqual(0, result.guest_pause_s)
            self.assertFalse(guest.domain.isActive())
            images.compare(of_then, guest.disks[0].image)
            images.check_point_in_time(guest.images)
        guest.start()
        self.assert_lives(guest)
        self.delete_all(guest)

    def test_file_systems_are_quiesced(self):
        guest = self.guest(guests.Disk('overlay'), mode='fs', agent=True)
        guest.wait_agent()
        result, image = self.take(
            guest, 'domain', quiesce=requests.Quiesce.REQUIRED,
            domain=requests.DomainSnapshot(memory=False, title='quiet'))
        self.assertEqual('filesystem', result.consistency.value)
        images.check_filesystems_point_in_time([image], must_be_clean=True)
        self.assertEqual(0, guest.domain.fsThaw())
        self.delete_all(guest)

    def test_raw_disk_beside_is_left_alone(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        record, image, _ = self.keep(guest, 'disk', memory=False)
        self.assertEqual(['vda'], list(record.disks))
        guest.wait_writes_on(20)
        guest.domain.destroy()
        before = guest.disks[1].path.read_bytes()
        self.revert(guest, record)
        self.assertEqual(before, guest.disks[1].path.read_bytes())
        images.compare(image, guest.disks[0].image)
        self.delete_all(guest)


class ObstacleTest(DomainTestCase):

    def refused(self, guest: guests.Guest, **wish: typing.Any) -> str:
        life = guest.domain.ID()
        error = self.assertRaises(
            exception.NoFlowServes, self.take, guest, 'domain',
            domain=requests.DomainSnapshot(**wish))
        self.assertEqual(life, guest.domain.ID())
        return str(error)

    def test_writable_disk_that_would_not_go_back(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        self.assertIn('vdb is not a qcow2 file', self.refused(guest))
        self.assert_whole(guest)

    def test_root_disk_that_can_hold_none(self):
        guest = self.guest(guests.Disk('raw'))
        for memory in (True, False):
            self.assertIn('vda can not hold', self.refused(
                guest, memory=memory))

    def test_limits(self):
        guest = self.guest(guests.Disk('overlay'))
        self.assertIn('max_domain_snapshots = 0', self.refused(
            guest, most=0))
        self.keep(guest, 'one')
        self.assertIn('max_domain_snapshots = 1', self.refused(
            guest, most=1))
        self.delete_all(guest)

    def test_guest_that_another_job_holds(self):
        guest = self.guest(guests.Disk('overlay'))
        record, _, counter = self.keep(guest, 'one')
        overlay = guest.directory / 'copy'
        guest.domain.blockCopy(
            'vda', f'<disk type="file"><source file="{overlay}"/>'
            '<driver type="qcow2"/></disk>', {},
            libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)
        self.assertIn('block job', self.refused(guest))
        error = self.assertRaises(
            exception.RollbackRefused, self.revert, guest, record)
        self.assertIn('block job', str(error))
        guest.domain.blockJobAbort('vda', 0)
        self.delete_all(guest)

    def test_disk_that_was_attached_since(self):
        guest = self.guest(guests.Disk('overlay'))
        record, _, counter = self.keep(guest, 'before')
        life = guest.domain.ID()
        for kind, said in (('qcow2', 'vdb was attached since'),
                           ('raw', 'vdb is not a qcow2 file')):
            path = guest.directory / 'more'
            images.run('qemu-img', 'create', '-q', '-f', kind, path, '1M')
            xml = (f'<disk type="file" device="disk"><driver name="qemu" '
                   f'type="{kind}"/><source file="{path}"/>'
                   f'<target dev="vdb" bus="virtio"/></disk>')
            guest.domain.attachDeviceFlags(
                xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            error = self.assertRaises(
                exception.RollbackRefused, self.revert, guest, record)
            self.assertIn(said, str(error))
            self.assertEqual(life, guest.domain.ID())
            guest.domain.detachDeviceFlags(
                xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            for _ in range(100):
                if 'vdb' not in guest.domain.XMLDesc():
                    break
                time.sleep(0.1)
        self.back(guest, record, counter)
        self.delete_all(guest)

    def test_disk_that_was_resized_or_lost_it(self):
        guest = self.guest(guests.Disk('overlay'))
        record, _, _ = self.keep(guest, 'before')
        guest.domain.blockResize(
            'vda', 65 * guests.MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        error = self.assertRaises(
            exception.RollbackRefused, self.revert, guest, record)
        self.assertIn('was resized', str(error))
        ours = self.ours(guest)
        self.assertTrue(rollback.is_there(ours, record))
        self.delete_all(guest)
        self.assertFalse(rollback.is_there(ours, record))

    def test_guest_whose_memory_is_saved(self):
        guest = self.guest(guests.Disk('overlay'))
        record, _, counter = self.keep(guest, 'before')
        guest.domain.managedSave(0)
        error = self.assertRaises(
            exception.RollbackRefused, self.revert, guest, record)
        self.assertIn('suspended', str(error))
        guest.domain.create()
        self.assert_lives(guest)
        self.delete_all(guest)


class FailedTest(DomainTestCase):

    def test_guest_is_what_it_was_when_its_memory_can_not_be_loaded(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('qcow2'))
        record, _, counter = self.keep(guest, 'spoilt')
        # It is there, and holds no memory that QEMU could load.
        guest.wait_writes_on(50)
        at = guest.counter()
        self._spoil(guest, record)
        self.assertRaises(exception.SnapshotError, self.revert, guest, record)
        self.assert_libvirt_knows_none(guest)
        self.assertGreater(guest.first_counter(), at - 2)
        self.assert_lives(guest)
        self.assertEqual([record.name], self.held(guest, 1))

    def _spoil(self, guest: guests.Guest,
               record: domain_records.Record) -> None:
        """Have a snapshot of the same name without memory in its place."""
        ours = self.ours(guest)
        for made in guest.disks:
            node = ours.format_node(str(made.path))
            assert node is not None
            ours.monitor('blockdev-snapshot-delete-internal-sync',
                         device=node['node-name'], name=record.name)
            ours.monitor('blockdev-snapshot-internal-sync',
                         device=node['node-name'], name=record.name)

    def test_guest_is_not_left_paused_when_libvirtd_dies(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('qcow2'))
        record, _, _ = self.keep(guest, 'then')
        killed_in = []

        def kill() -> None:
            while guest.domain.state()[0] != libvirt.VIR_DOMAIN_PAUSED:
                time.sleep(0.005)
            killed_in.append(guest.domain.state())
            self.libvirtd.kill()
            self.libvirtd.start()
        thread = threading.Thread(target=kill)
        thread.start()
        error = self.assertRaises(
            exception.SnapshotError, rollback.revert, self.ours(guest),
            record, self.records(guest), hosts.PlainHost())
        thread.join()
        print(f'libvirtd killed in {killed_in}: {error}', flush=True)
        connection = self.libvirtd.connect()
        self.addCleanup(connection.close)
        guest.domain = connection.lookupByUUIDString(guest.uuid)
        # What can't be undone while libvirtd is away is tried again.
        for path in self.state.glob('*.undo'):
            ours = self.ours(guest)
            self.assertTrue(guard.bring_back(
                str(path), lambda uri, uuid: ours, hosts.PlainHost()))
        self.assert_libvirt_knows_none(guest)
        self.assert_lives(guest)
        self.delete_all(guest)

    def test_guest_that_somebody_else_started_is_not_there(self):
        """libvirtd dies in the rollback, and somebody boots the guest."""
        guest = self.guest(guests.Disk('overlay'), guests.Disk('qcow2'))
        record, _, _ = self.keep(guest, 'then')
        later, _, _ = self.keep(guest, 'later', memory=False)
        at = guest.wait_writes_on(50)
        real = our_guests.Guest.revert_to

        def revert_to(ours: our_guests.Guest, name: str) -> None:
            killing = threading.Timer(0.3, self.libvirtd.kill)
            killing.start()
            try:
                real(ours, name)
            finally:
                killing.join()
                self.libvirtd.start()
                connection = self.libvirtd.connect()
                self.addCleanup(connection.close)
                guest.domain = connection.lookupByUUIDString(guest.uuid)
                deadline = time.monotonic() + 60
                while guest.domain.isActive():
                    self.assertLess(time.monotonic(), deadline)
                    time.sleep(0.1)
                guest.domain.create()
        with fixtures.MonkeyPatch(
                'nova_snapshot_ext.guest.Guest.revert_to', revert_to):
            error = self.assertRaises(
                exception.SnapshotError, self.revert, guest, record)
        self.assertIn('Rollback to', str(error))
        self.assertEqual([], list(self.state.glob('*.undo')))
        self.assert_libvirt_knows_none(guest)
        guest.wait_counter(1)
        records = self.records(guest)
        self.assertEqual(later.name, records.current)
        kept = records.find('before going back to then')
        assert kept is not None
        for index in (0, 1):
            self.assertEqual([record.name, later.name, kept.name],
                             self.held(guest, index))
        # With the memory that it had when it was taken down.
        self.revert(guest, kept)
        self.assertGreaterEqual(guest.first_counter(), at)
        self.assert_lives(guest)
        self.delete_all(guest)

    def start_after_libvirtd(self, guest):
        """Start a guest that is off when libvirtd was restarted: it numbers
        lives anew."""
        self.libvirtd.kill()
        self.libvirtd.start()
        connection = self.libvirtd.connect()
        self.addCleanup(connection.close)
        guest.domain = connection.lookupByUUIDString(guest.uuid)
        guest.domain.create()

    def test_guest_that_somebody_else_started_from_disks_of_both(self):
        """libvirtd was restarted meanwhile, and numbers lives anew."""
        guest = self.guest(guests.Disk('overlay'), guests.Disk('qcow2'))
        guest.domain.destroy()
        self.start_after_libvirtd(guest)
        guest.wait_writes_on(50)
        record, _, _ = self.keep(guest, 'then', memory=False)
        at = guest.wait_writes_on(50)
        life = self.ours(guest).life()
        real = internal_snapshot.apply_named
        applied: list[str] = []

        def apply_named(path: str, name: str, log: undo.UndoLog) -> None:
            if applied:
                self.start_after_libvirtd(guest)
            real(path, name, log)
            applied.append(path)
        with fixtures.MonkeyPatch(
                'nova_snapshot_ext.internal_snapshot.apply_named',
                apply_named):
            self.assertRaises(
                exception.StartedByAnother, self.revert, guest, record)
        self.assertEqual([str(guest.disks[0].path)], applied)
        self.assertEqual(life, self.ours(guest).life())
        self.assertEqual([], list(self.state.glob('*.undo')))
        records = self.records(guest)
        self.assertEqual(record.name, records.current)
        kept = records.find('before going back to then')
        assert kept is not None
        for index in (0, 1):
            self.assertEqual([record.name, kept.name],
                             self.held(guest, index))
        guest.domain.destroy()
        self.revert(guest, kept)
        found = images.check_point_in_time(guest.images)
        self.assertGreaterEqual(found[0][0], at - 1)
        guest.start()
        self.assert_lives(guest)
        self.delete_all(guest)


class CommandTest(DomainTestCase, test_cli.CommandTestCase):

    def test_tree_revert_and_delete(self):
        guest = self.guest(guests.Disk('overlay'))
        create = ('create', guest.name, '--to', self.images, '--staging',
                  self.staging, '--flow', 'domain', '--name')
        self.run_command(*create, 'one')
        self.run_command(*create, 'two', '--no-memory')
        done = self.run_command('tree', guest.name)
        self.assertRegex(
            done.stdout, r'^one: memory, .*/one.qcow2\n'
            r'  two: disk, .*/two.qcow2\n    \(now\)\n$')
        self.run_command('revert', guest.name, 'one')
        tree = json.loads(self.run_command(
            'tree', guest.name, '--json').stdout)
        self.assertEqual(tree['snapshots'][0]['name'], tree['current'])
        done = self.run_command('revert', guest.name, 'three',
                                expect=cli.REFUSED)
        self.assertIn('one, two', done.stderr)
        for title in ('one', 'two'):
            self.run_command('delete', guest.name, title)
        self.assertEqual('', self.run_command('tree', guest.name).stdout)
        self.assertEqual([], list(self.state.iterdir()))
        self.assert_whole(guest)


class KilledTest(DomainTestCase, test_killed.KilledTestCase):

    def wait_undone(self) -> None:
        """Wait until nothing is to be undone any more."""
        deadline = time.monotonic() + 180
        while list(self.state.glob('*.undo')) or list(
                self.staging.iterdir()):
            self.assertLess(time.monotonic(), deadline, 'something was left')
            time.sleep(0.05)

    def assert_clean(self, guest: guests.Guest, names: list[str]) -> None:
        """Wait until nothing is left but what is to stay."""
        self.wait_undone()
        self.assert_libvirt_knows_none(guest)
        for index in range(len(guest.disks)):
            self.assertEqual(names, self.held(guest, index))
        self._forget_image()

    def test_taking(self):
        for memory in (True, False):
            for guard_too in (False, True):
                self._kill_taking(memory, guard_too)

    def _kill_taking(self, memory: bool, guard_too: bool) -> None:
        guest = self.guest(guests.Disk('overlay'), guests.Disk('qcow2'))
        self.script = test_killed.TAKE.replace(
            'convert_timeout=60)', f'convert_timeout=60, '
            f'domain=request.DomainSnapshot(memory={memory}))')
        steps = self._steps(guest, 'domain')
        self.assertLess(10, len(steps))
        self.delete_all(guest)
        first = EVERY // 2 if guard_too else 0
        for number, step in list(enumerate(steps, 1))[first::EVERY]:
            self._killed_at(guest, 'domain', number, guard_too)
            since = time.monotonic()
            if guard_too or step == 'after header':
                self._recover()
            seconds = self._wait_whole(guest, since)
            print(f'domain memory={memory} killed at {number:2} {step}: '
                  f'whole after {seconds:.2f} s', flush=True)
            # A name that was given is taken back with the rest.
            self.wait_undone()
            kept = self.records(guest).all()
            if not kept:
                self.assert_clean(guest, [])
                continue
            # Its image was whole.
            self.assertEqual(
                list(self.images.glob('*.qcow2')),
                [pathlib.Path(kept[0].image_id)])
            self.assert_clean(guest, [kept[0].name])
            self.delete_all(guest)
        guest.domain.destroy()
        for disk in guest.disks:
            images.qemu_img_check(disk.path)

    def test_going_back_with_memory(self):
        self._kill_reverting(True)

    def test_going_back_to_disks(self):
        self._kill_reverting(False)

    def test_deleting(self):
        """A living guest, and one that is off: its disk is not touched."""
        guest = self.guest(guests.Disk('overlay'), guests.Disk('qcow2'))
        self.keep(guest, 'stays')
        for power in (lambda: None, guest.domain.destroy):
            self.keep(guest, 'goes')
            power()
            steps: list[str] = []
            number = 0
            while number == 0 or number <= len(steps):
                if self.records(guest).find('goes') is None:
                    self._forget_image()
                    self.keep(guest, 'goes')
                number += self._kill_delete_at(guest, number, steps)
        guest.start()
        self.assert_lives(guest)
        self.delete_all(guest)

    def _kill_delete_at(self, guest: guests.Guest, number: int,
                        steps: list[str]) -> int:
        """:returns: how many steps to go on by"""
        name = self.records(guest).find('goes').name
        process = self._reverting(guest, name, number, DELETE)
        assert process.stdout is not None
        if number == 0:
            steps += process.stdout.read().splitlines()
            self.assertEqual(0, process.wait())
            return 1
        self.assertEqual('here\n', process.stdout.readline())
        life = guest.domain.ID()
        process.kill()
        process.wait()
        self._assert_unharmed(guest, life)
        self._recover()
        left = [each.name for each in self.records(guest).all()]
        self.assertIn(len(left), (1, 2))
        self.assert_clean(guest, left)
        if guest.domain.isActive():
            self.assert_lives(guest)
        print(f'deletion killed at {number:2} {steps[number - 1]}: '
              f'{len(left)} left', flush=True)
        return EVERY

    def _assert_unharmed(self, guest: guests.Guest, life: int) -> None:
        """Nobody guards a deletion: nothing has to be done for the guest.

        :param life: its number before
        """
        self.assertEqual([], self._guards())
        if life >= 0:
            self.assertEqual(life, guest.domain.ID())
            self.assert_lives(guest)
            return
        self.assertFalse(guest.domain.isActive())
        guest.start()
        self.assert_lives(guest)
        guest.domain.destroy()

    def test_deleting_in_the_middle_of_qemus_work(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('qcow2'),
                           churn=True)
        self.keep(guest, 'stays')
        for power in (lambda: None, guest.domain.destroy):
            for number in range(4):
                if not guest.domain.isActive():
                    guest.start()
                name = self.keep(guest, f'goes {number}')[0].name
                self._forget_image()
                guest.wait_writes_on(20)
                power()
                life = guest.domain.ID()
                process = subprocess.Popen(
                    [sys.executable, '-c', DELETE_NOTED, self.libvirtd.uri,
                     guest.uuid, name, str(self.state), '0'],
                    stdout=subprocess.PIPE, text=True,
                    start_new_session=True)
                self.addCleanup(self._end, process)
                assert process.stdout is not None
                while process.stdout.readline() != 'at work\n':
                    pass
                time.sleep(random.uniform(0, 0.03))
                # With what it has started.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                left = name in self.held(guest)
                self._assert_unharmed(guest, life)
                self._recover()
                self.wait_undone()
                self.assertNotIn(name, self.held(guest))
                self.assertNotIn(name, self.held(guest, 1))
                print(f'deletion killed at work: {left} left', flush=True)
        guest.start()
        self.assert_lives(guest)
        self.delete_all(guest)
        guest.domain.destroy()
        for disk in guest.disks:
            # What was freed and not noted as such would be a leak, no more.
            self.assertIn(subprocess.run(
                ['qemu-img', 'check', '-q', '-f', 'qcow2', disk.path],
                capture_output=True).returncode, (0, 3))

    def _reverting(self, guest: guests.Guest, name: str, last: int,
                   script: str = REVERT) -> 'subprocess.Popen[str]':
        process = subprocess.Popen(
            [sys.executable, '-c', script, self.libvirtd.uri, guest.uuid,
             name, str(self.state), str(last)],
            stdout=subprocess.PIPE, text=True)
        self.addCleanup(self._end, process)
        return process

    def _kill_reverting(self, memory: bool) -> None:
        guest = self.guest(guests.Disk('overlay'), guests.Disk('qcow2'))
        record, _, counter = self.keep(guest, 'then', memory=memory)
        process = self._reverting(guest, record.name, 0)
        assert process.stdout is not None
        steps = process.stdout.read().splitlines()
        self.assertEqual(0, process.wait())
        for guard_too in (False, True):
            first = EVERY // 2 if guard_too else 0
            for number, step in list(enumerate(steps, 1))[first::EVERY]:
                self._kill_revert_at(guest, record, counter, number, step,
                                     guard_too)
        self.delete_all(guest)
        guest.domain.destroy()
        for disk in guest.disks:
            images.qemu_img_check(disk.path)

    def _kill_revert_at(self, guest: guests.Guest,
                        record: domain_records.Record, counter: int,
                        number: int, step: str, guard_too: bool) -> None:
        guest.wait_writes_on(50)
        process = self._reverting(guest, record.name, number)
        assert process.stdout is not None
        self.assertEqual('here\n', process.stdout.readline())
        if guard_too:
            for pid in self._guards():
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
        since = time.monotonic()
        if guard_too or step == 'after header':
            self._recover()
        self._see_one_of_two(guest, record, counter, since,
                             f'{number:2} {step}')

    def _see_one_of_two(self, guest: guests.Guest,
                        record: domain_records.Record, counter: int,
                        since: float, words: str) -> None:
        self.assert_clean(guest, [record.name])
        seconds = time.monotonic() - since
        self.assertTrue(self._is_whole(guest))
        self.assert_lives(guest)
        print(f'{record.rollback.value} back killed at {words}: all is done '
              f'after {seconds:.2f} s, first counter {guest.console.first} '
              f'({counter} then)', flush=True)

    def test_in_the_middle_of_libvirts_work(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('qcow2'))
        record, _, counter = self.keep(guest, 'then')
        for wait_s in (0.0, 0.3, 0.8, 1.2, 1.6, 2.0, 3.0):
            guest.wait_writes_on(50)
            process = self._reverting(guest, record.name, 0)
            assert process.stdout is not None
            while process.stdout.readline() != 'after come_back\n':
                pass
            time.sleep(wait_s)
            process.kill()
            process.wait()
            self._see_one_of_two(guest, record, counter, time.monotonic(),
                                 f'{wait_s} s')
        self.delete_all(guest)
