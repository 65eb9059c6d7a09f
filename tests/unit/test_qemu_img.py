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
import threading

import fixtures

from nova_snapshot_ext import cancellation
from nova_snapshot_ext import exception
from nova_snapshot_ext import qemu_img
from tests.unit import base


class TestRun(base.TestCase):

    def program(self, script: str) -> None:
        """Have a script for qemu-img."""
        path = self.new_file('qemu-img', f'#!/bin/sh\n{script}\n'.encode())
        os.chmod(path, 0o755)
        self.useFixture(fixtures.EnvironmentVariable(
            'PATH', f'{self.directory}:{os.environ["PATH"]}'))

    def test_what_it_prints_is_returned(self) -> None:
        self.program('echo "$@"')
        self.assertEqual('info -f raw\n', qemu_img.run('info', '-f', 'raw'))

    def test_its_words_are_the_error(self) -> None:
        self.program('echo it is full >&2; exit 1')
        self.assertRaisesRegex(
            exception.CommandFailed, 'qemu-img convert failed: it is full',
            qemu_img.run, 'convert', limits=qemu_img.CONVERT_LIMITS)

    def test_it_is_not_waited_for_without_end(self) -> None:
        limits = []
        self.patch_name(
            'nova_snapshot_ext.processes.run',
            lambda *command, timeout, **more: limits.append(timeout))
        qemu_img.run('info')
        qemu_img.run('convert', timeout=7)
        self.assertEqual([qemu_img.TIMEOUT_S, 7], limits)

    def test_it_ends_with_the_snapshot(self) -> None:
        self.program(f'echo $$ > {self.directory}/pid; exec sleep 50')
        cancelled = cancellation.Cancellation()

        def cancel() -> None:
            # It is there, and may not be the program yet.
            cancelled.cancel(exception.ImageGone('deleted'))
        timer = threading.Timer(1.0, cancel)
        timer.start()
        self.addCleanup(timer.join)
        self.assertRaisesRegex(
            exception.CommandFailed, 'qemu-img convert failed', qemu_img.run,
            'convert', limits=qemu_img.CONVERT_LIMITS,
            cancellation=cancelled)
        with open(f'{self.directory}/pid') as file:
            self.assertFalse(os.path.exists(f'/proc/{file.read().strip()}'))

    def test_it_is_not_begun_after_the_end(self) -> None:
        self.program(f'exec touch {self.directory}/begun')
        cancelled = cancellation.Cancellation()
        cancelled.cancel(exception.ImageGone('deleted'))
        self.assertRaises(exception.ImageGone, qemu_img.run, 'convert',
                          cancellation=cancelled)
