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

import collections.abc
import contextlib
import os
import threading
import time
import typing

import fixtures
import libvirt
from nova.compute import power_state
from nova.compute import task_states
from nova.compute import vm_states
import nova.conf
from nova import context as nova_context
from nova import exception as nova_exception
from nova import objects
from oslo_concurrency import lockutils
from oslo_config import fixture as config_fixture
import oslo_messaging
from oslo_utils.fixture import uuidsentinel as uuids

from nova_snapshot_ext import account as accounts
from nova_snapshot_ext import driver
from nova_snapshot_ext import exception
from nova_snapshot_ext import external_merge
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext.images import base as images
from nova_snapshot_ext import in_flight
from nova_snapshot_ext import internal_snapshot
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import selection
from nova_snapshot_ext import snapshot
from nova_snapshot_ext import undo
from tests.unit import base
from tests.unit import fakes
from tests.unit import nova_config

objects.register_all()
journal = fakes.Journal()


@undo.step
@undo.with_guest
def demo_recovery(around: undo.Surroundings, guest: guests.Guest) -> None:
    journal.append(f'recovered {guest.name}')
    with around.host.may_start() as allowed:
        journal.append(f'may start {allowed}')


class FakeService(images.ImageService):
    def __init__(self) -> None:
        pass

    def publish(self, *arguments: object) -> list[images.Published]:
        raise AssertionError('take() is a double here')


class FakeNovaHost:
    """What Nova's host.Host is to the driver."""

    _uri = fakes.URI

    def __init__(self, domain: fakes.FakeDomain) -> None:
        self.domain: fakes.FakeDomain | None = domain
        self.error: Exception | None = None

    def get_guest(self, instance: objects.Instance) -> object:
        if self.error is not None:
            raise self.error
        if self.domain is None:
            raise nova_exception.InstanceNotFound(instance_id=instance.uuid)
        return type('Guest', (), {'_domain': self.domain})()


class FakeImageAPI:
    def __init__(self) -> None:
        self.image: dict[str, typing.Any] = {
            'id': uuids.image, 'name': 'snap', 'properties': {}}

    def get(self, context: object, image_id: str) -> dict[str, typing.Any]:
        return self.image


class DriverTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.config = nova_config.use(self)
        self.config(host='compute-1', state_path=self.directory)
        self.config(virt_type='kvm', snapshots_directory=self.staging,
                    group='libvirt')
        self.config(state_directory=self.state,
                    managed_save_directory=self.save, group='snapshot_ext')
        self.path = self.new_file('disk', b'\0' * 4096)
        self.domain.disks = fakes.disk_xml(self.path)
        self.context = nova_context.get_admin_context()
        self.instance = objects.Instance(
            uuid=fakes.UUID, id=1, host='compute-1', project_id='p',
            progress=0,
            task_state=task_states.IMAGE_SNAPSHOT,
            vm_state=vm_states.ACTIVE, power_state=power_state.RUNNING,
            kernel_id='', ramdisk_id=None, os_type=None,
            image_ref=uuids.base, system_metadata={},
            flavor=objects.Flavor(extra_specs={}))
        self.driver = driver.SnapshotLibvirtDriver.__new__(
            driver.SnapshotLibvirtDriver)
        self.driver._leaving = set()
        self.driver._host = self.nova_host = FakeNovaHost(self.domain)
        self.driver._image_api = self.api = FakeImageAPI()
        self.events: list[str] = []
        self.patch_name('nova.compute.utils.EventReporter', self.event)
        self.patch_name('nova_snapshot_ext.driver._image_service',
                        lambda context, image_id, record: FakeService())
        self.patch_name('nova_snapshot_ext.snapshot.take', self.take)
        self.patch_name(
            'nova.virt.libvirt.driver.LibvirtDriver.snapshot',
            lambda *arguments: self.events.append('nova'))
        self.patch_name('nova_snapshot_ext.mover_stream.why_not',
                        lambda python: None)
        self.patch_name('nova_snapshot_ext.notification.send',
                        lambda *what: None)
        # It would wait for Nova, which is not here.
        self.patch_name('threading.Timer.start', lambda timer: None)
        self.taken: list[dict[str, typing.Any]] = []
        self.error: Exception | None = None
        self.states: list[tuple[str, str | None]] = []

    @contextlib.contextmanager
    def event(self, context: object, name: str, host: str,
              uuid: str) -> collections.abc.Iterator[None]:
        try:
            yield
        except Exception as error:
            self.events.append(f'{name} {type(error).__name__}')
            raise
        self.events.append(name)

    def take(self, guest: guests.Guest, host: object,
             planned: snapshot.Plan, request: requests.Request,
             service: object, description: images.Description,
             verify_hash: bool = False,
             before_upload: collections.abc.Callable[
                 [], None] = lambda: None,
             report: typing.Any = None) -> None:
        self.states.append(('take', None))
        self.taken.append({
            'flows': [each.name for each in planned.candidates],
            'request': request, 'description': description,
            'verify_hash': verify_hash, 'guest': guest,
            'transfers': [each.name for each in planned.transfers],
            'report': report})
        if self.error is not None:
            raise self.error
        before_upload()

    def update_task_state(
            self, task_state: str,
            expected_state: str = task_states.IMAGE_SNAPSHOT) -> None:
        """As Nova's manager has it for snapshots."""
        self.instance.task_state = task_state
        self.states.append((task_state, expected_state))

    def snapshot(self, update_task_state: typing.Any = None) -> None:
        self.driver.snapshot(
            self.context, self.instance, uuids.image,
            update_task_state or self.update_task_state)


class TestTaskStates(DriverTestCase):

    EXPECTED = [
        (task_states.IMAGE_PENDING_UPLOAD, task_states.IMAGE_SNAPSHOT),
        ('take', None),
        (task_states.IMAGE_UPLOADING, task_states.IMAGE_PENDING_UPLOAD)]

    def test_snapshot(self) -> None:
        self.snapshot()
        self.assertEqual(self.EXPECTED, self.states)
        self.assertEqual(['snapshot_ext_snapshot'], self.events)

    def test_backup(self) -> None:
        self.instance.task_state = task_states.IMAGE_BACKUP

        def update(task_state: str, expected_state: str =
                   task_states.IMAGE_BACKUP) -> None:
            self.update_task_state(task_state, expected_state)
        self.snapshot(update)
        self.assertEqual(
            [(task_states.IMAGE_PENDING_UPLOAD, task_states.IMAGE_BACKUP),
             *self.EXPECTED[1:]], self.states)

    def test_shelve_knows_three_states_only(self) -> None:
        self.instance.task_state = task_states.SHELVING
        states = {
            task_states.IMAGE_PENDING_UPLOAD:
                task_states.SHELVING_IMAGE_PENDING_UPLOAD,
            task_states.IMAGE_UPLOADING:
                task_states.SHELVING_IMAGE_UPLOADING,
            task_states.SHELVING: task_states.SHELVING}

        def update(task_state: str, expected_state: str =
                   task_states.SHELVING) -> None:
            self.update_task_state(states[task_state],
                                   states[expected_state])
        self.snapshot(update)
        self.assertEqual(
            [(task_states.SHELVING_IMAGE_PENDING_UPLOAD,
              task_states.SHELVING),
             ('take', None),
             (task_states.SHELVING_IMAGE_UPLOADING,
              task_states.SHELVING_IMAGE_PENDING_UPLOAD)], self.states)

    def test_cross_cell_resize_wants_none(self) -> None:
        self.instance.task_state = task_states.RESIZE_MIGRATING
        self.snapshot(lambda *arguments, **more: None)
        self.assertEqual([('take', None)], self.states)
        self.assertEqual(task_states.RESIZE_MIGRATING,
                         self.instance.task_state)

    def test_state_is_not_changed_when_no_snapshot_can_be_taken(
            self) -> None:
        self.instance.flavor.extra_specs['snapshot_ext:flow'] = 'warm'
        self.assertRaises(nova_exception.NovaException, self.snapshot)
        self.assertEqual([], self.states)

    def test_instance_that_is_deleted_meanwhile_is_novas_error(
            self) -> None:
        def update(task_state: str, **more: object) -> None:
            raise nova_exception.UnexpectedDeletingTaskStateError(
                instance_uuid=fakes.UUID, expected={}, actual={})
        self.assertRaises(nova_exception.UnexpectedDeletingTaskStateError,
                          self.snapshot, update)


