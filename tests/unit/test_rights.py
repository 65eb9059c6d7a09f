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

"""Owners are changed of what they should be, and of nothing else.

A change is seen by what the descriptor leads to, so that no test needs to be
root.
"""

import os

from nova_snapshot_ext import exception
from nova_snapshot_ext import host
from nova_snapshot_ext.images import directory
from nova_snapshot_ext import qemu_nbd
from nova_snapshot_ext import rights
from nova_snapshot_ext import undo
from tests.unit import base
from tests.unit import fakes


class RightsTestCase(base.TestCase):
    """:ivar changed: path, owner and group of each change"""

    def setUp(self) -> None:
        super().setUp()
        self.changed: list[tuple[str, int, int]] = []
        self.patch_name('os.chown', lambda path, uid, gid: (
            self.changed.append((os.readlink(path), uid, gid))))
        self.ours = self.new_directory('snapshot-ext-0123abcd')
        os.chmod(self.ours, 0o700)
        self.victim = self.new_file('shadow')
        self.host = host.PlainHost()

    def assert_refused(self, why: str, function: object,
                       *arguments: object) -> None:
        error = self.assertRaises(exception.NotOurs, function, *arguments)
        self.assertIn(why, str(error))
        self.assertEqual([], self.changed)


class TestGroup(RightsTestCase):

    def test_group_may_pass_through_what_was_just_made(self) -> None:
        self.host.let_group_pass(self.ours, 108)
        self.assertEqual([(self.ours, -1, 108)], self.changed)

    def test_other_directory_is_refused(self) -> None:
        for name in ('staging', 'snapshot-ext-0123abcd.old',
                     'snapshot-ext-../../x'):
            self.assert_refused(
                '', self.host.let_group_pass,
                os.path.join(self.directory, name), 108)

    def test_link_is_refused(self) -> None:
        link = os.path.join(self.directory, 'snapshot-ext-ffffffff')
        for target in (self.staging, self.ours, '/'):
            os.symlink(target, link)
            self.assert_refused('Not a directory', self.host.let_group_pass,
                                link, 108)
            os.unlink(link)

    def test_file_is_refused(self) -> None:
        self.assert_refused(
            'Not a directory', self.host.let_group_pass,
            self.new_file('snapshot-ext-ffffffff'), 108)

    def test_what_others_may_enter_already_is_refused(self) -> None:
        os.chmod(self.ours, 0o710)
        self.assert_refused('not for its owner alone',
                            self.host.let_group_pass, self.ours, 108)

    def test_what_is_not_there_is_refused(self) -> None:
        os.rmdir(self.ours)
        self.assert_refused('No such file', self.host.let_group_pass,
                            self.ours, 108)


