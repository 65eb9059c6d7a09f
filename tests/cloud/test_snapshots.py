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

"""Snapshots as tenants take them, on the small cloud."""

import os
import pathlib
import time

from tests.cloud import base


class ImageTest(base.CloudTestCase):
    """The image itself, by each flow and in each format."""

    def test_each_flow_gives_images_that_servers_boot_from(self):
        server = self.server()
        for form, transfer in (('qcow2', 'streamed'), ('raw', 'staged')):
            if form == 'raw':
                self.configure('libvirt.snapshot_image_format=raw',
                               'snapshot_ext.transfers=staged')
            for flow in ('backup', 'live', 'cold'):
                self._take_and_boot(server, flow, transfer, form)

    def _take_and_boot(self, server, flow: str, transfer: str,
                       form: str) -> None:
        before = self.wait_writes(server)
        image = self.snapshot(server, snapshot_flow=flow)
        after = self.wait_writes(server)
        self.assertEqual(form, image.disk_format)
        self.assertEqual(flow, image.properties['snapshot_ext_flow'])
        self.assertEqual(
            transfer, image.properties['snapshot_ext_transfer'])
        # The guest has an agent, which cold does not ask.
        self.assertEqual(
            'crash' if flow == 'cold' else 'filesystem',
            image.properties['snapshot_ext_consistency'])
        self.assertEqual('snapshot', image.properties['image_location'])
        self.assertEqual('ACTIVE', self.status(server))
        self.assert_good(image, before, after)
        second = self.server(image.id)
        self.assertTrue(
            before <= self.booted_from(second) <= after + 1)

    def test_backup_and_streamed_serve_when_nothing_is_asked_for(self):
        self._take_by_the_best(self.server(), 'qcow2')

    def test_they_serve_a_raw_disk(self):
        self.configure('libvirt.images_type=raw')
        self._take_by_the_best(self.server(), 'raw')

    def test_they_serve_a_block_device(self):
        device = self.block_device(1024 ** 3)
        server = self.server()
        self.move_to(server, device)
        self._take_by_the_best(server, 'raw')

    def _take_by_the_best(self, server, form: str) -> None:
        before = self.wait_writes(server)
        image = self.snapshot(server)
        self.assertEqual(
            ('backup', 'streamed', 'filesystem', form),
            (image.properties['snapshot_ext_flow'],
             image.properties['snapshot_ext_transfer'],
             image.properties['snapshot_ext_consistency'],
             image.disk_format))
        self.assert_good(image, before, self.wait_writes(server))
        self.assertEqual('ACTIVE', self.status(server))


class ServerStateTest(base.CloudTestCase):
    """A snapshot leaves the server in the state that it had."""

    def test_paused(self):
        server = self.server()
        self.compute.pause_server(server)
        self.wait_status(server, 'PAUSED')
        at = self.counter(server)
        for flow in ('backup', 'live', 'cold'):
            image = self.snapshot(server, snapshot_flow=flow)
            self.assert_good(image, at, at)
            self.assertEqual('PAUSED', self.status(server))
            self.assertEqual('paused', self.domain_state(server))
        self.compute.unpause_server(server)
        self.wait_status(server, 'ACTIVE')
        self.wait_writes(server)

    def test_suspended(self):
        server = self.server()
        at = self.counter(server)
        self.compute.suspend_server(server)
        self.wait_status(server, 'SUSPENDED')
        image = self.snapshot(server)
        self.assert_good(image, at, 10 ** 6)
        self.assertEqual('cold', image.properties['snapshot_ext_flow'])
        self.assertEqual(
            'crash', image.properties['snapshot_ext_consistency'])
        self.assertEqual('SUSPENDED', self.status(server))
        self.assertEqual('shut off', self.domain_state(server))
        self.compute.resume_server(server)
        self.wait_status(server, 'ACTIVE')
        # From its memory: it counts on, and its new console shows no boot.
        self.assertGreaterEqual(self.wait_writes(server), at)
        self.assertNotIn('booted from', self.console(server))

    def test_stopped(self):
        server = self.server()
        self.compute.stop_server(server)
        self.wait_status(server, 'SHUTOFF')
        image = self.snapshot(server)
        self.assert_good(image, 1, 10 ** 6)
        self.assertEqual(
            'stopped', image.properties['snapshot_ext_consistency'])
        self.assertEqual('SHUTOFF', self.status(server))
        self.assertEqual('shut off', self.domain_state(server))


