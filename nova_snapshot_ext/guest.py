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

"""The calls of libvirt that we use, typed: a thin wrapper of one domain.

Nothing here knows why it is called. Errors of libvirt come out as
:class:`LibvirtError` or, if the domain is gone, as GuestGone.
"""

import collections.abc
import contextlib
import dataclasses
import enum
import grp
import json
import os
import pwd
import re
import time
import typing
from xml.etree import ElementTree

import libvirt
import libvirt_qemu
from oslo_log import log as logging

from nova_snapshot_ext import disk
from nova_snapshot_ext import exception

LOG = logging.getLogger(__name__)

AGENT_CHANNEL = 'org.qemu.guest_agent.0'
NOVA_METADATA = '{http://openstack.org/xmlns/libvirt/nova/1.1}instance'

#: what libvirt can take from a running guest and give back to it
_DETACHABLE = ('./devices/hostdev[@type="pci"]',
               './devices/hostdev[@type="mdev"]',
               './devices/interface[@type="hostdev"]')
#: what keeps a guest's memory from being saved, or devices from coming back
_UNSAVABLE = {
    './devices/hostdev[@type="usb"]': 'a USB device of the host',
    './devices/hostdev[@type="scsi"]': 'a SCSI device of the host',
    './devices/hostdev[@type="scsi_host"]': 'a vhost-scsi device',
    './devices/interface[@type="vdpa"]': 'a vDPA interface',
    './devices/filesystem': 'a shared file system',
    './devices/shmem': 'shared memory with the host',
    './devices/tpm/backend[@type="passthrough"]': "the host's TPM",
    './launchSecurity': 'encrypted memory',
}
# As long as a socket's path has room for.
_TARGET = re.compile('[A-Za-z0-9]{1,12}')
# Devices leave when the guest's kernel lets them go (ACPI, virDomain
# DetachDeviceFlags: "removal may be asynchronous").
_DETACH_TIMEOUT_S = 20.0
# Of a backup: libvirt hears of its end when it has given up to take in that a
# guest agent ended, and that it came back, during the job: 30 s each.
_JOB_END_TIMEOUT_S = 90.0
# How often libvirt is asked to end one, at most.
_ASK_AGAIN_S = 1.0
# What QEMU says of a guest that was started paused, and of none that was
# migrated from here or to here (postmigrate, finish-migrate, inmigrate).
_RESTORED = ('paused', 'prelaunch')
# Of virDomainBlockStatsFlags: numbers, and nanoseconds.
_COMPLETED = (libvirt.VIR_DOMAIN_BLOCK_STATS_READ_REQ,
              libvirt.VIR_DOMAIN_BLOCK_STATS_WRITE_REQ,
              libvirt.VIR_DOMAIN_BLOCK_STATS_FLUSH_REQ)
_TOOK_NS = (libvirt.VIR_DOMAIN_BLOCK_STATS_READ_TOTAL_TIMES,
            libvirt.VIR_DOMAIN_BLOCK_STATS_WRITE_TOTAL_TIMES,
            libvirt.VIR_DOMAIN_BLOCK_STATS_FLUSH_TOTAL_TIMES)
# What is written back is written as operators know it.
for _prefix, _uri in (
        ('nova', 'http://openstack.org/xmlns/libvirt/nova/1.1'),
        ('qemu', 'http://libvirt.org/schemas/domain/qemu/1.0')):
    ElementTree.register_namespace(_prefix, _uri)
# Whose errors say that a call did not come through, or its answer.
_CONNECTION = (libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE)


Wrap = collections.abc.Callable[
    [collections.abc.Callable[..., typing.Any]],
    collections.abc.Callable[..., typing.Any]]
#: looks a domain up by a connection that is alive
Find = collections.abc.Callable[[], libvirt.virDomain]


class LibvirtError(exception.SnapshotError):
    """libvirt refused a call."""

    def __init__(self, what: str, error: libvirt.libvirtError) -> None:
        """:param what: what was tried, for the message"""
        super().__init__(f'{what}: {error.get_error_message()}')
        self.code: int = error.get_error_code()
        self.of_connection: bool = _is_of_connection(error)

    @property
    def was_not_up(self) -> bool:
        """Whether QEMU was not asked, because the guest was off.

        If it ends when it is asked, that is another code (OPERATION_FAILED).
        """
        return (self.code == libvirt.VIR_ERR_OPERATION_INVALID
                and not self.of_connection)

    @property
    def agent_is_silent(self) -> bool:
        """Whether it is that the guest agent did not answer."""
        return self.code in _AGENT_SILENT


class State(enum.Enum):
    """A domain's state, as far as a snapshot has to tell them apart."""

    RUNNING = 'running'
    PAUSED = 'paused'
    SHUTOFF = 'shut off'
    #: shutting down, crashed, suspended by its own ACPI, …
    OTHER = 'in transition'


