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

"""What a dead nova-compute left beyond its guests: in Nova, and in Glance.

Calls Nova, as driver.py does and, for what root does, privileged.py. A
server's task state is cleared before Nova initialises it. The rest is done by
one thread, again and again while there is no clear answer, for a day; then the
next start of nova-compute goes on with it.
"""

import functools
import threading
import time
import typing

from keystoneauth1 import exceptions as keystone_exceptions
from keystoneauth1 import loading as keystone_loading
from nova.compute import task_states
import nova.conf
from nova import context as nova_context
from nova import exception as nova_exception
from nova import objects
from oslo_log import log as logging

from nova_snapshot_ext import account as accounts
from nova_snapshot_ext import exception
from nova_snapshot_ext.images import dead
from nova_snapshot_ext import in_flight
from nova_snapshot_ext import notification
from nova_snapshot_ext import nova_compat

LOG = logging.getLogger(__name__)
CONF = nova.conf.CONF

#: the event of a server's action that says how its snapshot ended
EVENT = 'snapshot_ext_snapshot'
#: in place of an error's name, where there was nobody left to fail
DIED = 'ComputeDied'

_RETRY_S = 5.0
_LONGEST_RETRY_S = 600.0
_GIVE_UP_S = 24 * 3600.0
# What a caller of the driver makes of the task state that it was called in.
# Nova clears those of a plain snapshot by itself at its start, and knows what
# to do about a resize.
_STATES = {
    task_states.IMAGE_BACKUP: (task_states.IMAGE_BACKUP,),
    task_states.SHELVING: (
        task_states.SHELVING, task_states.SHELVING_IMAGE_PENDING_UPLOAD,
        task_states.SHELVING_IMAGE_UPLOADING),
}
_DIED = 'nova-compute died while the snapshot was taken'


def after_death(directory: str, instances: typing.Any) -> None:
    """See to the snapshots that an earlier nova-compute had in flight.

    :param directory: where it wrote which
    :param instances: of this host, not initialised yet
    """
    known = {instance.uuid: instance for instance in instances}
    found = []
    for path in in_flight.left_in(directory):
        try:
            record = in_flight.Record.adopt(path)
        except exception.GuestBusy:
            continue
        except (ValueError, OSError) as error:
            LOG.error('%s says which snapshot a nova-compute that died had '
                      'in flight, and can not be read: %s. Look for an image '
                      'of that id which is queued or saving, delete it, and '
                      'delete the file', path, error)
            continue
        if record is not None:
            found.append(record)
            if record.failure is None:
                # What failed was over: its server may have been asked for
                # something else since.
                _free(known.get(record.snapshot.instance_uuid),
                      record.snapshot)
    if found:
        threading.Thread(target=_settle_all, args=(found,),
                         daemon=True).start()


def settle_later(record: in_flight.Record) -> None:
    """See to images of further disks of a snapshot that failed: those that
    Glance did not delete when it was told to, and all where the snapshot
    failed after they were whole.
    """
    threading.Thread(target=_settle_all, args=([record],),
                     daemon=True).start()


def _free(instance: objects.Instance | None,
          snapshot: in_flight.Snapshot) -> None:
    """Let a server be used again whose state Nova would keep for ever.

    Now, and not later: nothing new was asked of it yet.
    """
    states = _STATES.get(snapshot.task_state, ())
    if instance is None or instance.task_state not in states:
        return
    state, instance.task_state = instance.task_state, None
    try:
        instance.save(expected_task_state=state)
    except Exception as error:
        instance.task_state = state
        LOG.warning('Its task state stays %s, which a dead nova-compute '
                    'left: %s', state, error, instance=instance)
    else:
        LOG.warning('Its task state %s, which a dead nova-compute left, is '
                    'cleared', state, instance=instance)


def _settle_all(records: list[in_flight.Record]) -> None:
    for record in records:
        if record.failure is None:
            _tell(record.snapshot, _why(record))
            # What failed has had its line.
            accounts.say(accounts.Account(
                record.snapshot.instance_uuid, record.snapshot.image_id,
                record.snapshot.request_id, outcome=accounts.FAILED,
                error=DIED, reason=_DIED, ours=False),
                functools.partial(
                    notification.send, _context_of(record.snapshot)))
    begun = time.monotonic()
    wait_s = _RETRY_S
    while records:
        waited = time.monotonic() - begun
        records = [record for record in records
                   if not _is_settled(record, waited)]
        if records:
            time.sleep(wait_s)
            wait_s = min(wait_s * 2, _LONGEST_RETRY_S)


