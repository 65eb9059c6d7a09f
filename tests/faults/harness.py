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

"""One fault after the other on real guests, and what came of each."""

import collections
import collections.abc
import contextlib
import os
import pathlib
import random
import shutil
import signal
import time

import libvirt

from nova_snapshot_ext import domain_records
from nova_snapshot_ext import undo
from tests.faults import command
from tests.faults import faults
from tests.faults import filesystems
from tests.faults import glance
from tests.faults import plan
from tests.faults import stepping
from tests.faults import subjects
from tests.functional import guests
from tests.functional import libvirtd

# Seconds
_LATER_S = 1.0
_CLEAN_TIMEOUT_S = 60.0
_SMALL = {'scratch': 160 * guests.MIB, 'staging': 160 * guests.MIB,
          'state': 4 * guests.MIB}


class Bench:
    """What all tries share: a libvirtd, guests, small file systems, a
    Glance, and the process that runs the command line.
    """

    def __init__(self) -> None:
        filesystems.keep_mounts_private()
        self._stack = contextlib.ExitStack()
        self.host = libvirtd.LibvirtFixture()
        self.host.setUp()
        self._stack.callback(self.host.cleanUp)
        self.libvirtd = self.host.libvirtd
        #: what the path of everything of a snapshot begins with
        self.work = self.libvirtd.path / 'work'
        self.work.mkdir()
        self.images = self.work / 'images'
        self.images.mkdir()
        self.filesystems = {}
        for name, size in _SMALL.items():
            made = filesystems.SmallFileSystem(
                self.libvirtd, f'work/{name}', size)
            self.filesystems[name] = made
            self._stack.callback(made.close)
        self.runner = command.Runner(self.libvirtd.path)
        self._stack.callback(lambda: self.runner.close())
        self.glance = glance.Glance(self.libvirtd.path / 'glance')
        self._stack.callback(lambda: self.glance.close())
        self.clouds = self.libvirtd.path / 'clouds.yaml'
        self.clouds.write_text(self.glance.clouds_yaml())
        self._subjects: dict[str, subjects.Subject] = {}
        self._awake: subjects.Subject | None = None
        #: seconds in which all has to be as it was
        self.patience_s = _CLEAN_TIMEOUT_S

    def subject(self, kind: str) -> subjects.Subject:
        """A guest, alone with the processor."""
        found = self._subjects.get(kind)
        if found is None or found is not self._awake:
            if self._awake is not None:
                self._awake.rest()
            self._awake = None
            if found is None:
                found = self._subjects[kind] = subjects.Subject(
                    self.host, subjects.KINDS[kind])
            else:
                found.wake()
            self._awake = found
        return found

    def give_up(self, kind: str) -> None:
        """Have another guest in place of one that was harmed."""
        found = self._subjects.pop(kind, None)
        if found is not None:
            if found is self._awake:
                self._awake = None
            found.close()

    def clear(self, kind: str) -> None:
        """Remove what nobody else does any more, and a guest with it."""
        self.runner.abandon()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.start_libvirtd()
        self.glance.go_on()
        self.glance.restart()
        self.glance.tell(forget=True, delete=True)
        self.give_up(kind)
        for small in self.filesystems.values():
            small.mend()
            for name in small.names():
                _remove(small.path / name)
        for path in self.images.iterdir():
            _remove(path)

    @contextlib.contextmanager
    def running(self, environment: dict[str, str],
                ) -> collections.abc.Iterator[None]:
        """Have command lines run in another environment."""
        self.runner.close()
        self.runner = command.Runner(self.libvirtd.path, environment)
        try:
            yield
        finally:
            self.runner.close()
            self.runner = command.Runner(self.libvirtd.path)

    @contextlib.contextmanager
    def patient(self, seconds: float) -> collections.abc.Iterator[None]:
        before, self.patience_s = self.patience_s, seconds
        try:
            yield
        finally:
            self.patience_s = before

    def start_libvirtd(self) -> None:
        """Start it after it was killed, and look every domain up anew."""
        self.libvirtd.start()
        if not self.host.connection.isAlive():
            self.host.connection = self.libvirtd.connect()
        for each in self._subjects.values():
            each.look_up()

    def configuration(self, scenario: plan.Scenario) -> pathlib.Path:
        path = self.libvirtd.path / f'{scenario.transfer}.conf'
        path.write_text(
            '[snapshot_ext]\n'
            f'state_directory = {self.filesystems["state"].path}\n'
            f'scratch_directory = {self.filesystems["scratch"].path}\n'
            f'transfers = {scenario.transfer}\n'
            # A mover that was stopped is waited for so long, and 30 s.
            'read_timeout = 10\n')
        return path

    def versions(self) -> str:
        """Of what the guests run on."""
        def words(number: int) -> str:
            return (f'{number // 10 ** 6}.{number // 1000 % 1000}.'
                    f'{number % 1000}')
        return (f'libvirt {words(self.host.connection.getLibVersion())}, '
                f'QEMU {words(self.host.connection.getVersion())}')

    def arguments(self, scenario: plan.Scenario, name: str) -> list[str]:
        to = (['--to', str(self.images)] if scenario.service == 'directory'
              else ['--to', 'glance', '--cloud', 'faults'])
        subject = self.subject(scenario.guest)
        return ['--connect', self.libvirtd.uri,
                '--config-file', str(self.configuration(scenario)),
                'create', subject.guest.uuid, *to, '--name', name,
                '--flow', scenario.flow,
                '--staging', str(self.filesystems['staging'].path),
                '--verify-hash', *(
                    ['--no-memory'] if scenario.guest == 'agent' else [])]

    def start(self, scenario: plan.Scenario, name: str) -> command.Command:
        return self.runner.start(
            self.arguments(scenario, name),
            {'OS_CLIENT_CONFIG_FILE': str(self.clouds)})

    # What is there of ours

    def processes(self) -> dict[int, str]:
        """Every process of a snapshot, and of what kind it is."""
        found = {}
        for pid, words in subjects.running():
            if any(str(self.work) in word for word in words):
                found[pid] = _kind(words)
        return found

    def left(self) -> list[str]:
        """What there is of a snapshot, beside its image and its guest."""
        found = [f'process {kind} {pid}'
                 for pid, kind in self.processes().items()]
        for name, small in self.filesystems.items():
            # Records of domain snapshots stay, and are looked at.
            found += [f'{name}: {each}' for each in small.names()
                      if each != domain_records.DIRECTORY]
        found += [f'images: {path.name}' for path in self.images.iterdir()
                  if path.name.startswith('.')]
        return found

    def recover(self, scenario: plan.Scenario) -> None:
        """What an operator does where nobody is left to undo anything.

        :raises AssertionError: if it fails
        """
        self._run(scenario, 'recover')

    def _run(self, scenario: plan.Scenario, *arguments: str) -> None:
        ended = self.runner.start([
            '--connect', self.libvirtd.uri, '--config-file',
            str(self.configuration(scenario)), *arguments], {})
        while ended.step() is not None:
            ended.go()
        if ended.code:
            raise AssertionError(self.runner.said())

    def delete_kept(self, scenario: plan.Scenario, uuid: str) -> int:
        """Delete the domain snapshots that a guest has, as they are deleted
        by whoever wants them no more.

        :returns: how many it had
        :raises AssertionError: if one can't be deleted
        """
        records = domain_records.Records(
            str(self.filesystems['state'].path), uuid)
        found = records.all()
        for record in found:
            if self.subject(scenario.guest).state() == 'gone':
                records.forget()
            else:
                self._run(scenario, 'delete', uuid, record.name)
        return len(found)

    def close(self) -> None:
        for each in self._subjects.values():
            with contextlib.suppress(Exception):
                each.close()
        self._stack.close()


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _kind(words: list[str]) -> str:
    if 'nova_snapshot_ext.guard' in words:
        return 'guard'
    if any(word.startswith('--token=') for word in words):
        return 'mover'
    if 'qemu-img' in words:
        return 'qemu-img'
    return os.path.basename(words[0])


