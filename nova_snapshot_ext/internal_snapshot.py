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

"""Internal snapshots of qcow2 files, made while their guest is off.

A file can be made as one of them is, then. They are deleted whether the guest
runs or not, and it is looked whether they are gone.
"""

import collections.abc
import contextlib
import os
import re
import time
import uuid

from oslo_log import log as logging

from nova_snapshot_ext import borrowed
from nova_snapshot_ext import disk as disks_
from nova_snapshot_ext import exception
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import power
from nova_snapshot_ext import processes
from nova_snapshot_ext import qemu_img
from nova_snapshot_ext import undo

LOG = logging.getLogger(__name__)

_NAME = re.compile('snapshot-ext-[0-9a-f]{32}')
# Its guest is off meanwhile: after so many seconds it does better without.
_TIMEOUT_S = 600
# A snapshot counts every cluster anew, while the guest is stopped. QEMU's own
# caches hold the tables of 256 GiB; these hold those of 1 TiB in use, and
# take memory only as they fill.
_TABLE_CACHES = {'l2-cache-size': 128 * 1024 ** 2,
                 'refcount-cache-size': 64 * 1024 ** 2}


def possible(disk: disks_.Disk) -> bool:
    """Whether a disk can hold one."""
    return disk.format == 'qcow2' and not disk.block


def make(path: str, log: undo.UndoLog) -> str:
    """Make one in a file that nobody has open.

    :returns: its name
    """
    name = new_name()
    with _borrowed(path, log):
        log.push(delete_internal_snapshot, path=path, name=name)
        _qemu_img_snapshot('-c', name, path)
    return name


def new_name() -> str:
    return f'snapshot-ext-{uuid.uuid4().hex}'


def make_named(path: str, name: str, log: undo.UndoLog) -> None:
    """Make one in a file that nobody has open.

    :param name: that the log says by now how to delete
    """
    with _borrowed(path, log):
        _qemu_img_snapshot('-c', name, path)


def apply_named(path: str, name: str, log: undo.UndoLog) -> None:
    """Make a file that nobody has open as it was.

    :param name: of the internal snapshot
    """
    with _borrowed(path, log):
        _qemu_img_snapshot('-a', name, path)


@contextlib.contextmanager
def _borrowed(path: str,
              log: undo.UndoLog) -> collections.abc.Iterator[None]:
    with contextlib.ExitStack() as stack:
        if not os.access(path, os.W_OK):
            # libvirt gives the disk of a stopped guest to root where it could
            # not remember whose it was.
            stack.callback(borrowed.borrow(path, log).run)
        yield


@undo.step
def delete_internal_snapshot(around: undo.Surroundings, path: str,
                             name: str) -> None:
    """Delete it, by QEMU's monitor or qemu-img, and see that it is gone.

    What a dead owner left at making or deleting it is ended first: it could
    still make it when it was looked for.

    The disk of a guest that is gone is left alone: it may be deleted at this
    moment, or another host's by now.

    :param name: as :func:`make` gives them
    :raises SnapshotError: if it is still there
    """
    check_name(name)
    if around.owner_died:
        end_qemu_img(name)
    for _ in range(5):
        # The guest may start, stop or go meanwhile: then the other way is
        # the right one, and the next round takes it.
        try:
            with as_it_is(around) as guest:
                if power.is_gone(around) or (
                        not has_snapshot(guest, path, name)):
                    return
                _delete_snapshot(around, guest, path, name)
        except exception.GuestElsewhere as error:
            if not power.is_gone(around):
                raise
            LOG.warning('%s, and is not here any more: if its disk %s went '
                        'with it, the internal snapshot %s is still in '
                        'there, and nobody deletes it', error, path, name)
            return
        except exception.UndoFailed:
            raise       # somebody else is at work on the guest
        except exception.SnapshotError as error:
            LOG.debug('Deleting snapshot %s of %s: %s', name, path, error)
            time.sleep(0.2)
    with as_it_is(around) as guest:
        if not power.is_gone(around) and has_snapshot(guest, path, name):
            raise exception.UndoFailed(
                f'The internal snapshot {name} of {path} can not be deleted')


def is_ours(name: str) -> bool:
    """Whether a name is that of a snapshot of ours."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> None:
    """:raises ValueError: if it is not the name of a snapshot of ours"""
    if not is_ours(name):
        raise ValueError(f'{name} is not a snapshot of ours')


def end_qemu_img(name: str) -> None:
    """End what a dead owner left at work on a snapshot, and no QEMU that was
    started from it."""
    processes.end(name, 'qemu-img', program='qemu-img')


def apply_again(around: undo.Surroundings, path: str, name: str) -> None:
    """Make the disk of a guest that is off as it was, if it still has the
    snapshot; what a dead owner left at work on it is ended first.

    :param name: of the internal snapshot
    """
    check_name(name)
    if around.owner_died:
        end_qemu_img(name)
    if has_snapshot(None, path, name):
        with own(around, path):
            _qemu_img_snapshot('-a', name, path)


@contextlib.contextmanager
def as_it_is(around: undo.Surroundings,
             ) -> collections.abc.Iterator[guests.Guest | None]:
    """Give a guest that is on; have one that is not stay so, and give None.

    One that is being rebooted by Nova is off and gone for a while; and its
    start would fail while qemu-img has its disk open.

    :raises UndoFailed: if it can't be had
    """
    guest = power.running_guest(around)
    if guest is not None:
        yield guest
        return
    with around.host.undisturbed():
        yield power.running_guest(around)


def has_snapshot(guest: guests.Guest | None, path: str, name: str) -> bool:
    """:param guest: None if it is off"""
    node = None if guest is None else guest.format_node(path)
    if node is not None:
        found = node['image']
    elif os.path.exists(path):
        found = disks_.image_info(disks_.Layer(path, 'qcow2'))
    else:
        found = {}
    return any(snapshot['name'] == name
               for snapshot in found.get('snapshots', ()))


def _delete_snapshot(around: undo.Surroundings, guest: guests.Guest | None,
                     path: str, name: str) -> None:
    """:param guest: None if it is off"""
    if guest is None:
        with own(around, path):
            _qemu_img_snapshot('-d', name, path)
        return
    node = guest.format_node(path)
    if node is not None:
        # virDomainSnapshotDelete answers 0 and does nothing where a raw
        # disk is attached as well (libvirt 9.0, which ignores what HMP's
        # delvm answers).
        guest.activate_disks()
        guest.monitor('blockdev-snapshot-delete-internal-sync',
                      device=node['node-name'], name=name)


@contextlib.contextmanager
def own(around: undo.Surroundings,
        path: str) -> collections.abc.Iterator[None]:
    """Have a disk whose guest was stopped, and that libvirt gave to root.

    Should this process die in here, it stays this user's until libvirt takes
    it for the guest again.
    """
    status = os.stat(path)
    taken = not os.access(path, os.W_OK)
    if taken:
        around.host.give_disk(os.path.realpath(path), os.getuid(), -1)
    try:
        yield
    finally:
        if taken:
            around.host.give_disk(os.path.realpath(path), status.st_uid, -1)


def _qemu_img_snapshot(action: str, name: str, path: str) -> None:
    """Make (-c) an internal snapshot of a disk not in use, go back to (-a) or
    delete (-d) it."""
    qemu_img.run('snapshot', action, name, disks_.json_name(
        disks_.layer_options(disks_.Layer(path, 'qcow2')) | _TABLE_CACHES),
        timeout=_TIMEOUT_S)
