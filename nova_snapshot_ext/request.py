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

"""One snapshot as it was asked for; flows and transfers read it."""

import collections.abc
import dataclasses
import enum
import typing

from nova_snapshot_ext import account as accounts
from nova_snapshot_ext import cancellation as cancellations


class Quiesce(enum.Enum):
    """Whether the guest agent is asked to freeze the file systems."""

    NEVER = 'never'
    IF_POSSIBLE = 'if possible'
    REQUIRED = 'required'


class Disks(enum.Enum):
    """Which disks of a guest a snapshot is of."""

    ROOT = 'root'
    #: all that are the guest's own
    ALL = 'all'


#: called with the bytes done and the bytes expected, as often as one likes
Progress = collections.abc.Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """For whoever does not want to know."""


@dataclasses.dataclass(frozen=True)
class DomainSnapshot:
    """What the flow ``domain`` is to keep, and how much of it it may."""

    #: whether the memory of a guest that is up is part of it
    memory: bool = True
    #: in files of its own, and not within those of the disks
    external: bool = False
    #: of the image that is made, where it is known by now
    image_id: str = ''
    title: str = ''
    #: what is kept with it; of JSON's types
    extra: dict[str, typing.Any] = dataclasses.field(default_factory=dict)
    #: how many of one guest are kept
    most: int = 8
    #: GiB that a guest's disks may take beyond their size for another one to
    #: be taken, 0 for no such limit
    most_gb: int = 100


@dataclasses.dataclass(frozen=True)
class Request:
    """What is wanted, what is allowed, and where there is room for it."""

    #: ``qcow2``, ``raw``, ``vmdk`` or ``vdi``
    image_format: str
    #: whether the image's data are compressed (qcow2 only)
    compress: bool
    quiesce: Quiesce
    #: where image files may be written
    staging_directory: str
    #: how whoever set staging_directory knows it
    staging_setting: str
    #: where a backup job keeps what the guest overwrites meanwhile
    scratch_directory: str
    #: where undo logs are kept
    state_directory: str
    #: where sockets are made that disks are read from
    socket_directory: str
    #: where libvirt saves memory
    managed_save_directory: str
    #: seconds
    freeze_timeout: int
    copy_timeout: int
    convert_timeout: int
    #: whether a running guest may be stopped for a moment
    may_stop: bool = True
    #: flows that are switched off elsewhere, with the reason
    disabled_flows: dict[str, str] = dataclasses.field(default_factory=dict)
    progress: Progress = no_progress
    #: ends the snapshot early
    cancellation: cancellations.Cancellation = dataclasses.field(
        default_factory=cancellations.Cancellation)
    #: ``live``, if it may serve where the scratch of ``backup`` ran short
    #: of room; else ``fail``
    on_scratch_full: str = 'fail'
    #: an interpreter that has libnbd's binding
    mover_python: str = '/usr/bin/python3'
    #: MiB of a guest's disk that are moved in a second at most, 0 for all
    bandwidth: int = 0
    #: per cent of its speed that the guest's disk keeps meanwhile, 0 if the
    #: snapshot comes first
    guest_share: int = 0
    #: seconds in which whatever serves a frozen disk must answer
    read_timeout: int = 300
    #: seconds that saving a guest's memory may take
    save_timeout: int = 3600
    domain: DomainSnapshot = DomainSnapshot()
    disks: Disks = Disks.ROOT
    #: what ties the images of all disks together, '' for a new id
    group: str = ''
    #: what is done is put down here
    account: accounts.Account = dataclasses.field(
        default_factory=accounts.Account)