class Trial:
    """One snapshot that is held at a step, and what comes of a fault there.

    What faults.Scene asks for.
    """

    moment: plan.Moment
    command: command.Command

    def __init__(self, bench: Bench, scenario: plan.Scenario,
                 seed: int) -> None:
        self.bench = bench
        self.scenario = scenario
        self.seed = seed
        self.random = random.Random(seed)
        self.subject = bench.subject(scenario.guest)
        self.libvirtd = bench.libvirtd
        self.glance = bench.glance
        self.filesystems = bench.filesystems
        self.name = f'image-{seed}'
        self._before = self.subject.guest.counter()
        #: the image was there before the fault came
        self._was_published = False
        self._wrong: list[str] = []

    def start_libvirtd(self) -> None:
        self.bench.start_libvirtd()

    def ours(self, kind: str) -> list[int]:
        return [pid for pid, found in self.bench.processes().items()
                if found == kind]

    # The walk

    def walk(self) -> list[plan.Moment]:
        """Take a snapshot with no fault, and note each step.

        :raises AssertionError: if it does not succeed
        """
        moments: list[plan.Moment] = []
        seen: collections.Counter[str] = collections.Counter()
        self.command = self.bench.start(self.scenario, self.name)
        while (name := self.command.step()) is not None:
            moments.append(plan.Moment(
                len(moments) + 1, name, seen[name], self.subject.state(),
                frozenset(self.bench.processes().values())))
            seen[name] += 1
            self.command.go()
        if self.command.code:
            raise AssertionError(
                f'{self.scenario} failed without a fault: '
                f'{self.bench.runner.said()}')
        self._delete_kept('complete')
        self._check_whole()
        return moments

    def _check_whole(self) -> None:
        image = self._image()
        wrong = [*self._wrong, *self.bench.left(),
                 *self.subject.harm(self._had, str(self.bench.work))]
        if image != 'complete' or wrong:
            raise AssertionError(
                f'{self.scenario} left without a fault: {image} {wrong}')

    @property
    def _had(self) -> str:
        return 'off' if self.subject.kind.off else 'running'

    # The fault

    def attempt(self, moment: plan.Moment, fault: faults.Fault,
                again: bool = True) -> plan.Try | None:
        """:param again: bring the guest back, and take the next snapshot

        :returns: what came of it, None if the step was not reached
        """
        self.moment = moment
        if not self._held_at(moment):
            self._image()
            return None
        fault.inject(self)
        self._let_end(fault)
        ended = time.monotonic()
        # Whoever is left of us may be stopped with its owner dead.
        for pid in self.ours('qemu-img'):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        by = 'itself' if not self.bench.left() else 'guard'
        leaves = fault.leaves_guest(moment, self._had)
        said = self.bench.runner.said()
        if self.command.code == stepping.FAILED:
            self._wrong.append(f'traceback: {said[-600:]}')
        if fault.mend is not faults.nothing:
            # The guest has to be whole although nothing was mended.
            self.subject.wait_state(
                'running' if leaves == 'transient' else leaves, 20)
            self._mend(fault)
            by = 'itself' if not self.bench.left() else by
        if self._wait_clean():
            by = 'recovery'
        seconds = time.monotonic() - ended
        self._wrong += self.bench.left()
        image = self._image(fault)
        self._delete_kept(image)
        harm = self._harm(leaves)
        if self.subject.unasked is not None:
            self._wrong.append(self.subject.unasked)
        if leaves == 'gone':
            # No guest is harmed; whoever has the disk then finds that.
            self._wrong += self.subject.harm_to_disk()
        if again:
            harm += self._restore()
            if not harm:
                self._next()
        return plan.Try(
            self.scenario, moment.number, moment.name, fault.name, self.seed,
            _word(self.command.code), by, image, round(seconds, 2),
            tuple(harm), tuple(self._wrong))

    def _delete_kept(self, image: str) -> None:
        """Delete the domain snapshot that stays with an image.

        :param image: what became of it
        """
        if self.scenario.flow != 'domain':
            return
        code = self.command.code
        try:
            kept = self.bench.delete_kept(
                self.scenario, self.subject.guest.uuid)
        except Exception as error:
            self._wrong.append(f'its snapshot can not be deleted: {error}')
            return
        if kept and image not in ('complete', 'none' if code == 0 else ''):
            self._wrong.append(f'a snapshot stays, and its image is {image}')
        if not kept and code == 0:
            self._wrong.append('its snapshot did not stay')

    def _held_at(self, moment: plan.Moment) -> bool:
        seen: collections.Counter[str] = collections.Counter()
        self.command = self.bench.start(self.scenario, self.name)
        while (name := self.command.step()) is not None:
            self._was_published |= name == 'published'
            if (name, seen[name]) == (moment.name, moment.again):
                return True
            seen[name] += 1
            self.command.go()
        return False

    def _let_end(self, fault: faults.Fault) -> None:
        """Let it go on to its end."""
        self.command.go()
        begun = time.monotonic()
        told = False
        while True:
            wait = command.STEP_TIMEOUT_S if told else max(
                0.0, begun + _LATER_S - time.monotonic())
            try:
                if self.command.step(wait) is None:
                    break
                self.command.go()
            except command.Stuck as error:
                if told:
                    self._wrong.append(f'the command line hangs: {error}')
                    self.command.signal()
                    continue
            if not told and time.monotonic() - begun >= _LATER_S:
                told = True
                fault.later(self)
        if not told:
            fault.later(self)
        self.bench.start_libvirtd()

    def _mend(self, fault: faults.Fault) -> None:
        try:
            fault.mend(self)
        except AssertionError as error:
            self._wrong.append(str(error))

    def _wait_clean(self) -> bool:
        """Wait until nothing is left.

        :returns: whether recovery was needed for that
        """
        recovered = False
        deadline = time.monotonic() + self.bench.patience_s
        while self.bench.left() and time.monotonic() < deadline:
            kinds = self.bench.processes().values()
            if 'guard' not in kinds and (
                    undo.logs_in(str(self.filesystems['state'].path))):
                recovered = True
                try:
                    self.bench.recover(self.scenario)
                except Exception as error:
                    self._wrong.append(f'recovery failed: {error}')
                    break
            time.sleep(0.1)
        return recovered

    def _harm(self, leaves: str) -> list[str]:
        try:
            return list(self.subject.harm(
                leaves, str(self.bench.work), self.bench.patience_s))
        except libvirt.libvirtError as error:
            return [f'it can not be looked at: {error}']

    def _restore(self) -> list[str]:
        try:
            self.subject.restore()
        except (AssertionError, libvirt.libvirtError) as error:
            return [f'it does not come back: {error}']
        return []

    def _next(self) -> None:
        """The next snapshot succeeds."""
        following = Trial(self.bench, self.scenario, self.seed)
        following.name = f'{self.name}-next'
        following.command = self.bench.start(self.scenario, following.name)
        try:
            while following.command.step() is not None:
                following.command.go()
            if following.command.code:
                raise AssertionError(self.bench.runner.said())
            following._delete_kept(following._image())
            if following._wrong:
                raise AssertionError(following._wrong)
        except (AssertionError, command.Stuck) as error:
            self._wrong.append(f'the next snapshot fails: {error}')

    # The image

    def _image(self, fault: faults.Fault | None = None) -> str:
        """What became of the image, which is then deleted."""
        if self.scenario.service == 'directory':
            found = self._image_in_directory()
        else:
            found = self._image_in_glance(fault)
        deleted = (found == 'none' and self._was_published
                   and fault is faults.BY_NAME['Glance deletes the image'])
        if self.command.code == 0 and found != 'complete' and not deleted:
            self._wrong.append(f'it succeeded, and the image is {found}')
        return found

    def _image_in_directory(self) -> str:
        path = self.bench.images / f'{self.name}.qcow2'
        found = 'none'
        if path.exists():
            found = self._checked(path)
        for left in self.bench.images.iterdir():
            left.unlink()
        return found

    def _image_in_glance(self, fault: faults.Fault | None) -> str:
        self.glance.restart()
        images = self.glance.tell(forget=True)
        found = 'none'
        for image in images:
            if image['status'] == 'active':
                found = self._checked(self.glance.image)
            else:
                found = 'queued'
        # Who is dead, or is refused, deletes nothing.
        if found == 'queued' and self.command.code == 1 and (
                fault is None or fault.name in (
                    'Glance answers 409', 'Glance answers 413',
                    'Glance cuts the connection')):
            self._wrong.append('the image was not deleted')
        self.glance.tell(delete=True)
        return found

    def _checked(self, path: pathlib.Path) -> str:
        try:
            self.subject.check_image((path, 'qcow2'), self._before,
                                     self.subject.guest.counter())
        except (AssertionError, ValueError) as error:
            kept = self.bench.libvirtd.path / f'wrong-{self.name}'
            shutil.copy(path, kept)
            self._wrong.append(f'the image is wrong: {error}')
            return 'wrong'
        return 'complete'


def _word(code: int | None) -> str:
    """How a command line ended."""
    if code is None:
        return 'unknown'
    if code < 0:
        return signal.Signals(-code).name
    return {0: 'done', 1: 'failed', 3: 'refused', 4: 'no domain',
            5: 'busy'}.get(code, f'exit code {code}')


def applicable(moments: dict[plan.Scenario, list[plan.Moment]],
               wanted: collections.abc.Callable[[plan.Scenario, str], bool],
               ) -> list[tuple[plan.Scenario, plan.Moment, faults.Fault]]:
    """Every cell of the table that there is."""
    return [
        (scenario, moment, fault)
        for scenario, found in moments.items()
        for fault in faults.FAULTS
        if fault.service == scenario.service
        and wanted(scenario, fault.name)
        for moment in found if fault.applies(moment)]
