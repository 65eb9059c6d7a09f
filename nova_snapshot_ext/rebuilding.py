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

"""What Nova says of a server whose disk goes back to an earlier instant.

Calls Nova, as driver.py does. Nova's API has made the snapshot's image the
server's own by the time that the driver is asked to rebuild it. Where the disk
is rolled back, that is wrong: it has the backing file that it had before,
which Nova fetches by ``image_ref`` where it is missing. So what the API
changed is kept with each snapshot, and put back.
"""

import collections.abc
import contextlib
import typing

from nova.compute import task_states
from nova.compute import vm_states
import nova.conf
from nova import context as nova_context
from nova import exception as nova_exception
from nova import objects
from nova import utils as nova_utils
from oslo_log import log as logging

from nova_snapshot_ext import domain_records
from nova_snapshot_ext import exception
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext import rollback

LOG = logging.getLogger(__name__)
CONF = nova.conf.CONF

#: the event of a server's action that says how its rollback ended
EVENT = 'snapshot_ext_rollback'

_INSTANCE = 'instance'
_IMAGE_METADATA = 'image_metadata'
_FLAVOR = 'flavor'
# What the API takes from the new image (compute/api.py, rebuild()).
_OF_IMAGE = ('image_ref', 'kernel_id', 'ramdisk_id', 'os_type',
             'architecture', 'vm_mode', 'auto_disk_config')
_OF_FLAVOR = ('flavorid', 'vcpus', 'memory_mb', 'root_gb', 'ephemeral_gb',
              'swap')


def remembered(instance: objects.Instance) -> dict[str, typing.Any]:
    """What is kept of a server with a snapshot of it; of JSON's types."""
    return {
        _INSTANCE: {name: getattr(instance, name) for name in _OF_IMAGE},
        _IMAGE_METADATA: _image_metadata(instance),
        _FLAVOR: _sizes(instance),
    }


def is_of_server(record: domain_records.Record) -> bool:
    """Whether Nova asked for a snapshot."""
    return _INSTANCE in record.extra


def record_of(context: nova_context.RequestContext,
              instance: objects.Instance, records: domain_records.Records,
              ) -> domain_records.Record | None:
    """The snapshot of an instance that its new image was made of.

    :raises nova.exception.InstanceFaultRollback: if that is not known: Nova
        would delete the disk, with a snapshot that may be asked for
    """
    try:
        known = records.all()
    except (exception.SnapshotError, OSError) as error:
        LOG.error('Whether it is to be rolled back is not known, and it is '
                  'left as it was: %s', error, instance=instance)
        # Any of its snapshots knows the image that its disk is made of.
        for record in filter(is_of_server, records.readable()):
            put_back(context, instance, record)
            break
        raise _left_as_it_was(instance, error) from error
    return next((record for record in known
                 if record.image_id == instance.image_ref
                 and is_of_server(record)), None)


def roll_back(
        context: nova_context.RequestContext, instance: objects.Instance,
        guest: guests.Guest, record: domain_records.Record,
        records: domain_records.Records, host: hosts.Host,
        block_device_info: dict[str, typing.Any] | None,
        plug: collections.abc.Callable[[], None],
        power_on: collections.abc.Callable[[], None]) -> None:
    """Have a server that is rebuilt go back to a snapshot, and be up.

    Nova itself stops it again if it was stopped.

    :param plug: plugs its networks
    :param power_on: starts it as Nova does
    :raises nova.exception.InstanceFaultRollback: if it can't; it is as it was
    :raises nova.exception.NovaException: if it is not as it was, or not up
    """
    # Its disk stays what it is, whatever comes now.
    put_back(context, instance, record)
    with refusing(context, instance, record):
        why = _why_not(instance, record, block_device_info)
        if why is not None:
            raise exception.RollbackRefused(why)
        instance.task_state = task_states.REBUILD_SPAWNING
        instance.save(expected_task_state=[task_states.REBUILDING])
        plug()
        result = rollback.revert(guest, record, records, host,
                                 CONF.snapshot_ext.freeze_timeout)
    LOG.info('Rolled back to the snapshot of image %(image)s (%(what)s); its '
             'guest did not run for %(pause).2f s',
             {'image': record.image_id, 'what': result.rollback.value,
              'pause': result.guest_pause_s}, instance=instance)
    with _failing(instance):
        state = guest.state()
        if state is guests.State.PAUSED:
            guest.resume()
        elif (state is guests.State.SHUTOFF
                and instance.vm_state != vm_states.STOPPED):
            power_on()


