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

"""A server that is rebuilt with the image of one of its snapshots."""

import typing

import libvirt
from nova.compute import task_states
from nova.compute import vm_states
from nova import context as nova_context
from nova import exception as nova_exception
from nova import objects

from nova_snapshot_ext import domain_records
from nova_snapshot_ext import exception
from nova_snapshot_ext import rebuilding
from nova_snapshot_ext import rollback
from tests.unit import base
from tests.unit import fakes
from tests.unit import nova_config
from tests.unit import servers


class FakeSpec:
    """objects.RequestSpec, as far as it is used."""

    def __init__(self, journal: fakes.Journal) -> None:
        self.journal = journal
        self.image = objects.ImageMeta(id=servers.IMAGES[0])

    def save(self) -> None:
        self.journal.append(f'scheduler knows {self.image.id}')


class RebuildingTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        nova_config.use(self)
        self.context = nova_context.get_admin_context()
        self.server = servers.new_server()
        self.record = servers.new_record(self.server)
        self.records = domain_records.Records(self.state, fakes.UUID)
        self.records.add(self.record)
        servers.rebuild_by_api(self.server, servers.IMAGES[0])
        self.patch_name('nova.objects.Instance.save',
                        lambda server, **more: self.save_server(**more))
        self.spec: FakeSpec | Exception = FakeSpec(self.journal)
        self.patch_name('nova.objects.RequestSpec.get_by_instance_uuid',
                        lambda kind, context, uuid: self.get_spec())
        self.patch_name('nova.objects.Instance.get_by_uuid',
                        lambda kind, *what, **more: self.server)
        self.patch_name('nova_snapshot_ext.rollback.revert', self.revert)
        self.error: Exception | None = None
        self.afterwards = [libvirt.VIR_DOMAIN_RUNNING, 1]
        self.volumes: list[dict[str, typing.Any]] = []

    def save_server(self, expected_task_state: list[str] | None = None,
                    ) -> None:
        self.journal.append(
            f'server of {self.server.image_ref} {self.server.task_state} '
            f'after {expected_task_state}')

    def get_spec(self) -> FakeSpec:
        if isinstance(self.spec, Exception):
            raise self.spec
        return self.spec

    def revert(self, guest: object, record: domain_records.Record,
               records: domain_records.Records, host: object,
               agent_timeout: int) -> rollback.Result:
        self.assertEqual(
            (self.guest, self.record, self.records, self.host),
            (guest, record, records, host))
        self.journal.append('revert')
        if self.error is not None:
            raise self.error
        self.domain.current_state = self.afterwards
        return rollback.Result(record.rollback, 1.5)

    def roll_back(self) -> None:
        rebuilding.roll_back(
            self.context, self.server, self.guest, self.record, self.records,
            self.host, {'block_device_mapping': self.volumes},
            lambda: self.journal.append('plug'),
            lambda: self.journal.append('power on'))

    def assertOfBase(self) -> None:
        before = servers.new_server()
        for name in ('image_ref', 'kernel_id', 'ramdisk_id', 'os_type',
                     'architecture', 'vm_mode', 'auto_disk_config',
                     'system_metadata'):
            self.assertEqual(getattr(before, name),
                             getattr(self.server, name), name)


class TestRollBack(RebuildingTestCase):

    SAVED = f'server of {servers.BASE} {task_states.REBUILDING} after None'
    KNOWN = f'scheduler knows {servers.BASE}'
    SPAWNING = (f'server of {servers.BASE} {task_states.REBUILD_SPAWNING} '
                f'after {[task_states.REBUILDING]}')

    def test_image_is_put_back_before_the_guest_is_touched(self) -> None:
        self.roll_back()
        self.assertEqual(
            [self.SAVED, self.KNOWN, self.SPAWNING, 'plug', 'revert'],
            self.journal)
        self.assertOfBase()
        self.assertIn('(memory); its guest did not run for 1.50 s',
                      self.output.output)

    def test_guest_that_was_paused_goes_on(self) -> None:
        self.afterwards = [libvirt.VIR_DOMAIN_PAUSED, 1]
        self.roll_back()
        self.assertEqual('resume', self.journal[-1])

    def test_guest_that_is_off_is_started_as_nova_does(self) -> None:
        self.afterwards = [libvirt.VIR_DOMAIN_SHUTOFF, 1]
        self.server.vm_state = vm_states.ERROR
        self.roll_back()
        self.assertEqual('power on', self.journal[-1])

    def test_server_that_nova_stops_anyway_stays_off(self) -> None:
        self.afterwards = [libvirt.VIR_DOMAIN_SHUTOFF, 1]
        self.server.vm_state = vm_states.STOPPED
        self.roll_back()
        self.assertEqual('revert', self.journal[-1])

    def test_scheduler_that_can_not_be_told_does_not_hold_it_up(
            self) -> None:
        self.spec = RuntimeError('no API database')
        self.roll_back()
        self.assertEqual('revert', self.journal[-1])
        self.assertIn('no API database', self.output.output)

    def test_power_that_fails_is_the_servers_error(self) -> None:
        self.afterwards = [libvirt.VIR_DOMAIN_PAUSED, 1]
        self.domain.errors['resume'] = fakes.libvirt_error(1)
        error = self.assertRaises(
            nova_exception.NovaException, self.roll_back)
        self.assertIs(nova_exception.NovaException, type(error))


