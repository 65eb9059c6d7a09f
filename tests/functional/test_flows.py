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

"""Flows, transfers and the recipe on real libvirt, QEMU and guests."""

import collections.abc
import contextlib
import json
import pathlib
import socket
import tempfile
import threading
import time

import fixtures
import libvirt
from oslo_utils.imageutils import format_inspector
from testtools import content

from nova_snapshot_ext import exception
from nova_snapshot_ext import guard
from nova_snapshot_ext import guest as our_guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext.images import base as image_services
from nova_snapshot_ext.images import directory
from nova_snapshot_ext import plugins
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import selection
from nova_snapshot_ext import snapshot
from nova_snapshot_ext import undo
from tests.functional import base
from tests.functional import guests
from tests.functional import images

#: for a script that has request, staging and state: what it asks for
WANTED = """\
wanted = request.Request(
    image_format='qcow2', compress=False,
    quiesce=request.Quiesce.IF_POSSIBLE, staging_directory=staging,
    staging_setting='staging', scratch_directory=staging,
    state_directory=state, socket_directory=state,
    managed_save_directory='/', freeze_timeout=10, copy_timeout=60,
    convert_timeout=60)
"""

BOTH_TRANSFERS = (('staged', 'qcow2'), ('streamed', 'qcow2'),
                  ('staged', 'raw'), ('streamed', 'raw'))


def text(words: str) -> content.Content:
    """What a test adds to its details."""
    return content.text_content(words)