class TestInFlight(DriverTestCase):
    """What the next nova-compute finds if this one dies."""

    def setUp(self) -> None:
        super().setUp()
        self.seen: list[in_flight.Snapshot] = []
        self.patch_name('nova_snapshot_ext.snapshot.take', self.look)

    def look(self, *arguments: object, **more: object) -> None:
        [path] = in_flight.left_in(self.state)
        self.seen.append(in_flight._understood(
            path, undo.read_records(path))[0])
        if self.error is not None:
            raise self.error

    def test_it_is_on_disk_for_as_long_as_the_snapshot(self) -> None:
        context = nova_context.RequestContext(
            'u', 'p', request_id='req-5ee7e4f9')
        self.driver.snapshot(context, self.instance, uuids.image,
                             self.update_task_state)
        # As it was asked for, whatever it does meanwhile.
        self.assertEqual([in_flight.Snapshot(
            uuids.image, fakes.UUID, 'p', 'u', 'req-5ee7e4f9',
            task_states.IMAGE_SNAPSHOT)], self.seen)
        self.assertEqual([], in_flight.left_in(self.state))

    def test_it_stays_until_nova_has_deleted_the_image(self) -> None:
        timers: list[threading.Timer] = []
        self.patch_name('threading.Timer.start',
                        lambda timer: timers.append(timer))
        self.error = exception.FreezeFailed('no socket')
        self.assertRaises(nova_exception.NovaException, self.snapshot)
        self.assertEqual(1, len(in_flight.left_in(self.state)))
        timers[0].function()
        self.assertEqual([], in_flight.left_in(self.state))

    def test_novas_own_snapshot_leaves_none(self) -> None:
        self.domain.disks = fakes.disk_xml('vms/a', kind='network')
        os.rmdir(self.state)
        self.snapshot()
        self.assertFalse(os.path.exists(self.state))


class TestErrors(DriverTestCase):

    def assertTranslated(self, ours: Exception,
                         theirs: type[Exception]) -> Exception:
        self.error = ours
        found = self.assertRaises(theirs, self.snapshot)
        self.assertIs(theirs, type(found))
        self.assertIs(ours, found.__cause__)
        return found

    def test_guest_that_is_gone(self) -> None:
        self.assertTranslated(exception.GuestGone('gone'),
                              nova_exception.InstanceNotFound)

    def test_image_that_is_gone(self) -> None:
        self.assertTranslated(exception.ImageGone('gone'),
                              nova_exception.ImageNotFound)

    def test_state_that_was_reset_is_left_to_whoever_did(self) -> None:
        found = self.assertTranslated(
            exception.Preempted('The state of server x was reset'),
            nova_exception.UnexpectedTaskStateError)
        self.assertIn('state of server x was reset', str(found))

    def test_everything_else(self) -> None:
        for error in (exception.FreezeFailed('no socket'),
                      exception.ImageRefused('413 too large'),
                      exception.GuestBusy('in flight'),
                      PermissionError('denied')):
            found = self.assertTranslated(
                error, nova_exception.NovaException)
            self.assertEqual(str(error), str(found))

    def test_error_is_logged_once(self) -> None:
        self.assertTranslated(exception.FreezeFailed('no socket'),
                              nova_exception.NovaException)
        self.assertEqual(1, self.output.output.count(
            'No snapshot was taken: no socket'))
        self.assertEqual(1, self.output.output.count('reason="no socket"'))
        self.assertEqual(2, self.output.output.count('no socket'))

    def test_error_is_in_the_servers_events(self) -> None:
        self.assertTranslated(exception.FreezeFailed('no socket'),
                              nova_exception.NovaException)
        self.assertEqual(['snapshot_ext_snapshot NovaException'],
                         self.events)

    def test_guest_without_a_domain(self) -> None:
        self.nova_host.domain = None
        self.assertRaises(nova_exception.InstanceNotRunning, self.snapshot)
        self.assertEqual([], self.taken)

    def test_domain_is_looked_up_anew_by_novas_connection(self) -> None:
        self.snapshot()
        guest = self.taken[0]['guest']
        self.domain.errors['state'] = fakes.libvirt_error(
            libvirt.VIR_ERR_SYSTEM_ERROR, domain=libvirt.VIR_FROM_RPC)
        self.nova_host.domain = fakes.FakeDomain(self.journal)
        self.assertEqual(guests.State.RUNNING, guest.state())

    def test_libvirt_that_nova_can_not_reach_is_our_error(self) -> None:
        self.snapshot()
        guest = self.taken[0]['guest']
        self.domain.errors['state'] = fakes.libvirt_error(
            libvirt.VIR_ERR_SYSTEM_ERROR, domain=libvirt.VIR_FROM_RPC)
        for theirs, ours in (
                (nova_exception.HypervisorUnavailable(),
                 exception.SnapshotError),
                (nova_exception.InstanceNotFound(instance_id=fakes.UUID),
                 exception.GuestGone)):
            self.nova_host.error = theirs
            self.assertIs(
                ours, type(self.assertRaises(ours, guest.state)))

    def test_domain_that_vanishes(self) -> None:
        self.domain.gone()
        self.assertRaises(nova_exception.InstanceNotFound, self.snapshot)

    def test_fault_of_ours_is_not_hidden(self) -> None:
        self.error = ZeroDivisionError()
        self.assertRaises(ZeroDivisionError, self.snapshot)
        self.assertIn('No snapshot was taken', self.output.output)

    def test_flow_that_can_not_serve_is_an_error(self) -> None:
        self.domain.off()
        self.config(flows=['live'], group='snapshot_ext')
        error = self.assertRaises(
            nova_exception.NovaException, self.snapshot)
        self.assertIn('live: the guest is shut off', str(error))
        self.assertNotIn('nova', self.events)


class TestAccount(DriverTestCase):
    """The line and the notification at the end, whatever the end."""

    def setUp(self) -> None:
        super().setUp()
        self.context = nova_context.RequestContext(
            'u', 'p', request_id='req-5ee7e4f9')
        self.sent: list[tuple[object, accounts.Account]] = []
        self.patch_name('nova_snapshot_ext.notification.send',
                        lambda *what: self.sent.append(what))

    def line(self) -> dict[str, str]:
        [line] = [line for line in self.output.output.splitlines()
                  if 'Snapshot ended: ' in line]
        self.output.reset_output()
        [(context, account)] = self.sent
        self.assertIs(self.context, context)
        self.assertEqual(account.line(), line)
        self.sent.clear()
        found = accounts.parsed(line)
        self.assertEqual(
            (fakes.UUID, uuids.image, 'req-5ee7e4f9'),
            (found['instance'], found['image'], found['request']))
        return found

    def test_success(self) -> None:
        self.snapshot()
        line = self.line()
        self.assertEqual('ok', line['outcome'])
        for phase in ('wait', 'plan', 'release', 'total'):
            self.assertNotEqual('-', line[f'{phase}_s'])

    def test_recipe_puts_down_into_the_same_account(self) -> None:
        self.snapshot()
        [(_, account)] = self.sent
        self.assertIs(account, self.taken[0]['request'].account)

    def test_failure(self) -> None:
        self.error = exception.FreezeFailed('no socket')
        self.assertRaises(nova_exception.NovaException, self.snapshot)
        line = self.line()
        self.assertEqual(('failed', 'FreezeFailed', 'no socket'), (
            line['outcome'], line['error'], line['reason']))

    def test_cancellation(self) -> None:
        self.error = exception.ImageGone('Image x was deleted')
        self.assertRaises(nova_exception.ImageNotFound, self.snapshot)
        self.assertEqual('cancelled', self.line()['outcome'])

    def test_server_that_is_deleted_before_bytes_are_sent(self) -> None:
        def update(task_state: str, **more: object) -> None:
            raise nova_exception.UnexpectedDeletingTaskStateError(
                instance_uuid=fakes.UUID, expected={}, actual={})
        self.assertRaises(nova_exception.UnexpectedDeletingTaskStateError,
                          self.snapshot, update)
        self.assertEqual('cancelled', self.line()['outcome'])

    def test_refusal_before_anything_is_done(self) -> None:
        self.domain.off()
        self.config(flows=['live'], group='snapshot_ext')
        self.assertRaises(nova_exception.NovaException, self.snapshot)
        line = self.line()
        self.assertEqual(('failed', 'NoFlowServes', '-'), (
            line['outcome'], line['error'], line['flow']))

    def test_novas_own_snapshot(self) -> None:
        self.config(virt_type='lxc', group='libvirt')
        self.snapshot()
        line = self.line()
        self.assertEqual(('ok', 'nova'), (line['outcome'], line['flow']))


