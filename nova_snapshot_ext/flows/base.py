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

"""What a flow is: how a guest's disks are frozen at one instant."""

import abc
import collections.abc
import contextlib
import os

from nova_snapshot_ext import disk as disks_
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo

Disks = collections.abc.Sequence[disks_.Disk]


class Flow(abc.ABC):
    """A way to freeze; installed as ``nova_snapshot_ext.flows``.

    One instance serves any number of snapshots, also at the same time.
    """

    @abc.abstractmethod
    def obstacle(self, guest: guests.Guest, disks: Disks,
                 request: requests.Request) -> str | None:
        """Say why this flow can't serve, or None. Never touches the guest.

        :returns: words that an operator understands, to follow the flow's
            name
        :raises GuestGone: if there is no guest any more
        """

    @abc.abstractmethod
    def freeze(
            self, guest: guests.Guest, disks: Disks,
            request: requests.Request, log: undo.UndoLog,
    ) -> contextlib.AbstractContextManager[frozen.Frozen]:
        """Freeze the disks for as long as the context lasts.

        Whatever is changed or left behind has its undo pushed before; what
        is left of it in the log is run when the context ends, at the latest.
        The guest is in the state that it had when the context is entered,
        if the flow can freeze it so, and in any case when it is left.

        :raises GuestGone: if the guest vanished
        :raises SnapshotError: if the disks can't be frozen
        """

    def staging_bytes(self, disk: disks_.Disk, capacity: int) -> int:
        """Bytes that it may put into the staging directory for a disk.

        :param capacity: the disk's size in bytes
        """
        return 0


def _why_not_one_of_ours(disk: disks_.Disk) -> str | None:
    if disk.kind not in ('file', 'block'):
        return (f'{disk.target} is a {disk.kind} disk, not a file or a '
                f'block device')
    if not disk.path:
        return f'{disk.target} has no file or device in it'
    if disk.encrypted:
        return f'{disk.target} is encrypted: its image would hold plain text'
    if disk.shared:
        return (f'{disk.target} is shared: what other guests write to it can '
                f'not be frozen')
    return None


def why_not_readable(disks: Disks, below_top: bool = False) -> str | None:
    """Why disks can't be opened by their path, None if they can.

    A block device counts as readable: its owner can be changed for a while.

    :param below_top: look only at what the disks are based on
    :raises UnsafeDisk: if a header refers to what no guest may reach
    """
    for disk in disks:
        why = _why_not_one_of_ours(disk)
        if why is not None:
            return why
        for layer in disks_.chain_of(disk)[int(below_top):]:
            if not layer.block and not os.access(layer.path, os.R_OK):
                return (f'user {os.getuid()} can not read {layer.path}, '
                        f'which {disk.target} is made of')
    return None


def why_no_job_can_start(guest: guests.Guest, disks: Disks) -> str | None:
    """Why no job of ours can be started on a guest's disks, None if one can.

    Looked for first: libvirt would keep us waiting for half a minute where
    another job holds the guest.
    """
    state = guest.state()
    if state not in (guests.State.RUNNING, guests.State.PAUSED):
        return f'the guest is {state.value}'
    job = guest.job()
    if job is not None:
        return f'another job of the guest is under way: {job}'
    for disk in disks:
        why = _why_not_one_of_ours(disk)
        if why is not None:
            return why
        if disk.transient:
            return (f'{disk.target} is transient: what the guest wrote is '
                    f'not in it')
    return why_block_job(guest, disks)


def why_block_job(guest: guests.Guest, disks: Disks) -> str | None:
    """Which of disks has a block job, None if none has."""
    for disk in disks:
        job = guest.block_job(disk.target)
        if job is not None:
            return f'{disk.target} has a block job ({job.kind}) already'
        if guest.is_out_of_date(disk.target):
            return (f'libvirt does not know what {disk.target} is written to, '
                    f'since it died in the end of a block job: shut the '
                    f'guest down, and start it again')
    return None
