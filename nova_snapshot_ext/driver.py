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

"""Nova's door: how Nova calls us, and we Nova."""

import collections.abc
import contextlib
import functools
import os
import threading
import time
import typing

from nova.compute import task_states
from nova.compute import utils as compute_utils
from nova.compute import vm_states
import nova.conf
from nova import context as nova_context
from nova import exception as nova_exception
from nova.image import glance as nova_glance
from nova import objects
from nova.virt.libvirt import driver as libvirt_driver
from oslo_concurrency import lockutils
from oslo_log import log as logging
import oslo_messaging
from oslo_utils import strutils

from nova_snapshot_ext import account as accounts
from nova_snapshot_ext import checks
from nova_snapshot_ext import conf
from nova_snapshot_ext import domain_records
from nova_snapshot_ext import exception
from nova_snapshot_ext import external_merge
from nova_snapshot_ext import guard as guards
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext.images import base as images
from nova_snapshot_ext.images import rotation
from nova_snapshot_ext import in_flight
from nova_snapshot_ext import notification
from nova_snapshot_ext import nova_compat
from nova_snapshot_ext import nova_interface
from nova_snapshot_ext import plugins
from nova_snapshot_ext import privileged
from nova_snapshot_ext import rebuilding
from nova_snapshot_ext import reconcile
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import rollback
from nova_snapshot_ext import selection
from nova_snapshot_ext import settings
from nova_snapshot_ext import snapshot
from nova_snapshot_ext import undo
from nova_snapshot_ext import upkeep

LOG = logging.getLogger(__name__)
CONF = nova.conf.CONF

DOMAIN_FLOW = 'domain'
REQUEST_PROPERTY = 'snapshot_flow'
#: whether the flow ``domain`` keeps the memory
MEMORY_PROPERTY = 'snapshot_memory'
#: which disks it is of
DISKS_PROPERTY = 'snapshot_disks'
FLAVOR_SPEC = 'snapshot_ext:flow'
# What somebody else has made of a guest that was up when we stopped it.
_DOWN = (vm_states.STOPPED, vm_states.SUSPENDED, vm_states.SHELVED,
         vm_states.SHELVED_OFFLOADED, vm_states.SOFT_DELETED,
         vm_states.DELETED, vm_states.RESCUED, vm_states.RESIZED)
_GOING_DOWN = (task_states.DELETING, task_states.SOFT_DELETING,
               task_states.POWERING_OFF)
# Nor is a guest resumed that ran, and that its owner has paused since.
_PAUSED = (*_DOWN, vm_states.PAUSED)
_PAUSING = (*_GOING_DOWN, task_states.PAUSING)
# What a server is doing while its snapshot is in flight.
_IN_FLIGHT = (task_states.IMAGE_SNAPSHOT, task_states.IMAGE_BACKUP,
              task_states.IMAGE_PENDING_UPLOAD, task_states.IMAGE_UPLOADING,
              task_states.SHELVING, task_states.SHELVING_IMAGE_PENDING_UPLOAD,
              task_states.SHELVING_IMAGE_UPLOADING)
# What a server may be doing while we start its guest, or write to its disk:
# nothing, a snapshot, or what Nova does under the lock that we have then, or
# by asking a guest that runs. All else it does without that lock, from the
# moment that its API was asked: it stops the guest, boots it another way, or
# moves its disk. What later releases may add counts as that.
_STILL = (None, task_states.IMAGE_SNAPSHOT_PENDING, *_IN_FLIGHT,
          *task_states.soft_reboot_states, *task_states.hard_reboot_states,
          task_states.POWERING_OFF, task_states.DELETING,
          task_states.SOFT_DELETING, task_states.PAUSING,
          task_states.UNPAUSING, task_states.UPDATING_PASSWORD)
# How long Nova may hold an instance while we want to start its guest: who
# holds it may be waiting for us.
_LOCK_TIMEOUT_S = 60.0
# For how long, and how often, a task state that was set for a moment is
# cleared again where Nova does not answer.
_CLEARING_S = 3600.0
_CLEAR_AGAIN_S = 10.0
# How long guards that are at work are waited for when nova-compute starts.
_GUARDS_TIMEOUT_S = 60.0
_DELETING = (task_states.DELETING, task_states.SOFT_DELETING)
# Callers that keep the disk whatever becomes of the image.
_DISK_KEPT = (task_states.IMAGE_SNAPSHOT, task_states.IMAGE_BACKUP)

# What Nova's API writes on an image of a server, and on one of a backup.
_OF_SERVER = 'instance_uuid'
_BACKUP_TYPE = 'backup_type'
# What Nova raises where a server or an image is gone, or going.
_UNWANTED = (nova_exception.InstanceNotFound,
             nova_exception.InstanceNotRunning, nova_exception.ImageNotFound,
             nova_exception.UnexpectedDeletingTaskStateError)

