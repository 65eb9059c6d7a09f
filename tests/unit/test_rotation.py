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

"""Further images of a backup go when Nova has deleted that of the root."""

import typing

from nova_snapshot_ext import exception
from nova_snapshot_ext.images import rotation
from tests.unit import test_glance

ROOT = test_glance.IMAGE
GONE = 'c0ffee00-0000-4000-8000-00000000000a'
SERVER = '5ee7e4f9-6b1f-4d8a-8d7e-0a1b2c3d4e5f'


class TestRotation(test_glance.GlanceTestCase):

    def add(self, number: int, group: object, **more: typing.Any) -> str:
        image_id = f'c0ffee00-0000-4000-8000-0000000001{number:02}'
        self.server.add(**{
            'id': image_id, 'snapshot_ext_image': image_id,
            'snapshot_ext_group': group,
            'instance_uuid': SERVER, 'snapshot_ext_backup_type': 'daily',
            'os_hidden': False, 'status': 'active', **more})
        return image_id

    def delete(self) -> list[str]:
        return list(rotation.delete_rotated(
            self.proxy(), SERVER, 'daily'))

    def test_those_of_backups_that_are_gone_are_deleted(self) -> None:
        kept = self.add(1, ROOT)
        gone = [self.add(2, GONE), self.add(3, GONE)]
        self.assertEqual(gone, self.delete())
        self.assertEqual({ROOT, kept}, set(self.server.images))
        self.assertEqual([], self.delete())

    def test_nothing_else_is_deleted(self) -> None:
        # Of other kinds of backups, of other servers, of snapshots, and what
        # is not whole yet.
        self.add(1, GONE, snapshot_ext_backup_type='weekly')
        self.add(2, GONE, instance_uuid='another')
        self.add(3, GONE, snapshot_ext_backup_type=None)
        self.add(4, GONE, os_hidden=True)
        for number, group in enumerate(
                (None, '', '../images', ['x'], GONE + '/file'), 5):
            self.add(number, group)
        own = self.add(20, '')
        self.server.images[own]['snapshot_ext_group'] = own
        self.assertEqual([], self.delete())
        self.assertNotIn('DELETE', self.server.seen)

    def test_no_clear_answer_deletes_nothing(self) -> None:
        self.add(1, GONE)
        for plan in ([500], [None, 500], [None, 403]):
            self.server.plan['GET'] = [*plan]
            self.assertRaises(exception.ImageServiceError, self.delete)
        self.assertNotIn('DELETE', self.server.seen)

    def test_answer_that_makes_no_sense_is_one_error(self) -> None:
        self.patch_name('tests.fake_glance.Handler.found', lambda handler: 3)
        self.assertRaises(exception.ImageServiceError, self.delete)

    def test_one_that_goes_meanwhile_is_gone(self) -> None:
        self.add(1, GONE)
        self.server.plan['DELETE'] = [404]
        self.assertEqual(1, len(self.delete()))

    def test_what_is_made_of_one_stays(self) -> None:
        # Cinder copies the properties of an image to an image of a volume
        # that was made of it, as Nova does to a snapshot of a server.
        for original in (self.add(1, GONE), None):
            copy = self.add(2, GONE, snapshot_ext_image=original)
            self.delete()
            self.assertEqual({ROOT, copy}, set(self.server.images))

    def test_protected_one_stays(self) -> None:
        kept, gone = self.add(1, GONE, protected=True), self.add(2, GONE)
        self.assertEqual([gone], self.delete())
        self.assertEqual({ROOT, kept}, set(self.server.images))

    def test_glance_that_gives_more_than_was_asked_for_deletes_no_more(
            self) -> None:
        self.add(1, GONE, snapshot_ext_backup_type='weekly')
        self.add(2, GONE, instance_uuid='another')
        self.add(3, GONE, os_hidden=True)
        self.patch_name('tests.fake_glance.Handler.found',
                        lambda handler: [*self.server.images.values()])
        self.assertEqual([], self.delete())
        self.assertNotIn('DELETE', self.server.seen)

    def test_refused_deletion_is_an_error_and_keeps_no_other(self) -> None:
        kept, _ = self.add(1, GONE), self.add(2, GONE)
        self.server.plan['DELETE'] = [403]
        self.assertRaises(exception.ImageServiceError, self.delete)
        self.assertEqual({ROOT, kept}, set(self.server.images))
