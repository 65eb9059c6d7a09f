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

"""The flow ``cold``: a guest that is off, or is stopped for a moment.

A guest that runs is stopped with its memory saved, gets an internal snapshot
in its qcow2 disks, and is started again at once; the snapshot is read while
it runs on. What that rests on is in the documentation of the flow. Disks
that can't hold an internal snapshot are read while the guest is stopped.
"""

import collections.abc
import contextlib
import os
import time
import uuid

from oslo_log import log as logging

from nova_snapshot_ext import disk as disks_
from nova_snapshot_ext import exception
from nova_snapshot_ext.flows import base
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import qemu_img
from nova_snapshot_ext import qemu_nbd
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo
from nova_snapshot_ext import workspace

LOG = logging.getLogger(__name__)

_POLL_S = 0.05
# How long a managed save that its owner did not live to see may take.
_SAVE_TIMEOUT_S = 600.0
# A snapshot counts every cluster anew, while the guest is stopped. QEMU's own
# caches hold the tables of 256 GiB; these hold those of 1 TiB in use, and
# take memory only as they fill.
_TABLE_CACHES = {'l2-cache-size': 128 * 1024 ** 2,
                 'refcount-cache-size': 64 * 1024 ** 2}
# How long libvirt may keep such a call waiting for the domain's lock
# (QEMU_JOB_WAIT_TIME), and a margin: nothing tells of it meanwhile.
_LOCK_WAIT_S = 35.0


@undo.step
@undo.with_guest
def start_guest(around: undo.Surroundings, guest: guests.Guest) -> None:
    """Start a guest that we stopped.

    :raises UndoFailed: if it is still being stopped
    """
    begun = time.monotonic()
    while guest.state() is not guests.State.SHUTOFF:
        waited = time.monotonic() - begun
        # An owner that lives knows how its call ended.
        if not around.owner_died or (
                not guest.job_under_way() and waited > _LOCK_WAIT_S):
            return
        if waited > _SAVE_TIMEOUT_S:
            raise exception.UndoFailed(
                f'The memory of {guest.name} is still being saved')
        time.sleep(_POLL_S)
    with around.host.may_start() as allowed:
        if allowed and guest.has_managed_save():
            guest.start()


@undo.step
@undo.with_guest
def attach_device(around: undo.Surroundings, guest: guests.Guest,
                  device: str) -> None:
    """Give back a device of the host, once the guest runs again.

    :raises UndoFailed: if the guest was not started yet
    """
    if guest.state() is not guests.State.SHUTOFF:
        guest.attach(device)
    elif guest.has_managed_save():
        raise exception.UndoFailed(f'{guest.name} was not started')


@undo.step
def restore_owner(around: undo.Surroundings, path: str, uid: int,
                  gid: int) -> None:
    """Give a disk back to whom it belonged, unless its guest runs.

    libvirt owns the disks of a running guest; those of a guest that is gone
    may be another host's by now.
    """
    if not _is_gone(around) and _opened_by_guest(around) is None and (
            os.path.exists(path)):
        around.host.chown(path, uid, gid)


@undo.step
def delete_internal_snapshot(around: undo.Surroundings, path: str,
                             name: str) -> None:
    """Delete it, by QEMU's monitor or qemu-img, and see that it is gone.

    The disk of a guest that is gone is left alone: it may be deleted at this
    moment, or another host's by now.

    :raises SnapshotError: if it is still there
    """
    for _ in range(5):
        # The guest may start, stop or go meanwhile: then the other way is
        # the right one, and the next round takes it.
        try:
            if _is_gone(around) or not _has_snapshot(around, path, name):
                return
            _delete_snapshot(around, path, name)
        except exception.SnapshotError as error:
            LOG.debug('Deleting snapshot %s of %s: %s', name, path, error)
            time.sleep(0.2)
    if not _is_gone(around) and _has_snapshot(around, path, name):
        raise exception.UndoFailed(
            f'The internal snapshot {name} of {path} can not be deleted')


def _is_gone(around: undo.Surroundings) -> bool:
    if around.guest is None:
        return True
    try:
        around.guest.state()
    except exception.GuestGone:
        return True
    return False


def _opened_by_guest(around: undo.Surroundings) -> guests.Guest | None:
    if around.guest is None:
        return None
    try:
        off = around.guest.state() is guests.State.SHUTOFF
    except exception.GuestGone:
        return None
    return None if off else around.guest


def _has_snapshot(around: undo.Surroundings, path: str, name: str) -> bool:
    guest = _opened_by_guest(around)
    node = None if guest is None else guest.format_node(path)
    if node is not None:
        found = node['image']
    elif os.path.exists(path):
        found = disks_.image_info(disks_.Layer(path, 'qcow2'))
    else:
        found = {}
    return any(snapshot['name'] == name
               for snapshot in found.get('snapshots', ()))


def _delete_snapshot(around: undo.Surroundings, path: str,
                     name: str) -> None:
    guest = _opened_by_guest(around)
    if guest is None:
        _qemu_img_snapshot(around, '-d', name, path)
        return
    node = guest.format_node(path)
    if node is not None:
        # virDomainSnapshotDelete answers 0 and does nothing where a raw
        # disk is attached as well (libvirt 9.0, which ignores what HMP's
        # delvm answers).
        guest.activate_disks()
        guest.monitor('blockdev-snapshot-delete-internal-sync',
                      device=node['node-name'], name=name)


