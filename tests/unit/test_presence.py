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

import typing

from keystoneauth1 import exceptions as keystone_exceptions
import requests as http

from nova_snapshot_ext import exception
from nova_snapshot_ext.images import presence
from tests.unit import base


class FakeGlance:
    """openstacksdk's image proxy, which has one answer."""

    def __init__(self, status: int, body: typing.Any = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self.error: Exception | None = None
        self.response = http.Response()
        self.response.status_code = status
        self.response.url = 'http://glance/v2/images/i'
        self.response.json = lambda: body   # type: ignore[method-assign]

    def request(self, path: str, method: str, timeout: int) -> http.Response:
        self.asked.append((method, path))
        if self.error is not None:
            raise self.error
        return self.response


class TestPresence(base.TestCase):

    def shown(self, status: int, body: typing.Any = None) -> bool:
        glance = FakeGlance(status, body)
        try:
            return presence.is_shown(glance, 'i')
        finally:
            self.assertEqual([('GET', '/images/i')], glance.asked)

    def test_image_that_is_there(self) -> None:
        for status in ('active', 'queued', 'saving', 'deactivated'):
            self.assertTrue(self.shown(200, {'id': 'i', 'status': status}))

    def test_image_that_was_deleted(self) -> None:
        self.assertFalse(self.shown(404))
        for status in ('deleted', 'pending_delete'):
            self.assertFalse(self.shown(200, {'id': 'i', 'status': status}))

    def test_no_other_answer_says_that_it_is_gone(self) -> None:
        for status, body in ((401, None), (403, None), (500, None),
                             (503, None), (200, None), (200, []),
                             (200, {'status': 'deleted'}),
                             (200, {'id': 'j', 'status': 'deleted'})):
            self.assertRaises(exception.ImageServiceError,
                              self.shown, status, body)

    def test_nor_does_none(self) -> None:
        for error in (http.exceptions.ConnectionError('refused'),
                      keystone_exceptions.ConnectFailure('refused'),
                      keystone_exceptions.Unauthorized('expired')):
            glance = FakeGlance(200)
            glance.error = error
            self.assertRaises(exception.ImageServiceError,
                              presence.is_shown, glance, 'i')
