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

"""The flow ``backup``: a running guest's disks, frozen by a backup job.

The guest runs on, and nothing of the disk is copied on the host but what the
guest overwrites meanwhile.
"""

import collections.abc
import contextlib

from nova_snapshot_ext import backup_job
from nova_snapshot_ext.flows import base
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import quiesce
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo


class BackupFlow(base.Flow):
    """Touches the guest for the instant, and writes what it overwrites
    into the scratch directory."""

    def obstacle(self, guest: guests.Guest, disks: base.Disks,
                 request: requests.Request) -> str | None:
        return (base.why_no_job_can_start(guest, disks)
                or quiesce.obstacle(guest, request)
                or backup_job.obstacle(guest, disks, request))

    @contextlib.contextmanager
    def freeze(
            self, guest: guests.Guest, disks: base.Disks,
            request: requests.Request, log: undo.UndoLog,
    ) -> collections.abc.Iterator[frozen.Frozen]:
        pause = frozen.Pause()
        with (log.scope(),
              backup_job.prepared(guest, disks, request, log) as job):
            with quiesce.quiesced(guest, request, log, pause) as outcome:
                job.begin()
            yield job.frozen(outcome.consistency, pause)
