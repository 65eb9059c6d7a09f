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

import dataclasses
from importlib import metadata
import io
import json
import os
import typing
from unittest import mock

import fixtures
import libvirt

from nova_snapshot_ext import account as accounts
from nova_snapshot_ext.cmd import snapshot as cmd
from nova_snapshot_ext import domain_records
from nova_snapshot_ext import exception
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext.images import base as images
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import rollback
from nova_snapshot_ext import snapshot
from nova_snapshot_ext import undo
from tests.unit import base
from tests.unit import fakes
from tests.unit import test_domain_records

RESULT = snapshot.Result(
    'live', 'staged', frozen.Consistency.CRASH, 0.25, 4096, 1.5, '/i/a.qcow2')


class CommandTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.path = self.new_file('disk', b'\0' * 4096)
        self.domain.disks = fakes.disk_xml(self.path)
        self.target = self.new_directory('images')
        self.uris: list[str] = []
        self.patch_name('libvirt.open', lambda uri: (
            self.uris.append(uri), self.domain.connection)[1])
        self.patch_name('libvirt.registerErrorHandler',
                        lambda handler, context: None)
        self.patch_name('nova_snapshot_ext.cmd.snapshot._state_directory',
                        lambda: self.state)
        self.patch_name('nova_snapshot_ext.mover_stream.why_not',
                        lambda python: None)
        self.patch_name('oslo_log.log.setup', lambda *arguments: None)
        self.useFixture(fixtures.EnvironmentVariable(
            'TMPDIR', self.staging))
        self.useFixture(fixtures.EnvironmentVariable('PYTHONSAFEPATH'))
        self.taken: list[tuple[typing.Any, ...]] = []
        self.error: BaseException | None = None
        self.patch_name('nova_snapshot_ext.snapshot.take', self.take)

    def take(self, *arguments: typing.Any,
             **more: typing.Any) -> snapshot.Result:
        self.taken.append((*arguments, more))
        if self.error is not None:
            raise self.error
        return RESULT

    def run_command(self, *arguments: str) -> int:
        self.out, self.err = io.StringIO(), io.StringIO()
        with fixtures.MonkeyPatch('sys.stdout', self.out), \
                fixtures.MonkeyPatch('sys.stderr', self.err):
            return cmd.main(arguments)

    def create(self, *arguments: str) -> int:
        return self.run_command('create', '--to', self.target, *arguments,
                                'instance-00000001')


@undo.step
@undo.with_guest
def demo_start(around: undo.Surroundings, guest: guests.Guest) -> None:
    with around.host.may_start() as allowed:
        if allowed:
            guest.start()


@undo.step
@undo.with_guest
def demo_write(around: undo.Surroundings, guest: guests.Guest) -> None:
    with around.host.undisturbed():
        guest.suspend()


