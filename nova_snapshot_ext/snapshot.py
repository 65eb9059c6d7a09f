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
import uuid

from oslo_log import log as logging

from nova_snapshot_ext import attendant as attendants
from nova_snapshot_ext import disk as disks_
from nova_snapshot_ext import exception
from nova_snapshot_ext import frozen as frozen_
from nova_snapshot_ext import guard as guards
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext.images import base as images
from nova_snapshot_ext import own_disks
from nova_snapshot_ext import plugins
from nova_snapshot_ext import progress
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import selection
from nova_snapshot_ext.transfers import base as transfers
from nova_snapshot_ext import undo
from nova_snapshot_ext import workspace

LOG = logging.getLogger(__name__)

#: every property of an image that we write begins so
PROPERTY = 'snapshot_ext_'

#: characters of an image's name, in Glance
_LONGEST_NAME = 255
# How long libvirt may take to know that a guest ended whose disk was read.
_END_IS_KNOWN_S = 2.0
_MADE = progress.Phase('made', 0, 50)
_SENT_THEN = progress.Phase('sent', 50, 100)
_LOOKED = progress.Phase('looked through', 0, 5)
_SENT = progress.Phase('sent', 5, 100)


@dataclasses.dataclass(frozen=True)
class ChosenTransfer:
    """A transfer that may serve, by its name."""

    name: str
    transfer: transfers.Transfer


