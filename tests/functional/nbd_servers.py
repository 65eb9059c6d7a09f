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

"""NBD exports that tests read: of files, and of disks made out of nothing."""

import contextlib
import pathlib
import socket
import subprocess
import threading
import time
import typing as ty

import fixtures

#: a disk whose extents of 64 KiB hold data and nothing in turn
ALTERNATING = r"""
#define NBDKIT_API_VERSION 2
#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
#include <stdint.h>
#include <string.h>
#include <nbdkit-plugin.h>
#define EXTENT 65536
static int64_t size;
static int alternating_config (const char *key, const char *value)
{
  return (size = nbdkit_parse_size (value)) < 0 ? -1 : 0;
}
static void *alternating_open (int readonly)
{
  return NBDKIT_HANDLE_NOT_NEEDED;
}
static int64_t alternating_get_size (void *handle)
{
  return size;
}
static int alternating_can_extents (void *handle)
{
  return 1;
}
static int alternating_pread (void *handle, void *buffer, uint32_t count,
                              uint64_t offset, uint32_t flags)
{
  memset (buffer, 'x', count);
  return 0;
}
static int alternating_extents (void *handle, uint32_t count,
                                uint64_t offset, uint32_t flags,
                                struct nbdkit_extents *extents)
{
  uint64_t at = offset / EXTENT * EXTENT;
  for (; at < offset + count; at += EXTENT)
    if (nbdkit_add_extent (extents, at, EXTENT, at / EXTENT & 1
                           ? NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO : 0))
      return -1;
  return 0;
}
static struct nbdkit_plugin plugin = {
  .name = "alternating",
  .config = alternating_config,
  .open = alternating_open,
  .get_size = alternating_get_size,
  .can_extents = alternating_can_extents,
  .pread = alternating_pread,
  .extents = alternating_extents,
};
NBDKIT_REGISTER_PLUGIN (plugin)
"""


class Export(fixtures.Fixture):
    """A server that runs until the test ends.

    :ivar socket: its path
    :ivar name: of the export
    :ivar url: what QEMU's programs call it
    """

    def __init__(self, name: str = 'vda') -> None:
        super().__init__()
        self.name = name

    def _setUp(self) -> None:
        directory = self.useFixture(fixtures.TempDir(
            rootdir='/var/tmp')).path
        self.directory = pathlib.Path(directory)
        self.socket = str(self.directory / 's')
        self.url = f'nbd+unix:///{self.name}?socket={self.socket}'
        self.process = subprocess.Popen(self._command())
        self.addCleanup(self.process.wait)
        self.addCleanup(self.process.kill)
        for _ in range(600):
            if pathlib.Path(self.socket).exists():
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f'{self._command()} does not serve')

    def _command(self) -> list[str]:
        raise NotImplementedError


class QemuNbd(Export):
    """A file, as flows serve it."""

    def __init__(self, path: str | pathlib.Path, form: str = 'raw') -> None:
        super().__init__()
        self._path = path
        self._form = form

    def _command(self) -> list[str]:
        return ['qemu-nbd', '--read-only', '--persistent', '--shared=0',
                f'--socket={self.socket}', f'--export-name={self.name}',
                f'--format={self._form}', str(self._path)]


class Nbdkit(Export):
    """What one of its plugins makes."""

    def __init__(self, *arguments: ty.Any) -> None:
        super().__init__()
        self._arguments = arguments

    def _command(self) -> list[str]:
        return ['nbdkit', '--foreground', '--readonly', '--exit-with-parent',
                '--unix', self.socket, *map(str, self._arguments)]


class Liar(fixtures.Fixture):
    """A server of a few words, the same to each client.

    :ivar socket: its path
    """

    name = 'vda'

    def __init__(self, words: bytes, every_s: float = 0,
                 hang: bool = False) -> None:
        """:param every_s: how long it takes for each byte

        :param hang: leave the connection open when all is said
        """
        super().__init__()
        self._words = words
        self._every_s = every_s
        self._hang = hang

    def _setUp(self) -> None:
        self.socket = str(pathlib.Path(self.useFixture(fixtures.TempDir(
            rootdir='/var/tmp')).path) / 's')
        self._ended = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.socket)
        self._listener.listen()
        thread = threading.Thread(target=self._serve, daemon=True)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(self._end)

    def _end(self) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, contextlib.suppress(OSError):
                    for byte in self._words:
                        client.sendall(bytes([byte]))
                        self._ended.wait(self._every_s)
                    if self._hang:
                        self._ended.wait()


class Alternating(Nbdkit):
    """A disk of any size, every second 64 KiB of which hold data."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self._size = size

    def _setUp(self) -> None:
        path = pathlib.Path(self.useFixture(fixtures.TempDir(
            rootdir='/var/tmp')).path, 'alternating.c')
        path.write_text(ALTERNATING)
        self._arguments = ('cc', path, 'CFLAGS=-O2 -fPIC -shared',
                           f'size={self._size}')
        super()._setUp()
