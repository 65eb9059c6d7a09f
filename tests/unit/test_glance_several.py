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

"""Images of several disks in Glance: all of them, or none."""

import collections.abc
import contextlib
import typing

from nova_snapshot_ext import exception
from nova_snapshot_ext.images import base as images
from nova_snapshot_ext.images import glance
from tests.unit import test_glance

IMAGE = test_glance.IMAGE
LENGTH = len(test_glance.CONTENT)


class SeveralTestCase(test_glance.GlanceTestCase):
    """The images of two further disks, and of the root disk."""

    def setUp(self) -> None:
        super().setUp()
        self.server.add(owner='tenant', instance_uuid='server-1')
        #: images of further disks that there may be
        self.open: list[str] = []
        self.announced: list[int] = []
        #: called while the bytes of each are sent
        self.sending: list[collections.abc.Callable[[], object]] = [
            lambda: None] * 3

    def begin(self, image_id: str) -> None:
        self.assertNotIn(image_id, self.server.images)
        self.open.append(image_id)

    def take(self, image_id: str | None = IMAGE, verify_hash: bool = False,
             retries: int = 2) -> list[images.Published]:
        self.service = glance.GlanceService(images.Destination(
            glance=self.proxy(), image_id=image_id, retries=retries,
            announce=self.announced.append, begin_further=self.begin,
            end_further=self.open.remove))
        return self.service.publish(
            [self.new_of(number, name) for number, name in enumerate(
                ('snap-vdb', 'snap-vdc', 'snap'))], verify_hash, self.log)

    def new_of(self, number: int, name: str) -> images.NewImage:
        def progress(done: int, total: int) -> None:
            self.sending[number]()
        return images.NewImage(
            self.description(name=name, properties={
                'snapshot_ext_group': IMAGE}),
            contextlib.nullcontext(test_glance.Bytes()), progress)

    @property
    def further(self) -> list[dict[str, typing.Any]]:
        return [image for image_id, image in self.server.images.items()
                if image_id != IMAGE]

    def fails(self, error: type[Exception] = exception.ImageServiceError,
              **arguments: typing.Any) -> Exception:
        return self.assertRaises(error, self.take, **arguments)

    def assertNoneIsLeft(self) -> None:
        """Of further disks, and no bytes of the root disk."""
        self.assertEqual([], self.further)
        self.assertEqual([], self.open)
        self.assertNotEqual('active', self.server.images.get(
            IMAGE, {}).get('status'))


class TestAll(SeveralTestCase):

    def test_each_has_its_bytes_and_its_description(self) -> None:
        published = self.take(verify_hash=True)
        self.assertEqual([*self.open, IMAGE],
                         [each.location for each in published])
        self.assertEqual([LENGTH] * 3, [each.length for each in published])
        self.assertEqual([test_glance.CONTENT] * 3, self.server.bodies)
        for image, name in zip(self.further, ('snap-vdb', 'snap-vdc'),
                               strict=True):
            self.assertEqual(
                ('active', name, 'qcow2', 'bare', IMAGE, LENGTH),
                (image['status'], image['name'], image['disk_format'],
                 image['container_format'], image['snapshot_ext_group'],
                 image['size']))

    def test_further_ones_are_the_tenants_and_nobody_elses(self) -> None:
        self.take()
        for image in self.further:
            self.assertEqual(('tenant', 'private'),
                             (image['owner'], image['visibility']))
            # Nova's words on the image of the root disk are not for others.
            self.assertNotIn('instance_uuid', image)

    def test_they_are_hidden_until_the_last_is_whole(self) -> None:
        seen: list[list[tuple[str, bool]]] = []
        self.sending = [lambda: seen.append([
            (image['status'], image['os_hidden'])
            for image in self.further])] * 3
        self.take()
        self.assertEqual([('active', True), ('active', True)], seen[-1])
        self.assertEqual({True}, {hidden for each in seen
                                  for _, hidden in each})
        self.assertEqual([False, False],
                         [image['os_hidden'] for image in self.further])

    def test_each_further_one_names_itself(self) -> None:
        self.take()
        self.assertEqual([image['id'] for image in self.further],
                         [image['snapshot_ext_image']
                          for image in self.further])
        self.assertNotIn('snapshot_ext_image', self.stored)

    def test_lengths_are_announced_of_the_root_disk_alone(self) -> None:
        self.take()
        self.assertEqual([LENGTH], self.announced)

    def test_those_of_an_own_image_are_who_makes_it(self) -> None:
        self.server.images.clear()
        published = self.take(None)
        self.assertEqual(IMAGE, published[-1].location)
        for image in self.further:
            self.assertNotIn('owner', image)
            self.assertIs(False, image['os_hidden'])

    def test_lost_answer_makes_no_second_one(self) -> None:
        self.server.plan['POST'] = ['lost answer']
        self.take()
        self.assertEqual(2, len(self.further))
        self.assertEqual(3, self.server.seen.count('POST'))

    def test_broken_connection_is_tried_again(self) -> None:
        # The one that shows the first of them among others.
        self.server.plan['PATCH'] = ['cut'] * 2
        self.server.plan['PUT /file'] = ['cut'] * 2
        self.take()
        self.assertEqual(5, self.uploads())
        self.assertEqual([False, False],
                         [image['os_hidden'] for image in self.further])


