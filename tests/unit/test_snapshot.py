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

import collections.abc
import contextlib
import os
import threading
import typing

import fixtures

from nova_snapshot_ext import account as accounts
from nova_snapshot_ext import cancellation as cancellations
from nova_snapshot_ext import exception
from nova_snapshot_ext.flows import base as flows
from nova_snapshot_ext import frozen
from nova_snapshot_ext import image_bytes
from nova_snapshot_ext.images import base as images
from nova_snapshot_ext import own_disks
from nova_snapshot_ext import progress
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import selection
from nova_snapshot_ext import snapshot
from nova_snapshot_ext.transfers import base as transfers
from nova_snapshot_ext import undo
from tests.unit import base
from tests.unit import fakes

journal = fakes.Journal()
stuck: set[str] = set()


@undo.step
def demo_release(around: undo.Surroundings, what: str) -> None:
    journal.append(f'undo {what}')
    if what in stuck:
        raise exception.SnapshotError(f'{what} is stuck')


class DemoFlow(flows.Flow):
    """Freezes by writing into the journal."""

    def __init__(self, name: str = 'demo',
                 error: Exception | None = None,
                 lost: str | None = None) -> None:
        """:param lost: why the disk does not stay frozen"""
        self.lost = lost
        self.name = name
        self.error = error
        self.why: str | None = None
        self.bytes = 0
        self.by_guest = True
        self.properties: dict[str, str] = {}
        self.scratch: int | Exception = 777

    def obstacle(self, guest: object, disks: object,
                 request: object) -> str | None:
        return self.why

    def staging_bytes(self, disk: object, capacity: int) -> int:
        return self.bytes

    @contextlib.contextmanager
    def freeze(
            self, guest: object, disks: flows.Disks,
            request: requests.Request, log: undo.UndoLog,
    ) -> collections.abc.Iterator[frozen.Frozen]:
        with log.scope():
            log.push(demo_release, what=self.name)
            journal.append(f'freeze {self.name}')
            if self.error is not None:
                raise self.error
            pause = frozen.Pause()
            with pause.measured():
                pass
            yield frozen.Frozen(
                tuple(frozen.FrozenDisk(disk.target, 4096, '/s', 'e')
                      for disk in disks),
                frozen.Consistency.FILESYSTEM, pause,
                why_lost=lambda: self.lost, by_guest=self.by_guest,
                properties=self.properties,
                scratch_bytes=self.held,
                keep=lambda location: journal.append(f'keep {location}'))
        journal.append(f'released {self.name}')

    def held(self) -> int:
        journal.append('scratch')
        if isinstance(self.scratch, Exception):
            raise self.scratch
        return self.scratch


class DemoBytes(image_bytes.ImageBytes):
    length = 5

    def __init__(self, path: str, independent: bool) -> None:
        self.path = path
        self.independent = independent

    def open(self, algorithm: str | None = None) -> typing.BinaryIO:
        return open(self.path, 'rb')

    def digest(self, algorithm: str) -> str:
        return ''


class DemoTransfer(transfers.Transfer):
    independent = True
    why: str | None = None
    needs = 0
    #: bytes made, of which it tells
    tells = 0

    def obstacle(self, request: requests.Request) -> str | None:
        return self.why

    def staging_bytes(self, image_bytes: int) -> int:
        return self.needs

    @contextlib.contextmanager
    def image(
            self, disk: frozen.FrozenDisk, request: requests.Request,
            log: undo.UndoLog,
    ) -> collections.abc.Iterator[image_bytes.ImageBytes]:
        journal.append(f'transfer {disk.target}')
        path = os.path.join(request.staging_directory, disk.target)
        with log.scope():
            log.push(remove_image, path=path)
            with open(path, 'wb') as file:
                file.write(b'image')
            if self.tells:
                request.progress(self.tells, 10 ** 9)
            yield DemoBytes(path, self.independent)


@undo.step
def remove_image(around: undo.Surroundings, path: str) -> None:
    journal.append('remove image')
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


