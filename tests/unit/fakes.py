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

"""libvirt's domain and its kin, as far as this package knows them.

They keep one journal, so that a test can tell what came before what.
"""

import collections.abc
import contextlib
import os
import socket
import typing
from xml.etree import ElementTree

import libvirt

from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import rights

UUID = '5ee7e4f9-6b1f-4d8a-8d7e-0a1b2c3d4e5f'
URI = 'fake:///system'


class Journal(list[str]):
    """What happened, in order, one line each."""

    def of(self, *prefixes: str) -> list[str]:
        """The lines that begin with one of the prefixes, in order."""
        return [line for line in self if line.startswith(prefixes)]


def libvirt_error(code: int, message: str = 'refused',
                  domain: int = 0) -> libvirt.libvirtError:
    error = libvirt.libvirtError(message)
    error.err = (code, domain, message, 2, '', '', '', 0, 0)
    return error


def disk_xml(path: str, fmt: str = 'raw', target: str = 'vda',
             kind: str = 'file', device: str = 'disk',
             inside: str = '') -> str:
    attribute = 'dev' if kind == 'block' else 'file'
    return (f"<disk type='{kind}' device='{device}'>"
            f"<driver name='qemu' type='{fmt}'/>"
            f"<source {attribute}='{path}'/>{inside}"
            f"<target dev='{target}' bus='virtio'/></disk>")


def make_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)


class FakeConnection:
    """A virConnect."""

    def __init__(self, *domains: 'FakeDomain') -> None:
        self.domains = domains
        self.secrets: set[str] = set()
        self.host_cpu = '<cpu><model>host</model></cpu>'
        self.machines_gone: set[str] = set()
        self.cpu_compares = libvirt.VIR_CPU_COMPARE_SUPERSET
        self.closed = False

    def _find(self, field: str, value: str) -> 'FakeDomain':
        for domain in self.domains:
            if getattr(domain, field)() == value:
                return domain
        raise libvirt_error(libvirt.VIR_ERR_NO_DOMAIN, 'no domain')

    def lookupByUUIDString(self, uuid: str) -> 'FakeDomain':
        if len(uuid) != 36:
            raise libvirt_error(libvirt.VIR_ERR_INVALID_ARG, 'not a UUID')
        return self._find('UUIDString', uuid)

    def lookupByName(self, name: str) -> 'FakeDomain':
        return self._find('name', name)

    def secretLookupByUUIDString(self, uuid: str) -> None:
        if uuid not in self.secrets:
            raise libvirt_error(libvirt.VIR_ERR_NO_SECRET)

    def getCapabilities(self) -> str:
        return f'<capabilities><host>{self.host_cpu}</host></capabilities>'

    def getDomainCapabilities(self, *what: str | None) -> str:
        if what[2] in self.machines_gone:
            raise libvirt_error(libvirt.VIR_ERR_INVALID_ARG,
                                'no such machine')
        return '<domainCapabilities/>'

    def compareHypervisorCPU(self, *what: str | None) -> int:
        return self.cpu_compares

    def close(self) -> None:
        self.closed = True


class FakeDomainSnapshot:
    """A virDomainSnapshot."""

    def __init__(self, domain: 'FakeDomain', name: str) -> None:
        self._domain = domain
        self._name = name

    def getName(self) -> str:
        return self._name

    def getXMLDesc(self, flags: int = 0) -> str:
        return self._domain.snapshots[self._name]

    def delete(self, flags: int) -> None:
        assert flags == libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY
        self._domain._called('forget', self._name)
        del self._domain.snapshots[self._name]


