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

"""All that nova-compute has done as root for us, and why.

Functions of Nova's own privsep context (``nova.privsep.sys_admin_pctxt``),
run by the daemon that Nova has for it: no other rights, and no other rule of
rootwrap or sudo. What they are given is checked in the daemon: whoever has
only the rights of Nova's user decides nothing there. Root opens, reads and
writes no file for us, and runs no program; it changes owners, of

#. directories in which QEMU, which runs as another user, writes the scratch
   of a backup job, the overlay of a block copy, and the job's socket. Nova's
   user is not in QEMU's group. (:func:`let_group_pass`)
#. the socket that QEMU makes for a backup job: only its owner may connect.
   (:func:`take_socket`)
#. disks of servers that are off: a logical volume belongs to root, and so
   does a file where libvirt could not remember whose it was. They are
   borrowed to be read, or for an internal snapshot, and given back.
   (:func:`give_disk`)
"""

import collections.abc
import os
import re
import stat
import typing

import nova.conf
import nova.privsep

from nova_snapshot_ext import exception
from nova_snapshot_ext import rights

CONF = nova.conf.CONF

_Parameters = typing.ParamSpec('_Parameters')
_UUID = re.compile('-'.join(
    f'[0-9a-f]{{{digits}}}' for digits in (8, 4, 4, 4, 12)))
#: how the device mapper calls a volume that Nova made for a server: VG-LV,
#: with the hyphens within either doubled (lvm(8), Nova's Lvm image backend)
_VOLUME = re.compile('.+-' + _UUID.pattern.replace('-[', '--[')
                     + '_disk[^/]*')


def _as_root(function: collections.abc.Callable[_Parameters, None],
             ) -> collections.abc.Callable[_Parameters, None]:
    # The daemon finds it by the name of its module, which must begin as
    # Nova's do.
    run: collections.abc.Callable[_Parameters, None] = (
        nova.privsep.sys_admin_pctxt.entrypoint(function))
    return run


@_as_root
def let_group_pass(path: str, gid: int) -> None:
    """:param path: of a directory that a snapshot works in, which nobody
        but its owner may enter
    """
    rights.let_group_pass(path, gid)


@_as_root
def take_socket(path: str) -> None:
    """:param path: in such a directory, whose owner gets it"""
    rights.take_socket(path)


@_as_root
def give_disk(path: str, uid: int, gid: int) -> None:
    """:param path: a file in a server's directory below [DEFAULT]
        instances_path, or a logical volume that Nova made for a server
    """
    with rights.opened(path) as descriptor:
        status = os.fstat(descriptor)
        if stat.S_ISBLK(status.st_mode):
            if not _VOLUME.fullmatch(_name_of(status.st_rdev)):
                raise exception.NotOurs(
                    path, 'it is not a volume of a server')
            rights.give_disk(descriptor, path, uid, gid)
            return
    directory, name = os.path.split(path)
    instances, uuid = os.path.split(directory)
    if not (_UUID.fullmatch(uuid) and os.path.realpath(instances)
            == os.path.realpath(CONF.instances_path)):
        raise exception.NotOurs(path, f'it is not in the directory of a '
                                f'server in {CONF.instances_path}')
    # From here on by descriptors: what was looked at above may be another
    # file by now.
    with (rights.opened(os.path.realpath(CONF.instances_path),
                        os.O_DIRECTORY) as top,
          rights.opened(uuid, os.O_DIRECTORY, top) as within,
          rights.opened(name, within=within) as descriptor):
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise exception.NotOurs(path, 'it is not a file')
        rights.give_disk(descriptor, path, uid, gid)


def _name_of(device: int) -> str:
    """The device mapper's name of a device, '' if it is none of LVM's."""
    directory = f'/sys/dev/block/{os.major(device)}:{os.minor(device)}/dm'
    try:
        with (open(f'{directory}/uuid') as uuid,
              open(f'{directory}/name') as name):
            return name.read().strip() if uuid.read().startswith(
                'LVM-') else ''
    except OSError:
        return ''
