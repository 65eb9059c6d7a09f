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

"""What makes up for an older Nova, with each release that is installed.

TestStart rests on the manager of the installed one; the rest gives it, and
takes from it, what another release has.
"""

import types
import typing
from unittest import mock

from keystoneauth1 import noauth
from keystoneauth1 import token_endpoint
from nova.compute import manager as managers
import nova.conf
from nova import context as nova_context
from nova import objects
from nova import service_auth
from nova import utils as nova_utils
from nova.virt.libvirt import driver as libvirt_driver
from oslo_utils.fixture import uuidsentinel as uuids

from nova_snapshot_ext import driver
from nova_snapshot_ext import nova_compat
from tests import fake_glance
from tests.unit import base
from tests.unit import nova_config

objects.register_all()


class CompatTestCase(base.TestCase):

    def give(self, where: typing.Any, name: str, value: object) -> None:
        """Have Nova know a name, whether it does or not."""
        patcher = mock.patch.object(where, name, value, create=True)
        patcher.start()
        self.addCleanup(patcher.stop)

    def take(self, where: typing.Any, name: str) -> None:
        """Have it not know one."""
        if hasattr(where, name):
            self.give(where, name, None)
            delattr(where, name)


class TestThreads(CompatTestCase):

    def test_nova_wraps_a_function(self) -> None:
        self.give(nova_utils, 'tpool_wrap', lambda target: ('wrapped', target))
        self.assertEqual(('wrapped', len), nova_compat.in_thread(len))

    def test_nova_runs_a_function(self) -> None:
        self.take(nova_utils, 'tpool_wrap')
        self.give(nova_utils, 'concurrency_mode_threading', lambda: False)
        self.give(nova_utils, 'tpool_execute',
                  lambda function, *arguments: ('run', function(*arguments)))
        self.assertEqual(('run', 3), nova_compat.in_thread(len)('abc'))

    def test_threads_need_nothing(self) -> None:
        self.take(nova_utils, 'tpool_wrap')
        self.give(nova_utils, 'concurrency_mode_threading', lambda: True)
        self.assertIs(len, nova_compat.in_thread(len))


class TestRights(CompatTestCase):

    def test_newer_name_of_the_auth_plugin(self) -> None:
        self.give(service_auth, 'get_service_user_token_auth_plugin',
                  lambda context: ('newer', context))
        self.assertEqual(('newer', 7), nova_compat.request_auth(7))

    def test_older_name_of_the_auth_plugin(self) -> None:
        self.take(service_auth, 'get_service_user_token_auth_plugin')
        self.give(service_auth, 'get_auth_plugin',
                  lambda context: ('older', context))
        self.assertEqual(('older', 7), nova_compat.request_auth(7))

    def test_request_has_rights_by_the_installed_nova(self) -> None:
        nova_config.use(self)
        context = nova_context.RequestContext(
            user_id='u', project_id='p', auth_token='token')
        self.assertEqual(
            'token', nova_compat.request_auth(context).get_token(None))

    def test_nova_takes_an_auth_plugin(self) -> None:
        def adapter(service: str, admin: bool, ksa_auth: object) -> object:
            return service, admin, ksa_auth
        self.give(nova_utils, 'get_sdk_adapter', adapter)
        self.assertEqual(('image', False, 'auth'),
                         nova_compat.image_proxy('auth'))

    def test_nova_would_pass_an_auth_plugin_on(self) -> None:
        def adapter(service: str, admin: bool, **others: object) -> object:
            raise AssertionError('it is called')
        self.give(nova_utils, 'get_sdk_adapter', adapter)
        self.give(nova_utils, '_get_auth_and_session',
                  lambda group, ksa_auth: (None, f'{group} of {ksa_auth}'))
        self.give(nova_utils, 'get_ksa_adapter',
                  lambda service, ksa_auth, ksa_session: (
                      types.SimpleNamespace(get_endpoint=lambda: (
                          f'{service} by {ksa_session}'))))
        made = self.connections()
        self.assertEqual('proxy', nova_compat.image_proxy('auth'))
        self.assertEqual([{
            'session': 'glance of auth', 'oslo_conf': nova.conf.CONF,
            'service_types': {'image'},
            'image': 'image by glance of auth'}], made)

    def test_proxy_has_rights_by_the_installed_nova(self) -> None:
        nova_config.use(self)
        made = self.connections()
        auth = noauth.NoAuth(endpoint='http://glance')
        self.assertEqual('proxy', nova_compat.image_proxy(auth))
        self.assertIs(auth, made[0]['session'].auth)
        self.assertEqual({'image'}, made[0]['service_types'])
        self.assertIs(nova.conf.CONF, made[0]['oslo_conf'])

    def connections(self) -> list[dict[str, typing.Any]]:
        """What openstacksdk's are made of, and which endpoints they get."""
        made: list[dict[str, typing.Any]] = []

        def connect(**options: typing.Any) -> object:
            made.append(options)
            return types.SimpleNamespace(
                image='proxy', config=types.SimpleNamespace(
                    get_endpoint=options.get,
                    set_service_value=lambda key, service, value: (
                        options.update({service: value}))))
        self.patch_name('openstack.connection.Connection', connect)
        return made


