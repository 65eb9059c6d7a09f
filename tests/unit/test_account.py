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

import itertools
import os
import re
import typing

from nova_snapshot_ext import account as accounts
from nova_snapshot_ext import exception
from tests.unit import base

MIB = 1024 ** 2
GUIDE = os.path.join(os.path.dirname(__file__), os.pardir, os.pardir, 'doc',
                     'source', 'admin', 'monitoring.rst')


class AccountTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.now = 100.0
        self.patch_name('nova_snapshot_ext.account.time.monotonic',
                        lambda: self.now)
        self.account = accounts.Account('uuid', 'image', 'req-1')

    def spend(self, phase: str, seconds: float) -> None:
        with self.account.phase(phase):
            self.now += seconds

    def values(self) -> dict[str, accounts.Value]:
        return self.account.values()

    def line(self) -> dict[str, str]:
        """What a program finds in the log."""
        [line] = [line for line in self.output.output.splitlines()
                  if 'Snapshot ended: ' in line]
        return accounts.parsed(line)


class TestValues(AccountTestCase):

    def test_phases_are_counted(self) -> None:
        self.spend('plan', 1)
        self.spend('freeze', 2)
        self.spend('freeze', 0.5)
        self.spend('publish', 4)
        self.now += 0.25
        values = self.values()
        self.assertEqual(
            (None, 1, 2.5, None, 4, 0.25, 7.75),
            tuple(values[f'{name}_s'] for name in (
                *accounts.PHASES, 'total')))

    def test_phase_that_fails_is_counted(self) -> None:
        def fail() -> None:
            self.now += 3
            raise ValueError
        self.assertRaises(ValueError, self.account.timed('freeze', fail))
        self.now += 1
        self.assertEqual((3, 1), (
            self.values()['freeze_s'], self.values()['release_s']))

    def test_what_is_let_go_before_the_upload_is_release(self) -> None:
        self.spend('release', 2)
        self.spend('publish', 4)
        self.now += 1
        self.assertEqual(3, self.values()['release_s'])

    def test_time_stands_still_when_it_has_ended(self) -> None:
        self.now += 1
        self.account.end()
        self.now += 1
        self.assertEqual(1, self.values()['total_s'])

    def test_only_the_wait_for_its_turn_is_waiting(self) -> None:
        class Lock:
            def __enter__(lock) -> None:
                self.now += 5

            def __exit__(lock, *error: object) -> None:
                self.now += 7
        with self.account.waited(Lock()):
            self.now += 2
        self.assertEqual(5, self.values()['wait_s'])

    def test_bytes_of_all_attempts_are_sent(self) -> None:
        for done in (0, 3 * MIB, 0, 3 * MIB, 8 * MIB, 8 * MIB):
            self.account.sent(0, done, 8 * MIB)
        self.spend('publish', 2)
        values = self.values()
        self.assertEqual((8 * MIB, 11 * MIB, 5.5), (
            values['image_bytes'], values['sent_bytes'],
            values['sent_mib_s']))

    def test_rate_of_reading(self) -> None:
        self.account.read(MIB)
        self.account.read(2 * MIB)
        self.spend('publish', 2)
        self.assertEqual((3 * MIB, 1.5), (
            self.values()['read_bytes'], self.values()['read_mib_s']))

    def test_what_is_not_known_is_not_0(self) -> None:
        values = self.values()
        for name in ('guest_pause_ms', 'read_bytes', 'sent_bytes',
                     'staged_bytes', 'scratch_bytes', 'read_mib_s',
                     'sent_mib_s', 'plan_s', 'flow', 'error'):
            self.assertIsNone(values[name], name)

    def test_pause_is_asked_for_at_the_end(self) -> None:
        self.account.pauses = [lambda: 0.0126, lambda: 0.1]
        self.assertEqual(113, self.values()['guest_pause_ms'])

    def test_times_of_a_dead_process_are_not_known(self) -> None:
        dead = accounts.Account('uuid', ours=False)
        self.assertEqual(set(), {
            name for name, value in dead.values().items()
            if value is not None} - {'outcome', 'instance'})


