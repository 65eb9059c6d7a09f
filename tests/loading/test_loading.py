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
"""How nova-compute comes to our driver: by its configuration alone.

Each test runs ``nova.virt.driver.load_compute_driver`` in a process of its
own that begins as nova-compute does.
"""

import importlib.metadata
import json
import typing

import fixtures
import testtools

from tests.loading import installations

OURS = 'snapshot_ext.SnapshotLibvirtDriver'
LIBVIRT = 'nova.virt.libvirt.driver.LibvirtDriver'
#: from 34 on nova-compute runs threads, and an option can say otherwise;
#: before, it runs eventlet, and the environment alone can
THREADS = int(importlib.metadata.version('nova').partition('.')[0]) >= 34
SOURCE = """
[DEFAULT]
config_source = snapshot_ext
{defaults}
[snapshot_ext]
driver = snapshot_ext
"""


class LoadingTestCase(testtools.TestCase):

    def load(self, installation: installations.Installation,
             defaults: str = '', environment: dict[str, str] | None = None,
             ) -> dict[str, typing.Any]:
        """Load the driver of a configuration.

        :param defaults: more lines of ``[DEFAULT]``
        :returns: what the script says, and ``stderr``
        """
        folder = self.useFixture(fixtures.TempDir()).path
        path = f'{folder}/nova.conf'
        with open(path, 'w') as file:
            # Nova makes its state directories where it is imported from.
            file.write(SOURCE.format(
                defaults=f'state_path = {folder}\n{defaults}'))
        done = installation.script(
            'load_driver.py', '--config-file', path,
            environment=environment)
        return {**json.loads(done.stdout.splitlines()[-1]),
                'stderr': done.stderr}

    def assert_ours(self, loaded: dict[str, typing.Any],
                    installation: installations.Installation) -> None:
        self.assertEqual('SnapshotLibvirtDriver', loaded['class'])
        self.assertEqual('nova_snapshot_ext.driver', loaded['module'])
        self.assertEqual('nova_snapshot_ext.driver.SnapshotLibvirtDriver',
                         loaded['mro'][0])
        self.assertIn(LIBVIRT, loaded['mro'])
        self.assertEqual(OURS, loaded['compute_driver'])
        # The wheel's, not the checkout's.
        self.assertIn(f'{installation.folder}/', loaded['file'])

    def assert_threading(self, loaded: dict[str, typing.Any]) -> None:
        self.assertTrue(loaded['threading'])
        self.assertFalse(loaded['eventlet_patched'])
        if THREADS:
            # Older ones import it themselves.
            self.assertFalse(loaded['eventlet_imported'])

    def assert_eventlet(self, loaded: dict[str, typing.Any]) -> None:
        self.assertFalse(loaded['threading'])
        self.assertTrue(loaded['eventlet_patched'])


class Layouts:
    """What holds however Nova is installed."""

    installation: installations.Installation

    def test_by_default_nova_loads_us(self) -> None:
        loaded = self.load(self.installation)
        self.assert_ours(loaded, self.installation)
        if THREADS:
            self.assert_threading(loaded)
        else:
            self.assert_eventlet(loaded)

    def test_with_threads_by_the_environment(self) -> None:
        loaded = self.load(self.installation, environment={
            'OS_NOVA_DISABLE_EVENTLET_PATCHING': '1'})
        self.assert_ours(loaded, self.installation)
        self.assert_threading(loaded)

    def test_with_eventlet_by_the_environment(self) -> None:
        loaded = self.load(self.installation, environment={
            'OS_NOVA_DISABLE_EVENTLET_PATCHING': '0'})
        self.assert_ours(loaded, self.installation)
        self.assert_eventlet(loaded)

    if THREADS:
        # Nova reads this option with our source already open.

        def test_with_the_threading_backend(self) -> None:
            loaded = self.load(
                self.installation, 'concurrency_backend = threading')
            self.assert_ours(loaded, self.installation)
            self.assert_threading(loaded)

        def test_with_the_eventlet_backend(self) -> None:
            loaded = self.load(
                self.installation, 'concurrency_backend = eventlet')
            self.assert_ours(loaded, self.installation)
            self.assert_eventlet(loaded)


class TestNovaAsWheel(Layouts, LoadingTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.installation = installations.nova_as_wheel()

    def test_an_explicit_compute_driver_may_name_ours(self) -> None:
        loaded = self.load(self.installation, f'compute_driver = {OURS}')
        self.assert_ours(loaded, self.installation)

    def test_an_explicit_other_compute_driver_wins(self) -> None:
        loaded = self.load(
            self.installation, 'compute_driver = libvirt.LibvirtDriver')
        self.assertEqual(LIBVIRT, loaded['mro'][0])
        self.assertEqual('libvirt.LibvirtDriver', loaded['compute_driver'])

    def test_nova_has_all_that_is_used(self) -> None:
        # Where nobody but us has imported any of it.
        self.assertEqual('', self.installation.script(
            'differences.py').stdout)

    def test_without_our_package_nova_goes_on(self) -> None:
        loaded = self.load(
            installations.nova_without_us(),
            'compute_driver = libvirt.LibvirtDriver')
        self.assertEqual(LIBVIRT, loaded['mro'][0])
        self.assertIn("could not load configuration from 'snapshot_ext'",
                      loaded['stderr'])


class TestNovaAsEditable(Layouts, LoadingTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.installation = installations.nova_as_editable()

    def test_nova_is_what_was_unpacked(self) -> None:
        # With a nova/ of ours it would be a namespace package, without file.
        loaded = self.load(self.installation)
        self.assertRegex(loaded['nova'], r'/source/nova-[^/]+/nova/__init__')