class DemoService(images.ImageService):
    error: Exception | None = None
    refusal: Exception | None = None

    def __init__(self) -> None:
        self.descriptions: list[images.Description] = []
        self.verified: list[bool] = []
        #: called when bytes are sent: before the first, and after the last
        self.sending: collections.abc.Callable[[], object] = lambda: None
        self.gone = False
        #: how often bytes were sent
        self.sent = 0

    def check(self) -> None:
        if self.gone:
            raise exception.ImageGone('deleted by a tenant')

    def prepare(
            self, descriptions: collections.abc.Sequence[images.Description],
            most_bytes: int) -> None:
        assert most_bytes == 12345 * len(descriptions)
        if self.refusal is not None:
            raise self.refusal

    def publish(
            self, new: collections.abc.Sequence[images.NewImage],
            verify_hash: bool, log: undo.UndoLog) -> list[images.Published]:
        return [self.publish_one(each, verify_hash) for each in new]

    def publish_one(self, new: images.NewImage,
                    verify_hash: bool) -> images.Published:
        journal.append('publish')
        self.descriptions.append(new.description)
        self.verified.append(verify_hash)
        if self.error is not None:
            raise self.error
        with new.made as image:
            new.progress(0, 5)
            self.sending()
            with image.open() as file:
                content = file.read()
            new.progress(5, 5)
        assert content == b'image', content
        self.sent += 1
        return images.Published(
            'somewhere' + new.description.name.removeprefix('snap'),
            len(content))


class FakeGuard:
    def __enter__(self) -> 'FakeGuard':
        return self

    def watch(self, log: undo.UndoLog) -> None:
        journal.append('guard')

    def __exit__(self, *error: object) -> None:
        journal.append('guard ends')


class SnapshotTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        journal.clear()
        stuck.clear()
        self.patch_name('nova_snapshot_ext.guard.Guard', FakeGuard)
        self.patch_name('nova_snapshot_ext.attendant._IMAGE_S', 0)
        self.patch_name('nova_snapshot_ext.attendant._REPORT_S', 0)
        self.path = self.new_file('disk', b'\0' * 4096)
        self.domain.disks = fakes.disk_xml(self.path)
        self.service = DemoService()
        self.transfer = DemoTransfer()
        self.cancellation = cancellations.Cancellation()
        self.account = accounts.Account()


class TakeTestCase(SnapshotTestCase):

    disks = requests.Disks.ROOT
    group = ''
    name = 'snap'

    def progress(self, done: int, total: int) -> None:
        """What whoever asked is told."""

    def take(self, *candidates: DemoFlow, on_scratch_full: str = 'fail',
             **changes: typing.Any) -> snapshot.Result:
        planned = snapshot.Plan(
            tuple(snapshot.PlannedDisk(each.disk, each.kind, 4096, 12345)
                  for each in own_disks.chosen(self.guest, self.disks)),
            [selection.Candidate(flow.name, flow)
             for flow in candidates or (DemoFlow(),)],
            [snapshot.ChosenTransfer('demo-transfer', self.transfer)])
        return snapshot.take(
            self.guest, self.host, planned,
            self.request(on_scratch_full=on_scratch_full,
                         account=self.account,
                         cancellation=self.cancellation, disks=self.disks,
                         progress=self.progress, group=self.group),
            self.service,
            images.Description(self.name, 'raw', 'bare', {'mine': '1'},
                               further={'of_server': '7'}),
            **changes)

    def values(self, *names: str) -> tuple[accounts.Value, ...]:
        values = self.account.values()
        return tuple(values[name] for name in names)

    def logs(self) -> list[str]:
        return os.listdir(self.state)

    def assertNothingIsLeft(self) -> None:
        self.assertEqual([], self.logs())
        self.assertEqual([], os.listdir(self.staging))
        self.assertIn('undo demo', journal)