class TestEnd(AccountTestCase):

    def end(self, error: BaseException | None = None,
            cause: Exception | None = None) -> dict[str, str]:
        def ending() -> None:
            with accounts.told(self.account):
                if error is not None:
                    raise error from cause
        if error is None:
            ending()
        else:
            self.assertIs(error, self.assertRaises(type(error), ending))
        return self.line()

    def test_one_line_has_every_name_in_order(self) -> None:
        line = self.end()
        self.assertEqual(accounts.NAMES, tuple(line))
        self.assertEqual(('ok', 'uuid', 'image', 'req-1', '-', '-'), tuple(
            line[name] for name in ('outcome', 'instance', 'image',
                                    'request', 'error', 'reason')))

    def test_failure(self) -> None:
        line = self.end(exception.FreezeFailed('no "socket" = bad\nluck'))
        self.assertEqual(
            ('failed', 'FreezeFailed', 'no "socket" = bad\\nluck'),
            (line['outcome'], line['error'], line['reason']))

    def test_what_nobody_wants_any_more_is_cancelled(self) -> None:
        for error in (exception.ImageGone('gone'),
                      exception.GuestGone('gone'),
                      exception.Preempted('reset'), KeyboardInterrupt()):
            self.account = accounts.Account()
            self.account.fail(error)
            self.assertEqual(('cancelled', type(error).__name__), (
                self.account.outcome, self.account.error))

    def test_error_of_ours_is_told_and_not_what_became_of_it(self) -> None:
        line = self.end(ValueError('theirs'), exception.ImageGone('ours'))
        self.assertEqual(('cancelled', 'ImageGone', 'ours'), (
            line['outcome'], line['error'], line['reason']))
        self.account = accounts.Account()
        self.account.fail(ValueError('theirs'))
        self.assertEqual(('failed', 'theirs'), (
            self.account.outcome, self.account.reason))
        self.account.fail(ValueError('theirs'), (ValueError,))
        self.assertEqual('cancelled', self.account.outcome)

    def test_error_of_ours_is_not_told_by_its_cause(self) -> None:
        line = self.end(exception.GuestGone('gone'),
                        exception.TransferFailed('no socket'))
        self.assertEqual(('cancelled', 'GuestGone', 'gone'), (
            line['outcome'], line['error'], line['reason']))

    def test_line_stays_one_line(self) -> None:
        self.account.flow = 'a b="c"\nd'
        self.assertEqual('a b="c"\nd', self.end()['flow'])

    def test_who_listens_is_told_the_same(self) -> None:
        told: list[dict[str, accounts.Value]] = []
        ticks = itertools.count()
        self.patch_name('nova_snapshot_ext.account.time.monotonic',
                        lambda: float(next(ticks)))
        accounts.say(self.account, lambda account: told.append(
            account.values()))
        self.assertEqual(self.line()['total_s'], str(told[0]['total_s']))

    def test_listener_that_fails_fails_no_snapshot(self) -> None:
        def tell(account: accounts.Account) -> None:
            raise OSError('no message bus')
        with accounts.told(self.account, tell):
            pass
        self.assertIn('told how a snapshot ended: no message bus',
                      self.output.output)
        self.assertEqual('ok', self.line()['outcome'])


class TestGuide(base.TestCase):

    def test_documented_names_are_those_of_the_line(self) -> None:
        with open(GUIDE) as file:
            documented = re.findall(r'^   \* - ``(\w+)``', file.read(), re.M)
        self.assertEqual(list(accounts.NAMES), documented)

    def test_units_are_in_the_names(self) -> None:
        values: dict[str, typing.Any] = accounts.Account(
            image_bytes=1).values()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.assertRegex(name, '_(s|ms|bytes)$')
