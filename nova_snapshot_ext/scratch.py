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

"""The scratch of a backup job, kept from ever stopping its guest.

QEMU keeps there what the guest overwrites while its disk is frozen, before it
lets the guest overwrite it. A guest whose scratch has no room is paused, and
one whose scratch gives another error, such as an exhausted quota, is given
that error for its own write. So room is reserved ahead of the guest. What
can't be reserved tells in time: the job is ended, and the snapshot fails.
"""

import collections.abc
import contextlib
import ctypes
import errno
import os
import time

from oslo_log import log as logging

from nova_snapshot_ext import beside
from nova_snapshot_ext import exception
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import qemu_img
from nova_snapshot_ext import workspace

LOG = logging.getLogger(__name__)

#: libvirt's schema takes no other for the scratch of a pull mode backup
FORMAT = 'qcow2'
POLL_S = 0.1
# How often it is looked whether it takes writes at all, where that costs
# nothing: whatever the guest writes from then on may be an error of its disk.
_GLANCE_S = 0.02
# What is reserved ahead of a guest: so many times over what it wrote at most
# between two looks, and so much at least, for one that begins to write as
# fast as disks do.
_LOOKS_AHEAD = 2
_LEAST_AHEAD = 128 * 1024 ** 2
# So much more is reserved at a time at least: each time the file system is at
# work beside the guest.
_STEP = 32 * 1024 ** 2
# linux/falloc.h: allocate, beyond the end as well, and leave the size alone.
_FALLOC_FL_KEEP_SIZE = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
# How often it is asked for room that is there, which every file system that
# takes no writes refuses: an NFS client writes back what it holds of the file
# then.
_CHECK_S = 1.0
# What a file system answers that takes no more writes: it was found damaged,
# or its device is gone.
_BROKEN = (errno.EROFS, errno.EIO, errno.EUCLEAN, errno.ENODEV)


def most_bytes(capacity: int) -> int:
    """What the scratch of a disk can ever hold.

    Only what held data is kept, but by whole clusters of 64 KiB: how much of
    the host's disk the guest's data take now is no bound of that.

    :param capacity: the disk's size in bytes
    """
    tables = capacity // 500 + 1024 ** 2
    return capacity + tables


def least_bytes(capacity: int) -> int:
    """What is reserved for the scratch of a disk before a job begins."""
    return min(_LEAST_AHEAD, most_bytes(capacity))


class _File:
    """One disk's scratch, with room for what its guest may write next."""

    def __init__(self, path: str, capacity: int) -> None:
        qemu_img.run('create', '-q', '-f', FORMAT, path, str(capacity))
        self.path = path
        self._most = most_bytes(capacity)
        # libvirt gives the file to QEMU's user while the job runs.
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._size = self.held_bytes()
        self._growth = 0
        self._reserved = 0
        self._checked_at = float('-inf')

    def close(self) -> None:
        os.close(self._descriptor)

    def reserve_ahead(self) -> None:
        """:raises OSError: if the room can't be had, or not be used; what was
            reserved before stays
        """
        if time.monotonic() >= self._checked_at + _CHECK_S:
            self._checked_at = time.monotonic()
            self._check_writable()
        size = self.held_bytes()
        self._growth = max(self._growth, size - self._size)
        self._size = size
        ahead = max(_LEAST_AHEAD, self._growth * _LOOKS_AHEAD)
        wanted = min(size + ahead, self._most)
        if wanted > self._reserved:
            wanted = min(max(wanted, self._reserved + _STEP), self._most)
            try:
                self._reserve(wanted)
            except OSError as error:
                raise OSError(
                    error.errno, f'{self.path} holds {size} bytes, and can '
                    f'not be given room for {wanted - size} more: '
                    f'{os.strerror(error.errno or 0)}') from error

    def _reserve(self, length: int) -> None:
        try:
            _allocate(self._descriptor, self._reserved,
                      length - self._reserved)
            self._reserved = length
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            # Such as NFS before 4.2: what is free now has to do.
            if workspace.free_bytes(self.path) < length - self._size:
                raise OSError(errno.ENOSPC, '') from error

    def check_at_no_cost(self) -> None:
        """Write nothing, and see whether that is refused.

        ext4 and btrfs refuse it when they were found damaged; XFS looks at
        how much it is first.

        :raises OSError: if it is not written to any more
        """
        with self._broken_is_said():
            os.pwrite(self._descriptor, b'', 0)

    def _check_writable(self) -> None:
        """Ask for what is there, before the guest writes what can't be kept.

        statvfs() does not tell: since Linux 6.15 an ext4 that was found
        damaged only behaves as if it were read-only.
        """
        with self._broken_is_said():
            _allocate(self._descriptor, 0, 1)

    @contextlib.contextmanager
    def _broken_is_said(self) -> collections.abc.Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _BROKEN:
                raise OSError(
                    error.errno, f'{self.path} can not be written to any '
                    f'more: {os.strerror(error.errno)}') from error

    def held_bytes(self) -> int:
        """What QEMU has put into it; it fills a file from its start."""
        return os.fstat(self._descriptor).st_size


