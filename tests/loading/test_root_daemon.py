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

"""Root's part, by a real daemon, as Nova starts it."""

import json
import os
import sys

import fixtures
import testtools

from tests.loading import installations

NOBODY, GROUP = 65534, 4242


class RootDaemonTest(testtools.TestCase):

    def test_it_changes_what_is_ours_and_nothing_else(self) -> None:
        if os.geteuid():
            self.skipTest('needs root')
        directory = self.useFixture(fixtures.TempDir()).path
        instances = os.path.join(directory, 'instances')
        os.mkdir(instances, mode=0o755)
        os.chmod(directory, 0o755)
        configuration = os.path.join(directory, 'nova.conf')
        with open(configuration, 'w') as file:
            file.write(f'[DEFAULT]\nstate_path = {directory}\n')
        done = installations.run([
            sys.executable, installations.SCRIPTS / 'root_daemon.py',
            configuration, instances], cwd=installations.ROOT)
        found = json.loads(done.stdout.splitlines()[-1])
        self.assertEqual([NOBODY, 0], found['socket'])
        self.assertEqual([NOBODY, GROUP], found['directory'])
        self.assertEqual([NOBODY, GROUP], found['disk'])
        for name, why in (('link', 'it is not a socket'),
                          ('other', 'no snapshot works there'),
                          ('theirs', 'not in the directory of a server')):
            self.assertIn(why, found[name])
        theirs = os.stat(os.path.join(instances, 'theirs'))
        self.assertEqual((0, 0), (theirs.st_uid, theirs.st_gid))
