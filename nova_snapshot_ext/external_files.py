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

"""The files of external snapshots: overlays, made of what is below them.

They are beside the disk that they are of, and their names say whose they are.
No other file is ever deleted.
"""

import contextlib
import os
import re
import stat
import time

from nova_snapshot_ext import disk as disks_
from nova_snapshot_ext import exception
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext import qemu_img

FORMAT = 'qcow2'
_MEMORY = '.memory'
_TARGET = '[A-Za-z0-9]{1,12}'
# How long QEMU may take to close one that a job of its has ended with.
_CLOSE_TIMEOUT_S = 10.0
_POLL_S = 0.1
#: of the name of an empty file beside an overlay that is kept by it
KEPT = '.in-use'
_OVERLAY = re.compile(r'snapshot-ext-[0-9a-f]{32}\.' + _TARGET)


def has_file_name(target: str) -> bool:
    """Whether a disk's name can be part of a file's."""
    return re.fullmatch(_TARGET, target) is not None


def overlay_beside(path: str, name: str, target: str) -> str:
    """The path of a disk's overlay.

    :param path: of the disk
    :param name: of a snapshot
    """
    return os.path.join(os.path.dirname(path), f'{name}.{target}')


def memory_beside(path: str, name: str) -> str:
    """The path of the file with a snapshot's memory."""
    return os.path.join(os.path.dirname(path), f'{name}{_MEMORY}')


def is_ours(path: str) -> bool:
    """Whether a file was made for a snapshot."""
    return _OVERLAY.fullmatch(os.path.basename(path)) is not None


def overlays_in(directory: str) -> list[str]:
    """The paths of all overlays that were made there, whosever they are."""
    return sorted(
        entry.path for entry in os.scandir(directory)
        if is_ours(entry.path) and not entry.name.endswith(_MEMORY)
        and entry.is_file(follow_symlinks=False))


def why_not_given(path: str) -> str | None:
    """Why an overlay can't belong to whom a disk does, None if it can.

    :param path: of what the guest's disk is now
    """
    status = os.stat(path)
    if os.geteuid() == 0 or (
            status.st_uid == os.geteuid()
            and status.st_gid in (os.getegid(), *os.getgroups())):
        return None
    return (f'user {os.geteuid()} can not give an overlay to user '
            f'{status.st_uid} and group {status.st_gid}, whom {path} belongs '
            f'to')


def create_overlay(path: str, below: disks_.Layer, capacity: int, like: str,
                   host: hosts.Host) -> None:
    """Make an overlay, in which nothing is written yet.

    libvirt gives it to QEMU's user, and nobody does where ``qemu.conf`` has
    ``dynamic_ownership = 0``: then QEMU can open what its disk allows it to.

    :param below: what it is based on, which is not opened: its guest may have
        it open
    :param capacity: of the disk, in bytes
    :param like: path of what the guest's disk is now, which it belongs with
    """
    qemu_img.run('create', '-q', '-u', '-f', FORMAT, '-F', below.format,
                 '-b', below.path, path, str(capacity))
    status = os.stat(like)
    # Who else may read is for who may have it all.
    everybody = stat.S_IRWXO if status.st_mode & stat.S_IWOTH else 0
    os.chmod(path, status.st_mode & (stat.S_IRWXG | everybody) & 0o666
             | stat.S_IRUSR | stat.S_IWUSR)
    made = os.stat(path)
    if (made.st_uid, made.st_gid) != (status.st_uid, status.st_gid):
        host.give_disk(os.path.realpath(path), status.st_uid, status.st_gid)


def base_of(path: str) -> str | None:
    """What an overlay of ours is based on, None if it can't be said."""
    try:
        return disks_.chain_from_headers(
            disks_.Layer(path, FORMAT))[1].path
    except (exception.SnapshotError, IndexError):
        return None


def delete(path: str) -> None:
    """Delete a file of a snapshot that nobody has open.

    :raises NotOurs: if it is none
    :raises UndoFailed: if somebody has it open
    """
    if not is_ours(path):
        raise exception.NotOurs(path, 'it was made for no snapshot')
    if not os.path.lexists(path):
        return
    if not path.endswith(_MEMORY):
        _check_closed(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _check_closed(path: str) -> None:
    """:raises UndoFailed: if QEMU has it open, whatever libvirt says, or once
        had

    libvirtd may have died when QEMU had begun to write there and libvirt did
    not know it yet. Then it holds what the guest has written, also when the
    guest is off.
    """
    if os.path.exists(path + KEPT):
        raise exception.UndoFailed(
            f'{path} is not deleted: it was in use, though libvirt did not '
            f'know it ({path}{KEPT})')
    if not os.access(path, os.R_OK):
        raise exception.UndoFailed(
            f'{path} is not deleted: user {os.getuid()} can not see whether '
            f'it is in use')
    name = disks_.json_name(disks_.layer_options(disks_.Layer(path, FORMAT)))
    deadline = time.monotonic() + _CLOSE_TIMEOUT_S
    while True:
        try:
            # Other than all else here, it takes QEMU's locks.
            qemu_img.run('info', name, limits=qemu_img.INSPECT_LIMITS)
            return
        except exception.CommandFailed as error:
            if time.monotonic() > deadline:
                with open(path + KEPT, 'ab'):
                    pass
                raise exception.UndoFailed(
                    f'{path} is not deleted, it may be in use: {error}'
                ) from error
        time.sleep(_POLL_S)