class TestSocket(RightsTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.socket = os.path.join(self.ours, 'nbd')

    def test_socket_goes_to_whom_its_directory_belongs(self) -> None:
        fakes.make_socket(self.socket)
        self.host.take_socket(self.socket)
        self.assertEqual([(self.socket, os.getuid(), -1)], self.changed)

    def test_link_in_its_place_is_refused(self) -> None:
        os.symlink(self.victim, self.socket)
        self.assert_refused('it is not a socket', self.host.take_socket,
                            self.socket)

    def test_file_in_its_place_is_refused(self) -> None:
        os.link(self.victim, self.socket)
        self.assert_refused('it is not a socket', self.host.take_socket,
                            self.socket)
        os.unlink(self.socket)
        os.rename(self.victim, self.socket)
        self.assert_refused('it is not a socket', self.host.take_socket,
                            self.socket)

    def test_socket_of_another_name_is_refused(self) -> None:
        theirs = os.path.join(self.directory, 'libvirt-sock')
        fakes.make_socket(theirs)
        self.assert_refused('no snapshot works there', self.host.take_socket,
                            theirs)
        os.link(theirs, self.socket)
        self.assert_refused('other names', self.host.take_socket, self.socket)

    def test_directory_that_is_a_link_is_refused(self) -> None:
        theirs = self.new_directory('theirs')
        fakes.make_socket(os.path.join(theirs, 'nbd'))
        link = os.path.join(self.directory, 'snapshot-ext-ffffffff')
        os.symlink(theirs, link)
        self.assert_refused('Not a directory', self.host.take_socket,
                            os.path.join(link, 'nbd'))

    def test_directory_that_others_may_write_to_is_refused(self) -> None:
        fakes.make_socket(self.socket)
        os.chmod(self.ours, 0o770)
        self.assert_refused('not for its owner alone', self.host.take_socket,
                            self.socket)

    def test_what_was_looked_at_is_what_is_changed(self) -> None:
        fakes.make_socket(self.socket)
        real = os.fstat

        def swap(descriptor: int) -> os.stat_result:
            # After each look, somebody puts something else in its place.
            found = real(descriptor)
            if os.path.lexists(self.socket):
                os.rename(self.socket, f'{self.socket}.old')
                os.symlink(self.victim, self.socket)
            return found
        with rights.opened(self.socket) as descriptor:
            self.patch_name('os.fstat', swap)
            rights._check_lone(descriptor, self.socket)
            rights._change_owner(descriptor, self.socket, 0, -1)
        self.assertEqual([(f'{self.socket}.old', 0, -1)], self.changed)


class TestDisk(RightsTestCase):

    def test_file_is_given(self) -> None:
        self.host.give_disk(self.victim, 1, 2)
        self.assertEqual([(self.victim, 1, 2)], self.changed)

    def test_link_and_what_is_no_disk_are_refused(self) -> None:
        link = os.path.join(self.directory, 'disk')
        os.symlink(self.victim, link)
        for path in (link, self.staging, '/dev/null'):
            self.assert_refused('neither a file nor', self.host.give_disk,
                                path, 1, 2)

    def test_file_with_another_name_is_refused(self) -> None:
        os.link(self.victim, os.path.join(self.directory, 'disk'))
        self.assert_refused('other names', self.host.give_disk,
                            os.path.join(self.directory, 'disk'), 1, 2)

    def test_what_the_kernel_refuses_is_one_error(self) -> None:
        def chown(path: str, uid: int, gid: int) -> None:
            raise PermissionError(1, 'Operation not permitted')
        self.patch_name('os.chown', chown)
        self.assert_refused('Operation not permitted', self.host.give_disk,
                            self.victim, 1, 2)


class TestMode(RightsTestCase):

    def test_missing_directory_lets_others_pass(self) -> None:
        old = os.umask(0o077)
        self.addCleanup(os.umask, old)
        path = os.path.join(self.directory, 'a', 'b')
        rights.make_passable(path)
        self.assertEqual(0o711, os.stat(path).st_mode & 0o777)

    def test_mode_of_an_operator_is_left(self) -> None:
        for mode in (0o700, 0o750, 0o2770):
            os.chmod(self.state, mode)
            rights.make_passable(self.state)
            self.new_log().close()
            self.assertEqual(mode, os.stat(self.state).st_mode & 0o7777)

    def test_mode_of_a_link_is_not_changed(self) -> None:
        link = os.path.join(self.directory, 'link')
        os.symlink(self.staging, link)
        mode = os.stat(self.staging).st_mode
        self.assertRaises(OSError, rights.set_mode, link, 0o700)
        self.assertEqual(mode, os.stat(self.staging).st_mode)

    def test_new_directory_is_of_whom_it_is_in(self) -> None:
        path = os.path.join(self.staging, 'snapshot-ext')
        rights.make_owners(path)
        owner = os.stat(self.staging)
        self.assertEqual([(path, owner.st_uid, owner.st_gid)], self.changed)

    def test_link_in_place_of_the_new_directory_is_refused(self) -> None:
        path = os.path.join(self.staging, 'snapshot-ext')
        real = os.mkdir

        def mkdir(name: str, mode: int, dir_fd: int) -> None:
            real(name, mode, dir_fd=dir_fd)
            # Who owns the directory around it can do that.
            os.rmdir(path)
            os.symlink('/etc', path)
        self.patch_name('os.mkdir', mkdir)
        self.assert_refused('Not a directory', rights.make_owners, path)


class TestUndo(base.TestCase):
    """What an undo log says reaches nothing that is not ours: root may run
    the log of another user."""

    def test_only_what_has_a_name_of_ours_is_removed(self) -> None:
        around = undo.Surroundings(self.guest, self.host)
        victim = self.new_file('snapshot-ext-x')
        self.assertRaises(ValueError, qemu_nbd.end_server, around,
                          socket=victim)
        self.assertRaises(ValueError, directory.remove_part, around,
                          path=victim)
        self.assertTrue(os.path.exists(victim))
