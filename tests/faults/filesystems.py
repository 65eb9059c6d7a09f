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

"""Small file systems that can be full, or read-only."""

import collections.abc
import contextlib
import ctypes
import os
import pathlib
import signal
import subprocess
import time

from tests.functional import images
from tests.functional import libvirtd

# Seconds for whoever has files open there to let them go
_RELEASE_TIMEOUT_S = 20.0
# linux/sched.h
_CLONE_NEWNS = 0x00020000
_FILLER = 'filler'
#: gives process ids
Others = collections.abc.Callable[[], collections.abc.Iterable[int]]
#: what is no file of a snapshot
OWN = (_FILLER, 'lost+found')


def keep_mounts_private() -> None:
    """Let nobody have a copy of what is mounted from now on.

    A file system that was damaged stays so for as long as it is mounted
    anywhere, and whoever makes a mount namespace gets all that is mounted.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), 'no mount namespace can be made')
    images.run('mount', '--make-rprivate', '/')


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class SmallFileSystem:
    """An ext4 on a loop device, mounted for us and for the guests."""

    def __init__(self, private: libvirtd.Libvirtd, name: str,
                 size: int) -> None:
        """:param size: in bytes"""
        self.path = private.path / name
        self.path.mkdir()
        self._private = private
        file = private.path / f'{name}.ext4'
        with open(file, 'wb') as target:
            target.truncate(size)
        self._device = images.run(
            'losetup', '--find', '--show', file).strip()
        # Nothing is kept for root, and what is aborted needs no replay.
        images.run('mkfs.ext4', '-q', '-m', '0', '-O', '^has_journal',
                   self._device)
        self._mount()
        self.read_only = False
        self._why_mounted = ''
        self.path.chmod(0o755)

    def _mount(self) -> None:
        command = ('mount', '-o', 'errors=remount-ro', self._device,
                   self.path)
        images.run(*command)
        images.run(*self._private.inside(*command))

    def _unmount(self, command: list[str]) -> bool:
        done = subprocess.run(command, capture_output=True, text=True)
        self._why_mounted = done.stderr
        return not done.returncode

    @contextlib.contextmanager
    def _unmounted(self, others: Others) -> collections.abc.Iterator[None]:
        """Have it mounted nowhere.

        :param others: what must not look meanwhile: it would take everything
            in there for gone
        :raises AssertionError: if something holds files open in it
        """
        deadline = time.monotonic() + _RELEASE_TIMEOUT_S
        rest = [self._private.inside('umount', self.path),
                ['umount', str(self.path)]]
        while True:
            stopped = list(others())
            try:
                for pid in stopped:
                    _signal(pid, signal.SIGSTOP)
                while rest and self._unmount(rest[0]):
                    del rest[0]
                if not rest:
                    yield
                    return
            finally:
                for pid in stopped:
                    _signal(pid, signal.SIGCONT)
            if time.monotonic() > deadline:
                raise AssertionError(f'files in {self.path} are held open: '
                                     f'{self._why_mounted}')
            time.sleep(0.2)

    def fill(self) -> None:
        """Leave no byte."""
        filler = os.open(self.path / _FILLER, os.O_WRONLY | os.O_CREAT)
        size = 0
        try:
            for step in (1024 ** 2, 4096):
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(filler, size, step)
                        size += step
        finally:
            os.close(filler)

    def make_read_only(self) -> None:
        """As the kernel does when it finds the file system damaged."""
        name = pathlib.Path(self._device).name
        self.read_only = True
        pathlib.Path(f'/sys/fs/ext4/{name}/trigger_fs_error').write_text('1')

    def mend(self, others: Others = lambda: ()) -> None:
        """Have room again, or be writable again with all that was there.

        :param others: gives the processes that may look at what is there
        :raises AssertionError: if something still holds files open there
        """
        if self.read_only:
            with self._unmounted(others):
                subprocess.run(['e2fsck', '-fy', self._device],
                               capture_output=True)
                self._mount()
            self.read_only = False
        (self.path / _FILLER).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """What is in there."""
        return sorted(name for name in os.listdir(self.path)
                      if name not in OWN)

    def close(self) -> None:
        subprocess.run(['umount', '-l', str(self.path)],
                       capture_output=True)
        subprocess.run(['losetup', '--detach', self._device],
                       capture_output=True)