class TestRefusal(RebuildingTestCase):

    def assertRefused(self, why: str) -> None:
        error = self.assertRaises(
            nova_exception.InstanceFaultRollback, self.roll_back)
        self.assertIn(why, str(error.inner_exception))
        self.assertOfBase()

    def test_volumes(self) -> None:
        self.volumes = [{'mount_device': '/dev/vdb'}]
        self.assertRefused('/dev/vdb')
        self.assertNotIn('revert', self.journal)
        self.assertNotIn('plug', self.journal)

    def test_flavor(self) -> None:
        self.server.flavor.vcpus = 2
        self.assertRefused('vcpus was 1 and is 2')
        self.assertNotIn('revert', self.journal)

    def test_flavor_of_a_rollback_without_memory(self) -> None:
        self.server.flavor.vcpus = 2
        self.record = servers.new_record(
            self.server, rollback=domain_records.Rollback.DISK,
            extra=self.record.extra)
        self.roll_back()
        self.assertIn('revert', self.journal)

    def test_whatever_else_leaves_the_guest_as_it_was(self) -> None:
        for error in (exception.RollbackRefused('another CPU'),
                      exception.GuestBusy('in flight'),
                      exception.SnapshotError('libvirt said no'),
                      PermissionError('denied'),
                      nova_exception.VirtualInterfacePlugException()):
            self.error = error
            servers.rebuild_by_api(self.server, servers.IMAGES[0])
            self.assertRefused(str(error))

    def test_guest_that_is_not_as_it_was_is_an_error(self) -> None:
        self.error = exception.UndoFailed('it does not start')
        error = self.assertRaises(
            nova_exception.NovaException, self.roll_back)
        self.assertIs(nova_exception.NovaException, type(error))
        self.assertOfBase()

    def test_guest_that_another_started_is_not_called_as_it_was(
            self) -> None:
        self.error = exception.StartedByAnother('kept as "before …"')
        error = self.assertRaises(
            nova_exception.NovaException, self.roll_back)
        self.assertIs(nova_exception.NovaException, type(error))
        self.assertIn('kept as', str(error))
        self.assertNotIn('left as it was', self.output.output)
        self.assertOfBase()

    def test_server_that_is_deleted_meanwhile(self) -> None:
        self.error = exception.Preempted('it is deleted')
        for state in (task_states.DELETING, task_states.SOFT_DELETING):
            servers.rebuild_by_api(self.server, servers.IMAGES[0])
            self.patch_name(
                'nova.objects.Instance.get_by_uuid',
                lambda kind, *what, state=state, **more:
                servers.new_server(task_state=state))
            self.assertRaises(
                nova_exception.InstanceNotFound, self.roll_back)

    def test_server_that_is_gone(self) -> None:
        def gone(*arguments: object, **more: object) -> None:
            raise nova_exception.InstanceNotFound(instance_id=fakes.UUID)
        self.error = exception.GuestGone('gone')
        self.patch_name('nova.objects.Instance.get_by_uuid', gone)
        self.assertRaises(nova_exception.InstanceNotFound, self.roll_back)


class TestRecord(RebuildingTestCase):

    def found(self) -> domain_records.Record | None:
        return rebuilding.record_of(
            self.context, self.server, self.records)

    def test_by_its_image(self) -> None:
        second = servers.new_record(servers.new_server(), 1)
        self.records.add(second)
        self.assertEqual(self.record, self.found())
        self.server.image_ref = servers.IMAGES[1]
        self.assertEqual(second, self.found())

    def test_title_that_looks_like_an_image_stands_for_nothing(
            self) -> None:
        self.records.add(servers.new_record(
            servers.new_server(), 1, title=servers.IMAGES[2]))
        self.server.image_ref = servers.IMAGES[2]
        self.assertIsNone(self.found())

    def test_snapshot_that_was_taken_without_nova(self) -> None:
        self.records.add(servers.new_record(
            servers.new_server(), 1, extra={}))
        self.server.image_ref = servers.IMAGES[1]
        self.assertIsNone(self.found())

    def test_records_that_can_not_be_read_destroy_no_disk(self) -> None:
        name = f'snapshot-ext-{9:032x}'
        self.new_file(f'state/domain-snapshots/{fakes.UUID}/{name}.json',
                      b'{')
        real = domain_records.Records._read

        def deny(records: domain_records.Records,
                 which: str) -> domain_records.Record:
            if which == name:
                raise PermissionError('denied')
            return real(records, which)
        for read, why in ((real, name), (deny, 'denied')):
            self.patch_name(
                'nova_snapshot_ext.domain_records.Records._read', read)
            servers.rebuild_by_api(self.server, servers.IMAGES[0])
            error = self.assertRaises(
                nova_exception.InstanceFaultRollback, self.found)
            self.assertIn(why, str(error.inner_exception))
            self.assertIn(why, self.output.output)
            self.assertOfBase()

    def test_what_is_remembered_survives_the_disk(self) -> None:
        [read] = domain_records.Records(self.state, fakes.UUID).all()
        self.assertEqual(self.record, read)