_MOVES = 'its server moves to another host'

UpdateTaskState = collections.abc.Callable[..., None]


class NovaHost:
    """Nova's rights: its privileged functions, and its care of guests."""

    def __init__(self, driver: libvirt_driver.LibvirtDriver, uuid: str,
                 instance: objects.Instance | None,
                 caller: str | None = None, stopped: bool = False) -> None:
        """:param instance: None if Nova has none of that UUID on this host

        :param caller: the task state in which Nova's caller of this thread
            waits for us: as long as the server is in it, Nova does nothing
            else with it
        :param stopped: that caller has stopped the guest, for good
        """
        self._driver = driver
        self._uuid = uuid
        self._instance = instance
        self._caller = caller
        self._thread = threading.get_ident()
        self._stopped = stopped

    def let_group_pass(self, path: str, gid: int) -> None:
        privileged.let_group_pass(path, gid)

    def take_socket(self, path: str) -> None:
        privileged.take_socket(path)

    def give_disk(self, path: str, uid: int, gid: int) -> None:
        privileged.give_disk(path, uid, gid)

    def may_start(self) -> contextlib.AbstractContextManager[bool]:
        return self._asked(_DOWN, _GOING_DOWN)

    def may_resume(self) -> contextlib.AbstractContextManager[bool]:
        return self._asked(_PAUSED, _PAUSING)

    @contextlib.contextmanager
    def undisturbed(self) -> collections.abc.Iterator[None]:
        with contextlib.ExitStack() as stack:
            # Nova shelves a server, and nothing else that calls us, under
            # its lock, which can't be had twice.
            if self._called_in() != task_states.SHELVING:
                stack.enter_context(_instance_lock(self._uuid))
            current = self._current()
            self._check(current)
            stack.enter_context(self._kept(current))
            yield

    @contextlib.contextmanager
    def _asked(self, not_while: tuple[str, ...], not_before: tuple[str, ...],
               ) -> collections.abc.Iterator[bool]:
        """Nova deletes, stops and reboots an instance under this lock: who
        waits for it finds the guest as Nova left it.

        :param not_while: states of a server whose guest is not ours
        :param not_before: what Nova is about to do to such a server
        :raises UndoFailed: if Nova is at work on it without the lock
        """
        if self._instance is None or (
                self._stopped and self._called_in() is not None):
            yield False
            return
        with _instance_lock(self._uuid):
            current = self._current()
            if (current is None or current.task_state in not_before
                    or current.vm_state in not_while
                    or current.host != CONF.host):
                yield False
                return
            self._check(current)
            with self._kept(current):
                self._driver.cpu_api.power_up_for_instance(self._instance)
                yield True

    def _called_in(self) -> str | None:
        """The state in which a caller waits for this; for what another thread
        does, such as trying again, nobody waits."""
        here = self._thread == threading.get_ident()
        return self._caller if here else None

    def _current(self) -> objects.Instance | None:
        try:
            return objects.Instance.get_by_uuid(
                nova_context.get_admin_context(), self._uuid)
        except nova_exception.InstanceNotFound:
            return None
        except oslo_messaging.MessagingException as error:
            if self._instance is None or (
                    self._thread != threading.get_ident()):
                # What was known is no more than a guess by now.
                raise exception.UndoFailed(
                    f'Where server {self._uuid} is can not be asked: '
                    f'{error}') from error
            # A guest does not stay off because nobody can be asked. Whoever
            # would decide otherwise has to come by here, and waits.
            LOG.warning('Its state is not known anew: %s', error,
                        instance_uuid=self._uuid)
            return self._instance

    def _check(self, current: objects.Instance | None) -> None:
        """:raises GuestElsewhere: if Nova has the guest elsewhere for good

        :raises UndoFailed: if it has it or its disk elsewhere, or is at work
            on them without its lock
        :param current: None if Nova has it nowhere
        """
        if current is None:
            return
        if current.host != CONF.host:
            words = f'Server {self._uuid} is on the host {current.host}'
            if _has_left(current):
                raise exception.GuestElsewhere(words)
            # Its disk may have gone there, and may come back.
            raise exception.UndoFailed(words)
        if current.task_state not in (*_STILL, self._called_in()):
            raise exception.UndoFailed(
                f'Nova is at work on server {self._uuid} '
                f'({current.task_state})')

    @contextlib.contextmanager
    def _kept(self, current: objects.Instance | None,
              ) -> collections.abc.Iterator[None]:
        """Have nothing else begun on a server while the context lasts.

        Whatever Nova begins without its lock, its API writes down first, and
        only where there is no task state: there is that of a snapshot, which
        this is a part of. Nova clears it if we die.

        :raises UndoFailed: if something was begun a moment ago
        """
        if (current is None or current.task_state is not None
                or current is self._instance):      # nobody could be asked
            yield
            return
        known = True
        current.task_state = task_states.IMAGE_SNAPSHOT
        try:
            current.save(expected_task_state=[None])
        except (nova_exception.InstanceNotFound,
                nova_exception.UnexpectedTaskStateError) as error:
            raise exception.UndoFailed(
                f'Nova is at work on server {self._uuid}: {error}') from error
        except oslo_messaging.MessagingException as error:
            known = False       # as in _current()
            LOG.warning('It may be asked for something else now: %s', error,
                        instance_uuid=self._uuid)
        try:
            yield
        finally:
            self._let_go(current, known)

    def _let_go(self, current: objects.Instance, known: bool) -> None:
        def clear() -> bool:
            current.task_state = None
            try:
                current.save(expected_task_state=[
                    task_states.IMAGE_SNAPSHOT, *[None] * (not known)])
            except (nova_exception.InstanceNotFound,
                    nova_exception.UnexpectedTaskStateError):
                pass        # it is being deleted, or was reset
            except Exception as error:
                LOG.error('Its task state %s can not be cleared: %s',
                          task_states.IMAGE_SNAPSHOT, error,
                          instance_uuid=self._uuid)
                return False
            return True

        def go_on() -> None:
            deadline = time.monotonic() + _CLEARING_S
            while time.monotonic() < deadline:
                time.sleep(_CLEAR_AGAIN_S)
                if clear():
                    return

        if not clear():
            threading.Thread(target=go_on, daemon=True).start()