_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: State.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: State.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: State.PAUSED,
    libvirt.VIR_DOMAIN_SHUTOFF: State.SHUTOFF,
    libvirt.VIR_DOMAIN_CRASHED: State.SHUTOFF,
}


_PAUSED_BY_START = (
    [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION],
    [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP])
_PAUSED_BY_SNAPSHOT = (
    [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_SAVE],
    [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT])
_AT_SNAPSHOT = (
    [libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_FROM_SNAPSHOT],
    [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_FROM_SNAPSHOT])
_OPERATIONS = {
    libvirt.VIR_DOMAIN_JOB_OPERATION_START: 'start',
    libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE: 'save',
    libvirt.VIR_DOMAIN_JOB_OPERATION_RESTORE: 'restore',
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN: 'migration',
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: 'migration',
    libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT: 'snapshot',
    libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_REVERT: 'snapshot',
    libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_DELETE: 'snapshot',
    libvirt.VIR_DOMAIN_JOB_OPERATION_DUMP: 'dump',
    libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP: 'backup',
}
# What libvirt says where a guest agent did not answer, in the releases that
# know the code. All else is an answer, or was never asked.
_AGENT_SILENT = {
    getattr(libvirt, name, None)
    for name in ('VIR_ERR_AGENT_UNRESPONSIVE', 'VIR_ERR_AGENT_UNSYNCED',
                 'VIR_ERR_AGENT_COMMAND_TIMEOUT')}


@dataclasses.dataclass(frozen=True)
class BlockJob:
    """The block job of one disk."""

    #: ``copy``, ``commit``, ``backup`` … or '' where libvirt names none
    kind: str
    #: path of the job's other end, '' where there is none
    mirror: str
    #: both ends are equal and will be kept so
    ready: bool


@dataclasses.dataclass(frozen=True)
class IoTimes:
    """What a guest has asked of one of its disks since it was started."""

    #: reads, writes and flushes that are complete
    requests: int
    #: how long they took, all together
    seconds: float


def _is_of_connection(error: libvirt.libvirtError) -> bool:
    return error.get_error_domain() in _CONNECTION


class _Domain:
    """A virDomain that is looked up anew when its connection broke.

    A restart of libvirtd ends every connection for good, and with it what
    was looked up by it; the guest runs on. Then the call is repeated, once:
    if it came through after all, libvirt refuses the second of those that
    would do harm. What takes long may go on all the same when its connection
    broke, and is not repeated (:meth:`once`).
    """

    def __init__(self, domain: libvirt.virDomain, find: Find) -> None:
        self._domain = domain
        self._find = find

    def call(self, function: collections.abc.Callable[
            [libvirt.virDomain], typing.Any]) -> typing.Any:
        """Call a function of the domain."""
        try:
            return function(self._domain)
        except libvirt.libvirtError as error:
            if not _is_of_connection(error):
                raise
            LOG.info('The connection to libvirt broke, and is made anew: %s',
                     error)
        self._domain = self._find()
        return function(self._domain)

    def once(self, name: str, *arguments: object) -> typing.Any:
        """Call a method of virDomain, and never again.

        Its error says whether the connection broke: the call may then have
        come through, be under way, or have been for nothing.
        """
        return getattr(self._domain, name)(*arguments)

    def __getattr__(self, name: str) -> collections.abc.Callable[
            ..., typing.Any]:
        """A method of virDomain."""
        return lambda *arguments: self.call(
            lambda domain: getattr(domain, name)(*arguments))