class TestRecover(CommandTestCase):

    NOVA = ('<metadata><nova:instance xmlns:nova='
            '"http://openstack.org/xmlns/libvirt/nova/1.1"/></metadata>')

    def setUp(self) -> None:
        super().setUp()
        self.log = self.new_log()
        self.log.push(demo_start)
        self.domain.off()

    def recover(self, *arguments: str) -> int:
        return self.run_command('recover', *arguments)

    def left(self) -> list[str]:
        return sorted(os.listdir(self.state))

    def written(self, path: str) -> tuple[int, ...]:
        """What changes when a file does; it may be read meanwhile."""
        found = os.stat(path)
        return (found.st_ino, found.st_mode, found.st_size,
                found.st_mtime_ns, found.st_ctime_ns)

    def test_what_a_dead_process_left_is_undone(self) -> None:
        self.log.close()
        self.assertEqual(0, self.recover())
        self.assertEqual(['createWithFlags'], self.journal.of('create'))
        self.assertEqual([], self.left())
        self.assertEqual(f'{self.log.path}: done\n  demo_start {{}}\n',
                         self.out.getvalue())
        # By the URI that the log names.
        self.assertEqual([fakes.URI], self.uris)

    def test_dry_run_changes_nothing(self) -> None:
        self.log.close()
        with open(self.log.path, 'ab') as file:
            file.write(b'{"cut')
        before = self.written(self.log.path)
        self.assertEqual(0, self.recover('--dry-run'))
        self.assertEqual([], self.journal.of('create'))
        self.assertEqual(before, self.written(self.log.path))
        self.assertEqual(
            f'{self.log.path}: would be done\n  demo_start {{}}\n',
            self.out.getvalue())

    def test_what_a_living_process_holds_is_left_alone(self) -> None:
        for arguments in ((), ('--dry-run',)):
            self.assertEqual(0, self.recover(*arguments))
            self.assertIn('in flight', self.out.getvalue())
        self.assertEqual([], self.journal.of('create'))

    def test_guest_of_novas_is_started_by_force_only(self) -> None:
        self.domain.rest = self.NOVA
        self.log.close()
        self.recover('--dry-run')
        self.assertIn("Nova's", self.out.getvalue())
        self.assertEqual(cmd.FAILED, self.recover())
        self.assertIn('start nova-compute', self.out.getvalue())
        self.assertEqual([], self.journal.of('create'))
        # Nova's next start finds what it has to do.
        self.assertEqual(1, len(undo.read(self.log.path).pending))
        self.assertEqual(0, self.recover('--force'))
        self.assertEqual(['createWithFlags'], self.journal.of('create'))

    def test_disk_of_a_guest_of_novas_is_written_to_by_force_only(
            self) -> None:
        self.domain.rest = self.NOVA
        self.log.push(demo_write)
        self.log.close()
        self.assertEqual(cmd.FAILED, self.recover())
        self.assertIn('may be moving it', self.out.getvalue())
        self.assertEqual([], self.journal.of('suspend'))
        self.assertEqual(0, self.recover('--force'))
        self.assertEqual(['suspend'], self.journal.of('suspend'))

    def test_nothing_is_started_after_a_reboot(self) -> None:
        self.log.close()
        self.patch_name('nova_snapshot_ext.undo.boot_id', lambda: 'another')
        self.recover('--dry-run')
        self.assertIn('before a reboot', self.out.getvalue())
        self.assertEqual(0, self.recover('--force'))
        self.assertEqual([], self.journal.of('create'))
        self.assertEqual([], self.left())

    def test_guest_may_be_gone(self) -> None:
        self.log.close()
        self.domain.connection.domains = ()
        self.recover('--dry-run')
        self.assertIn('the guest is gone', self.out.getvalue())
        self.assertEqual(0, self.recover())
        self.assertEqual([], self.left())

    def test_log_that_makes_no_sense_stops_no_other(self) -> None:
        self.log.close()
        path = os.path.join(self.state, 'a.undo')
        with open(path, 'w') as file:
            file.write('{}\n')
        for arguments in (('--dry-run',), ()):
            self.assertEqual(cmd.FAILED, self.recover(*arguments))
            self.assertIn(f'{path}: failed, it can not be understood',
                          self.out.getvalue())
        self.assertEqual(['createWithFlags'], self.journal.of('create'))
        self.assertEqual(['a.undo'], self.left())

    def test_libvirt_that_is_away_is_said(self) -> None:
        self.log.close()
        self.patch_name('nova_snapshot_ext.guard.find_guest',
                        lambda uri, uuid: self.refuse())
        self.assertEqual(cmd.FAILED, self.recover())
        self.assertIn('no connection', self.out.getvalue())
        self.assertEqual(1, len(self.left()))

    def refuse(self) -> None:
        raise fakes.libvirt_error(libvirt.VIR_ERR_NO_CONNECT,
                                  'no connection')

    def test_there_may_be_nothing_to_do(self) -> None:
        self.log.unwind()
        self.assertEqual(0, self.recover())
        self.assertEqual('', self.out.getvalue())

    def test_snapshot_starts_no_guest_that_nova_stopped(self) -> None:
        self.domain.rest = self.NOVA
        self.log.close()
        self.assertNotEqual(0, self.create())
        self.assertIn('--force', self.err.getvalue())
        self.assertEqual([], self.taken)
        self.assertEqual([], self.journal.of('create'))
        self.create('--force')
        self.assertEqual(1, len(self.taken))
        self.assertEqual(['createWithFlags'], self.journal.of('create'))


