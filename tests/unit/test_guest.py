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

import json

import fixtures
import libvirt

from nova_snapshot_ext import exception
from nova_snapshot_ext import guest as guests
from tests.unit import base
from tests.unit import fakes

HOSTDEV = "<hostdev type='pci'><alias name='hostdev0' /></hostdev>"


class TestFind(base.TestCase):

    def test_by_uuid_and_by_name(self) -> None:
        for which in (fakes.UUID, 'instance-00000001'):
            found = guests.Guest.find(
                self.domain.connection, fakes.URI, which)
            self.assertEqual(
                (fakes.UUID, 'instance-00000001', fakes.URI),
                (found.uuid, found.name, found.uri))

    def test_no_such_domain_is_gone(self) -> None:
        for which in ('other', fakes.UUID.replace('5', '6')):
            self.assertRaisesRegex(
                exception.GuestGone, which, guests.Guest.find,
                self.domain.connection, fakes.URI, which)

    def test_other_errors_are_not_taken_for_a_missing_domain(self) -> None:
        def fail(which: str) -> None:
            raise fakes.libvirt_error(libvirt.VIR_ERR_NO_CONNECT, 'lost')
        self.patch_name(
            'tests.unit.fakes.FakeConnection.lookupByName',
            lambda connection, which: fail(which))
        self.assertRaisesRegex(
            guests.LibvirtError, 'lost', guests.Guest.find,
            self.domain.connection, fakes.URI, 'a')


class TestBrokenConnection(base.TestCase):
    """libvirtd was restarted: what it gave out before is dead for ever."""

    def setUp(self) -> None:
        super().setUp()
        self.anew = fakes.FakeDomain(self.journal)
        self.patch_name('libvirt.open', lambda uri: (
            self.journal.append(f'open {uri}'), self.anew.connection)[1])

    def break_off(self, name: str,
                  code: int = libvirt.VIR_ERR_SYSTEM_ERROR) -> None:
        self.domain.errors[name] = fakes.libvirt_error(
            code, 'client socket is closed', libvirt.VIR_FROM_RPC)

    def test_domain_is_looked_up_anew_and_the_call_repeated(self) -> None:
        self.anew.current_state = [libvirt.VIR_DOMAIN_PAUSED, 1]
        for code in (libvirt.VIR_ERR_SYSTEM_ERROR,
                     libvirt.VIR_ERR_INTERNAL_ERROR):
            self.guest = fakes.guest_of(self.domain)
            self.journal.clear()
            self.break_off('state', code)
            self.assertEqual(guests.State.PAUSED, self.guest.state())
            self.assertEqual(guests.State.PAUSED, self.guest.state())
            self.assertEqual([f'open {fakes.URI}'], self.journal)

    def test_door_looks_it_up_in_its_own_way(self) -> None:
        self.guest = guests.Guest(
            self.domain, fakes.URI, find=lambda: self.anew)
        self.break_off('resume')
        self.guest.resume()
        self.assertEqual(['resume'] * 2, self.journal)

    def test_what_may_go_on_all_the_same_is_not_repeated(self) -> None:
        for name, call in (('managedSave', self.guest.save_memory),
                           ('createWithFlags', self.guest.start)):
            self.journal.clear()
            self.break_off(name)
            error = self.assertRaises(guests.LibvirtError, call)
            self.assertTrue(error.of_connection)
            self.assertEqual([name], self.journal)
        # The next call has a connection again.
        self.break_off('state')
        self.assertEqual(guests.State.RUNNING, self.guest.state())

    def test_monitor_is_asked_by_the_new_connection(self) -> None:
        asked = []

        def monitor(domain: fakes.FakeDomain, request: str,
                    flags: int) -> str:
            asked.append(domain)
            domain._may_fail('monitor')
            return '{"return": {}}'
        self.patch_name('libvirt_qemu.qemuMonitorCommand', monitor)
        self.break_off('monitor')
        self.guest.monitor('stop')
        self.assertEqual([self.domain, self.anew], asked)

    def test_libvirt_that_is_away_is_asked_anew_by_the_next_call(
            self) -> None:
        self.break_off('state')
        with fixtures.MonkeyPatch('libvirt.open', self.refuse):
            for _ in range(2):
                error = self.assertRaises(
                    guests.LibvirtError, self.guest.state)
                self.assertIn('no socket', str(error))
        self.assertEqual(guests.State.RUNNING, self.guest.state())

    def refuse(self, uri: str) -> None:
        raise fakes.libvirt_error(
            libvirt.VIR_ERR_SYSTEM_ERROR, 'no socket', libvirt.VIR_FROM_RPC)

    def test_call_is_repeated_once(self) -> None:
        self.break_off('state')
        self.anew.errors = self.domain.errors
        self.assertRaises(guests.LibvirtError, self.guest.state)
        self.assertEqual([f'open {fakes.URI}'], self.journal)

    def test_other_errors_are_not_repeated(self) -> None:
        self.domain.errors['state'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_FAILED, 'no', libvirt.VIR_FROM_QEMU)
        self.assertRaises(guests.LibvirtError, self.guest.state)
        self.assertEqual([], self.journal)

    def test_guest_that_is_gone_by_then_is_gone(self) -> None:
        self.break_off('state')
        self.anew.connection.domains = ()
        self.assertRaises(exception.GuestGone, self.guest.state)

    def test_broken_connection_is_no_backup_job(self) -> None:
        self.break_off('jobStats', libvirt.VIR_ERR_INTERNAL_ERROR)
        self.anew.errors = self.domain.errors
        self.assertRaises(guests.LibvirtError, self.guest.job)


