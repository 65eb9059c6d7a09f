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

"""What of Nova is overridden, called and read, and whether it is there.

Nova promises nothing to drivers outside its tree: what is used of it is
listed once, here, and compared before anything depends on it. Where the
releases that are served differ, nova_compat.py lists it and makes up for it.
"""

import collections.abc
import importlib
import inspect
import shlex
import typing

from nova import objects
# It registers the group of root_helper().
import nova.privsep  # noqa: F401
from nova import version as nova_version

#: [libvirt] virt_type of the guests that are served
VIRT_TYPES = ('kvm', 'qemu')
#: releases that the tests have passed with
TESTED = (32, 33, 34)

_DRIVER = 'nova.virt.libvirt.driver:LibvirtDriver'
_COMPAT = 'nova_snapshot_ext.nova_compat'
_MORE = '*'
#: with all parameters, or with those that count and more, which are passed on
_OVERRIDES = {
    '__init__': ('self', 'virtapi', 'read_only'),
    'cleanup': ('self', 'context', 'instance', 'network_info',
                'block_device_info', 'destroy_disks', _MORE),
    'init_host': ('self', 'host'),
    'live_migration': ('self', 'context', 'instance', _MORE),
    'manage_image_cache': ('self', 'context', 'all_instances'),
    'migrate_disk_and_power_off': (
        'self', 'context', 'instance', 'dest', _MORE),
    'power_off': ('self', 'instance', _MORE),
    'process_instances_at_startup': ('self', 'context', 'instances'),
    'rebuild': ('self', 'context', 'instance', _MORE),
    'snapshot': ('self', 'context', 'instance', 'image_id',
                 'update_task_state'),
}
#: where it is, and what it is called with: numbers of positional arguments,
#: and names of others. A method is called with its object, too.
_CALLED: dict[str, tuple[int, tuple[str, ...]]] = {
    f'{_DRIVER}._create_snapshot_metadata': (5, ()),
    f'{_DRIVER}.get_host_ip_addr': (1, ()),
    f'{_DRIVER}.plug_vifs': (3, ()),
    f'{_DRIVER}.power_on': (5, ()),
    'nova.virt.libvirt.host:Host.get_guest': (2, ()),
    'nova.compute.utils:EventReporter': (4, ()),
    'nova.image.glance:API.get': (3, ()),
    'nova.image.glance:get_api_servers': (1, ()),
    'nova.objects.instance:Instance.get_by_uuid': (3, ('expected_attrs',)),
    'nova.objects.request_spec:RequestSpec.get_by_instance_uuid': (3, ()),
    'nova.notifications.objects.base:EventType': (
        0, ('object', 'action', 'phase')),
    'nova.notifications.objects.base:NotificationBase.emit': (2, ()),
    'nova.notifications.objects.base:NotificationPublisher': (
        0, ('host', 'source')),
}
_READ = (
    'nova.compute.utils:disk_ops_semaphore',
    'nova.notifications.objects.base:NotificationPayloadBase',
    'nova.objects.base:NovaObjectRegistry.register_notification',
    'nova.objects.fields:NotificationAction.SNAPSHOT',
    'nova.privsep:sys_admin_pctxt',
    'nova.utils:SM_IMAGE_PROP_PREFIX',
    'nova.virt.libvirt.guest:Guest',
)


def version() -> int:
    """The major version of the installed Nova."""
    return int(nova_version.version_string().partition('.')[0])


def differences() -> collections.abc.Iterator[str]:
    """What the installed Nova does not have as it is used."""
    # nova-compute has done so by now, and our own command has not.
    objects.register_all()
    for name, parameters in _OVERRIDES.items():
        try:
            found = tuple(inspect.signature(_find(
                f'{_COMPAT}:LibvirtDriver.{name}')).parameters)
        except (ImportError, AttributeError):
            yield f'{_DRIVER}.{name} is missing'
            continue
        if parameters[-1] == _MORE:
            found = (*found[:len(parameters) - 1], _MORE)
        if found != parameters:
            yield f'{_DRIVER}.{name} takes {", ".join(found)}'
    called = _CALLED | importlib.import_module(_COMPAT).called()
    for path, (count, names) in called.items():
        try:
            inspect.signature(_find(path)).bind(
                *[None] * count, **dict.fromkeys(names))
        except (ImportError, AttributeError):
            yield f'{path} is missing'
        except TypeError as error:
            yield f'{path}: {error}'
    for path in _READ:
        try:
            _find(path)
        except (ImportError, AttributeError):
            yield f'{path} is missing'


def _find(path: str) -> typing.Any:
    """:param path: ``MODULE:NAME.NAME``"""
    module, _, names = path.partition(':')
    found: typing.Any = importlib.import_module(module)
    for name in names.split('.'):
        # As it is written, not bound: functions take their object as well.
        found = inspect.getattr_static(found, name)
        if isinstance(found, (classmethod, staticmethod)):
            found = found.__func__
    return found


def root_helper(conf: typing.Any) -> str:
    """The program that starts Nova's privileged helper."""
    command: str = conf.nova_sys_admin.helper_command or 'sudo'
    return shlex.split(command)[0]