class CallerTest(base.CloudTestCase):
    """Nova's other ways to a snapshot."""

    def test_backup(self):
        server = self.server()
        before = self.counter(server)
        self.compute.backup_server(
            server, f'{server.name}-backup', 'daily', 1)
        image = None

        def made() -> bool:
            nonlocal image
            image = self.cloud.image.find_image(
                f'{server.name}-backup', ignore_missing=True)
            return image is not None and image.status == 'active'
        self.wait(made, 'the backup')
        self.addCleanup(self.cloud.image.delete_image, image.id)
        self.wait_status(server, 'ACTIVE')
        self.assertEqual('backup', image.properties['snapshot_ext_flow'])
        self.assertEqual('daily', image.properties['backup_type'])
        self.assert_good(image, before, self.wait_writes(server))

    def test_shelve_and_unshelve(self):
        server = self.server()
        self.compute.shelve_server(server)
        self.wait_status(server, 'SHELVED_OFFLOADED')
        image = self.cloud.image.find_image(
            f'{server.name}-shelved', ignore_missing=False)
        self.addCleanup(self.cloud.image.delete_image, image.id,
                        ignore_missing=True)
        self.assertEqual(
            'stopped', image.properties['snapshot_ext_consistency'])
        # Nothing but the image is left of the disk.
        self.assertEqual(
            'streamed', image.properties['snapshot_ext_transfer'])
        self.assert_good(image, 1, 10 ** 6)
        self.compute.unshelve_server(server)
        self.wait_status(server, 'ACTIVE')
        self.wait_writes(server)
        self.assertGreater(self.booted_from(server), 0)


class SlowTest(base.CloudTestCase):
    """What is seen of a snapshot that takes its time, and what ends it."""

    # Seconds within which a snapshot ends that nobody wants any more.
    ENDED_S = 15

    # Of the guest's disk some 25 MiB are not zeroes, and all that is stored of
    # it, 256 MiB, is read for a raw image.
    RAW = ('snapshot_ext.transfers=streamed', 'snapshot_ext.bandwidth=8',
           'libvirt.snapshot_image_format=raw')

    def test_streamed(self):
        self._watch_and_end(*self.RAW)

    def test_staged(self):
        self._watch_and_end('snapshot_ext.transfers=staged',
                            'snapshot_ext.bandwidth=1')

    def test_streamed_under_eventlet(self):
        self._watch_and_end(
            *self.RAW, 'DEFAULT.concurrency_backend=eventlet')

    def _watch_and_end(self, *settings: str) -> None:
        # One start of nova-compute takes longer than all of this.
        self.configure(*settings)
        server = self.server()
        self._see_progress_rise(server)
        self._end_by_deleting_the_image(server)
        self._end_by_deleting_the_server(server)

    def _see_progress_rise(self, server) -> None:
        image_id = self._begin(server)
        seen = [self._progress(server)]

        def ended() -> bool:
            now = self.compute.get_server(server.id)
            if now.progress != seen[-1]:
                seen.append(now.progress)
            return now.task_state is None
        self.wait(ended, 'the snapshot')
        self.wait_image(server, image_id)
        rising = [percent for percent in seen if percent]
        self.assertEqual(sorted(set(rising)), rising)
        self.assertGreaterEqual(len(rising), 3, seen)
        self.assertLessEqual(rising[-1], 100)
        self.assertEqual(0, self._progress(server))

    def _end_by_deleting_the_image(self, server) -> None:
        log = self.compute_log()
        image_id = self._begin(server)
        begun = time.monotonic()
        self.cloud.image.delete_image(image_id)
        self.wait_idle(server)
        self.assertLess(time.monotonic() - begun, self.ENDED_S)
        self.assert_host_is_clean()
        self.assertEqual(
            ['Job', 'type:', 'None'],
            base.run('virsh', '-c', 'qemu:///system', 'domjobinfo',
                     server.id).split())
        self.assertEqual('ACTIVE', self.status(server))
        self.assertEqual(0, self._progress(server))
        self.wait_writes(server)
        self._assert_quiet_since(log)

    def _end_by_deleting_the_server(self, server) -> None:
        log, disk = self.compute_log(), self.disk(server)
        image_id = self._begin(server)
        begun = time.monotonic()
        self.compute.delete_server(server)
        self.wait(lambda: not self.state_files(),
                  'the undo log to go')
        self.assertLess(time.monotonic() - begun, self.ENDED_S)
        # What is left to wait for is Nova's.
        self._delete_server(server)
        self.wait(lambda: self.cloud.image.find_image(
            image_id, ignore_missing=True) is None, 'the image to go')
        self.assert_host_is_clean()
        self.assertFalse(disk.exists())
        self._assert_quiet_since(log)

    def _begin(self, server) -> str:
        """Ask for a snapshot, and wait until it is on its way."""
        image_id = self.request_snapshot(server)
        self.wait(lambda: self._progress(server) > 0, 'the first bytes')
        return image_id

    def _progress(self, server) -> int:
        return self.compute.get_server(server.id).progress or 0

    def _assert_quiet_since(self, log: str) -> None:
        """nova-compute's log has no error since it was this."""
        said = self.compute_log().removeprefix(log)
        for word in ('Traceback', ' ERROR '):
            self.assertNotIn(word, said)


