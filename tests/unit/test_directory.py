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

import contextlib
import hashlib
import io
import json
import os
import threading
import typing

import fixtures

from nova_snapshot_ext import cancellation as cancellations
from nova_snapshot_ext import exception
from nova_snapshot_ext import image_bytes
from nova_snapshot_ext.images import base as images
from nova_snapshot_ext.images import directory
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo
from tests.unit import base

CONTENT = b'image' * 1000


class Bytes(image_bytes.ImageBytes):
    independent = True
    length = len(CONTENT)
    content = CONTENT

    def open(self, algorithm: str | None = None) -> typing.BinaryIO:
        return io.BytesIO(self.content)

    def digest(self, algorithm: str) -> str:
        return hashlib.new(algorithm, CONTENT).hexdigest()


class TestDirectory(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.target = self.new_directory('images')
        self.image = Bytes()
        self.log = self.new_log()

    def service(self) -> directory.DirectoryService:
        return directory.DirectoryService(images.Destination(
            directory=self.target, directory_setting='--to'))

    def publish(self, name: str = 'snap', verify_hash: bool = False,
                progress: requests.Progress = requests.no_progress,
                ) -> images.Published:
        [published] = self.service().publish(
            [self.new(name, progress)], verify_hash, self.log)
        return published

    def new(self, name: str = 'snap',
            progress: requests.Progress = requests.no_progress,
            ) -> images.NewImage:
        return images.NewImage(self.description(name),
                               contextlib.nullcontext(self.image), progress)

    def description(self, name: str = 'snap') -> images.Description:
        return images.Description(
            name, 'qcow2', 'bare', {'snapshot_ext_flow': 'cold'})

    def test_image_and_its_description_are_written(self) -> None:
        published = self.publish(verify_hash=True)
        path = os.path.join(self.target, 'snap.qcow2')
        self.assertEqual(images.Published(path, len(CONTENT)), published)
        with open(path, 'rb') as file:
            self.assertEqual(CONTENT, file.read())
        with open(f'{path}.json') as document:
            self.assertEqual({
                'name': 'snap', 'disk_format': 'qcow2',
                'container_format': 'bare', 'size': len(CONTENT),
                'os_hash_algo': 'sha512',
                'os_hash_value': hashlib.sha512(CONTENT).hexdigest(),
                'properties': {'snapshot_ext_flow': 'cold'},
            }, json.load(document))
        self.assertEqual(2, len(os.listdir(self.target)))

    def test_image_is_for_its_owner_alone(self) -> None:
        old = os.umask(0)
        self.addCleanup(os.umask, old)
        self.publish()
        self.assertEqual([0o600, 0o600], [
            os.stat(os.path.join(self.target, name)).st_mode & 0o777
            for name in os.listdir(self.target)])

    def test_hash_is_ended_when_nobody_wants_the_image(self) -> None:
        gone = exception.ImageGone('nobody wants it')
        self.patch_name('nova_snapshot_ext.images.directory._LOOK_S', 0.01)

        def of_file(path: str, algorithm: str, timeout: int,
                    cancellation: cancellations.Cancellation) -> str:
            self.assertEqual(6 * 3600, timeout)
            ended = threading.Event()
            self.fails = True
            with cancellation.ending(ended.set):
                self.assertTrue(ended.wait(10))
            raise exception.TransferFailed('it was ended')
        self.patch_name('nova_snapshot_ext.digest.of_file', of_file)
        self.fails = False

        def progress(done: int, total: int) -> None:
            if self.fails:
                raise gone
        error = self.assertRaises(
            exception.ImageGone, self.publish, verify_hash=True,
            progress=progress)
        self.assertIs(gone, error)
        self.assertEqual([], os.listdir(self.target))

    def test_name_of_more_than_one_line_is_refused(self) -> None:
        for name in ('a\nb', 'a\0b', 'a\x1b[2J'):
            error = self.assertRaises(
                exception.InvalidSetting, self.publish, name)
            self.assertTrue(str(error).isprintable())

    def test_image_appears_when_it_is_whole(self) -> None:
        seen: list[str] = []
        real = os.link
        self.patch_name('os.link', lambda old, new: (
            seen.append(f'{os.path.basename(new)} '
                        f'{os.stat(old).st_size > 0}'), real(old, new)))
        during: list[list[str]] = []
        self.publish(progress=lambda done, total: during.append(
            [each for each in os.listdir(self.target)
             if not each.startswith('.')]))
        self.assertEqual(['snap.qcow2 True', 'snap.qcow2.json True'], seen)
        self.assertEqual([], during[-1])

    def test_image_is_on_the_disk_before_it_appears(self) -> None:
        real_sync, real_link = os.fsync, os.link

        def sync(descriptor: int) -> None:
            real_sync(descriptor)
            path = os.readlink(f'/proc/self/fd/{descriptor}')
            if path.startswith(self.target):
                self.journal.append('sync')
        self.patch_name('os.fsync', sync)
        self.patch_name('os.link', lambda old, new: (
            self.journal.append('link'), real_link(old, new))[1])
        self.publish()
        self.assertEqual(['sync', 'sync', 'link', 'link', 'sync'],
                         self.journal)

    def test_image_that_came_meanwhile_is_not_overwritten(self) -> None:
        path = os.path.join(self.target, 'snap.qcow2')

        def come(done: int, total: int) -> None:
            with open(path, 'w') as file:
                file.write('precious')
        self.assertRaises(exception.ImageServiceError, self.publish,
                          progress=come)
        with open(path) as file:
            self.assertEqual('precious', file.read())
        self.assertEqual(['snap.qcow2'], os.listdir(self.target))

    def test_existing_image_is_not_overwritten(self) -> None:
        for taken in ('snap.qcow2', 'snap.qcow2.json'):
            path = os.path.join(self.target, taken)
            with open(path, 'w') as file:
                file.write('precious')
            self.assertRaisesRegex(
                exception.InvalidSetting, 'exists already',
                self.service().prepare,
                [self.description('other'), self.description()], 0)
            self.assertRaisesRegex(
                exception.InvalidSetting, 'exists already', self.publish)
            with open(path) as file:
                self.assertEqual('precious', file.read())
            os.unlink(path)

    def test_undo_is_written_before_the_image(self) -> None:
        self.watch_flushes()
        seen: list[str] = []
        self.publish(progress=lambda done, total: seen.extend(
            self.journal.of('flushed')))
        self.assertEqual(['flushed remove_part'] * 2, seen[:2])
        self.assertEqual(0, self.log.pending)

    def assertNothingIsLeft(self) -> None:
        self.assertEqual([], os.listdir(self.target))

    def test_nothing_is_left_of_a_short_image(self) -> None:
        self.image.content = CONTENT[:-1]
        self.assertRaisesRegex(
            exception.ImageServiceError,
            f'{len(CONTENT) - 1} bytes of {len(CONTENT)}', self.publish)
        self.assertNothingIsLeft()

    def test_nothing_is_left_of_other_bytes(self) -> None:
        self.image.content = CONTENT[:-1] + b'?'
        self.assertRaises(exception.ImageServiceError, self.publish,
                          verify_hash=True)
        self.assertNothingIsLeft()

    def test_nothing_is_left_when_writing_fails(self) -> None:
        def full(source: object, target: object, length: int) -> None:
            raise OSError('No space left on device')
        self.patch_name('shutil.copyfileobj', full)
        self.assertRaisesRegex(
            exception.ImageServiceError, 'No space', self.publish)
        self.assertNothingIsLeft()

    def test_nothing_is_left_when_the_image_can_not_appear(self) -> None:
        real = os.link

        def fail(old: str, new: str) -> None:
            if new.endswith('.json'):
                raise OSError('I/O error')
            real(old, new)
        self.patch_name('os.link', fail)
        self.assertRaises(exception.ImageServiceError, self.publish)
        self.assertNothingIsLeft()

    def test_there_must_be_room(self) -> None:
        self.patch_name('nova_snapshot_ext.workspace.free_bytes',
                        lambda path: 99)
        self.assertRaises(exception.NotEnoughRoom, self.service().prepare,
                          [self.description()], 100)
        self.service().prepare([self.description()], 99)
        self.assertNothingIsLeft()

    def test_name_stays_in_the_directory(self) -> None:
        for name, expected in (('../../evil', '_.._evil.qcow2'),
                               ('.hidden', 'hidden.qcow2'),
                               ('..', 'image.qcow2')):
            self.assertEqual(
                os.path.join(self.target, expected),
                self.publish(name).location)

    def test_directory_must_be_set_and_exist(self) -> None:
        self.assertRaises(
            exception.InvalidSetting, directory.DirectoryService,
            images.Destination())
        self.assertRaisesRegex(
            exception.InvalidSetting, '^--to = /none ',
            directory.DirectoryService, images.Destination(
                directory='/none', directory_setting='--to'))

    # Several of one snapshot

    def publish_two(self, fails: bool = False) -> list[images.Published]:
        def progress(done: int, total: int) -> None:
            self.assertEqual([], [name for name in os.listdir(self.target)
                                  if not name.startswith('.')])
            if fails and done:
                raise exception.ImageGone('nobody wants it')
        return self.service().publish(
            [self.new('snap-vdb'), self.new('snap', progress)], False,
            self.log)

    def test_several_appear_when_all_are_whole(self) -> None:
        self.assertEqual(
            [images.Published(os.path.join(self.target, name), len(CONTENT))
             for name in ('snap-vdb.qcow2', 'snap.qcow2')],
            self.publish_two())
        self.assertEqual(
            ['snap-vdb.qcow2', 'snap-vdb.qcow2.json', 'snap.qcow2',
             'snap.qcow2.json'], sorted(os.listdir(self.target)))
        self.assertEqual(0, self.log.pending)

    def test_none_appears_when_one_fails(self) -> None:
        self.assertRaises(exception.ImageGone, self.publish_two, fails=True)
        self.assertNothingIsLeft()

    def test_none_stays_when_one_can_not_appear(self) -> None:
        real = os.link
        for name in ('snap-vdb.qcow2.json', 'snap.qcow2', 'snap.qcow2.json'):
            def fail(old: str, new: str, name: str = name) -> None:
                if os.path.basename(new) == name:
                    raise OSError('I/O error')
                real(old, new)
            with fixtures.MonkeyPatch('os.link', fail):
                self.assertRaises(
                    exception.ImageServiceError, self.publish_two)
            self.assertNothingIsLeft()

    def test_none_stays_when_the_process_dies_between(self) -> None:
        class Death(BaseException):
            pass
        real = os.link

        def die(old: str, new: str) -> None:
            if new.endswith('snap.qcow2'):
                raise Death
            real(old, new)
        # A process that dies undoes nothing.
        with (fixtures.MonkeyPatch('os.link', die),
              fixtures.MonkeyPatch('nova_snapshot_ext.undo.UndoLog._unwind',
                                   lambda *arguments: None)):
            self.assertRaises(Death, self.publish_two)
        self.assertIn('snap-vdb.qcow2', os.listdir(self.target))
        self.log.close()
        undo.UndoLog.adopt(self.log.path, lambda uri, uuid: self.guest,
                           self.host).unwind()
        self.assertNothingIsLeft()

    def test_what_another_put_there_is_not_taken_away(self) -> None:
        path = os.path.join(self.target, 'snap.qcow2')
        real = os.link

        def come(old: str, new: str) -> None:
            if new == path:
                with open(path, 'w') as file:
                    file.write('precious')
            real(old, new)
        with fixtures.MonkeyPatch('os.link', come):
            self.assertRaises(exception.ImageServiceError, self.publish_two)
        with open(path) as file:
            self.assertEqual('precious', file.read())
        self.assertEqual(['snap.qcow2'], os.listdir(self.target))

    def test_only_files_of_ours_lose_their_names(self) -> None:
        around = undo.Surroundings(self.guest, self.host)
        path = self.new_file('precious')
        self.assertRaises(ValueError, directory.remove_unfinished, around,
                          {path: path})
        self.assertTrue(os.path.exists(path))
