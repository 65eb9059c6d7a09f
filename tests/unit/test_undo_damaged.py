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

"""Undo logs that were cut at any byte, or hold anything."""

import json
import os
import typing

import hypothesis
from hypothesis import strategies

from nova_snapshot_ext import exception
from nova_snapshot_ext import guard
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import host as hosts
from nova_snapshot_ext import undo
from tests.unit import test_undo

settings = hypothesis.settings(
    max_examples=150, deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck))
values = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers()
    | strategies.floats() | strategies.text(max_size=10),
    lambda inner: strategies.lists(inner, max_size=2)
    | strategies.dictionaries(strategies.text(max_size=5), inner, max_size=2),
    max_leaves=4)


def nearly(**usual: object) -> strategies.SearchStrategy[dict[str, object]]:
    """A line, some of whose values are of other types, or missing."""
    return strategies.fixed_dictionaries({}, optional={
        name: strategies.just(value) | strategies.just(value) | values
        for name, value in usual.items()})


heads = nearly(undo_log=undo.VERSION, boot_id='b', uri='fake:///system',
               domain='d')
entries = nearly(entry=1, step='demo_undo', arguments={'what': 'a'},
                 overdue=1.0, done=True)
files = (strategies.binary(max_size=200)
         | strategies.tuples(heads, strategies.lists(
             entries | values, max_size=3)).map(
                 lambda lines: b''.join(
                     json.dumps(each).encode() + b'\n'
                     for each in (lines[0], *lines[1]))))


class TestDamaged(test_undo.UndoTestCase):

    def whole(self) -> bytes:
        """The file of a snapshot of three steps, one of them undone."""
        log = self.new_log()
        log.push(test_undo.demo_undo, what='first')
        log.push(test_undo.demo_undo, what='done').run()
        log.push(test_undo.demo_guest_undo, within_s=5)
        content = self.written()
        os.close(log._descriptor)
        log._descriptor = -1
        test_undo.journal.clear()
        return content

    def write(self, content: bytes) -> None:
        with open(self.path, 'wb') as file:
            file.write(content)

    def test_log_that_is_cut_at_any_byte_undoes_what_was_whole(self) -> None:
        content = self.whole()
        for length in range(len(content) + 1):
            self.write(content[:length])
            lines = content[:length].split(b'\n')[:-1]
            wanted = []
            for line in lines[1:]:
                record = json.loads(line)
                if record.get('done'):
                    wanted.remove(record['entry'])
                else:
                    wanted.append(record['entry'])
            self.assertEqual(wanted, sorted(undo.read(self.path).pending))
            test_undo.journal.clear()
            self.adopt().unwind()
            self.assertEqual(len(wanted), len(test_undo.journal))
            self.assertFalse(os.path.exists(self.path))

    def test_new_snapshot_after_a_cut_is_clean_or_refused(self) -> None:
        content = self.whole()
        for length in range(len(content) + 1):
            self.write(content[:length])
            left = len(undo.read(self.path).pending)
            try:
                log = undo.UndoLog.create(self.state, self.guest, self.host)
            except exception.GuestBusy:
                self.assertTrue(left)
            else:
                self.assertFalse(left)
                log.close()

    @settings
    @hypothesis.given(content=files)
    def test_anything_is_undone_or_refused(self, content: bytes) -> None:
        self.write(content)
        try:
            undo.read(self.path)
        except ValueError:
            self.assertRaises(ValueError, self.adopt)
            # Nobody throws away what he does not understand.
            self.assertRaises(exception.GuestBusy, undo.UndoLog.create,
                              self.state, self.guest, self.host)
            self.assertEqual(content, self.written())
            self.assertFalse(guard.bring_back(
                self.path, self.find, hosts.PlainHost()))
            return
        log = self.adopt()
        try:
            log.unwind()
        except exception.UndoFailed:
            self.assertTrue(undo.read(self.path).pending)

    def find(self, uri: str, uuid: str) -> guests.Guest | None:
        raise AssertionError('It is not asked for a guest')

    def test_deep_line_is_no_crash(self) -> None:
        self.write(b'[' * 10 ** 6 + b'\n')
        self.assertRaises(ValueError, undo.read, self.path)

    def test_line_of_another_type_is_named(self) -> None:
        head: dict[str, typing.Any] = {
            'undo_log': undo.VERSION, 'boot_id': 'b', 'uri': 5, 'domain': 'd'}
        self.write(json.dumps(head).encode() + b'\n')
        self.assertRaisesRegex(ValueError, 'uri is 5', undo.read, self.path)
