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
import struct
import subprocess
import threading
import time
import typing as ty

import fixtures


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


class Alternating(QemuNbd):
    """A disk of any size, every second 64 KiB of which hold data.

    A qcow2 file of a few clusters: all of its L1 table's entries are the same
    L2 table, every second entry of which is the same cluster. QEMU's own
    server makes extents of them, as of any guest's disk.
    """

    def __init__(self, size: int) -> None:
        """:param size: in bytes"""
        super().__init__('', 'qcow2')
        self._size = size

    def _setUp(self) -> None:
        path = pathlib.Path(self.useFixture(fixtures.TempDir(
            rootdir='/var/tmp')).path, 'alternating.qcow2')
        path.write_bytes(self._file())
        self._path = path
        super()._setUp()

    def _file(self) -> bytes:
        """QEMU's docs/interop/qcow2.txt; nothing counts references."""
        cluster = 64 * 1024
        copied = 1 << 63
        l1_entries = -(-self._size // (cluster // 8 * cluster))
        l1 = 2 * cluster
        l2 = l1 + -(-l1_entries * 8 // cluster) * cluster
        data = l2 + cluster
        header = struct.pack(
            '>4sIQIIQIIQQIIQQQQII', b'QFI\xfb', 3, 0, 0, 16, self._size, 0,
            l1_entries, l1, cluster, 1, 0, 0, 0, 0, 0, 4, 104)
        return b''.join((
            header.ljust(l1, b'\0'),
            (struct.pack('>Q', l2 | copied) * l1_entries).ljust(
                l2 - l1, b'\0'),
            struct.pack('>QQ', data | copied, 0) * (cluster // 16),
            b'x' * cluster))