class TestNovaServes(DriverTestCase):

    def assertNovaServes(self, why: str) -> None:
        self.snapshot()
        self.assertEqual(['nova', 'snapshot_ext_snapshot'], self.events)
        self.assertEqual([], self.taken)
        self.assertEqual([], self.states)
        lines = [line for line in self.output.output.splitlines()
                 if "Nova's own snapshot serves" in line]
        self.assertEqual(1, len(lines))
        self.assertIn(why, lines[0])

    def test_lxc(self) -> None:
        self.config(virt_type='lxc', group='libvirt')
        self.nova_host.domain = None
        self.assertNovaServes('virt_type is lxc')

    def test_rbd(self) -> None:
        self.domain.disks = fakes.disk_xml('vms/a', kind='network')
        self.assertNovaServes('its root disk is a network disk')

    def test_encrypted_disk(self) -> None:
        self.domain.disks = fakes.disk_xml(
            self.path, inside="<encryption format='luks'/>")
        self.assertNovaServes('its root disk is encrypted')

    def test_encrypted_lvm(self) -> None:
        self.config(enabled=True, group='ephemeral_storage_encryption')
        self.assertNovaServes('its root disk is encrypted')

    def test_encrypted_disk_may_be_refused(self) -> None:
        self.config(encrypted='refuse', group='snapshot_ext')
        self.domain.disks = fakes.disk_xml(
            self.path, inside="<encryption format='luks'/>")
        self.assertRaisesRegex(
            nova_exception.NovaException, 'encrypted = refuse',
            self.snapshot)
        self.assertNotIn('nova', self.events)

    def test_what_we_serve_nova_does_not(self) -> None:
        self.snapshot()
        self.assertNotIn('nova', self.events)


class TestChoice(DriverTestCase):

    def flows(self) -> list[str]:
        self.snapshot()
        found: list[str] = self.taken[-1]['flows']
        return found

    def test_configuration(self) -> None:
        self.assertEqual(['backup', 'live', 'cold'], self.flows())
        self.assertEqual(['streamed', 'staged'], self.taken[-1]['transfers'])
        self.config(flows=['cold', 'live'], group='snapshot_ext')
        self.instance.task_state = 'image_snapshot'
        self.assertEqual(['cold', 'live'], self.flows())

    def test_flavor(self) -> None:
        self.instance.flavor.extra_specs['snapshot_ext:flow'] = 'cold'
        self.assertEqual(['cold'], self.flows())

    def test_request(self) -> None:
        self.instance.flavor.extra_specs['snapshot_ext:flow'] = 'cold'
        self.api.image['properties']['snapshot_flow'] = 'live'
        self.assertEqual(['live'], self.flows())

    def test_request_that_is_not_allowed(self) -> None:
        self.config(request_flows=['live'], group='snapshot_ext')
        self.api.image['properties']['snapshot_flow'] = 'cold'
        self.assertRaisesRegex(
            nova_exception.NovaException, 'allows live', self.snapshot)
        self.assertEqual([], self.states)

    def test_unknown_flow_names_what_exists(self) -> None:
        self.config(request_flows=['warm'], group='snapshot_ext')
        self.api.image['properties']['snapshot_flow'] = 'warm'
        self.assertRaisesRegex(
            nova_exception.NovaException, 'cold, domain, live',
            self.snapshot)

    def test_livesnapshot_can_be_switched_off(self) -> None:
        self.config(disable_libvirt_livesnapshot=True, group='workarounds')
        self.assertEqual(['backup', 'cold'], self.flows())

    def test_flow_that_is_switched_off_is_not_replaced(self) -> None:
        self.config(disable_libvirt_livesnapshot=True, group='workarounds')
        self.api.image['properties']['snapshot_flow'] = 'live'
        self.assertRaisesRegex(
            nova_exception.NovaException, 'disable_libvirt_livesnapshot',
            self.snapshot)


class TestDisks(DriverTestCase):

    def disks(self, **properties: str) -> str:
        self.instance.task_state = task_states.IMAGE_SNAPSHOT
        self.api.image['properties'] = properties
        self.snapshot()
        request: requests.Request = self.taken[-1]['request']
        return request.disks.value

    def test_root_disk_is_the_default(self) -> None:
        self.assertEqual('root', self.disks())

    def test_configuration(self) -> None:
        self.config(disks='all', group='snapshot_ext')
        self.assertEqual('all', self.disks())

    def test_request_goes_first(self) -> None:
        self.assertEqual('all', self.disks(snapshot_disks='all'))
        self.config(disks='all', group='snapshot_ext')
        self.assertEqual('root', self.disks(snapshot_disks='root'))

    def test_other_request_is_one_clear_error(self) -> None:
        for asked in ('both', '', 'ALL'):
            error = self.assertRaises(
                nova_exception.NovaException, self.disks,
                snapshot_disks=asked)
            self.assertEqual(
                f'image property snapshot_disks = {asked} is not valid: it '
                f'must be root or all', str(error))
        self.assertEqual([], self.states)

    def test_image_of_the_root_disk_names_the_group(self) -> None:
        self.disks(snapshot_disks='all')
        self.assertEqual(uuids.image, self.taken[-1]['request'].group)

    def test_request_is_for_one_snapshot(self) -> None:
        self.disks(snapshot_disks='all')
        self.assertIn('snapshot_disks', self.taken[-1]['description'].removed)
        self.instance.system_metadata = {'image_snapshot_disks': 'all'}
        self.disks(snapshot_disks='all')
        self.assertNotIn('snapshot_disks',
                         self.taken[-1]['description'].removed)

    def test_further_images_are_found_by_the_server_and_not_for_booting(
            self) -> None:
        self.disks(snapshot_disks='all')
        self.assertEqual({'instance_uuid': fakes.UUID},
                         self.taken[-1]['description'].further)

    def back_up(self, disks: str = 'all') -> list[tuple[object, ...]]:
        """:returns: how what Nova has rotated out is asked for"""
        asked: list[tuple[object, ...]] = []

        def delete(*arguments: object) -> list[str]:
            asked.append(arguments)
            if self.fails:
                raise self.fails
            return ['image-9']
        self.patch_name('nova_snapshot_ext.images.rotation.delete_rotated',
                        delete)
        self.patch_name('nova_snapshot_ext.driver._glance',
                        lambda context: 'proxy')
        self.config(disks=disks, group='snapshot_ext')
        self.api.image['properties'] = {'backup_type': 'daily'}
        self.instance.task_state = task_states.IMAGE_BACKUP
        self.snapshot()
        return asked

    fails: Exception | None = None

    def test_backup_is_of_all_too(self) -> None:
        self.assertEqual([('proxy', fakes.UUID, 'daily')], self.back_up())
        self.assertEqual(requests.Disks.ALL, self.taken[-1]['request'].disks)
        self.assertEqual(
            {'instance_uuid': fakes.UUID,
             'snapshot_ext_backup_type': 'daily'},
            self.taken[-1]['description'].further)
        self.assertIn('Image image-9 is deleted', self.output.output)

    def test_backup_does_not_fail_because_earlier_ones_stay(self) -> None:
        for self.fails in (exception.ImageRefused('403'),
                           nova_exception.NovaException('no catalog')):
            self.back_up()
            self.assertIn(f'earlier backups may stay: {self.fails}',
                          self.output.output)

    def test_snapshot_of_a_server_booted_from_a_backup_is_no_backup(
            self) -> None:
        self.disks(snapshot_disks='all', backup_type='daily')
        self.assertEqual({'instance_uuid': fakes.UUID},
                         self.taken[-1]['description'].further)

    def test_backup_of_the_root_disk_has_no_others(self) -> None:
        self.assertEqual([], self.back_up('root'))

    def test_image_that_nova_deletes_when_it_is_used_has_no_others(
            self) -> None:
        self.config(disks='all', group='snapshot_ext')
        self.api.image['properties'] = {'snapshot_disks': 'all'}
        for state in (task_states.SHELVING, task_states.RESIZE_MIGRATING):
            self.instance.task_state = state
            self.snapshot(lambda *arguments, **more: None)
            self.assertEqual(requests.Disks.ROOT,
                             self.taken[-1]['request'].disks)

    def test_nova_serves_no_request_for_all(self) -> None:
        self.domain.disks = fakes.disk_xml('vms/a', kind='network')
        self.api.image['properties'] = {'snapshot_disks': 'all'}
        self.assertRaisesRegex(
            nova_exception.NovaException,
            "snapshot_disks = all is not valid: only root can be served, by "
            "Nova's own snapshot: its root disk is a network disk",
            self.snapshot)
        self.assertNotIn('nova', self.events)

    def test_nova_serves_where_the_configuration_says_all(self) -> None:
        self.config(disks='all', group='snapshot_ext')
        self.domain.disks = fakes.disk_xml('vms/a', kind='network')
        self.snapshot()
        self.assertIn('nova', self.events)
        self.assertIn('it is of the root disk alone', self.output.output)

    def test_what_is_left_is_seen_to_while_we_live(self) -> None:
        def service(context: object, image_id: str,
                    record: in_flight.Record) -> FakeService:
            record.begin_further('image-2')
            self.addCleanup(record.close)
            return FakeService()
        self.patch_name('nova_snapshot_ext.driver._image_service', service)
        left: list[in_flight.Record] = []
        self.patch_name('nova_snapshot_ext.reconcile.settle_later',
                        left.append)
        self.patch_name('threading.Timer.start',
                        lambda timer: timer.function())
        self.snapshot()
        self.assertEqual([], left)
        self.instance.task_state = task_states.IMAGE_SNAPSHOT
        self.error = exception.UndoFailed('it is kept')
        self.assertRaises(nova_exception.NovaException, self.snapshot)
        self.assertEqual([['image-2']], [each.further for each in left])


