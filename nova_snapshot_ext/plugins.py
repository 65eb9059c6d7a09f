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

"""Where flows, transfers and image services are found: stevedore."""

import collections.abc
import typing

from oslo_log import log as logging
import stevedore
from stevedore import exception as stevedore_exception

from nova_snapshot_ext import exception

LOG = logging.getLogger(__name__)

FLOWS = 'nova_snapshot_ext.flows'
TRANSFERS = 'nova_snapshot_ext.transfers'
IMAGE_SERVICES = 'nova_snapshot_ext.image_services'


def names(namespace: str) -> list[str]:
    """The names of all that is installed."""
    return sorted(stevedore.ExtensionManager(
        namespace, invoke_on_load=False,
        on_load_failure_callback=_fail).names())


def load(namespace: str, name: str, setting: str) -> typing.Any:
    """The class that a name stands for.

    :param setting: where the name was given, for the message
    :raises InvalidSetting: if no plugin has that name, or it can't be loaded
    """
    try:
        return stevedore.DriverManager(namespace, name).driver
    except stevedore_exception.NoMatches as error:
        raise exception.InvalidSetting(
            setting, name,
            f'installed are {", ".join(names(namespace))}') from error
    except ImportError as error:
        raise exception.InvalidSetting(
            setting, name, f'it can not be loaded: {error}') from error


def unknown(group: typing.Any,
            ) -> collections.abc.Iterator[exception.InvalidSetting]:
    """What is wrong with the names in [snapshot_ext].

    :param group: its options
    """
    for namespace, option, given in (
            (FLOWS, 'flows', group.flows),
            (FLOWS, 'request_flows', group.request_flows),
            (TRANSFERS, 'transfers', group.transfers),
            (IMAGE_SERVICES, 'image_service', [group.image_service])):
        for name in given:
            try:
                load(namespace, name, f'[snapshot_ext] {option}')
            except exception.InvalidSetting as error:
                yield error


def load_all() -> None:
    """Import every plugin, so that the undo steps of all are known.

    One that can't be loaded must not keep those of the others from running.
    """
    for namespace in (FLOWS, TRANSFERS, IMAGE_SERVICES):
        stevedore.ExtensionManager(
            namespace, on_load_failure_callback=_log)


def _log(manager: object, entry_point: typing.Any, error: Exception) -> None:
    LOG.error('The plugin %s can not be loaded: %s', entry_point.name, error)


def _fail(manager: object, entry_point: typing.Any,
          error: Exception) -> None:
    raise exception.InvalidSetting(
        'entry point', entry_point.name,
        f'it can not be loaded: {error}') from error