class DeadComputeTest(base.CloudTestCase):
    """What a killed nova-compute leaves is seen to when it is started."""

    def test_nova_compute_killed_during_a_snapshot(self):
        self.configure(*SlowTest.RAW)
        server = self.server()
        image_id = self.request_snapshot(server)
        self._kill_when_it_is_sent(server, image_id)
        self.wait_writes(server)
        self.assertIn(server.id, base.run(
            'virsh', '-c', 'qemu:///system', 'list', '--persistent',
            '--uuid'))
        # And the next one works.
        before = self.counter(server)
        image = self.snapshot(server)
        self.assert_good(image, before, self.wait_writes(server))

    def test_nova_compute_killed_during_a_shelve(self):
        self.configure(*SlowTest.RAW)
        server = self.server()
        self.compute.shelve_server(server)
        name = f'{server.name}-shelved'
        self.wait(lambda: self.cloud.image.find_image(name) is not None,
                  'the image')
        image = self.cloud.image.find_image(name)
        self.addCleanup(self.cloud.image.delete_image, image.id,
                        ignore_missing=True)
        self._kill_when_it_is_sent(server, image.id)
        # Nova had stopped it, and nobody else starts it.
        self.assertEqual('shut off', self.domain_state(server))
        self.compute.reboot_server(server, 'HARD')
        self.wait_status(server, 'ACTIVE')
        self.wait_writes(server)

    def _kill_when_it_is_sent(self, server, image_id: str) -> None:
        self.wait(lambda: self.cloud.image.get_image(
            image_id).status == 'saving', 'the first bytes')
        base.run(base.TOOL, 'restart-compute', '--kill')
        self.wait_idle(server)
        self.wait(lambda: self.cloud.image.find_image(
            image_id, ignore_missing=True) is None, 'the image to go')
        self.wait(lambda: not self.state_files(),
                  'the records to go')
        self.assert_host_is_clean()
        [event] = [event for event in self.events(server)
                   if event['event'] == base.EVENT]
        self.assertEqual('Error', event['result'])
        self.assertRegex(event['details'],
                         f'nova-compute died.*image {image_id} was .*, and '
                         f'is deleted')


class RequestTest(base.CloudTestCase):
    """What tenants and operators may ask for."""

    def test_request_is_for_one_snapshot_only(self):
        server = self.server()
        image = self.snapshot(server, snapshot_flow='cold')
        self.assertNotIn('snapshot_flow', image.properties)
        second = self.server(image.id)
        again = self.snapshot(second)
        self.assertEqual('backup', again.properties['snapshot_ext_flow'])

    def test_refused_requests_say_why_and_leave_nothing(self):
        server = self.server()
        details = self.refused_snapshot(server, snapshot_flow='warm')
        self.assertIn('warm', details)
        self.assertIn('backup, live, cold', details)
        self.compute.stop_server(server)
        self.wait_status(server, 'SHUTOFF')
        details = self.refused_snapshot(server, snapshot_flow='live')
        self.assertIn('the guest is shut off', details)
        self.assertEqual('SHUTOFF', self.status(server))

    def test_configuration_and_flavor_choose_the_flow(self):
        self.configure('snapshot_ext.flows=cold,live',
                       'snapshot_ext.request_flows=cold',
                       'snapshot_ext.verify=hash')
        server = self.server()
        image = self.snapshot(server)
        self.assertEqual('cold', image.properties['snapshot_ext_flow'])
        self.assertGreater(
            int(image.properties['snapshot_ext_guest_pause_ms']), 0)
        details = self.refused_snapshot(server, snapshot_flow='live')
        self.assertIn('this cloud allows cold', details)
        flavor = self.compute.create_flavor(
            name=f'{server.name}-flavor', ram=256, vcpus=1, disk=1)
        self.addCleanup(self.compute.delete_flavor, flavor)
        self.compute.create_flavor_extra_specs(
            flavor, {'snapshot_ext:flow': 'live'})
        other = self.server(flavor=flavor.name)
        image = self.snapshot(other)
        self.assertEqual('live', image.properties['snapshot_ext_flow'])


