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

"""A Glance that answers anything: an image, or one error of ours."""

import contextlib
import io
import json
import types
import typing

import hypothesis
from hypothesis import strategies
import requests as http

from nova_snapshot_ext import exception
from nova_snapshot_ext.images import base as images
from nova_snapshot_ext.images import glance
from tests import fake_glance
from tests.unit import base
from tests.unit import test_glance

LENGTH = len(test_glance.CONTENT)
STATUSES = (200, 201, 204, 301, 400, 401, 403, 404, 409, 410, 413, 415, 429,
            500, 502, 503)

documents = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers()
    | strategies.floats() | strategies.text(max_size=20),
    lambda inner: strategies.lists(inner, max_size=3)
    | strategies.dictionaries(strategies.text(max_size=8), inner, max_size=3),
    max_leaves=8)
#: an image with some of its properties changed or missing
nearly_images = strategies.fixed_dictionaries({}, optional={
    'id': strategies.just(test_glance.IMAGE) | documents,
    'status': strategies.sampled_from(
        ('queued', 'saving', 'active', 'deleted', 'killed')) | documents,
    'size': strategies.just(LENGTH) | documents,
    'name': documents,
    'os_hash_algo': strategies.sampled_from(
        ('sha512', 'md5', 'shake_128', 'none')) | documents,
    'os_hash_value': documents,
})
answers = strategies.tuples(
    strategies.sampled_from((200, 200, 200, 204, *STATUSES)),
    strategies.binary(max_size=40)
    | documents.map(lambda value: json.dumps(value).encode())
    | nearly_images.map(lambda value: json.dumps(value).encode()),
    strategies.sampled_from(('application/json', 'text/html', '')))


class AnyGlance:
    """openstacksdk's proxy, to a server that answers by a list."""

    def __init__(self, planned: list[tuple[int, bytes, str]]) -> None:
        self.planned = planned
        self.asked = 0
        self.session = types.SimpleNamespace(timeout=None)

    def request(self, path: str, method: str,
                **arguments: typing.Any) -> http.Response:
        self.asked += 1
        if self.asked > 500:
            raise AssertionError('it never ends')
        for chunk in arguments.get('data', ()):
            assert chunk
        code, body, kind = self.planned[self.asked % len(self.planned)]
        response = http.Response()
        response.status_code = code
        response.raw = io.BytesIO(body)
        response.headers['Content-Type'] = kind
        return response


class TestAnyAnswer(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.now = 0.0
        self.patch_name('nova_snapshot_ext.images.glance.time', self)
        self.log = self.new_log()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def service(self, proxy: AnyGlance,
                image_id: str | None) -> glance.GlanceService:
        return glance.GlanceService(images.Destination(
            glance=proxy, image_id=image_id, retries=1))

    @hypothesis.settings(
        max_examples=200, deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(
        planned=strategies.lists(answers, min_size=1, max_size=6),
        image_id=strategies.sampled_from((test_glance.IMAGE, None)),
        verify_hash=strategies.booleans(),
        disks=strategies.integers(1, 2))
    def test_image_is_whole_or_there_is_one_error(
            self, planned: list[tuple[int, bytes, str]],
            image_id: str | None, verify_hash: bool, disks: int) -> None:
        proxy = AnyGlance(planned)
        began = self.now
        try:
            published = self.service(proxy, image_id).publish(
                [images.NewImage(
                    images.Description('snap', 'qcow2', 'bare', {'a': '1'},
                                       frozenset(['b'])),
                    contextlib.nullcontext(test_glance.Bytes()))] * disks,
                verify_hash, self.log)
        except exception.ImageServiceError as error:
            self.assertTrue(str(error))
            self.assertLess(len(str(error)), 1000)
        else:
            self.assertEqual([LENGTH] * disks,
                             [each.length for each in published])
        self.assertLess(self.now - began, 300)
        self.assertEqual(0, self.log.pending)

    @hypothesis.settings(
        max_examples=100, deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(planned=answers)
    def test_only_a_clear_answer_says_that_the_image_is_gone(
            self, planned: tuple[int, bytes, str]) -> None:
        service = self.service(AnyGlance([planned]), test_glance.IMAGE)
        gone = planned[0] in (404, 410)
        if planned[0] < 400:
            with contextlib.suppress(ValueError, AttributeError, TypeError):
                gone = json.loads(planned[1]).get('status') in (
                    'deleted', 'pending_delete')
        try:
            service.check()
        except exception.ImageGone:
            self.assertTrue(gone)
        except exception.ImageServiceError:
            self.assertFalse(gone)
        else:
            self.assertFalse(gone)


class TestHash(test_glance.GlanceTestCase):

    def test_hash_that_can_not_be_compared_is_none(self) -> None:
        real = fake_glance.Handler.upload

        def upload(handler: fake_glance.Handler, body: bytes) -> None:
            real(handler, body)
            handler.server.images[test_glance.IMAGE].update(
                os_hash_algo=algorithm)
        self.patch_name('tests.fake_glance.Handler.upload', upload)
        algorithm: object
        for algorithm in ('crc32', 'shake_128', ['sha512'], {}, 512, True):
            self.server.add()
            self.assertRaises(exception.ImageDiffers, self.publish,
                              verify_hash=True)
            self.assertEqual({}, self.server.images)


class TestHugeAnswer(test_glance.GlanceTestCase):

    def test_answer_without_end_is_not_read_to_its_end(self) -> None:
        self.patch_name(
            'nova_snapshot_ext.images.glance._MOST_ANSWER', 1000)
        self.server.images[test_glance.IMAGE]['junk'] = 'x' * 10 ** 6
        # It sees the connection break.
        self.server.handle_error = (  # type: ignore[method-assign]
            lambda request, address: None)
        error = self.assertRaises(
            exception.ImageServiceError, self.publish)
        self.assertIn('an answer of more than 1000 bytes', str(error))

    def test_answer_that_drips_is_not_waited_for_for_ever(self) -> None:
        self.patch_name(
            'nova_snapshot_ext.images.glance._ANSWER_TIMEOUT_S', -1)
        self.assertRaises(exception.ImageServiceError, self.publish)

    def test_deep_answer_is_no_crash(self) -> None:
        response = http.Response()
        response._content = b'[' * 10 ** 6
        self.assertRaises(
            exception.ImageServiceError, glance._image_of, response)