def _has_left(instance: objects.Instance) -> bool:
    """Whether a server that is not on this host does not come back.

    One that is moved may, until that is confirmed. One that was shelved gets
    another disk.
    """
    return instance.task_state is None and (
        instance.vm_state == vm_states.SHELVED_OFFLOADED
        or (instance.host is not None
            and instance.vm_state != vm_states.RESIZED))


class RebuildingHost(NovaHost):
    """Nova's rights while it rebuilds a server: its guest is started
    whatever the server was before, unless it is to go.

    What is tried again when the rebuild has ended has no such right.
    """

    def may_start(self) -> contextlib.AbstractContextManager[bool]:
        if self._called_in() is None:
            return super().may_start()
        return self._asked((), _GOING_DOWN)

    def may_resume(self) -> contextlib.AbstractContextManager[bool]:
        if self._called_in() is None:
            return super().may_resume()
        return self._asked((), _GOING_DOWN)


class ServerReport:
    """Shows a snapshot's progress as the server's, and looks whether it is
    being deleted, or its state was reset; with an Instance of its own, as
    threads must not share one."""

    def __init__(self, instance: objects.Instance) -> None:
        self._uuid = instance.uuid
        self._in_flight = instance.task_state in _IN_FLIGHT

    def __call__(self, percent: int) -> None:
        """:raises GuestGone: if the server is being deleted, or was

        :raises Preempted: if its state is not that of a snapshot any more
        """
        try:
            instance = objects.Instance.get_by_uuid(
                nova_context.get_admin_context(), self._uuid,
                expected_attrs=[])
            if instance.task_state in _DELETING:
                raise exception.GuestGone(
                    f'Server {self._uuid} is being deleted')
            preempted = (self._in_flight
                         and instance.task_state not in _IN_FLIGHT)
            shown = 0 if preempted else percent
            if instance.progress != shown:
                instance.progress = shown
                instance.save()
            if preempted:
                raise exception.Preempted(
                    f'The state of server {self._uuid} was reset')
        except nova_exception.InstanceNotFound as error:
            raise exception.GuestGone(
                f'Server {self._uuid} was deleted') from error


@contextlib.contextmanager
def _instance_lock(uuid: str) -> collections.abc.Iterator[None]:
    """Nova's lock of an instance (nova.utils.synchronized), with a limit.

    :raises UndoFailed: if it can't be had in time
    """
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lockutils.lock(
                    uuid, lock_file_prefix='nova-', blocking=False))
                break
            except lockutils.AcquireLockFailedException as error:
                if time.monotonic() > deadline:
                    raise exception.UndoFailed(
                        f'Nova has held {uuid} for {_LOCK_TIMEOUT_S:.0f} s '
                        f'and more') from error
                time.sleep(0.1)
        yield


