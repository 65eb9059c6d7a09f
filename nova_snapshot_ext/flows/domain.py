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

"""The flow ``domain``: a snapshot that stays, and can be rolled back to.

A domain snapshot of the guest is taken, with its memory or without: internal
in its qcow2 files, or, without Nova, of files of its own. The image is read
from it while the guest runs on. Once the image is whole the snapshot stays.
"""

import collections.abc
import contextlib

from nova_snapshot_ext import disk_source
from nova_snapshot_ext import domain_obstacles
from nova_snapshot_ext import domain_snapshot
from nova_snapshot_ext import external_rollback  # noqa: F401 # undo steps
from nova_snapshot_ext import external_snapshot
from nova_snapshot_ext.flows import base
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import quiesce
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo
from nova_snapshot_ext import workspace


class DomainFlow(base.Flow):
    """Touches the guest for as long as its memory is saved, and its disks."""

    def obstacle(self, guest: guests.Guest, disks: base.Disks,
                 request: requests.Request) -> str | None:
        state = guest.state()
        if state is guests.State.OTHER:
            return f'the guest is {state.value}'
        if not guest.is_persistent():
            return 'the guest is transient: it could not go back'
        if request.domain.external:
            return external_snapshot.obstacle(guest, disks, request)
        held = domain_snapshot.held_disks(guest)
        targets = {disk.target for disk in held}
        for disk in disks:
            if disk.target not in targets:
                return (f'{disk.target} can not hold an internal snapshot: '
                        f'that takes a qcow2 file which is not shared, '
                        f'transient or encrypted')
        up = state is not guests.State.SHUTOFF
        with_memory = up and request.domain.memory
        return ((base.why_no_job_can_start(guest, held) if up else None)
                or base.why_not_readable(disks)
                or (domain_obstacles.why_no_memory(guest, request)
                    if with_memory
                    else quiesce.obstacle(guest, request) if up else None)
                or domain_obstacles.why_no_room(
                    guest, held, with_memory, request))

    @contextlib.contextmanager
    def freeze(
            self, guest: guests.Guest, disks: base.Disks,
            request: requests.Request, log: undo.UndoLog,
    ) -> collections.abc.Iterator[frozen.Frozen]:
        with log.scope(), contextlib.ExitStack() as stack:
            # Asked while it runs: libvirt knows the chains then.
            sources = [disk_source.DiskSource(guest, disk) for disk in disks]
            sockets = workspace.make_socket_directory(request, log)
            pause = frozen.Pause()
            if request.domain.external:
                # They are what is below the overlays by then.
                taken = external_snapshot.take(guest, request, log, pause)
            else:
                taken = domain_snapshot.take(guest, request, log, pause)
                for source in sources:
                    source.snapshot = taken.record.name
            yield frozen.Frozen(
                tuple(stack.enter_context(source.serving(sockets, log))
                      for source in sources),
                taken.consistency, pause, properties=taken.properties(),
                keep=taken.keep)
            taken.entry.outlive_scope()