class TestTake(TakeTestCase):

    def test_recipe(self) -> None:
        result = self.take(before_upload=lambda: journal.append('upload'))
        self.assertEqual(
            ['guard', 'freeze demo', 'transfer vda', 'scratch', 'undo demo',
             'released demo', 'upload', 'publish', 'remove image',
             'keep somewhere',
             'guard ends'], journal)
        self.assertEqual(
            ('demo', 'demo-transfer', frozen.Consistency.FILESYSTEM, 5,
             'somewhere'),
            (result.flow, result.transfer, result.consistency,
             result.length, result.location))
        self.assertEqual([], self.logs())

    def test_guest_is_released_after_the_upload_of_a_bound_image(
            self) -> None:
        self.transfer.independent = False
        self.take()
        self.assertEqual(
            ['publish', 'remove image', 'undo demo', 'released demo'],
            journal.of('publish', 'undo', 'released', 'remove'))

    def test_guard_stands_before_the_guest_is_touched(self) -> None:
        self.take()
        self.assertLess(journal.index('guard'),
                        journal.index('freeze demo'))

    def test_what_was_done_is_recorded(self) -> None:
        self.take()
        [description] = self.service.descriptions
        pause = description.properties.pop('snapshot_ext_guest_pause_ms')
        self.assertEqual(
            {'mine': '1', 'snapshot_ext_flow': 'demo',
             'snapshot_ext_transfer': 'demo-transfer',
             'snapshot_ext_consistency': 'filesystem'},
            description.properties)
        self.assertRegex(pause, '^[0-9]+$')

    def test_inherited_record_is_overwritten(self) -> None:
        frozen_ = frozen.Frozen((), frozen.Consistency.CRASH, frozen.Pause())
        properties = {'snapshot_ext_flow': 'old'} | (
            snapshot.Result.properties('new', 't', frozen_))
        self.assertEqual('new', properties['snapshot_ext_flow'])

    def test_what_the_flow_says_is_recorded(self) -> None:
        flow = DemoFlow()
        flow.properties = {'rollback': 'memory'}
        self.take(flow)
        self.assertEqual('memory', self.service.descriptions[0].properties[
            'snapshot_ext_rollback'])

    def test_what_the_flow_made_stays_once_the_image_is_whole(self) -> None:
        self.take(DemoFlow())
        self.assertEqual(
            ['publish', 'keep somewhere'], journal.of('publish', 'keep'))
        journal.clear()
        self.service.error = exception.ImageServiceError('no')
        self.assertRaises(
            exception.ImageServiceError, self.take, DemoFlow())
        self.assertEqual(['publish'], journal.of('publish', 'keep'))

    def test_hash_is_verified_if_it_is_asked_for(self) -> None:
        self.take()
        self.take(verify_hash=True)
        self.assertEqual([False, True], self.service.verified)

    def test_before_upload_is_called_once(self) -> None:
        calls: list[int] = []
        self.take(DemoFlow('one', exception.FreezeFailed('no')),
                  DemoFlow('two'), before_upload=lambda: calls.append(1))
        self.assertEqual([1], calls)

    def test_nothing_is_published_when_before_upload_fails(self) -> None:
        def deleted() -> None:
            raise KeyError('the instance is being deleted')
        self.assertRaises(KeyError, self.take, before_upload=deleted)
        self.assertNotIn('publish', journal)
        self.assertEqual([], self.logs())

    def test_next_flow_serves_with_a_warning(self) -> None:
        result = self.take(
            DemoFlow('one', exception.FreezeFailed('no socket')),
            DemoFlow('two'))
        self.assertEqual('two', result.flow)
        self.assertEqual(
            ['freeze one', 'undo one', 'freeze two'],
            journal.of('freeze', 'undo one'))
        self.assertIn('one could not freeze instance-00000001: no socket',
                      self.output.output)

    def test_next_flow_is_asked_again(self) -> None:
        second = DemoFlow('two')
        second.why = 'the guest is shut off'
        self.assertRaisesRegex(
            exception.FreezeFailed, 'no socket', self.take,
            DemoFlow('one', exception.FreezeFailed('no socket')), second)
        self.assertIn('two can not serve instance-00000001 either: the '
                      'guest is shut off', self.output.output)

    def test_next_flow_must_have_room(self) -> None:
        second = DemoFlow('two')
        second.bytes = 500
        self.transfer.needs = 600
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: 1099)
        self.assertRaisesRegex(
            exception.FreezeFailed, 'no socket', self.take,
            DemoFlow('one', exception.FreezeFailed('no socket')), second)
        self.assertNotIn('freeze two', journal)
        self.assertIn('this snapshot may need 1100', self.output.output)
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: 1100)
        self.assertEqual('two', self.take(
            DemoFlow('one', exception.FreezeFailed('no socket')),
            second).flow)

    def test_denied_file_lets_the_next_flow_serve(self) -> None:
        self.assertEqual('two', self.take(
            DemoFlow('one', PermissionError('denied')),
            DemoFlow('two')).flow)

    def test_last_flow_has_no_next(self) -> None:
        self.assertRaisesRegex(
            exception.FreezeFailed, 'no socket', self.take,
            DemoFlow('one', exception.FreezeFailed('no socket')))
        self.assertEqual([], self.logs())

    def test_no_other_flow_touches_a_guest_that_is_not_as_it_was(
            self) -> None:
        stuck.add('one')
        self.assertRaisesRegex(
            exception.FreezeFailed, 'no socket', self.take,
            DemoFlow('one', exception.FreezeFailed('no socket')),
            DemoFlow('two'))
        self.assertNotIn('freeze two', journal)
        self.assertEqual(1, len(self.logs()))

    def test_no_other_flow_is_tried_on_a_guest_that_is_gone(self) -> None:
        self.assertRaises(
            exception.GuestGone, self.take,
            DemoFlow('one', exception.GuestGone('gone')), DemoFlow('two'))
        self.assertNotIn('freeze two', journal)

    def test_fault_of_a_flow_is_not_hidden(self) -> None:
        self.assertRaises(
            ZeroDivisionError, self.take,
            DemoFlow('one', ZeroDivisionError()), DemoFlow('two'))

    def test_nothing_is_left_when_the_service_fails(self) -> None:
        for independent in (True, False):
            journal.clear()
            self.transfer.independent = independent
            self.service.error = exception.ImageRefused('413')
            self.assertRaises(exception.ImageRefused, self.take)
            self.assertIn('undo demo', journal)
            self.assertEqual([], self.logs())
            self.assertEqual([], os.listdir(self.staging))

    def test_service_refuses_before_the_guest_is_touched(self) -> None:
        self.service.refusal = exception.NotEnoughRoom('--to', '/d', 2, 1)
        self.assertRaises(exception.NotEnoughRoom, self.take)
        self.assertEqual([], journal)
        self.assertEqual([], self.logs())

    def test_two_snapshots_of_one_guest_are_refused(self) -> None:
        self.new_log()
        self.assertRaises(exception.GuestBusy, self.take)
        self.assertEqual([], journal.of('freeze'))

    def test_what_was_done_is_put_down(self) -> None:
        self.take()
        self.assertEqual(
            ('ok', 'demo', 'demo-transfer', 'filesystem', 'somewhere', 5, 5,
             5, 777),
            self.values('outcome', 'flow', 'transfer', 'consistency',
                        'image', 'image_bytes', 'sent_bytes',
                        'staged_bytes', 'scratch_bytes'))
        for name in ('freeze_s', 'transfer_s', 'publish_s', 'release_s',
                     'guest_pause_ms'):
            self.assertNotEqual((None,), self.values(name), name)

    def test_what_was_done_is_put_down_whatever_fails(self) -> None:
        self.transfer.tells = 400
        self.service.error = exception.ImageRefused('413')
        self.assertRaises(exception.ImageRefused, self.take)
        self.assertEqual(
            ('demo', 'demo-transfer', 5, None, 777),
            self.values('flow', 'transfer', 'staged_bytes', 'sent_bytes',
                        'scratch_bytes'))
        self.account = accounts.Account()
        self.assertRaises(exception.FreezeFailed, self.take, DemoFlow(
            'one', exception.FreezeFailed('no socket')))
        self.assertEqual(
            ('one', None, None, None),
            self.values('flow', 'transfer', 'consistency', 'scratch_bytes'))

    def test_scratch_is_looked_at_while_the_disk_is_frozen(self) -> None:
        flow = DemoFlow()
        self.take(flow)
        self.assertLess(journal.index('scratch'),
                        journal.index('released demo'))
        flow.scratch = OSError('gone')
        self.take(flow)

    # Progress

    def test_progress_ends_at_0(self) -> None:
        reports: list[int] = []
        self.take(report=reports.append)
        self.assertEqual([0], reports[-1:])
        self.service.error = exception.ImageRefused('413')
        reports.clear()
        self.assertRaises(exception.ImageRefused, self.take,
                          report=reports.append)
        self.assertEqual([0], reports[-1:])

    def test_what_comes_before_sending_is_half_the_way_or_a_little(
            self) -> None:
        # An image of 12345 bytes at most that is made first, and a disk of
        # 10 ** 9 that is looked through
        for independent, tells, expected in (
                (True, 6172, {24, 50, 100}), (False, 4 * 10 ** 8,
                                              {2, 5, 100})):
            self.transfer.independent = independent
            self.transfer.tells = tells
            seen: set[int] = set()
            real = progress.Meter._tell

            def tell(meter: progress.Meter, *told: typing.Any) -> None:
                real(meter, *told)
                seen.add(meter.percent)
            with fixtures.MonkeyPatch(
                    'nova_snapshot_ext.progress.Meter._tell', tell):
                self.take()
            self.assertEqual(expected, seen)

    # Its end before its time

    def test_image_that_is_deleted_ends_the_upload(self) -> None:
        for independent in (True, False):
            journal.clear()
            self.cancellation = cancellations.Cancellation()
            self.transfer.independent = independent
            self.service.sending = lambda: self.cancellation.cancel(
                exception.ImageGone('deleted by a tenant'))
            self.assertRaisesRegex(exception.ImageGone, 'by a tenant',
                                   self.take)
            self.assertNothingIsLeft()

    def test_image_service_is_asked_meanwhile(self) -> None:
        self.patch_name('nova_snapshot_ext.attendant._LOOK_S', 0.01)
        ended = threading.Event()

        def send() -> None:
            with self.cancellation.ending(ended.set):
                self.service.gone = True
                self.assertTrue(ended.wait(30))
            raise exception.TransferFailed('it was killed')
        self.service.sending = send
        error = self.assertRaises(exception.ImageGone, self.take)
        self.assertIsInstance(error.__cause__, exception.TransferFailed)
        self.assertNothingIsLeft()

    def test_server_that_is_deleted_ends_the_snapshot(self) -> None:
        self.patch_name('nova_snapshot_ext.attendant._LOOK_S', 0.01)
        ended = threading.Event()

        def report(percent: int) -> None:
            raise exception.GuestGone('it is being deleted')

        def send() -> None:
            with self.cancellation.ending(ended.set):
                self.assertTrue(ended.wait(30))
        self.service.sending = send
        self.assertRaisesRegex(exception.GuestGone, 'being deleted',
                               self.take, report=report)
        self.assertNothingIsLeft()

    def test_no_transfer_begins_after_the_end(self) -> None:
        self.cancellation.cancel(exception.ImageGone('deleted'))
        self.assertRaises(exception.ImageGone, self.take)
        self.assertEqual([], journal.of('transfer'))
        self.assertNothingIsLeft()

    def test_no_other_flow_serves_after_the_end(self) -> None:
        flow = DemoFlow('demo', exception.FreezeFailed('its copy was ended'))
        self.cancellation.cancel(exception.ImageGone('deleted'))
        self.assertRaises(exception.ImageGone, self.take, flow,
                          DemoFlow('two'))
        self.assertNotIn('freeze two', journal)
        self.assertNothingIsLeft()

    def fail_after(self, happened: collections.abc.Callable[
            [], object]) -> None:
        def send() -> None:
            happened()
            raise exception.TransferFailed('The mover failed')
        self.service.sending = send

    def test_guest_that_vanished_is_the_error(self) -> None:
        self.fail_after(self.domain.gone)
        self.assertRaises(exception.GuestGone, self.take)

    def test_guest_that_nova_stopped_to_delete_it_is_gone(self) -> None:
        def report(percent: int) -> None:
            raise exception.GuestGone('it is being deleted')
        self.fail_after(self.domain.off)
        self.assertRaisesRegex(exception.GuestGone, 'being deleted',
                               self.take, report=report)

    def test_guest_that_was_shut_off_is_the_error(self) -> None:
        self.fail_after(self.domain.off)
        error = self.assertRaises(exception.TransferFailed, self.take)
        self.assertIn('was shut off', str(error))

    def test_guest_that_libvirt_sees_off_a_moment_later_is_the_error(
            self) -> None:
        self.fail_after(lambda: None)
        self.patch_name('time.sleep', lambda seconds: self.domain.off())
        error = self.assertRaises(exception.TransferFailed, self.take)
        self.assertIn('was shut off', str(error))

    def test_guest_that_was_started_anew_is_the_error(self) -> None:
        def restart() -> None:
            self.domain.off()
            self.domain.createWithFlags(0)
        self.fail_after(restart)
        error = self.assertRaises(exception.TransferFailed, self.take)
        self.assertIn('was started anew', str(error))

    def test_guest_that_nobody_can_ask_for_is_no_reason(self) -> None:
        self.fail_after(lambda: self.domain.errors.update(
            XMLDesc=fakes.libvirt_error(1)))
        self.assertRaisesRegex(exception.TransferFailed,
                               'The mover failed', self.take)

    def test_guest_that_does_not_serve_its_disk_may_shut_off(self) -> None:
        def send() -> None:
            self.domain.off()
            raise exception.ImageRefused('413')
        self.service.sending = send
        flow = DemoFlow()
        flow.by_guest = False
        self.assertRaisesRegex(exception.ImageRefused, '413', self.take,
                               flow)

    def test_guest_that_was_off_before_is_no_reason(self) -> None:
        self.domain.off()
        self.fail_after(lambda: None)
        self.assertRaisesRegex(exception.TransferFailed,
                               'The mover failed', self.take)

    # The scratch

    def lost(self) -> DemoFlow:
        self.fail_after(lambda: None)
        return DemoFlow('backup', lost='1 byte is free for the scratch')

    def live(self) -> DemoFlow:
        flow = DemoFlow('live')
        real = flow.freeze

        def freeze(*arguments: typing.Any) -> typing.Any:
            self.service.sending = lambda: None
            return real(*arguments)
        flow.freeze = freeze  # type: ignore[method-assign]
        return flow

    def test_scratch_that_ran_short_is_the_error(self) -> None:
        self.assertRaisesRegex(
            exception.DiskThawed, '1 byte is free', self.take, self.lost(),
            self.live())
        self.assertNotIn('freeze live', journal)

    def test_live_serves_where_the_scratch_ran_short(self) -> None:
        calls: list[int] = []
        result = self.take(
            self.lost(), DemoFlow('other'), self.live(),
            on_scratch_full='live', before_upload=lambda: calls.append(1))
        self.assertEqual('live', result.flow)
        self.assertEqual(
            ['freeze backup', 'undo backup', 'freeze live', 'undo live'],
            journal.of('freeze', 'undo'))
        self.assertIn('backup lost the frozen disk of instance-00000001: '
                      '1 byte is free for the scratch; live begins anew',
                      self.output.output)
        self.assertEqual([1], calls)
        self.assertEqual('live', self.service.descriptions[-1].properties[
            'snapshot_ext_flow'])
        self.assertEqual([], self.logs())

    def test_live_must_be_able_to_serve(self) -> None:
        live = self.live()
        live.why = 'another job'
        self.assertRaises(exception.DiskThawed, self.take, self.lost(),
                          live, on_scratch_full='live')
        self.assertNotIn('freeze live', journal)
        self.assertIn('live can not serve instance-00000001 either: another '
                      'job', self.output.output)

    def test_flow_that_was_named_is_not_replaced(self) -> None:
        self.assertRaises(exception.DiskThawed, self.take, self.lost(),
                          on_scratch_full='live')

    def test_live_serves_once(self) -> None:
        live = DemoFlow('live', lost='it ran short as well')
        self.assertRaisesRegex(
            exception.DiskThawed, 'as well', self.take, self.lost(), live,
            on_scratch_full='live')
        self.assertEqual(1, journal.count('freeze live'))

    def test_no_flow_begins_anew_after_another_error(self) -> None:
        self.service.error = exception.ImageRefused('413')
        self.assertRaises(exception.ImageRefused, self.take,
                          DemoFlow('backup'), self.live(),
                          on_scratch_full='live')
        self.assertNotIn('freeze live', journal)

    def test_no_flow_begins_anew_on_a_guest_that_is_not_as_it_was(
            self) -> None:
        stuck.add('backup')
        self.assertRaises(exception.DiskThawed, self.take, self.lost(),
                          self.live(), on_scratch_full='live')
        self.assertNotIn('freeze live', journal)


