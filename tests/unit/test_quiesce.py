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

import dataclasses

import libvirt

from nova_snapshot_ext import exception
from nova_snapshot_ext import frozen
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import quiesce
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo
from tests.unit import base
from tests.unit import fakes

CONNECTED = ("<channel><target name='org.qemu.guest_agent.0' "
             "state='connected'/></channel>")


class TestObstacle(base.TestCase):

    def obstacle(self, quiesced: requests.Quiesce) -> str | None:
        return quiesce.obstacle(self.guest, self.request(quiesce=quiesced))

    def test_only_what_is_required_can_be_in_the_way(self) -> None:
        for quiesced in (requests.Quiesce.NEVER,
                         requests.Quiesce.IF_POSSIBLE):
            self.assertIsNone(self.obstacle(quiesced))

    def test_guest_must_run(self) -> None:
        self.domain.devices = CONNECTED
        self.assertIsNone(self.obstacle(requests.Quiesce.REQUIRED))
        self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED, 1]
        self.assertIn('paused',
                      self.obstacle(requests.Quiesce.REQUIRED) or '')

    def test_agent_must_be_there(self) -> None:
        self.assertIn('no guest agent',
                      self.obstacle(requests.Quiesce.REQUIRED) or '')


class TestQuiesced(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.watch_flushes()
        self.domain.devices = CONNECTED
        self.log = self.new_log()
        self.pause = frozen.Pause()

    def run_quiesced(self, quiesced: requests.Quiesce,
                     error: Exception | None = None) -> quiesce.Outcome:
        with quiesce.quiesced(
                self.guest, self.request(quiesce=quiesced), self.log,
                self.pause) as outcome:
            self.journal.append('frozen here')
            if error is not None:
                raise error
        return outcome

    def steps(self) -> list[str]:
        return [each for each in self.journal
                if not each.startswith(('agentSet', 'getTime'))]

    def refuse_freeze(self, code: int) -> None:
        self.domain.errors['fsFreeze'] = fakes.libvirt_error(code)

    def test_undo_is_written_before_the_freeze(self) -> None:
        outcome = self.run_quiesced(requests.Quiesce.REQUIRED)
        self.assertEqual(
            ['flushed thaw', 'fsFreeze', 'frozen here', 'fsThaw'],
            self.steps())
        self.assertEqual(frozen.Consistency.FILESYSTEM, outcome.consistency)
        self.assertEqual(0, self.log.pending)

    def test_guard_thaws_after_the_freeze_timeout(self) -> None:
        self.patch_name('nova_snapshot_ext.undo.uptime', lambda: 5.0)
        self.domain.before['fsFreeze'] = lambda: self.journal.append(str([
            each.overdue for each in
            undo.read(self.log.path).pending.values()]))
        self.run_quiesced(requests.Quiesce.REQUIRED)
        self.assertIn('[15.0]', self.journal)

    def test_undo_is_for_the_guest_that_was_frozen(self) -> None:
        def restart() -> None:
            self.domain.number += 1
            self.domain.errors['fsThaw'] = fakes.libvirt_error(
                libvirt.VIR_ERR_AGENT_UNRESPONSIVE)
        self.domain.before['fsThaw'] = restart
        self.assertRaises(guests.LibvirtError, self.run_quiesced,
                          requests.Quiesce.IF_POSSIBLE)
        self.log.unwind()
        self.assertEqual(['fsThaw'], self.journal.of('fsThaw'))

    def test_agent_is_not_waited_for_without_end(self) -> None:
        self.run_quiesced(requests.Quiesce.REQUIRED)
        for call in ('fsFreeze', 'fsThaw'):
            before = self.journal[self.journal.index(call) - 1]
            self.assertEqual('agentSetResponseTimeout 10', before)

    def left_frozen(self) -> None:
        """Its agent does not answer the thaw; its snapshot fails."""
        self.patch_name('nova_snapshot_ext.undo.uptime', lambda: 50.0)
        self.domain.errors['fsThaw'] = fakes.libvirt_error(
            libvirt.VIR_ERR_AGENT_UNRESPONSIVE)
        self.assertRaises(guests.LibvirtError, self.run_quiesced,
                          requests.Quiesce.IF_POSSIBLE)

    def unwind(self, reset_at: float | None) -> None:
        self.log.surroundings = dataclasses.replace(
            self.log.surroundings, reset_at=reset_at)
        self.log._unwind(self.log._entries, quiet=False)

    def test_guest_that_was_reset_has_nothing_to_thaw(self) -> None:
        self.left_frozen()
        for reset_at in None, 49.0:
            # What was before it was frozen does not count.
            self.assertRaises(exception.UndoFailed, self.unwind, reset_at)
            self.assertEqual(1, self.log.pending)
        self.unwind(51.0)
        self.assertEqual(0, self.log.pending)
        self.assertEqual(4, len(self.journal.of('fsThaw')))

    def test_guest_that_boots_has_nothing_to_thaw(self) -> None:
        self.left_frozen()
        self.domain.devices = CONNECTED.replace('connected', 'disconnected')
        self.assertRaises(exception.UndoFailed, self.unwind, None)
        self.unwind(51.0)
        self.assertEqual(0, self.log.pending)

    def test_guest_that_was_reset_is_asked_all_the_same(self) -> None:
        self.left_frozen()
        # Whoever answers may be frozen: that it is not known is an error.
        self.domain.errors['fsThaw'] = fakes.libvirt_error(
            libvirt.VIR_ERR_INTERNAL_ERROR)
        self.assertRaises(exception.UndoFailed, self.unwind, 51.0)
        self.domain.errors.clear()
        self.unwind(51.0)
        self.assertEqual(0, self.domain.frozen)

    def test_guest_is_thawed_when_the_body_fails(self) -> None:
        self.assertRaisesRegex(
            KeyError, 'why', self.run_quiesced,
            requests.Quiesce.IF_POSSIBLE, KeyError('why'))
        self.assertEqual('fsThaw', self.steps()[-1])
        self.assertEqual(0, self.domain.frozen)

    def test_nobody_is_frozen_who_need_not_be(self) -> None:
        outcome = self.run_quiesced(requests.Quiesce.NEVER)
        self.assertEqual(['frozen here'], self.journal)
        self.assertEqual(frozen.Consistency.CRASH, outcome.consistency)

    def test_guest_that_does_not_run_is_not_frozen(self) -> None:
        self.domain.current_state = [libvirt.VIR_DOMAIN_PAUSED, 1]
        self.run_quiesced(requests.Quiesce.IF_POSSIBLE)
        self.assertEqual(['frozen here'], self.journal)

    def test_guest_without_an_agent_is_not_frozen(self) -> None:
        self.domain.devices = ''
        self.run_quiesced(requests.Quiesce.IF_POSSIBLE)
        self.assertEqual(['frozen here'], self.journal)

    def test_agent_that_hangs_is_not_told_to_freeze(self) -> None:
        self.domain.errors['getTime'] = fakes.libvirt_error(
            libvirt.VIR_ERR_AGENT_UNRESPONSIVE)
        outcome = self.run_quiesced(requests.Quiesce.IF_POSSIBLE)
        self.assertEqual(['frozen here'], self.steps())
        self.assertEqual(frozen.Consistency.CRASH, outcome.consistency)
        self.assertRaises(exception.FreezeFailed, self.run_quiesced,
                          requests.Quiesce.REQUIRED)

    def test_guest_is_thawed_when_the_freeze_failed_anyhow(self) -> None:
        # libvirt's code does not tell whether the command was sent.
        for code in (libvirt.VIR_ERR_AGENT_UNRESPONSIVE,
                     libvirt.VIR_ERR_INTERNAL_ERROR,
                     libvirt.VIR_ERR_OPERATION_INVALID):
            self.journal.clear()
            self.refuse_freeze(code)
            outcome = self.run_quiesced(requests.Quiesce.IF_POSSIBLE)
            self.assertEqual(
                ['flushed thaw', 'fsFreeze', 'fsThaw', 'frozen here'],
                self.steps())
            self.assertEqual(frozen.Consistency.CRASH, outcome.consistency)
            self.assertEqual(0, self.log.pending)

    def test_undo_stays_when_neither_freeze_nor_thaw_is_answered(
            self) -> None:
        for call in ('fsFreeze', 'fsThaw'):
            self.domain.errors[call] = fakes.libvirt_error(
                libvirt.VIR_ERR_AGENT_UNRESPONSIVE)
        self.assertRaises(guests.LibvirtError, self.run_quiesced,
                          requests.Quiesce.IF_POSSIBLE)
        self.assertEqual(1, self.log.pending)

    def test_guest_without_file_systems_is_not_consistent(self) -> None:
        self.domain.before['fsThaw'] = lambda: None
        self.patch_name('tests.unit.fakes.FakeDomain.fsFreeze',
                        lambda domain: 0)
        self.assertRaises(exception.FreezeFailed, self.run_quiesced,
                          requests.Quiesce.REQUIRED)

    def test_freeze_that_is_required_and_fails_is_an_error(self) -> None:
        self.refuse_freeze(libvirt.VIR_ERR_AGENT_UNRESPONSIVE)
        self.assertRaises(exception.FreezeFailed, self.run_quiesced,
                          requests.Quiesce.REQUIRED)
        self.assertNotIn('frozen here', self.journal)
        self.assertEqual(0, self.log.pending)

    def thawed_meanwhile(self) -> None:
        self.domain.before['fsThaw'] = lambda: setattr(
            self.domain, 'frozen', 0)

    def test_guest_thawed_too_early_is_not_consistent(self) -> None:
        self.thawed_meanwhile()
        outcome = self.run_quiesced(requests.Quiesce.IF_POSSIBLE)
        self.assertEqual(frozen.Consistency.CRASH, outcome.consistency)

    def test_guest_thawed_too_early_fails_if_it_is_required(self) -> None:
        self.thawed_meanwhile()
        self.assertRaisesRegex(
            exception.FreezeFailed, 'still were', self.run_quiesced,
            requests.Quiesce.REQUIRED)

    def answer_first_thaw_with_an_error(self) -> None:
        # What a Windows guest does that let go by itself, after 10 seconds.
        self.domain.errors['fsThaw'] = fakes.libvirt_error(
            libvirt.VIR_ERR_INTERNAL_ERROR,
            "unable to execute QEMU agent command 'guest-fsfreeze-thaw'")

        def thaw() -> None:
            if len(self.journal.of('fsThaw')) == 2:
                self.domain.frozen = 0
                del self.domain.errors['fsThaw']
        self.domain.before['fsThaw'] = thaw

    def test_guest_that_was_faster_is_asked_to_thaw_once_more(self) -> None:
        self.answer_first_thaw_with_an_error()
        outcome = self.run_quiesced(requests.Quiesce.IF_POSSIBLE)
        self.assertEqual(
            ['flushed thaw', 'fsFreeze', 'frozen here', 'fsThaw', 'fsThaw'],
            self.steps())
        self.assertEqual(frozen.Consistency.CRASH, outcome.consistency)
        self.assertEqual(0, self.log.pending)

    def test_guest_that_was_faster_fails_if_it_is_required(self) -> None:
        self.answer_first_thaw_with_an_error()
        self.assertRaisesRegex(
            exception.FreezeFailed, 'still were', self.run_quiesced,
            requests.Quiesce.REQUIRED)
        self.assertEqual(0, self.log.pending)

    def test_undo_stays_when_the_second_thaw_fails_too(self) -> None:
        self.domain.errors['fsThaw'] = fakes.libvirt_error(
            libvirt.VIR_ERR_INTERNAL_ERROR)
        self.assertRaises(guests.LibvirtError, self.run_quiesced,
                          requests.Quiesce.IF_POSSIBLE)
        self.assertEqual(2, len(self.journal.of('fsThaw')))
        self.assertEqual(1, self.log.pending)

    def test_agent_that_does_not_answer_is_not_asked_twice(self) -> None:
        for code in (libvirt.VIR_ERR_AGENT_UNRESPONSIVE,
                     libvirt.VIR_ERR_AGENT_UNSYNCED):
            self.journal.clear()
            self.domain.errors['fsThaw'] = fakes.libvirt_error(code)
            self.assertRaises(guests.LibvirtError, self.run_quiesced,
                              requests.Quiesce.IF_POSSIBLE)
            self.assertEqual(1, len(self.journal.of('fsThaw')))

    def test_undo_stays_when_the_thaw_fails(self) -> None:
        self.domain.errors['fsThaw'] = fakes.libvirt_error(
            libvirt.VIR_ERR_AGENT_UNRESPONSIVE)
        self.assertRaises(guests.LibvirtError, self.run_quiesced,
                          requests.Quiesce.IF_POSSIBLE)
        self.assertEqual(1, self.log.pending)

    def test_pause_is_over_when_the_guest_is_thawed(self) -> None:
        self.run_quiesced(requests.Quiesce.REQUIRED)
        paused = self.pause.seconds
        self.assertLess(0, paused)
        self.assertEqual(paused, self.pause.seconds)


class TestThaw(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.domain.devices = CONNECTED

    def test_agent_that_has_ended_is_not_asked(self) -> None:
        self.domain.devices = ''
        self.assertRaisesRegex(
            exception.UndoFailed, 'agent of instance-00000001 has ended',
            quiesce.thaw, undo.Surroundings(self.guest, self.host),
            timeout_s=7)
        self.assertEqual([], self.journal)

    def test_twice_does_no_harm(self) -> None:
        around = undo.Surroundings(self.guest, self.host)
        quiesce.thaw(around, timeout_s=7)
        quiesce.thaw(around, timeout_s=7)
        self.assertEqual(['fsThaw', 'fsThaw'], self.journal.of('fsThaw'))

    def test_agent_is_not_waited_for_without_end(self) -> None:
        quiesce.thaw(undo.Surroundings(self.guest, self.host), timeout_s=7)
        self.assertEqual('agentSetResponseTimeout 7', self.journal[0])

    def test_guest_that_is_off_is_thawed(self) -> None:
        self.domain.off()
        quiesce.thaw(undo.Surroundings(self.guest, self.host), timeout_s=7)
        self.assertEqual([], self.journal)

    def test_guest_that_was_started_anew_is_thawed(self) -> None:
        around = undo.Surroundings(self.guest, self.host)
        frozen_as = self.guest.life()
        self.domain.off()
        self.domain.createWithFlags(0)
        self.domain.errors['fsThaw'] = fakes.libvirt_error(
            libvirt.VIR_ERR_AGENT_UNRESPONSIVE)
        quiesce.thaw(around, timeout_s=7, life=frozen_as)
        self.assertEqual([], self.journal.of('fs'))
        self.assertRaises(guests.LibvirtError, quiesce.thaw, around,
                          timeout_s=7, life=self.guest.life())

    def test_guest_that_is_gone_is_thawed(self) -> None:
        quiesce.thaw(undo.Surroundings(None, self.host), timeout_s=7)
        self.domain.gone()
        quiesce.thaw(undo.Surroundings(self.guest, self.host), timeout_s=7)
        self.assertEqual([], self.journal.of('fsThaw'))