class TestImageService(CompatTestCase):
    """The installed Nova and openstacksdk find an image service."""

    def setUp(self) -> None:
        super().setUp()
        self.config = nova_config.use(self)
        self.server = fake_glance.served(self)
        self.server.add()
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def assert_found(self, catalog: str) -> None:
        """A request finds an image.

        :param catalog: the endpoint in its catalog
        """
        proxy = driver._glance(nova_context.RequestContext(
            user_id='u', project_id='p', auth_token='token',
            service_catalog=[{
                'type': 'image', 'name': 'glance', 'endpoints': [{
                    'region': 'here', 'publicURL': catalog}]}]))
        self.assertEqual(
            'queued', proxy.get_image(fake_glance.IMAGE).status)

    def test_by_a_request(self) -> None:
        self.assert_found(self.url)

    def test_by_a_request_with_the_token_of_a_service(self) -> None:
        self.give(service_auth, '_AUTHS', {
            'service_user': token_endpoint.Token('http://none', 'theirs')})
        self.give(service_auth, '_SERVICE_AUTH',
                  token_endpoint.Token('http://none', 'theirs'))
        self.config(send_service_user_token=True, group='service_user')
        self.assert_found(self.url)

    def test_by_an_endpoint_with_version(self) -> None:
        self.assert_found(f'{self.url}/v2')

    def test_where_it_is_set(self) -> None:
        self.config(endpoint_override=self.url, group='glance')
        self.assert_found('http://127.0.0.1:1')

    def test_by_rights_of_our_own(self) -> None:
        proxy = nova_compat.image_proxy(
            token_endpoint.Token(f'{self.url}/v2', 'ours'))
        self.assertEqual(
            'queued', proxy.get_image(fake_glance.IMAGE).status)


class Manager(managers.ComputeManager):     # type: ignore[misc]
    """Nova's, as far as it starts a driver; the rest is a list of calls."""

    def __init__(self, calls: list[typing.Any],
                 evacuated: dict[str, object]) -> None:
        self.calls = calls
        self.evacuated = evacuated
        self.host = 'compute-1'
        self.reportclient = None
        self.virtapi = managers.ComputeVirtAPI(self)
        self.driver: typing.Any = None

    def __getattribute__(self, name: str) -> typing.Any:
        if name in ('_ensure_existing_node_identity', 'init_virt_events',
                    '_validate_pinning_configuration',
                    '_validate_vtpm_configuration',
                    '_error_out_instances_whose_build_was_interrupted',
                    '_update_scheduler_instance_info'):
            return lambda *arguments: None
        return super().__getattribute__(name)

    def _get_nodes(self, context: object) -> dict[str, object]:
        return {}

    def _check_for_host_rename(self, nodes: object) -> None:
        self.calls.append('host is checked')

    def _destroy_evacuated_instances(
            self, context: object, nodes: object) -> dict[str, object]:
        self.calls.append('evacuated are removed')
        return self.evacuated

    def _init_instance(self, context: object,
                       instance: objects.Instance) -> None:
        self.calls.append(('init', instance.uuid))


