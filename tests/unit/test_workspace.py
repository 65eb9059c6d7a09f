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

import os

from nova_snapshot_ext import exception
from nova_snapshot_ext import undo
from nova_snapshot_ext import workspace
from tests.unit import base


class TestDirectory(base.TestCase):

    def test_undo_is_written_before_it_is_made(self) -> None:
        self.watch_flushes()
        log = self.new_log()
        real = os.mkdir
        self.patch_name('os.mkdir', lambda path, mode=0o777: (
            self.journal.append('mkdir'), real(path, mode))[1])
        workspace.make_directory(self.staging, log)
        self.assertEqual(
            ['flushed remove_directory', 'mkdir'], self.journal)

    def test_it_is_for_its_owner_alone(self) -> None:
        path = workspace.make_directory(self.staging, self.new_log())
        self.assertEqual(0o700, os.stat(path).st_mode & 0o777)

    def test_qemus_group_may_pass_through(self) -> None:
        path = workspace.make_directory(self.staging, self.new_log(), 108)
        self.assertEqual([f'chown {path} -1 108'], self.journal)
        self.assertEqual(0o710, os.stat(path).st_mode & 0o777)

    def test_it_is_gone_with_all_in_it(self) -> None:
        with self.new_log() as log:
            path = workspace.make_directory(self.staging, log)
            with open(os.path.join(path, 'file'), 'w'):
                pass
        self.assertEqual([], os.listdir(self.staging))

    def test_removing_it_twice_does_no_harm(self) -> None:
        around = undo.Surroundings(None, self.host)
        log = self.new_log()
        path = workspace.make_directory(self.staging, log)
        workspace.remove_directory(around, path=path)
        workspace.remove_directory(around, path=path)

    def test_nobody_elses_directory_is_removed(self) -> None:
        around = undo.Surroundings(None, self.host)
        self.assertRaises(ValueError, workspace.remove_directory, around,
                          path=self.staging)
        self.assertTrue(os.path.isdir(self.staging))

    def test_two_are_not_the_same(self) -> None:
        log = self.new_log()
        self.assertNotEqual(workspace.make_directory(self.staging, log),
                            workspace.make_directory(self.staging, log))


class TestCheck(base.TestCase):

    def check(self, path: str) -> None:
        workspace.check_directory(path, '[libvirt] snapshots_directory')

    def test_good_directory_is_good(self) -> None:
        self.check(self.staging)

    def test_missing_directory_names_its_setting(self) -> None:
        path = os.path.join(self.staging, 'none')
        self.assertRaisesRegex(
            exception.InvalidSetting,
            rf'\[libvirt\] snapshots_directory = {path} .* existing',
            self.check, path)

    def test_file_is_not_a_directory(self) -> None:
        self.assertRaises(exception.InvalidSetting, self.check,
                          self.new_file('a'))

    def test_directory_must_be_writable(self) -> None:
        self.patch_name('os.access', lambda path, mode: False)
        self.assertRaisesRegex(
            exception.InvalidSetting, 'can not write', self.check,
            self.staging)

    def test_path_of_a_socket_must_fit(self) -> None:
        self.patch_name('os.access', lambda path, mode: True)
        longest = '/' + 'x' * (workspace.MAX_SOCKET_PARENT - 1)
        workspace.check_socket_parent(longest)
        self.assertRaises(exception.InvalidSetting,
                          workspace.check_socket_parent, longest + 'x')

    def test_directory_of_sockets_can_be_made(self) -> None:
        path = os.path.join(self.directory, 'a', 'b')
        workspace.check_socket_parent(path)
        self.assertFalse(os.path.exists(path))
        self.patch_name('os.access', lambda path, mode: False)
        self.assertRaisesRegex(
            exception.InvalidSetting,
            rf'socket_directory = {path} is not valid: user \d+ can not '
            'make it', workspace.check_socket_parent, path)

    def test_directory_of_sockets_can_be_written_to(self) -> None:
        workspace.check_socket_parent(self.state)
        self.assertRaisesRegex(
            exception.InvalidSetting, 'must be an existing directory',
            workspace.check_socket_parent, self.new_file('a'))


class TestRoom(base.TestCase):

    def test_directory_to_come_has_the_room_of_its_parent(self) -> None:
        seen = []

        def statvfs(path: str) -> os.statvfs_result:
            seen.append(path)
            if path != '/srv':
                raise FileNotFoundError(path)
            return os.statvfs_result((4096, 4096, 9, 9, 7, 0, 0, 0, 0, 255))
        self.patch_name('os.statvfs', statvfs)
        self.assertEqual(7 * 4096, workspace.free_bytes('/srv/a/b'))
        self.assertEqual(['/srv/a/b', '/srv/a', '/srv'], seen)

    def test_what_only_root_may_use_is_not_free(self) -> None:
        self.patch_name('os.statvfs', lambda path: os.statvfs_result(
            (4096, 512, 100, 50, 7, 0, 0, 0, 0, 255)))
        self.assertEqual(7 * 512, workspace.free_bytes('/'))
