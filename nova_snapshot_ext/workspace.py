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

"""Directories that a snapshot works in, gone when it ends."""

import os
import secrets
import shutil

from nova_snapshot_ext import exception
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import rights
from nova_snapshot_ext import undo

#: how long the path of a directory may be that holds sockets: their own is
#: limited to 107 bytes (unix(7)), and has our directory and a disk's name
MAX_SOCKET_PARENT = 107 - len(f'/{rights.PREFIX}01234567/') - 12


@undo.step
def remove_directory(around: undo.Surroundings, path: str) -> None:
    if not rights.is_ours(path):
        raise ValueError(f'{path} is not a directory of ours')
    shutil.rmtree(path, ignore_errors=not os.path.lexists(path))


def make_directory(parent: str, log: undo.UndoLog,
                   group: int | None = None) -> str:
    """A new directory for this process alone.

    :param parent: the directory that it is made in
    :param group: the id of a group that may pass through it, but not list
        it: that of QEMU, for files that it opens by their path
    :returns: its path
    """
    path = os.path.join(parent, rights.PREFIX + secrets.token_hex(4))
    log.push(remove_directory, path=path)
    os.mkdir(path, mode=0o700)
    if group is not None:
        log.surroundings.host.let_group_pass(path, group)
        rights.set_mode(path, 0o710)
    return path


def make_socket_directory(request: requests.Request, log: undo.UndoLog,
                          group: int | None = None) -> str:
    """As :func:`make_directory`, for sockets."""
    parent = request.socket_directory
    rights.make_passable(parent)
    return make_directory(parent, log, group)


def check_directory(path: str, setting: str) -> None:
    """:raises InvalidSetting: if it is not a directory we can write to

    :param setting: how whoever set it knows it
    """
    if not os.path.isdir(path):
        raise exception.InvalidSetting(
            setting, path, 'it must be an existing directory')
    if not os.access(path, os.W_OK | os.X_OK):
        raise exception.InvalidSetting(
            setting, path, f'user {os.getuid()} can not write there')


def check_socket_parent(path: str) -> None:
    """:raises InvalidSetting: if sockets can't be made below it

    The state directory counts where it is not set.
    """
    setting = '[snapshot_ext] socket_directory'
    if len(os.fsencode(path)) > MAX_SOCKET_PARENT:
        raise exception.InvalidSetting(
            setting, path,
            f'it must not be longer than {MAX_SOCKET_PARENT} bytes')
    if os.path.lexists(path):
        check_directory(path, setting)
        return
    parent = os.path.abspath(path)
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise exception.InvalidSetting(
            setting, path, f'user {os.getuid()} can not make it')


def why_qemu_can_not_pass(path: str, uid: int | None) -> str | None:
    """Why QEMU can't reach the sockets that it makes below a directory.

    Seen is only what keeps out everybody but its owner. Its mode is its
    owner's to choose; one that is missing is made right.

    :param uid: that QEMU runs as, None if it is not known
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    if status.st_mode & 0o011 or status.st_uid == uid:
        return None
    return str(exception.InvalidSetting(
        '[snapshot_ext] socket_directory', path,
        f'its mode {status.st_mode & 0o777:o} lets nobody but its owner '
        f'pass, and QEMU has to (chmod o+x)'))


def free_bytes(path: str) -> int:
    """What an ordinary user may still write where path is, or would be.

    A directory that can't be looked at counts as its nearest parent.
    """
    path = os.path.abspath(path)
    while True:
        try:
            room = os.statvfs(path)
            return room.f_bavail * room.f_frsize
        except (FileNotFoundError, PermissionError):
            if path == '/':
                raise
            path = os.path.dirname(path)
