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

"""What cloud tests stand on: the small cloud that is up, and its servers."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import tempfile
import time
import typing as ty
import uuid
from xml.etree import ElementTree

import fixtures
import openstack
import testtools

from tests.functional import images

ROOT = pathlib.Path(os.environ.get('SMALL_CLOUD_DIR', '/var/lib/small-cloud'))
TOOL = pathlib.Path(__file__).parents[2] / 'tools' / 'cloud'
# Seconds for a boot, or a snapshot, on a busy machine without KVM.
TIMEOUT_S = 240
EVENT = 'snapshot_ext_snapshot'


@dataclasses.dataclass(frozen=True)
class Host:
    """A host with nova-compute."""

    name: str
    #: nova-compute's state path, as it is seen from here
    nova: pathlib.Path
    #: the same for its instances
    instances: pathlib.Path
    #: its libvirtd's
    uri: str
    #: the name of nova-compute's log
    log: str

    @property
    def snapshots_directory(self) -> pathlib.Path:
        return self.instances / 'snapshots'

    @property
    def state_directory(self) -> pathlib.Path:
        return self.nova / 'snapshot-ext'

    def state_files(self) -> list[pathlib.Path]:
        """What is in the state directory.

        But for what says which images Nova was left to delete after an error:
        it stays until Nova has surely done so.
        """
        if not self.state_directory.exists():
            return []
        return [path for path in self.state_directory.iterdir()
                if path.suffix != '.in-flight'
                or '"failed"' not in path.read_text()]

    def virsh(self, *arguments: str | pathlib.Path) -> str:
        return run('virsh', '-c', self.uri, *arguments)


FIRST = Host('small-cloud', ROOT / 'nova', ROOT / 'nova' / 'instances',
             'qemu:///system', 'nova-compute')
# There while a test wants it.
SECOND = Host(
    'small-cloud-2', ROOT / 'second' / 'nova',
    ROOT / 'second' / 'nova' / 'instances',
    f'qemu+unix:///system?socket={ROOT}/second/run-libvirt/libvirt-sock',
    'nova-compute-2')


class CloudTestCase(testtools.TestCase):
    """A test on the small cloud; servers and images are gone after it."""

    hosts = (FIRST, SECOND)
    #: where servers are made, if it matters: an administrator's arguments
    placed: ty.Mapping[str, str] = {}

    def setUp(self) -> None:
        super().setUp()
        os.environ['OS_CLIENT_CONFIG_FILE'] = str(ROOT / 'clouds.yaml')
        self.cloud = openstack.connect(cloud='small')
        self.compute = self.admin = self.cloud.compute
        self.compute.default_microversion = '2.90'
        self.addCleanup(self.assert_host_is_clean)

    def assert_host_is_clean(self) -> None:
        """Nothing of ours is left: files, undo logs, processes."""
        for host in self.hosts:
            self.assertEqual([], host.state_files())
            if host.snapshots_directory.exists():
                self.assertEqual([], list(host.snapshots_directory.iterdir()))
        network = os.readlink('/proc/self/ns/net')
        for process in pathlib.Path('/proc').glob('[0-9]*'):
            try:
                # Another cloud on this machine has one of its own.
                if os.readlink(process / 'ns' / 'net') != network:
                    continue
                words = (process / 'cmdline').read_bytes()
            except OSError:
                continue
            self.assertNotIn(str(FIRST.state_directory).encode(), words)

    def state_files(self) -> list[pathlib.Path]:
        return FIRST.state_files()

    @property
    def state_directory(self) -> pathlib.Path:
        return FIRST.state_directory

    def configure(self, *settings: str) -> None:
        """Restart nova-compute with settings, until the test ends."""
        self.addCleanup(run, TOOL, 'configure', '--reset')
        run(TOOL, 'configure', '--reset',
            *(f'--set={setting}' for setting in settings))

    def nova_release(self) -> int:
        """The release of Nova that the cloud has."""
        found = re.search(r'^nova +(\d+)$', run(TOOL, 'status'), re.MULTILINE)
        assert found is not None
        return int(found[1])

    # Servers

    def network(self) -> str:
        """A network whose ports lead nowhere, until the test ends.

        :returns: its id
        """
        created = self.cloud.network.create_network(
            name=f'test-{uuid.uuid4().hex[:8]}')
        self.addCleanup(self.cloud.network.delete_network, created)
        self.cloud.network.create_subnet(
            network_id=created.id, ip_version=4, cidr='192.0.2.0/24',
            gateway_ip=None, enable_dhcp=False)
        return ty.cast(str, created.id)

    def server(self, image: str = 'guest', flavor: str = 'tiny',
               writing: bool = True, network: str | None = None) -> ty.Any:
        """Boot a server, and wait until its guest writes."""
        [created] = self.servers(1, image, flavor, writing, network)
        return created

    def servers(self, count: int, image: str = 'guest',
                flavor: str = 'tiny', writing: bool = True,
                network: str | None = None) -> list[ty.Any]:
        """Boot servers at the same time."""
        begun = [self._begin_server(image, flavor, network)
                 for _ in range(count)]
        created = [self.compute.wait_for_server(
            each, interval=0.5, wait=TIMEOUT_S) for each in begun]
        if writing:
            for each in created:
                self.wait_writes(each)
        return created

    def host_of(self, server: ty.Any) -> Host:
        """Where a server is now."""
        # A tenant is not told.
        name = self.admin.get_server(server.id).compute_host
        return {host.name: host for host in self.hosts}[name]

    def _begin_server(self, image: str, flavor: str,
                      network: str | None) -> ty.Any:
        created = self.compute.create_server(
            name=f'test-{uuid.uuid4().hex[:8]}', **self.placed,
            networks=[{'uuid': network}] if network else 'none',
            image_id=self.cloud.image.find_image(
                image, ignore_missing=False).id,
            flavor_id=self.compute.find_flavor(
                flavor, ignore_missing=False).id)
        self.addCleanup(self._delete_server, created)
        return created

    def _delete_server(self, server: ty.Any) -> None:
        self.compute.delete_server(server)
        self.compute.wait_for_delete(server, interval=0.5, wait=TIMEOUT_S)

    def status(self, server: ty.Any) -> str:
        return ty.cast(str, self.compute.get_server(server.id).status)

    def wait_status(self, server: ty.Any, status: str) -> None:
        """Wait until a server is in a state and nothing is done to it."""
        def reached() -> bool:
            now = self.compute.get_server(server.id)
            return now.status == status and now.task_state is None
        self.wait(reached, f'{server.name} to be {status}')

    def console(self, server: ty.Any) -> str:
        return self.compute.get_server_console_output(
            server.id)['output'] or ''

    def counter(self, server: ty.Any) -> int:
        """The number that the guest printed last, 0 if none."""
        found = re.findall(r'counter (\d+)\r?\n', self.console(server))
        return int(found[-1]) if found else 0

    def booted_from(self, server: ty.Any) -> int:
        """The number that the guest found on its disk."""
        found = re.findall(r'booted from (\d+)', self.console(server))
        return int(found[-1])

    def wait_writes(self, server: ty.Any) -> int:
        """Wait until the guest has written more than it had.

        :returns: the number that it printed last.
        """
        at = self.counter(server)
        self.wait(lambda: self.counter(server) > max(at, 0),
                  f'{server.name} to write')
        return self.counter(server)

    def wait(self, true: ty.Callable[[], bool], what: str,
             interval_s: float = 0.5) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not true():
            self.assertLess(time.monotonic(), deadline, f'waited for {what}')
            time.sleep(interval_s)

    def domain_xml(self, server: ty.Any) -> str:
        return self.host_of(server).virsh('dumpxml', server.id)

    def domain_state(self, server: ty.Any) -> str:
        return self.host_of(server).virsh('domstate', server.id).strip()

    def disk(self, server: ty.Any) -> pathlib.Path:
        return self.host_of(server).instances / server.id / 'disk'

    def block_device(self, size: int) -> str:
        """A loop device of so many bytes, until the test ends."""
        directory = self.useFixture(fixtures.TempDir()).path
        path = os.path.join(directory, 'blocks')
        with open(path, 'wb') as file:
            file.truncate(size)
        device = run('losetup', '--find', '--show', path).strip()
        self.addCleanup(run, 'losetup', '--detach', device)
        return device

    def move_to(self, server: ty.Any, device: str) -> None:
        """Have a server's root disk on a block device, as LVM would.

        Without Nova: it makes such disks on LVM only.
        """
        virsh = ('virsh', '-c', 'qemu:///system')
        domain = ElementTree.fromstring(
            run(*virsh, 'dumpxml', '--inactive', server.id))
        disk = domain.find('./devices/disk')
        assert disk is not None
        disk.set('type', 'block')
        for element in disk.findall('backingStore'):
            disk.remove(element)
        for name, changed in (('driver', {'name': 'qemu', 'type': 'raw'}),
                              ('source', {'dev': device})):
            element = disk.find(name)
            assert element is not None
            element.attrib.clear()
            element.attrib.update(changed)
        run(*virsh, 'destroy', server.id)
        run('qemu-img', 'convert', '-n', '-f', 'qcow2', '-O', 'raw',
            self.disk(server), device)
        with tempfile.NamedTemporaryFile('w', suffix='.xml') as file:
            file.write(ElementTree.tostring(domain, encoding='unicode'))
            file.flush()
            run(*virsh, 'define', file.name)
        run(*virsh, 'start', server.id)

    def compute_log(self, host: Host = FIRST) -> str:
        return (ROOT / 'log' / f'{host.log}.log').read_text(errors='replace')

    # Snapshots

    def request_snapshot(self, server: ty.Any, **properties: str) -> str:
        """Ask for a snapshot as a tenant does.

        :returns: the image's id
        """
        image = self.compute.create_server_image(
            server, f'snap-{uuid.uuid4().hex[:8]}', metadata=properties)
        self.addCleanup(self.cloud.image.delete_image, image.id,
                        ignore_missing=True)
        return ty.cast(str, image.id)

    def snapshot(self, server: ty.Any, **properties: str) -> ty.Any:
        """Take a snapshot.

        :returns: the image, active, with the server left alone
        """
        image_id = self.request_snapshot(server, **properties)
        return self.wait_image(server, image_id)

    def wait_image(self, server: ty.Any, image_id: str) -> ty.Any:
        def ended() -> bool:
            image = self.cloud.image.find_image(
                image_id, ignore_missing=True)
            return image is None or image.status == 'active'
        self.wait(ended, f'image {image_id}')
        image = self.cloud.image.find_image(image_id, ignore_missing=True)
        self.assertIsNotNone(image, self.events(server))
        self.wait_idle(server)
        return image

    def refused_snapshot(self, server: ty.Any, **properties: str) -> str:
        """Take a snapshot that must fail.

        :returns: what the server's events say of it
        """
        image_id = self.request_snapshot(server, **properties)
        self.wait(lambda: self.cloud.image.find_image(
            image_id, ignore_missing=True) is None,
            f'image {image_id} to be deleted')
        self.wait_idle(server)
        return self.why_failed(server)

    def why_failed(self, server: ty.Any) -> str:
        """What the server's events say of the last snapshot that failed."""
        failed = [event for event in self.events(server)
                  if event['event'] == EVENT and event['result'] == 'Error']
        self.assertNotEqual([], failed)
        return ty.cast(str, failed[0]['details'])

    def wait_idle(self, server: ty.Any) -> None:
        self.wait(lambda: self.compute.get_server(
            server.id).task_state is None, f'{server.name} to be idle')

    def events(self, server: ty.Any) -> list[dict[str, ty.Any]]:
        """The events of all that was done to a server, newest first."""
        actions = self.compute.get(
            f'/servers/{server.id}/os-instance-actions',
            microversion='2.90').json()['instanceActions']
        found = []
        for action in actions:
            found += self.compute.get(
                f'/servers/{server.id}/os-instance-actions/'
                f'{action["request_id"]}',
                microversion='2.90').json()['instanceAction']['events']
        return found

    def image_file(self, image: ty.Any) -> pathlib.Path:
        """Where Glance keeps an image's bytes."""
        return ROOT / 'glance' / 'images' / image.id

    def assert_good(self, image: ty.Any, before: int, after: int) -> None:
        """The image is sound and holds one point in time of the guest."""
        path, form = self.image_file(image), image.disk_format
        self.assertEqual(image.size, path.stat().st_size)
        if form == 'qcow2':
            images.qemu_img_check(path)
            info = json.loads(run('qemu-img', 'info', '--output=json', '-f',
                                  'qcow2', path))
            self.assertNotIn('backing-filename', info)
            self.assertNotIn('snapshots', info)
        counters = images.filesystem_counters(
            (path, form), images.DATA_PARTITION)
        images.check_order([counters])
        self.assertTrue(before <= counters[0] <= after + 1,
                        f'{before} {counters} {after}')


def run(*command: str | pathlib.Path) -> str:
    """Run a program, which must succeed, and return what it printed."""
    done = subprocess.run([str(word) for word in command],
                          capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f'{command}: {done.stdout}{done.stderr}')
    return done.stdout