class TestRequest(DriverTestCase):

    def taken_request(self) -> requests.Request:
        self.snapshot()
        found: requests.Request = self.taken[-1]['request']
        return found

    def test_novas_options_are_honoured(self) -> None:
        self.config(snapshot_compression=True, group='libvirt')
        self.config(freeze_timeout=3, copy_timeout=4, convert_timeout=5,
                    mover_python='/opt/python', bandwidth=6,
                    on_scratch_full='live', group='snapshot_ext')
        request = self.taken_request()
        self.assertEqual(
            (True, self.staging, '[libvirt] snapshots_directory',
             self.state, self.save, 3, 4, 5, True, '/opt/python', 6,
             'live'),
            (request.compress, request.staging_directory,
             request.staging_setting, request.state_directory,
             request.managed_save_directory, request.freeze_timeout,
             request.copy_timeout, request.convert_timeout,
             request.may_stop, request.mover_python, request.bandwidth,
             request.on_scratch_full))

    def test_state_is_kept_in_novas_directory(self) -> None:
        self.config(state_directory=None, group='snapshot_ext')
        self.assertEqual(os.path.join(self.directory, 'snapshot-ext'),
                         self.taken_request().state_directory)

    def test_sockets_are_with_the_state_or_where_it_is_set(self) -> None:
        self.assertEqual(self.state, self.taken_request().socket_directory)
        self.config(socket_directory='/run/sockets', group='snapshot_ext')
        self.assertEqual('/run/sockets',
                         self.taken_request().socket_directory)

    def test_snapshots_directory_is_made_as_nova_makes_it(self) -> None:
        path = os.path.join(self.directory, 'new', 'snapshots')
        self.config(snapshots_directory=path, group='libvirt')
        self.snapshot()
        self.assertTrue(os.path.isdir(path))

    def test_snapshots_directory_that_can_not_be_made(self) -> None:
        path = os.path.join(self.path, 'snapshots')
        self.config(snapshots_directory=path, group='libvirt')
        self.assertRaisesRegex(
            nova_exception.NovaException,
            r'\[libvirt\] snapshots_directory', self.snapshot)
        self.assertEqual([], self.states)

    def test_snapshots_directory_that_is_too_small(self) -> None:
        self.config(flows=['live'], group='snapshot_ext')
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: 1000)
        self.assertRaisesRegex(
            nova_exception.NovaException, '1000 bytes free', self.snapshot)
        self.assertEqual([], self.states)

    def test_image_has_the_disks_format(self) -> None:
        self.assertEqual('raw', self.taken_request().image_format)
        path = self.new_file('qcow2', base.qcow2_header())
        self.domain.disks = fakes.disk_xml(
            path, 'qcow2', inside='<backingStore/>')
        self.assertEqual('qcow2', self.taken_request().image_format)

    def test_image_of_a_block_device_is_raw(self) -> None:
        path = self.new_file('qcow2', base.qcow2_header())
        self.domain.disks = fakes.disk_xml(
            path, 'qcow2', kind='block', inside='<backingStore/>')
        self.assertEqual('raw', self.taken_request().image_format)

    def test_format_can_be_set(self) -> None:
        self.config(snapshot_image_format='vmdk', group='libvirt')
        self.assertEqual('vmdk', self.taken_request().image_format)
        self.assertEqual('vmdk', self.taken[-1]['description'].disk_format)

    def test_quiesce_is_the_images_wish(self) -> None:
        self.config(flows=['cold'], group='snapshot_ext')
        self.domain.off()
        for properties, expected in (
                ({}, requests.Quiesce.NEVER),
                ({'image_hw_qemu_guest_agent': 'yes'},
                 requests.Quiesce.IF_POSSIBLE),
                ({'image_hw_qemu_guest_agent': 'yes',
                  'image_os_require_quiesce': 'yes'},
                 requests.Quiesce.REQUIRED),
                ({'image_hw_qemu_guest_agent': 'no'},
                 requests.Quiesce.NEVER)):
            self.instance.system_metadata = dict(properties)
            self.assertEqual(expected, self.taken_request().quiesce)

    def test_guest_is_reached_by_novas_uri(self) -> None:
        self.snapshot()
        self.assertEqual(fakes.URI, self.taken[0]['guest'].uri)


class TestVerification(DriverTestCase):

    def verified(self, task_state: str) -> bool:
        self.instance.task_state = task_state
        self.snapshot(self.update)
        found: bool = self.taken[-1]['verify_hash']
        return found

    def update(self, task_state: str, **more: object) -> None:
        self.instance.task_state = task_state

    def test_size_is_enough_where_the_disk_stays(self) -> None:
        self.assertFalse(self.verified(task_states.IMAGE_SNAPSHOT))
        self.assertFalse(self.verified(task_states.IMAGE_BACKUP))

    def test_hash_is_compared_where_the_disk_is_deleted(self) -> None:
        for state in (task_states.SHELVING, task_states.RESIZE_MIGRATING,
                      task_states.RESIZE_PREP):
            self.assertTrue(self.verified(state))

    def test_hash_can_be_asked_for(self) -> None:
        self.config(verify='hash', group='snapshot_ext')
        self.assertTrue(self.verified(task_states.IMAGE_SNAPSHOT))


