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

"""The recipe: choose a flow, freeze, transfer, publish, release."""

import collections.abc
import contextlib
import dataclasses
import time

from oslo_log import log as logging

from nova_snapshot_ext import disk as disks_
from nova_snapshot_ext import exception
from nova_snapshot_ext import frozen as frozen_
from nova_snapshot_ext import guard as guards
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext.images import base as images
from nova_snapshot_ext import plugins
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import selection
from nova_snapshot_ext.transfers import base as transfers
from nova_snapshot_ext import undo
from nova_snapshot_ext import workspace

LOG = logging.getLogger(__name__)

#: every property of an image that we write begins so
PROPERTY = 'snapshot_ext_'


@dataclasses.dataclass(frozen=True)
class ChosenTransfer:
    """A transfer that may serve, by its name."""

    name: str
    transfer: transfers.Transfer


@dataclasses.dataclass(frozen=True)
class Plan:
    """A snapshot that can be taken: nothing was touched to find out."""

    disk: disks_.Disk
    candidates: list[selection.Candidate]
    #: that can serve, best first
    transfers: list[ChosenTransfer]
    #: what the image can take at most
    image_bytes: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What was done."""

    flow: str
    transfer: str
    consistency: frozen_.Consistency
    guest_pause_s: float
    #: of the image
    length: int
    #: seconds from the plan to the published image
    duration_s: float
    location: str

    @staticmethod
    def properties(flow: str, transfer: str, frozen: frozen_.Frozen,
                   ) -> dict[str, str]:
        """What is recorded on the image."""
        return {
            f'{PROPERTY}flow': flow,
            f'{PROPERTY}transfer': transfer,
            f'{PROPERTY}consistency': frozen.consistency.value,
            f'{PROPERTY}guest_pause_ms': str(
                round(frozen.pause.seconds * 1000)),
        }


def plan(guest: guests.Guest, wished: selection.Wish,
         transfer_names: collections.abc.Sequence[str],
         request: requests.Request) -> Plan:
    """Find out whether and how a snapshot can be taken.

    :raises InvalidSetting: if a name or a directory is not valid
    :raises NoFlowServes: if no flow, or no transfer, can serve
    :raises NotEnoughRoom: if the staging directory is too small
    :raises UnsafeDisk: if the disk refers to what no guest may reach
    """
    workspace.check_directory(
        request.staging_directory, request.staging_setting)
    workspace.check_socket_parent(request.socket_directory)
    disk = guest.root_disk()
    if disk.encrypted:
        raise exception.UnsafeDisk(
            f'{disk.target} is encrypted: its image would hold the plain '
            f'text')
    candidates = selection.candidates(wished, guest, (disk,), request)
    chosen = _choose_transfers(transfer_names, request)
    capacity = guest.capacity(disk.target)
    image_bytes = disks_.image_bytes(disks_.chain_of(disk), capacity)
    needed = chosen[0].transfer.staging_bytes(image_bytes) + max(
        candidate.flow.staging_bytes(disk, capacity)
        for candidate in candidates)
    free = workspace.free_bytes(request.staging_directory)
    if free < needed:
        raise exception.NotEnoughRoom(
            request.staging_setting, request.staging_directory, needed, free)
    return Plan(disk, candidates, chosen, image_bytes)


def _choose_transfers(
        names: collections.abc.Sequence[str], request: requests.Request,
) -> list[ChosenTransfer]:
    setting = '[snapshot_ext] transfers'
    chosen: list[ChosenTransfer] = []
    obstacles: dict[str, str] = {}
    for name in names:
        transfer = plugins.load(plugins.TRANSFERS, name, setting)()
        why = transfer.obstacle(request)
        if why is not None:
            obstacles[name] = why
            continue
        if obstacles and not chosen:
            LOG.info('The transfer %s serves; %s', name, '; '.join(
                f'{passed} can not serve, {reason}'
                for passed, reason in obstacles.items()))
        chosen.append(ChosenTransfer(name, transfer))
    if not chosen:
        raise exception.NoFlowServes(setting, obstacles)
    return chosen


def take(
        guest: guests.Guest, host: hosts.Host, planned: Plan,
        request: requests.Request, service: images.ImageService,
        description: images.Description, verify_hash: bool = False,
        before_upload: collections.abc.Callable[[], None] = lambda: None,
) -> Result:
    """Take a planned snapshot and publish it.

    :param before_upload: called when the image's bytes are about to be sent
    :raises GuestGone: if the guest vanished
    :raises GuestBusy: if another snapshot of it is in flight
    :raises SnapshotError: whatever else was in the way; the guest is as it
        was, and nothing is left behind
    """
    began = time.monotonic()
    service.prepare(description, planned.image_bytes)
    undo.finish_left_over(request.state_directory, guest, host)
    with contextlib.ExitStack() as stack:
        guard = stack.enter_context(guards.Guard())
        log = stack.enter_context(
            undo.UndoLog.create(request.state_directory, guest, host))
        guard.watch(log)
        release = stack.enter_context(contextlib.ExitStack())
        flow, frozen = _freeze(guest, planned, request, log, release)
        chosen = planned.transfers[0]
        with _named_loss(frozen):
            image = stack.enter_context(
                chosen.transfer.image(frozen.disks[0], request, log))
            if image.independent:
                release.close()
            before_upload()
            published = service.publish(
                image, dataclasses.replace(
                    description,
                    properties=description.properties | Result.properties(
                        flow, chosen.name, frozen)),
                verify_hash, request.progress, log)
    result = Result(
        flow, chosen.name, frozen.consistency,
        frozen.pause.seconds, published.length, time.monotonic() - began,
        published.location)
    LOG.info(
        'Snapshot of %(guest)s: flow %(flow)s, transfer %(transfer)s, '
        'consistency %(consistency)s, guest paused %(pause).2f s, '
        '%(length)d bytes in %(duration).1f s, published as %(location)s',
        {'guest': guest.name, 'flow': flow, 'transfer': result.transfer,
         'consistency': result.consistency.value,
         'pause': result.guest_pause_s, 'length': result.length,
         'duration': result.duration_s, 'location': result.location})
    return result


@contextlib.contextmanager
def _named_loss(
        frozen: frozen_.Frozen) -> collections.abc.Iterator[None]:
    """If the disk did not stay frozen, that is the error, not what came of
    it."""
    try:
        yield
    except exception.SnapshotError as error:
        why = frozen.why_lost()
        if why is None:
            raise
        raise exception.DiskThawed(why) from error


def _freeze(
        guest: guests.Guest, planned: Plan, request: requests.Request,
        log: undo.UndoLog, release: contextlib.ExitStack,
) -> tuple[str, frozen_.Frozen]:
    """Freeze by the first candidate that can.

    :param release: gets what thaws the disk
    """
    failure: Exception | None = None
    for candidate in planned.candidates:
        if failure is not None:
            # What was planned may not hold any more.
            why = candidate.flow.obstacle(guest, (planned.disk,), request)
            if why is not None:
                LOG.warning('%s can not serve %s either: %s',
                            candidate.name, guest.name, why)
                continue
        try:
            return candidate.name, release.enter_context(
                candidate.flow.freeze(guest, (planned.disk,), request, log))
        except exception.GuestGone:
            raise
        except (exception.SnapshotError, OSError) as error:
            if log.pending:
                raise
            LOG.warning('%s could not freeze %s: %s', candidate.name,
                        guest.name, error)
            failure = error
    assert failure is not None
    raise failure
