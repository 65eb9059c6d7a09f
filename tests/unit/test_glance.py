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
import threading
import time
import typing

import keystoneauth1.plugin
from keystoneauth1 import session as ksa_session
from openstack import connection

from nova_snapshot_ext import exception
from nova_snapshot_ext import image_bytes
from nova_snapshot_ext.images import base as images
from nova_snapshot_ext.images import glance
from nova_snapshot_ext import request as requests
from tests import fake_glance
from tests.unit import base

CONTENT = bytes(range(256)) * 4096 * 3 + b'tail'
IMAGE = fake_glance.IMAGE


class Token(keystoneauth1.plugin.BaseAuthPlugin):
    """Any token will do, and there is always a newer one."""

    def get_token(self, session: object, **more: object) -> str:
        return 'token'

    def get_endpoint(self, session: object, **more: object) -> str:
        return ''

    def invalidate(self) -> bool:
        return True


class Bytes(image_bytes.ImageBytes):
    independent = True

    def __init__(self) -> None:
        self.length = len(CONTENT)
        self.opened = 0

    def open(self, algorithm: str | None = None) -> typing.BinaryIO:
        self.opened += 1
        return io.BytesIO(CONTENT)

    def digest(self, algorithm: str) -> str:
        return hashlib.new(algorithm, CONTENT).hexdigest()


class GlanceTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.patch_name('nova_snapshot_ext.images.glance._RETRY_S', 0)
        self.server = fake_glance.served(self)
        self.server.add()
        self.image = Bytes()
        self.log = self.new_log()

    def proxy(self) -> typing.Any:
        cloud = connection.Connection(
            session=ksa_session.Session(auth=Token()),
            image_endpoint_override=self.server.url, image_api_version='2',
            image_connect_retries=2, image_status_code_retries=2)
        self.addCleanup(cloud.close)
        return cloud.image

    def description(self, **changes: typing.Any) -> images.Description:
        return images.Description(**{
            'name': 'snap', 'disk_format': 'qcow2',
            'container_format': 'bare', 'properties': {'a': '1'},
            **changes})

    def publish(self, image_id: str | None = IMAGE, retries: int = 2,
                verify_hash: bool = False,
                progress: requests.Progress = requests.no_progress,
                send_timeout: float = 300,
                **changes: typing.Any) -> images.Published:
        [published] = glance.GlanceService(images.Destination(
            glance=self.proxy(), image_id=image_id, retries=retries,
            send_timeout=send_timeout)).publish(
                self.new(progress, **changes), verify_hash, self.log)
        return published

    def new(self, progress: requests.Progress = requests.no_progress,
            **changes: typing.Any) -> list[images.NewImage]:
        return [images.NewImage(
            self.description(**changes),
            contextlib.nullcontext(self.image), progress)]

    def uploads(self) -> int:
        return self.server.seen.count('PUT /file')

    @property
    def stored(self) -> dict[str, typing.Any]:
        return self.server.images[IMAGE]