class TestStart(CompatTestCase):

    def setUp(self) -> None:
        super().setUp()
        nova_config.use(self)
        self.calls: list[typing.Any] = []
        self.known = [objects.Instance(uuid=uuid, host='compute-1')
                      for uuid in (uuids.here, uuids.gone)]

        def get_by_host(kind: object, context: object, host: str,
                        expected_attrs: list[str]) -> objects.InstanceList:
            self.assertEqual('compute-1', host)
            return objects.InstanceList(objects=list(self.known))

        def process(ours: object, context: object,
                    instances: typing.Any) -> typing.Any:
            self.calls.append(
                ('process', *[instance.uuid for instance in instances]))
            return instances

        self.give(objects.InstanceList, 'get_by_host',
                  classmethod(get_by_host))
        self.give(libvirt_driver.LibvirtDriver, 'init_host',
                  lambda ours, host: self.calls.append('driver begins'))
        self.give(driver.SnapshotLibvirtDriver,
                  'process_instances_at_startup', process)
        self.patch_name('nova_snapshot_ext.checks.say_at_start',
                        lambda conf: None)
        self.patch_name('nova_snapshot_ext.driver._check_configuration',
                        lambda: None)

    def new_manager(self, driver_class: typing.Any,
                    evacuated: dict[str, object]) -> Manager:
        manager = Manager(self.calls, evacuated)
        manager.driver = driver_class.__new__(driver_class)
        manager.driver.virtapi = manager.virtapi
        manager.driver.capabilities = {'supports_evacuate': True}
        return manager

    def test_instances_are_processed_between_evacuated_and_others(
            self) -> None:
        self.new_manager(driver.SnapshotLibvirtDriver, {
            uuids.gone: 'a migration'}).init_host(service_ref=object())
        self.assertEqual([
            'driver begins', 'host is checked', 'evacuated are removed',
            ('process', uuids.here), ('init', uuids.here)], self.calls)

    def test_it_is_done_without_any_instance(self) -> None:
        self.known = []
        self.new_manager(driver.SnapshotLibvirtDriver,
                         {}).init_host(service_ref=object())
        self.assertIn(('process',), self.calls)


class TestOlderStart(CompatTestCase):
    """The older driver, whichever Nova there is."""

    def setUp(self) -> None:
        super().setUp()
        self.give(libvirt_driver.LibvirtDriver, 'init_host',
                  lambda ours, host: None)
        self.driver = nova_compat._OlderLibvirtDriver.__new__(
            nova_compat._OlderLibvirtDriver)
        self.instances = [objects.Instance(uuid=uuid)
                          for uuid in (uuids.here, uuids.gone)]
        self.asked: list[typing.Any] = []

        def get_by_host(kind: object, context: object, host: str,
                        expected_attrs: list[str]) -> objects.InstanceList:
            self.asked.append((context, host, *expected_attrs))
            return objects.InstanceList(objects=self.instances)

        self.give(objects.InstanceList, 'get_by_host',
                  classmethod(get_by_host))

    def test_what_the_manager_removes_is_not_processed(self) -> None:
        evacuated = {uuids.gone: 'a migration'}
        manager = types.SimpleNamespace(
            host='compute-1', _destroy_evacuated_instances=(
                lambda context, nodes: (context, nodes, evacuated)[-1]))
        self.driver.virtapi = types.SimpleNamespace(_compute=manager)
        processed: list[tuple[object, list[objects.Instance]]] = []
        self.give(nova_compat._OlderLibvirtDriver,
                  'process_instances_at_startup',
                  lambda ours, context, instances: processed.append(
                      (context, instances)))
        self.driver.init_host('compute-1')
        self.assertEqual([], processed)
        self.assertIs(evacuated, manager._destroy_evacuated_instances(
            'context', 'nodes'))
        self.assertEqual([('context', [self.instances[0]])], processed)
        self.assertEqual([('context', 'compute-1', 'info_cache', 'metadata',
                           'system_metadata', 'numa_topology', 'flavor')],
                         self.asked)

    def test_nothing_is_processed_if_the_manager_fails(self) -> None:
        def fail(context: object, nodes: object) -> None:
            raise RuntimeError('no database')
        manager = types.SimpleNamespace(
            host='compute-1', _destroy_evacuated_instances=fail)
        self.driver.virtapi = types.SimpleNamespace(_compute=manager)
        self.driver.init_host('compute-1')
        self.assertRaises(RuntimeError, manager._destroy_evacuated_instances,
                          'context', 'nodes')
        self.assertEqual([], self.asked)

    def test_nova_without_such_a_manager_is_named(self) -> None:
        self.driver.virtapi = types.SimpleNamespace()
        self.driver.init_host('compute-1')
        self.assertIn("is not undone: this Nova does not say when it may be",
                      self.output.output)
        self.assertIn('_compute', self.output.output)

    def test_instances_go_on_as_they_are(self) -> None:
        self.assertIs(self.instances,
                      self.driver.process_instances_at_startup(
                          'context', self.instances))