class TestNone(SeveralTestCase):

    def test_one_that_is_refused_is_the_end_of_all(self) -> None:
        for number in range(3):
            self.server.plan['PUT /file'] = [*[None] * number, 413]
            self.fails(exception.ImageRefused)
            self.assertNoneIsLeft()

    def test_image_of_the_root_disk_is_left_to_nova_before_its_turn(
            self) -> None:
        self.server.plan['PUT /file'] = [None, 413]
        self.fails(exception.ImageRefused)
        self.assertEqual('queued', self.stored['status'])

    def test_one_that_can_not_be_made_is_the_end_of_all(self) -> None:
        for number in range(2):
            self.server.plan['POST'] = [*[None] * number, 403]
            self.fails(exception.ImageRefused)
            self.assertNoneIsLeft()

    def test_one_that_differs_is_the_end_of_all(self) -> None:
        self.server.wrong_hash = True
        self.fails(exception.ImageDiffers, verify_hash=True)
        self.assertNoneIsLeft()

    def test_one_that_can_not_be_shown_is_the_end_of_all(self) -> None:
        for number in range(2):
            self.server.add()
            # The first describes the image of the root disk.
            self.server.plan['PATCH'] = [*[None] * (number + 1), 403]
            self.fails(exception.ImageRefused)
            self.assertNoneIsLeft()
            self.assertEqual({}, self.server.images)

    def test_whole_image_of_the_root_disk_does_not_stay_alone(self) -> None:
        def break_down() -> None:
            self.server.refused['GET'] = 500
        self.sending[2] = break_down
        self.fails()
        self.assertNoneIsLeft()

    def test_deleting_the_root_disks_ends_all(self) -> None:
        def end() -> None:
            raise exception.ImageGone('deleted by a tenant')
        for number in range(3):
            self.server.add()
            self.sending = [lambda: None] * 3
            self.sending[number] = end
            self.assertEqual(
                'deleted by a tenant', str(self.fails(exception.ImageGone)))
            self.assertNoneIsLeft()

    def test_deleting_another_is_no_word_about_the_root_disks(self) -> None:
        def delete() -> None:
            for image in self.further:
                del self.server.images[image['id']]
            self.server.plan['PUT /file'] = [404]
        for number in range(2):
            self.sending = [lambda: None] * 3
            self.sending[number] = delete
            error = self.fails(exception.ImageRefused)
            self.assertNotIsInstance(error, exception.ImageGone)
            self.service.check()
            self.assertNoneIsLeft()

    def test_process_that_is_ended_takes_them_with_it(self) -> None:
        def end() -> None:
            raise KeyboardInterrupt
        self.sending[1] = end
        self.assertRaises(KeyboardInterrupt, self.take)
        self.assertNoneIsLeft()

    def test_one_that_is_not_deleted_is_remembered(self) -> None:
        self.server.plan['PUT /file'] = [None, 413]
        self.server.plan['DELETE'] = [403]
        self.fails(exception.ImageRefused)
        [image] = self.further
        self.assertEqual([image['id']], self.open)
        self.assertIs(True, image['os_hidden'])
        self.assertIn(f'Image {image["id"]} could not be deleted',
                      self.output.output)

    def test_own_image_goes_too(self) -> None:
        self.server.images.clear()
        self.server.plan['PATCH'] = [None, 403]
        self.fails(exception.ImageRefused, image_id=None)
        self.assertEqual({}, self.server.images)

    def test_owner_that_can_not_be_asked_for_is_the_end(self) -> None:
        self.server.plan['GET'] = [403]
        self.fails(exception.ImageRefused)
        self.assertNotIn('POST', self.server.seen)

    def test_same_service_may_try_again(self) -> None:
        self.server.plan['PUT /file'] = [None, 413]
        self.fails(exception.ImageRefused)
        self.sending = [lambda: None] * 3
        self.service.publish(
            [self.new_of(0, 'snap-vdb'), self.new_of(2, 'snap')], False,
            self.log)
        self.assertEqual(['active'],
                         [image['status'] for image in self.further])

    def thaw(self, status: str) -> None:
        """Lose the root disk when its bytes are under way."""
        def sending() -> None:
            if self.announced:
                self.stored['status'] = status
                raise exception.DiskThawed('1 byte is free')
        self.sending[2] = sending

    def test_root_disks_may_be_tried_again_when_its_bytes_broke_off(
            self) -> None:
        self.thaw('queued')
        self.fails(exception.DiskThawed)
        self.assertNoneIsLeft()
        self.assertEqual('queued', self.stored['status'])
        self.sending = [lambda: None] * 3
        self.service.publish(
            [self.new_of(0, 'snap-vdb'), self.new_of(2, 'snap')], False,
            self.log)
        self.assertEqual('active', self.stored['status'])

    def test_root_disks_that_may_become_whole_goes(self) -> None:
        self.patch_name(
            'nova_snapshot_ext.images.glance._CUT_OFF_TIMEOUT_S', 0)
        self.thaw('saving')
        self.fails(exception.DiskThawed)
        self.assertEqual({}, self.server.images)
        # Who tries again is not told that a tenant has deleted it.
        error = self.assertRaises(
            exception.ImageRefused, self.service.publish,
            [self.new_of(0, 'snap-vdb'), self.new_of(2, 'snap')], False,
            self.log)
        self.assertNotIsInstance(error, exception.ImageGone)
        self.assertEqual({}, self.server.images)

    def test_none_goes_before_that_of_the_root_disk(self) -> None:
        # It is whole, and nobody got the answer.
        self.server.plan['PUT /file'] = [None, None, 'lost answer']
        self.server.plan['DELETE'] = [403]
        self.fails(exception.ImageServiceUnreachable, retries=0)
        self.assertEqual('active', self.stored['status'])
        self.assertEqual(self.open, [image['id'] for image in self.further])
        self.assertEqual([('active', True)] * 2, [
            (image['status'], image['os_hidden']) for image in self.further])

    def test_glance_that_hangs_does_not_hold_the_disks_for_long(self) -> None:
        self.patch_name(
            'nova_snapshot_ext.images.glance._TIDY', {'timeout': 0.1})
        self.server.plan['PUT /file'] = [None, 413]
        self.server.plan['DELETE'] = ['stall'] * 4
        self.fails(exception.ImageRefused)
        self.assertEqual(self.open, [image['id'] for image in self.further])
