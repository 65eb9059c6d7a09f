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

"""A token is in no log, error or file, whatever Glance does."""

import logging
import os
import typing

import fixtures

from nova_snapshot_ext import exception
from tests.unit import base
from tests.unit import fakes
from tests.unit import test_glance

TOKEN = 'gAAAAA-this-is-the-token-of-the-request'
SERVICE_TOKEN = 'gAAAAA-this-is-the-token-of-the-service'


class TestToken(test_glance.GlanceTestCase):

    def setUp(self) -> None:
        super().setUp()
        # All there is, of every library.
        self.output = self.useFixture(
            fixtures.FakeLogger(level=logging.DEBUG))
        self.patch_name('tests.unit.test_glance.Token.get_token',
                        lambda token, session, **more: TOKEN)
        self.patch_name(
            'keystoneauth1.plugin.BaseAuthPlugin.get_headers',
            lambda plugin, session, **more: {
                'X-Auth-Token': TOKEN, 'X-Service-Token': SERVICE_TOKEN})

    def assert_secret(self, *more: object) -> None:
        text = self.output.output + ''.join(
            f'{each!s} {each!r}' for each in more)
        for name in os.listdir(self.state):
            with open(os.path.join(self.state, name)) as file:
                text += file.read()
        self.assertNotIn(TOKEN, text)
        self.assertNotIn(SERVICE_TOKEN, text)

    def test_upload_that_goes_well(self) -> None:
        self.publish(verify_hash=True)
        [headers] = self.server.headers
        # It is the one that was sent, and requests were logged.
        self.assertEqual((TOKEN, SERVICE_TOKEN), (
            headers['X-Auth-Token'], headers['X-Service-Token']))
        self.assertIn('X-Auth-Token', self.output.output)
        self.assert_secret()

    def test_upload_that_fails(self) -> None:
        whats: tuple[typing.Any, ...] = (
            400, 401, 403, 404, 409, 413, 500, 503, 'cut', 'lost answer')
        for request in ('GET', 'PATCH', 'PUT /file'):
            for what in whats:
                self.server.add()
                self.server.plan = {request: [what] * 9}
                try:
                    self.publish(retries=1)
                except exception.SnapshotError as error:
                    chain: BaseException | None = error
                    while chain is not None:
                        self.assert_secret(chain)
                        chain = chain.__cause__ or chain.__context__
                self.assert_secret()


class TestDescription(base.TestCase):

    def test_secrets_of_a_domain_are_not_asked_for(self) -> None:
        # VIR_DOMAIN_XML_SECURE would give passwords and keys.
        flags = []
        real = self.domain.XMLDesc

        def look(asked: int) -> str:
            flags.append(asked)
            return real(asked)
        self.domain.XMLDesc = look  # type: ignore[method-assign]
        self.domain.disks = fakes.disk_xml('/a')
        self.guest.root_disk()
        self.guest.qemu_gid()
        self.guest.why_not_savable()
        self.assertEqual({0}, set(flags))