class Relay(fixtures.Fixture):
    """libvirtd's socket once more, for connections that can be cut."""

    def __init__(self, target: pathlib.Path) -> None:
        self._target = str(target)
        self.uri = f'qemu+unix:///system?socket={target}.relay'

    def _setUp(self):
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f'{self._target}.relay')
        self._listener.listen()
        self.addCleanup(pathlib.Path(f'{self._target}.relay').unlink)
        self.addCleanup(self._listener.shutdown, socket.SHUT_RDWR)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(self._target)
                self._sockets += [near, far]
                for pair in (near, far), (far, near):
                    threading.Thread(
                        target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """End every connection; new ones can be made."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class SnapshotTestCase(base.FunctionalTestCase):
    """Takes snapshots by the recipe, into a directory."""

    def setUp(self):
        super().setUp()
        self.work = self.libvirtd.path / 'work'
        self.work.mkdir(exist_ok=True)
        self.work.chmod(0o755)
        self.images = self._directory('images')
        self.staging = self._directory('staging')
        self.state = self._directory('state')
        self.addCleanup(self._assert_nothing_left)

    def _directory(self, name: str) -> pathlib.Path:
        path = pathlib.Path(tempfile.mkdtemp(prefix=name[0], dir=self.work))
        path.chmod(0o755)
        return path

    def _assert_nothing_left(self):
        for path in (self.staging, self.state):
            self.assertEqual([], list(path.iterdir()))

    def request(self, **changes):
        arguments = dict(
            image_format='qcow2', compress=False,
            quiesce=requests.Quiesce.IF_POSSIBLE,
            staging_directory=str(self.staging), staging_setting='staging',
            scratch_directory=str(self.staging),
            state_directory=str(self.state),
            socket_directory=str(self.state),
            managed_save_directory='/var/lib/libvirt/qemu/save',
            freeze_timeout=10, copy_timeout=60, convert_timeout=300)
        return requests.Request(**(arguments | changes))

    def ours(self, guest: guests.Guest) -> our_guests.Guest:
        return our_guests.Guest(guest.domain, self.libvirtd.uri)

    def take(self, guest: guests.Guest, flow: str, name: str = 'image',
             transfer: str = 'staged', others: tuple[str, ...] = (),
             before_upload: collections.abc.Callable[
                 [], object] = lambda: None,
             **changes) -> tuple[snapshot.Result, images.Image]:
        """Take a snapshot.

        :param others: flows that may serve where the first does not
        :param before_upload: called when the disk is frozen and its image can
            be read; if it is streamed, nothing of it is read yet
        """
        ours = self.ours(guest)
        request = self.request(**changes)
        plan = snapshot.plan(
            ours, hosts.PlainHost(),
            selection.Wish((flow, *others), 'test', not others),
            (transfer,), request)
        service = directory.DirectoryService(image_services.Destination(
            directory=str(self.images), directory_setting='images'))
        result = snapshot.take(
            ours, hosts.PlainHost(), plan, request, service,
            image_services.Description(
                name=name, disk_format=request.image_format,
                container_format='bare', properties={}), verify_hash=True,
            before_upload=before_upload)
        return result, (result.location, request.image_format)

    def assert_good(self, image: images.Image, before: int, after: int):
        """The image is sound, self-contained and of one point in time."""
        path, form = image
        if form == 'qcow2':
            images.qemu_img_check(path)
            format_inspector.QcowInspector.from_file(
                str(path)).safety_check()
        counters = images.check_point_in_time([image])
        self.assertTrue(before <= counters[0][0] <= after + 1,
                        f'{before} {counters} {after}')

    def assert_whole(self, guest: guests.Guest):
        """Running, persistent, writing, and without a trace of us."""
        self.assertTrue(guest.domain.isPersistent())
        self.assertFalse(guest.domain.hasManagedSaveImage(0))
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING,
                         guest.domain.state()[0])
        guest.wait_writes_on()
        for disk in guest.disks:
            self.assertEqual(
                {}, guest.domain.blockJobInfo(disk.target, 0))
            self.assert_no_internal_snapshot(disk)

    def restore_paused(self, guest: guests.Guest):
        """Save its memory and have it back, paused.

        Since QEMU 10, its disks are inactive then.
        """
        guest.domain.suspend()
        guest.domain.managedSave(0)
        guest.domain.create()
        self.assertEqual(libvirt.VIR_DOMAIN_PAUSED, guest.domain.state()[0])

    def assert_no_internal_snapshot(self, disk: guests.MadeDisk):
        if disk.format == 'qcow2':
            found = json.loads(images.run(
                'qemu-img', 'info', '-U', '--output=json', '-f', 'qcow2',
                disk.path))
            self.assertNotIn('snapshots', found)


class ColdTest(SnapshotTestCase):

    def test_running_guest_runs_on_and_the_image_is_an_instant(self):
        guest = self.guest(guests.Disk('overlay'), churn=True)
        for transfer, form in BOTH_TRANSFERS:
            before = guest.wait_writes_on()
            result, image = self.take(
                guest, 'cold', f'{transfer}-{form}', transfer,
                image_format=form)
            self.assertEqual(transfer, result.transfer)
            self.assert_good(image, before, guest.counter())
            self.assertEqual('crash', result.consistency.value)
            self.assertGreater(result.guest_pause_s, 0.1)
            self.assert_whole(guest)

    def test_paused_guest_comes_back_paused(self):
        guest = self.guest(guests.Disk('overlay'))
        guest.domain.suspend()
        _, image = self.take(guest, 'cold')
        self.assert_good(image, guest.counter(), guest.counter())
        self.assertEqual(libvirt.VIR_DOMAIN_PAUSED, guest.domain.state()[0])
        self.assert_no_internal_snapshot(guest.disks[0])
        guest.domain.resume()
        self.assert_whole(guest)

    def test_shut_off_guest_is_read_and_stays_off(self):
        guest = self.guest(guests.Disk('overlay'))
        guest.domain.destroy()
        result, image = self.take(guest, 'cold')
        self.assert_good(image, guest.counter(), guest.counter())
        images.compare(image, guest.disks[0].image)
        self.assertEqual('crash', result.consistency.value)
        self.assertEqual(0, result.guest_pause_s)
        self.assertFalse(guest.domain.isActive())

    def test_guest_that_shut_down_gives_a_stopped_image(self):
        guest = self.guest(guests.Disk('overlay'))
        guest.domain.shutdown()
        for _ in range(200):
            if not guest.domain.isActive():
                break
            with guest.console.changed:
                guest.console.changed.wait(0.1)
        result, _ = self.take(guest, 'cold')
        self.assertEqual('stopped', result.consistency.value)

    def test_suspended_guest_is_read_and_its_save_is_kept(self):
        guest = self.guest(guests.Disk('overlay'))
        guest.domain.managedSave(0)
        result, image = self.take(guest, 'cold')
        self.assert_good(image, guest.counter(), guest.counter())
        self.assertEqual('crash', result.consistency.value)
        self.assertTrue(guest.domain.hasManagedSaveImage(0))
        self.assertFalse(guest.domain.isActive())
        guest.domain.create()
        self.assert_whole(guest)

    def test_guest_with_raw_and_block_disks_runs_on_too(self):
        guest = self.guest(guests.Disk('raw'), guests.Disk('block'))
        ours = self.ours(guest)
        flow = plugins.load(plugins.FLOWS, 'cold', 'test')()
        guest.wait_writes_on()
        with undo.UndoLog.create(
                str(self.state), ours, hosts.PlainHost()) as log:
            with flow.freeze(ours, ours.disks(), self.request(),
                             log) as frozen:
                guest.wait_writes_on(20)
                paused = frozen.pause.seconds
                images.check_point_in_time([
                    (f'nbd+unix:///{disk.export}?socket={disk.socket}',
                     'raw') for disk in frozen.disks])
                self.assertEqual(paused, frozen.pause.seconds)
        self.assert_whole(guest)

    def test_raw_and_block_disks_give_images(self):
        for kind, transfer in (('raw', 'streamed'), ('block', 'staged')):
            guest = self.guest(guests.Disk(kind))
            before = guest.wait_writes_on()
            result, image = self.take(guest, 'cold', kind, transfer)
            self.assert_good(image, before, guest.counter())
            self.assertGreater(result.guest_pause_s, 0.1)
            self.assert_whole(guest)

    def test_paused_guest_with_a_raw_disk_stays_paused(self):
        guest = self.guest(guests.Disk('raw'))
        guest.domain.suspend()
        _, image = self.take(guest, 'cold')
        self.assert_good(image, guest.counter(), guest.counter())
        self.assertEqual(libvirt.VIR_DOMAIN_PAUSED, guest.domain.state()[0])
        guest.domain.resume()
        self.assert_whole(guest)

    def test_raw_disk_beside_does_not_keep_the_snapshot_in_the_image(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        before = guest.wait_writes_on()
        _, image = self.take(guest, 'cold')
        self.assert_good(image, before, guest.counter())
        self.assert_whole(guest)

    def when_saved(self, guest: guests.Guest, what: collections.abc.Callable[
            [], object]) -> None:
        """Do something in the middle of the guest's managed save."""
        def wait() -> None:
            while self.ours(guest).job() != 'save':
                time.sleep(0.01)
            what()
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        self.addCleanup(thread.join, 60)

    def frozen_in_vain(self, ours: our_guests.Guest, **changes) -> Exception:
        flow = plugins.load(plugins.FLOWS, 'cold', 'test')()
        log = undo.UndoLog.create(str(self.state), ours, hosts.PlainHost())
        try:
            return self.assertRaises(
                exception.SnapshotError, flow.freeze(
                    ours, ours.disks(), self.request(**changes),
                    log).__enter__)
        finally:
            log.close()

    def assert_runs(self, guest: guests.Guest) -> None:
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING,
                         guest.domain.state()[0])
        self.assertFalse(guest.domain.hasManagedSaveImage(0))
        self.assert_whole(guest)

    def test_guest_runs_on_whose_save_nobody_waits_for(self):
        guest = self.guest(guests.Disk('overlay'))
        relay = self.useFixture(Relay(self.libvirtd.socket))
        connection = libvirt.open(relay.uri)
        life = guest.domain.ID()
        self.when_saved(guest, relay.cut)
        error = self.frozen_in_vain(our_guests.Guest.find(
            connection, relay.uri, guest.uuid))
        self.assertEqual([], list(self.state.iterdir()))
        self.assertIsInstance(error, our_guests.LibvirtError)
        self.assertTrue(error.of_connection)
        guest.domain = self.connection.lookupByUUIDString(guest.uuid)
        # libvirtd would have gone on with it.
        self.assertEqual(life, guest.domain.ID())
        self.assertFalse(guest.domain.hasManagedSaveImage())
        self.assert_runs(guest)

    def test_guest_runs_on_whose_save_ended_with_libvirtd(self):
        guest = self.guest(guests.Disk('overlay'))
        ours = self.ours(guest)

        def restart() -> None:
            self.libvirtd.kill()
            self.libvirtd.start()
        self.when_saved(guest, restart)
        self.frozen_in_vain(ours)
        # What can't be undone while libvirtd is away is tried again.
        [path] = self.state.iterdir()
        self.assertTrue(guard.bring_back(
            str(path), lambda uri, uuid: ours, hosts.PlainHost()))
        connection = self.libvirtd.connect()
        self.addCleanup(connection.close)
        guest.domain = connection.lookupByUUIDString(guest.uuid)
        self.assert_runs(guest)

    def test_save_has_its_limit_and_the_guest_runs_on(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova_snapshot_ext.power._END_SAVE_POLL_S', 0.02))
        guest = self.guest(guests.Disk('overlay'))
        life = guest.domain.ID()
        error = self.frozen_in_vain(self.ours(guest), save_timeout=0)
        self.assertEqual([], list(self.state.iterdir()))
        self.assertIn('save_timeout = 0 seconds', str(error))
        self.assertEqual(life, guest.domain.ID())
        self.assert_runs(guest)

    def test_transient_guest_is_an_obstacle(self):
        guest = self.guest(guests.Disk('overlay'))
        guest.domain.undefine()
        self.addCleanup(guest.domain.destroy)
        error = self.assertRaises(
            exception.NoFlowServes, self.take, guest, 'cold')
        self.assertIn('transient', str(error))

    def test_no_room_for_the_memory_is_an_obstacle(self):
        guest = self.guest(guests.Disk('overlay'))
        small = self._directory('save')
        images.run('mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', small)
        self.addCleanup(images.run, 'umount', small)
        error = self.assertRaises(
            exception.NoFlowServes, self.take, guest, 'cold',
            managed_save_directory=str(small))
        self.assertIn('memory', str(error))
        self.assert_whole(guest)

    def test_fixed_devices_are_an_obstacle(self):
        guest = self.guest(guests.Disk('overlay'), start=False)
        xml = guest.xml().replace(
            '</devices>', '<shmem name="x"><model type="ivshmem-plain"/>'
            '<size unit="M">4</size></shmem></devices>')
        self.connection.defineXML(xml)
        guest.start()
        error = self.assertRaises(
            exception.NoFlowServes, self.take, guest, 'cold')
        self.assertIn('shared memory', str(error))
        self.assert_whole(guest)


class LiveTest(SnapshotTestCase):

    def test_guest_never_stops_nor_leaves_the_persistent_ones(self):
        guest = self.guest(guests.Disk('overlay'), churn=True)
        seen = []
        with self._watched_persistence(guest, seen):
            for transfer, form in BOTH_TRANSFERS:
                before = guest.wait_writes_on()
                result, image = self.take(
                    guest, 'live', f'{transfer}-{form}', transfer,
                    image_format=form)
                self.assert_good(image, before, guest.counter())
                self.assertEqual(0, result.guest_pause_s)
                self.assert_whole(guest)
        self.assertEqual({True}, set(seen))

    @contextlib.contextmanager
    def _watched_persistence(self, guest, seen):
        import threading
        ended = threading.Event()
        connection = self.libvirtd.connect()
        self.addCleanup(connection.close)
        domain = connection.lookupByUUIDString(guest.uuid)

        def watch():
            while not ended.wait(0.02):
                seen.append(bool(domain.isPersistent()))
        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def test_disks_of_every_kind(self):
        for kind in ('qcow2', 'raw', 'block'):
            guest = self.guest(guests.Disk(kind))
            before = guest.wait_writes_on()
            _, image = self.take(guest, 'live', kind)
            self.assert_good(image, before, guest.counter())
            self.assert_whole(guest)

    def test_guest_that_was_restored_paused(self):
        guest = self.guest(guests.Disk('overlay'))
        self.restore_paused(guest)
        _, image = self.take(guest, 'live')
        self.assert_good(image, 0, guest.counter())
        self.assertEqual(libvirt.VIR_DOMAIN_PAUSED, guest.domain.state()[0])
        guest.domain.resume()
        self.assert_whole(guest)

    def test_several_disks_are_frozen_at_one_instant(self):
        guest = self.guest(guests.Disk('overlay'), guests.Disk('raw'))
        ours = self.ours(guest)
        flow = plugins.load(plugins.FLOWS, 'live', 'test')()
        guest.wait_writes_on()
        with undo.UndoLog.create(
                str(self.state), ours, hosts.PlainHost()) as log:
            with flow.freeze(ours, ours.disks(), self.request(),
                             log) as frozen:
                self.assertGreater(frozen.pause.seconds, 0)
                images.check_point_in_time([
                    (f'nbd+unix:///{disk.export}?socket={disk.socket}',
                     'raw') for disk in frozen.disks])
                guest.wait_writes_on()
        self.assert_whole(guest)

    def test_file_systems_are_quiesced(self):
        guest = self.guest(guests.Disk('overlay'), mode='fs', agent=True)
        guest.wait_agent()
        before = guest.wait_writes_on()
        result, image = self.take(
            guest, 'live', quiesce=requests.Quiesce.REQUIRED)
        self.assertEqual('filesystem', result.consistency.value)
        self.assertGreater(result.guest_pause_s, 0)
        counters = images.check_filesystems_point_in_time(
            [image], must_be_clean=True)
        self.assertTrue(before <= counters[0][0] <= guest.counter() + 1)
        self.assert_whole(guest)

    def test_quiescing_without_an_agent_is_an_obstacle(self):
        guest = self.guest(guests.Disk('overlay'))
        error = self.assertRaises(
            exception.NoFlowServes, self.take, guest, 'live',
            quiesce=requests.Quiesce.REQUIRED)
        self.assertIn('no guest agent', str(error))
        result, _ = self.take(guest, 'live')
        self.assertEqual('crash', result.consistency.value)

    def test_foreign_job_is_an_obstacle_and_goes_on(self):
        guest = self.guest(guests.Disk('overlay'))
        target = guest.directory / 'foreign'
        guest.domain.blockCopy(
            'vda', f'<disk type="file"><source file="{target}"/>'
            '<driver type="raw"/></disk>', {},
            libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)
        for flow in ('live', 'cold'):
            error = self.assertRaises(
                exception.NoFlowServes, self.take, guest, flow)
            self.assertIn('block job (copy)', str(error))
        self.assertTrue(guest.domain.blockJobInfo('vda', 0))
        guest.domain.blockJobAbort('vda', 0)

    def test_guest_that_is_off_is_an_obstacle(self):
        guest = self.guest(guests.Disk('overlay'), start=False)
        error = self.assertRaises(
            exception.NoFlowServes, self.take, guest, 'live')
        self.assertIn('shut off', str(error))


class UnsafeDiskTest(SnapshotTestCase):

    def test_raw_disk_with_a_qcow2_header_stays_these_bytes(self):
        secret = self.work / 'secret'
        secret.write_bytes(b'not for guests' * 1000)
        guest = self.guest(guests.Disk('raw'), start=False)
        path = guest.disks[0].path
        size = path.stat().st_size
        images.run('qemu-img', 'create', '-q', '-f', 'qcow2', '-F', 'raw',
                   '-b', secret, path, str(size))
        with open(path, 'r+b') as disk:
            disk.truncate(size)
        bytes_before = path.read_bytes()
        _, image = self.take(guest, 'cold', image_format='raw')
        self.assertEqual(bytes_before, pathlib.Path(image[0]).read_bytes())

    def test_data_file_in_a_header_is_refused(self):
        guest = self.guest(guests.Disk('qcow2'), start=False)
        path = guest.disks[0].path
        images.run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o',
                   f'data_file={self.work}/outside,data_file_raw=on', path,
                   '64M')
        self.addCleanup((self.work / 'outside').unlink)
        error = self.assertRaises(
            exception.UnsafeDisk, self.take, guest, 'cold')
        self.assertIn('data_file', str(error))

    def test_backing_file_without_a_format_is_refused(self):
        guest = self.guest(guests.Disk('qcow2'), start=False)
        path = guest.disks[0].path
        backing = guest.directory / 'backing'
        backing.write_bytes(b'x' * 1024 ** 2)
        images.run('qemu-img', 'create', '-q', '-f', 'qcow2', '-F', 'raw',
                   '-b', backing, path, '64M')
        # The header extension of the backing format (docs/interop/
        # qcow2.txt) becomes one that nobody knows.
        header = path.read_bytes()
        self.assertEqual(1, header.count(b'\xe2\x79\x2a\xca'))
        path.write_bytes(header.replace(b'\xe2\x79\x2a\xca', b'nova'))
        error = self.assertRaises(
            exception.UnsafeDisk, self.take, guest, 'cold')
        self.assertIn('not recorded', str(error))

    def test_encrypted_disk_is_refused(self):
        guest = self.guest(guests.Disk('qcow2'), start=False)
        xml = guest.xml().replace(
            '<target dev="vda"',
            '<encryption format="luks"><secret type="passphrase" '
            'uuid="6dd3e4a5-1d76-44ce-961f-f119f5aad935"/></encryption>'
            '<target dev="vda"')
        self.connection.defineXML(xml)
        error = self.assertRaises(
            exception.UnsafeDisk, self.take, guest, 'cold')
        self.assertIn('encrypted', str(error))

    def test_staging_directory_that_is_too_small_is_refused(self):
        guest = self.guest(guests.Disk('overlay'))
        small = self._directory('small')
        images.run('mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', small)
        self.addCleanup(images.run, 'umount', small)
        for flow in ('cold', 'live'):
            error = self.assertRaises(
                exception.NotEnoughRoom, self.take, guest, flow,
                staging_directory=str(small))
            self.assertIn(f'staging = {small}', str(error))
        self.assert_whole(guest)
