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

"""Domain snapshots go with their images, their servers, and their hosts."""

import typing

from nova.compute import task_states
from nova.compute import vm_states
from nova import context as nova_context
from nova import exception as nova_exception
from nova import objects

from nova_snapshot_ext import domain_records
from nova_snapshot_ext import exception
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import upkeep
from tests.unit import base
from tests.unit import fakes
from tests.unit import nova_config
from tests.unit import servers


class UpkeepTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        config = nova_config.use(self)
        config(host='compute-1')
        self.server = servers.new_server()
        self.records = domain_records.Records(self.state, fakes.UUID)
        self.known: dict[str, objects.Instance] = {fakes.UUID: self.server}
        self.patch_name('nova.objects.Instance.get_by_uuid',
                        lambda kind, *what, **more: self.get(*what, **more))
        self.patch_name('nova_snapshot_ext.reconcile.glance',
                        lambda: 'proxy')
        self.gone: set[str] = set()
        self.glance_error: Exception | None = None
        self.asked: list[str] = []
        self.patch_name('nova_snapshot_ext.images.presence.is_shown',
                        self.is_shown)
        self.patch_name('nova_snapshot_ext.domain_snapshot.delete',
                        self.delete)
        self.error: Exception | None = None
        self.deleted: list[str] = []
        self.upkeep = upkeep.Upkeep(
            self.state, self.guest_of, lambda instance: self.host)
        self.now = 1.0
        self.patch_name('time.monotonic', lambda: self.now)

    def get(self, context: object, uuid: str,
            expected_attrs: object) -> objects.Instance:
        if uuid not in self.known:
            raise nova_exception.InstanceNotFound(instance_id=uuid)
        return self.known[uuid]

    def guest_of(self, instance: objects.Instance) -> guests.Guest:
        self.assertIs(self.server, instance)
        if isinstance(self.error, nova_exception.NovaException):
            raise self.error
        return self.guest

    def is_shown(self, glance: object, image_id: str) -> bool:
        self.assertEqual('proxy', glance)
        self.asked.append(image_id)
        if self.glance_error is not None:
            raise self.glance_error
        return image_id not in self.gone

    def delete(self, guest: object, record: domain_records.Record,
               records: domain_records.Records, host: object) -> None:
        self.assertEqual((self.guest, self.host), (guest, host))
        if self.error is not None:
            raise self.error
        records.remove(record.name)
        self.deleted.append(record.image_id)

    @staticmethod
    def refuse(*what: object) -> typing.NoReturn:
        raise PermissionError('denied')

    def add(self, *numbers: int, **changes: typing.Any) -> None:
        for number in numbers:
            self.records.add(servers.new_record(
                self.server, number, **changes))

    def left(self) -> list[str]:
        return [record.image_id for record in self.records.all()]

    def see_to_all(self, hours: float = 0.0) -> None:
        """As Nova's image cache has it done.

        :param hours: since the last time
        """
        self.now += hours * 3600
        self.upkeep.delete_all_unwanted(nova_context.get_admin_context())


class TestImages(UpkeepTestCase):

    def test_snapshot_goes_with_its_image(self) -> None:
        self.add(0, 1, 2)
        self.gone = {servers.IMAGES[1]}
        self.upkeep.delete_unwanted(self.server)
        self.assertEqual([servers.IMAGES[1]], self.deleted)
        self.assertEqual([servers.IMAGES[0], servers.IMAGES[2]], self.left())

    def test_image_has_to_be_missing_for_an_hour(self) -> None:
        self.add(0, 1)
        self.gone = set(servers.IMAGES)
        for hours in (0.0, 0.5, 0.4):
            self.see_to_all(hours)
            self.assertEqual([], self.deleted)
        # Glance was another one until now.
        self.gone = {servers.IMAGES[0]}
        self.see_to_all(0.2)
        self.assertEqual([servers.IMAGES[0]], self.deleted)
        self.gone = set(servers.IMAGES)
        self.see_to_all(2.0)
        self.assertEqual([servers.IMAGES[1]], self.left())
        self.see_to_all(1.0)
        self.assertEqual([], self.left())

    def test_glance_that_does_not_answer_keeps_them_all(self) -> None:
        self.add(0, 1)
        self.gone = set(servers.IMAGES)
        self.glance_error = exception.ImageServiceUnreachable('away')
        self.upkeep.delete_unwanted(self.server)
        self.see_to_all()
        self.assertEqual([], self.deleted)
        self.assertIn('away', self.output.output)

    def test_image_that_was_never_shown_is_not_missed(self) -> None:
        self.gone = set(servers.IMAGES)
        for extra in ({}, {'image_shown': False}):
            self.add(0, extra=extra)
            self.upkeep.delete_unwanted(self.server)
        self.assertEqual(([], []), (self.deleted, self.asked))

    def test_glance_is_not_asked_without_snapshots(self) -> None:
        self.patch_name('nova_snapshot_ext.reconcile.glance', None)
        self.upkeep.delete_unwanted(self.server)
        self.see_to_all()

    def test_credentials_say_whether_they_are_shown_an_image(self) -> None:
        image = servers.IMAGES[0]
        self.assertEqual({'image_shown': True}, upkeep.remembered(image))
        self.assertEqual('', self.output.output)
        self.gone = {image}
        self.assertEqual({'image_shown': False}, upkeep.remembered(image))
        self.assertIn('[service_user] is not shown', self.output.output)
        self.glance_error = exception.ImageServiceError('no auth_type')
        self.assertEqual({'image_shown': False}, upkeep.remembered(image))

    def test_what_can_not_be_deleted_stays_for_later(self) -> None:
        self.add(0)
        self.gone = set(servers.IMAGES)
        for error in (exception.UndoFailed('busy'),
                      exception.GuestBusy('in flight'),
                      nova_exception.InstanceNotRunning(instance_id='i')):
            self.error = error
            self.upkeep.delete_unwanted(self.server)
            self.assertIn(str(error), self.output.output)
        self.assertEqual([servers.IMAGES[0]], self.left())