class TestState(base.TestCase):

    def test_states(self) -> None:
        for theirs, ours in (
                (libvirt.VIR_DOMAIN_RUNNING, guests.State.RUNNING),
                (libvirt.VIR_DOMAIN_PAUSED, guests.State.PAUSED),
                (libvirt.VIR_DOMAIN_SHUTOFF, guests.State.SHUTOFF),
                (libvirt.VIR_DOMAIN_CRASHED, guests.State.SHUTOFF),
                (libvirt.VIR_DOMAIN_SHUTDOWN, guests.State.OTHER),
                (libvirt.VIR_DOMAIN_PMSUSPENDED, guests.State.OTHER)):
            self.domain.current_state = [theirs, 0]
            self.assertEqual(ours, self.guest.state())

    def test_domain_that_vanished_is_gone(self) -> None:
        self.domain.gone()
        self.assertRaises(exception.GuestGone, self.guest.state)

    def test_refused_call_says_what_and_of_whom(self) -> None:
        self.domain.errors['state'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_FAILED, 'no way')
        error = self.assertRaises(guests.LibvirtError, self.guest.state)
        self.assertEqual('State of instance-00000001: no way', str(error))
        self.assertEqual(libvirt.VIR_ERR_OPERATION_FAILED, error.code)

    def test_only_a_shutdown_by_itself_counts_as_one(self) -> None:
        self.domain.off()
        self.assertTrue(self.guest.was_shut_down())
        self.domain.off(libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED)
        self.assertFalse(self.guest.was_shut_down())

    def test_novas_guests_are_known(self) -> None:
        self.assertFalse(self.guest.belongs_to_nova())
        self.domain.rest = (
            '<metadata><instance xmlns='
            '"http://openstack.org/xmlns/libvirt/nova/1.1"/></metadata>')
        self.assertTrue(self.guest.belongs_to_nova())

    def test_memory_is_what_the_guest_has_now(self) -> None:
        self.assertEqual(524288 * 1024, self.guest.memory_bytes())

    def test_qemus_group(self) -> None:
        self.assertIsNone(self.guest.qemu_gid())
        self.domain.rest = (
            '<seclabel model="apparmor"><label>x</label></seclabel>'
            '<seclabel model="dac"><label>+64055:+108</label></seclabel>')
        self.assertEqual(108, self.guest.qemu_gid())
        self.domain.rest = (
            '<seclabel model="dac"><label>qemu:no-such-group</label>'
            '</seclabel>')
        self.assertRaisesRegex(
            exception.FreezeFailed, 'the group no-such-group, which does',
            self.guest.qemu_gid)


class TestDisks(base.TestCase):

    def test_root_disk_is_the_first_disk_that_is_one(self) -> None:
        self.domain.disks = (
            fakes.disk_xml('/cd', target='sda', device='cdrom')
            + fakes.disk_xml('/a') + fakes.disk_xml('/b', target='vdb'))
        self.assertEqual('/a', self.guest.root_disk().path)
        self.assertEqual(3, len(self.guest.disks()))

    def test_guest_without_a_disk_is_refused(self) -> None:
        self.assertRaises(exception.UnsafeDisk, self.guest.root_disk)