def _allocate(descriptor: int, offset: int, length: int) -> None:
    """Have a stretch of a file find its room (fallocate(2)).

    posix_fallocate() would make the file longer, or fill it with zeroes.
    """
    if _LIBC.fallocate(descriptor, _FALLOC_FL_KEEP_SIZE,
                       ctypes.c_int64(offset), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), '')


class Files:
    """The scratch files of one job."""

    def __init__(self, files: dict[str, _File]) -> None:
        """Use :func:`made`."""
        self._files = files
        #: by the disk's target
        self.paths = {target: file.path for target, file in files.items()}

    def held_bytes(self) -> int:
        """What QEMU has put into all of them."""
        return sum(file.held_bytes() for file in self._files.values())

    def reserve_ahead(self) -> None:
        """:raises OSError: if the room can't be had; it says which"""
        for file in self._files.values():
            file.reserve_ahead()

    def check_at_no_cost(self) -> None:
        """:raises OSError: if one is not written to any more"""
        for file in self._files.values():
            file.check_at_no_cost()


@contextlib.contextmanager
def made(directory: str, capacities: dict[str, int],
         ) -> collections.abc.Iterator[Files]:
    """Make the files for disks, with the room to begin with.

    Left to libvirt, QEMU would format them in the moment of the backup, where
    a statistics call beside can hit an assertion of QEMU 7.2 and kill the
    guest (qcow2_get_specific_info).

    :param capacities: of each disk's target, its size in bytes
    :raises FreezeFailed: if there is no room
    """
    with contextlib.ExitStack() as stack:
        files = {}
        for target, capacity in capacities.items():
            files[target] = _File(os.path.join(directory, target), capacity)
            stack.callback(files[target].close)
        found = Files(files)
        try:
            found.reserve_ahead()
        except OSError as error:
            raise exception.FreezeFailed(str(error.strerror)) from error
        yield found


class Watch:
    """Ends a guest's backup job in time; one thread of its own."""

    def __init__(self, guest: guests.Guest, files: Files,
                 socket: str) -> None:
        """:param socket: of the job, which need not have begun"""
        self._guest = guest
        self._files = files
        self._socket = socket
        self._lost: str | None = None
        self._looked_at = float('-inf')

    def why_lost(self) -> str | None:
        """Why the disks are not frozen any more, None while they are."""
        return self._lost

    def glance(self) -> bool:
        """Look, if it is time to; or else only at what costs nothing.

        :returns: whether there is anything left to watch
        """
        if time.monotonic() >= self._looked_at + POLL_S:
            self._looked_at = time.monotonic()
            return self.look()
        if self._lost is not None:
            return True     # its job could not be ended yet
        why = self._why_broken()
        if why is not None:
            self._end(why)
        return why is None

    def check(self) -> None:
        """Look at what costs nothing before the job is begun.

        :raises FreezeFailed: if the scratch does not take what is to come
        """
        why = self._lost or self._why_broken()
        if why is not None:
            raise exception.FreezeFailed(why)

    def _why_broken(self) -> str | None:
        try:
            self._files.check_at_no_cost()
        except OSError as error:
            return error.strerror
        return None

    def look(self) -> bool:
        """:returns: whether there is anything left to watch"""
        why = self._lost
        try:
            if why is None:
                self._files.reserve_ahead()
        except OSError as error:
            why = error.strerror
        if (why is None and self._guest.is_paused_by_io_error()
                and self._guest.backup_socket() == self._socket):
            why = 'The guest was paused by an I/O error'
        if why is not None:
            self._end(why)
        return why is None

    def _end(self, why: str) -> None:
        if self._lost is None:
            LOG.warning('The backup job of %s is ended: %s',
                        self._guest.name, why)
        self._lost = why
        end_job(self._guest, self._socket)


def end_job(guest: guests.Guest, socket: str) -> None:
    """End a guest's backup job; the guest goes on if its scratch paused it.

    In this order: with a job there, it would be paused again. It also goes
    on where the job is gone already: who ended it may not have lived to
    resume the guest, or not have known. A job of another is left alone, and
    so is a guest that it may have paused.

    :param socket: of the job
    """
    guest.end_backup(socket)
    if guest.is_paused_by_io_error() and guest.backup_socket() is None:
        try:
            guest.resume()
        except guests.LibvirtError:
            # The watch and the undo may do so at the same time.
            if guest.is_paused_by_io_error():
                raise


@contextlib.contextmanager
def watching(guest: guests.Guest, files: Files,
             socket: str) -> collections.abc.Iterator[Watch]:
    """Watch the scratch of a guest's backup job until the scope ends.

    :param socket: of the job, which need not have begun
    """
    watch = Watch(guest, files, socket)
    said = ''

    def look() -> bool:
        nonlocal said
        try:
            return watch.glance()
        except exception.GuestGone:
            return False
        except exception.SnapshotError as error:
            # libvirt is restarted, say: it is asked again.
            if str(error) != said:
                said = str(error)
                LOG.warning('The scratch of %s can not be looked after: %s',
                            guest.name, error)
            return True

    with beside.repeated(look, _GLANCE_S):
        yield watch