class Guest:
    """One libvirt domain: its state, its disks, and what is done to them."""

    def __init__(self, domain: libvirt.virDomain, uri: str,
                 in_thread: Wrap = lambda function: function,
                 find: Find | None = None) -> None:
        """:param uri: what another process can reach the domain's libvirt by

        A connection only tells the URI of the driver at its far end.

        :param in_thread: makes a function one that does not hold up other
            greenlets, where there are any
        :param find: what looks the domain up anew; the URI is opened for
            that without it. It raises libvirtError or SnapshotError.
        """
        self._in_thread = in_thread
        self.uri = uri
        self.uuid: str = domain.UUIDString()
        self._domain = _Domain(domain, find or self._find_by_uri)
        self.name: str = domain.name()

    @classmethod
    def find(cls, connection: libvirt.virConnect, uri: str,
             which: str) -> 'Guest':
        """:param uri: that the connection was opened by

        :param which: a domain's UUID or name
        :raises GuestGone: if there is none
        """
        for lookup in (connection.lookupByUUIDString,
                       connection.lookupByName):
            try:
                return cls(lookup(which), uri)
            except libvirt.libvirtError as error:
                if error.get_error_code() not in (
                        libvirt.VIR_ERR_NO_DOMAIN,
                        libvirt.VIR_ERR_INVALID_ARG):
                    raise LibvirtError(f'Looking for domain {which}',
                                       error) from error
        raise exception.GuestGone(f'There is no domain {which}')

    def _find_by_uri(self) -> libvirt.virDomain:
        return libvirt.open(self.uri).lookupByUUIDString(self.uuid)

    @contextlib.contextmanager
    def _calling(self, what: str) -> collections.abc.Iterator[None]:
        try:
            yield
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                raise exception.GuestGone(
                    f'Domain {self.name} is gone') from error
            raise LibvirtError(f'{what} of {self.name}', error) from error

    # What it is

    def state(self) -> State:
        with self._calling('State'):
            return _STATES.get(self._domain.state()[0], State.OTHER)

    def was_shut_down(self) -> bool:
        """Whether it is off because it shut itself down in good order."""
        with self._calling('State'):
            return list(self._domain.state()) == [
                libvirt.VIR_DOMAIN_SHUTOFF,
                libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN]

    def is_starting_up(self) -> bool:
        """Whether libvirt has not started it wholly.

        If libvirtd dies in that, the next one turns it off.
        """
        with self._calling('State'):
            return list(self._domain.state()) == [
                libvirt.VIR_DOMAIN_PAUSED,
                libvirt.VIR_DOMAIN_PAUSED_STARTING_UP]

    def is_paused_by_start(self) -> bool:
        """Whether it was started paused, and neither ran nor was paused
        since: a pause by somebody has another reason.

        QEMU got its memory as from a migration; libvirt keeps that as the
        reason (qemuProcessStart, VIR_QEMU_PROCESS_START_PAUSED).
        """
        with self._calling('State'):
            return list(self._domain.state()) in _PAUSED_BY_START

    def life(self) -> str | None:
        """What names this run of its QEMU, None while it is off.

        Another start gives another name. libvirt.virDomain has the number of
        when it was looked up; the XML has that of now.
        """
        return self.description().get('id')

    def is_persistent(self) -> bool:
        with self._calling('Persistence'):
            return bool(self._domain.isPersistent())

    def has_managed_save(self) -> bool:
        with self._calling('Managed save'):
            return bool(self._domain.hasManagedSaveImage(0))

    def memory_bytes(self) -> int:
        """The memory that it may have in use now."""
        with self._calling('Memory'):
            kib: int = self._domain.info()[2]
        return kib * 1024

    def description(self) -> ElementTree.Element:
        """Its XML, as an element, without secrets."""
        with self._calling('Description'):
            return _parsed(self._domain.XMLDesc(0))

    def has_console_password(self) -> bool:
        with self._calling('Description'):
            found = _parsed(
                self._domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE))
        return found.find('./devices/graphics[@passwd]') is not None

    def belongs_to_nova(self) -> bool:
        """Whether Nova made it: Nova would act on what happens to it."""
        return self.description().find(
            f'./metadata/{NOVA_METADATA}') is not None

    def disks(self) -> tuple[disk.Disk, ...]:
        """Every ``<disk>``, in libvirt's order."""
        return tuple(disk.Disk.from_element(element) for element in
                     self.description().findall('./devices/disk'))

    def root_disk(self) -> disk.Disk:
        """The first disk that is one: Nova's root disk is always the first.

        :raises UnsafeDisk: if there is none, or its name is no name
        """
        disks = self.disks()
        found = next((each for each in disks if each.device == 'disk'), None)
        if found is None:
            raise exception.UnsafeDisk(f'{self.name} has no disk')
        check_name(self.name, found, disks)
        return found

    def capacity(self, target: str) -> int:
        """A disk's size in bytes, as the guest sees it."""
        with self._calling(f'Size of {target}'):
            size: int = self._domain.blockInfo(target)[0]
        return size

    def io_times(self, target: str) -> IoTimes | None:
        """How long its requests take, None while it does not run.

        What others read does not count.
        """
        try:
            with self._calling(f'Statistics of {target}'):
                found = self._domain.blockStatsFlags(target, 0)
        except LibvirtError as error:
            if error.code == libvirt.VIR_ERR_OPERATION_INVALID:
                return None
            raise
        return IoTimes(
            sum(found.get(name, 0) for name in _COMPLETED),
            sum(found.get(name, 0) for name in _TOOK_NS) / 1e9)

    def qemu_uid(self) -> int | None:
        """The user that its QEMU runs as, None if that has no number here."""
        user = self._dac_label().partition(':')[0].lstrip('+')
        if user.isdecimal():
            return int(user)
        try:
            return pwd.getpwnam(user).pw_uid
        except KeyError:
            return None

    def qemu_gid(self) -> int | None:
        """The group that its QEMU runs as, None while it does not run.

        :raises FreezeFailed: if it is a name that is not known here
        """
        label = self._dac_label()
        if not label:
            return None
        group = label.rpartition(':')[2]
        if group.lstrip('+').isdecimal():
            return int(group.lstrip('+'))
        try:
            return grp.getgrnam(group).gr_gid
        except KeyError as error:
            raise exception.FreezeFailed(
                f'QEMU of {self.name} runs as the group {group}, which does '
                f'not exist here') from error

    def _dac_label(self) -> str:
        """libvirt's DAC label: ``+uid:+gid``, or with names where an operator
        wrote it (https://libvirt.org/formatdomain.html, seclabel).

        A number is right also where libvirtd runs in another container.
        """
        return self.description().findtext(
            './seclabel[@model="dac"]/label') or ''

    # Its jobs

    def job(self) -> str | None:
        """What job of the whole domain runs, None if none does."""
        try:
            with self._calling('Job'):
                job = self._domain.jobStats()
        except LibvirtError as error:
            if error.code == libvirt.VIR_ERR_OPERATION_INVALID:
                return None         # it does not run
            if (error.code == libvirt.VIR_ERR_INTERNAL_ERROR
                    and not error.of_connection):
                return 'backup'     # one that libvirt is about to begin
            if error.code == libvirt.VIR_ERR_OPERATION_TIMEOUT:
                # A start or a restore lets nobody ask.
                return 'of another kind'
            raise
        if job['type'] in (libvirt.VIR_DOMAIN_JOB_NONE,
                           libvirt.VIR_DOMAIN_JOB_COMPLETED):
            return None
        return _OPERATIONS.get(job.get('operation', 0), 'of another kind')

    def block_job(self, target: str) -> BlockJob | None:
        """The block job of a disk, None where there is none."""
        with self._calling(f'Block job of {target}'):
            info = self._domain.blockJobInfo(target, 0)
        if not info:
            return None
        mirror = next(
            (found for element in self.description().findall('./devices/disk')
             if disk.target_of(element) == target
             and (found := element.find('mirror')) is not None), None)
        if mirror is None:
            return BlockJob('', '', False)
        source = mirror.find('source')
        # cur == end alone is true before the copy began; libvirt shows
        # ready in the XML when QEMU said so.
        return BlockJob(
            mirror.get('job', ''),
            '' if source is None else source.get('file', ''),
            mirror.get('ready') == 'yes')

    def is_out_of_date(self, target: str) -> bool:
        """Whether libvirt shows a block job of a disk that QEMU does not have.

        QEMU has ended it and libvirt died meanwhile (seen with 9.0 and 11.3):
        the guest writes to another file than libvirt says from then on. Once
        its memory was saved, it would be started from the wrong one.
        """
        return any(
            disk.target_of(element) == target
            and (mirror := element.find('mirror')) is not None
            # One of another kind ends where it began.
            and mirror.get('job') == 'active-commit'
            for element in self.description().findall('./devices/disk')
        ) and self.block_job(target) is None

    def begin_backup(self, description: str) -> None:
        """Begin a backup job, with scratch files made beforehand.

        :param description: XML of virDomainBackupBegin
        """
        self.activate_disks()
        with self._calling('Backup'):
            self._domain.backupBegin(
                description, None,
                libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL)

    def backup_socket(self) -> str | None:
        """The unix socket that its backup job exports on.

        :returns: None if it has no job, '' if its job exports on none
        """
        try:
            with self._calling('Backup'):
                description = self._domain.backupGetXMLDesc(0)
        except LibvirtError as error:
            if error.code in (libvirt.VIR_ERR_NO_DOMAIN_BACKUP,
                              libvirt.VIR_ERR_OPERATION_INVALID):
                return None
            raise
        server = _parsed(description).find('./server')
        return '' if server is None else server.get('socket', '')

    def end_backup(self, socket: str) -> None:
        """End the backup job that exports on a socket, and no other.

        Returns when it is gone: libvirt answers before. It is asked again,
        because a job that is about to begin can't be ended yet.
        """
        now = time.monotonic()
        deadline = now + _JOB_END_TIMEOUT_S
        ask = now
        while self.backup_socket() == socket:
            now = time.monotonic()
            if now > deadline:
                raise exception.UndoFailed(
                    f'The backup job of {self.name} does not end')
            if now >= ask:
                try:
                    with self._calling('End of the backup'):
                        self._domain.abortJob()
                except LibvirtError as error:
                    if error.code != libvirt.VIR_ERR_OPERATION_INVALID:
                        raise
                ask = now + _ASK_AGAIN_S
            time.sleep(0.02)

    def is_paused_by_snapshot(self) -> bool:
        """Whether libvirt paused it to save its memory, and no more."""
        with self._calling('State'):
            return list(self._domain.state()) in _PAUSED_BY_SNAPSHOT

    def came_from_snapshot(self) -> bool:
        """Whether libvirt had it go back to a domain snapshot, and it was
        neither paused nor resumed since."""
        with self._calling('State'):
            return list(self._domain.state()) in _AT_SNAPSHOT

    def is_paused_by_io_error(self) -> bool:
        with self._calling('State'):
            return list(self._domain.state()) == [
                libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]

    def start_copy(self, target: str, overlay: str) -> None:
        """Copy the top layer of a disk into an overlay made beforehand.

        :param overlay: path of a qcow2 file with the disk's own backing
            file and size
        """
        element = ElementTree.Element('disk', type='file')
        ElementTree.SubElement(element, 'source', file=overlay)
        ElementTree.SubElement(element, 'driver', type='qcow2')
        self.activate_disks()
        with self._calling(f'Copy of {target}'):
            # With TRANSIENT_JOB the domain may stay persistent: libvirt
            # refuses a copy otherwise, because it could not take it up again
            # after a restart of the guest.
            self._domain.blockCopy(
                target, ElementTree.tostring(element, encoding='unicode'), {},
                libvirt.VIR_DOMAIN_BLOCK_COPY_SHALLOW
                | libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT
                | libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)

    def end_block_job(self, target: str) -> None:
        """End a disk's block job and wait until it is gone.

        A copy that was ready stays, as of this moment.
        """
        with self._calling(f'End of the block job of {target}'):
            self._domain.blockJobAbort(target, 0)

    # Its file systems

    def has_agent(self) -> bool:
        """Whether it has a channel for a guest agent."""
        return self.description().find(
            f'./devices/channel/target[@name="{AGENT_CHANNEL}"]') is not None

    def agent_connected(self) -> bool:
        """Whether a guest agent has opened its channel."""
        return self.description().find(
            f'./devices/channel/target[@name="{AGENT_CHANNEL}"]'
            '[@state="connected"]') is not None

    def agent_answers(self) -> bool:
        """Whether a guest agent takes commands at all."""
        try:
            with self._calling('Guest agent'):
                # A question that every agent knows (QEMU 1.5 and later).
                self._domain.getTime()
        except LibvirtError:
            return False
        return True

    @contextlib.contextmanager
    def agent_timeout(
            self, seconds: int) -> collections.abc.Iterator[None]:
        """Have libvirt wait so long for an answer of the guest agent.

        It waits for ever otherwise.
        """
        with self._calling('Time-out of the guest agent'):
            self._domain.agentSetResponseTimeout(seconds, 0)
        try:
            yield
        finally:
            with (contextlib.suppress(exception.SnapshotError),
                  self._calling('Time-out of the guest agent')):
                self._domain.agentSetResponseTimeout(
                    libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK, 0)

    def freeze_filesystems(self) -> int:
        """:returns: how many were frozen"""
        with self._calling('Freeze'):
            count: int = self._domain.fsFreeze()
        return count

    def thaw_filesystems(self) -> int:
        """:returns: how many were thawed, 0 if none was frozen"""
        with self._calling('Thaw'):
            count: int = self._domain.fsThaw()
        return count

    # Its memory and its devices

    def why_not_savable(self) -> str | None:
        """What keeps its memory from being saved, None if nothing does."""
        description = self.description()
        for path, what in _UNSAVABLE.items():
            if description.find(path) is not None:
                return f'it has {what}, which can not be saved'
        for encryption in description.findall(
                './devices/tpm/backend/encryption'):
            secret = encryption.get('secret', '')
            try:
                self._domain.call(
                    lambda domain: domain.connect().secretLookupByUUIDString(
                        secret))
            except libvirt.libvirtError:
                return ('libvirt no longer holds the secret of its TPM: it '
                        'could not be started again')
        return None

    def save_memory(self) -> None:
        """Stop it with its memory saved (managed save).

        :raises LibvirtError: also if the connection broke, and nobody knows
            how it ends
        """
        with self._calling('Managed save'):
            self._domain.once('managedSave', 0)

    def remove_cut_save(self) -> None:
        """Remove what there is of a managed save that libvirtd did not live
        to end, while the guest is up and has no job.

        libvirt would not start it from that, but calls it a managed save.
        """
        if self.state() in (State.RUNNING, State.PAUSED) and (
                self.has_managed_save()):
            with self._calling('Removal of a managed save'):
                self._domain.managedSaveRemove(0)

    def end_save(self) -> bool:
        """End a managed save that is under way: the guest runs on.

        :returns: whether there was one
        """
        if self.job() != 'save':
            return False
        try:
            with self._calling('End of the managed save'):
                self._domain.abortJob()
        except LibvirtError as error:
            if error.code != libvirt.VIR_ERR_OPERATION_INVALID:
                raise
            # It has ended by itself.
        return True

    def start(self, paused: bool = False) -> None:
        """Start it; from its saved memory if there is some, and in the
        state, running or paused, that it had then.

        :param paused: paused in any case
        :raises LibvirtError: as :meth:`save_memory`
        """
        with self._calling('Start'):
            self._domain.once(
                'createWithFlags',
                libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)

    def suspend(self) -> None:
        """Stop its CPUs; its state is then PAUSED."""
        with self._calling('Suspend'):
            self._domain.suspend()

    def resume(self) -> None:
        with self._calling('Resume'):
            self._domain.resume()

    def host_devices(self) -> list[str]:
        """The XML of each device of the host that can be taken from it."""
        description = self.description()
        devices = []
        for path in _DETACHABLE:
            for element in description.findall(path):
                for alias in element.findall('alias'):
                    element.remove(alias)
                devices.append(
                    ElementTree.tostring(element, encoding='unicode'))
        return devices

    def detach(self, device: str) -> None:
        """Take a device from the running guest; return when it left.

        :param device: XML of :meth:`host_devices`
        :raises LibvirtError: if libvirt can't
        :raises FreezeFailed: if the guest does not let it go
        """
        with self._calling('Detach of a device'):
            self._domain.detachDeviceFlags(
                device, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        if not self._lets_go(device, _DETACH_TIMEOUT_S):
            raise exception.FreezeFailed(
                f'{self.name} did not let go of a device within '
                f'{_DETACH_TIMEOUT_S:.0f} s: {device}')

    def _lets_go(self, device: str, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self._has_device(device):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        return True

    def attach(self, device: str, late_s: float = 0.0) -> None:
        """Give a device back, unless the running guest has it.

        :param late_s: how long it may take to let go of it yet, after it was
            asked to: nothing takes that back
        """
        if not self._lets_go(device, late_s):
            if late_s:
                LOG.warning('%s has kept a device that it was asked to let '
                            'go. If it does so later, its next start gives '
                            'it back: %s', self.name, device)
            return
        with self._calling('Attach of a device'):
            self._domain.attachDeviceFlags(
                device, libvirt.VIR_DOMAIN_AFFECT_LIVE)

    def _has_device(self, device: str) -> bool:
        wanted = _host_address(device)
        return any(_host_address(each) == wanted
                   for each in self.host_devices())

    # Its internal snapshots, while it runs

    def monitor(self, command: str, **arguments: typing.Any) -> typing.Any:
        """A command of QEMU's monitor that libvirt has no call for.

        libvirt marks the domain as tainted (``custom-monitor``) in its log.

        :returns: the answer's ``return``
        """
        request = json.dumps({'execute': command, 'arguments': arguments})
        with self._calling(command):
            # A function of a module: Nova's proxies do not see it.
            call = self._in_thread(libvirt_qemu.qemuMonitorCommand)
            answer = json.loads(self._domain.call(
                lambda domain: call(domain, request, 0)))
        if 'error' in answer:
            raise exception.SnapshotError(
                f'{command} of {self.name}: {answer["error"]["desc"]}')
        return answer['return']

    def format_node(self, path: str) -> dict[str, typing.Any] | None:
        """QEMU's description of the qcow2 node that a file is opened as.

        :returns: an entry of ``query-named-block-nodes``, None if there is
            none
        """
        for node in self.monitor('query-named-block-nodes'):
            if node['drv'] == 'qcow2' and os.path.realpath(
                    node['image']['filename']) == os.path.realpath(path):
                found: dict[str, typing.Any] = node
                return found
        return None

    def activate_disks(self) -> None:
        """Let a paused guest's disks be written to, as a running one's are.

        Since QEMU 10.0, those of a guest that was restored paused stay
        inactive until it goes on: no job can begin on them, and to delete an
        internal snapshot there is the end of QEMU (an assertion in
        bdrv_co_write_req_prepare). Before, they were active at once.

        :raises SnapshotError: if they may be another host's, by a migration
            that is under way or was ended
        """
        if self.state() is not State.PAUSED:
            return
        # QEMU 7.2 does not tell; they are active there.
        if all(node.get('active', True)
               for node in self.monitor('query-named-block-nodes')):
            return
        if self.job() is not None:
            raise exception.SnapshotError(
                f'The disks of {self.name} are inactive while a job is under '
                f'way')
        status = self.monitor('query-status')['status']
        if status not in _RESTORED:
            raise exception.SnapshotError(
                f'The disks of {self.name} are inactive, and it is {status}: '
                f'they may be in use on another host')
        self.monitor('blockdev-set-active', active=True)

    # Its domain snapshots: libvirt's, of all disks and the memory

    def take_domain_snapshot(self, description: str,
                             halt: bool = False) -> None:
        """Take one while it is up.

        :param description: XML, ``<domainsnapshot>``
        :param halt: leave it off, with its state in the snapshot
        :raises LibvirtError: as :meth:`save_memory`
        """
        self.activate_disks()
        with self._calling('Domain snapshot'):
            self._domain.once(
                'snapshotCreateXML', description,
                libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_HALT if halt else 0)

    def domain_snapshot(self, name: str) -> str | None:
        """The XML of one that libvirt knows, None if it does not.

        Without secrets.
        """
        try:
            with self._calling(f'Domain snapshot {name}'):
                xml: str = self._domain.call(
                    lambda domain: domain.snapshotLookupByName(
                        name).getXMLDesc())
        except LibvirtError as error:
            if error.code == libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT:
                return None
            raise
        return xml

    def domain_snapshots(self) -> list[str]:
        """The names of all that libvirt knows."""
        with self._calling('Domain snapshots'):
            names: list[str] = self._domain.snapshotListNames()
        return names

    def current_domain_snapshot(self) -> str | None:
        """The name of the one that libvirt has it descend from."""
        try:
            with self._calling('Current domain snapshot'):
                name: str = self._domain.call(
                    lambda domain: domain.snapshotCurrent().getName())
        except LibvirtError as error:
            if error.code == libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT:
                return None
            raise
        return name

    def define_domain_snapshot(self, description: str) -> None:
        """Have libvirt know one that is in the disks.

        :param description: XML of :meth:`domain_snapshot`
        """
        with self._calling('Definition of a domain snapshot'):
            self._domain.snapshotCreateXML(
                description, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE)

    def forget_domain_snapshot(self, name: str) -> None:
        """Have libvirt not know it any more; it stays in the disks."""
        if self.domain_snapshot(name) is None:
            return
        with self._calling(f'Metadata of the domain snapshot {name}'):
            self._domain.call(
                lambda domain: domain.snapshotLookupByName(name).delete(
                    libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY))

    def revert_to(self, name: str) -> None:
        """Have it go back to one that libvirt knows; in a new QEMU.

        If it fails, the guest may be off.

        :raises LibvirtError: as :meth:`save_memory`
        """
        with self._calling(f'Rollback to {name}'):
            self._domain.once(
                'revertToSnapshot',
                self._domain.once('snapshotLookupByName', name))

    # Its external snapshots: files beside those of its disks

    def take_external_snapshot(self, description: str, memory: bool) -> None:
        """Have it write into overlays made beforehand from one instant on.

        libvirt keeps nothing of it but the new paths of the disks.

        :param description: XML, ``<domainsnapshot>``
        :param memory: whether its memory is written into a file as well
        :raises LibvirtError: as :meth:`save_memory`
        """
        self.activate_disks()
        flags = (libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
                 | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
                 | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA)
        if not memory:
            flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        with self._calling('External snapshot'):
            self._domain.once('snapshotCreateXML', description, flags)

    def start_commit(self, target: str, base: str, top: str,
                     active: bool) -> None:
        """Commit a layer of a disk into the one below, while it is up.

        :param active: the layer is what the guest writes to: when both are
            equal :meth:`pivot` has it write to the lower one
        """
        self.activate_disks()
        with self._calling(f'Commit of {target}'):
            self._domain.blockCommit(
                target, base, top, 0,
                libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE if active else 0)

    def pivot(self, target: str) -> None:
        """End a job whose ends are equal, and write to its other end.

        :raises LibvirtError: as :meth:`save_memory`
        """
        with self._calling(f'Pivot of {target}'):
            self._domain.once(
                'blockJobAbort', target,
                libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)

    def open_chains(self) -> list[list[str]]:
        """The files of each disk as QEMU has them, whatever libvirt says.

        Each begins with what the guest writes to.
        """
        chains = []
        for device in self.monitor('query-block'):
            image = device.get('inserted', {}).get('image')
            chain = []
            while image:
                chain.append(_path_in(image['filename']))
                image = image.get('backing-image')
            chains.append(chain)
        return chains

    def close_file(self, path: str) -> None:
        """Have QEMU close a file that it has no use for any more.

        :raises SnapshotError: if it has
        """
        for driver in (True, False):
            for node in self.monitor('query-named-block-nodes'):
                if node['file'] == path and driver == (
                        node['drv'] not in ('file', 'host_device')):
                    self.monitor('blockdev-del',
                                 **{'node-name': node['node-name']})

    def defined_disks(self) -> dict[str, str]:
        """The path of each disk in its definition, by target: what it is
        made of from its next start on."""
        with self._calling('Description'):
            root = _parsed(self._domain.XMLDesc(
                libvirt.VIR_DOMAIN_XML_INACTIVE))
        found = map(disk.Disk.from_element,
                    root.findall('./devices/disk'))
        return {each.target: each.path for each in found}

    def define_disks(
            self, files: collections.abc.Mapping[str, disk.Layer]) -> None:
        """Change the files that its disks are made of from its next start on.

        :param files: by target
        """
        with self._calling('Description'):
            root = _parsed(self._domain.XMLDesc(
                libvirt.VIR_DOMAIN_XML_INACTIVE
                | libvirt.VIR_DOMAIN_XML_SECURE))
        _change_disks(root, files)
        xml = ElementTree.tostring(root, encoding='unicode')
        with self._calling('Definition'):
            self._domain.call(lambda domain: domain.connect().defineXML(xml))

    def restore_memory(
            self, path: str,
            files: collections.abc.Mapping[str, disk.Layer]) -> None:
        """Start it with the memory of an external snapshot, running or paused
        as it was then.

        :param path: of the file with the memory
        :param files: what its disks are made of now, by target
        :raises LibvirtError: as :meth:`save_memory`
        """
        with self._calling(f'Memory in {path}'):
            root = _parsed(self._domain.call(
                lambda domain: domain.connect().saveImageGetXMLDesc(path)))
        _change_disks(root, files)
        with self._calling(f'Rollback to {path}'):
            self._domain.once('connect').restoreFlags(
                path, ElementTree.tostring(root, encoding='unicode'))

    def remove_managed_save_of(
            self, paths: collections.abc.Container[str]) -> None:
        """Remove a managed save that would start it from other files than
        its own.

        :param paths: of those files
        """
        if not self.has_managed_save():
            return
        with self._calling('Managed save'):
            root = _parsed(self._domain.managedSaveGetXMLDesc())
        if any(disk.Disk.from_element(element).path in paths
               for element in root.findall('./devices/disk')):
            with self._calling('Removal of a managed save'):
                self._domain.managedSaveRemove(0)

    def destroy(self) -> None:
        """Turn it off at once. QEMU writes what it holds back of its disks."""
        with self._calling('Stop'):
            self._domain.destroy()

    def host_cpu(self) -> str:
        """The host's CPU if the guest is given it as it is, '' if not."""
        cpu = self.description().find('./cpu')
        if cpu is None or cpu.get('mode') not in ('host-passthrough',
                                                  'maximum'):
            return ''
        with self._calling('Capabilities'):
            xml = self._domain.call(
                lambda domain: domain.connect().getCapabilities())
        found = _parsed(xml).find('./host/cpu')
        return '' if found is None else ElementTree.tostring(
            found, encoding='unicode')

    def why_host_can_not_run(
            self, description: ElementTree.Element) -> str | None:
        """What the host does not offer that a domain needs, None if it does.

        :param description: ``<domain>``, as it was when it ran
        """
        kind = description.find('./os/type')
        what = (description.findtext('./devices/emulator'),
                None if kind is None else kind.get('arch'),
                None if kind is None else kind.get('machine'),
                description.get('type'))
        try:
            with self._calling('Capabilities'):
                self._domain.call(
                    lambda domain: domain.connect().getDomainCapabilities(
                        *what))
        except LibvirtError as error:
            return f'the host does not offer its machine {what[2]}: {error}'
        cpu = description.find('./cpu')
        if cpu is None or cpu.find('./model') is None:
            return None
        try:
            with self._calling('Comparison of CPUs'):
                same = self._domain.call(
                    lambda domain: domain.connect().compareHypervisorCPU(
                        *what, ElementTree.tostring(cpu, encoding='unicode')))
        except LibvirtError:
            return None     # libvirt can't tell, for an emulated one say
        if same == libvirt.VIR_CPU_COMPARE_INCOMPATIBLE:
            return f'the host does not offer its CPU {cpu.findtext("./model")}'
        return None

    def set_clock(self) -> None:
        """Have the guest agent set its clock to the time of now."""
        now_ns = time.time_ns()
        with self._calling('Time'):
            self._domain.setTime({'seconds': now_ns // 10 ** 9,
                                  'nseconds': now_ns % 10 ** 9})


def _path_in(name: str) -> str:
    """The path in what QEMU calls a file, with the options that it was
    opened by where they are not what its header says."""
    if not name.startswith('json:'):
        return name
    options = json.loads(name.removeprefix('json:'))
    while isinstance(options.get('file'), dict):
        options = options['file']
    return str(options.get('filename', options.get('file.filename', name)))


def _change_disks(
        root: ElementTree.Element,
        files: collections.abc.Mapping[str, disk.Layer]) -> None:
    """Change the files of disks in a ``<domain>``.

    libvirt finds what they are based on in their headers, which are ours.
    """
    for element in root.findall('./devices/disk'):
        layer = files.get(disk.target_of(element))
        if layer is None:
            continue
        source, driver = element.find('source'), element.find('driver')
        if source is None or driver is None:
            raise exception.SnapshotError(
                f'{disk.target_of(element)} has no file or no format')
        source.attrib.pop('index', None)
        source.set('file', layer.path)
        driver.set('type', layer.format)
        for name in ('backingStore', 'mirror'):
            for old in element.findall(name):
                element.remove(old)


def check_name(guest: str, found: disk.Disk,
               disks: collections.abc.Sequence[disk.Disk]) -> None:
    """:raises UnsafeDisk: if a disk's name is no name, or that of several

    libvirt is told by it which disk is meant, and files are named so.

    :param guest: its name
    :param disks: all that it has
    """
    if not _TARGET.fullmatch(found.target):
        raise exception.UnsafeDisk(
            f'{guest} has a disk with the name '
            f'"{exception.shown(found.target)}"')
    if [each.target for each in disks].count(found.target) > 1:
        raise exception.UnsafeDisk(
            f'{guest} has several disks with the name {found.target}')


def _parsed(xml: str) -> ElementTree.Element:
    # No guest and no tenant writes it.
    return ElementTree.fromstring(xml)  # nosec B314 # libvirt's own words


def _host_address(device: str) -> dict[str, str]:
    """Which device of the host it is; where the guest sees it may change."""
    address = _parsed(device).find('./source/address')
    return {} if address is None else dict(address.attrib)