class TestCreate(CommandTestCase):

    def test_snapshot_goes_into_a_directory(self) -> None:
        self.assertEqual(0, self.create())
        [(guest, host, planned, request, service, description, more)] = (
            self.taken)
        self.assertEqual(fakes.UUID, guest.uuid)
        self.assertEqual(['backup', 'live', 'cold'], [
            each.name for each in planned.candidates])
        self.assertEqual(
            ('qcow2', False, self.staging, self.state, True),
            (request.image_format, request.compress,
             request.staging_directory, request.state_directory,
             request.may_stop))
        self.assertRegex(description.name,
                         '^instance-00000001-[0-9]{8}T[0-9]{6}Z$')
        self.assertEqual({'verify_hash': False}, more)

    def test_result_is_one_line(self) -> None:
        self.create()
        self.assertEqual(
            '/i/a.qcow2: 4096 bytes, flow live, transfer staged, '
            'consistency crash, guest paused 0.25 s, 1.5 s\n',
            self.out.getvalue())
        self.assertEqual('', self.err.getvalue())

    def test_log_has_the_line_of_what_was_done(self) -> None:
        self.create()
        [line] = [line for line in self.output.output.splitlines()
                  if 'Snapshot ended: ' in line]
        values = accounts.parsed(line)
        self.assertEqual(('ok', fakes.UUID, '-'), (
            values['outcome'], values['instance'], values['request']))
        self.assertNotEqual('-', values['plan_s'])

    def test_result_is_one_json_document(self) -> None:
        self.create('--json')
        self.assertEqual({
            'domain': 'instance-00000001', 'flow': 'live',
            'transfer': 'staged', 'consistency': 'crash',
            'guest_pause_s': 0.25, 'length': 4096, 'duration_s': 1.5,
            'location': '/i/a.qcow2', 'images': []},
            json.loads(self.out.getvalue()))

    def test_each_image_of_several_has_a_line(self) -> None:
        global RESULT
        self.addCleanup(globals().__setitem__, 'RESULT', RESULT)
        RESULT = dataclasses.replace(RESULT, images=tuple(
            snapshot.DiskImage(device, kind, 4096, 2048, f'/i/{device}')
            for device, kind in (('vda', 'root'), ('vdb', 'swap'))))
        self.create('--disks', 'all')
        self.assertEqual(
            ['  vda: /i/vda, 2048 bytes', '  vdb: /i/vdb, 2048 bytes'],
            self.out.getvalue().splitlines()[1:])
        self.create('--json')
        self.assertEqual(
            {'device': 'vdb', 'kind': 'swap', 'capacity': 4096,
             'length': 2048, 'location': '/i/vdb'},
            json.loads(self.out.getvalue())['images'][1])

    def test_disks_are_those_of_the_wish_or_the_configuration(self) -> None:
        path = self.new_file('all.conf', b'[snapshot_ext]\ndisks = all\n')
        for arguments, disks in (
                ((), requests.Disks.ROOT),
                (('--disks', 'all'), requests.Disks.ALL)):
            self.create(*arguments)
            self.assertEqual(disks, self.taken[-1][3].disks)
        self.run_command('--config-file', path, 'create', '--to',
                         self.target, fakes.UUID)
        self.assertEqual(requests.Disks.ALL, self.taken[-1][3].disks)

    def test_flows_are_asked_for_the_wished_disks(self) -> None:
        self.domain.disks += fakes.disk_xml(
            'pool/image', target='vdb', kind='network')
        self.run_command('flows', fakes.UUID)
        self.assertIn('backup: can serve\n', self.out.getvalue())
        self.run_command('flows', '--disks', 'all', fakes.UUID)
        self.assertIn('backup: vdb is a network disk', self.out.getvalue())

    def test_options_are_passed_on(self) -> None:
        other = self.new_directory('other')
        self.create('--format', 'raw', '--name', 'mine', '--verify-hash',
                    '--quiesce', 'never', '--staging', other, '--compress')
        request, description, more = (
            self.taken[0][3], self.taken[0][5], self.taken[0][6])
        self.assertEqual(
            ('raw', True, 'never', other),
            (request.image_format, request.compress,
             request.quiesce.value, request.staging_directory))
        self.assertEqual(('mine', 'raw', 'bare'), (
            description.name, description.disk_format,
            description.container_format))
        self.assertTrue(more['verify_hash'])

    def test_flow_by_name_is_the_only_candidate(self) -> None:
        self.create('--flow', 'cold')
        self.assertEqual(['cold'], [
            each.name for each in self.taken[0][2].candidates])

    def test_libvirts_uri_can_be_chosen(self) -> None:
        self.run_command('--connect', 'qemu:///session', 'create', '--to',
                         self.target, fakes.UUID)
        self.assertEqual(['qemu:///session'], self.uris)
        self.assertTrue(self.domain.connection.closed)

    def test_configuration_can_be_read(self) -> None:
        path = self.new_file(
            'nova.conf', b'[snapshot_ext]\nflows = cold\n'
            b'freeze_timeout = 3\n')
        self.run_command('--config-file', path, 'create', '--to',
                         self.target, fakes.UUID)
        self.assertEqual(3, self.taken[0][3].freeze_timeout)
        self.assertEqual(['cold'], [
            each.name for each in self.taken[0][2].candidates])

    def test_programs_are_not_looked_for_where_we_are(self) -> None:
        self.create()
        self.assertEqual('1', os.environ['PYTHONSAFEPATH'])


