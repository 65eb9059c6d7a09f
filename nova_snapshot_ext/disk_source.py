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

"""A disk that is read by its path, as it is or as an internal snapshot."""

import contextlib
import os

from nova_snapshot_ext import borrowed
from nova_snapshot_ext import disk as disks_
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import qemu_nbd
from nova_snapshot_ext import undo


class DiskSource:
    """One disk, and how it is read while it is frozen."""

    def __init__(self, guest: guests.Guest, disk: disks_.Disk) -> None:
        """Asked while the guest runs, libvirt knows the chain of layers."""
        self._chain = disks_.chain_of(disk)
        self._capacity = guest.capacity(disk.target)
        self._target = disk.target
        self.path = self._chain[0].path
        #: the internal snapshot to read in place of the disk
        self.snapshot: str | None = None

    def serving(
            self, sockets: str, log: undo.UndoLog,
    ) -> contextlib.AbstractContextManager[frozen.FrozenDisk]:
        """:param sockets: a directory of ours"""
        options = disks_.chain_options(self._chain)
        if self.snapshot is not None:
            # The guest holds the locks of the file; the clusters of an
            # internal snapshot are not written as long as it exists.
            options['force-share'] = True
            options['file']['locking'] = 'off'
        for layer in self._chain:
            if layer.block and not os.access(layer.path, os.R_OK):
                borrowed.borrow(layer.path, log)
        return qemu_nbd.serving(
            options, os.path.join(sockets, self._target), self._target,
            self._capacity, log, self.snapshot)
