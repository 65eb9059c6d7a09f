#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""What functional tests stand on."""

import os
import shutil
import typing as ty

import fixtures
import testtools

from tests.functional import guests
from tests.functional import libvirtd

PROGRAMS = ('libvirtd', 'virtlogd', 'qemu-system-x86_64', 'qemu-img',
            'qemu-io', 'unshare', 'losetup')


class FunctionalTestCase(testtools.TestCase):
    """A test with a private libvirtd.

    :ivar host: the LibvirtFixture.
    :ivar libvirtd: the daemon: kill(), start(), uri, path.
    :ivar connection: a libvirt.virConnect.
    """

    def setUp(self) -> None:
        super().setUp()
        if os.geteuid() != 0:
            self.skipTest('needs root, for namespaces')
        path = os.environ.get('PATH', '') + ':/usr/sbin:/sbin'
        missing = [p for p in PROGRAMS if shutil.which(p, path=path) is None]
        if missing:
            self.skipTest(f'needs {", ".join(missing)}')
        self.useFixture(fixtures.EnvironmentVariable('PATH', path))
        self.useFixture(fixtures.Timeout(
            int(os.environ.get('OS_TEST_TIMEOUT', '300')), gentle=True))
        self.useFixture(fixtures.FakeLogger())
        self.host = self.useFixture(libvirtd.LibvirtFixture())
        self.libvirtd = self.host.libvirtd
        self.connection = self.host.connection

    def guest(self, *disks: guests.Disk, **options: ty.Any) -> guests.Guest:
        """Start a guest that is gone after the test.

        :param disks: its disks; one overlay if none is given.
        :param options: as for guests.Guest.
        :returns: the guest, counting.
        """
        return self.useFixture(guests.Guest(
            self.host, disks or (guests.Disk(),), **options))