class TestUpload(GlanceTestCase):

    def test_size_is_announced_and_nothing_is_chunked(self) -> None:
        self.publish()
        [headers] = self.server.headers
        self.assertEqual(str(len(CONTENT)), headers['Content-Length'])
        self.assertEqual(str(len(CONTENT)),
                         headers['X-OpenStack-Image-Size'])
        self.assertNotIn('Transfer-Encoding', headers)
        self.assertEqual('application/octet-stream',
                         headers['Content-Type'])

    def test_bytes_arrive(self) -> None:
        published = self.publish(verify_hash=True)
        self.assertEqual([CONTENT], self.server.bodies)
        self.assertEqual(images.Published(IMAGE, len(CONTENT)), published)

    def test_progress_ends_with_the_whole(self) -> None:
        told: list[tuple[int, int]] = []
        self.publish(progress=lambda *done: told.append(done))
        self.assertEqual((len(CONTENT), len(CONTENT)), told[-1])

    def test_broken_connection_is_tried_again_from_the_first_byte(
            self) -> None:
        self.server.plan['PUT /file'] = ['cut', 'cut']
        self.publish()
        self.assertEqual(3, self.uploads())
        self.assertEqual(3, self.image.opened)
        self.assertEqual([CONTENT], self.server.bodies)

    def test_there_are_as_many_attempts_as_are_set(self) -> None:
        self.server.plan['PUT /file'] = ['cut'] * 9
        self.assertRaises(exception.ImageServiceUnreachable, self.publish)
        self.assertEqual(3, self.uploads())

    def test_overloaded_server_gets_the_whole_body_again(self) -> None:
        for status in (502, 503, 504):
            self.server.add()
            self.server.bodies.clear()
            self.server.plan['PUT /file'] = [status]
            self.publish()
            self.assertEqual([CONTENT, CONTENT], self.server.bodies)

    def test_every_body_ever_sent_is_whole(self) -> None:
        # keystoneauth itself repeats a request after 401 with a new token,
        # after a redirection and after some errors: with what is left of
        # a body that was read.
        for status in (401, 301, 302, 307, 308, 503):
            self.server.add()
            self.server.plan['PUT /file'] = [status] * 9
            self.image = Bytes()
            self.server.bodies.clear()
            with contextlib.suppress(exception.ImageServiceError):
                self.publish()
            self.assertEqual(
                [CONTENT] * self.image.opened, self.server.bodies, status)

    def test_redirected_upload_is_refused(self) -> None:
        self.server.plan['PUT /file'] = [307]
        self.assertRaises(exception.ImageRefused, self.publish)
        self.assertEqual(1, self.uploads())

    def test_refusal_is_not_tried_again(self) -> None:
        for status in (400, 401, 403, 409, 413, 415, 500):
            self.server.add()
            self.server.seen.clear()
            self.server.plan['PUT /file'] = [status]
            self.assertRaisesRegex(
                exception.ImageRefused, f'{status} no way', self.publish)
            self.assertEqual(1, self.uploads())

    def test_image_that_was_deleted_is_gone(self) -> None:
        for status in (404, 410):
            self.server.plan['PUT /file'] = [status]
            self.server.seen.clear()
            self.assertRaises(exception.ImageGone, self.publish)
            self.assertEqual(1, self.uploads())

    def test_image_that_was_deleted_before_is_gone(self) -> None:
        self.server.images.clear()
        self.assertRaises(exception.ImageGone, self.publish)
        self.assertEqual(0, self.uploads())

    def test_image_that_is_deleted_between_attempts_is_gone(self) -> None:
        self.server.plan['PUT /file'] = ['cut']
        self.server.plan['GET'] = [None, None, 404]
        self.assertRaises(exception.ImageGone, self.publish)
        self.assertEqual(1, self.uploads())

    def test_upload_whose_answer_was_lost_is_not_sent_again(self) -> None:
        self.server.plan['PUT /file'] = ['lost answer']
        self.publish(verify_hash=True)
        self.assertEqual(1, self.uploads())

    def test_length_that_was_sent_counts_when_the_answer_was_lost(
            self) -> None:
        # Another look at the same disk may find other holes.
        real = self.image.open

        def other_length(algorithm: str | None = None) -> typing.BinaryIO:
            file = real(algorithm)
            self.image.length = len(CONTENT) + self.image.opened - 1
            return file
        self.image.open = other_length  # type: ignore[method-assign]
        self.server.plan['PUT /file'] = ['lost answer']
        published = self.publish()
        self.assertEqual(1, self.image.opened)
        self.assertEqual(len(CONTENT), published.length)
        self.assertEqual('active', self.stored['status'])

    def test_part_of_the_bytes_is_no_image(self) -> None:
        for image_id in (IMAGE, None):
            self.server.add()
            self.server.plan['PUT /file'] = ['older']

            def progress(done: int, total: int) -> None:
                if done >= 2 * 1024 ** 2:
                    while self.stored['status'] != 'saving':
                        time.sleep(0.01)
                    raise exception.GuestGone('deleted')
            self.assertRaises(exception.GuestGone, self.publish,
                              image_id, progress=progress)
            self.assertEqual({}, self.server.images)
        self.assertIn('is active with', self.output.output)

    def test_whole_image_stays_whatever_comes_after_it(self) -> None:
        self.server.plan['PUT /file'] = ['lost answer']
        self.server.plan['GET'] = [None, None, 500]
        self.assertRaises(exception.ImageRefused, self.publish)
        self.assertEqual('active', self.stored['status'])

    def test_nothing_is_deleted_without_an_answer(self) -> None:
        for answer in (500, 403, 'cut'):
            self.server.add()
            self.server.plan['PUT /file'] = [413]
            self.server.plan['GET'] = [None, None, *[answer] * 9]
            self.assertRaises(exception.ImageRefused, self.publish)
            self.server.plan.clear()
            self.assertNotIn('DELETE', self.server.seen)
        self.assertIn('is not known', self.output.output)

    def test_other_image_of_others_is_left_alone(self) -> None:
        self.server.add(status='active', size=1)
        self.server.plan['PUT /file'] = [409]
        self.assertRaises(exception.ImageRefused, self.publish)
        self.assertEqual('active', self.stored['status'])

    def test_server_that_takes_no_bytes_is_given_up(self) -> None:
        # More than what two sockets keep.
        content = bytes(64 * 1024 ** 2)
        self.image.length = len(content)
        self.image.open = (  # type: ignore[method-assign]
            lambda algorithm=None: io.BytesIO(content))
        self.server.plan['PUT /file'] = ['stall']
        self.assertRaisesRegex(
            exception.ImageServiceUnreachable, 'timed out', self.publish,
            retries=0, send_timeout=1)
        self.assertFalse(self.server.stalled.is_set())

    def test_answer_may_take_longer_than_the_bytes(self) -> None:
        real = fake_glance.Handler.upload

        def upload(handler: fake_glance.Handler, body: bytes) -> None:
            threading.Event().wait(1.5)
            real(handler, body)
        self.patch_name('tests.fake_glance.Handler.upload', upload)
        self.publish(retries=0, send_timeout=1)
        self.assertEqual(1, self.uploads())

    def test_answer_is_not_waited_for_without_end(self) -> None:
        self.patch_name('tests.fake_glance.Handler.upload',
                        lambda handler, body: self.server.stalled.wait(30))
        service = glance.GlanceService(images.Destination(
            glance=self.proxy(), image_id=IMAGE, answer_timeout=1))
        self.assertRaisesRegex(
            exception.ImageServiceUnreachable, 'timed out', service.publish,
            self.new(), False, self.log)
        self.assertFalse(self.server.stalled.is_set())

    def test_no_request_is_waited_for_without_end(self) -> None:
        for key in ('GET', 'PATCH', 'DELETE', 'POST'):
            self.server.images.clear()
            self.server.add()
            self.server.plan = {key: ['stall'] * 9}
            self.server.seen.clear()
            # What arrives differs, so the image is deleted.
            self.server.short_by = int(key == 'DELETE')
            image_id = None if key == 'POST' else IMAGE
            self.assertRaises(
                exception.ImageServiceError, self.publish, image_id,
                retries=0, send_timeout=0.2)
            self.assertIn(key, self.server.seen)
        self.assertFalse(self.server.stalled.is_set())

    def test_novas_own_time_out_goes_first(self) -> None:
        self.server.plan['GET'] = ['stall'] * 9
        proxy = self.proxy()
        proxy.session.timeout = 0.2
        service = glance.GlanceService(images.Destination(
            glance=proxy, image_id=IMAGE))
        self.assertRaises(
            exception.ImageServiceUnreachable, service.publish,
            self.new(), False, self.log)

    def test_length_is_announced_before_it_is_sent(self) -> None:
        announced: list[tuple[int, int]] = []
        self.server.plan['PUT /file'] = [503]
        glance.GlanceService(images.Destination(
            glance=self.proxy(), image_id=IMAGE, retries=1,
            announce=lambda length: announced.append(
                (length, self.uploads())))).publish(
                    self.new(), False, self.log)
        self.assertEqual([(len(CONTENT), 0), (len(CONTENT), 1)], announced)

    def test_bytes_of_others_are_not_taken_for_ours(self) -> None:
        self.server.add(status='active', size=len(CONTENT))
        self.server.plan['PUT /file'] = [409]
        self.assertRaises(exception.ImageRefused, self.publish)
        self.assertEqual(1, self.uploads())

    def test_upload_waits_until_glance_knows_that_the_last_one_broke(
            self) -> None:
        self.server.add(status='saving')
        asked = 0

        def sleep(seconds: float) -> None:
            nonlocal asked
            asked += 1
            self.assertEqual(0, self.uploads())
            if asked == 3:
                self.server.add()
        self.patch_name('time.sleep', sleep)
        self.publish()
        self.assertEqual(3, asked)

    def test_error_of_the_progress_ends_the_upload(self) -> None:
        for last in (0, 1024 ** 2):
            self.server.add()
            self.server.seen.clear()
            reason = exception.GuestGone('deleted')

            def progress(done: int, total: int) -> None:
                if done >= last:
                    raise reason
            self.assertIs(reason, self.assertRaises(
                exception.GuestGone, self.publish, progress=progress))
            self.assertEqual('queued', self.stored['status'])
            self.assertLessEqual(self.uploads(), 1)

    def test_server_that_is_not_there(self) -> None:
        proxy = self.proxy()
        self.server.shutdown()
        self.server.server_close()
        service = glance.GlanceService(images.Destination(
            glance=proxy, image_id=IMAGE))
        self.patch_name('time.sleep', lambda seconds: None)
        self.assertRaises(
            exception.ImageServiceUnreachable, service.publish,
            self.new(), False, self.log)

    def test_transfer_that_can_not_be_read_is_not_tried_again(self) -> None:
        opened = []

        def fail(algorithm: str | None = None) -> typing.BinaryIO:
            opened.append(1)
            raise exception.TransferFailed('the source is gone')
        self.image.open = fail  # type: ignore[method-assign]
        self.assertRaises(exception.TransferFailed, self.publish)
        self.assertEqual(1, len(opened))

    def test_there_must_be_a_cloud(self) -> None:
        self.assertRaises(exception.InvalidSetting, glance.GlanceService,
                          images.Destination())


