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
import typing

from nova_snapshot_ext import exception
from nova_snapshot_ext.flows import base as flows
from nova_snapshot_ext import frozen
from nova_snapshot_ext import image_bytes
from nova_snapshot_ext.images import base as images
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
                 error: Exception | None = None) -> None:
        self.name = name
        self.error = error
        self.why: str | None = None
        self.bytes = 0

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
                frozen.Consistency.FILESYSTEM, pause)
        journal.append(f'released {self.name}')


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
        path = os.path.join(request.staging_directory, 'image')
        with log.scope():
            log.push(remove_image, path=path)
            with open(path, 'wb') as file:
                file.write(b'image')
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

    def prepare(self, description: images.Description,
                most_bytes: int) -> None:
        assert most_bytes == 12345
        if self.refusal is not None:
            raise self.refusal

    def publish(
            self, image: image_bytes.ImageBytes,
            description: images.Description,
            verify_hash: bool, progress: requests.Progress,
            log: undo.UndoLog) -> images.Published:
        journal.append('publish')
        self.descriptions.append(description)
        self.verified.append(verify_hash)
        if self.error is not None:
            raise self.error
        with image.open() as file:
            content = file.read()
        assert content == b'image', content
        return images.Published('somewhere', len(content))


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
        self.path = self.new_file('disk', b'\0' * 4096)
        self.domain.disks = fakes.disk_xml(self.path)
        self.service = DemoService()
        self.transfer = DemoTransfer()


class TestTake(SnapshotTestCase):

    def take(self, *candidates: DemoFlow,
             **changes: typing.Any) -> snapshot.Result:
        planned = snapshot.Plan(
            self.guest.root_disk(),
            [selection.Candidate(flow.name, flow)
             for flow in candidates or (DemoFlow(),)],
            [snapshot.ChosenTransfer('demo-transfer', self.transfer)], 12345)
        return snapshot.take(
            self.guest, self.host, planned, self.request(), self.service,
            images.Description('snap', 'raw', 'bare', {'mine': '1'}),
            **changes)

    def logs(self) -> list[str]:
        return os.listdir(self.state)

    def test_recipe(self) -> None:
        result = self.take(before_upload=lambda: journal.append('upload'))
        self.assertEqual(
            ['guard', 'freeze demo', 'transfer vda', 'undo demo',
             'released demo', 'upload', 'publish', 'remove image',
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

    def test_one_line_says_what_was_done(self) -> None:
        self.take()
        [line] = [line for line in self.output.output.splitlines()
                  if line.startswith('Snapshot of')]
        for word in ('instance-00000001', 'flow demo',
                     'transfer demo-transfer', 'consistency filesystem',
                     'guest paused', '5 bytes', 'somewhere'):
            self.assertIn(word, line)


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
            self.guest, selection.Wish(('one', 'two'), 'a test', exact),
            transfer_names, self.request(**changes))
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

    def test_disk_is_checked_before_the_guest_is_touched(self) -> None:
        self.domain.disks = fakes.disk_xml(self.path, 'qcow2')
        self.assertRaises(exception.UnsafeDisk, self.plan)

    def test_room_for_image_and_flow_is_needed(self) -> None:
        self.transfer.needs = 600
        self.flows['two'].bytes = 500
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: 1099)
        self.assertRaisesRegex(
            exception.NotEnoughRoom,
            'has 1099 bytes free; this snapshot may need 1100', self.plan)
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: 1100)
        self.plan()

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
