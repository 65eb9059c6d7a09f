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

"""The commands of the documentation for servers and images, as written."""

import collections.abc
import os
import subprocess
import typing

from tests.cloud import base
from tests import documents

#: what in a command stands for something else
PLACES = ('SERVER_ID', 'IMAGE_ID', 'REQUEST_ID', 'SERVER', 'IMAGE')


def documented() -> collections.abc.Iterator[str]:
    """Commands of OpenStack's client that are whole: with what they are for.

    Others are the names of commands.
    """
    for _, command in documents.commands():
        if command.startswith('openstack ') and any(
                word in PLACES or word.split('=')[-1] in PLACES
                or word.startswith('-') for word in command.split()):
            yield command


class GuideTest(base.CloudTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.left = set(documented())
        self.environment = {
            **{name: value for name, value in os.environ.items()
               if not name.startswith('OS_')},
            'OS_CLIENT_CONFIG_FILE': str(base.ROOT / 'clouds.yaml'),
            'OS_CLOUD': 'small',
            'PATH': f'{base.ROOT}/venv/bin:{os.environ["PATH"]}'}

    def test_each_command_does_what_is_said(self) -> None:
        self.assertGreater(len(self.left), 10)
        flavor = self.compute.create_flavor(
            name='guide', ram=256, vcpus=1, disk=1, ephemeral=1, swap=64)
        self.addCleanup(self.compute.delete_flavor, flavor)
        self.addCleanup(self._delete_images)
        server = self.server(flavor='guide')
        places = {'SERVER': server.name, 'SERVER_ID': server.id}

        self.run_it('openstack server image create --name nightly '
                    '--property snapshot_flow=cold SERVER', places)
        self.assertIn('progress', self.run_it(
            'openstack server show -c progress SERVER', places))
        image = self._active('nightly', server)
        self.assertEqual('cold', image.properties['snapshot_ext_flow'])
        listed = self.run_it('openstack server event list SERVER', places)
        self.assertIn('createImage', listed)
        [action] = [each for each in self.compute.server_actions(server)
                    if each.action == 'createImage']
        self.assertIn(action.request_id, listed)
        shown = self.run_it(
            'openstack --os-compute-api-version 2.84 server event show '
            'SERVER REQUEST_ID', {**places, 'REQUEST_ID': action.request_id})
        self.assertIn('snapshot_ext_snapshot', shown)
        self._delete_images()

        self.run_it('openstack server image create --name before-upgrade '
                    '--wait --property snapshot_flow=domain SERVER', places)
        image = self._active('before-upgrade', server)
        self.run_it('openstack server rebuild --image before-upgrade '
                    '--wait SERVER', places)
        self.wait_status(server, 'ACTIVE')
        self.wait_writes(server)
        self.assertIn('snapshot_ext_rollback', [
            each['event'] for each in self.events(server)])
        self.assertIn('guest', self.run_it(
            'openstack server show -c image SERVER', places))
        self.assertIn(image.id, self.run_it(
            'openstack image list --property '
            'snapshot_ext_instance=SERVER_ID', places))
        self._delete_images()

        self.run_it('openstack server image create --name nightly '
                    '--property snapshot_disks=all SERVER', places)
        self.run_it('openstack image list --hidden', places)
        image = self._active('nightly', server)
        found = self.run_it('openstack image list --property '
                            'snapshot_ext_group=IMAGE_ID',
                            {**places, 'IMAGE_ID': image.id})
        for name in ('nightly', 'nightly-vdb', 'nightly-vdc'):
            self.assertIn(f' {name} ', found)
        self.run_it('openstack image set --protected IMAGE',
                    {**places, 'IMAGE': image.id})
        self.assertTrue(self.cloud.image.get_image(image.id).is_protected)
        self.cloud.image.update_image(image.id, is_protected=False)

        self.run_it('openstack server set --state active SERVER', places)
        self.assertEqual(set(), self.left)

    def run_it(self, command: str, places: dict[str, str]) -> str:
        """Run a command of the documentation.

        :returns: what it printed
        """
        self.assertIn(command, set(documented()))
        self.left.discard(command)
        words = command.split()
        for name in PLACES:
            words = [place(word, name, places) for word in words]
        # One asks whether it is meant.
        done = subprocess.run(words, env=self.environment, input='y\n',
                              capture_output=True, text=True)
        self.assertEqual(0, done.returncode,
                         f'{command}: {done.stdout}{done.stderr}')
        return done.stdout

    def _active(self, name: str, server: typing.Any) -> typing.Any:
        image = self.cloud.image.find_image(name, ignore_missing=False)
        return self.wait_image(server, image.id)

    def _delete_images(self) -> None:
        """Those that are not the cloud's own."""
        for hidden in (False, True):
            for image in self.cloud.image.images(is_hidden=hidden):
                if image.name.startswith(('nightly', 'before-upgrade')):
                    self.cloud.image.update_image(
                        image, is_protected=False)
                    self.cloud.image.delete_image(image)


def place(word: str, name: str, places: dict[str, str]) -> str:
    """A word with what a name in it stands for."""
    before, equals, last = word.rpartition('=')
    return f'{before}{equals}{places[name]}' if last == name else word
