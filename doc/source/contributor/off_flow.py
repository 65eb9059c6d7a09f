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


"""A flow for guests that are off: their disks are read as they are."""

import collections.abc
import contextlib
import os

from nova_snapshot_ext import disk
from nova_snapshot_ext.flows import base
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import qemu_nbd
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo
from nova_snapshot_ext import workspace


class OffFlow(base.Flow):

    def obstacle(self, guest: guests.Guest, disks: base.Disks,
                 request: requests.Request) -> str | None:
        state = guest.state()
        if state is not guests.State.SHUTOFF:
            return f'the guest is {state.value}'
        return None

    @contextlib.contextmanager
    def freeze(
            self, guest: guests.Guest, disks: base.Disks,
            request: requests.Request, log: undo.UndoLog,
    ) -> collections.abc.Iterator[frozen.Frozen]:
        with log.scope(), contextlib.ExitStack() as stack:
            sockets = workspace.make_socket_directory(request, log)
            yield frozen.Frozen(
                tuple(stack.enter_context(qemu_nbd.serving(
                    disk.chain_options(disk.chain_of(each)),
                    os.path.join(sockets, each.target), each.target,
                    guest.capacity(each.target), log)) for each in disks),
                frozen.Consistency.CRASH, frozen.Pause())