class SnapshotLibvirtDriver(
        nova_compat.LibvirtDriver):     # type: ignore[misc]
    """Nova's libvirt driver, with snapshots taken by this package."""

    def __init__(self, virtapi: typing.Any, read_only: bool = False) -> None:
        conf.register_opts(CONF)
        super().__init__(virtapi, read_only=read_only)
        #: servers whose disks are about to be copied to another host
        self._leaving: set[str] = set()

    def init_host(self, host: str) -> None:
        super().init_host(host)
        _check_configuration()
        LOG.info('Snapshots are taken by nova_snapshot_ext: flows %s, '
                 'transfers %s, image service %s',
                 ', '.join(CONF.snapshot_ext.flows),
                 ', '.join(CONF.snapshot_ext.transfers),
                 CONF.snapshot_ext.image_service)
        checks.say_at_start(CONF)

    def snapshot(self, context: nova_context.RequestContext,
                 instance: objects.Instance, image_id: str,
                 update_task_state: UpdateTaskState) -> None:
        """Take a snapshot of an instance into an image that Glance has.

        :param update_task_state: as Nova's callers give it; it ends in
            IMAGE_UPLOADING
        :raises nova.exception.InstanceNotFound, InstanceNotRunning: if the
            guest is gone
        :raises nova.exception.ImageNotFound: if the image is gone
        :raises nova.exception.UnexpectedTaskStateError: if the server's
            state was reset meanwhile
        :raises nova.exception.NovaException: if no snapshot was taken
        """
        account = accounts.Account(
            instance.uuid, image_id, context.request_id)
        with _reported(context, instance), accounts.told(
                account, functools.partial(notification.send, context),
                _UNWANTED):
            with _translated(instance, image_id):
                why = self._why_nova_serves(instance)
                if why is None:
                    with _in_flight(context, instance, image_id) as record:
                        self._snapshot(context, instance, image_id,
                                       update_task_state, record, account)
                    return
                why += self._of_root_alone(context, instance, image_id, why)
            LOG.info("Nova's own snapshot serves: %s", why,
                     instance=instance)
            account.flow = accounts.NOVA
            super().snapshot(context, instance, image_id, update_task_state)

    def rebuild(
            self, context: nova_context.RequestContext,
            instance: objects.Instance, *arguments: typing.Any,
            network_info: typing.Any = None, evacuate: bool = False,
            block_device_info: dict[str, typing.Any] | None = None,
            preserve_ephemeral: bool = False, **others: typing.Any) -> None:
        """Roll a server back to the domain snapshot of its new image.

        :raises NotImplementedError: if there is none (any more), so that
            Nova's own rebuild serves, from the image
        :raises nova.exception.InstanceFaultRollback: if the server can't go
            back, or nobody knows whether it is to; it is as it was
        :raises nova.exception.InstanceNotFound: if it is being deleted
        :raises nova.exception.NovaException: if its guest is not what it was
            and not rolled back either, such as one that was started by
            somebody else meanwhile
        """
        # reimage_boot_volume tells nothing: Nova's API says so of every server
        # from its version 2.93 on, and one on a volume has no such snapshot.
        if evacuate or preserve_ephemeral:
            raise NotImplementedError
        records = domain_records.Records(state_directory(), instance.uuid)
        record = rebuilding.record_of(context, instance, records)
        if record is None:
            raise NotImplementedError
        with rebuilding.refusing(context, instance, record):
            guest = self._guest_that_holds(instance, record)
        if guest is None:
            raise NotImplementedError
        with compute_utils.EventReporter(
                context, rebuilding.EVENT, CONF.host, instance.uuid):
            rebuilding.roll_back(
                context, instance, guest, record, records,
                RebuildingHost(self, instance.uuid, instance,
                               task_states.REBUILD_SPAWNING),
                block_device_info,
                plug=lambda: self.plug_vifs(instance, network_info),
                power_on=lambda: self.power_on(
                    context, instance, network_info, block_device_info))

    def _guest_that_holds(
            self, instance: objects.Instance,
            record: domain_records.Record) -> guests.Guest | None:
        try:
            guest = self._our_guest(instance)
        except nova_exception.InstanceNotRunning:
            return None
        return guest if rollback.is_there(guest, record) else None

    def cleanup(
            self, context: nova_context.RequestContext,
            instance: objects.Instance, network_info: typing.Any,
            block_device_info: dict[str, typing.Any] | None = None,
            destroy_disks: bool = True, *arguments: typing.Any,
            **others: typing.Any) -> typing.Any:
        if destroy_disks:
            self._upkeep.let_undefine(instance)
        result = super().cleanup(
            context, instance, network_info, block_device_info,
            destroy_disks, *arguments, **others)
        if destroy_disks:
            self._upkeep.forget(instance.uuid)
        return result

    def migrate_disk_and_power_off(
            self, context: nova_context.RequestContext,
            instance: objects.Instance, dest: str, *arguments: typing.Any,
            **others: typing.Any) -> typing.Any:
        if dest != self.get_host_ip_addr():
            self._leaving.add(instance.uuid)
        try:
            return super().migrate_disk_and_power_off(
                context, instance, dest, *arguments, **others)
        finally:
            self._leaving.discard(instance.uuid)

    def power_off(self, instance: objects.Instance, *arguments: typing.Any,
                  **others: typing.Any) -> None:
        # Nova has refused by now whatever migration it refuses.
        if instance.uuid in self._leaving:
            self._upkeep.delete_all(instance, _MOVES)
        super().power_off(instance, *arguments, **others)

    def live_migration(
            self, context: nova_context.RequestContext,
            instance: objects.Instance, *arguments: typing.Any,
            **others: typing.Any) -> typing.Any:
        self._upkeep.delete_all(instance, _MOVES)
        return super().live_migration(
            context, instance, *arguments, **others)

    def manage_image_cache(
            self, context: nova_context.RequestContext,
            all_instances: typing.Any) -> None:
        super().manage_image_cache(context, all_instances)
        self._upkeep.delete_all_unwanted(context)

    @functools.cached_property
    def _upkeep(self) -> upkeep.Upkeep:
        return upkeep.Upkeep(
            state_directory(), self._our_guest,
            lambda instance: NovaHost(
                self, instance.uuid, instance, instance.task_state))

    def process_instances_at_startup(
            self, context: nova_context.RequestContext,
            instances: typing.Any) -> typing.Any:
        """Finish what an earlier nova-compute and its guards left undone.

        Evacuated instances are gone by now, and no instance is initialised
        yet: what is here is this host's.
        """
        instances = super().process_instances_at_startup(context, instances)
        known = {instance.uuid: instance for instance in instances}
        deadline = time.monotonic() + _GUARDS_TIMEOUT_S
        try:
            for path in undo.logs_in(state_directory()):
                uuid = os.path.basename(path).removesuffix(undo.SUFFIX)
                self._finish(path, uuid, known.get(uuid), deadline)
            reconcile.after_death(state_directory(), instances)
        except OSError as error:
            # Nova's own work does not wait for that.
            LOG.error('What an earlier nova-compute left of its snapshots is '
                      'not known, and nothing of it is undone: %s', error)
        for instance in instances:
            _forget_progress(instance)
        return instances

    def _finish(self, path: str, uuid: str,
                instance: objects.Instance | None, deadline: float) -> None:
        """Run what a dead nova-compute left, once no guard does so any more.

        What fails goes on beside Nova's own work: a guest does not stay
        paused or off because libvirt was away, or busy with it, for now.

        :param deadline: on the monotonic clock; a guard that goes on for
            longer is left alone
        """
        def host(guest: guests.Guest | None) -> hosts.Host:
            if (instance is None and guest is not None
                    and not guest.belongs_to_nova()):
                return hosts.PlainHost()    # the command line's
            return NovaHost(self, uuid, instance)

        def find(uri: str, uuid: str) -> guests.Guest | None:
            if instance is None:
                return guards.find_guest(uri, uuid)
            try:
                return self._our_guest(instance)
            except nova_exception.InstanceNotRunning:
                return None

        def finish() -> None:
            try:
                _finish_now(path, find, host, deadline)
            except ValueError as error:
                LOG.error('%s says how to undo a snapshot that a nova-compute '
                          'which died had in flight, and can not be '
                          'understood: %s. Nothing of it is undone, and '
                          'snapshots of its guest are refused: look after the '
                          'guest, undo by hand what the lines without "done" '
                          'say, and delete the file', path, error,
                          instance=instance)
            except Exception:
                LOG.exception('%s could not be finished, and is tried again; '
                              'snapshots of its guest are refused until it '
                              'is', path)
                threading.Thread(target=guards.bring_back,
                                 args=(path, find, host), daemon=True).start()

        if _takes_long(path):
            # Nova's own work does not wait for that.
            threading.Thread(target=finish, daemon=True).start()
        else:
            finish()

    def _why_nova_serves(self, instance: objects.Instance) -> str | None:
        """What this package leaves to Nova, None if it serves.

        An obstacle of every flow is none: what keeps us from touching a
        guest would not keep Nova's own snapshot.

        :raises UnsafeDisk: if the disk is encrypted and must not be read
        """
        if CONF.libvirt.virt_type not in nova_interface.VIRT_TYPES:
            return f'[libvirt] virt_type is {CONF.libvirt.virt_type}'
        disk = self._our_guest(instance).root_disk()
        if disk.kind not in ('file', 'block'):
            return f'its root disk is a {disk.kind} disk'
        if disk.encrypted or CONF.ephemeral_storage_encryption.enabled:
            if CONF.snapshot_ext.encrypted == 'refuse':
                raise exception.UnsafeDisk(
                    'Its root disk is encrypted, and [snapshot_ext] '
                    'encrypted = refuse')
            return 'its root disk is encrypted'
        return None

    def _of_root_alone(self, context: nova_context.RequestContext,
                       instance: objects.Instance, image_id: str,
                       why: str) -> str:
        """What to say of further disks where Nova serves.

        :raises InvalidSetting: if the request is for them
        """
        image = self._image_api.get(context, image_id)
        if _which_disks(instance, image) is requests.Disks.ROOT:
            return ''
        asked = image['properties'].get(DISKS_PROPERTY)
        if asked is not None:
            raise exception.InvalidSetting(
                f'image property {DISKS_PROPERTY}', asked,
                f"only {requests.Disks.ROOT.value} can be served, by Nova's "
                f'own snapshot: {why}')
        return (' (and it is of the root disk alone, whatever '
                '[snapshot_ext] disks says)')

    def _snapshot(self, context: nova_context.RequestContext,
                  instance: objects.Instance, image_id: str,
                  update_task_state: UpdateTaskState,
                  record: in_flight.Record,
                  account: accounts.Account) -> None:
        guest = self._our_guest(instance)
        image = self._image_api.get(context, image_id)
        wished = selection.wish(
            image['properties'].get(REQUEST_PROPERTY),
            instance.flavor.extra_specs.get(FLAVOR_SPEC),
            CONF.snapshot_ext.flows, CONF.snapshot_ext.request_flows)
        # Others than those have stopped the guest, and hold the lock under
        # which we would start it again.
        caller = record.snapshot.task_state
        with contextlib.suppress(OSError):
            os.makedirs(CONF.libvirt.snapshots_directory, exist_ok=True)
        kept = caller in _DISK_KEPT
        request = settings.server_request(
            CONF, guest.root_disk(), _quiesce(instance), may_stop=kept,
            domain=requests.DomainSnapshot(
                memory=_with_memory(image),
                image_id=image['id'],
                title=image['name'],
                extra=self._for_rollback(instance, image_id, wished),
                most=CONF.snapshot_ext.max_domain_snapshots,
                most_gb=CONF.snapshot_ext.max_domain_snapshots_gb),
            which=_which_disks(instance, image), account=account)
        host = NovaHost(self, instance.uuid, instance, caller,
                        stopped=not kept)
        service = _image_service(context, image_id, record)

        def before_upload() -> None:
            update_task_state(
                task_state=task_states.IMAGE_UPLOADING,
                expected_state=task_states.IMAGE_PENDING_UPLOAD)

        # Its turn first: what was planned before may not hold after a wait.
        with account.waited(compute_utils.disk_ops_semaphore):
            planned = account.timed('plan', snapshot.plan)(
                guest, host, wished, CONF.snapshot_ext.transfers, request)
            verify_hash = _must_verify_hash(instance)
            update_task_state(task_state=task_states.IMAGE_PENDING_UPLOAD)
            snapshot.take(
                guest, host, planned, request, service,
                self._description(instance, image, request.image_format,
                                  caller),
                verify_hash=verify_hash, before_upload=before_upload,
                report=ServerReport(instance))
        if caller == task_states.IMAGE_BACKUP and (
                request.disks is requests.Disks.ALL):
            _delete_rotated(context, instance, image)

    def _for_rollback(self, instance: objects.Instance, image_id: str,
                      wished: selection.Wish) -> dict[str, typing.Any]:
        """What is kept with a snapshot that can be rolled back to.

        Others that nobody wants any more make room for it.
        """
        if DOMAIN_FLOW not in wished.names:
            return {}
        self._upkeep.delete_unwanted(instance)
        return rebuilding.remembered(instance) | upkeep.remembered(image_id)

    def _our_guest(self, instance: objects.Instance) -> guests.Guest:
        """:raises nova.exception.InstanceNotRunning: if it has no domain"""
        try:
            domain = self._domain(instance)
        except exception.GuestGone as error:
            raise nova_exception.InstanceNotRunning(
                instance_id=instance.uuid) from error
        return guests.Guest(
            domain, self._host._uri, in_thread=nova_compat.in_thread,
            find=lambda: self._domain(instance))

    def _domain(self, instance: objects.Instance) -> typing.Any:
        """An instance's virDomain, by a connection that Nova has tested.

        :raises GuestGone: if it has none
        :raises SnapshotError: if libvirt can't be asked
        """
        try:
            return self._host.get_guest(instance)._domain
        except nova_exception.InstanceNotFound as error:
            raise exception.GuestGone(
                f'Instance {instance.uuid} has no domain') from error
        except nova_exception.NovaException as error:
            raise exception.SnapshotError(str(error)) from error

    def _description(self, instance: objects.Instance,
                     image: dict[str, typing.Any], image_format: str,
                     caller: str | None) -> images.Description:
        """What Nova's own driver sets, without what must not be kept.

        :param caller: the task state in which the snapshot was asked for
        """
        metadata = self._create_snapshot_metadata(
            instance.image_meta, instance, image_format, image['name'])
        # Glance takes no None, and Nova leaves these two out then.
        properties = {name: str(value)
                      for name, value in metadata['properties'].items()
                      if value not in (None, '')}
        removed = {name for name in image['properties']
                   if name.startswith(snapshot.PROPERTY)}
        removed |= {name for name in (REQUEST_PROPERTY, MEMORY_PROPERTY,
                                      DISKS_PROPERTY)
                    if not _inherited_request(instance, image, name)}
        return images.Description(
            name=metadata['name'], disk_format=metadata['disk_format'],
            container_format=metadata['container_format'],
            properties=properties, removed=frozenset(removed),
            # What finds all images of a server finds these as well. They have
            # nothing that is for booting.
            further={_OF_SERVER: instance.uuid} | (
                _of_backup(image) if caller == task_states.IMAGE_BACKUP
                else {}))


