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

"""The guests that faults come to, and what must hold of them."""

import collections.abc
import dataclasses
import json
import pathlib
import subprocess
import time
import typing

import libvirt
import libvirt_qemu

from tests.functional import guests
from tests.functional import images
from tests.functional import libvirtd

STATES = {libvirt.VIR_DOMAIN_RUNNING: 'running',
          libvirt.VIR_DOMAIN_PAUSED: 'paused',
          libvirt.VIR_DOMAIN_SHUTOFF: 'off',
          libvirt.VIR_DOMAIN_CRASHED: 'off'}

_SIZE = 64 * guests.MIB
# What lies in a disk beside the places of the counter: an image of it has
# something to be cut off from, and must hold it.
_PATTERN = 0x5a
_PATTERNS = tuple((_SIZE // 10 * place // images.AREA * images.AREA
                   + guests.MIB, 3 * guests.MIB) for place in range(9))
# Between the guest's rounds: less work for it, where all has to be fast.
_PACE_MS = 50
# Seconds
_STATE_TIMEOUT_S = 60.0
# For an agent that libvirt does not hear of any more
_SILENT_TIMEOUT_S = 45.0
_SILENT = 'agent disappeared'


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a guest has that decides on what a flow does."""

    disk: guests.Kind
    mode: typing.Literal['raw', 'fs'] = 'raw'
    agent: bool = False
    off: bool = False


KINDS = {
    'agent': Kind('overlay', 'fs', agent=True),
    'qcow2': Kind('overlay'),
    'raw': Kind('raw'),
    'off': Kind('overlay', off=True),
}


class Subject:
    """One guest, which is used for many faults."""

    def __init__(self, host: libvirtd.LibvirtFixture, kind: Kind) -> None:
        self._host = host
        self.kind = kind
        self.guest = guests.Guest(
            host, (guests.Disk(kind.disk, _SIZE),), mode=kind.mode,
            agent=kind.agent, pace_ms=_PACE_MS, start=False)
        self.guest.setUp()
        self.disk = self.guest.disks[0]
        if kind.mode == 'raw':
            _write_pattern(self.disk.image)
        self.guest.start()
        if kind.agent:
            self.guest.wait_agent(guests.BOOT_TIMEOUT)
        if kind.off:
            self.guest.domain.destroy()
        #: why libvirt can't ask its agent whether it is frozen, though it
        #: writes; None where it can
        self.unasked: str | None = None
        self._xml = self._inactive_xml()
        self._nodes = 0 if kind.off else len(self._block_nodes())

    def close(self) -> None:
        self.guest.cleanUp()

    def look_up(self) -> None:
        """Look it up by a new connection, if it is there."""
        try:
            self.guest.domain = self._host.connection.lookupByUUIDString(
                self.guest.uuid)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise

    # What it is

    def state(self) -> str:
        """``running``, ``paused``, ``off``, ``gone`` or else."""
        try:
            return STATES.get(self.guest.domain.state()[0], 'in transition')
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return 'gone'
            raise

    def qemu(self) -> int | None:
        """The process id of its QEMU."""
        for pid, words in running():
            if any(word.startswith(f'guest={self.guest.name},')
                   for word in words):
                return pid
        return None

    def _inactive_xml(self) -> str:
        return str(self.guest.domain.XMLDesc(
            libvirt.VIR_DOMAIN_XML_INACTIVE))

    def _block_nodes(self) -> list[str]:
        answer = json.loads(libvirt_qemu.qemuMonitorCommand(
            self.guest.domain, '{"execute": "query-named-block-nodes"}', 0))
        return [node['file'] for node in answer['return']]

    # What must hold

    def wait_state(self, wanted: str,
                   timeout_s: float = _STATE_TIMEOUT_S) -> str:
        """:returns: the state that it has, at the latest after the time"""
        deadline = time.monotonic() + timeout_s
        while ((found := self.state()) != wanted
               and time.monotonic() < deadline):
            time.sleep(0.05)
        return found

    def rest(self) -> None:
        """Take no processor while others are tried."""
        if not self.kind.off:
            self.guest.domain.suspend()

    def wake(self) -> None:
        if not self.kind.off:
            self.guest.domain.resume()
            self.guest.wait_writes_on()

    def harm(self, leaves: str, ours: str,
             patience_s: float = _STATE_TIMEOUT_S,
             ) -> collections.abc.Iterator[str]:
        """What is wrong with it.

        :param leaves: the state that the fault leaves it in
        :param ours: what the paths of snapshots begin with
        :param patience_s: in which it comes to that state
        """
        self.unasked = None
        state = self.wait_state(
            'running' if leaves == 'transient' else leaves, patience_s)
        if leaves == 'transient':
            if state != 'running':
                yield f'it is {state}'
                return
            if self.guest.domain.isPersistent():
                yield 'it is persistent though it was undefined'
        elif state != leaves:
            yield f'it is {state} and not {leaves}'
            return
        elif leaves != 'gone' and not self.guest.domain.isPersistent():
            yield 'it is not persistent'
        elif leaves != 'gone' and self._inactive_xml() != self._xml:
            yield 'its definition was changed'
        if state == 'running':
            yield from self._harm_running(ours)
        elif state == 'off':
            yield from self.harm_to_disk()

    def _harm_running(self, ours: str) -> collections.abc.Iterator[str]:
        domain = self.guest.domain
        if domain.hasManagedSaveImage(0):
            yield 'it runs and has a managed save'
        frozen = self._freeze_status() if self.kind.agent else 'thawed'
        if frozen == 'frozen':
            # Nor does it write.
            yield 'its file systems are frozen'
            return
        try:
            self.guest.wait_writes_on(timeout_s=guests.BOOT_TIMEOUT)
        except AssertionError as error:
            yield f'it does not write: {error}'
        else:
            # It writes to its file system: that is thawed.
            if frozen != 'thawed':
                self.unasked = f'its agent can not be asked: {frozen}'
        if domain.jobStats()['type']:
            yield f'it has a job: {domain.jobStats()}'
        if domain.blockJobInfo(self.disk.target, 0):
            yield 'its disk has a block job'
        nodes = self._block_nodes()
        if len(nodes) != self._nodes or any(
                name.startswith(ours) for name in nodes):
            yield f'its QEMU has other files open than before: {nodes}'
        domain.suspend()
        try:
            yield from self.harm_to_disk()
        finally:
            domain.resume()

    def _freeze_status(self) -> str:
        """What its agent says; one that is starting is asked again."""
        begun = time.monotonic()
        while True:
            try:
                answer = libvirt_qemu.qemuAgentCommand(
                    self.guest.domain,
                    '{"execute": "guest-fsfreeze-status"}', 5, 0)
                return str(json.loads(answer)['return'])
            except libvirt.libvirtError as error:
                if time.monotonic() > begun + (
                        _SILENT_TIMEOUT_S if _SILENT in str(error)
                        else guests.BOOT_TIMEOUT):
                    return str(error)
            time.sleep(0.2)

    def harm_to_disk(self) -> collections.abc.Iterator[str]:
        """A guest that is off or paused has written its tables."""
        if self.disk.format != 'qcow2':
            return
        # What a killed QEMU leaks, a check counts as leaked and not as an
        # error; it is no harm.
        done = subprocess.run(
            ['qemu-img', 'check', '-U', '-f', 'qcow2', '--output=json',
             str(self.disk.path)], capture_output=True, text=True)
        if done.returncode not in (0, 3):
            yield f'its disk is damaged: {done.stdout}{done.stderr}'
        found = json.loads(images.run(
            'qemu-img', 'info', '-U', '--output=json', '-f', 'qcow2',
            self.disk.path))
        if 'snapshots' in found:
            yield f'its disk holds snapshots: {found["snapshots"]}'

    def restore(self) -> None:
        """Have it as it was before the fault.

        :raises AssertionError: if it does not start or write any more
        """
        state = self.state()
        if state == 'gone':
            self._delete_internal_snapshots()
        if state == 'gone' or not self.guest.domain.isPersistent():
            self.guest.domain = self._host.connection.defineXML(self._xml)
        if self.kind.off:
            if self.guest.domain.isActive():
                self.guest.domain.destroy()
            return
        if state in ('off', 'gone'):
            self.guest.start()
        elif state == 'paused':
            self.guest.domain.resume()
        if self.kind.agent:
            self.guest.wait_agent(guests.BOOT_TIMEOUT)
        self.guest.wait_writes_on(timeout_s=guests.BOOT_TIMEOUT)

    def _delete_internal_snapshots(self) -> None:
        """Have the disk as it was, of which nobody is in charge."""
        if self.disk.format != 'qcow2':
            return
        found = json.loads(images.run(
            'qemu-img', 'info', '--output=json', '-f', 'qcow2',
            self.disk.path))
        for snapshot in found.get('snapshots', ()):
            images.run('qemu-img', 'snapshot', '-d', snapshot['name'],
                       self.disk.path)

    def check_image(self, image: images.Image, before: int,
                    after: int) -> None:
        """Assert that an image is one instant of its disk, and sound.

        :param before: what its counter was when the snapshot began
        """
        if image[1] == 'qcow2':
            images.qemu_img_check(image[0], image[1])
        if self.kind.mode == 'raw':
            [counters] = images.check_point_in_time([image])
            reads: list[str] = []
            for offset, length in _PATTERNS:
                reads += ['-c', f'read -P {_PATTERN} {offset} {length}']
            found = images.run('qemu-io', '-r', '-f', image[1], *reads,
                               image[0])
            if 'verification failed' in found:
                raise AssertionError(f'other data: {found}')
        else:
            [counters] = images.check_filesystems_point_in_time([image])
        if not before <= counters[0] <= after + 1:
            raise AssertionError(
                f'not of this time: {before} {counters} {after}')


def _write_pattern(image: images.Image) -> None:
    writes: list[str] = []
    for offset, length in _PATTERNS:
        writes += ['-c', f'write -P {_PATTERN} {offset} {length}']
    images.run('qemu-io', '-f', image[1], *writes, image[0])


def running() -> collections.abc.Iterator[tuple[int, list[str]]]:
    """Every process of the host, by its command line."""
    for name in pathlib.Path('/proc').iterdir():
        if name.name.isdigit():
            try:
                words = (name / 'cmdline').read_bytes().split(b'\0')
            except OSError:
                continue
            yield int(name.name), [
                word.decode(errors='replace') for word in words]