@dataclasses.dataclass(frozen=True)
class PlannedDisk:
    """A disk that an image will be made of."""

    disk: disks_.Disk
    kind: own_disks.Kind
    #: of the disk, in bytes
    capacity: int
    #: what the image can take at most
    image_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A snapshot that can be taken: nothing of it is begun."""

    #: the root disk first
    disks: tuple[PlannedDisk, ...]
    candidates: list[selection.Candidate]
    #: that can serve, best first
    transfers: list[ChosenTransfer]

    @property
    def to_freeze(self) -> tuple[disks_.Disk, ...]:
        return tuple(each.disk for each in self.disks)

    @property
    def image_bytes(self) -> int:
        """What all images can take at most."""
        return sum(each.image_bytes for each in self.disks)

    def staging_bytes(self, candidate: selection.Candidate) -> int:
        """What a candidate may put into the staging directory."""
        transfer = self.transfers[0].transfer
        return sum(
            transfer.staging_bytes(each.image_bytes)
            + candidate.flow.staging_bytes(each.disk, each.capacity)
            for each in self.disks)


@dataclasses.dataclass(frozen=True)
class DiskImage:
    """The image of one disk."""

    #: libvirt's name of the disk
    device: str
    #: ``root``, ``ephemeral`` …
    kind: str
    #: of the disk, in bytes
    capacity: int
    #: of the image, in bytes
    length: int
    location: str


@dataclasses.dataclass(frozen=True)
class Result:
    """What was done."""

    flow: str
    transfer: str
    consistency: frozen_.Consistency
    guest_pause_s: float
    #: of all images
    length: int
    #: seconds from the plan to the published image
    duration_s: float
    #: of the image of the root disk
    location: str
    #: that of the root disk first
    images: tuple[DiskImage, ...] = ()

    @staticmethod
    def properties(flow: str, transfer: str, frozen: frozen_.Frozen,
                   root: bool = True) -> dict[str, str]:
        """What is recorded on an image.

        :param root: whether it is that of the root disk, which the flow's
            own words are of
        """
        return {
            f'{PROPERTY}flow': flow,
            f'{PROPERTY}transfer': transfer,
            f'{PROPERTY}consistency': frozen.consistency.value,
            f'{PROPERTY}guest_pause_ms': str(
                round(frozen.pause.seconds * 1000)),
            **{f'{PROPERTY}{name}': value
               for name, value in frozen.properties.items() if root},
        }


def plan(guest: guests.Guest, host: hosts.Host, wished: selection.Wish,
         transfer_names: collections.abc.Sequence[str],
         request: requests.Request) -> Plan:
    """Find out whether and how a snapshot can be taken.

    What a dead process left of an earlier one is undone first: what can serve
    depends on what the guest comes back to.

    :raises GuestBusy: if another snapshot of it is in flight
    :raises InvalidSetting: if a name or a directory is not valid
    :raises NoFlowServes: if no flow, or no transfer, can serve
    :raises NotEnoughRoom: if the staging directory is too small
    :raises UndoFailed: if an earlier one can't be undone
    :raises UnsafeDisk: if the disk refers to what no guest may reach
    """
    # What another one does to the guest would be named as obstacles.
    undo.finish_left_over(request.state_directory, guest, host)
    workspace.check_directory(
        request.staging_directory, request.staging_setting)
    workspace.check_socket_parent(request.socket_directory)
    owned = own_disks.chosen(guest, request.disks)
    for each in owned:
        if each.disk.encrypted:
            raise exception.UnsafeDisk(
                f'{each.disk.target} is encrypted: its image would hold the '
                f'plain text')
    candidates = selection.candidates(
        wished, guest, tuple(each.disk for each in owned), request)
    chosen = _choose_transfers(transfer_names, request)
    planned = Plan(tuple(_planned(guest, each) for each in owned),
                   candidates, chosen)
    return dataclasses.replace(
        planned, candidates=_with_room(candidates, planned, request))


def _planned(guest: guests.Guest, owned: own_disks.OwnDisk) -> PlannedDisk:
    capacity = guest.capacity(owned.disk.target)
    return PlannedDisk(
        owned.disk, owned.kind, capacity, disks_.image_bytes(
            disks_.chain_of(owned.disk), capacity))


def _with_room(
        candidates: list[selection.Candidate], planned: Plan,
        request: requests.Request) -> list[selection.Candidate]:
    """The candidates that the staging directory has room for.

    :raises NotEnoughRoom: if there is none
    """
    needed = {candidate.name: planned.staging_bytes(candidate)
              for candidate in candidates}
    free = workspace.free_bytes(request.staging_directory)
    fitting = [candidate for candidate in candidates
               if needed[candidate.name] <= free]
    if not fitting:
        raise exception.NotEnoughRoom(
            request.staging_setting, request.staging_directory,
            min(needed.values()), free)
    if fitting[0] is not candidates[0]:
        LOG.info('%s serves; %s', fitting[0].name, '; '.join(
            f'{passed.name} may need {needed[passed.name]} bytes in '
            f'{request.staging_directory}, where {free} are free'
            for passed in candidates[:candidates.index(fitting[0])]))
    return fitting


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
        report: attendants.Report = attendants.no_report,
) -> Result:
    """Take a planned snapshot and publish it: an image of each disk.

    :param description: of the image of the root disk; those of further disks
        are named after it
    :param before_upload: called when the image's bytes are about to be sent
    :param report: told how far it is, from another thread
    :raises GuestGone: if the guest vanished, or nobody wants it any more
    :raises ImageGone: if the image was deleted
    :raises GuestBusy: if another snapshot of it is in flight
    :raises SnapshotError: whatever else was in the way; the guest is as it
        was, and nothing is left behind
    """
    began = time.monotonic()
    group = request.group or str(uuid.uuid4())
    described = _described(description, planned, request, group)
    service.prepare(described, planned.image_bytes)
    meter = progress.Meter(request.progress)
    attendant = attendants.Attendant(
        guest.name, meter, request.cancellation, service.check, report)
    with contextlib.ExitStack() as stack:
        stack.enter_context(attendants.attending(attendant))
        guard = stack.enter_context(guards.Guard())
        log = stack.enter_context(
            undo.UndoLog.create(request.state_directory, guest, host))
        guard.watch(log)
        taking = _Taking(guest, planned, request, service, described,
                         verify_hash, before_upload, log, meter, attendant)
        flow, transfer, frozen, published = taking.run()
    made = tuple(
        DiskImage(disk.disk.target, disk.kind.value, disk.capacity,
                  image.length, image.location)
        for disk, image in zip(planned.disks, published, strict=True))
    result = Result(
        flow, transfer, frozen.consistency, frozen.pause.seconds,
        sum(image.length for image in made), time.monotonic() - began,
        made[0].location, made)
    return result


def _described(description: images.Description, planned: Plan,
               request: requests.Request, group: str,
               ) -> list[images.Description]:
    """The image of each planned disk."""
    root, *further = planned.disks
    found = [description]
    for disk in further:
        end = f'-{disk.disk.target}'
        found.append(images.Description(
            name=description.name[:_LONGEST_NAME - len(end)] + end,
            disk_format=description.disk_format,
            container_format=description.container_format,
            properties=description.further))
    if request.disks is requests.Disks.ROOT:
        return found
    return [dataclasses.replace(each, properties=each.properties | {
        images.GROUP: group,
        f'{PROPERTY}disks': str(len(planned.disks)),
        f'{PROPERTY}device': disk.disk.target,
        f'{PROPERTY}kind': disk.kind.value,
        f'{PROPERTY}size': str(disk.capacity),
    }) for each, disk in zip(found, planned.disks, strict=True)]


_Taken = tuple[str, str, frozen_.Frozen, list[images.Published]]


@dataclasses.dataclass
class _Taking:
    """What the steps of one snapshot share; see :func:`take`."""

    guest: guests.Guest
    planned: Plan
    request: requests.Request
    service: images.ImageService
    #: the image of each planned disk
    described: list[images.Description]
    verify_hash: bool
    before_upload: collections.abc.Callable[[], None]
    log: undo.UndoLog
    meter: progress.Meter
    attendant: attendants.Attendant
    #: the flow that froze the disk last, and those that come after it
    flow: str = ''
    rest: collections.abc.Sequence[selection.Candidate] = ()

    def run(self) -> _Taken:
        try:
            return self._by(self.planned.candidates)
        except exception.DiskThawed as error:
            instead = [candidate for candidate in self.rest
                       if candidate.name == self.request.on_scratch_full]
            if not instead or self.log.pending:
                raise
            LOG.warning('%s lost the frozen disk of %s: %s; %s begins anew',
                        self.flow, self.guest.name, error, instead[0].name)
            return self._by(instead, error)

    def _by(self, candidates: list[selection.Candidate],
            failure: Exception | None = None) -> _Taken:
        """:param failure: of the flow that was tried before"""
        with contextlib.ExitStack() as stack:
            release = stack.enter_context(contextlib.ExitStack())
            account = self.request.account
            account.disks = len(self.planned.disks)
            frozen = account.timed('freeze', self._freeze)(
                candidates, release, failure)
            self._note(frozen, release)
            chosen = self.planned.transfers[0]
            account.transfer = chosen.name
            with self._named_loss(frozen):
                self.request.cancellation.check()
                new = account.timed('transfer', self._new_images)(
                    chosen, frozen, stack)
                if chosen.transfer.independent:
                    account.timed('release', release.close)()
                self._announce_upload()
                *further, root = account.timed(
                    'publish', self.service.publish)(
                    new, self.verify_hash, self.log)
        frozen.keep(root.location)
        account.image = root.location
        return self.flow, chosen.name, frozen, [root, *further]

    def _note(self, frozen: frozen_.Frozen,
              release: contextlib.ExitStack) -> None:
        """Put down what only the frozen disk knows, until it is thawed.

        :param release: thaws the disk
        """
        account = self.request.account
        account.consistency = frozen.consistency.value
        account.pauses.append(lambda: frozen.pause.seconds)

        def note_scratch() -> None:
            with contextlib.suppress(OSError):
                account.scratch_bytes = frozen.scratch_bytes()
        release.callback(note_scratch)

    def _announce_upload(self) -> None:
        """Once, whatever is begun anew."""
        announce, self.before_upload = self.before_upload, lambda: None
        announce()

    def _new_images(
            self, chosen: ChosenTransfer, frozen: frozen_.Frozen,
            stack: contextlib.ExitStack) -> list[images.NewImage]:
        """The images to be published, that of the root disk last.

        Those that are independent of the disks are made here. Of others the
        first is begun here, and each that follows when its turn comes: one
        disk at a time is read.

        :param stack: gets what ends them
        """
        transfer = chosen.transfer
        making, sending = self._progress(transfer)
        by_target = {disk.target: disk for disk in frozen.disks}
        numbers = [*range(1, len(self.planned.disks)), 0]
        staged_bytes = 0
        new: list[images.NewImage] = []
        for number in numbers:
            disk, description = (
                self.planned.disks[number], self.described[number])
            made = transfer.image(
                by_target[disk.disk.target], dataclasses.replace(
                    self.request, progress=making.part(number)), self.log)
            if transfer.independent or not new:
                image = stack.enter_context(made)
                if transfer.independent:
                    staged_bytes += image.length
                    self.request.account.staged_bytes = staged_bytes
                made = contextlib.nullcontext(image)
            new.append(images.NewImage(
                dataclasses.replace(
                    description, properties=description.properties
                    | Result.properties(self.flow, chosen.name, frozen,
                                        root=not number)),
                made, self._cancellable(number, sending.part(number))))
        return new

    def _progress(self, transfer: transfers.Transfer,
                  ) -> tuple[progress.Together, progress.Together]:
        """How far the making, and the sending, of all images is."""
        most = [disk.image_bytes for disk in self.planned.disks]
        if not transfer.independent:
            return (progress.Together(
                self.meter.phase(_LOOKED),
                [disk.capacity for disk in self.planned.disks]),
                progress.Together(self.meter.phase(_SENT), most))
        tell = self.meter.phase(_MADE)

        def making(done: int, total: int) -> None:
            tell(done, min(total, self.planned.image_bytes))
            self.request.account.staged_bytes = done
        return (progress.Together(making, most),
                progress.Together(self.meter.phase(_SENT_THEN), most))

    def _cancellable(self, number: int,
                     tell: requests.Progress) -> requests.Progress:
        def sending(done: int, total: int) -> None:
            self.request.account.sent(number, done, total)
            self.request.cancellation.check()
            tell(done, total)
        return sending

    def _freeze(
            self, candidates: list[selection.Candidate],
            release: contextlib.ExitStack, failure: Exception | None,
    ) -> frozen_.Frozen:
        """Freeze by the first candidate that can.

        :param release: gets what thaws the disk
        """
        disks = self.planned.to_freeze
        for number, candidate in enumerate(candidates, 1):
            if failure is not None:
                # What was planned may not hold any more.
                why = self._why_not_now(candidate)
                if why is not None:
                    LOG.warning('%s can not serve %s either: %s',
                                candidate.name, self.guest.name, why)
                    continue
            self.request.account.flow = candidate.name
            try:
                frozen = release.enter_context(candidate.flow.freeze(
                    self.guest, disks, self.request, self.log))
            except exception.GuestGone:
                raise
            except (exception.SnapshotError, OSError) as error:
                self.request.cancellation.check()
                if self.log.pending:
                    raise
                LOG.warning('%s could not freeze %s: %s', candidate.name,
                            self.guest.name, error)
                failure = error
            else:
                self.flow, self.rest = candidate.name, candidates[number:]
                return frozen
        assert failure is not None
        raise failure

    def _why_not_now(self, candidate: selection.Candidate) -> str | None:
        why = candidate.flow.obstacle(
            self.guest, self.planned.to_freeze, self.request)
        if why is None:
            try:
                _with_room([candidate], self.planned, self.request)
            except exception.NotEnoughRoom as error:
                why = str(error)
        return why

    @contextlib.contextmanager
    def _named_loss(
            self, frozen: frozen_.Frozen) -> collections.abc.Iterator[None]:
        """What took the disk away is the error, not what came of it."""
        ran_as = self.guest.life()
        try:
            yield
        except (exception.SnapshotError, OSError) as error:
            if isinstance(error, exception.TransferFailed):
                self._wait_for_end(frozen, ran_as)
            loss = self._loss(frozen, ran_as)
            if loss is None or loss is error:
                raise
            raise loss from error

    def _wait_for_end(self, frozen: frozen_.Frozen,
                      ran_as: str | None) -> None:
        """A QEMU's sockets close a moment before libvirt knows its end.

        :param ran_as: the guest's life when its disk was frozen
        """
        if (ran_as is None or not frozen.by_guest or frozen.why_lost()
                or self.request.cancellation.reason):
            return
        deadline = time.monotonic() + _END_IS_KNOWN_S
        with contextlib.suppress(exception.SnapshotError):
            while (self.guest.life() == ran_as
                   and time.monotonic() < deadline):
                time.sleep(0.1)

    def _loss(self, frozen: frozen_.Frozen,
              ran_as: str | None) -> exception.SnapshotError | None:
        """:param ran_as: the guest's life when its disk was frozen"""
        try:
            runs_as = self.guest.life()
        except exception.GuestGone as gone:
            # It may be on its way back, for who wants no snapshot of it.
            self.attendant.report()
            return self.request.cancellation.reason or gone
        except exception.SnapshotError:
            runs_as = ran_as        # nobody can say
        ended = runs_as != ran_as
        if ended:
            # Who deletes a server stops its guest first.
            self.attendant.report()
        if self.request.cancellation.reason is not None:
            return self.request.cancellation.reason
        lost = frozen.why_lost()
        if lost is not None:
            return exception.DiskThawed(lost)
        if ended and frozen.by_guest:
            how = 'shut off' if runs_as is None else 'started anew'
            return exception.TransferFailed(
                f'{self.guest.name} was {how} while its disk was read')
        return None