class TestServers(UpkeepTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.add(0)
        self.gone = {servers.IMAGES[0]}

    def test_server_of_this_host(self) -> None:
        for hours in (0.0, 1.0):
            self.see_to_all(hours)
        self.assertEqual([servers.IMAGES[0]], self.deleted)

    def test_server_that_is_gone_has_no_records(self) -> None:
        self.known = {}
        self.see_to_all()
        self.assertEqual(([], []), (self.deleted, self.left()))

    def test_domain_that_nova_does_not_know_keeps_its_own(self) -> None:
        self.known = {}
        self.add(0, extra={})
        self.see_to_all()
        self.assertEqual([servers.IMAGES[0]], self.left())

    def test_server_of_another_host_has_no_records_here(self) -> None:
        self.server.host = 'compute-2'
        self.see_to_all()
        self.assertEqual(([], []), (self.deleted, self.left()))

    def test_server_that_is_on_its_way_is_left_alone(self) -> None:
        for host in ('compute-1', 'compute-2'):
            self.server.host = host
            for vm_state, task_state in (
                    (vm_states.RESIZED, None),
                    (vm_states.ACTIVE, task_states.RESIZE_MIGRATED),
                    (vm_states.ACTIVE, task_states.IMAGE_UPLOADING)):
                self.server.vm_state = vm_state
                self.server.task_state = task_state
                self.see_to_all()
        self.assertEqual(([], [servers.IMAGES[0]]),
                         (self.deleted, self.left()))

    def test_fault_of_one_does_not_keep_the_others(self) -> None:
        other = fakes.UUID.replace('5', '1')
        first = domain_records.Records(self.state, other)
        first.add(servers.new_record(servers.new_server(uuid=other)))
        self.known[other] = None
        for hours in (0.0, 1.0):
            self.see_to_all(hours)
        self.assertIn('AttributeError', self.output.output)
        self.assertEqual([servers.IMAGES[0]], self.deleted)

    def test_all_are_deleted_of_a_server_that_moves(self) -> None:
        self.gone = set()
        self.add(1)
        self.upkeep.delete_all(self.server, 'it moves')
        # The youngest first: nothing descends from it.
        self.assertEqual(list(servers.IMAGES[1::-1]), self.deleted)
        self.assertEqual([], self.asked)
        self.assertIn('it moves', self.output.output)

    def test_records_that_can_not_be_read_do_not_keep_it_from_moving(
            self) -> None:
        self.new_file(f'state/domain-snapshots/{fakes.UUID}/'
                      f'snapshot-ext-{9:032x}.json', b'{')
        self.upkeep.delete_all(self.server, 'it moves')
        self.assertEqual([], self.deleted)
        self.patch_name('nova_snapshot_ext.domain_records.Records._read',
                        self.refuse)
        self.upkeep.delete_all(self.server, 'it moves')
        self.assertIn('denied', self.output.output)
        self.upkeep.forget(fakes.UUID)
        self.assertEqual([], self.records.all())

    def test_records_that_can_not_be_dropped_hold_nothing_up(self) -> None:
        self.patch_name('nova_snapshot_ext.domain_records.Records.forget',
                        self.refuse)
        self.upkeep.forget(fakes.UUID)
        self.assertIn('denied', self.output.output)