class TestSeveralDisks(TakeTestCase):

    disks = requests.Disks.ALL

    def setUp(self) -> None:
        super().setUp()
        for target in ('vdb', 'vdc'):
            self.domain.disks += fakes.disk_xml(
                self.new_file(target, b'\0' * 4096), target=target)

    def test_each_is_an_image_and_that_of_the_root_disk_comes_last(
            self) -> None:
        result = self.take()
        self.assertEqual(
            ['freeze demo', 'transfer vdb', 'transfer vdc', 'transfer vda',
             'undo demo', 'publish', 'publish', 'publish',
             'keep somewhere'],
            journal.of('freeze', 'transfer', 'undo', 'publish', 'keep'))
        self.assertEqual(['snap-vdb', 'snap-vdc', 'snap'], [
            each.name for each in self.service.descriptions])
        self.assertEqual(
            (('vda', 'root', 'somewhere'),
             ('vdb', 'data', 'somewhere-vdb'),
             ('vdc', 'data', 'somewhere-vdc')),
            tuple((each.device, each.kind, each.location)
                  for each in result.images))
        self.assertEqual((15, 'somewhere'), (result.length, result.location))
        self.assertNothingIsLeft()

    def test_one_disk_at_a_time_is_read(self) -> None:
        self.transfer.independent = False
        self.take()
        self.assertEqual(
            ['transfer vdb', 'publish',
             'publish', 'transfer vdc', 'remove image',
             'publish', 'transfer vda', 'remove image',
             'remove image', 'undo demo'],
            journal.of('transfer', 'publish', 'remove', 'undo'))
        self.assertNothingIsLeft()

    def test_properties_say_what_belongs_together(self) -> None:
        flow = DemoFlow()
        flow.properties = {'rollback': 'memory'}
        self.group = 'the-group'
        self.take(flow)
        common = {
            'snapshot_ext_group': 'the-group', 'snapshot_ext_disks': '3',
            'snapshot_ext_flow': 'demo', 'snapshot_ext_size': '4096',
            'snapshot_ext_transfer': 'demo-transfer',
            'snapshot_ext_consistency': 'filesystem'}
        for description in self.service.descriptions:
            description.properties.pop('snapshot_ext_guest_pause_ms')
        vdb, _, root = (
            each.properties for each in self.service.descriptions)
        self.assertEqual(
            {**common, 'of_server': '7', 'snapshot_ext_device': 'vdb',
             'snapshot_ext_kind': 'data'}, vdb)
        self.assertEqual(
            {**common, 'mine': '1', 'snapshot_ext_device': 'vda',
             'snapshot_ext_kind': 'root', 'snapshot_ext_rollback': 'memory'},
            root)

    def test_each_snapshot_has_an_id_of_its_own(self) -> None:
        self.take()
        self.take()
        groups = [each.properties['snapshot_ext_group']
                  for each in self.service.descriptions]
        self.assertEqual(2, len(set(groups)))
        self.assertEqual(1, len(set(groups[:3])))

    def test_root_disk_alone_has_no_group(self) -> None:
        self.disks = requests.Disks.ROOT
        self.take()
        [description] = self.service.descriptions
        self.assertNotIn('snapshot_ext_group', description.properties)

    def test_long_name_ends_in_the_device(self) -> None:
        self.name = 'snap' * 63 + 'xyz'
        self.take()
        self.assertEqual(
            [255, 255, 255],
            [len(each.name) for each in self.service.descriptions])
        self.assertTrue(self.service.descriptions[0].name.endswith('-vdb'))

    def test_progress_counts_the_bytes_of_all(self) -> None:
        for independent in (True, False):
            self.transfer.independent = independent
            told: list[tuple[int, int]] = []
            self.progress = (   # type: ignore[method-assign]
                lambda *each: told.append(each))
            reports: list[int] = []
            self.service.sending = lambda: reports.append(told[-1][0])
            self.take()
            self.assertEqual([0, 5, 10], reports)
            # What is not known yet is the most that it may be.
            self.assertIn((0, 5 + 2 * 12345), told)
            self.assertEqual((15, 15), told[-1])

    def test_account_is_of_all(self) -> None:
        result = self.take()
        self.assertEqual(
            (3, 15, 15, 15, 'somewhere'),
            self.values('disks', 'image_bytes', 'sent_bytes', 'staged_bytes',
                        'image'))
        self.assertEqual(
            ['somewhere', 'somewhere-vdb', 'somewhere-vdc'],
            [image.location for image in result.images])

    def test_nothing_is_left_when_one_of_them_fails(self) -> None:
        for independent in (True, False):
            for number in range(3):
                journal.clear()
                self.service.sent = 0
                self.transfer.independent = independent

                def send(number: int = number) -> None:
                    if self.service.sent == number:
                        raise exception.ImageRefused('413')
                self.service.sending = send
                self.assertRaisesRegex(
                    exception.ImageRefused, '413', self.take)
                self.assertNothingIsLeft()
                self.assertEqual([], journal.of('keep'))

    def test_end_before_its_time_ends_all(self) -> None:
        def send() -> None:
            if self.service.sent == 1:
                self.cancellation.cancel(exception.ImageGone('by a tenant'))
        self.service.sending = send
        self.assertRaisesRegex(exception.ImageGone, 'by a tenant', self.take)
        self.assertEqual(1, self.service.sent)
        self.assertNothingIsLeft()


