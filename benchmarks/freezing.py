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

"""A guest's disk, frozen by the flow ``backup`` without Nova."""

import collections.abc
import contextlib
import pathlib
import time
import typing

import libvirt
from oslo_config import cfg

from benchmarks import cloud as clouds
from benchmarks import console
from benchmarks import guests
from benchmarks import results
from nova_snapshot_ext import conf as confs
from nova_snapshot_ext.flows import backup
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as our_guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo

_URI = 'qemu:///system'
#: seconds in which the guest writes as it likes
_BETWEEN_S = 1.0


def settings() -> typing.Any:
    """[snapshot_ext] as it is where nobody sets anything."""
    configuration = cfg.ConfigOpts()
    confs.register_opts(configuration)
    configuration([], default_config_files=[])
    return configuration.snapshot_ext


def _request(directory: pathlib.Path) -> requests.Request:
    options = settings()
    where = str(directory)
    return requests.Request(
        image_format='qcow2', compress=False,
        quiesce=requests.Quiesce.IF_POSSIBLE,
        staging_directory=where, staging_setting='staging',
        scratch_directory=where, state_directory=where,
        socket_directory=where,
        managed_save_directory=where,
        freeze_timeout=options.freeze_timeout,
        copy_timeout=options.copy_timeout,
        convert_timeout=options.convert_timeout)


@contextlib.contextmanager
def frozen_by_backup(cloud: clouds.Cloud, guest: guests.Guest,
                     ) -> collections.abc.Iterator[frozen.Frozen]:
    """Have the root disk frozen."""
    request = _request(cloud.work)
    # libvirt prints errors by itself if it is let.
    libvirt.registerErrorHandler(lambda context, error: None, None)
    connection = libvirt.open(_URI)
    try:
        domain = our_guests.Guest.find(
            connection, _URI, str(guest.server.id))
        with undo.UndoLog.create(
                request.state_directory, domain, hosts.PlainHost()) as log:
            flow = backup.BackupFlow()
            with flow.freeze(
                    domain, (domain.root_disk(),), request, log) as disks:
                yield disks
    finally:
        connection.close()


def measure(cloud: clouds.Cloud, guest: guests.Guest,
            ) -> results.Freeze:
    """Freeze a guest that writes, and thaw it at once."""
    with console.Follower(guest.console) as follower:
        time.sleep(_BETWEEN_S)
        began = time.monotonic()
        with frozen_by_backup(cloud, guest) as disks:
            pause_s = disks.pause.seconds
            frozen_at = time.monotonic()
        follower.wait_past(frozen_at, 60)
    return results.Freeze(
        guest.data_gib, pause_s,
        console.longest_silence(follower.moments, began, frozen_at))