def _takes_long(path: str) -> bool:
    """Whether layers of a guest's disks are to be merged, however large."""
    try:
        pending = undo.read(path).pending.values()
    except (FileNotFoundError, ValueError):
        return False
    return any(each.step == external_merge.merge_external_snapshot.__name__
               for each in pending)


def _finish_now(path: str, find: undo.FindGuest, host: undo.HostFor,
                deadline: float) -> None:
    while True:
        try:
            undo.UndoLog.adopt(path, find, host).unwind()
        except FileNotFoundError:
            return
        except exception.GuestBusy:
            if time.monotonic() > deadline:
                LOG.warning('A guard still works at %s', path)
                return
            time.sleep(0.5)
        else:
            LOG.warning('What %s said is undone', path)
            return


def _forget_progress(instance: objects.Instance) -> None:
    """Take back what a snapshot showed that nova-compute did not survive, or
    whose end could not be shown."""
    idle = (instance.vm_state == vm_states.ACTIVE
            and instance.task_state is None)
    if instance.progress and (idle or instance.task_state in _IN_FLIGHT):
        instance.progress = 0
        try:
            instance.save()
        except Exception as error:
            LOG.warning('Its progress stays at what a snapshot left: %s',
                        error, instance=instance)


def state_directory() -> str:
    """Where undo logs are kept."""
    return settings.state_directory(CONF)


