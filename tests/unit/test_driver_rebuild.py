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

"""Nova's door, where servers are rolled back and snapshots dropped."""

import inspect
import threading
import typing

import libvirt
from nova.compute import task_states
from nova.compute import vm_states
from nova import exception as nova_exception
from nova import objects
from nova.virt.libvirt import driver as libvirt_driver

from nova_snapshot_ext import domain_records
from nova_snapshot_ext import driver
from nova_snapshot_ext import exception
from nova_snapshot_ext import rebuilding
from tests.unit import fakes
from tests.unit import servers
from tests.unit import test_driver


class RebuildTestCase(test_driver.DriverTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.instance = servers.new_server()
        self.record = servers.new_record(self.instance)
        self.records = domain_records.Records(self.state, fakes.UUID)
        self.records.add(self.record)
        servers.rebuild_by_api(self.instance, servers.IMAGES[0])
        self.there = True
        self.there_error: Exception | None = None
        self.patch_name('nova_snapshot_ext.rollback.is_there', self.is_there)
        self.patch_name('nova_snapshot_ext.rebuilding.roll_back',
                        self.roll_back)
        self.patch_name('nova_snapshot_ext.rebuilding.put_back',
                        lambda *what: self.journal.append('put back'))
        self.patch_name('nova.objects.Instance.get_by_uuid',
                        lambda *what, **more: self.instance)
        self.rolled: list[tuple[typing.Any, ...]] = []

    def is_there(self, guest: object, record: object) -> bool:
        self.assertEqual(self.record, record)
        if self.there_error is not None:
            raise self.there_error
        return self.there

    def roll_back(self, *arguments: typing.Any, **more: typing.Any) -> None:
        self.rolled.append(arguments)
        more['plug']()
        more['power_on']()

    def rebuild(self, **changes: typing.Any) -> None:
        """As Nova's manager calls it."""
        self.driver.rebuild(**{
            'context': self.context, 'instance': self.instance,
            'image_meta': objects.ImageMeta(id=servers.IMAGES[0]),
            'injected_files': [], 'admin_password': 'p', 'allocations': {},
            'bdms': objects.BlockDeviceMappingList(objects=[]),
            'detach_block_devices': None, 'attach_block_devices': None,
            'block_device_info': {'block_device_mapping': []},
            'network_info': ['vif'], 'preserve_ephemeral': False,
            'evacuate': False, 'accel_uuids': [],
            'reimage_boot_volume': False, **changes})


class TestRebuild(RebuildTestCase):

    def test_snapshot_is_rolled_back_to(self) -> None:
        self.patch_name(
            'nova.virt.libvirt.driver.LibvirtDriver.plug_vifs',
            lambda driver, *what: self.journal.append(f'plug {what[1]}'))
        self.patch_name(
            'nova.virt.libvirt.driver.LibvirtDriver.power_on',
            lambda driver, *what: self.journal.append(f'power on {what[2:]}'))
        self.rebuild()
        [(context, instance, guest, record, records, host, block)] = (
            self.rolled)
        self.assertEqual(
            (self.context, self.instance, fakes.UUID, self.record,
             {'block_device_mapping': []}),
            (context, instance, guest.uuid, record, block))
        self.assertEqual([self.record], records.all())
        self.assertIsInstance(host, driver.RebuildingHost)
        self.assertEqual([rebuilding.EVENT], self.events)
        self.assertEqual(
            ["plug ['vif']",
             "power on (['vif'], {'block_device_mapping': []})"],
            self.journal)

    def test_nova_calls_it_by_names_that_it_knows(self) -> None:
        inspect.signature(self.driver.rebuild).bind(**{
            name: None for name in inspect.signature(
                libvirt_driver.LibvirtDriver.rebuild).parameters
            if name != 'self'})

    def assertNovaRebuilds(self, **changes: typing.Any) -> None:
        self.assertRaises(NotImplementedError, self.rebuild, **changes)
        self.assertEqual(([], [], []),
                         (self.rolled, self.events, self.journal))

    def test_other_image(self) -> None:
        self.instance.image_ref = servers.BASE
        self.assertNovaRebuilds()

    def test_snapshot_of_another_server(self) -> None:
        self.instance.uuid = fakes.UUID.replace('5', '1')
        self.assertNovaRebuilds()

    def test_snapshot_that_is_gone(self) -> None:
        self.there = False
        self.assertNovaRebuilds()

    def test_domain_that_is_gone(self) -> None:
        self.nova_host.domain = None
        self.assertNovaRebuilds()

    def test_what_is_no_rollback(self) -> None:
        for what in ('evacuate', 'preserve_ephemeral'):
            self.assertNovaRebuilds(**{what: True})

    def test_request_by_a_newer_version_of_the_api(self) -> None:
        # From 2.93 on it says so of all servers.
        for name in ('plug_vifs', 'power_on'):
            self.patch_name(f'nova.virt.libvirt.driver.LibvirtDriver.{name}',
                            lambda driver, *what: None)
        self.rebuild(reimage_boot_volume=True)
        self.assertEqual(1, len(self.rolled))

    def test_libvirt_that_does_not_answer_rebuilds_nothing(self) -> None:
        self.there_error = exception.SnapshotError('libvirt is away')
        error = self.assertRaises(
            nova_exception.InstanceFaultRollback, self.rebuild)
        self.assertIn('libvirt is away', str(error))
        self.assertEqual(['put back'], self.journal)


class TestRebuildingHost(RebuildTestCase):

    def rebuilding_host(self) -> driver.RebuildingHost:
        self.instance.task_state = task_states.REBUILD_SPAWNING
        return driver.RebuildingHost(
            self.driver, self.instance.uuid, self.instance,
            task_states.REBUILD_SPAWNING)

    def test_guest_is_started_whatever_the_server_was(self) -> None:
        self.driver.cpu_api = type('API', (), {
            'power_up_for_instance': lambda api, instance:
            self.journal.append('cpus')})()
        host = self.rebuilding_host()
        for vm_state in (vm_states.ACTIVE, vm_states.STOPPED,
                         vm_states.ERROR):
            self.instance.vm_state = vm_state
            with host.may_start() as start:
                self.assertTrue(start)
            with host.may_resume() as resume:
                self.assertTrue(resume)
        self.assertEqual(['cpus'] * 6, self.journal)

    def test_who_tries_again_later_minds_what_the_server_is(self) -> None:
        host = self.rebuilding_host()
        self.instance.task_state = None
        allowed: list[bool] = []

        def try_again() -> None:
            for ask in (host.may_start, host.may_resume):
                with ask() as may:
                    allowed.append(may)
        for self.instance.vm_state in (vm_states.STOPPED,
                                       vm_states.RESCUED):
            thread = threading.Thread(target=try_again)
            thread.start()
            thread.join()
        self.assertEqual([False] * 4, allowed)

    def test_but_not_if_it_is_to_go(self) -> None:
        host = self.rebuilding_host()
        self.instance.task_state = task_states.DELETING
        with host.may_start() as start:
            self.assertFalse(start)
        self.instance.task_state = task_states.REBUILD_SPAWNING
        self.instance.host = 'compute-2'
        with host.may_resume() as resume:
            self.assertFalse(resume)


class TestDrop(RebuildTestCase):
    """What Nova does to a server, and what becomes of its snapshots."""

    def setUp(self) -> None:
        super().setUp()
        for name in ('cleanup', 'power_off', 'live_migration',
                     'manage_image_cache'):
            self.patch_name(
                f'nova.virt.libvirt.driver.LibvirtDriver.{name}',
                lambda driver, *what, name=name, **more:
                self.journal.append(name))
        self.patch_name(
            'nova.virt.libvirt.driver.LibvirtDriver.get_host_ip_addr',
            lambda driver: '10.0.0.1')
        self.patch_name(
            'nova_snapshot_ext.domain_snapshot.delete',
            lambda guest, record, records, host: (
                self.journal.append('delete'), records.remove(record.name)))

    def cleanup(self, *arguments: object, **more: object) -> int:
        self.driver.cleanup(
            self.context, self.instance, [], None, *arguments, **more)
        self.assertEqual(['cleanup'], self.journal)
        return len(self.records.all())

    def test_records_go_with_the_disks(self) -> None:
        self.assertEqual(0, self.cleanup())

    def test_libvirt_knows_none_when_the_domain_is_undefined(self) -> None:
        domain = self.nova_host.domain
        domain.snapshots = {self.record.name: '', 'theirs': ''}
        self.patch_name(
            'nova.virt.libvirt.driver.LibvirtDriver.cleanup',
            lambda *what, **more: self.journal.append(
                f'cleanup {list(domain.snapshots)}'))
        for error in (None, libvirt.VIR_ERR_NO_DOMAIN,
                      libvirt.VIR_ERR_OPERATION_FAILED):
            if error is not None:
                domain.errors['snapshotListNames'] = (
                    fakes.libvirt_error(error))
            self.driver.cleanup(self.context, self.instance, [], None)
        self.nova_host.domain = None
        self.driver.cleanup(self.context, self.instance, [], None)
        self.assertEqual(["cleanup ['theirs']"] * 4,
                         self.journal.of('cleanup'))

    def test_records_stay_with_the_disks(self) -> None:
        self.assertEqual(1, self.cleanup(
            False, destroy_vifs=False, destroy_secrets=False))

    def migrate(self, dest: str, error: Exception | None = None) -> None:
        """As Nova does it: what it refuses, it refuses before the guest is
        turned off."""
        def move(driver: typing.Any, context: object,
                 instance: objects.Instance, *what: object) -> None:
            if error is not None:
                raise error
            driver.power_off(instance, 60, retry_interval=10)
            self.journal.append('copy')
        self.patch_name('nova.virt.libvirt.driver.LibvirtDriver.'
                        'migrate_disk_and_power_off', move)
        self.driver.migrate_disk_and_power_off(
            self.context, self.instance, dest, None, [], None, 60, 10)

    def test_snapshots_are_deleted_before_the_disk_is_copied(self) -> None:
        self.migrate('10.0.0.2')
        self.assertEqual(['delete', 'power_off', 'copy'], self.journal)
        self.assertEqual([], self.records.all())

    def test_migration_that_nova_refuses_keeps_them(self) -> None:
        self.assertRaises(
            nova_exception.InstanceFaultRollback, self.migrate, '10.0.0.2',
            nova_exception.InstanceFaultRollback())
        self.driver.power_off(self.instance)
        self.assertEqual(['power_off'], self.journal)
        self.assertEqual([self.record], self.records.all())

    def test_resize_on_the_same_host_keeps_them(self) -> None:
        self.migrate('10.0.0.1')
        self.assertEqual(['power_off', 'copy'], self.journal)

    def test_nova_turns_it_off_when_it_has_refused_what_it_refuses(
            self) -> None:
        source = inspect.getsource(
            libvirt_driver.LibvirtDriver.migrate_disk_and_power_off)
        before, _, after = source.partition('self.power_off(instance')
        self.assertIn('InstanceFaultRollback', before)
        self.assertNotIn('InstanceFaultRollback', after)
        self.assertIn('copy_image', after)

    def test_snapshots_are_deleted_before_a_live_migration(self) -> None:
        self.driver.live_migration(
            self.context, self.instance, 'compute-2', None, None,
            block_migration=True)
        self.assertEqual(['delete', 'live_migration'], self.journal)

    def test_image_cache_is_where_lost_images_are_looked_for(self) -> None:
        self.patch_name('nova_snapshot_ext.reconcile.glance', lambda: None)
        self.patch_name('nova_snapshot_ext.images.presence.is_shown',
                        lambda glance, image_id: False)
        self.instance.task_state = None
        now = [0.0]
        self.patch_name('time.monotonic', lambda: now[0])
        for now[0] in (0.0, 3600.0):
            self.driver.manage_image_cache(self.context, [])
        self.assertEqual(['manage_image_cache'] * 2 + ['delete'],
                         self.journal)

    def test_no_disk_is_written_to_while_nova_starts_the_guests(self) -> None:
        self.patch_name(
            'nova.virt.libvirt.driver.LibvirtDriver.'
            'process_instances_at_startup',
            lambda driver, context, instances: instances)
        self.patch_name(
            'nova_snapshot_ext.upkeep.Upkeep.delete_all_unwanted',
            lambda upkeep, context: self.journal.append('look'))
        self.patch_name('threading.Thread.start', threading.Thread.run)
        self.driver.process_instances_at_startup(self.context, [])
        self.assertEqual([], self.journal)


class TestRemembering(RebuildTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.instance = servers.new_server(
            task_state=task_states.IMAGE_SNAPSHOT,
            power_state=1, progress=0)
        self.shown: list[str] = []
        self.patch_name(
            'nova_snapshot_ext.upkeep.remembered',
            lambda image_id: (self.shown.append(image_id),
                              {'image_shown': True})[1])
        self.patch_name(
            'nova_snapshot_ext.upkeep.Upkeep.delete_unwanted',
            lambda upkeep, instance: self.journal.append('make room'))

    def test_domain_snapshot_keeps_what_the_server_was(self) -> None:
        self.config(flows=['domain', 'live'], group='snapshot_ext')
        self.snapshot()
        kept = self.taken[0]['request'].domain
        self.assertEqual(
            {**rebuilding.remembered(self.instance), 'image_shown': True},
            kept.extra)
        self.assertEqual(['make room'], self.journal)

    def test_other_snapshots_ask_nothing(self) -> None:
        self.config(flows=['live'], group='snapshot_ext')
        self.snapshot()
        self.assertEqual({}, self.taken[0]['request'].domain.extra)
        self.assertEqual(([], []), (self.journal, self.shown))