def _is_settled(record: in_flight.Record, waited: float) -> bool:
    """Try once; whether nothing is left to try.

    :param waited: seconds since the first time
    """
    try:
        outcome = _settled(record, waited)
    except exception.ImageGone as error:
        if record.failure is not None:
            # Nova had been told to delete it.
            LOG.info('image %s of a snapshot that failed is gone',
                     record.snapshot.image_id)
            _name_unseen(record)
            record.forget()
            return True
        # Glance says the same of an image that one may not see.
        if waited < _GIVE_UP_S:
            return _is_said(record, waited, error)
        outcome = _unseen(record.snapshot.image_id)
        _name_unseen(record)
    except Exception as error:
        if waited < _GIVE_UP_S:
            return _is_said(record, waited, error)
        LOG.error('%s is left for the next start of nova-compute: %s',
                  record.path, error)
        record.close()
        return True
    LOG.warning('%s; %s', _why(record), outcome,
                instance_uuid=record.snapshot.instance_uuid)
    _tell(record.snapshot, f'{_why(record)}; {outcome}')
    record.forget()
    return True


def _settled(record: in_flight.Record, waited: float) -> str:
    """:returns: what became of the images

    :raises ImageGone: if that of the root disk is not found; those of further
        disks are seen to
    :raises ImageServiceError: if Glance gives no clear answer
    """
    proxy = glance()
    try:
        outcome = dead.settle(
            proxy, record.snapshot, record.announced,
            _why(record) if CONF.snapshot_ext.dead_image == 'keep' else None,
            # A store may take it as long as that of a living one.
            patient=waited < CONF.snapshot_ext.answer_timeout)
    except exception.ImageGone:
        _settle_further(proxy, record, shown=False)
        raise
    return '; '.join([outcome, *_settle_further(proxy, record, shown=True)])


def _settle_further(proxy: typing.Any, record: in_flight.Record,
                    shown: bool) -> list[str]:
    """:param shown: whether that of the root disk is: what is not is gone.
        Else it may be there, and stays to be asked for again
    :returns: what became of the images of further disks
    """
    outcomes = []
    if record.further:
        whole = dead.is_whole(proxy, record.snapshot, record.announced)
        for image_id in list(record.further):
            try:
                outcome = dead.settle_further(
                    proxy, record.snapshot, image_id, whole,
                    failed=record.failure is not None)
            except exception.ImageGone:
                if not shown:
                    continue
                outcome = f'image {image_id} is gone'
            LOG.warning('%s; %s', _why(record), outcome,
                        instance_uuid=record.snapshot.instance_uuid)
            outcomes.append(outcome)
            record.end_further(image_id)
    return outcomes


def _name_unseen(record: in_flight.Record) -> None:
    """Say which images of further disks are given up."""
    for image_id in record.further:
        LOG.warning('%s; %s', _why(record), _unseen(image_id),
                    instance_uuid=record.snapshot.instance_uuid)


def _unseen(image_id: str) -> str:
    return (f'image {image_id} is gone, or is not shown to '
            f'[{CONF.snapshot_ext.dead_image_auth}]')


def _why(record: in_flight.Record) -> str:
    """Why there may be an image that nobody fills."""
    if record.failure is None:
        return _DIED
    if not record.adopted:
        return record.failure
    return f'{record.failure}; then nova-compute died'


def _is_said(record: in_flight.Record, waited: float,
             error: Exception) -> bool:
    """Say once what is tried again. :returns: False"""
    say = LOG.warning if waited < _RETRY_S else LOG.debug
    say('What a dead nova-compute left of image %s is not changed, and tried '
        'again: %s', record.snapshot.image_id, error)
    return False


def _tell(snapshot: in_flight.Snapshot, what: str) -> None:
    """Say in the server's events, under its request, how it ended."""
    context = _context_of(snapshot)
    try:
        objects.InstanceActionEvent.event_finish_with_failure(
            context, snapshot.instance_uuid, EVENT, exc_val=what,
            exc_tb='', want_result=False)
    except (nova_exception.InstanceActionNotFound,
            nova_exception.InstanceActionEventNotFound,
            nova_exception.InstanceNotFound) as error:
        LOG.debug('Nobody is told how a snapshot ended: %s', error)
    except Exception as error:
        LOG.warning('The events of server %s do not say how its snapshot '
                    'ended: %s', snapshot.instance_uuid, error)


def _context_of(
        snapshot: in_flight.Snapshot) -> nova_context.RequestContext:
    """The request that it was taken for, with rights of our own."""
    return nova_context.RequestContext(
        user_id=snapshot.user_id, project_id=snapshot.project_id,
        is_admin=True, request_id=snapshot.request_id)


def glance() -> typing.Any:
    """Give openstacksdk's image proxy with rights of our own.

    :raises ImageServiceError: if there are none
    """
    group = CONF.snapshot_ext.dead_image_auth
    keystone_loading.register_auth_conf_options(CONF, group)
    try:
        auth = keystone_loading.load_auth_from_conf_options(CONF, group)
    except keystone_exceptions.ClientException as error:
        raise exception.ImageServiceError(
            f'[{group}] of nova.conf does not sign on: {error}') from error
    if auth is None:
        raise exception.ImageServiceError(
            f'[snapshot_ext] dead_image_auth = {group}, and [{group}] of '
            f'nova.conf has no auth_type')
    proxy = nova_compat.image_proxy(auth)
    if CONF.glance.api_servers:
        proxy.endpoint_override = (
            f'{CONF.glance.api_servers[0].rstrip("/")}/v2')
    return proxy