class TestDomainSnapshots(CommandTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.records = domain_records.Records(self.state, fakes.UUID)
        self.done: list[tuple[typing.Any, ...]] = []
        self.patch_name('nova_snapshot_ext.rollback.revert', self.revert)
        self.patch_name('nova_snapshot_ext.domain_snapshot.delete',
                        lambda *arguments: self.done.append(arguments))
        for name, parent in ((test_domain_records.ONE, None),
                             (test_domain_records.TWO,
                              test_domain_records.ONE),
                             (test_domain_records.THREE,
                              test_domain_records.ONE)):
            self.records.add(test_domain_records.record(name, parent))
        self.records.set_current(test_domain_records.TWO)

    def revert(self, *arguments: typing.Any) -> rollback.Result:
        self.done.append(arguments)
        return rollback.Result(domain_records.Rollback.MEMORY, 4.5)

    def test_wish_is_passed_on(self) -> None:
        self.create('--name', 'mine')
        self.create('--no-memory')
        first, second = (taken[3].domain for taken in self.taken)
        self.assertEqual((True, 'mine', 8, 100), (
            first.memory, first.title, first.most, first.most_gb))
        self.assertFalse(second.memory)
        self.assertEqual(self.taken[1][5].name, second.title)

    def test_tree_shows_where_the_guest_is(self) -> None:
        self.assertEqual(0, self.run_command('tree', fakes.UUID))
        self.assertEqual(
            'title a: memory, 2026-01-01T00:00:00Z, image-a\n'
            '  title b: memory, 2026-01-01T00:00:01Z, image-b\n'
            '    (now)\n'
            '  title c: memory, 2026-01-01T00:00:02Z, image-c\n',
            self.out.getvalue())
        self.records.set_current(None)
        self.run_command('tree', fakes.UUID)
        self.assertEqual('(now)', self.out.getvalue().splitlines()[-1])
        self.run_command('tree', fakes.UUID, '--json')
        found = json.loads(self.out.getvalue())
        self.assertIsNone(found['current'])
        self.assertEqual(['title a', 'title b', 'title c'], [
            each['title'] for each in found['snapshots']])
        self.records.replace(dataclasses.replace(
            self.records.all()[0], image_id=''))
        self.run_command('tree', fakes.UUID)
        self.assertIn('title a: memory, 2026-01-01T00:00:00Z, no image\n',
                      self.out.getvalue())
        self.records.forget()
        self.run_command('tree', fakes.UUID)
        self.assertEqual('', self.out.getvalue())

    def test_external_ones_are_wished_for_and_shown(self) -> None:
        self.assertEqual(cmd.REFUSED, self.create('--external'))
        self.assertIn('--external is for --flow domain', self.err.getvalue())
        self.assertEqual(cmd.REFUSED, self.create(
            '--external', '--flow', 'cold'))
        self.assertEqual([], self.taken)
        self.create()
        self.assertFalse(self.taken[0][3].domain.external)
        self.records.replace(test_domain_records.record(
            test_domain_records.THREE, test_domain_records.ONE,
            files=domain_records.Files({'vda': 'raw'})))
        self.run_command('tree', fakes.UUID)
        self.assertIn('title c: memory, external, 2026', self.out.getvalue())
        self.run_command('tree', fakes.UUID, '--json')
        self.assertEqual([False, False, True], [
            each['external'] for each in
            json.loads(self.out.getvalue())['snapshots']])

    def test_one_that_can_not_be_deleted_is_refused(self) -> None:
        def refuse(*arguments: object) -> None:
            raise exception.DeletionRefused('two descend from it')
        self.patch_name('nova_snapshot_ext.domain_snapshot.delete', refuse)
        self.assertEqual(cmd.REFUSED, self.run_command(
            'delete', fakes.UUID, 'title a'))
        self.assertIn('two descend', self.err.getvalue())

    def test_one_is_chosen_by_title_name_or_image(self) -> None:
        for which in ('title b', test_domain_records.TWO, 'image-b'):
            for command in ('revert', 'delete'):
                self.assertEqual(
                    0, self.run_command(command, fakes.UUID, which))
                self.assertIn('title b', self.out.getvalue())
                guest, record = self.done.pop()[:2]
                self.assertEqual((fakes.UUID, test_domain_records.TWO),
                                 (guest.uuid, record.name))

    def test_result_is_one_json_document(self) -> None:
        self.run_command('revert', fakes.UUID, 'title a', '--json')
        self.assertEqual(
            {'domain': 'instance-00000001', 'title': 'title a',
             'name': test_domain_records.ONE, 'rollback': 'memory',
             'guest_pause_s': 4.5}, json.loads(self.out.getvalue()))

    def test_one_that_is_not_there_is_refused(self) -> None:
        for command in ('revert', 'delete'):
            self.assertEqual(cmd.REFUSED, self.run_command(
                command, fakes.UUID, 'title d'))
            self.assertIn('has title a, title b, title c',
                          self.err.getvalue())
        self.assertEqual([], self.done)

    def test_novas_guest_is_left_to_nova(self) -> None:
        self.domain.rest = TestRecover.NOVA
        for command in ('revert', 'delete'):
            words = (command, fakes.UUID, 'title a')
            self.assertEqual(cmd.REFUSED, self.run_command(*words))
            self.assertIn('openstack server rebuild', self.err.getvalue())
            self.assertEqual([], self.done)
            self.assertEqual(0, self.run_command(*words, '--force'))
            self.done.clear()


class TestNovasGuest(CommandTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.domain.rest = (
            '<metadata><instance xmlns='
            '"http://openstack.org/xmlns/libvirt/nova/1.1"/></metadata>')

    def test_it_is_not_stopped(self) -> None:
        self.assertEqual(cmd.REFUSED, self.create('--flow', 'cold'))
        self.assertIn('Nova owns', self.err.getvalue())
        self.assertEqual([], self.taken)

    def test_it_is_stopped_by_force(self) -> None:
        self.assertEqual(0, self.create('--flow', 'cold', '--force'))
        self.assertTrue(self.taken[0][3].may_stop)

    def test_it_is_copied_while_it_runs(self) -> None:
        self.create()
        self.assertEqual(['backup', 'live'], [
            each.name for each in self.taken[0][2].candidates])


class TestExitCodes(CommandTestCase):

    def assertFailed(self, code: int, message: str,
                     *arguments: str) -> None:
        self.assertEqual(code, self.create(*arguments))
        self.assertRegex(self.err.getvalue(), f'^nova-snapshot: .*{message}')
        self.assertEqual(1, self.err.getvalue().count('\n'))
        self.assertEqual('', self.out.getvalue())

    def test_command_line_that_is_not_valid(self) -> None:
        for arguments in ((), ('create',), ('create', 'a'), ('sing', 'a'),
                          ('create', '--to', 'x', '--format', 'iso', 'a')):
            error = self.assertRaises(
                SystemExit, self.run_command, *arguments)
            self.assertEqual(cmd.USAGE, error.code)

    def test_version_is_that_of_the_package(self) -> None:
        for version, expected in (
                ('1.2.3', 'nova-snapshot 1.2.3\n'),
                (metadata.PackageNotFoundError(),
                 'nova-snapshot not installed\n')):
            with mock.patch('importlib.metadata.version', autospec=True,
                            side_effect=[version]):
                error = self.assertRaises(
                    SystemExit, self.run_command, '--version')
            self.assertEqual((0, expected), (error.code, self.out.getvalue()))

    def test_no_such_domain(self) -> None:
        self.domain.connection.domains = ()
        self.assertFailed(cmd.NO_DOMAIN, 'no domain instance-00000001')

    def test_libvirt_that_is_not_there(self) -> None:
        def refuse(uri: str) -> None:
            raise fakes.libvirt_error(libvirt.VIR_ERR_NO_CONNECT, 'no socket')
        self.patch_name('libvirt.open', refuse)
        self.assertFailed(cmd.FAILED, 'no socket')

    def test_unknown_flow(self) -> None:
        self.assertFailed(
            cmd.REFUSED, 'installed are backup, cold, domain, live',
            '--flow', 'warm')

    def test_flow_that_can_not_serve(self) -> None:
        self.domain.off()
        self.assertFailed(cmd.REFUSED, 'shut off', '--flow', 'live')

    def test_encrypted_disk(self) -> None:
        self.domain.disks = fakes.disk_xml(
            self.path, inside="<encryption format='luks'/>")
        self.assertFailed(cmd.REFUSED, 'encrypted')

    def test_directory_that_is_not_there(self) -> None:
        self.assertFailed(cmd.REFUSED, '--staging = ', '--staging', '/none')
        os.rmdir(self.target)
        self.assertFailed(cmd.REFUSED, '--to = ')

    def test_configuration_that_can_not_be_read(self) -> None:
        self.assertEqual(cmd.REFUSED, self.run_command(
            '--config-file', '/none', 'create', '--to', self.target, 'a'))
        self.assertIn('--config-file', self.err.getvalue())

    def test_snapshot_that_fails(self) -> None:
        for error, code in (
                (exception.GuestBusy('busy'), cmd.BUSY),
                (exception.GuestGone('gone'), cmd.NO_DOMAIN),
                (exception.FreezeFailed('no'), cmd.FAILED),
                (exception.UndoFailed('no'), cmd.FAILED),
                (exception.ImageRefused('413'), cmd.FAILED),
                (exception.NotEnoughRoom('--to', '/d', 2, 1), cmd.REFUSED),
                (PermissionError('denied'), cmd.FAILED)):
            self.error = error
            self.assertFailed(code, str(error).split('=')[0])

    def test_cloud_that_is_not_known(self) -> None:
        self.useFixture(fixtures.EnvironmentVariable(
            'OS_CLIENT_CONFIG_FILE', '/none'))
        self.assertEqual(cmd.REFUSED, self.run_command(
            'create', '--to', 'glance', '--cloud', 'nowhere',
            'instance-00000001'))
        self.assertIn('--cloud', self.err.getvalue())


class TestFlows(CommandTestCase):

    NO_QCOW2 = ('vda can not hold an internal snapshot: that takes a qcow2 '
                'file which is not shared, transient or encrypted')

    def test_each_flow_says_whether_it_can_serve(self) -> None:
        self.domain.off()
        self.assertEqual(0, self.run_command('flows', 'instance-00000001'))
        self.assertEqual(
            'backup: the guest is shut off\ncold: can serve\n'
            f'domain: {self.NO_QCOW2}\n'
            'live: the guest is shut off\n',
            self.out.getvalue())

    def test_json(self) -> None:
        self.domain.off()
        self.run_command('flows', '--json', 'instance-00000001')
        self.assertEqual(
            {'backup': {'serves': False,
                        'obstacle': 'the guest is shut off'},
             'cold': {'serves': True, 'obstacle': None},
             'domain': {'serves': False, 'obstacle': self.NO_QCOW2},
             'live': {'serves': False, 'obstacle': 'the guest is shut off'}},
            json.loads(self.out.getvalue())['flows'])

    def test_disk_that_is_not_safe_is_an_obstacle(self) -> None:
        self.domain.disks = fakes.disk_xml(self.path, 'qcow2')
        self.assertEqual(0, self.run_command('flows', 'instance-00000001'))
        self.assertIn('no qcow2 header', self.out.getvalue())

    def test_encrypted_disk_is_an_obstacle_of_every_flow(self) -> None:
        self.domain.disks = fakes.disk_xml(
            self.path, inside="<encryption format='luks'/>")
        self.run_command('flows', 'instance-00000001')
        self.assertEqual(3, self.out.getvalue().count('vda is encrypted'))


class FakeBar:
    made: list['FakeBar'] = []

    def __init__(self, **options: object) -> None:
        self.made.append(self)
        self.n = self.total = 0

    def __enter__(self) -> 'FakeBar':
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, more: int) -> None:
        self.n += more


class TestProgress(CommandTestCase):

    def progress(self, *arguments: str) -> str:
        self.patch_name('nova_snapshot_ext.cmd.snapshot._PLAIN_LINE_S', 0)
        real = self.take

        def take(*values: typing.Any, **more: typing.Any) -> snapshot.Result:
            values[3].progress(1000, 4000)
            values[3].progress(4000, 4000)
            return real(*values, **more)
        self.patch_name('nova_snapshot_ext.snapshot.take', take)
        self.create(*arguments)
        return self.err.getvalue()

    def test_lines_where_there_is_no_terminal(self) -> None:
        self.assertEqual(
            '1000 of 4000 bytes\n4000 of 4000 bytes\n', self.progress())

    def test_nothing_beside_json(self) -> None:
        self.assertEqual('', self.progress('--json'))

    def test_bar_on_a_terminal(self) -> None:
        terminal = type('Terminal', (io.StringIO,), {
            'isatty': lambda self: True})
        self.patch_name('tests.unit.test_cmd_snapshot.io.StringIO', terminal)
        FakeBar.made.clear()
        self.patch_name('tqdm.tqdm', FakeBar)
        self.progress()
        [bar] = FakeBar.made
        self.assertEqual((4000, 4000), (bar.n, bar.total))


class TestStateDirectory(base.TestCase):

    def test_without_nova_and_root_it_is_ones_own(self) -> None:
        self.patch_name('os.access', lambda path, mode: False)
        self.patch_name('os.geteuid', lambda: 1000)
        self.useFixture(fixtures.EnvironmentVariable(
            'XDG_STATE_HOME', self.directory))
        self.assertEqual(
            os.path.join(self.directory, 'nova-snapshot-ext'),
            cmd._state_directory())

    def test_root_has_one_of_the_host(self) -> None:
        self.patch_name('os.access', lambda path, mode: False)
        self.patch_name('os.geteuid', lambda: 0)
        self.assertEqual('/var/lib/nova-snapshot-ext',
                         cmd._state_directory())

    def test_novas_is_novas_whoever_makes_it(self) -> None:
        made: list[object] = []
        self.patch_name('os.access', lambda path, mode: True)
        self.patch_name('os.path.isdir', lambda path: False)
        self.patch_name('os.stat', lambda path: os.stat_result(
            (0, 0, 0, 0, 42, 43, 0, 0, 0, 0)))
        self.patch_name('nova_snapshot_ext.rights.make_owners', made.append)
        path = '/var/lib/nova/snapshot-ext'
        self.assertEqual(path, cmd._state_directory())
        self.assertEqual([path], made)

    def configured(self, text: str) -> str:
        """The directory with a configuration of Nova's."""
        path = self.new_file('nova.conf', text.encode())
        options = cmd._parser().parse_args(
            ['--config-file', path, 'recover', '--dry-run'])
        return cmd._state_directory_of(options, cmd._configuration(options))

    def test_it_follows_from_novas_configuration(self) -> None:
        self.patch_name('oslo_log.log.setup', lambda *arguments: None)
        nova = self.new_directory('nova')
        expected = os.path.join(nova, 'snapshot-ext')
        self.assertEqual(expected, self.configured(
            f'[DEFAULT]\nstate_path = {nova}\n'))
        self.assertEqual(0o711, os.stat(expected).st_mode & 0o777)
        self.assertEqual('/srv/undo', self.configured(
            f'[DEFAULT]\nstate_path = {nova}\n'
            f'[snapshot_ext]\nstate_directory = /srv/undo\n'))

    def test_novas_that_is_not_there_is_not_made(self) -> None:
        self.patch_name('oslo_log.log.setup', lambda *arguments: None)
        self.assertEqual('/none/snapshot-ext', self.configured(
            '[DEFAULT]\nstate_path = /none\n'))


class TestUnforeseen(CommandTestCase):

    def test_it_is_one_line(self) -> None:
        for error, said in (
                (KeyError('a\nb'), "KeyError: 'a\\nb' (not foreseen"),
                (KeyboardInterrupt(), 'it was interrupted')):
            self.error = error
            self.assertEqual(cmd.FAILED, self.create())
            self.assertIn(said, self.err.getvalue())
            self.assertEqual(1, self.err.getvalue().count('\n'))


class TestDestination(CommandTestCase):

    def test_relative_directory_is_taken_from_where_we_are(self) -> None:
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(self.directory)
        self.run_command('create', '--to', 'images', 'instance-00000001')
        service = self.taken[0][4]
        self.assertIsInstance(service, images.ImageService)
        self.assertEqual(self.target, service._directory)