class TestCheck(GlanceTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.service = glance.GlanceService(images.Destination(
            glance=self.proxy(), image_id=IMAGE, retries=2))

    def test_image_that_is_there(self) -> None:
        for status in ('queued', 'saving', 'active'):
            self.server.add(status=status)
            self.service.check()

    def test_image_that_is_gone(self) -> None:
        for status in (404, 410):
            self.server.plan['GET'] = [status]
            self.assertRaises(exception.ImageGone, self.service.check)
        for word in ('deleted', 'pending_delete'):
            self.server.add(status=word)
            self.assertRaises(exception.ImageGone, self.service.check)

    def test_no_other_answer_says_that_it_is_gone(self) -> None:
        for status in (401, 403, 500, 502, 503, 'cut'):
            self.server.plan['GET'] = [status] * 9
            self.server.seen.clear()
            with contextlib.suppress(exception.ImageRefused,
                                     exception.ImageServiceUnreachable):
                self.service.check()
            self.assertLessEqual(
                len(self.server.seen), 2 if status == 'cut' else 1,
                'it insists')

    def test_image_that_is_not_made_yet_is_not_asked_for(self) -> None:
        glance.GlanceService(images.Destination(glance=self.proxy())).check()
        self.assertEqual([], self.server.seen)

    def test_image_that_was_made_is_asked_for(self) -> None:
        service = glance.GlanceService(
            images.Destination(glance=self.proxy()))
        service.publish(self.new(), False, self.log)
        service.check()
        self.server.images.clear()
        self.assertRaises(exception.ImageGone, service.check)

    def test_own_deletion_is_no_news(self) -> None:
        self.server.short_by = 1
        self.assertRaises(
            exception.ImageDiffers, self.service.publish,
            self.new(), False, self.log)
        self.assertEqual({}, self.server.images)
        self.service.check()

    def test_own_deletion_while_it_is_asked_is_no_news(self) -> None:
        real = self.service._request

        def request(method: str, *arguments: typing.Any,
                    **more: typing.Any) -> typing.Any:
            if method == 'GET':
                self.service._delete(IMAGE)
            return real(method, *arguments, **more)
        self.service._request = request  # type: ignore[method-assign]
        self.service.check()
        self.assertEqual({}, self.server.images)


class TestVerify(GlanceTestCase):

    def test_other_size_is_refused_and_the_image_deleted(self) -> None:
        self.server.short_by = 1
        self.assertRaisesRegex(
            exception.ImageRefused, f'{len(CONTENT)} were sent',
            self.publish)
        self.assertEqual({}, self.server.images)

    def test_other_status_is_refused(self) -> None:
        for status in ('queued', 'saving', 'killed'):
            self.server.add()
            self.patch_name(
                'tests.fake_glance.Handler.upload',
                lambda handler, body: handler.server.images[IMAGE].update(
                    status=status, size=len(body)))
            self.assertRaisesRegex(
                exception.ImageRefused, f'is {status}', self.publish)

    def test_other_hash_is_refused_and_the_image_deleted(self) -> None:
        self.server.wrong_hash = True
        self.assertRaisesRegex(
            exception.ImageRefused, 'was sent', self.publish,
            verify_hash=True)
        self.assertEqual({}, self.server.images)

    def test_hash_is_not_compared_unless_it_is_asked_for(self) -> None:
        self.image.digest = (  # type: ignore[method-assign]
            lambda algorithm: self.fail('it was computed'))
        self.publish()

    def test_missing_hash_is_refused(self) -> None:
        self.patch_name(
            'tests.fake_glance.Handler.upload',
            lambda handler, body: handler.server.images[IMAGE].update(
                status='active', size=len(body)))
        self.assertRaisesRegex(
            exception.ImageRefused, 'no hash', self.publish,
            verify_hash=True)


class TestDescription(GlanceTestCase):

    def test_properties_are_set_before_the_bytes(self) -> None:
        self.publish(name='other', properties={'a/b~1c': '1', 'd': '2'})
        self.assertEqual(
            ('other', 'qcow2', 'bare', '1', '2'),
            tuple(self.stored[name] for name in (
                'name', 'disk_format', 'container_format', 'a/b~1c', 'd')))
        self.assertLess(self.server.seen.index('PATCH'),
                        self.server.seen.index('PUT /file'))

    def test_inherited_property_is_overwritten(self) -> None:
        self.server.add(snapshot_ext_flow='live')
        self.publish(properties={'snapshot_ext_flow': 'cold'},
                     removed=frozenset(['snapshot_ext_flow']))
        self.assertEqual('cold', self.stored['snapshot_ext_flow'])

    def test_removed_properties_are_removed(self) -> None:
        self.server.add(snapshot_flow='cold', kept='yes')
        self.publish(removed=frozenset(['snapshot_flow', 'not_there']))
        self.assertNotIn('snapshot_flow', self.stored)
        self.assertEqual('yes', self.stored['kept'])

    def test_nothing_is_patched_that_is_right(self) -> None:
        self.server.add(disk_format='qcow2', container_format='bare', a='1')
        self.publish()
        self.assertNotIn('PATCH', self.server.seen)

    def test_broken_connection_is_tried_again(self) -> None:
        self.server.plan['PATCH'] = [503]
        self.publish()
        self.assertEqual('1', self.stored['a'])


class TestOwnImage(GlanceTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.server.images.clear()

    def test_it_is_made(self) -> None:
        published = self.publish(None)
        self.assertEqual(IMAGE, published.location)
        self.assertEqual('active', self.stored['status'])

    def test_it_is_deleted_when_the_upload_fails(self) -> None:
        for plan in ([413], ['cut'] * 3, [404]):
            self.server.plan['PUT /file'] = list(plan)
            self.assertRaises(
                exception.ImageServiceError, self.publish, None)
            self.assertEqual({}, self.server.images)

    def test_it_is_deleted_when_its_size_is_wrong(self) -> None:
        self.server.short_by = 1
        self.assertRaises(exception.ImageRefused, self.publish, None)
        self.assertEqual({}, self.server.images)

    def test_failed_deletion_does_not_hide_the_error(self) -> None:
        self.server.plan['PUT /file'] = [413]
        self.server.plan['DELETE'] = [409]
        self.assertRaisesRegex(
            exception.ImageRefused, '413', self.publish, None)
        self.assertIn('could not be deleted', self.output.output)

    def test_nobody_elses_image_is_deleted(self) -> None:
        self.server.add()
        self.server.plan['PUT /file'] = [413]
        self.assertRaises(exception.ImageRefused, self.publish)
        self.assertNotIn('DELETE', self.server.seen)

    def test_refused_creation(self) -> None:
        self.server.plan['POST'] = [403]
        self.assertRaisesRegex(
            exception.ImageRefused, 'a new image: 403', self.publish, None)
        self.assertEqual(['POST'], self.server.seen)
