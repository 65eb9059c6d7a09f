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

"""What is known of the domain snapshots in a guest's disks.

One JSON file for each, in a directory of the guest below the state directory,
and one that says which of them the guest's state descends from. libvirt's own
metadata of a snapshot would keep Nova from undefining and from migrating the
domain; so libvirt has none but for the moment of a rollback, and this is where
they come from then. Written under another name, flushed and renamed, so that a
file is whole whenever it is there.
"""

import contextlib
import dataclasses
import enum
import json
import os
import re
import secrets
import shutil
import typing

from nova_snapshot_ext import exception
from nova_snapshot_ext import rights
from nova_snapshot_ext import undo

VERSION = 1
DIRECTORY = 'domain-snapshots'
_SUFFIX = '.json'
_CURRENT = 'current'
_NAME = re.compile('snapshot-ext-[0-9a-f]{32}')
_UUID = re.compile('[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}')


class Rollback(enum.Enum):
    """What a domain snapshot gives back."""

    #: its disks and its memory: it goes on where it was
    MEMORY = 'memory'
    #: its disks: it boots from them
    DISK = 'disk'


@dataclasses.dataclass(frozen=True)
class Files:
    """What an external snapshot is made of, beside the files of its disks."""

    #: format of the file of each disk, by target
    formats: dict[str, str]
    #: path of the file with its memory, '' if that is no part of it
    memory: str = ''


@dataclasses.dataclass(frozen=True)
class Record:
    """One domain snapshot that is in the disks of a guest."""

    #: of the internal snapshots, and libvirt's; of an external one, what the
    #: names of the overlays begin with that were made for it
    name: str
    #: the domain's
    uuid: str
    #: of the image that was made of the same instant: its id in Glance, or
    #: the path of its file
    image_id: str
    #: what whoever took it called it
    title: str
    #: the name of the one that the guest's state descended from
    parent: str | None
    rollback: Rollback
    #: ISO 8601, UTC
    taken_at: str
    #: path of each disk that is in it, by target; of an external one, the
    #: file that nobody writes to any more
    disks: dict[str, str]
    #: the size of each of them in bytes, by target
    capacities: dict[str, int]
    #: the domain as it was then; within libvirt's ``<domainsnapshot>`` where
    #: memory can be rolled back
    domain_xml: str
    #: ``<cpu>`` of the host where the guest was given it as it is, else ''
    host_cpu: str = ''
    #: what the caller wanted kept; of JSON's types
    extra: dict[str, typing.Any] = dataclasses.field(default_factory=dict)
    #: None of an internal one
    files: Files | None = None

    @property
    def external(self) -> bool:
        return self.files is not None


