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

"""A guest whose disks are files with overlays, and what is in them.

Each file is a dict of what was written to it, so that it can be told what a
guest reads through a chain. Whoever works on it can be killed at any moment.
"""

import collections.abc
import json
import os
import typing
from xml.etree import ElementTree

import libvirt

from nova_snapshot_ext import exception
from tests.unit import base
from tests.unit import fakes

Content = dict[int, str]


class Killed(BaseException):
    """The process is dead: nothing more is done."""


class Files:
    """Files by their paths, and qemu-img."""

    def __init__(self, journal: fakes.Journal) -> None:
        self.journal = journal
        self.content: dict[str, Content] = {}
        self.bases: dict[str, tuple[str, str]] = {}
        #: paths that QEMU has open, and those of them that it writes to
        self.opened: collections.abc.Callable[
            [], tuple[set[str], set[str]]] = lambda: (set(), set())
        #: events until the process is killed, None if it is not
        self.left: int | None = None
        self.dead = False

    def event(self, words: str) -> None:
        """Something is about to happen.

        :raises Killed: if the process is dead by then
        """
        if self.left is not None:
            self.left -= 1
            self.dead = self.dead or self.left < 0
        if self.dead:
            raise Killed(words)
        self.journal.append(words)

    def read(self, path: str) -> Content:
        """What is read through a chain."""
        below = self.read(self.bases[path][0]) if path in self.bases else {}
        return below | self.content[path]

    def make(self, path: str, fmt: str) -> None:
        with open(path, 'wb') as file:
            file.write(base.qcow2_header() if fmt == 'qcow2' else b'raw')
        self.content[path] = {}

    def commit(self, top: str) -> None:
        self.content[self.bases[top][0]].update(self.content[top])

    def run(self, *arguments: str, **more: object) -> str:
        """qemu-img."""
        action, name = arguments[0], _path(arguments[-1])
        opened, written = self.opened()
        if action == 'info':
            shared = 'force-share' in arguments[-1]
            if name in written and not shared:
                raise exception.CommandFailed('Failed to get a lock')
            found: dict[str, typing.Any] = {'filename': name}
            if name in self.bases:
                found |= {'full-backing-filename': self.bases[name][0],
                          'backing-filename-format': self.bases[name][1]}
            return json.dumps(found)
        self.event(f'qemu-img {action}')
        if action == 'create':
            path = arguments[-2]
            assert '-u' in arguments and not os.path.exists(path), arguments
            self.make(path, 'qcow2')
            self._base(path, arguments)
            return ''
        assert name not in opened, f'{name} is in use'
        if action == 'commit':
            options = json.loads(arguments[-1].removeprefix('json:'))
            below = self.bases[name][0]
            assert below not in opened, f'{below} is in use'
            assert options['backing']['file']['filename'] == below
            assert '-d' in arguments
            self.commit(name)
        else:
            assert action == 'rebase' and '-u' in arguments, arguments
            before = self.read(name)
            self._base(name, arguments)
            assert before == self.read(name), 'it reads something else now'
        return ''

    def _base(self, path: str, arguments: tuple[str, ...]) -> None:
        self.bases[path] = (arguments[arguments.index('-b') + 1],
                            arguments[arguments.index('-F') + 1])


def _path(name: str) -> str:
    if not name.startswith('json:'):
        return name
    path: str = json.loads(name.removeprefix('json:'))['file']['filename']
    return path


class Saved(typing.NamedTuple):
    """Memory in a file: the disks that belong to it, and what they held."""

    disks: dict[str, tuple[str, str]]
    held: dict[str, Content]
    state: list[int]