def _check_configuration() -> None:
    """:raises InvalidSetting: if a name in [snapshot_ext] stands for nothing

    Said at start, where an operator looks; snapshots say it again.
    """
    for error in plugins.unknown(CONF.snapshot_ext):
        raise error


def _with_memory(image: dict[str, typing.Any]) -> bool:
    """:raises InvalidSetting: if the image says something else"""
    asked = image['properties'].get(MEMORY_PROPERTY, 'true')
    try:
        return strutils.bool_from_string(asked, strict=True)
    except ValueError as error:
        raise exception.InvalidSetting(
            f'image property {MEMORY_PROPERTY}', asked,
            'it must be true or false') from error


def _of_backup(image: dict[str, typing.Any]) -> dict[str, str]:
    """What the images of further disks of a backup say of it.

    A snapshot says the same whose server was booted from a backup.
    """
    kind = image['properties'].get(_BACKUP_TYPE)
    return {} if kind is None else {rotation.PROPERTY: kind}


def _delete_rotated(context: nova_context.RequestContext,
                    instance: objects.Instance,
                    image: dict[str, typing.Any]) -> None:
    """Delete what Nova has left of earlier backups: it deletes the images of
    root disks, when this one is taken."""
    for kind in _of_backup(image).values():
        try:
            for image_id in rotation.delete_rotated(
                    _glance(context), instance.uuid, kind):
                LOG.info('Image %s is deleted: Nova has deleted the backup '
                         'that it was of', image_id, instance=instance)
        except Exception as error:
            # This backup is whole; Nova would delete it after an error.
            LOG.warning('Images of further disks of earlier backups may '
                        'stay: %s', error, instance=instance)