class Records:
    """The records of one guest. Changed by who holds its undo log only."""

    def __init__(self, state_directory: str, uuid: str) -> None:
        """:param state_directory: where undo logs are kept

        :param uuid: the domain's
        """
        if not _UUID.fullmatch(uuid):
            raise ValueError(f'{uuid} is not the UUID of a domain')
        self.state_directory = state_directory
        self.uuid = uuid
        self.directory = os.path.join(state_directory, DIRECTORY, uuid)

    def all(self) -> list[Record]:
        """Every record, the oldest first.

        :raises SnapshotError: if one can't be understood
        """
        found = []
        for name in self._names():
            # Somebody else may have dropped it meanwhile.
            with contextlib.suppress(FileNotFoundError):
                found.append(self._read(name))
        return sorted(
            found, key=lambda record: (record.taken_at, record.name))

    def readable(self) -> list[Record]:
        """Those that can be read and understood, in no order."""
        found = []
        for name in self._names():
            with contextlib.suppress(exception.SnapshotError, OSError):
                found.append(self._read(name))
        return found

    def find(self, which: str) -> Record | None:
        """The newest one that an image's id, a name or a title stands for."""
        records = self.all()
        for attribute in ('image_id', 'name', 'title'):
            for record in reversed(records):
                if getattr(record, attribute) == which:
                    return record
        return None

    def named(self, name: str | None) -> Record | None:
        """The one of a name, None if there is none."""
        # Whatever becomes of the others.
        if name is None or not _NAME.fullmatch(name):
            return None
        try:
            return self._read(name)
        except FileNotFoundError:
            return None

    @property
    def current(self) -> str | None:
        """The name of the one that the guest's state descends from."""
        try:
            with open(os.path.join(self.directory, _CURRENT)) as file:
                name = file.read().strip()
        except FileNotFoundError:
            return None
        return name if name in self._names() else None

    def set_current(self, name: str | None) -> None:
        path = os.path.join(self.directory, _CURRENT)
        if name is not None:
            self._write(path, name + '\n')
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def add(self, record: Record) -> None:
        """Keep one; the guest's state descends from it from now on."""
        self.replace(record)
        self.set_current(record.name)

    def replace(self, record: Record) -> None:
        """Write one anew that is there; the guest's state is where it is."""
        fields = {'domain_snapshot': VERSION, **dataclasses.asdict(record),
                  'rollback': record.rollback.value}
        if record.files is None:
            # As before there were others.
            del fields['files']
        self._write(self._path(record.name), json.dumps(fields, indent=1))

    def remove(self, name: str) -> None:
        """Drop one; what descends from it descends from its parent then.

        One that is not there is dropped already. The directory goes with the
        last one.
        """
        if name in self._names():
            gone = self._read(name)
            for record in self.readable():
                if record.parent == name:
                    self.replace(dataclasses.replace(
                        record, parent=gone.parent))
            if self.current == name:
                self.set_current(gone.parent)
            os.unlink(self._path(name))
        if not self._names():
            self.forget()

    def forget(self) -> None:
        """Drop all: the guest is gone, or its disks are others by now."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.directory)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(self.directory))

    def _names(self) -> list[str]:
        try:
            found = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        return [name.removesuffix(_SUFFIX) for name in found
                if name.endswith(_SUFFIX)
                and _NAME.fullmatch(name.removesuffix(_SUFFIX))]

    def _path(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f'{name} is not a snapshot of ours')
        return os.path.join(self.directory, name + _SUFFIX)

    def _read(self, name: str) -> Record:
        path = self._path(name)
        try:
            with open(path) as file:
                fields = json.load(file)
            if fields.pop('domain_snapshot') != VERSION:
                raise ValueError(f'this is for version {VERSION}')
            files = fields.get('files')
            return Record(**fields | {
                'rollback': Rollback(fields['rollback']),
                'files': None if files is None else Files(**files)})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise exception.SnapshotError(
                f'{path} is not the record of a domain snapshot: {error}'
            ) from error

    def _write(self, path: str, content: str) -> None:
        new = f'{path}.{secrets.token_hex(4)}'
        try:
            descriptor = self._create(new)
        except (FileNotFoundError, exception.NotOurs):
            # Whoever dropped another guest's last one dropped what all are
            # in, between two of our steps.
            descriptor = self._create(new)
        with open(descriptor, 'w') as file:
            undo.give_to_owner_of(self.directory, descriptor)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.rename(new, path)
        undo.flush_directory(self.directory)

    def _create(self, path: str) -> int:
        for directory in (os.path.dirname(self.directory), self.directory):
            if not os.path.isdir(directory):
                _make_directory(directory)
        return os.open(
            path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _make_directory(path: str) -> None:
    """Whoever makes it first, it belongs to whom the state directory does."""
    parent = os.path.dirname(path)
    rights.make_passable(parent)
    with contextlib.suppress(FileExistsError):
        if os.geteuid() == 0:
            rights.make_owners(path)
        else:
            os.mkdir(path, mode=rights.PASSABLE)
    undo.flush_directory(parent)


def uuids(state_directory: str) -> list[str]:
    """The UUID of every domain that has records."""
    try:
        found = os.listdir(os.path.join(state_directory, DIRECTORY))
    except FileNotFoundError:
        return []
    return sorted(name for name in found if _UUID.fullmatch(name))
