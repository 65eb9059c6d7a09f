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

import os
import subprocess
import sys
import threading

import nova_snapshot_ext
from nova_snapshot_ext import mover_stream
from nova_snapshot_ext import processes
from tests.unit import base

#: waits for programs that take too long, as nova-compute may
EVENTLET = """\
import eventlet
eventlet.monkey_patch()
import subprocess, sys
from nova_snapshot_ext import exception, mover_stream, processes
process = subprocess.Popen(['sleep', '60'])
print(processes.ends_within(process, 0.1))
process.kill()
print(processes.ends_within(process, 60))
mover_stream._TRY_TIMEOUT_S = 0.5
print(mover_stream.why_not(sys.argv[1]))
try:
    processes.run('sleep', '60', timeout=1)
except exception.CommandFailed as error:
    print(error)
"""


class TestEnd(base.TestCase):

    def start(self, program: str) -> 'subprocess.Popen[bytes]':
        path = os.path.join(self.directory, program)
        os.symlink('/bin/sleep', path)
        process = subprocess.Popen([path, '60', '0.000123'])
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def test_other_programs_with_the_argument_go_on(self) -> None:
        # QEMU has the name of the snapshot that it was started from.
        other, meant = self.start('qemu'), self.start('qemu-img')
        threading.Thread(target=meant.wait).start()     # reap it
        processes.end('0.000123', 'a test', program='qemu-img')
        self.assertEqual([other.pid], processes.having('0.000123'))
        threading.Thread(target=other.wait).start()
        processes.end('0.000123', 'a test')
        self.assertEqual([], processes.having('0.000123'))


class TestTooLong(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.slow = self.new_file('python', b'#!/bin/sh\nexec sleep 60\n')
        os.chmod(self.slow, 0o755)

    def test_process_that_goes_on(self) -> None:
        process = subprocess.Popen(['sleep', '60'])
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.assertFalse(processes.ends_within(process, 0.1))
        process.kill()
        self.assertTrue(processes.ends_within(process, 60))

    def test_interpreter_that_hangs(self) -> None:
        self.patch_name('nova_snapshot_ext.mover_stream._TRY_TIMEOUT_S', 0.5)
        self.assertIn('timed out', mover_stream.why_not(self.slow) or '')

    def test_eventlet_has_a_class_of_its_own(self) -> None:
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', EVENTLET, self.slow],
            cwd=os.path.dirname(os.path.dirname(nova_snapshot_ext.__file__)),
            stdout=subprocess.PIPE, text=True, check=True, timeout=50)
        goes_on, ended, why, error = done.stdout.splitlines()
        self.assertEqual(('False', 'True'), (goes_on, ended))
        self.assertIn('can not be run', why)
        self.assertEqual('sleep 60 took longer than 1 seconds', error)