class TestDescription(DriverTestCase):

    def described(self, **properties: str) -> images.Description:
        self.api.image['properties'] = properties
        self.snapshot()
        found: images.Description = self.taken[-1]['description']
        return found

    def test_properties_are_those_of_nova(self) -> None:
        self.instance.os_type = 'linux'
        description = self.described()
        self.assertEqual(
            {'image_location': 'snapshot', 'image_state': 'available',
             'owner_id': 'p', 'os_type': 'linux'}, description.properties)
        self.assertEqual(('snap', 'raw', 'bare'), (
            description.name, description.disk_format,
            description.container_format))

    def test_kernel_is_kept(self) -> None:
        self.instance.kernel_id = 'k'
        self.instance.ramdisk_id = 'r'
        properties = self.described().properties
        self.assertEqual(('k', 'r'), (
            properties['kernel_id'], properties['ramdisk_id']))

    def test_request_is_for_one_snapshot(self) -> None:
        self.assertIn('snapshot_flow',
                      self.described(snapshot_flow='cold').removed)

    def test_domain_snapshot_is_described(self) -> None:
        self.config(max_domain_snapshots=3, max_domain_snapshots_gb=7,
                    group='snapshot_ext')
        self.assertIn('snapshot_memory', self.described(
            snapshot_memory='False').removed)
        self.assertEqual(
            requests.DomainSnapshot(
                memory=False, image_id=uuids.image, title='snap', most=3,
                most_gb=7), self.taken[-1]['request'].domain)

    def test_memory_is_kept_or_not(self) -> None:
        self.described()
        self.assertTrue(self.taken[-1]['request'].domain.memory)
        self.instance.task_state = 'image_snapshot'
        error = self.assertRaises(
            nova_exception.NovaException, self.described,
            snapshot_memory='perhaps')
        self.assertIn('must be true or false', str(error))

    def test_request_of_the_instances_own_image_stays(self) -> None:
        self.instance.system_metadata = {'image_snapshot_flow': 'cold'}
        self.assertNotIn('snapshot_flow',
                         self.described(snapshot_flow='cold').removed)

    def test_request_that_differs_from_the_own_image_goes(self) -> None:
        self.instance.system_metadata = {'image_snapshot_flow': 'live'}
        self.assertIn('snapshot_flow',
                      self.described(snapshot_flow='cold').removed)

    def test_inherited_record_goes(self) -> None:
        removed = self.described(
            snapshot_ext_flow='old', snapshot_ext_rollback='memory',
            other='kept').removed
        self.assertLessEqual(
            {'snapshot_ext_flow', 'snapshot_ext_rollback'}, removed)
        self.assertNotIn('other', removed)


