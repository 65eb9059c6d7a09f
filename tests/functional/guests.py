#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""Guests that write all the time and tell what they wrote."""

import collections.abc
import dataclasses
import os
import pathlib
import re
import shutil
import socket
import threading
import time
import typing as ty
import uuid as uuidlib
from xml.sax import saxutils

import fixtures
import libvirt
from testtools import content
from testtools import content_type

from tests.functional import images
from tests.functional import libvirtd

MIB = 1024 * 1024
BUILD = pathlib.Path(__file__).parents[2] / 'tools' / 'guest' / 'build'

# What lies in the raw backing file of an overlay: it has to be in an image
# of it too. The places of the counter are elsewhere.
BACKING_OFFSET = 64 * 1024
BACKING_DATA = bytes(range(256)) * 1024

# Seconds for a boot on a busy machine without KVM; alone it takes three.
BOOT_TIMEOUT = int(os.environ.get('NOVA_SNAPSHOT_EXT_BOOT_TIMEOUT', '120'))

Kind = ty.Literal['overlay', 'qcow2', 'raw', 'block']


@dataclasses.dataclass(frozen=True)
class Disk:
    """What a disk of a guest shall be.

    :ivar kind: "overlay" (qcow2 on a raw backing file, Nova's default),
        "qcow2", "raw", or "block" (a loop device).
    :ivar size: in bytes.
    :ivar cache: QEMU's cache mode.
    :ivar bus: "virtio" or "scsi".
    :ivar discard: whether the guest's discards reach the image.
    :ivar error_policy: what QEMU does of an error, libvirt's default if None.
    """

    kind: Kind = 'overlay'
    size: int = 64 * MIB
    cache: str = 'none'
    bus: str = 'virtio'
    serial: str | None = None
    discard: bool = True
    error_policy: str | None = None


@dataclasses.dataclass(frozen=True)
class MadeDisk:
    """A disk that a guest has.

    :ivar target: as libvirt names it: vda.
    :ivar path: of the image or the block device.
    :ivar format: "qcow2" or "raw".
    :ivar backing: the raw backing file, of an overlay.
    """

    disk: Disk
    target: str
    path: pathlib.Path
    format: str
    backing: pathlib.Path | None = None

    @property
    def image(self) -> images.Image:
        """What the functions of images.py take."""
        return self.path, self.format

    def xml(self) -> str:
        """The element of the domain XML."""
        block = self.disk.kind == 'block'
        source = 'dev' if block else 'file'
        discard = ' discard="unmap"' if self.disk.discard else ''
        policy = ('' if self.disk.error_policy is None else
                  f' error_policy="{self.disk.error_policy}"')
        serial = ('' if self.disk.serial is None else
                  f'<serial>{saxutils.escape(self.disk.serial)}</serial>')
        return (
            f'<disk type="{"block" if block else "file"}" device="disk">'
            f'<driver name="qemu" type="{self.format}"'
            f' cache="{self.disk.cache}"{discard}{policy}/>'
            f'<source {source}={saxutils.quoteattr(str(self.path))}/>'
            f'<target dev="{self.target}" bus="{self.disk.bus}"/>'
            f'{serial}</disk>')


class Console:
    """Reads a guest's serial console as it prints.

    QEMU connects to our socket, so that a line is noticed when it comes and
    not when a file is looked at. How long the guest was silent is right to
    some milliseconds, as long as this process's Python is not busy itself.

    :param path: of the socket.
    :param log: file to append the console's output to.
    """

    _counter = re.compile(rb'counter (\d+)\r*$')

    def __init__(self, path: pathlib.Path, log: pathlib.Path) -> None:
        self.log = log
        self.changed = threading.Condition()
        self.counter = 0
        #: what the present QEMU's guest printed first, None if nothing yet
        self.first: int | None = None
        self._last_s = time.monotonic()
        self._silence_s = 0.0
        self._closed = False
        self._peer: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        # QEMU is another user.
        path.chmod(0o777)
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, daemon=True,
                                        name=f'console-{path}')
        self._thread.start()

    def _run(self) -> None:
        with open(self.log, 'ab', buffering=0) as log:
            while not self._closed:
                try:
                    # Again for every QEMU: a managed save ends one.
                    self._peer, _address = self._listener.accept()
                except OSError:
                    return
                with self.changed:
                    self.first = None
                with self._peer:
                    self._read(self._peer, log)

    def _read(self, peer: socket.socket, log: ty.IO[bytes]) -> None:
        rest = b''
        while True:
            try:
                data = peer.recv(65536)
            except OSError:
                return
            if not data:
                return
            now = time.monotonic()
            log.write(data)
            *lines, rest = (rest + data).split(b'\n')
            for line in lines:
                found = self._counter.search(line)
                if found is None:
                    continue
                with self.changed:
                    self._silence_s = max(self._silence_s,
                                          now - self._last_s)
                    self._last_s = now
                    self.counter = int(found[1])
                    if self.first is None:
                        self.first = self.counter
                    self.changed.notify_all()

    def mark(self) -> None:
        """Forget how long the console was silent until now."""
        with self.changed:
            self._last_s = time.monotonic()
            self._silence_s = 0.0

    def silence_s(self) -> float:
        """The longest time without a counter since mark(), in seconds.

        A silence that still lasts counts.
        """
        with self.changed:
            return max(self._silence_s, time.monotonic() - self._last_s)

    def close(self) -> None:
        """Stop reading."""
        self._closed = True
        for sock in (self._listener, self._peer):
            if sock is not None:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                sock.close()
        self._thread.join(10)


