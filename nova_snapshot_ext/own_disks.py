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

"""Which disks are a guest's own: what a snapshot of all its disks is of.

Never a disk that the guest only reads (a CD-ROM, a config drive), and never a
volume: those have snapshots of their own, elsewhere.
"""

import dataclasses
import enum
import re

from nova_snapshot_ext import disk as disks_
from nova_snapshot_ext import external_files
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import request as requests


class Kind(enum.Enum):
    """What a disk is to its guest."""

    ROOT = 'root'
    #: Nova's, beside the root disk
    EPHEMERAL = 'ephemeral'
    SWAP = 'swap'
    #: another one, of a guest that is not Nova's
    DATA = 'data'


# How Nova names the file, or the logical volume, of a disk after that of the
# root disk (nova/virt/libvirt/blockinfo.py). Its config drive, .config, is
# none of them even where it is a disk; volumes have other names.
_OF_NOVA = {
    re.compile(r'eph[0-9]+|local'): Kind.EPHEMERAL,
    re.compile('swap'): Kind.SWAP,
}


@dataclasses.dataclass(frozen=True)
class OwnDisk:
    """A disk, and what it is to its guest."""

    disk: disks_.Disk
    kind: Kind


def chosen(guest: guests.Guest, which: requests.Disks,
           ) -> tuple[OwnDisk, ...]:
    """The disks that a snapshot is of, the root disk first.

    :raises UnsafeDisk: if there is none, or one whose name is no name
    """
    root = guest.root_disk()
    found = [OwnDisk(root, Kind.ROOT)]
    if which is requests.Disks.ALL:
        of_nova = guest.belongs_to_nova()
        disks = guest.disks()
        for disk in disks:
            kind = _kind(disk, root, of_nova)
            if disk.target != root.target and kind is not None:
                guests.check_name(guest.name, disk, disks)
                found.append(OwnDisk(disk, kind))
    return tuple(found)


def _kind(disk: disks_.Disk, root: disks_.Disk,
          of_nova: bool) -> Kind | None:
    """:returns: None if it is not the guest's own"""
    if disk.device != 'disk' or disk.readonly:
        return None
    if not of_nova:
        # One that no flow can serve is an obstacle, and not left out.
        is_there = disk.path or disk.kind not in ('file', 'block')
        return Kind.DATA if is_there else None
    prefix, _, name = _path_of_nova(disk).rpartition('.')
    if prefix != _path_of_nova(root):
        return None
    return next((kind for pattern, kind in _OF_NOVA.items()
                 if pattern.fullmatch(name)), None)


def _path_of_nova(disk: disks_.Disk) -> str:
    """Where Nova made a disk: below the overlays of external snapshots."""
    if not external_files.is_ours(disk.path):
        return disk.path
    return next((layer.path for layer in disks_.chain_of(disk)
                 if not external_files.is_ours(layer.path)), disk.path)
