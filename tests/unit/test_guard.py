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

import io
import os
import signal
import sys
import time
import typing

import fixtures
import libvirt

from nova_snapshot_ext import exception
from nova_snapshot_ext import guard
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import undo
from nova_snapshot_ext import workspace
from tests.unit import base
from tests.unit import fakes

#: libvirt's test driver, and the domain that it has
TEST_URI = 'test:///default'

journal = fakes.Journal()
pipes: list[int] = []
errors: list[Exception] = []


#: what of a domain makes it worth to be listened to
CHANNEL = "<channel><target name='org.qemu.guest_agent.0'/></channel>"


class ListenedTo(fakes.FakeConnection):
    """A connection with events."""

    alive = True
    call: typing.Any = None

    def isAlive(self) -> bool:
        return self.alive

    def domainEventRegisterAny(
            self, domain: fakes.FakeDomain, event: int, call: typing.Any,
            more: object) -> None:
        assert event == libvirt.VIR_DOMAIN_EVENT_ID_REBOOT
        self.call = call

    def reset(self) -> None:
        self.call(self, self.domains[0], None)


@undo.step
def demo_guard_step(around: undo.Surroundings, what: str) -> None:
    """Write down that it was run; the owner dies of ``last``."""
    journal.append(what)
    if what == 'last':
        os.close(pipes.pop())
    if what == 'failing' and errors:
        raise errors.pop()


class GuardTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        journal.clear()
        errors.clear()
        self.patch_name('nova_snapshot_ext.undo.uptime', lambda: 100.0)
        self.patch_name('nova_snapshot_ext.guard._POLL_S', 0.001)
        self.patch_name('nova_snapshot_ext.guard._RETRY_S', 0.001)
        self.patch_name(
            'nova_snapshot_ext.guard.find_guest',
            lambda uri, uuid: self.guest)
        self.log = self.new_log()
        self.resets = guard.Resets(self.log.path)
        self.patch(self.resets, 'listen', lambda: None)

    def open_pipe(self) -> None:
        reading, writing = os.pipe()
        pipes.append(writing)
        self.patch_name('sys.stdin', os.fdopen(reading))
        self.addCleanup(sys.stdin.close)
        self.answer = io.BytesIO()
        self.patch_name('sys.stdout', io.TextIOWrapper(self.answer))


class TestStandGuard(GuardTestCase):

    def stand(self) -> None:
        self.open_pipe()
        guard._stand_guard(self.log.path, self.resets)

    def test_it_says_when_it_stands(self) -> None:
        self.log.push(demo_guard_step, -1.0, what='last')
        self.stand()
        self.assertEqual(b'r', self.answer.getvalue())

    def test_overdue_undo_does_not_wait_for_its_owner(self) -> None:
        self.log.push(demo_guard_step, -1.0, what='last')
        self.log.push(demo_guard_step, -1.0, what='late')
        self.stand()
        self.assertEqual(['late', 'last'], journal)

    def test_what_is_not_overdue_is_left_to_its_owner(self) -> None:
        self.log.push(demo_guard_step, -1.0, what='last')
        self.log.push(demo_guard_step, what='never')
        self.log.push(demo_guard_step, 5.0, what='in time')
        self.stand()
        self.assertEqual(['last'], journal)

    def test_owner_still_finds_what_was_run(self) -> None:
        self.log.push(demo_guard_step, -1.0, what='last')
        self.stand()
        self.assertEqual(1, self.log.pending)
        self.assertEqual(1, len(undo.read(self.log.path).pending))

    def test_overdue_undo_that_fails_is_tried_again(self) -> None:
        errors.append(exception.SnapshotError('no'))
        self.log.push(demo_guard_step, -1.0, what='last')
        self.log.push(demo_guard_step, -1.0, what='failing')
        self.patch_name('tests.unit.test_guard.pipes', pipes)
        real = guard.undo.read
        reads: list[int] = []

        def read(path: str) -> undo.Contents:
            found = real(path)
            reads.append(1)
            if len(reads) < 3:
                found.pending.pop(1, None)
            return found
        self.patch_name('nova_snapshot_ext.undo.read', read)
        self.stand()
        self.assertEqual(['failing', 'failing', 'last'], journal)

    def late(self, *outcomes: Exception | None) -> list[float]:
        """Have an undo be late, and give up after an hour.

        :returns: when it was run
        """
        self.now = 0.0
        self.patch_name('time.monotonic', lambda: self.now)
        self.patch_name('nova_snapshot_ext.guard._RETRY_S', 1.0)
        ran: list[float] = []
        left = list(outcomes)

        def run(pending: undo.Pending, around: undo.Surroundings) -> None:
            ran.append(self.now)
            outcome = left.pop(0) if len(left) > 1 else left[0]
            if outcome is not None:
                raise outcome

        def wait(*arguments: object) -> tuple[list[object], ...]:
            self.now += 0.25
            return ([self.now] if self.now > 3600 else [], [], [])
        self.patch_name('nova_snapshot_ext.undo.Pending.run', run)
        self.patch_name('select.select', wait)
        self.log.push(demo_guard_step, -1.0, what='thaw')
        self.stand()
        os.close(pipes.pop())
        return ran

    def test_agent_that_is_dead_is_asked_less_and_less_and_then_no_more(
            self) -> None:
        ran = self.late(exception.UndoFailed('no agent'))
        gaps = [after - before for before, after in zip(ran, ran[1:])]
        self.assertEqual(sorted(gaps), gaps)
        self.assertEqual((1.0, 60.0), (gaps[0], gaps[-1]))
        self.assertLess(len(ran), 25)
        self.assertTrue(600 <= ran[-1] <= 661, ran)
        self.assertIn('is left to its owner', self.output.output)

    def test_late_undo_is_run_once(self) -> None:
        self.assertEqual(2, len(self.late(
            exception.UndoFailed('no agent'), None)))

    def test_log_that_is_gone_is_waited_out(self) -> None:
        self.open_pipe()
        self.log.unwind()
        real = guard.undo.read

        def read(path: str) -> undo.Contents:
            os.close(pipes.pop())
            return real(path)
        self.patch_name('nova_snapshot_ext.undo.read', read)
        guard._stand_guard(self.log.path, self.resets)
        self.assertEqual([], pipes)

    def test_late_undo_hears_of_a_reset(self) -> None:
        self.resets._at = 7.0
        self.log.push(demo_guard_step, -1.0, what='last')
        around: list[undo.Surroundings] = []
        real = undo.Pending.run

        def run(pending: undo.Pending, given: undo.Surroundings) -> None:
            around.append(given)
            real(pending, given)
        self.patch_name('nova_snapshot_ext.undo.Pending.run', run)
        self.stand()
        self.assertEqual([7.0], [each.reset_at for each in around])