class OverlayDomain(fakes.FakeDomain):
    """A domain whose live disks and definition are told apart."""

    def __init__(self, files: Files) -> None:
        super().__init__(files.journal)
        self.files = files
        files.opened = self._opened
        self.live: dict[str, tuple[str, str]] = {}
        self.defined: dict[str, tuple[str, str]] = {}
        self.memories: dict[str, Saved] = {}
        self.managed: Saved | None = None
        self.commits: dict[str, tuple[str, bool]] = {}
        self.connection = Connection(self)
        #: what libvirt takes for live, where it died and is wrong
        self.stale: dict[str, tuple[str, str]] | None = None
        #: fails a restore
        self.spoilt = False
        #: a write of its own before each look at it
        self.writes = 0

    @property
    def is_up(self) -> bool:
        return self.current_state[0] != libvirt.VIR_DOMAIN_SHUTOFF

    @property
    def made_of(self) -> dict[str, tuple[str, str]]:
        return self.live if self.is_up else self.defined

    def add_disk(self, target: str, path: str, fmt: str) -> None:
        self.files.make(path, fmt)
        self.live[target] = self.defined[target] = (path, fmt)

    def write(self, words: str) -> None:
        """Write to its disks, each time to one place more."""
        self.writes += 1
        for path, _ in self.live.values():
            self.files.content[path] |= {0: words, self.writes: words}

    def reads(self) -> dict[str, Content]:
        return {target: self.files.read(path)
                for target, (path, _) in self.made_of.items()}

    def _opened(self) -> tuple[set[str], set[str]]:
        if not self.is_up:
            return set(), set()
        written = {path for path, _ in self.live.values()}
        opened = set(written)
        for path in written:
            while path in self.files.bases:
                path = self.files.bases[path][0]
                opened.add(path)
        return opened, written

    def _called(self, name: str, *arguments: object) -> None:
        self.files.event(' '.join((name, *map(str, arguments))))
        self._may_fail(name)

    # Its XML

    def XMLDesc(self, flags: int) -> str:
        inactive = flags & libvirt.VIR_DOMAIN_XML_INACTIVE or not self.is_up
        disks = self.defined if inactive else self.stale or self.live
        self.disks = ''.join(
            fakes.disk_xml(path, fmt, target,
                           inside='' if inactive else self._store(path)
                           + self._mirror(target))
            for target, (path, fmt) in disks.items())
        return super().XMLDesc(flags)

    def _store(self, path: str) -> str:
        if path not in self.files.bases:
            return '<backingStore/>'
        below, fmt = self.files.bases[path]
        return (f'<backingStore type="file"><format type="{fmt}"/>'
                f'<source file="{below}"/>{self._store(below)}'
                f'</backingStore>')

    def _mirror(self, target: str) -> str:
        top, active = self.commits.get(target, ('', False))
        if self.stale is not None and (
                self.stale[target] != self.live[target]):
            top, active = self.stale[target][0], True
        if not active:
            return ''
        return (f'<mirror type="file" job="active-commit" ready="yes">'
                f'<source file="{self.files.bases[top][0]}"/></mirror>')

    def monitor(self, domain: object, request: str, flags: int) -> str:
        """QEMU's, which knows what is live."""
        found = []
        if not self.is_up:
            raise fakes.libvirt_error(
                libvirt.VIR_ERR_OPERATION_INVALID, 'domain is not running')
        if json.loads(request)['execute'] == 'query-block':
            for path, _ in self.live.values():
                found.append({'inserted': {'image': self._image(path)}})
        return json.dumps({'return': found})

    def _image(self, path: str) -> dict[str, typing.Any]:
        below = self.files.bases.get(path)
        return {'filename': path} | (
            {} if below is None else {'backing-image': self._image(below[0])})

    # What is done to it

    def snapshotCreateXML(self, xml: str, flags: int) -> None:
        assert flags & libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        assert flags & libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
        root = ElementTree.fromstring(xml)
        self._called('snapshotCreateXML')
        memory = root.find('./memory')
        assert memory is not None
        if memory.get('snapshot') == 'external':
            self.memories[memory.get('file', '')] = Saved(
                dict(self.live), self.reads(), self.current_state)
            with open(memory.get('file', ''), 'wb'):
                pass
        for element in root.findall('./disks/disk'):
            if element.get('snapshot') != 'external':
                continue
            target = element.get('name', '')
            source = element.find('source')
            assert source is not None
            path = source.get('file', '')
            assert self.files.bases[path] == self.live[target]
            self.live[target] = self.defined[target] = (path, 'qcow2')

    def blockCommit(self, target: str, under: str, top: str, bandwidth: int,
                    flags: int) -> None:
        active = bool(flags & libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
        self._called('blockCommit', target, 'active' if active else '')
        if self.stale is not None and (
                self.stale[target] != self.live[target]):
            raise fakes.libvirt_error(
                libvirt.VIR_ERR_OPERATION_INVALID, 'block copy still active')
        assert active == (self.live[target][0] == top)
        assert self.files.bases[top][0] == under
        self.files.commit(top)
        self.commits[target] = (top, active)

    def blockJobInfo(self, target: str, flags: int) -> dict[str, int]:
        if target not in self.commits:
            return {}
        top, active = self.commits[target]
        if active:
            return {'type': 4}
        # It ends by itself.
        del self.commits[target]
        for path, (below, _) in list(self.files.bases.items()):
            if below == top and path in self._opened()[0]:
                self.files.bases[path] = self.files.bases[top]
        return {'type': 3}

    def blockJobAbort(self, target: str, flags: int) -> None:
        self._called('pivot', target)
        assert flags == libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT
        top, active = self.commits.pop(target)
        assert active
        self.files.commit(top)
        # libvirt leaves a definition alone that is of something else.
        if self.defined[target] == self.live[target]:
            self.defined[target] = self.files.bases[top]
        self.live[target] = self.files.bases[top]
        if self.stale is not None:
            self.stale[target] = self.live[target]

    def managedSave(self, flags: int) -> None:
        saved = Saved(dict(self.live), self.reads(), self.current_state)
        super().managedSave(flags)
        self.managed = saved

    def managedSaveGetXMLDesc(self, flags: int = 0) -> str:
        assert self.managed is not None
        return _disks_xml(self.managed.disks)

    def createWithFlags(self, flags: int) -> None:
        for path, _ in (() if self.managed_save else self.defined.values()):
            if path not in self.files.content:
                raise fakes.libvirt_error(
                    libvirt.VIR_ERR_INTERNAL_ERROR,
                    f"Cannot access storage file '{path}'")
        saved = self.managed if self.managed_save else None
        super().createWithFlags(flags)
        self.managed = None
        self.live = dict(self.defined if saved is None else saved.disks)
        if saved is not None:
            assert self.reads() == saved.held, 'old memory, newer disks'


class Connection(fakes.FakeConnection):
    """What is defined and restored by a connection."""

    def __init__(self, domain: OverlayDomain) -> None:
        super().__init__(domain)
        self._domain = domain

    def defineXML(self, xml: str) -> None:
        self._domain._called('define')
        self._domain.defined = _disks_of(xml)

    def saveImageGetXMLDesc(self, path: str, flags: int = 0) -> str:
        return _disks_xml(self._domain.memories[path].disks)

    def restoreFlags(self, path: str, xml: str, flags: int = 0) -> None:
        domain = self._domain
        domain._called('restore')
        assert not domain.is_up
        if domain.spoilt:
            raise fakes.libvirt_error(libvirt.VIR_ERR_OPERATION_FAILED)
        saved = domain.memories[path]
        domain.number += 1
        domain.live = _disks_of(xml)
        domain.current_state = list(saved.state)
        assert domain.reads() == saved.held, 'old memory, other disks'


def _disks_xml(disks: dict[str, tuple[str, str]]) -> str:
    words = ''.join(fakes.disk_xml(path, fmt, target)
                    for target, (path, fmt) in disks.items())
    return f'<domain><devices>{words}</devices></domain>'


def _disks_of(xml: str) -> dict[str, tuple[str, str]]:
    found = {}
    for element in ElementTree.fromstring(xml).findall('./devices/disk'):
        source, driver, target = map(
            element.find, ('source', 'driver', 'target'))
        assert source is not None and driver is not None
        assert target is not None
        found[target.get('dev', '')] = (
            source.get('file', ''), driver.get('type', ''))
    return found