def _which_disks(instance: objects.Instance,
                 image: dict[str, typing.Any]) -> requests.Disks:
    """:raises InvalidSetting: if the image says something else"""
    if _disk_is_deleted(instance):
        # Its image is for Nova, which deletes it when it is used, and knows
        # of no other.
        return requests.Disks.ROOT
    asked = image['properties'].get(
        DISKS_PROPERTY, CONF.snapshot_ext.disks)
    try:
        return requests.Disks(asked)
    except ValueError as error:
        raise exception.InvalidSetting(
            f'image property {DISKS_PROPERTY}', asked,
            f'it must be {" or ".join(each.value for each in requests.Disks)}'
        ) from error


def _inherited_request(instance: objects.Instance,
                       image: dict[str, typing.Any], name: str) -> bool:
    """Whether the instance's own image asks for the same.

    Nova copies the properties of an instance's image to its snapshots. What
    the operator put on the image is meant for all of them; what a tenant
    asked for once is not.
    """
    inherited = instance.system_metadata.get(f'image_{name}')
    return (inherited is not None
            and inherited == image['properties'].get(name))


def _quiesce(instance: objects.Instance) -> requests.Quiesce:
    properties = instance.image_meta.properties
    if properties.get('os_require_quiesce', False):
        return requests.Quiesce.REQUIRED
    if properties.get('hw_qemu_guest_agent', False):
        return requests.Quiesce.IF_POSSIBLE
    return requests.Quiesce.NEVER