class TestStart(DriverTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.patch_name(
            'nova.virt.libvirt.driver.LibvirtDriver.init_host',
            lambda driver, host: None)

    def test_what_serves_is_said(self) -> None:
        self.driver.init_host('compute-1')
        self.assertIn('flows backup, live, cold, transfers streamed, staged, '
                      'image service glance', self.output.output)

    def test_what_is_in_the_way_is_said_and_does_not_stop_it(self) -> None:
        self.patch_name('nova_snapshot_ext.mover_stream.why_not',
                        lambda python: 'it has no libnbd')
        self.driver.init_host('compute-1')
        self.assertIn('Programs: the transfer streamed can not serve: '
                      'it has no libnbd', self.output.output)

    def test_names_that_stand_for_nothing_are_refused(self) -> None:
        for option, value in (('flows', ['live', 'warm']),
                              ('request_flows', ['warm']),
                              ('transfers', ['sneakernet']),
                              ('image_service', 'floppy')):
            with fixtures.Fixture() as fixture:
                config = fixture.useFixture(
                    config_fixture.Config(nova.conf.CONF)).config
                self.config(state_directory=self.state,
                            group='snapshot_ext')
                config(**{option: value}, group='snapshot_ext')
                self.assertRaisesRegex(
                    exception.InvalidSetting,
                    rf'\[snapshot_ext\] {option} = .*installed are',
                    self.driver.init_host, 'compute-1')


class TestRecovery(DriverTestCase):

    def setUp(self) -> None:
        super().setUp()
        journal.clear()
        self.patch_name(
            'nova_snapshot_ext.nova_compat.LibvirtDriver.'
            'process_instances_at_startup',
            lambda driver, context, instances: (
                journal.append('nova'), instances)[1])
        self.patch_name('nova_snapshot_ext.guard.find_guest',
                        lambda uri, uuid: self.guest)
        self.driver.cpu_api = type('API', (), {
            'power_up_for_instance': lambda api, instance: journal.append(
                'cpus')})()
        self.current = self.instance
        self.patch_name(
            'nova.objects.Instance.get_by_uuid',
            lambda kind, context, uuid, **more: self.current)

    def leave_log(self) -> str:
        log = self.new_log()
        log.push(demo_recovery)
        log.close()
        return log.path

    def process(self, *instances: objects.Instance) -> None:
        found = self.driver.process_instances_at_startup(
            self.context, list(instances))
        self.assertEqual(list(instances), found)

    def test_cut_off_snapshot_is_undone_after_nova_evacuated(self) -> None:
        path = self.leave_log()
        self.process(self.instance)
        self.assertEqual(
            ['nova', 'recovered instance-00000001', 'cpus',
             'may start True'], journal)
        self.assertFalse(os.path.exists(path))
        self.assertIn(f'What {path} said is undone', self.output.output)

    def test_nova_does_not_wait_for_a_merge(self) -> None:
        """What is merged may be as large as disks are."""
        log = self.new_log()
        log.push(demo_recovery)
        log.push(external_merge.merge_external_snapshot,
                 name=internal_snapshot.new_name(), uuid='-',
                 state_directory='-', child=None, merges=[], files=[])
        log.close()
        finish = driver._finish_now
        goes_on, done = threading.Event(), threading.Event()

        def slowly(*arguments: typing.Any) -> None:
            self.assertTrue(goes_on.wait(10))
            finish(*arguments)
            done.set()
        self.patch_name('nova_snapshot_ext.driver._finish_now', slowly)
        self.patch_name(
            'nova_snapshot_ext.power.is_gone', lambda around: True)
        self.process(self.instance)
        self.assertEqual(['nova'], journal)
        goes_on.set()
        self.assertTrue(done.wait(10))
        self.assertFalse(os.path.exists(log.path))

    def test_next_snapshot_is_planned_when_that_is_undone(self) -> None:
        self.leave_log()
        real = selection.candidates

        def candidates(*arguments: typing.Any) -> list[selection.Candidate]:
            journal.append('plan')
            return real(*arguments)
        self.patch_name('nova_snapshot_ext.selection.candidates', candidates)
        self.snapshot()
        self.assertEqual(['recovered instance-00000001', 'cpus',
                          'may start True', 'plan'], journal)

    def test_shelving_has_the_lock_and_starts_no_guest(self) -> None:
        self.patch_name('nova_snapshot_ext.driver._LOCK_TIMEOUT_S', 0.0)
        self.leave_log()
        self.instance.task_state = task_states.SHELVING
        with lockutils.lock(fakes.UUID, lock_file_prefix='nova-'):
            self.snapshot(lambda *arguments, **more: None)
        self.assertEqual(
            ['recovered instance-00000001', 'may start False'], journal)

    def test_directory_that_can_not_be_read_keeps_no_nova_from_starting(
            self) -> None:
        def refuse(directory: str) -> list[str]:
            raise PermissionError(13, 'Permission denied', directory)
        self.patch_name('nova_snapshot_ext.undo.logs_in', refuse)
        self.process(self.instance)
        self.assertIn('nothing of it is undone', self.output.output)

    def test_guest_that_nova_has_no_more_is_not_started(self) -> None:
        self.patch_name('nova_snapshot_ext.guest.Guest.belongs_to_nova',
                        lambda guest: True)
        self.leave_log()
        self.process()
        self.assertIn('may start False', journal)

    def test_guest_of_another_host_is_not_started(self) -> None:
        self.leave_log()
        self.current = self.instance.obj_clone()
        self.current.host = 'compute-2'
        self.process(self.instance)
        self.assertIn('may start False', journal)

    def test_guest_that_is_going_down_is_not_started(self) -> None:
        for state in (task_states.DELETING, task_states.SOFT_DELETING,
                      task_states.POWERING_OFF):
            journal.clear()
            self.leave_log()
            self.current = self.instance.obj_clone()
            self.current.task_state = state
            self.process(self.instance)
            self.assertIn('may start False', journal)

    def test_guest_that_nova_stopped_is_not_started(self) -> None:
        for state in (vm_states.STOPPED, vm_states.SUSPENDED,
                      vm_states.DELETED, vm_states.SHELVED):
            journal.clear()
            self.leave_log()
            self.current = self.instance.obj_clone()
            self.current.vm_state = state
            self.process(self.instance)
            self.assertIn('may start False', journal)

    def test_guest_that_was_paused_meanwhile_is_not_resumed(self) -> None:
        host = driver.NovaHost(self.driver, fakes.UUID, self.instance)
        for state, may in ((vm_states.ACTIVE, True),
                           (vm_states.PAUSED, False),
                           (vm_states.STOPPED, False)):
            self.current = self.instance.obj_clone()
            self.current.vm_state = state
            with host.may_resume() as allowed:
                self.assertEqual(may, allowed, state)
        # It was paused when it was stopped: it comes back as it was.
        self.current.vm_state = vm_states.PAUSED
        with host.may_start() as allowed:
            self.assertTrue(allowed)

    def test_nothing_is_resumed_that_nova_has_no_more(self) -> None:
        host = driver.NovaHost(self.driver, fakes.UUID, None)
        with host.may_resume() as allowed:
            self.assertFalse(allowed)

    def test_guest_of_the_command_line_is_started(self) -> None:
        self.patch_name('nova_snapshot_ext.guest.Guest.belongs_to_nova',
                        lambda guest: False)
        self.leave_log()
        self.process()
        self.assertEqual(['nova', 'recovered instance-00000001',
                          'may start True'], journal)

    def test_guest_that_nova_is_at_work_on_is_tried_again(self) -> None:
        self.patch_name('nova_snapshot_ext.guard._RETRY_S', 0.01)
        path = self.leave_log()
        self.current = self.instance.obj_clone()
        self.current.task_state = task_states.RESCUING
        self.patch_name('nova.objects.Instance.save',
                        lambda instance, expected_task_state: None)
        self.process(self.instance)
        self.assertIn('at work on server', self.output.output)
        self.assertNotIn('may start True', journal)
        self.current.task_state = None
        self.await_end(path)
        self.assertIn('may start True', journal)

    def await_end(self, path: str) -> None:
        deadline = time.monotonic() + 10
        while os.path.exists(path):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)

    def test_snapshot_of_a_living_process_is_left_alone(self) -> None:
        self.patch_name(
            'nova_snapshot_ext.driver._GUARDS_TIMEOUT_S', 0.0)
        log = self.new_log()
        log.push(demo_recovery)
        self.process(self.instance)
        self.assertEqual(['nova'], journal)
        self.assertTrue(os.path.exists(log.path))

    def test_log_that_makes_no_sense_does_not_hold_up_the_start(
            self) -> None:
        path = os.path.join(self.state, 'a.undo')
        with open(path, 'w') as file:
            file.write('{}\n')
        self.leave_log()
        self.process(self.instance)
        self.assertIn('recovered instance-00000001', journal)
        self.assertTrue(os.path.exists(path))
        self.assertIn(f'{path} says how to undo', self.output.output)
        self.assertIn('undo by hand', self.output.output)

    def test_what_fails_goes_on_beside_novas_work(self) -> None:
        self.patch_name('nova_snapshot_ext.guard._RETRY_S', 0.01)
        path = self.leave_log()
        self.nova_host.error = nova_exception.HypervisorUnavailable()
        self.process(self.instance)
        self.assertIn('could not be finished', self.output.output)
        self.assertEqual(['nova'], journal)
        self.nova_host.error = None
        self.await_end(path)
        self.assertIn('may start True', journal)

    def test_what_can_not_be_understood_is_not_tried_again(self) -> None:
        self.patch_name('nova_snapshot_ext.guard.bring_back',
                        lambda *arguments: journal.append('again'))
        with open(os.path.join(self.state, 'a.undo'), 'w') as file:
            file.write('{}\n')
        self.process(self.instance)
        self.assertEqual(['nova'], journal)

    def test_progress_of_a_snapshot_that_was_cut_off_goes(self) -> None:
        saved: list[str] = []
        self.patch_name('nova.objects.Instance.save',
                        lambda instance: saved.append(instance.task_state))
        for state, progress in (
                (task_states.IMAGE_SNAPSHOT, 0),
                (task_states.IMAGE_PENDING_UPLOAD, 0),
                (task_states.IMAGE_UPLOADING, 0),
                (task_states.IMAGE_BACKUP, 0),
                (task_states.SHELVING, 0),
                (task_states.SHELVING_IMAGE_PENDING_UPLOAD, 0),
                (task_states.SHELVING_IMAGE_UPLOADING, 0),
                (task_states.RESIZE_MIGRATING, 40),
                (task_states.MIGRATING, 40)):
            self.instance.task_state = state
            self.instance.progress = 40
            self.process(self.instance)
            self.assertEqual(progress, self.instance.progress, state)
        self.assertEqual(7, len(saved))

    def test_progress_whose_end_was_not_shown_goes(self) -> None:
        self.patch_name('nova.objects.Instance.save', lambda instance: None)
        self.instance.task_state = None
        for state, progress in ((vm_states.ACTIVE, 0),
                                (vm_states.RESIZED, 40)):
            self.instance.vm_state = state
            self.instance.progress = 40
            self.process(self.instance)
            self.assertEqual(progress, self.instance.progress, state)

    def test_progress_that_can_not_be_written_does_not_hold_up_the_start(
            self) -> None:
        def fail(instance: objects.Instance) -> None:
            raise OSError('no conductor')
        self.patch_name('nova.objects.Instance.save', fail)
        self.instance.progress = 40
        self.process(self.instance)
        self.assertIn('no conductor', self.output.output)

    def test_what_is_left_beyond_guests_is_seen_to_before_novas_own(
            self) -> None:
        self.patch_name(
            'nova_snapshot_ext.reconcile.after_death',
            lambda directory, instances: journal.append(
                f'after death {directory == self.state} {len(instances)}'))
        self.leave_log()
        self.process(self.instance)
        self.assertEqual('after death True 1', journal[-1])
        self.assertIn('recovered instance-00000001', journal)

    def test_there_may_be_nothing_to_do(self) -> None:
        self.config(state_directory='/none', group='snapshot_ext')
        self.process(self.instance)
        self.assertEqual(['nova'], journal)


class TestGlance(DriverTestCase):

    def test_rights_are_those_of_the_request(self) -> None:
        proxy = type('Proxy', (), {'endpoint_override': None})()
        self.patch_name('nova_snapshot_ext.nova_compat.request_auth',
                        lambda context: f'auth of {context.request_id}')
        self.patch_name(
            'nova_snapshot_ext.nova_compat.image_proxy',
            lambda auth: (self.events.append(auth), proxy)[1])
        self.patch_name('nova.image.glance.get_api_servers',
                        lambda context: iter(['http://glance/']))
        self.assertIs(proxy, driver._glance(self.context))
        self.assertEqual('http://glance/v2', proxy.endpoint_override)
        self.assertEqual([f'auth of {self.context.request_id}'], self.events)