@contextlib.contextmanager
def refusing(context: nova_context.RequestContext,
             instance: objects.Instance, record: domain_records.Record,
             ) -> collections.abc.Iterator[None]:
    """Our errors, and Nova's, as what leaves a server as it was."""
    with _failing(instance):
        try:
            yield
        except (exception.UndoFailed, exception.StartedByAnother,
                nova_exception.InstanceNotFound):
            raise       # it is not as it was
        except (exception.SnapshotError, OSError,
                nova_exception.NovaException) as error:
            if _is_going(instance):
                raise nova_exception.InstanceNotFound(
                    instance_id=instance.uuid) from error
            put_back(context, instance, record)
            LOG.warning('It is not rolled back, and left as it was: %s',
                        error, instance=instance)
            raise _left_as_it_was(instance, error) from error


def _left_as_it_was(instance: objects.Instance, error: Exception,
                    ) -> nova_exception.InstanceFaultRollback:
    """As Nova says that a rebuild can't be: no fault of the service."""
    return nova_exception.InstanceFaultRollback(
        nova_exception.BuildAbortException(
            instance_uuid=instance.uuid, reason=str(error)))


@contextlib.contextmanager
def _failing(
        instance: objects.Instance) -> collections.abc.Iterator[None]:
    """Our errors as what Nova takes for the server's own."""
    try:
        yield
    except (exception.SnapshotError, OSError) as error:
        LOG.error('Its rollback failed: %s', error, instance=instance)
        raise nova_exception.NovaException(str(error)) from error


def _is_going(instance: objects.Instance) -> bool:
    """Whether a server is being deleted, or was."""
    try:
        return objects.Instance.get_by_uuid(
            nova_context.get_admin_context(), instance.uuid,
            expected_attrs=[]).task_state in (
                task_states.DELETING, task_states.SOFT_DELETING)
    except nova_exception.InstanceNotFound:
        return True


def put_back(context: nova_context.RequestContext,
             instance: objects.Instance,
             record: domain_records.Record) -> None:
    """Have a server be of the image again that its disk is made of.

    Doing it twice does no harm. What else a rebuild may have changed (its
    key, user data, host name, …) stays as the request had it.

    :raises nova.exception.InstanceNotFound: if it was deleted
    """
    for name in _OF_IMAGE:
        setattr(instance, name, record.extra[_INSTANCE][name])
    for name in _image_metadata(instance):
        del instance.system_metadata[name]
    instance.system_metadata.update(record.extra[_IMAGE_METADATA])
    instance.save()
    _put_back_request(context, instance)


def _put_back_request(context: nova_context.RequestContext,
                      instance: objects.Instance) -> None:
    """The same for what the scheduler is asked for when it is moved.

    That is in the API's database, which the conductor of a cell need not
    reach.
    """
    try:
        spec = objects.RequestSpec.get_by_instance_uuid(
            context, instance.uuid)
        spec.image = instance.image_meta
        spec.save()
    except Exception as error:
        LOG.warning('The scheduler goes on to take image %s for its own until '
                    'it is rebuilt again: %s', instance.image_ref, error,
                    instance=instance)


def _why_not(
        instance: objects.Instance, record: domain_records.Record,
        block_device_info: dict[str, typing.Any] | None) -> str | None:
    """What Nova knows that keeps a server from being rolled back, or None."""
    volumes = (block_device_info or {}).get('block_device_mapping')
    if volumes:
        names = ', '.join(str(volume.get('mount_device'))
                          for volume in volumes)
        return (f'volumes are attached ({names}), which would not go back '
                f'with it; detach them first')
    before, now = record.extra[_FLAVOR], _sizes(instance)
    if before != now and (
            record.rollback is domain_records.Rollback.MEMORY):
        changed = ', '.join(f'{name} was {before.get(name)} and is {value}'
                            for name, value in now.items()
                            if value != before.get(name))
        return f'its flavor is another one: {changed}'
    return None


def _image_metadata(instance: objects.Instance) -> dict[str, typing.Any]:
    return {name: value for name, value in instance.system_metadata.items()
            if name.startswith(nova_utils.SM_IMAGE_PROP_PREFIX)}


def _sizes(instance: objects.Instance) -> dict[str, typing.Any]:
    return {name: getattr(instance.flavor, name) for name in _OF_FLAVOR}
