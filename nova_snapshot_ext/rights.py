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

"""Owners and modes of files, changed with no link followed.

What is looked at is what is changed: it is opened first, without its last
part being a link, and then known by its descriptor. So nobody who may write
where it lies can have something else changed in its place. Whoever calls
these may be root, and then they are the only thing between a path and any
file of the host.
"""

import collections.abc
import contextlib
import os
import re
import stat

from nova_snapshot_ext import exception

#: what the directories are called that a snapshot works in
PREFIX = 'snapshot-ext-'
_OURS = re.compile(re.escape(PREFIX) + '[0-9a-f]{8}')
#: other users may pass through it, but not list it
PASSABLE = 0o711


def is_ours(path: str) -> bool:
    """Whether a path is that of a directory that a snapshot works in."""
    return _OURS.fullmatch(os.path.basename(path)) is not None


def let_group_pass(path: str, gid: int) -> None:
    """Let a group pass through a directory of ours that was just made.

    :raises NotOurs: if it is no such directory
    """
    with opened(path, os.O_DIRECTORY) as descriptor:
        _check_private(descriptor, path)
        _change_owner(descriptor, path, -1, gid)


def take_socket(path: str) -> None:
    """Give a socket to whom its directory belongs, which is one of ours.

    :raises NotOurs: if it is no socket, or others may write where it lies
    """
    parent, name = os.path.split(path)
    with opened(parent, os.O_DIRECTORY) as directory:
        _check_private(directory, parent)
        with opened(name, within=directory) as descriptor:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                raise exception.NotOurs(path, 'it is not a socket')
            _check_lone(descriptor, path)
            _change_owner(
                descriptor, path, os.fstat(directory).st_uid, -1)


def give_disk(descriptor: int, path: str, uid: int, gid: int) -> None:
    """Change the owner of a guest's disk; -1 leaves one as it is.

    :param descriptor: of :func:`opened`
    :param path: for messages
    :raises NotOurs: if it is neither a file nor a block device
    """
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise exception.NotOurs(
            path, 'it is neither a file nor a block device')
    _check_lone(descriptor, path)
    _change_owner(descriptor, path, uid, gid)


def make_passable(path: str) -> None:
    """Make a directory that other users may pass through, if it is missing.

    One that is there is left as whoever made it wants it.
    """
    if not os.path.isdir(path):
        os.makedirs(path, mode=PASSABLE, exist_ok=True)
        set_mode(path, PASSABLE)


def make_owners(path: str) -> None:
    """Make such a directory, for whom the one that it is in belongs to."""
    parent, name = os.path.split(path)
    with opened(parent, os.O_DIRECTORY) as within:
        os.mkdir(name, mode=PASSABLE, dir_fd=within)
        with opened(name, os.O_DIRECTORY, within) as descriptor:
            owner = os.fstat(within)
            if os.fstat(descriptor).st_uid != os.geteuid():
                raise exception.NotOurs(path, 'another user made it')
            _change_owner(descriptor, path, owner.st_uid, owner.st_gid)


def set_mode(path: str, mode: int) -> None:
    """Change the mode of a directory of our own user.

    :raises OSError: if it can't be done
    """
    descriptor = os.open(
        path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def opened(path: str, flags: int = 0, within: int | None = None,
           ) -> collections.abc.Iterator[int]:
    """A descriptor of what a path leads to; its last part is no link.

    :param within: the descriptor of the directory that it is in
    :raises NotOurs: if it can't be had
    """
    try:
        descriptor = os.open(
            path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC | flags,
            dir_fd=within)
    except OSError as error:
        raise exception.NotOurs(path, str(error.strerror)) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _check_private(descriptor: int, path: str) -> None:
    if not is_ours(path):
        raise exception.NotOurs(path, 'no snapshot works there')
    if os.fstat(descriptor).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise exception.NotOurs(path, 'it is not for its owner alone')


def _check_lone(descriptor: int, path: str) -> None:
    if os.fstat(descriptor).st_nlink != 1:
        raise exception.NotOurs(path, 'it has other names as well')


def _change_owner(descriptor: int, path: str, uid: int, gid: int) -> None:
    # fchown() takes no O_PATH; this is the same file (proc(5), fd).
    try:
        os.chown(f'/proc/self/fd/{descriptor}', uid, gid)
    except OSError as error:
        raise exception.NotOurs(path, str(error.strerror)) from error