def _must_verify_hash(instance: objects.Instance) -> bool:
    return (CONF.snapshot_ext.verify == 'hash'
            or _disk_is_deleted(instance))


def _disk_is_deleted(instance: objects.Instance) -> bool:
    """Whether the image will be all that is left of the disk."""
    return instance.task_state not in _DISK_KEPT


def _in_flight(context: nova_context.RequestContext,
               instance: objects.Instance,
               image_id: str) -> in_flight.Record:
    """What the next nova-compute needs to know if this one dies."""
    return in_flight.Record.begin(state_directory(), in_flight.Snapshot(
        image_id, instance.uuid, context.project_id, context.user_id,
        context.request_id, instance.task_state), reconcile.settle_later)


def _image_service(context: nova_context.RequestContext, image_id: str,
                   record: in_flight.Record) -> images.ImageService:
    name = CONF.snapshot_ext.image_service
    service: images.ImageService = plugins.load(
        plugins.IMAGE_SERVICES, name, '[snapshot_ext] image_service')(
            images.Destination(
                glance=_glance(context), image_id=image_id,
                retries=CONF.glance.num_retries,
                send_timeout=CONF.snapshot_ext.send_timeout,
                answer_timeout=CONF.snapshot_ext.answer_timeout,
                announce=record.announce,
                begin_further=record.begin_further,
                end_further=record.end_further,
                directory=CONF.snapshot_ext.image_directory,
                directory_setting='[snapshot_ext] image_directory'))
    return service


def _glance(context: nova_context.RequestContext) -> typing.Any:
    """Give openstacksdk's image proxy with the rights of the request.

    [glance] and [service_user] say how.
    """
    proxy = nova_compat.image_proxy(nova_compat.request_auth(context))
    # A request's own auth plugin finds endpoints in its catalog and knows
    # nothing of versions.
    endpoint = next(nova_glance.get_api_servers(context))
    proxy.endpoint_override = f'{endpoint.rstrip("/")}/v2'
    return proxy


@contextlib.contextmanager
def _reported(context: nova_context.RequestContext,
              instance: objects.Instance) -> collections.abc.Iterator[None]:
    """Say in the server's events how it ended.

    Nova's own event of a snapshot ends when the work is queued.
    """
    with compute_utils.EventReporter(
            context, reconcile.EVENT, CONF.host, instance.uuid):
        yield


@contextlib.contextmanager
def _translated(instance: objects.Instance,
                image_id: str) -> collections.abc.Iterator[None]:
    """Our errors as Nova's callers know them, logged once."""
    try:
        yield
    except exception.GuestGone as error:
        LOG.info('%s while its snapshot was taken', error, instance=instance)
        raise nova_exception.InstanceNotFound(
            instance_id=instance.uuid) from error
    except exception.ImageGone as error:
        LOG.info('%s while its snapshot was taken', error, instance=instance)
        raise nova_exception.ImageNotFound(image_id=image_id) from error
    except exception.Preempted as error:
        LOG.info('%s while its snapshot was taken', error, instance=instance)
        # Nova's callers clear the server's state after any other error: it
        # is somebody else's by now.
        raise nova_exception.UnexpectedTaskStateError(
            instance_uuid=instance.uuid, expected='the state of a snapshot',
            actual=str(error)) from error
    except (exception.SnapshotError, OSError) as error:
        LOG.error('No snapshot was taken: %s', error, instance=instance)
        raise nova_exception.NovaException(str(error)) from error
    except nova_exception.NovaException:
        raise
    except Exception:
        # Nova's snapshot pool keeps what comes out of here to itself.
        LOG.exception('No snapshot was taken', instance=instance)
        raise