class OperatorTest(base.CloudTestCase):
    """What the operator's settings and the host decide."""

    def test_domain_stays_persistent_and_compute_is_unprivileged(self):
        server = self.server()
        image_id = self.request_snapshot(server, snapshot_flow='live')
        seen = set()

        def ended() -> bool:
            persistent = base.run('virsh', '-c', 'qemu:///system', 'list',
                                  '--persistent', '--uuid')
            seen.add(server.id in persistent)
            image = self.cloud.image.get_image(image_id)
            return image.status == 'active'
        self.wait(ended, 'the snapshot')
        self.wait_idle(server)
        self.assertEqual({True}, seen)
        pid = self._compute_pid()
        self.assertNotEqual(0, os.stat(f'/proc/{pid}').st_uid)

    def _compute_pid(self) -> int:
        for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
            words = path.read_bytes().split(b'\0')
            if any(word.endswith(b'/nova-compute') for word in words):
                return int(path.parent.name)
        raise AssertionError('nova-compute does not run')

    def test_other_backend_serves_as_the_default_does(self):
        # Threads are the default from 34 on, and eventlet before.
        threads = self.nova_release() < 34
        self.configure('DEFAULT.concurrency_backend='
                       + ('threading' if threads else 'eventlet'))
        server = self.server()
        for flow in ('backup', 'live', 'cold'):
            before = self.wait_writes(server)
            image = self.snapshot(server, snapshot_flow=flow)
            self.assert_good(image, before, self.wait_writes(server))
        log = self.compute_log()
        since = log[log.rindex('Loading compute driver'):]
        # What a start with native threads says.
        self.assertEqual(threads, 'backend._threading' in since)

    def test_stock_options_are_honoured(self):
        directory = base.ROOT / 'nova' / 'staging'
        directory.mkdir(exist_ok=True)
        directory.chmod(0o777)
        self.addCleanup(directory.rmdir)
        self.configure('workarounds.disable_libvirt_livesnapshot=true',
                       'libvirt.snapshot_compression=true',
                       f'libvirt.snapshots_directory={directory}')
        server = self.server()
        before = self.counter(server)
        image = self.snapshot(server)
        self.assertEqual(
            'staged', image.properties['snapshot_ext_transfer'])
        self.assert_good(image, before, self.wait_writes(server))
        details = self.refused_snapshot(server, snapshot_flow='live')
        self.assertIn('disable_libvirt_livesnapshot', details)
        checked = base.images.qemu_img_check(self.image_file(image))
        self.assertGreater(checked['compressed-clusters'], 0)

    def test_image_deleted_meanwhile_ends_the_snapshot_quietly(self):
        server = self.server()
        image_id = self.request_snapshot(server)
        self.cloud.image.delete_image(image_id)
        self.wait_idle(server)
        self.assertEqual('ACTIVE', self.status(server))
        self.wait_writes(server)

    def test_server_deleted_meanwhile_leaves_nothing(self):
        server = self.server()
        disk = self.disk(server)
        image_id = self.request_snapshot(server, snapshot_flow='cold')
        self._delete_server(server)
        self.wait(lambda: self.cloud.image.find_image(
            image_id, ignore_missing=True) is None, 'the image to go')
        self.assertFalse(disk.exists())
        self.wait(lambda: not self.state_files(),
                  'the undo log to go')

    def test_agent_quiesces_the_file_systems(self):
        image = self.cloud.image.find_image('guest', ignore_missing=False)
        self.cloud.image.update_image(image, os_require_quiesce='yes')
        self.addCleanup(self._forget, image.id, 'os_require_quiesce')
        server = self.server()
        self.wait(lambda: "state='connected'" in self.domain_xml(server),
                  'the agent')
        before = self.wait_writes(server)
        taken = self.snapshot(server)
        self.assertEqual(
            'filesystem', taken.properties['snapshot_ext_consistency'])
        counters = base.images.filesystem_counters(
            (self.image_file(taken), 'qcow2'), base.images.DATA_PARTITION,
            must_be_clean=True)
        self.assertTrue(
            before <= counters[0] <= self.wait_writes(server) + 1)
        # Cold can't quiesce: with nothing else it is said, not done.
        details = self.refused_snapshot(server, snapshot_flow='cold')
        self.assertIn('os_require_quiesce', details)

    def _forget(self, image_id: str, name: str) -> None:
        self.cloud.image.patch(
            f'/images/{image_id}',
            json=[{'op': 'remove', 'path': f'/{name}'}], headers={
                'Content-Type':
                    'application/openstack-images-v2.1-json-patch'})
