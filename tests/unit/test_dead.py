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

"""An image is touched on a clear answer only."""

import typing

from nova_snapshot_ext import exception
from nova_snapshot_ext.images import dead
from nova_snapshot_ext import in_flight
from tests.unit import test_glance

FURTHER = 'c0ffee00-0000-4000-8000-000000000002'
SNAPSHOT = in_flight.Snapshot(
    test_glance.IMAGE, 'server-1', 'project', 'user', 'req-1', None)


class TestSettle(test_glance.GlanceTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.server.images.clear()

    def settle(self, announced: typing.Sequence[int] = (),
               keep: str | None = None, patient: bool = False) -> str:
        return dead.settle(self.proxy(), SNAPSHOT, list(announced), keep,
                           patient)

    def add(self, **properties: typing.Any) -> None:
        self.server.add(instance_uuid='server-1', **properties)

    def changes(self) -> list[str]:
        return [each for each in self.server.seen if each != 'GET']

    def test_image_that_waits_is_deleted(self) -> None:
        for status in ('queued', 'saving'):
            self.add(status=status)
            self.assertIn(f'was {status}, and is deleted', self.settle())
            self.assertEqual({}, self.server.images)

    def test_image_that_is_kept_says_why(self) -> None:
        self.add()
        for reason in ('it died', 'it died again'):
            self.settle(keep=reason)
            self.assertEqual(reason, self.stored['snapshot_ext_failure'])
        self.assertEqual('queued', self.stored['status'])

    def test_last_bytes_may_be_on_their_way_into_the_store(self) -> None:
        self.add(status='saving')
        self.assertRaises(exception.ImageServiceError, self.settle,
                          patient=True)
        self.assertEqual([], self.changes())

    def test_image_that_others_have_filled_stays(self) -> None:
        for size in (30, None):
            self.add(status='active', size=size)
            self.settle(announced=[10, 20])
        self.assertEqual([], self.changes())

    def test_whole_image_stays(self) -> None:
        self.add(status='active', size=20)
        self.assertIn('is active, and left alone',
                      self.settle(announced=[10, 20]))
        self.assertEqual([], self.changes())

    def test_image_that_nothing_was_sent_for_stays(self) -> None:
        self.add(status='active', size=20)
        self.settle()
        self.assertEqual([], self.changes())

    def test_part_of_an_image_is_deleted_in_any_case(self) -> None:
        self.add(status='active', size=15)
        self.assertIn('15 bytes of 20', self.settle(
            announced=[20], keep='it died', patient=True))
        self.assertEqual({}, self.server.images)

    def test_image_of_another_server_is_left_alone(self) -> None:
        self.server.add(instance_uuid='server-2')
        self.assertIn('not of this server', self.settle())
        self.server.add()
        self.assertIn('not of this server', self.settle())
        self.assertEqual([], self.changes())

    def test_other_states_are_left_alone(self) -> None:
        for status in ('importing', 'uploading', 'deactivated', 'killed'):
            self.add(status=status)
            self.settle()
        self.assertEqual([], self.changes())

    def test_no_clear_answer_changes_nothing(self) -> None:
        for status in (401, 403, 500, 503):
            self.add()
            self.server.plan['GET'] = [status] * 5
            self.assertRaises(exception.ImageServiceError, self.settle)
            self.server.plan.clear()
        self.assertEqual([], self.changes())

    def test_image_that_is_not_shown_may_be_there(self) -> None:
        self.assertRaises(exception.ImageGone, self.settle)
        self.assertEqual([], self.changes())

    def test_time_out_changes_nothing(self) -> None:
        self.patch_name('nova_snapshot_ext.images.dead._TIMEOUT_S', 0.1)
        self.add()
        self.server.plan['GET'] = ['stall'] * 5
        self.assertRaises(exception.ImageServiceUnreachable, self.settle)
        self.assertEqual([], self.changes())

    def test_refused_deletion_is_an_error(self) -> None:
        self.add()
        self.server.plan['DELETE'] = [403]
        self.assertRaises(exception.ImageServiceError, self.settle)
        self.assertNotEqual({}, self.server.images)

    # Images of further disks

    def further(self, whole: bool, failed: bool = False,
                **properties: typing.Any) -> str:
        self.server.images.clear()
        self.server.add(**{
            'id': FURTHER, 'snapshot_ext_group': test_glance.IMAGE,
            'status': 'active', 'os_hidden': True, **properties})
        return dead.settle_further(self.proxy(), SNAPSHOT, FURTHER, whole,
                                   failed)

    def test_further_one_is_shown_with_that_of_the_root_disk(self) -> None:
        for failed in (False, True):
            self.assertIn('not hidden any more', self.further(True, failed))
            self.assertIs(False, self.server.images[FURTHER]['os_hidden'])

    def test_further_one_goes_without_that_of_the_root_disk(self) -> None:
        for status in ('queued', 'saving', 'active'):
            for failed in (False, True):
                self.assertIn('is deleted', self.further(
                    False, failed, status=status))
                self.assertEqual({}, self.server.images)

    def test_further_one_that_is_not_whole_is_never_shown(self) -> None:
        self.assertIn('is deleted', self.further(True, status='saving'))

    def test_further_one_that_was_shown_stays(self) -> None:
        for whole, failed in ((True, True), (True, False), (False, False)):
            self.further(whole, failed, os_hidden=False)
        self.assertEqual([], self.changes())

    def test_further_one_of_a_snapshot_that_failed_goes_though_it_was_shown(
            self) -> None:
        self.assertIn('is deleted', self.further(
            False, failed=True, os_hidden=False))

    def test_further_one_of_another_snapshot_is_left_alone(self) -> None:
        for group in ('another', None):
            self.assertIn('left alone', self.further(
                False, failed=True, snapshot_ext_group=group))
        self.assertEqual([], self.changes())

    def test_further_one_that_is_not_shown_may_be_there(self) -> None:
        self.assertRaises(
            exception.ImageGone, dead.settle_further, self.proxy(), SNAPSHOT,
            FURTHER, True, False)

    def test_no_clear_answer_changes_no_further_one(self) -> None:
        for status in (401, 403, 500, 503):
            self.server.plan['GET'] = [status] * 5
            self.assertRaises(exception.ImageServiceError, self.further,
                              False)
            self.server.plan.clear()
        self.assertEqual([], self.changes())

    def test_whole_is_what_was_sent_and_is_active(self) -> None:
        for whole, properties in (
                (True, {'status': 'active', 'size': 20}),
                (True, {'status': 'deactivated', 'size': 20}),
                (False, {'status': 'active', 'size': 30}),
                (False, {'status': 'active', 'size': None}),
                (False, {'status': 'queued'}),
                (False, {'status': 'saving', 'size': 20}),
                (False, {'status': 'active', 'size': 20,
                         'instance_uuid': 'server-2'})):
            self.server.add(**{'instance_uuid': 'server-1', **properties})
            self.assertEqual(whole, dead.is_whole(
                self.proxy(), SNAPSHOT, [10, 20]), properties)
        self.server.images.clear()
        self.assertFalse(dead.is_whole(self.proxy(), SNAPSHOT, [10, 20]))

    def test_image_that_goes_meanwhile_is_gone(self) -> None:
        self.add()
        self.server.plan['DELETE'] = [404]
        self.assertIn('is deleted', self.settle())