class FakeDomain:
    """A virDomain that does at once what it is told."""

    def __init__(self, journal: Journal | None = None) -> None:
        self.journal = Journal() if journal is None else journal
        self.connection = FakeConnection(self)
        self.current_state = [libvirt.VIR_DOMAIN_RUNNING, 1]
        #: the id that it has while it is on
        self.number = 1
        self.persistent = True
        self.managed_save = False
        self.saved_state: list[int] = []
        self.kib = 524288
        self.capacity = 1024 ** 2
        self.job = libvirt.VIR_DOMAIN_JOB_NONE
        self.job_operation = libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE
        self.disks = ''
        self.devices = ''
        self.rest = ''
        self.frozen = 0
        #: by target: the path of a block copy's overlay
        self.copies: dict[str, str] = {}
        self.copy_ready = True
        #: XML of the backup job, None while there is none
        self.backup: str | None = None
        self.backup_flags = 0
        #: what QEMU does with the path of a backup's socket
        self.bind: collections.abc.Callable[[str], object] = make_socket
        #: what libvirt knows of domain snapshots, XML by name
        self.snapshots: dict[str, str] = {}
        self.current_snapshot: str | None = None
        #: state that it has after it went back
        self.reverted_state = [
            libvirt.VIR_DOMAIN_RUNNING,
            libvirt.VIR_DOMAIN_RUNNING_FROM_SNAPSHOT]
        #: by a method's name: what it raises from now on
        self.errors: dict[str, Exception] = {}
        #: by a method's name: called before it does its work
        self.before: dict[
            str, collections.abc.Callable[[], typing.Any]] = {}

    def _called(self, name: str, *arguments: object) -> None:
        self.journal.append(' '.join(
            (name, *(str(each) for each in arguments))))
        self._may_fail(name)

    def _may_fail(self, name: str) -> None:
        if name in self.before:
            self.before[name]()
        if name in self.errors:
            raise self.errors[name]

    def off(self, by: int = libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN) -> None:
        self.current_state = [libvirt.VIR_DOMAIN_SHUTOFF, by]

    def gone(self) -> None:
        """From now on there is no such domain."""
        for name in ('state', 'fsFreeze', 'fsThaw', 'XMLDesc', 'blockInfo',
                     'blockJobInfo', 'jobStats', 'createWithFlags',
                     'managedSave', 'agentSetResponseTimeout',
                     'hasManagedSaveImage'):
            self.errors[name] = libvirt_error(libvirt.VIR_ERR_NO_DOMAIN)

    # What it is

    def UUIDString(self) -> str:
        return UUID

    def name(self) -> str:
        return 'instance-00000001'

    def connect(self) -> FakeConnection:
        return self.connection

    def state(self) -> list[int]:
        self._may_fail('state')
        return list(self.current_state)

    def isPersistent(self) -> int:
        return int(self.persistent)

    def hasManagedSaveImage(self, flags: int) -> int:
        self._may_fail('hasManagedSaveImage')
        return int(self.managed_save)

    def info(self) -> list[int]:
        return [1, self.kib * 2, self.kib, 1, 0]

    def blockInfo(self, target: str) -> list[int]:
        self._may_fail('blockInfo')
        return [self.capacity, 0, 0]

    def XMLDesc(self, flags: int) -> str:
        self._may_fail('XMLDesc')
        root = ElementTree.fromstring(
            f'<domain>{self.rest}<devices>{self.disks}{self.devices}'
            f'</devices></domain>')
        if self.current_state[0] != libvirt.VIR_DOMAIN_SHUTOFF:
            root.set('id', str(self.number))
        for target, overlay in self.copies.items():
            disk = root.find(
                f'./devices/disk/target[@dev="{target}"]/..')
            assert disk is not None
            mirror = ElementTree.SubElement(
                disk, 'mirror', type='file', job='copy')
            if self.copy_ready:
                mirror.set('ready', 'yes')
            ElementTree.SubElement(mirror, 'source', file=overlay)
        return ElementTree.tostring(root, encoding='unicode')

    # Jobs

    def jobStats(self) -> dict[str, int]:
        self._may_fail('jobStats')
        return {'type': self.job, 'operation': self.job_operation}

    def blockJobInfo(self, target: str, flags: int) -> dict[str, int]:
        self._may_fail('blockJobInfo')
        return {'type': 2} if target in self.copies else {}

    def blockCopy(self, target: str, xml: str, parameters: object,
                  flags: int) -> None:
        self._called('blockCopy', target)
        source = ElementTree.fromstring(xml).find('source')
        assert source is not None
        self.copy_flags = flags
        self.copies[target] = source.get('file', '')

    def blockJobAbort(self, target: str, flags: int) -> None:
        self._called('blockJobAbort', target)
        del self.copies[target]

    def backupBegin(self, xml: str, checkpoint: object,
                    flags: int) -> None:
        self._called('backupBegin')
        self.backup, self.backup_flags = xml, flags
        server = ElementTree.fromstring(xml).find('server')
        assert server is not None
        self.bind(server.get('socket', ''))

    def backupGetXMLDesc(self, flags: int) -> str:
        self._may_fail('backupGetXMLDesc')
        if self.backup is None:
            raise libvirt_error(libvirt.VIR_ERR_NO_DOMAIN_BACKUP)
        return self.backup

    def abortJob(self) -> None:
        self._called('abortJob')
        self.backup = None

    # File systems

    def agentSetResponseTimeout(self, seconds: int, flags: int) -> None:
        self._called('agentSetResponseTimeout', seconds)

    def getTime(self) -> dict[str, int]:
        self._called('getTime')
        return {}

    def fsFreeze(self) -> int:
        self._called('fsFreeze')
        self.frozen = 2
        return 2

    def fsThaw(self) -> int:
        self._called('fsThaw')
        thawed, self.frozen = self.frozen, 0
        return thawed

    # Power

    def managedSave(self, flags: int) -> None:
        self._called('managedSave')
        self.saved_state = self.current_state
        self.managed_save = True
        self.off(libvirt.VIR_DOMAIN_SHUTOFF_SAVED)

    def managedSaveRemove(self, flags: int) -> None:
        self._called('managedSaveRemove')
        self.managed_save = False

    def createWithFlags(self, flags: int) -> None:
        paused = flags == libvirt.VIR_DOMAIN_START_PAUSED
        self._called('createWithFlags', *['paused'] * paused)
        self.number += 1
        self.current_state = (
            [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION]
            if paused else self.saved_state if self.managed_save
            else [libvirt.VIR_DOMAIN_RUNNING, 1])
        self.managed_save = False

    def suspend(self) -> None:
        self._called('suspend')
        self.current_state = [libvirt.VIR_DOMAIN_PAUSED, 1]

    def resume(self) -> None:
        self._called('resume')
        self.current_state = [libvirt.VIR_DOMAIN_RUNNING, 1]

    def destroy(self) -> None:
        self._called('destroy')
        self.off(libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED)

    # Domain snapshots

    def snapshotCreateXML(self, xml: str, flags: int) -> None:
        root = ElementTree.fromstring(xml)
        name = root.findtext('name', '')
        if flags & libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE:
            self._called('define', name)
            self.snapshots[name] = xml
            return
        self._called('snapshotCreateXML')
        ElementTree.SubElement(root, 'state').text = 'running'
        root.append(ElementTree.fromstring(self.XMLDesc(0)))
        self.snapshots[name] = ElementTree.tostring(root, encoding='unicode')
        self.current_snapshot = name
        if flags & libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_HALT:
            self.journal.append('halted')
            self.off(libvirt.VIR_DOMAIN_SHUTOFF_FROM_SNAPSHOT)

    def snapshotListNames(self, flags: int = 0) -> list[str]:
        self._may_fail('snapshotListNames')
        return list(self.snapshots)

    def snapshotLookupByName(self, name: str,
                             flags: int = 0) -> FakeDomainSnapshot:
        if name not in self.snapshots:
            raise libvirt_error(libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT)
        return FakeDomainSnapshot(self, name)

    def snapshotCurrent(self, flags: int = 0) -> FakeDomainSnapshot:
        return self.snapshotLookupByName(self.current_snapshot or '')

    def revertToSnapshot(self, snapshot: FakeDomainSnapshot,
                         flags: int = 0) -> None:
        self.off(libvirt.VIR_DOMAIN_SHUTOFF_FROM_SNAPSHOT)
        self.current_snapshot = None
        self._called('revertToSnapshot', snapshot.getName())
        self.current_snapshot = snapshot.getName()
        self.number += 1
        self.current_state = list(self.reverted_state)

    def setTime(self, when: dict[str, int]) -> None:
        self._called('setTime')

    # Devices

    def detachDeviceFlags(self, device: str, flags: int) -> None:
        self._called('detachDeviceFlags')
        self.devices = self.devices.replace(device, '')

    def attachDeviceFlags(self, device: str, flags: int) -> None:
        self._called('attachDeviceFlags')
        self.devices += device


class FakeHost:
    """The rights of whoever runs a flow."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.allowed = True
        #: called when nobody else disturbs the guest any more
        self.waited: collections.abc.Callable[[], object] = lambda: None

    def let_group_pass(self, path: str, gid: int) -> None:
        self.journal.append(f'chown {path} -1 {gid}')

    def take_socket(self, path: str) -> None:
        self.journal.append(f'chown {path} {os.getuid()} -1')
        rights.take_socket(path)

    def give_disk(self, path: str, uid: int, gid: int) -> None:
        self.journal.append(f'chown {path} {uid} {gid}')

    @contextlib.contextmanager
    def may_start(self) -> collections.abc.Iterator[bool]:
        self.journal.append('may_start')
        yield self.allowed
        self.journal.append('start lock is free')

    @contextlib.contextmanager
    def may_resume(self) -> collections.abc.Iterator[bool]:
        self.journal.append('may_resume')
        yield self.allowed
        self.journal.append('lock for resume is free')

    @contextlib.contextmanager
    def undisturbed(self) -> collections.abc.Iterator[None]:
        self.waited()
        yield


def guest_of(domain: FakeDomain) -> guests.Guest:
    return guests.Guest(domain, URI)
