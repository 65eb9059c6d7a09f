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

"""What the root daemon is asked for, and refuses.

The functions run in this process: with no right that the tests lack.
"""

import os

import nova.conf
import nova.privsep
from oslo_config import fixture as config_fixture

from nova_snapshot_ext import exception
from nova_snapshot_ext import privileged
from tests.unit import base
from tests.unit import fakes

VOLUME = f'vg--1-{fakes.UUID.replace("-", "--")}_disk'


class TestDaemon(base.TestCase):

    def test_every_function_is_one_of_novas_own_context(self) -> None:
        # By this name and this mark the daemon finds and accepts it.
        for name in ('let_group_pass', 'take_socket', 'give_disk'):
            self.assertTrue(nova.privsep.sys_admin_pctxt.is_entrypoint(
                getattr(privileged, name)))

    def test_there_is_no_other_function(self) -> None:
        self.assertEqual(
            {'let_group_pass', 'take_socket', 'give_disk'},
            {name for name, value in vars(privileged).items()
             if nova.privsep.sys_admin_pctxt.is_entrypoint(value)})

    def test_errors_come_through_its_channel(self) -> None:
        # It sends the arguments of an error, and makes it anew of them.
        error = exception.NotOurs('/p', 'why')
        self.assertEqual(str(error), str(type(error)(*error.args)))


class TestGiveDisk(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        nova.privsep.sys_admin_pctxt.set_client_mode(False)
        self.addCleanup(
            nova.privsep.sys_admin_pctxt.set_client_mode, True)
        self.instances = self.new_directory('instances')
        self.useFixture(config_fixture.Config(nova.conf.CONF)).config(
            instances_path=self.instances)
        self.server = os.path.join(self.instances, fakes.UUID)
        os.mkdir(self.server)
        self.disk = os.path.join(self.server, 'disk')
        self.victim = self.new_file('shadow')
        with open(self.disk, 'wb'):
            pass
        self.changed: list[tuple[str, int, int]] = []
        self.patch_name('os.chown', lambda path, uid, gid: (
            self.changed.append((os.readlink(path), uid, gid))))

    def give(self, path: str) -> None:
        privileged.give_disk(path, 1, 2)

    def assert_refused(self, path: str) -> None:
        self.assertRaises(exception.NotOurs, self.give, path)
        self.assertEqual([], self.changed)

    def test_disk_of_a_server_is_given(self) -> None:
        self.give(self.disk)
        self.assertEqual([(self.disk, 1, 2)], self.changed)

    def test_directory_of_servers_may_be_a_link_of_the_operators(
            self) -> None:
        link = os.path.join(self.directory, 'link')
        os.symlink(self.instances, link)
        self.give(os.path.join(link, fakes.UUID, 'disk'))
        self.assertEqual([(self.disk, 1, 2)], self.changed)

    def test_file_elsewhere_is_refused(self) -> None:
        self.assert_refused(self.victim)
        self.assert_refused('/etc/shadow')
        self.assert_refused(f'{self.server}/../../shadow')
        inside = os.path.join(self.instances, 'disk')
        os.rename(self.victim, inside)
        self.assert_refused(inside)

    def test_links_are_refused(self) -> None:
        os.unlink(self.disk)
        os.symlink(self.victim, self.disk)
        self.assert_refused(self.disk)
        os.unlink(self.disk)
        os.link(self.victim, self.disk)
        self.assert_refused(self.disk)

    def test_directory_of_a_server_that_is_a_link_is_refused(self) -> None:
        other = os.path.join(
            self.instances, fakes.UUID.replace('5ee7e4f9', 'ffffffff'))
        os.symlink(self.directory, other)
        self.assert_refused(os.path.join(other, 'shadow'))

    def test_what_is_no_file_is_refused(self) -> None:
        path = os.path.join(self.server, 'pipe')
        os.mkfifo(path)
        self.assert_refused(path)
        self.assert_refused(self.server)

    def test_volume_of_a_server_is_given_and_no_other_device(self) -> None:
        # Whatever device this is: who it is for the device mapper counts.
        self.patch_name('stat.S_ISBLK', lambda mode: True)
        for name in ('', 'vg-root', f'vg-{fakes.UUID}_disk',
                     VOLUME.removesuffix('_disk'), f'x-{VOLUME}/disk'):
            self.patch_name('nova_snapshot_ext.privileged._name_of',
                            lambda device, name=name: name)
            self.assert_refused(self.disk)
        for name in (VOLUME, f'v-{VOLUME[6:]}', f'{VOLUME}.swap'):
            self.patch_name('nova_snapshot_ext.privileged._name_of',
                            lambda device, name=name: name)
            self.give(self.disk)
        self.assertEqual(3, len(self.changed))

    def test_device_that_is_no_volume_has_no_name(self) -> None:
        self.assertEqual('', privileged._name_of(os.makedev(1, 3)))
        self.assertEqual('', privileged._name_of(0))