class TestPlan(SnapshotTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.flows = {'one': DemoFlow('one'), 'two': DemoFlow('two')}
        self.transfers = {'demo': self.transfer}
        self.patch_name('nova_snapshot_ext.plugins.load', self.load)

    def load(self, namespace: str, name: str,
             setting: str) -> collections.abc.Callable[[], object]:
        found: dict[str, typing.Any] = {**self.flows, **self.transfers}
        if name not in found:
            raise exception.InvalidSetting(setting, name, 'not installed')
        return lambda: found[name]

    def plan(self, exact: bool = False, transfer_names: tuple[
            str, ...] = ('demo',), **changes: object) -> snapshot.Plan:
        planned = snapshot.plan(
            self.guest, self.host,
            selection.Wish(('one', 'two'), 'a test', exact), transfer_names,
            self.request(**changes))
        self.assertEqual([], self.journal, 'the guest was touched')
        return planned

    def test_plan_touches_nothing(self) -> None:
        planned = self.plan()
        self.assertEqual(
            ['one', 'two'], [each.name for each in planned.candidates])
        self.assertEqual(
            ['demo'], [each.name for each in planned.transfers])
        self.assertEqual([], journal)
        self.assertEqual([], os.listdir(self.state))

    def test_snapshot_in_flight_is_told_before_what_it_does(self) -> None:
        self.flows['one'].why = self.flows['two'].why = (
            'another job of the guest is under way: backup')
        with self.new_log():
            self.assertRaises(exception.GuestBusy, self.plan)
        self.assertRaises(exception.NoFlowServes, self.plan)

    def test_what_a_dead_process_left_is_undone_before_obstacles_are_asked(
            self) -> None:
        log = self.new_log()
        log.push(demo_release, what='left over')
        log.close()
        self.patch_name(
            'tests.unit.test_snapshot.DemoFlow.obstacle',
            lambda flow, *arguments: journal.append('obstacle'))
        self.plan()
        self.assertEqual(
            ['undo left over', 'obstacle', 'obstacle'], journal)
        self.assertFalse(os.path.exists(log.path))

    def test_what_can_not_be_undone_is_the_error(self) -> None:
        log = self.new_log()
        log.push(demo_release, what='left over')
        log.close()
        stuck.add('left over')
        self.assertRaises(exception.UndoFailed, self.plan)

    def test_staging_directory_must_exist(self) -> None:
        self.assertRaisesRegex(
            exception.InvalidSetting, '^--staging = /none', self.plan,
            staging_directory='/none')

    def test_path_of_sockets_has_its_limit(self) -> None:
        self.assertRaisesRegex(
            exception.InvalidSetting, 'socket_directory', self.plan,
            socket_directory='/' + 'x' * 100)

    def test_encrypted_disk_is_refused(self) -> None:
        self.domain.disks = fakes.disk_xml(
            self.path, inside="<encryption format='luks'/>")
        self.assertRaisesRegex(
            exception.UnsafeDisk, 'vda is encrypted', self.plan)

    def add_disk(self, inside: str = '') -> None:
        self.domain.disks += fakes.disk_xml(
            self.new_file('other', b'\0' * 4096), target='vdb',
            inside=inside)

    def test_root_disk_alone_is_the_default(self) -> None:
        self.add_disk()
        self.assertEqual(1, len(self.plan().disks))

    def test_all_disks_are_asked_for_their_obstacles(self) -> None:
        self.add_disk()
        asked: list[list[str]] = []
        self.patch_name(
            'tests.unit.test_snapshot.DemoFlow.obstacle',
            lambda flow, guest, disks, request: asked.append(
                [disk.target for disk in disks]))
        planned = self.plan(disks=requests.Disks.ALL)
        self.assertEqual([['vda', 'vdb']] * 2, asked)
        self.assertEqual(['vda', 'vdb'], [
            each.disk.target for each in planned.disks])

    def test_encrypted_disk_beside_is_refused(self) -> None:
        self.add_disk("<encryption format='luks'/>")
        self.assertRaisesRegex(
            exception.UnsafeDisk, 'vdb is encrypted', self.plan,
            disks=requests.Disks.ALL)
        self.plan()

    def test_room_is_needed_for_all_disks(self) -> None:
        self.add_disk()
        self.transfer.needs = 600
        self.flows['one'].bytes = self.flows['two'].bytes = 500
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: 2199)
        self.assertRaisesRegex(
            exception.NotEnoughRoom, 'this snapshot may need 2200',
            self.plan, disks=requests.Disks.ALL)
        self.plan()

    def test_disk_is_checked_before_the_guest_is_touched(self) -> None:
        self.domain.disks = fakes.disk_xml(self.path, 'qcow2')
        self.assertRaises(exception.UnsafeDisk, self.plan)

    def test_room_for_image_and_flow_is_needed(self) -> None:
        self.transfer.needs = 600
        self.flows['one'].bytes = self.flows['two'].bytes = 500
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: 1099)
        self.assertRaisesRegex(
            exception.NotEnoughRoom,
            'has 1099 bytes free; this snapshot may need 1100', self.plan)
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: 1100)
        self.plan()

    def test_flow_without_room_is_passed_over(self) -> None:
        self.flows['one'].bytes = 500
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: 499)
        self.assertEqual(['two'], [
            each.name for each in self.plan().candidates])
        self.assertIn('two serves; one may need 500 bytes in '
                      f'{self.staging}, where 499 are free',
                      self.output.output)

    def test_unknown_transfer_is_refused(self) -> None:
        self.assertRaisesRegex(
            exception.InvalidSetting, 'transfers = none', self.plan,
            transfer_names=('none',))

    def test_first_transfer_that_can_serve_does(self) -> None:
        other = DemoTransfer()
        other.why = 'it can not'
        self.transfers['other'] = other
        self.assertEqual('demo', self.plan(
            transfer_names=('other', 'demo')).transfers[0].name)
        self.assertIn('other can not serve, it can not', self.output.output)

    def test_obstacles_of_all_transfers_are_named(self) -> None:
        self.transfer.why = 'it can not'
        self.assertRaisesRegex(
            exception.NoFlowServes, 'demo: it can not', self.plan)

    def test_guest_that_is_gone(self) -> None:
        self.domain.gone()
        self.assertRaises(exception.GuestGone, self.plan)
