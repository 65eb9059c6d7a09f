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

"""Domain snapshots that nobody can want any more are deleted.

Calls Nova, as driver.py does. A snapshot goes when Glance says that its image
is gone, and when its server moves to another host: Nova copies disks with all
that is in them, and nothing there would know of it. Records alone go with the
server, and with its disk.
"""

import collections.abc
import time
import typing

from nova.compute import vm_states
import nova.conf
from nova import context as nova_context
from nova import exception as nova_exception
from nova import objects
from oslo_log import log as logging

from nova_snapshot_ext import domain_records
from nova_snapshot_ext import domain_snapshot
from nova_snapshot_ext import exception
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext.images import presence
from nova_snapshot_ext import internal_snapshot
from nova_snapshot_ext import rebuilding
from nova_snapshot_ext import reconcile

LOG = logging.getLogger(__name__)
CONF = nova.conf.CONF

_SHOWN = 'image_shown'
# For so long Glance has to say that an image is gone before it is believed of
# all servers: it may be another Glance, or have an old database, by mistake.
_MISSING_S = 3600.0


def remembered(image_id: str) -> dict[str, typing.Any]:
    """What is kept with a snapshot for later, when its image may be gone.

    Glance says the same of an image that is gone and of one that our own
    credentials may not see. They can tell if they see it now.
    """
    try:
        shown = presence.is_shown(reconcile.glance(), image_id)
    except exception.ImageServiceError as error:
        LOG.debug('Whether image %s is shown: %s', image_id, error)
        shown = False
    if not shown:
        LOG.warning('[%s] is not shown image %s: when it is deleted, its '
                    'domain snapshot stays in the disk until the server is '
                    'deleted', CONF.snapshot_ext.dead_image_auth, image_id)
    return {_SHOWN: shown}


class Upkeep:
    """The domain snapshots of this host's servers."""

    def __init__(
            self, state_directory: str,
            guest_of: collections.abc.Callable[
                [objects.Instance], guests.Guest],
            host_of: collections.abc.Callable[
                [objects.Instance], hosts.Host]) -> None:
        """:param guest_of: raises InstanceNotRunning if it has no domain"""
        self._state_directory = state_directory
        self._guest_of = guest_of
        self._host_of = host_of
        #: by name of a snapshot: when its image was first found missing
        self._missing_since: dict[str, float] = {}

    def forget(self, uuid: str) -> None:
        """Drop the records of a server whose disk is gone, or another one."""
        try:
            self._records(uuid).forget()
        except OSError as error:
            LOG.warning('Records of its domain snapshots stay: %s', error,
                        instance_uuid=uuid)

    def let_undefine(self, instance: objects.Instance) -> None:
        """Have libvirt know no snapshot of a server that goes: what a
        rollback that was cut off left would keep Nova from undefining it."""
        try:
            guest = self._guest_of(instance)
            for name in filter(internal_snapshot.is_ours,
                               guest.domain_snapshots()):
                guest.forget_domain_snapshot(name)
        except (exception.GuestGone, nova_exception.InstanceNotRunning):
            pass
        except exception.SnapshotError as error:
            LOG.warning('libvirt may know snapshots of it, and refuse to '
                        'undefine it: %s', error, instance=instance)

    def delete_all(self, instance: objects.Instance, why: str) -> None:
        """Delete the snapshots of a server that moves, as far as possible."""
        self._delete(instance, self._known(instance), why)

    def delete_unwanted(self, instance: objects.Instance) -> None:
        """Delete the snapshots of a server whose images are gone.

        At once, for one that is about to have another: Glance has just shown
        the new one's image.
        """
        try:
            self._delete_unwanted(instance, missing_s=0.0)
        except exception.ImageServiceError as error:
            _say_unknown(error)

    def delete_all_unwanted(
            self, context: nova_context.RequestContext) -> None:
        """The same for every server, and see whether it is still here.

        What is missing is deleted when it still is after an hour or more.
        """
        for uuid in domain_records.uuids(self._state_directory):
            try:
                self._see_to(context, uuid)
            except exception.ImageServiceError as error:
                _say_unknown(error)
                return      # nor would it answer for the next one
            except Exception:
                LOG.exception('Its domain snapshots are left as they are',
                              instance_uuid=uuid)

    def _see_to(self, context: nova_context.RequestContext,
                uuid: str) -> None:
        try:
            instance = objects.Instance.get_by_uuid(
                context, uuid, expected_attrs=['flavor'])
        except nova_exception.InstanceNotFound:
            # Or a domain without Nova, whose snapshots others took.
            if any(map(rebuilding.is_of_server, self._records(uuid).all())):
                self.forget(uuid)
            return
        if instance.task_state is not None or (
                instance.vm_state == vm_states.RESIZED):
            return      # its disk may be on its way, or there twice
        if instance.host == CONF.host:
            self._delete_unwanted(instance, _MISSING_S)
        else:
            self.forget(uuid)

    def _delete_unwanted(self, instance: objects.Instance,
                         missing_s: float) -> None:
        """:raises ImageServiceError: if Glance gives no clear answer"""
        known = self._known(instance)
        if known:
            glance = reconcile.glance()
            self._delete(
                instance, [record for record in known
                           if record.extra.get(_SHOWN)
                           and self._missing_for(glance, record) >= missing_s],
                'its image was deleted')

    def _missing_for(self, glance: typing.Any,
                     record: domain_records.Record) -> float:
        """For how many seconds its image has been missing; -1 if it is not.

        A new nova-compute begins to count anew.
        """
        if presence.is_shown(glance, record.image_id):
            self._missing_since.pop(record.name, None)
            return -1.0
        now = time.monotonic()
        return now - self._missing_since.setdefault(record.name, now)

    def _known(self, instance: objects.Instance,
               ) -> list[domain_records.Record]:
        try:
            return self._records(instance.uuid).all()
        except (exception.SnapshotError, OSError) as error:
            LOG.error('Its domain snapshots are left as they are: %s', error,
                      instance=instance)
            return []

    def _delete(self, instance: objects.Instance,
                unwanted: list[domain_records.Record], why: str) -> None:
        """Delete what can be deleted now; the rest is left for later."""
        records = self._records(instance.uuid)
        try:
            # The youngest first: of external ones, nothing descends from it
            # but what the server writes to.
            for record in reversed(unwanted):
                domain_snapshot.delete(
                    self._guest_of(instance), record, records,
                    self._host_of(instance))
                self._missing_since.pop(record.name, None)
                LOG.info('The domain snapshot of image %s is deleted: %s',
                         record.image_id, why, instance=instance)
        except (exception.SnapshotError, OSError,
                nova_exception.InstanceNotRunning) as error:
            LOG.warning('Domain snapshots that nobody wants stay for now: %s',
                        error, instance=instance)

    def _records(self, uuid: str) -> domain_records.Records:
        return domain_records.Records(self._state_directory, uuid)


def _say_unknown(error: exception.ImageServiceError) -> None:
    LOG.warning('Whether domain snapshots have lost their images is not '
                'known, and asked again later: %s', error)
