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

"""Snapshots whose nova-compute or Glance fails in the middle.

Whatever it is: the server is as it was, no image has a part of the bytes, and
the next snapshot works. What comes of a nova-compute that is killed, and of a
server or an image that is deleted, is in test_snapshots.py.
"""

import json
import typing as ty

from tests.cloud import base
from tests.cloud import glance_proxy

STREAMED = 'snapshot_ext.transfers=streamed'
# All of the guest's disk, 256 MiB, is read and sent, which takes half a
# minute.
SLOW = (STREAMED, 'snapshot_ext.bandwidth=8',
        'libvirt.snapshot_image_format=raw')
VIRSH = ('virsh', '-c', 'qemu:///system')


class FailureTestCase(base.CloudTestCase):

    def assert_whole(self, server: ty.Any) -> None:
        """The server runs, writes and is idle, and nothing is left."""
        self.wait_status(server, 'ACTIVE')
        self.wait_writes(server)
        self.assertEqual('running', self.domain_state(server))
        self.assertIn(server.id, base.run(
            *VIRSH, 'list', '--persistent', '--uuid'))
        self.assertEqual(['Job', 'type:', 'None'], base.run(
            *VIRSH, 'domjobinfo', server.id).split())
        self.assertEqual(0, self.compute.get_server(server.id).progress)
        self.assertNotIn('snapshots', json.loads(base.run(
            'qemu-img', 'info', '-U', '--output=json', '-f', 'qcow2',
            self.disk(server))))
        self.wait(lambda: not self.state_files(),
                  'the undo log to go')
        self.assert_host_is_clean()

    def take(self, server: ty.Any) -> None:
        """Take a snapshot that works."""
        before = self.wait_writes(server)
        image = self.snapshot(server)
        self.assert_good(image, before, self.wait_writes(server))
        self.assert_whole(server)


class GlanceTest(FailureTestCase):
    """Glance gets the half of an image, and then something happens."""

    def test_uploads_that_are_refused_or_cut_off(self) -> None:
        proxy = self.useFixture(glance_proxy.Proxy('127.0.0.1', 9292))
        self.configure(STREAMED, f'glance.api_servers={proxy.url}')
        server = self.server()
        for status in (401, 403, 413, 500):
            proxy.plan = [status]
            details = self.refused_snapshot(server)
            self.assertIn(f'{status}', details)
            self.assertIn('Glance refused image', details)
            self.assertEqual([], proxy.plan, status)
            self.assert_whole(server)
        # What may pass is tried again, with the same frozen disk.
        for broken in (503, glance_proxy.CUT):
            proxy.plan = [broken]
            self.take(server)
            self.assertEqual([], proxy.plan, broken)
        proxy.plan = [503] * 20
        self.assertIn('503', self.refused_snapshot(server))
        self.assert_whole(server)
        proxy.plan = [glance_proxy.CUT] * 20
        self.assertIn(
            'The connection to Glance', self.refused_snapshot(server))
        self.assert_whole(server)
        proxy.plan = []
        self.take(server)


class StoppedTest(FailureTestCase):

    def test_nova_compute_is_stopped_during_a_snapshot(self) -> None:
        self.configure(*SLOW)
        server = self.server()
        image_id = self.request_snapshot(server)
        self.wait(lambda: self.cloud.image.get_image(
            image_id).status == 'saving', 'the first bytes')
        # SIGTERM: it goes on for a while, but not until the end of this.
        base.run(base.TOOL, 'restart-compute')
        self.wait_idle(server)
        self.wait(lambda: self.cloud.image.find_image(
            image_id, ignore_missing=True) is None, 'the image to go')
        self.assert_whole(server)
        self.why_failed(server)
        self.take(server)
