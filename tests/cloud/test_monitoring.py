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

"""What nova-compute says of snapshots that have ended."""

import json
import re
import typing as ty

from nova_snapshot_ext import account as accounts
from tests.cloud import base

#: oslo.messaging writes notifications into the log
NOTIFY = ('notifications.notification_format=versioned',
          'oslo_messaging_notifications.driver=log')


class MonitoringTest(base.CloudTestCase):

    def line_of(self, image_id: str) -> dict[str, str]:
        """The one line that says how a snapshot ended."""
        def lines() -> list[str]:
            return [line for line in self.compute_log().splitlines()
                    if f'image={image_id}' in line]
        self.wait(lambda: bool(lines()), f'the line of {image_id}')
        [line] = lines()
        found = accounts.parsed(line)
        self.assertEqual(accounts.NAMES, tuple(found))
        return found

    def notifications_of(self, image_id: str) -> list[dict[str, ty.Any]]:
        """Those of ours."""
        found = (json.loads(body) for body in re.findall(
            r'oslo\.messaging\.notification\.snapshot_ext\.snapshot\.\w+ '
            r'.*?(\{.*\})', self.compute_log()))
        return [each for each in found if each['payload'][
            'nova_object.data']['image'] == image_id]

    def test_each_end_is_told_once(self) -> None:
        self.configure(*NOTIFY)
        server = self.server()
        image = self.snapshot(server, snapshot_flow='backup')
        line = self.line_of(image.id)
        self.assertEqual(
            ('ok', server.id, 'backup', 'streamed', str(image.size),
             str(image.size)),
            tuple(line[name] for name in (
                'outcome', 'instance', 'flow', 'transfer', 'image_bytes',
                'sent_bytes')))
        self.assertEqual(image.properties['snapshot_ext_guest_pause_ms'],
                         line['guest_pause_ms'])
        self.assertGreater(int(line['read_bytes']), 0)
        self.assertGreater(float(line['publish_s']), 0)
        self.assertIn(line['request'], {
            each['request_id'] for each in self.actions(server)})
        [told] = self.notifications_of(image.id)
        self.assertEqual(('snapshot_ext.snapshot.end', 'INFO'), (
            told['event_type'], told['priority']))
        data = told['payload']['nova_object.data']
        self.assertEqual((server.id, image.size), (
            data['instance'], data['image_bytes']))

    def test_failure_is_told_with_its_reason(self) -> None:
        self.configure(*NOTIFY)
        server = self.server()
        self.compute.stop_server(server)
        self.wait_status(server, 'SHUTOFF')
        image_id = self.request_snapshot(server, snapshot_flow='live')
        line = self.line_of(image_id)
        self.assertEqual(('failed', 'NoFlowServes'), (
            line['outcome'], line['error']))
        self.assertIn('live: the guest is shut off', line['reason'])
        [told] = self.notifications_of(image_id)
        self.assertEqual(('snapshot_ext.snapshot.error', 'ERROR'), (
            told['event_type'], told['priority']))
        self.wait_idle(server)

    def actions(self, server: ty.Any) -> list[dict[str, ty.Any]]:
        found: list[dict[str, ty.Any]] = self.compute.get(
            f'/servers/{server.id}/os-instance-actions',
            microversion='2.90').json()['instanceActions']
        return found