def boot_files(private: libvirtd.Libvirtd) -> pathlib.Path:
    """Build the guest if need be, and copy it to where QEMU sees it.

    A copy, because libvirt changes the owner of what a guest uses.

    :param private: whose directory the copy goes to.
    :returns: the directory of vmlinuz and initrd.img.
    """
    copy = private.path / 'guest'
    if copy.exists():
        return copy
    built = pathlib.Path(os.environ.get('NOVA_SNAPSHOT_EXT_GUEST_DIR',
                                        '/var/tmp/nova-snapshot-ext-guest'))
    images.run(BUILD, built)
    copy.mkdir()
    for name in ('vmlinuz', 'initrd.img'):
        shutil.copy(built / name, copy / name)
    return copy


class Guest(fixtures.Fixture):
    """A guest that counts on its disks, run by the private libvirtd.

    :ivar name: of the domain.
    :ivar uuid: of the domain.
    :ivar domain: a libvirt.virDomain.
    :ivar disks: list of MadeDisk, vda first.
    :ivar directory: of its files; QEMU may read it, not write to it.

    :param host: the LibvirtFixture to run on.
    :param disks: what disks it has. It writes to all, in this order.
    :param agent: whether it has a channel for the guest agent.
    :param mode: "raw" (counts on the disks themselves) or "fs" (in an ext4
        on each).
    :param churn: whether it also writes elsewhere and discards; raw only.
    :param pace_ms: milliseconds that it waits between rounds.
    :param memory_mib: MiB.
    :param start: whether to start it and wait for its first counter.
    """

    domain: libvirt.virDomain
    directory: pathlib.Path

    def __init__(
        self, host: libvirtd.LibvirtFixture,
        disks: collections.abc.Sequence[Disk] = (Disk(),), *,
        agent: bool = False, mode: ty.Literal['raw', 'fs'] = 'raw',
        churn: bool = False, pace_ms: int = 5, memory_mib: int = 128,
        start: bool = True,
    ) -> None:
        super().__init__()
        self._host = host
        self._wanted = disks
        self._agent = agent
        self._mode = mode
        self._churn = churn
        self._pace_ms = pace_ms
        self._memory_mib = memory_mib
        self._start = start
        self.uuid = str(uuidlib.uuid4())
        self.name = f'instance-{self.uuid[:8]}'
        self.disks: list[MadeDisk] = []

    def _setUp(self) -> None:
        private = self._host.libvirtd
        self.directory = private.path / 'instances' / self.uuid
        self.directory.mkdir(parents=True)
        # Everything of a test is to be seen by QEMU, whatever the umask.
        self.directory.parent.chmod(0o755)
        self.directory.chmod(0o755)
        self.addCleanup(shutil.rmtree, self.directory, ignore_errors=True)
        self.addCleanup(libvirtd.detach_loops, self.directory)
        for index, disk in enumerate(self._wanted):
            self.disks.append(self._make(disk, index))
        self.console = Console(self.directory / 'console.sock',
                               self.directory / 'console.log')
        self.addCleanup(self.console.close)
        self._add_logs()
        self.domain = self._host.connection.defineXML(self.xml())
        self.addCleanup(self.destroy)
        if self._start:
            self.start()

    def _add_logs(self) -> None:
        qemu = self._host.libvirtd.path / 'log' / 'qemu'
        logs = {'console': self.console.log,
                'qemu': qemu / f'{self.name}.log'}
        for name, path in logs.items():
            # Read now or never: the directory is gone when a test's details
            # are written, but not when they are gathered.
            def read(path: pathlib.Path = path) -> ty.Iterator[bytes]:
                if path.exists():
                    yield path.read_bytes()[-20000:]

            self.addDetail(f'{self.name} {name}',
                           content.Content(content_type.UTF8_TEXT, read))

    def _make(self, disk: Disk, index: int) -> MadeDisk:
        letter = 'abcdefgh'[index]
        target = ('vd' if disk.bus == 'virtio' else 'sd') + letter
        path = self.directory / f'disk.{letter}'
        if disk.kind == 'overlay':
            backing = self.directory / f'base.{letter}'
            with open(backing, 'wb') as base:
                base.truncate(disk.size)
                base.seek(BACKING_OFFSET)
                base.write(BACKING_DATA)
            images.run('qemu-img', 'create', '-q', '-f', 'qcow2',
                       '-F', 'raw', '-b', backing, path)
            return MadeDisk(disk, target, path, 'qcow2', backing)
        if disk.kind == 'qcow2':
            images.run('qemu-img', 'create', '-q', '-f', 'qcow2', path,
                       str(disk.size))
            return MadeDisk(disk, target, path, 'qcow2')
        with open(path, 'wb') as raw:
            raw.truncate(disk.size)
        if disk.kind == 'block':
            device = images.run('losetup', '--find', '--show', path).strip()
            path = pathlib.Path(device)
        return MadeDisk(disk, target, path, 'raw')

    def xml(self) -> str:
        """The domain XML."""
        boot = boot_files(self._host.libvirtd)
        disks = ''.join(disk.xml() for disk in self.disks)
        names = ','.join(disk.target for disk in self.disks)
        arguments = (f'console=ttyS0 quiet mode={self._mode} disks={names} '
                     f'churn={int(self._churn)} pace_ms={self._pace_ms}')
        channel = '' if not self._agent else (
            '<channel type="unix">'
            '<target type="virtio" name="org.qemu.guest_agent.0"/>'
            '</channel>')
        if any(disk.disk.bus == 'scsi' for disk in self.disks):
            disks += '<controller type="scsi" model="virtio-scsi"/>'
        return f"""
            <domain type="qemu">
              <name>{self.name}</name>
              <uuid>{self.uuid}</uuid>
              <memory unit="MiB">{self._memory_mib}</memory>
              <vcpu>1</vcpu>
              <os>
                <type arch="x86_64" machine="pc">hvm</type>
                <kernel>{boot}/vmlinuz</kernel>
                <initrd>{boot}/initrd.img</initrd>
                <cmdline>{arguments}</cmdline>
              </os>
              <features><acpi/></features>
              <devices>
                {disks}
                {channel}
                <controller type="usb" model="none"/>
                <memballoon model="none"/>
                <serial type="unix">
                  <source mode="connect"
                    path="{self.directory}/console.sock"/>
                </serial>
              </devices>
            </domain>"""

    @property
    def images(self) -> list[images.Image]:
        """Path and format of each disk."""
        return [disk.image for disk in self.disks]

    def start(self) -> None:
        """Start the guest and wait until it writes."""
        self.domain.create()
        self.wait_counter(self.counter() + 1, BOOT_TIMEOUT)
        self.mark()

    def counter(self) -> int:
        """The counter that the guest printed last."""
        return self.console.counter

    def wait_counter(self, counter: int, timeout_s: float = 60) -> int:
        """Wait until the guest has printed a counter.

        :param counter: this one, or a later one.
        :param timeout_s: in seconds.
        :returns: the one that was printed last.
        """
        with self.console.changed:
            came = self.console.changed.wait_for(
                lambda: self.console.counter >= counter, timeout_s)
        if not came:
            raise AssertionError(
                f'{self.name} did not count to {counter} within {timeout_s} '
                f's; it is at {self.counter()}, its state is '
                f'{self.domain.state()}')
        return self.counter()

    def wait_writes_on(self, rounds: int = 3, timeout_s: float = 60) -> int:
        """Wait until the guest has done some more rounds from now on.

        :param rounds: how many.
        :param timeout_s: in seconds.
        :returns: the counter that was printed last.
        """
        return self.wait_counter(self.counter() + rounds, timeout_s)

    def first_counter(self, timeout_s: float = 60) -> int:
        """What it printed first in its present QEMU.

        :param timeout_s: in seconds, to wait for it.
        """
        with self.console.changed:
            if not self.console.changed.wait_for(
                    lambda: self.console.first is not None, timeout_s):
                raise AssertionError(f'{self.name} did not count')
            assert self.console.first is not None
            return self.console.first

    def mark(self) -> None:
        """Measure longest_silence() from now on."""
        self.console.mark()

    def longest_silence(self) -> float:
        """The longest time without a counter since mark(), in seconds."""
        return self.console.silence_s()

    def wait_agent(self, timeout_s: float = 60) -> None:
        """Wait until libvirt knows that the guest agent listens.

        :param timeout_s: in seconds.
        """
        deadline = time.monotonic() + timeout_s
        while 'state=\'connected\'' not in self.domain.XMLDesc():
            if time.monotonic() > deadline:
                raise AssertionError(f'no agent in {self.name}')
            time.sleep(0.05)

    def destroy(self) -> None:
        """Destroy and undefine the domain. Its files stay for now."""
        self._host.libvirtd.remove_domains(self.uuid)