class TestServerReport(DriverTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.patch_name('nova.objects.Instance.get_by_uuid',
                        lambda kind, *what, **more: self.get(*what, **more))
        self.patch_name('nova.objects.Instance.save',
                        lambda instance: self.save_instance(instance))
        self.saved: list[int] = []
        self.loaded: list[objects.Instance] = []
        self.error: Exception | None = None
        self.report = driver.ServerReport(self.instance)

    def get(self, context: nova_context.RequestContext, uuid: str,
            expected_attrs: list[str]) -> objects.Instance:
        self.assertTrue(context.is_admin)
        self.assertEqual((fakes.UUID, []), (uuid, expected_attrs))
        if self.error is not None:
            raise self.error
        self.loaded.append(self.instance.obj_clone())
        self.loaded[-1].obj_reset_changes(recursive=True)
        return self.loaded[-1]

    def save_instance(self, instance: objects.Instance) -> None:
        self.assertIs(self.loaded[-1], instance)
        self.assertEqual({'progress'}, instance.obj_what_changed())
        self.instance.progress = instance.progress
        self.saved.append(self.instance.progress)

    def test_progress_is_the_servers(self) -> None:
        for percent in (1, 50, 50, 99, 0, 0):
            self.report(percent)
        self.assertEqual([1, 50, 99, 0], self.saved)
        self.assertEqual(6, len({id(each) for each in self.loaded}))

    def test_server_that_is_being_deleted_is_gone(self) -> None:
        for state in (task_states.DELETING, task_states.SOFT_DELETING):
            self.instance.task_state = state
            self.assertRaises(exception.GuestGone, self.report, 50)
        self.assertEqual([], self.saved)

    def test_server_that_was_deleted_is_gone(self) -> None:
        self.error = nova_exception.InstanceNotFound(instance_id=fakes.UUID)
        self.assertRaises(exception.GuestGone, self.report, 50)

    def test_states_of_a_snapshot_end_nothing(self) -> None:
        for state in (task_states.IMAGE_UPLOADING, task_states.SHELVING,
                      task_states.IMAGE_BACKUP):
            self.instance.task_state = state
            self.report(50)

    def test_server_whose_state_was_reset_has_other_things_to_do(
            self) -> None:
        self.report(50)
        for state in (None, task_states.REBOOT_STARTED_HARD,
                      task_states.POWERING_OFF):
            self.instance.task_state = state
            self.assertRaises(exception.Preempted, self.report, 60)
        self.assertEqual([50, 0], self.saved)

    def test_states_of_a_caller_that_is_not_known_end_nothing(self) -> None:
        self.instance.task_state = task_states.RESIZE_PREP
        report = driver.ServerReport(self.instance)
        for state in (None, task_states.RESIZE_MIGRATING):
            self.instance.task_state = state
            report(50)

    def test_each_snapshot_has_one(self) -> None:
        self.snapshot()
        [taken] = self.taken
        taken['report'](50)
        self.assertEqual([50], self.saved)


class TestNovaHost(DriverTestCase):

    def test_owner_is_changed_by_novas_privileges(self) -> None:
        changed: list[object] = []
        for name in ('let_group_pass', 'take_socket', 'give_disk'):
            self.patch_name(
                f'nova_snapshot_ext.privileged.{name}',
                lambda *arguments, name=name: changed.append(
                    (name, *arguments)))
        host = driver.NovaHost(self.driver, fakes.UUID, self.instance)
        host.let_group_pass('/d', 2)
        host.take_socket('/s')
        host.give_disk('/d', 1, 2)
        self.assertEqual(
            [('let_group_pass', '/d', 2), ('take_socket', '/s'),
             ('give_disk', '/d', 1, 2)], changed)

    def setUp(self) -> None:
        super().setUp()
        self.driver.cpu_api = type('API', (), {
            'power_up_for_instance': lambda api, instance: None})()
        self.current: objects.Instance | None = self.instance.obj_clone()
        self.answer_error: Exception | None = None
        self.patch_name('nova.objects.Instance.get_by_uuid',
                        lambda kind, context, uuid: self.get(uuid))
        self.patch_name(
            'nova.objects.Instance.save',
            lambda instance, expected_task_state: self.save_state(
                instance, expected_task_state))
        #: as it is in Nova's database, and what was written there
        self.stored: str | None = None
        self.written: list[str | None] = []
        self.write_error: Exception | None = None
        self.patch_name('nova_snapshot_ext.driver._LOCK_TIMEOUT_S', 0.0)

    def get(self, uuid: str) -> objects.Instance:
        self.assertEqual(fakes.UUID, uuid)
        if self.answer_error is not None:
            raise self.answer_error
        if self.current is None:
            raise nova_exception.InstanceNotFound(instance_id=uuid)
        self.stored = self.current.task_state
        return self.current.obj_clone()

    def save_state(self, instance: objects.Instance,
                   expected_task_state: list[str | None]) -> None:
        if self.write_error is not None:
            raise self.write_error
        if self.stored not in expected_task_state:
            raise nova_exception.UnexpectedTaskStateError(
                instance_uuid=fakes.UUID, expected=expected_task_state,
                actual=self.stored)
        self.stored = instance.task_state
        self.written.append(self.stored)

    def new_host(self, caller: str | None = None, here: bool = True,
                 stopped: bool = False) -> driver.NovaHost:
        return driver.NovaHost(
            self.driver, fakes.UUID, self.instance if here else None, caller,
            stopped)

    def asked(self, host: driver.NovaHost) -> tuple[str, str, str]:
        """What it says of starting, resuming, and of writing to the disk."""
        def ask(context: typing.Any) -> str:
            try:
                with context as allowed:
                    return 'no' if allowed is False else 'yes'
            except exception.UndoFailed:
                return 'later'
        return (ask(host.may_start()), ask(host.may_resume()),
                ask(host.undisturbed()))

    def in_state(self, task_state: str | None, **more: object) -> None:
        self.current = self.instance.obj_clone()
        self.current.task_state = task_state
        for name, value in more.items():
            setattr(self.current, name, value)

    def test_what_nova_does_without_its_lock_is_waited_for(self) -> None:
        for state in (
                task_states.RESCUING, task_states.UNRESCUING,
                task_states.REBUILDING,
                task_states.REBUILD_BLOCK_DEVICE_MAPPING,
                task_states.REBUILD_SPAWNING, task_states.RESIZE_PREP,
                task_states.RESIZE_MIGRATING, task_states.RESIZE_MIGRATED,
                task_states.RESIZE_FINISH, task_states.RESIZE_REVERTING,
                task_states.MIGRATING, task_states.SUSPENDING,
                task_states.RESUMING, task_states.POWERING_ON,
                task_states.RESTORING, 'a state of a later release'):
            # Nor does it matter in which state the snapshot was begun.
            for caller in None, task_states.IMAGE_SNAPSHOT:
                self.in_state(state)
                self.assertEqual(('later', 'later', 'later'),
                                 self.asked(self.new_host(caller)), state)

    def test_what_nova_does_under_its_lock_is_not(self) -> None:
        for state in (
                None, task_states.IMAGE_SNAPSHOT,
                task_states.IMAGE_SNAPSHOT_PENDING,
                task_states.IMAGE_BACKUP, task_states.IMAGE_PENDING_UPLOAD,
                task_states.IMAGE_UPLOADING, task_states.SHELVING,
                task_states.REBOOTING_HARD, task_states.REBOOT_STARTED,
                task_states.UPDATING_PASSWORD):
            self.in_state(state)
            self.assertEqual(('yes', 'yes', 'yes'),
                             self.asked(self.new_host()), state)

    def test_guest_that_goes_down_is_not_started(self) -> None:
        for state in (task_states.DELETING, task_states.SOFT_DELETING,
                      task_states.POWERING_OFF):
            self.in_state(state)
            self.assertEqual(('no', 'no', 'yes'),
                             self.asked(self.new_host()), state)

    def test_resize_that_waits_for_a_snapshot_holds_it_up_no_longer(
            self) -> None:
        # Nova has stopped the guest, and takes no lock.
        self.in_state(task_states.RESIZE_MIGRATING)
        host = self.new_host(task_states.RESIZE_MIGRATING, stopped=True)
        self.assertEqual(('no', 'no', 'yes'), self.asked(host))
        self.in_state(task_states.RESIZE_MIGRATED)
        self.assertEqual(('no', 'no', 'later'), self.asked(host))
        self.in_state(task_states.RESIZE_MIGRATING)
        found: list[object] = []
        thread = threading.Thread(
            target=lambda: found.append(self.asked(host)))
        thread.start()
        thread.join()
        # This one it does not wait for.
        self.assertEqual([('later', 'later', 'later')], found)

    def test_caller_that_did_not_stop_the_guest_has_it_started(self) -> None:
        self.in_state(task_states.REBUILDING)
        self.assertEqual(('yes', 'yes', 'yes'), self.asked(
            self.new_host(task_states.REBUILDING)))
        self.assertEqual(('later', 'later', 'later'), self.asked(
            self.new_host(task_states.IMAGE_SNAPSHOT)))

    def test_disk_that_is_on_another_host_is_not_written_to(self) -> None:
        # It may come back by a revert of the resize.
        for here in True, False:
            self.in_state(None, host='compute-2')
            self.assertEqual(('no', 'no', 'later'),
                             self.asked(self.new_host(here=here)))

    def test_server_that_has_left_does_not_come_back(self) -> None:
        for left, host, vm_state, task_state in (
                (True, 'compute-2', vm_states.ACTIVE, None),
                (True, 'compute-2', vm_states.STOPPED, None),
                (True, None, vm_states.SHELVED_OFFLOADED, None),
                # It may yet, or is being moved.
                (False, 'compute-2', vm_states.RESIZED, None),
                (False, 'compute-2', vm_states.ACTIVE,
                 task_states.RESIZE_FINISH),
                (False, 'compute-2', vm_states.ACTIVE,
                 task_states.MIGRATING),
                (False, None, vm_states.ERROR, None),
                (False, None, vm_states.SHELVED_OFFLOADED,
                 task_states.SPAWNING)):
            self.in_state(task_state, host=host, vm_state=vm_state)
            error = self.assertRaises(
                exception.UndoFailed,
                self.new_host(here=False).undisturbed().__enter__)
            self.assertEqual(left, isinstance(
                error, exception.GuestElsewhere), (host, vm_state))

    def test_disk_of_a_server_that_nova_has_no_more(self) -> None:
        self.current = None
        for here in True, False:
            self.assertEqual(('no', 'no', 'yes'),
                             self.asked(self.new_host(here=here)))

    def test_guest_is_not_left_off_because_nobody_can_be_asked(self) -> None:
        self.answer_error = oslo_messaging.MessagingTimeout()
        for state in task_states.IMAGE_UPLOADING, None:
            self.instance.task_state = state
            self.assertEqual(('yes', 'yes', 'yes'),
                             self.asked(self.new_host()))
            # It is not ours to change.
            self.assertEqual(state, self.instance.task_state)
        self.assertEqual([], self.written)
        self.instance.task_state = task_states.RESCUING
        self.assertEqual(('later', 'later', 'later'),
                         self.asked(self.new_host()))

    def test_nothing_is_begun_on_a_server_meanwhile(self) -> None:
        # Nova's API begins where there is no task state.
        self.in_state(None)
        for context in (self.new_host().may_start(),
                        self.new_host().may_resume(),
                        self.new_host().undisturbed()):
            with context:
                self.assertEqual(task_states.IMAGE_SNAPSHOT, self.stored)
            self.assertIsNone(self.stored)

    def test_what_was_begun_a_moment_ago_is_waited_for(self) -> None:
        def begin() -> objects.Instance:
            self.stored = task_states.RESCUING
            return self.instance.obj_clone()
        self.instance.task_state = None
        self.patch_name('nova.objects.Instance.get_by_uuid',
                        lambda kind, context, uuid: begin())
        self.assertEqual(('later', 'later', 'later'),
                         self.asked(self.new_host()))
        self.assertEqual(([], task_states.RESCUING),
                         (self.written, self.stored))

    def test_state_of_a_snapshot_or_of_its_deletion_stays(self) -> None:
        for state in task_states.IMAGE_UPLOADING, task_states.DELETING:
            self.in_state(state)
            self.asked(self.new_host())
            self.assertEqual(([], state), (self.written, self.stored))

    def test_deletion_that_is_begun_meanwhile_stays(self) -> None:
        self.in_state(None)
        with self.new_host().undisturbed():
            self.stored = task_states.DELETING
        self.assertEqual(task_states.DELETING, self.stored)
        self.assertNotIn('can not be cleared', self.output.output)

    def test_state_that_can_not_be_taken_back_is_taken_back_later(
            self) -> None:
        self.patch_name('nova_snapshot_ext.driver._CLEAR_AGAIN_S', 0.01)
        self.in_state(None)
        with self.new_host().may_start():
            self.write_error = oslo_messaging.MessagingTimeout()
        self.assertIn('task state image_snapshot can not be cleared',
                      self.output.output)
        self.assertEqual(task_states.IMAGE_SNAPSHOT, self.stored)
        self.write_error = None
        deadline = time.monotonic() + 10
        while self.stored is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        self.assertIsNone(self.stored)

    def test_guess_of_a_thread_that_tries_again_does_not_count(self) -> None:
        self.answer_error = oslo_messaging.MessagingTimeout()
        self.instance.task_state = None
        host = self.new_host()
        answers: list[tuple[str, ...]] = []
        thread = threading.Thread(
            target=lambda: answers.append(self.asked(host)))
        thread.start()
        thread.join()
        self.assertEqual([('later', 'later', 'later')], answers)

    def test_server_that_was_not_here_may_be_anywhere(self) -> None:
        self.answer_error = oslo_messaging.MessagingTimeout()
        self.assertEqual(('no', 'no', 'later'),
                         self.asked(self.new_host(here=False)))

    def test_guest_is_started_where_no_state_can_be_written(self) -> None:
        self.in_state(None)
        self.write_error = oslo_messaging.MessagingTimeout()
        with self.new_host().may_start() as allowed:
            self.assertTrue(allowed)
            # It may have been written all the same.
            self.write_error = None
        self.assertEqual([None], self.written)

    def test_guest_is_undisturbed_while_nova_is_locked_out(self) -> None:
        host = self.new_host()
        with lockutils.lock(fakes.UUID, lock_file_prefix='nova-'):
            self.assertRaises(exception.UndoFailed,
                              host.undisturbed().__enter__)
        with host.undisturbed():
            self.assertRaises(
                lockutils.AcquireLockFailedException,
                lockutils.lock(fakes.UUID, lock_file_prefix='nova-',
                               blocking=False).__enter__)

    def test_lock_that_the_caller_has_is_not_waited_for(self) -> None:
        self.in_state(task_states.SHELVING)
        host = self.new_host(task_states.SHELVING, stopped=True)
        with lockutils.lock(fakes.UUID, lock_file_prefix='nova-'):
            with host.undisturbed(), host.may_start() as may_start:
                # Whoever has it does with the guest what it wants.
                self.assertFalse(may_start)
            found: list[object] = []

            def from_another_thread() -> None:
                try:
                    host.undisturbed().__enter__()
                except exception.UndoFailed as error:
                    found.append(error)
            thread = threading.Thread(target=from_another_thread)
            thread.start()
            thread.join()
        self.assertEqual(1, len(found))

    def test_guest_that_was_paused_since_may_be_started_not_resumed(
            self) -> None:
        host = self.new_host()
        for vm_state, task_state, may_resume in (
                (vm_states.ACTIVE, None, True),
                (vm_states.PAUSED, None, False),
                (vm_states.ACTIVE, task_states.PAUSING, False),
                (vm_states.ACTIVE, task_states.UNPAUSING, True)):
            self.in_state(task_state, vm_state=vm_state)
            with host.may_start() as allowed:
                self.assertTrue(allowed)
            with host.may_resume() as allowed:
                self.assertEqual(may_resume, allowed)