class TestResets(GuardTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.domain.devices = CHANNEL
        self.connection = ListenedTo(self.domain)
        self.opened = 0
        self.patch_name('libvirt.open', self.open)
        self.patch_name('nova_snapshot_ext.guard.run_event_loop',
                        lambda: None)
        self.now = 0.0
        self.patch_name('time.monotonic', lambda: self.now)
        self.resets = guard.Resets(self.log.path)

    def open(self, uri: str) -> 'ListenedTo':
        self.opened += 1
        return self.connection

    def listen(self, times: int = 3) -> None:
        for _ in range(times):
            self.resets.listen()
            self.now += 1.0

    def test_reset_is_seen_and_told(self) -> None:
        self.open_pipe()
        self.listen()
        self.assertEqual(1, self.opened)
        self.assertIsNone(self.resets.at())
        self.connection.reset()
        self.assertEqual(100.0, self.resets.at())
        self.assertEqual(b'100.0\n', self.answer.getvalue())
        # Nobody may listen any more.
        self.answer.close()
        self.connection.reset()
        os.close(pipes.pop())

    def test_broken_connection_is_made_anew(self) -> None:
        self.listen()
        self.connection.alive = False
        self.listen(1)
        self.assertEqual(2, self.opened)

    def test_event_that_was_refused_is_asked_for_again(self) -> None:
        register = self.connection.domainEventRegisterAny

        def refuse(*arguments: object) -> None:
            self.connection.domainEventRegisterAny = (  # type: ignore
                register)
            raise fakes.libvirt_error(libvirt.VIR_ERR_INTERNAL_ERROR)
        self.connection.domainEventRegisterAny = refuse  # type: ignore
        self.listen()
        self.assertEqual(2, self.opened)
        self.connection.reset()
        self.assertIsNotNone(self.resets.at())

    def test_guest_without_an_agent_is_not_listened_to(self) -> None:
        self.domain.devices = ''
        self.listen()
        self.assertEqual(1, self.opened)
        self.assertTrue(self.connection.closed)
        self.assertIsNone(self.connection.call)

    def test_libvirt_that_is_away_is_asked_once_a_second(self) -> None:
        def refuse(uri: str) -> None:
            self.opened += 1
            raise fakes.libvirt_error(libvirt.VIR_ERR_NO_CONNECT)
        self.patch_name('libvirt.open', refuse)
        self.listen()
        self.resets.listen()
        self.resets.listen()
        self.assertEqual(4, self.opened)

    def test_guest_or_log_that_is_gone_is_no_error(self) -> None:
        self.domain.gone()
        self.listen()
        self.domain.connection.domains = ()
        self.connection.domains = ()
        self.listen()
        self.log.unwind()
        self.connection.alive = False
        self.listen()
        self.assertIsNone(self.resets.at())


class TestBringBack(GuardTestCase):

    def bring_back(self) -> bool:
        return guard.bring_back(
            self.log.path, guard.find_guest, guard.GuardHost())

    def test_dead_owners_guest_is_brought_back(self) -> None:
        self.log.push(demo_guard_step, what='one')
        self.log.push(demo_guard_step, what='two')
        self.log.close()
        self.assertTrue(self.bring_back())
        self.assertEqual(['two', 'one'], journal)
        self.assertFalse(os.path.exists(self.log.path))

    def test_finished_owner_leaves_nothing_to_do(self) -> None:
        self.log.unwind()
        self.assertTrue(self.bring_back())

    def test_failed_undo_is_tried_again(self) -> None:
        errors.append(exception.SnapshotError('no'))
        self.log.push(demo_guard_step, what='failing')
        self.log.close()
        self.assertTrue(self.bring_back())
        self.assertEqual(['failing', 'failing'], journal)

    def test_owner_that_dies_lets_go_of_its_log_in_a_moment(self) -> None:
        waits: list[float] = []

        def wait(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 3:
                self.log.close()
        self.patch_name('time.sleep', wait)
        self.patch_name('nova_snapshot_ext.guard._RETRY_S', 1.0)
        self.log.push(demo_guard_step, what='one')
        self.assertTrue(self.bring_back())
        self.assertEqual([0.05, 1.0, 1.5], waits)

    def test_reset_that_was_seen_is_told_to_each_undo(self) -> None:
        seen: list[float | None] = []
        real = undo.UndoLog.adopt

        def adopt(kind: type[undo.UndoLog], *arguments: typing.Any,
                  **more: typing.Any) -> undo.UndoLog:
            found = real(*arguments, **more)
            seen.append(found.surroundings.reset_at)
            return found
        self.patch_name('nova_snapshot_ext.undo.UndoLog.adopt', adopt)
        errors.append(exception.SnapshotError('no'))
        self.log.push(demo_guard_step, what='failing')
        self.log.close()
        times = [None, 7.0]
        self.assertTrue(guard.bring_back(
            self.log.path, guard.find_guest, guard.GuardHost(),
            lambda: times.pop(0)))
        self.assertEqual([None, 7.0], seen)

    def test_libvirt_that_comes_back_is_waited_for(self) -> None:
        self.log.push(demo_guard_step, what='one')
        self.log.close()
        answers: list[object] = [
            fakes.libvirt_error(libvirt.VIR_ERR_NO_CONNECT), self.guest]

        def find(uri: str, uuid: str) -> object:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        self.patch_name('nova_snapshot_ext.guard.find_guest', find)
        self.assertTrue(self.bring_back())
        self.assertEqual(['one'], journal)

    def test_what_can_not_be_done_is_left_for_the_next_start(self) -> None:
        self.patch_name('nova_snapshot_ext.guard._RETRY_TIMEOUT_S', -1.0)
        errors.append(exception.SnapshotError('no'))
        self.log.push(demo_guard_step, what='failing')
        self.log.close()
        self.assertFalse(self.bring_back())
        self.assertTrue(os.path.exists(self.log.path))

    def test_log_that_makes_no_sense_is_kept(self) -> None:
        self.log.close()
        with open(self.log.path, 'w') as file:
            file.write('{}\n')
        self.assertFalse(self.bring_back())
        self.assertTrue(os.path.exists(self.log.path))


class TestGuardHost(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.now = 0.0
        self.patch_name('time.monotonic', lambda: self.now)
        self.host_ = guard.GuardHost()

    def test_guest_is_started_soon_after_it_could_be(self) -> None:
        # Its memory was being saved for so long.
        self.now = 500.0
        for self.now in 500.0, 619.0:
            with self.host_.may_start() as allowed:
                self.assertTrue(allowed)
        self.now = 621.0
        self.assertRaisesRegex(exception.UndoFailed, 'for Nova to say',
                               self.host_.may_start)

    def test_disk_is_written_to_soon_after_it_could_be(self) -> None:
        self.now = 500.0
        for self.now in 500.0, 619.0:
            with self.host_.undisturbed():
                pass
        self.now = 621.0
        self.assertRaisesRegex(exception.UndoFailed, 'for Nova to say',
                               self.host_.undisturbed)

    def test_guest_that_is_up_is_resumed_at_any_time(self) -> None:
        with self.host_.may_start():
            self.now = 3000.0
        with self.host_.may_resume() as allowed:
            self.assertTrue(allowed)


class TestFindGuest(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.patch_name('libvirt.open',
                        lambda uri: self.domain.connection)

    def test_guest_is_found(self) -> None:
        found = guard.find_guest(fakes.URI, fakes.UUID)
        self.assertEqual(fakes.UUID, found and found.uuid)

    def test_guest_that_is_gone_is_none(self) -> None:
        self.domain.connection.domains = ()
        self.assertIsNone(guard.find_guest(fakes.URI, fakes.UUID))

    def test_libvirt_that_is_gone_is_no_missing_guest(self) -> None:
        def refuse(uri: str) -> None:
            raise fakes.libvirt_error(libvirt.VIR_ERR_NO_CONNECT)
        self.patch_name('libvirt.open', refuse)
        self.assertRaises(libvirt.libvirtError, guard.find_guest,
                          fakes.URI, fakes.UUID)


class TestGuard(base.TestCase):
    """The guard as a process, with libvirt's test driver."""

    def setUp(self) -> None:
        super().setUp()
        connection = libvirt.open(TEST_URI)
        self.addCleanup(connection.close)
        self.guest = guests.Guest.find(connection, TEST_URI, 'test')

    def test_it_does_what_a_dead_owner_can_not(self) -> None:
        log = self.new_log()
        with guard.Guard() as guarding:
            guarding.watch(log)
            path = workspace.make_directory(self.staging, log)
            # As if it died: its lock is free, and its undo was not run.
            os.close(log._descriptor)
            log._descriptor = -1
            guarding._end()
            self.assertFalse(os.path.exists(path))
            self.assertFalse(os.path.exists(log.path))
            log._entries.clear()

    def ended_in_vain(self) -> tuple[undo.UndoLog, int]:
        """End a snapshot whose undo fails.

        :returns: its log, and how its guard ended
        """
        with guard.Guard() as guarding:
            log = self.new_log()
            guarding.watch(log)
            log.push(demo_guard_step, what='failing')
            self.assertRaises(exception.UndoFailed, log.unwind)
        process = guarding._process
        assert process is not None
        return log, process.wait(30)

    def test_living_owner_goes_on_with_what_failed(self) -> None:
        self.patch_name('nova_snapshot_ext.guard._RETRY_S', 0.01)
        errors.extend([exception.UndoFailed('no'), exception.UndoFailed('no')])
        journal.clear()
        log, code = self.ended_in_vain()
        # The guard does not know this step: it was its owner.
        self.assertEqual(0, code)
        self.assertEqual(['failing'] * 3, journal)
        self.assertFalse(os.path.exists(log.path))

    def test_what_its_owner_gives_up_is_not_the_guards(self) -> None:
        self.patch_name('nova_snapshot_ext.guard._RETRY_TIMEOUT_S', -1.0)
        errors.extend([exception.UndoFailed('no'), exception.UndoFailed('no')])
        log, code = self.ended_in_vain()
        self.assertEqual(-signal.SIGKILL, code)
        self.assertEqual(1, len(undo.read(log.path).pending))

    def test_its_owner_hears_of_a_reset(self) -> None:
        script = self.new_file('guard', (
            b'#!/bin/sh\nprintf "r7.5\\n12.25\\n99"; cat > /dev/null\n'))
        os.chmod(script, 0o755)
        log = self.new_log()
        with fixtures.MonkeyPatch('sys.executable', script):
            with guard.Guard() as guarding, log:
                self.assertIsNone(guarding._reset_at())
                guarding.watch(log)
                deadline = time.monotonic() + 30
                while (guarding._reset_at() is None
                       and time.monotonic() < deadline):
                    time.sleep(0.01)
                # The last line is not whole.
                self.assertEqual(12.25, guarding._reset_at())
                self.assertEqual(12.25, guarding._reset_at())

    def test_it_leaves_a_living_owner_alone(self) -> None:
        with guard.Guard() as guarding, self.new_log() as log:
            guarding.watch(log)
            path = workspace.make_directory(self.staging, log)
            self.assertTrue(os.path.exists(path))
        self.assertFalse(os.path.exists(path))

    def test_guard_that_does_not_start_is_an_error(self) -> None:
        log = self.new_log()
        with fixtures.MonkeyPatch('sys.executable', '/bin/false'):
            with guard.Guard() as guarding:
                self.assertRaisesRegex(
                    exception.FreezeFailed, 'did not start',
                    guarding.watch, log)

    def test_guard_that_was_not_needed_was_not_started(self) -> None:
        with guard.Guard() as guarding:
            pass
        self.assertIsNone(guarding._process)
