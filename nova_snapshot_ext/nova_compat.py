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

"""Where the releases of Nova that are served differ, and what makes up for it.

Whoever calls this asks for what the newest release has, and never which one
is installed. What an older one has instead is looked for, not told from its
version: distributions take over what they need.
"""

import collections.abc
import functools
import inspect
import typing

from nova import context as nova_context
from nova import objects
from nova import service_auth
from nova import utils as nova_utils
from nova.virt.libvirt import driver as libvirt_driver
from openstack import connection
from oslo_log import log as logging

LOG = logging.getLogger(__name__)

_Function = collections.abc.Callable[..., typing.Any]

# What Nova's manager has loaded of the instances that it hands to the driver.
_EXPECTED = ('info_cache', 'metadata', 'system_metadata', 'numa_topology',
             'flavor')


def called() -> dict[str, tuple[int, tuple[str, ...]]]:
    """What of the installed Nova is called here, as nova_interface lists the
    rest."""
    found: dict[str, tuple[int, tuple[str, ...]]] = {}
    if _wraps():
        found['nova.utils:tpool_wrap'] = (1, ())
    else:
        found['nova.utils:concurrency_mode_threading'] = (0, ())
        found['nova.utils:tpool_execute'] = (2, ())
    if _tells_tokens_apart():
        found['nova.service_auth:get_service_user_token_auth_plugin'] = (1, ())
    else:
        found['nova.service_auth:get_auth_plugin'] = (1, ())
    if _takes_auth():
        found['nova.utils:get_sdk_adapter'] = (1, ('admin', 'ksa_auth'))
    else:
        found['nova.utils:_get_auth_and_session'] = (1, ('ksa_auth',))
        found['nova.utils:get_ksa_adapter'] = (
            1, ('ksa_auth', 'ksa_session'))
    if not _processes_at_startup():
        found['nova.compute.manager:'
              'ComputeManager._destroy_evacuated_instances'] = (3, ())
        found['nova.objects.instance:InstanceList.get_by_host'] = (
            3, ('expected_attrs',))
    return found


def _wraps() -> bool:
    """From 33 on."""
    return hasattr(nova_utils, 'tpool_wrap')


def _tells_tokens_apart() -> bool:
    """From 33 on."""
    return hasattr(service_auth, 'get_service_user_token_auth_plugin')


def _takes_auth() -> bool:
    """From 34 on. What older ones do not know they pass on."""
    return 'ksa_auth' in inspect.signature(
        nova_utils.get_sdk_adapter).parameters


def _processes_at_startup() -> bool:
    """From 34 on."""
    return hasattr(libvirt_driver.LibvirtDriver,
                   'process_instances_at_startup')


def in_thread(function: _Function) -> _Function:
    """Make a function one that does not hold up other greenlets."""
    if _wraps():
        wrapped: _Function = nova_utils.tpool_wrap(function)
        return wrapped
    if nova_utils.concurrency_mode_threading():
        return function
    return functools.partial(nova_utils.tpool_execute, function)


def request_auth(context: nova_context.RequestContext) -> typing.Any:
    """The auth plugin of a request, as [service_user] has it."""
    if _tells_tokens_apart():
        return service_auth.get_service_user_token_auth_plugin(context)
    return service_auth.get_auth_plugin(context)


def image_proxy(auth: typing.Any) -> typing.Any:
    """openstacksdk's image proxy, with the rights of an auth plugin.

    [glance] says how it is reached.
    """
    if _takes_auth():
        return nova_utils.get_sdk_adapter('image', admin=False, ksa_auth=auth)
    # What that does in the releases that have it.
    _, session = nova_utils._get_auth_and_session('glance', ksa_auth=auth)
    made = connection.Connection(
        session=session, oslo_conf=nova_utils.CONF, service_types={'image'})
    if not made.config.get_endpoint('image'):
        # openstacksdk asks the auth plugin which versions there are. A
        # request's tells it from 34 on, as keystoneauth1's, which sends a
        # service's token beside it, does in 34's time. Those before know the
        # catalog's endpoint and nothing else.
        made.config.set_service_value(
            'endpoint_override', 'image', nova_utils.get_ksa_adapter(
                'image', ksa_auth=auth, ksa_session=session).get_endpoint())
    return made.image


class _OlderLibvirtDriver(
        libvirt_driver.LibvirtDriver):  # type: ignore[misc]
    """Nova's, of a release whose manager has the driver process no instances
    when it starts.

    Between the removal of evacuated instances and the initialisation of the
    others it calls nothing of the driver that it is sure to call. But it
    removes them by one method, also where there are none, which tells what
    they were. So processing is made the end of that.
    """

    def init_host(self, host: str) -> None:
        super().init_host(host)
        try:
            manager = self.virtapi._compute
            destroy = manager._destroy_evacuated_instances
        except AttributeError as error:
            LOG.error('What an earlier nova-compute left of its snapshots is '
                      'not undone: this Nova does not say when it may be: %s',
                      error)
            return

        def destroy_and_process(
                context: nova_context.RequestContext,
                *arguments: typing.Any) -> typing.Any:
            evacuated = destroy(context, *arguments)
            # Objects of their own: the manager has loaded its own before.
            # Of task states that are cleared in these, it would do nothing.
            instances = objects.InstanceList.get_by_host(
                context, manager.host, expected_attrs=list(_EXPECTED))
            self.process_instances_at_startup(
                context, [instance for instance in instances
                          if instance.uuid not in evacuated])
            return evacuated

        manager._destroy_evacuated_instances = destroy_and_process

    def process_instances_at_startup(
            self, context: nova_context.RequestContext,
            instances: typing.Any) -> typing.Any:
        """Once, before any instance is initialised.

        :param instances: of this host, without those that were evacuated
        """
        return instances


#: Nova's libvirt driver, as the newest release has it
LibvirtDriver: typing.Any = (
    libvirt_driver.LibvirtDriver if _processes_at_startup()
    else _OlderLibvirtDriver)
