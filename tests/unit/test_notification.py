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

import json
import os
import typing

from nova import context as nova_context
from nova.objects import base as nova_base

from nova_snapshot_ext import account as accounts
from nova_snapshot_ext import exception
from nova_snapshot_ext import notification
from tests.unit import base
from tests.unit import fakes
from tests.unit import nova_config

#: what the administration guide shows
SAMPLE = os.path.join(
    os.path.dirname(__file__), os.pardir, os.pardir, 'doc', 'source',
    'admin', 'notification.json')


class FakeNotifier:
    """What nova.rpc.NOTIFIER is."""

    def __init__(self) -> None:
        self.enabled = True
        self.publisher = ''
        self.sent: list[tuple[str, str, dict[str, typing.Any]]] = []

    def is_enabled(self) -> bool:
        return self.enabled

    def prepare(self, publisher_id: str) -> 'FakeNotifier':
        self.publisher = publisher_id
        return self

    def info(self, context: object, event_type: str,
             payload: dict[str, typing.Any]) -> None:
        self.sent.append(('info', event_type, payload))

    def error(self, context: object, event_type: str,
              payload: dict[str, typing.Any]) -> None:
        self.sent.append(('error', event_type, payload))


class TestNotification(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.now = 100.0
        self.patch_name('nova_snapshot_ext.account.time.monotonic',
                        lambda: self.now)
        self.config = nova_config.use(self)
        self.config(host='compute-1')
        self.config(notification_format='both', group='notifications')
        self.notifier = FakeNotifier()
        self.patch_name('nova.rpc.NOTIFIER', self.notifier)
        self.context = nova_context.RequestContext(
            '0f2d0d8f4c0b4b1c8a7a1b9c2d3e4f50',
            '6a1b2c3d4e5f60718293a4b5c6d7e8f9')
        self.account = accounts.Account(
            fakes.UUID, '1a6e0000-0000-4000-8000-000000000001',
            'req-5ee7e4f9-0000-4000-8000-000000000001')

    def send(self) -> dict[str, typing.Any]:
        notification.send(self.context, self.account)
        [(_, _, payload)] = self.notifier.sent
        return payload

    def test_sample_in_the_guide_is_what_is_sent(self) -> None:
        for phase, seconds in (('wait', 0.0), ('plan', 0.12),
                               ('freeze', 0.41), ('transfer', 0.003),
                               ('publish', 2.0)):
            with self.account.phase(phase):
                self.now += seconds
        self.now += 0.15
        self.account.flow = 'backup'
        self.account.transfer = 'streamed'
        self.account.consistency = 'filesystem'
        self.account.pauses.append(lambda: 0.031)
        self.account.read(209780736)
        self.account.disks = 1
        self.account.sent(0, 209781760, 209781760)
        self.account.scratch_bytes = 4521984
        payload = self.send()
        with open(SAMPLE) as file:
            self.assertEqual(json.load(file), payload)
        self.assertEqual('nova-compute:compute-1', self.notifier.publisher)
        self.assertEqual(('info', 'snapshot_ext.snapshot.end'),
                         self.notifier.sent[0][:2])

    def test_failure_is_an_error(self) -> None:
        self.account.fail(exception.FreezeFailed('no socket'))
        data = self.send()['nova_object.data']
        self.assertEqual(('error', 'snapshot_ext.snapshot.error'),
                         self.notifier.sent[0][:2])
        self.assertEqual(('failed', 'FreezeFailed', 'no socket'), (
            data['outcome'], data['error'], data['reason']))

    def test_cancellation_is_none(self) -> None:
        self.account.fail(exception.ImageGone('gone'))
        self.send()
        self.assertEqual(('info', 'snapshot_ext.snapshot.end'),
                         self.notifier.sent[0][:2])

    def test_every_name_of_the_line_is_a_field(self) -> None:
        self.assertEqual(
            {*accounts.NAMES, 'host', 'project_id', 'user_id'},
            set(self.send()['nova_object.data']))

    def test_novas_settings_rule_it_out(self) -> None:
        self.config(notification_format='unversioned', group='notifications')
        notification.send(self.context, self.account)
        self.config(notification_format='versioned', group='notifications')
        self.notifier.enabled = False
        notification.send(self.context, self.account)
        self.assertEqual([], self.notifier.sent)
        self.notifier.enabled = True
        self.send()

    def test_rpc_does_not_learn_the_objects(self) -> None:
        names = nova_base.NovaObjectRegistry.obj_classes()
        for name in ('SnapshotExtPayload', 'SnapshotExtNotification'):
            self.assertNotIn(name, names)
        self.assertEqual('nova_snapshot_ext',
                         self.send()['nova_object.namespace'])