class TestJobs(base.TestCase):

    def test_finished_job_is_not_under_way(self) -> None:
        for kind, expected in (
                (libvirt.VIR_DOMAIN_JOB_NONE, None),
                (libvirt.VIR_DOMAIN_JOB_COMPLETED, None),
                (libvirt.VIR_DOMAIN_JOB_UNBOUNDED, 'save')):
            self.domain.job = kind
            self.assertEqual(expected, self.guest.job())

    def test_job_has_its_name(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        for operation, name in (
                (libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT,
                 'migration'),
                (libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN, 'migration'),
                (libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP, 'backup'),
                (4711, 'of another kind')):
            self.domain.job_operation = operation
            self.assertEqual(name, self.guest.job())

    def test_job_that_is_about_to_begin_counts(self) -> None:
        # "backup job data missing", libvirt 9.0
        self.domain.errors['jobStats'] = fakes.libvirt_error(
            libvirt.VIR_ERR_INTERNAL_ERROR)
        self.assertEqual('backup', self.guest.job())

    def test_lock_that_is_held_is_a_job(self) -> None:
        self.domain.errors['jobStats'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_TIMEOUT)
        self.assertEqual('of another kind', self.guest.job())

    def test_guest_that_does_not_run_has_none(self) -> None:
        self.domain.errors['jobStats'] = fakes.libvirt_error(
            libvirt.VIR_ERR_OPERATION_INVALID)
        self.assertIsNone(self.guest.job())

    def test_job_that_came_too_late_to_be_ended_is_ended_later(self) -> None:
        self.domain.backup = (
            "<domainbackup><server socket='/ours'/></domainbackup>")
        self.now = 0.0
        self.patch_name('time.monotonic', lambda: self.now)
        abort = self.domain.abortJob

        def tick(seconds: float) -> None:
            self.now += 0.25
            self.assertEqual(
                int(self.now - 0.25) + 1, len(self.journal))
            if self.now == 2.0:
                self.domain.abortJob = abort  # type: ignore[method-assign]
        self.patch_name('time.sleep', tick)
        self.domain.abortJob = (  # type: ignore[method-assign]
            lambda: self.journal.append('too early'))
        self.guest.end_backup('/ours')
        self.assertEqual(['too early', 'too early', 'abortJob'],
                         self.journal)

    def test_copy_keeps_the_domain_persistent(self) -> None:
        self.domain.disks = fakes.disk_xml('/a')
        self.guest.start_copy('vda', '/overlay')
        self.assertEqual(
            libvirt.VIR_DOMAIN_BLOCK_COPY_SHALLOW
            | libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT
            | libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB,
            self.domain.copy_flags)

    def test_copy_is_ready_when_libvirt_says_so(self) -> None:
        self.domain.disks = fakes.disk_xml('/a')
        self.assertIsNone(self.guest.block_job('vda'))
        self.guest.start_copy('vda', '/overlay')
        self.domain.copy_ready = False
        self.assertEqual(guests.BlockJob('copy', '/overlay', False),
                         self.guest.block_job('vda'))
        self.domain.copy_ready = True
        self.assertEqual(guests.BlockJob('copy', '/overlay', True),
                         self.guest.block_job('vda'))


class TestAgent(base.TestCase):

    def test_agent_counts_when_its_channel_is_open(self) -> None:
        channel = ("<channel type='unix'><target type='virtio' "
                   "name='org.qemu.guest_agent.0' state='{}'/></channel>")
        for state, expected in (('connected', True),
                                ('disconnected', False)):
            self.domain.devices = channel.format(state)
            self.assertEqual(expected, self.guest.agent_connected())

    def test_time_out_is_taken_back_when_the_call_fails(self) -> None:
        with self.assertRaisesRegex(KeyError, 'why'):
            with self.guest.agent_timeout(7):
                raise KeyError('why')
        self.assertEqual(
            ['agentSetResponseTimeout 7', 'agentSetResponseTimeout -2'],
            self.journal)


class TestSavable(base.TestCase):

    def test_plain_guest_is(self) -> None:
        self.assertIsNone(self.guest.why_not_savable())

    def test_devices_that_are_not(self) -> None:
        for xml, word in (
                ("<hostdev type='usb'/>", 'USB'),
                ("<hostdev type='scsi'/>", 'SCSI'),
                ("<hostdev type='scsi_host'/>", 'vhost-scsi'),
                ("<interface type='vdpa'/>", 'vDPA'),
                ("<filesystem/>", 'shared file system'),
                ("<shmem/>", 'shared memory'),
                ("<tpm><backend type='passthrough'/></tpm>", 'TPM')):
            self.domain.devices = xml
            self.assertIn(word, self.guest.why_not_savable() or '')

    def test_encrypted_memory_is_not(self) -> None:
        self.domain.rest = "<launchSecurity type='sev'/>"
        self.assertIn('encrypted memory',
                      self.guest.why_not_savable() or '')

    def test_tpm_needs_its_secret(self) -> None:
        self.domain.devices = (
            "<tpm><backend type='emulator'><encryption secret='s'/>"
            "</backend></tpm>")
        self.assertIn('secret', self.guest.why_not_savable() or '')
        self.domain.connection.secrets.add('s')
        self.assertIsNone(self.guest.why_not_savable())


class TestDevices(base.TestCase):

    def test_what_can_be_taken_and_given_back(self) -> None:
        self.domain.devices = (
            HOSTDEV + "<hostdev type='mdev' /><hostdev type='usb' />"
            "<interface type='hostdev' /><interface type='bridge' />")
        self.assertEqual(
            ['<hostdev type="pci" />', '<hostdev type="mdev" />',
             '<interface type="hostdev" />'], self.guest.host_devices())

    def test_device_that_is_there_is_not_attached_again(self) -> None:
        self.guest.attach('<hostdev type="pci" />')
        self.guest.attach('<hostdev type="pci" />')
        self.assertEqual(['attachDeviceFlags'], self.journal)

    def test_guest_that_keeps_its_device_is_given_up(self) -> None:
        self.patch_name('nova_snapshot_ext.guest._DETACH_TIMEOUT_S', -1.0)
        self.domain.devices = HOSTDEV
        self.assertRaisesRegex(
            exception.FreezeFailed, 'did not let go', self.guest.detach,
            self.guest.host_devices()[0])


class TestMonitor(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.answer = '{"return": []}'
        self.patch_name(
            'libvirt_qemu.qemuMonitorCommand',
            lambda domain, request, flags: (
                self.journal.append(request), self.answer)[1])

    def test_arguments_are_passed_on(self) -> None:
        self.assertEqual([], self.guest.monitor('stop', name='a'))
        self.assertEqual(
            ['{"execute": "stop", "arguments": {"name": "a"}}'],
            self.journal)

    def test_qemus_error_is_ours(self) -> None:
        self.answer = '{"error": {"class": "C", "desc": "can not"}}'
        self.assertRaisesRegex(
            exception.SnapshotError, 'can not', self.guest.monitor, 'stop')

    def test_node_of_a_file(self) -> None:
        path = self.new_file('a')
        self.answer = (
            '{"return": [{"drv": "file", "image": {"filename": "%s"}},'
            '{"drv": "qcow2", "node-name": "n", '
            '"image": {"filename": "%s"}}]}' % (path, path))
        node = self.guest.format_node(path)
        self.assertEqual('n', node and node['node-name'])
        self.assertIsNone(self.guest.format_node('/other'))


class TestInactiveDisks(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.active: dict[str, bool] = {'active': False}
        self.status = 'paused'
        self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED, 0]
        self.patch_name('libvirt_qemu.qemuMonitorCommand', self.monitor)

    def monitor(self, domain: object, request: str, flags: int) -> str:
        command = json.loads(request)
        if command['execute'] == 'query-named-block-nodes':
            return json.dumps({'return': [{'node-name': 'n', **self.active}]})
        if command['execute'] == 'query-status':
            return json.dumps({'return': {'status': self.status}})
        self.journal.append(request)
        return '{"return": {}}'

    def test_disks_of_a_guest_that_was_restored_paused(self) -> None:
        self.guest.activate_disks()
        self.assertEqual(
            ['{"execute": "blockdev-set-active", '
             '"arguments": {"active": true}}'], self.journal)

    def test_disks_that_may_be_another_hosts_are_left_alone(self) -> None:
        for self.status in 'postmigrate', 'finish-migrate', 'inmigrate':
            self.assertRaisesRegex(
                exception.SnapshotError, f'it is {self.status}: they may be',
                self.guest.activate_disks)
        self.assertEqual([], self.journal)

    def test_active_disks_are_left_alone(self) -> None:
        for self.active in {'active': True}, {}:
            self.guest.activate_disks()
        self.assertEqual([], self.journal)

    def test_running_guest_is_not_asked(self) -> None:
        self.domain.current_state = [libvirt.VIR_DOMAIN_RUNNING, 0]
        self.guest.activate_disks()
        self.assertEqual([], self.journal)

    def test_disks_of_a_migration_are_left_alone(self) -> None:
        self.domain.job = libvirt.VIR_DOMAIN_JOB_UNBOUNDED
        self.assertRaisesRegex(
            exception.SnapshotError, 'inactive', self.guest.activate_disks)
        self.assertEqual([], self.journal)
