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


from nova_snapshot_ext import cancellation
from nova_snapshot_ext import exception
from tests.unit import base


class TestCancellation(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.cancellation = cancellation.Cancellation()
        self.reason = exception.ImageGone('deleted')

    def test_nothing_ends_without_a_reason(self) -> None:
        self.cancellation.check()
        with self.cancellation.ending(lambda: self.journal.append('end')):
            pass
        self.assertEqual([], self.journal)
        self.assertIsNone(self.cancellation.reason)

    def test_first_reason_counts(self) -> None:
        self.cancellation.cancel(self.reason)
        self.cancellation.cancel(exception.GuestGone('later'))
        self.assertIs(self.reason, self.assertRaises(
            exception.ImageGone, self.cancellation.check))

    def test_what_is_waited_for_is_ended(self) -> None:
        with self.cancellation.ending(lambda: self.journal.append('a')), \
                self.cancellation.ending(lambda: self.journal.append('b')):
            self.cancellation.cancel(self.reason)
            self.assertEqual(['a', 'b'], self.journal)
            self.cancellation.interrupt()
        self.assertEqual(['a', 'b', 'a', 'b'], self.journal)

    def test_what_is_over_is_not_ended(self) -> None:
        with self.cancellation.ending(lambda: self.journal.append('a')):
            pass
        self.cancellation.cancel(self.reason)
        self.assertEqual([], self.journal)

    def test_nothing_is_begun_any_more(self) -> None:
        self.cancellation.cancel(self.reason)
        with self.assertRaisesRegex(exception.ImageGone, 'deleted'):
            with self.cancellation.ending(lambda: None):
                self.journal.append('begun')
        self.assertEqual([], self.journal)

    def test_what_can_not_be_ended_does_not_keep_the_rest(self) -> None:
        def fail() -> None:
            raise OSError('it is stuck')
        with self.cancellation.ending(fail), \
                self.cancellation.ending(lambda: self.journal.append('b')):
            self.cancellation.cancel(self.reason)
        self.assertEqual(['b'], self.journal)
        self.assertIn('it is stuck', self.output.output)