def _qemu_img_snapshot(around: undo.Surroundings, action: str, name: str,
                       path: str) -> None:
    """Make (-c) or delete (-d) an internal snapshot of a disk not in use."""
    status = os.stat(path)
    borrowed = not os.access(path, os.W_OK)
    if borrowed:
        # libvirt gives the disk of a stopped guest to root where it could
        # not remember whose it was.
        around.host.chown(os.path.realpath(path), os.getuid(), -1)
    try:
        qemu_img.run('snapshot', action, name, disks_.json_name(
            disks_.layer_options(disks_.Layer(path, 'qcow2'))
            | _TABLE_CACHES))
    finally:
        if borrowed:
            around.host.chown(os.path.realpath(path), status.st_uid, -1)


class ColdFlow(base.Flow):
    """Touches the guest, for the moment that it is stopped, and its disks'
    tables of internal snapshots."""

    def obstacle(self, guest: guests.Guest, disks: base.Disks,
                 request: requests.Request) -> str | None:
        state = guest.state()
        if state is guests.State.OTHER:
            return f'the guest is {state.value}'
        why = base.why_not_readable(disks)
        if why is not None:
            return why
        if state is guests.State.SHUTOFF:
            return None
        return self._obstacle_to_stopping(guest, request)

    def _obstacle_to_stopping(self, guest: guests.Guest,
                              request: requests.Request) -> str | None:
        if not request.may_stop:
            return ('it would stop a guest that Nova owns, which Nova might '
                    'then power off for good')
        if request.quiesce is requests.Quiesce.REQUIRED:
            return ('the guest must be quiesced (os_require_quiesce), and '
                    'is stopped instead')
        if not guest.is_persistent():
            return 'the guest is transient: stopped, it would be gone'
        if guest.job_under_way():
            return 'another job of the guest is under way'
        for disk in guest.disks():
            job = guest.block_job(disk.target)
            if job is not None:
                return f'{disk.target} has a block job ({job.kind})'
        why = guest.why_not_savable()
        if why is not None:
            return why
        needed = guest.memory_bytes()
        free = workspace.free_bytes(request.managed_save_directory)
        if free < needed:
            return (f'its memory may take {needed} bytes in '
                    f'{request.managed_save_directory}, where {free} are '
                    f'free')
        return None

    @contextlib.contextmanager
    def freeze(
            self, guest: guests.Guest, disks: base.Disks,
            request: requests.Request, log: undo.UndoLog,
    ) -> collections.abc.Iterator[frozen.Frozen]:
        sources = [_Source(guest, disk) for disk in disks]
        pause = frozen.Pause()
        with contextlib.ExitStack() as stack:
            stack.enter_context(log.scope())
            sockets = workspace.make_directory(request.state_directory, log)
            guest_waits = False
            if guest.state() is guests.State.SHUTOFF:
                consistency = _consistency_of_stopped(guest)
            else:
                consistency = frozen.Consistency.CRASH
                back = _stop(guest, log, pause)
                if all(source.hold_internally(log) for source in sources):
                    back()
                else:
                    guest_waits = True
                    stack.callback(back)
            # Whatever reading leaves behind is undone before the guest is
            # started, where it is still off.
            stack.enter_context(log.scope())
            yield frozen.Frozen(
                tuple(stack.enter_context(source.serving(sockets, log))
                      for source in sources),
                consistency, pause, guest_waits)


def _consistency_of_stopped(guest: guests.Guest) -> frozen.Consistency:
    if guest.was_shut_down() and not guest.has_managed_save():
        return frozen.Consistency.STOPPED
    return frozen.Consistency.CRASH


def _stop(guest: guests.Guest, log: undo.UndoLog,
          pause: frozen.Pause) -> collections.abc.Callable[[], None]:
    """Take the guest's host devices, save its memory and stop it.

    :returns: what brings all of it back
    """
    way_back = []
    for device in guest.host_devices():
        way_back.append(log.push(attach_device, device=device))
        guest.detach(device)
    start = log.push(start_guest)
    pause.begin()
    guest.save_memory()

    def back() -> None:
        start.run()
        pause.end()
        for entry in reversed(way_back):
            entry.run()
    return back


class _Source:
    """One disk, and how it is read while it is frozen."""

    def __init__(self, guest: guests.Guest, disk: disks_.Disk) -> None:
        # Asked while it runs: libvirt knows the chain then.
        self._chain = disks_.chain_of(disk)
        self._capacity = guest.capacity(disk.target)
        self._target = disk.target
        self._snapshot: str | None = None

    def hold_internally(self, log: undo.UndoLog) -> bool:
        """Make an internal snapshot, if the disk can hold one."""
        top = self._chain[0]
        if top.format != 'qcow2' or top.block:
            return False
        name = f'snapshot-ext-{uuid.uuid4().hex}'
        log.push(delete_internal_snapshot, path=top.path, name=name)
        _qemu_img_snapshot(log.surroundings, '-c', name, top.path)
        self._snapshot = name
        return True

    def serving(
            self, sockets: str, log: undo.UndoLog,
    ) -> contextlib.AbstractContextManager[frozen.FrozenDisk]:
        options = disks_.chain_options(self._chain)
        if self._snapshot is not None:
            # The guest holds the locks of the file; the clusters of an
            # internal snapshot are not written as long as it exists.
            options['force-share'] = True
            options['file']['locking'] = 'off'
        for layer in self._chain:
            self._make_readable(layer, log)
        return qemu_nbd.serving(
            options, os.path.join(sockets, self._target), self._target,
            self._capacity, log, self._snapshot)

    def _make_readable(self, layer: disks_.Layer,
                       log: undo.UndoLog) -> None:
        if not layer.block or os.access(layer.path, os.R_OK):
            return
        path = os.path.realpath(layer.path)
        status = os.stat(path)
        log.push(restore_owner, path=path, uid=status.st_uid,
                 gid=status.st_gid)
        log.surroundings.host.chown(path, os.getuid(), -1)
