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

import json
import os
import subprocess
import sys
import typing

import fixtures
import libvirt

from nova_snapshot_ext import exception
from nova_snapshot_ext import guest as guests
from nova_snapshot_ext import undo
from tests.unit import base
from tests.unit import fakes

journal = fakes.Journal()
broken: set[str] = set()


@undo.step
def demo_undo(around: undo.Surroundings, what: str) -> None:
    journal.append(f'undo {what}')
    if what in broken:
        raise exception.SnapshotError(f'{what} is stuck')


@undo.step
@undo.with_guest
def demo_guest_undo(around: undo.Surroundings, guest: guests.Guest) -> None:
    journal.append(f'undo {guest.name} {around.owner_died}')
    guest.state()


class UndoTestCase(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        journal.clear()
        broken.clear()
        self.path = os.path.join(self.state, fakes.UUID + undo.SUFFIX)

    def adopt(self, guest: guests.Guest | None = None) -> undo.UndoLog:
        log = undo.UndoLog.adopt(
            self.path, lambda uri, uuid: guest or self.guest, self.host)
        self.addCleanup(log.close)
        return log

    def written(self) -> bytes:
        with open(self.path, 'rb') as file:
            return file.read()

    def write(self, content: bytes) -> None:
        with open(self.path, 'wb') as file:
            file.write(content)


class TestOrder(UndoTestCase):

    def test_newest_is_undone_first(self) -> None:
        with self.new_log() as log:
            for what in 'abc':
                log.push(demo_undo, what=what)
        self.assertEqual(['undo c', 'undo b', 'undo a'], journal)

    def test_undo_is_on_the_disk_when_push_returns(self) -> None:
        self.watch_flushes()
        log = self.new_log()
        log.push(demo_undo, what='a')
        self.assertEqual(['flushed demo_undo'], self.journal)

    def test_new_log_is_on_the_disk_with_its_directory_entry(self) -> None:
        flushed = []
        real = os.fsync
        self.patch_name('os.fsync', lambda descriptor: (
            flushed.append(os.readlink(f'/proc/self/fd/{descriptor}')),
            real(descriptor)))
        self.new_log()
        self.assertEqual([self.path, self.state], flushed)

    def test_step_is_not_pushed_when_it_can_not_be_flushed(self) -> None:
        def fail(descriptor: int) -> None:
            raise OSError('I/O error')
        log = self.new_log()
        self.patch_name('os.fsync', fail)
        self.assertRaises(OSError, log.push, demo_undo, what='a')
        self.assertEqual(0, log.pending)

    def test_half_written_line_spoils_no_later_one(self) -> None:
        log = self.new_log()
        log.push(demo_undo, what='a')
        real = os.write
        with fixtures.MonkeyPatch('os.write', lambda descriptor, data: real(
                descriptor, data[:len(data) // 2])):
            self.assertRaises(OSError, log.push, demo_undo, what='b')
        log.push(demo_undo, what='c')
        pending = undo.read(self.path).pending
        self.assertEqual(
            ['a', 'c'], [each.arguments['what'] for each in pending.values()])

    def test_undo_that_was_run_needs_no_room_for_its_mark(self) -> None:
        def full(descriptor: int) -> None:
            raise OSError('No space left on device')
        with self.new_log() as log:
            log.push(demo_undo, what='a')
            self.patch_name('os.fsync', full)
        self.assertEqual(['undo a'], journal)
        self.assertFalse(os.path.exists(self.path))

    def test_log_that_can_not_be_begun_holds_no_lock(self) -> None:
        def full(descriptor: int) -> None:
            raise OSError('No space left on device')
        with fixtures.MonkeyPatch('os.fsync', full):
            self.assertRaises(OSError, self.new_log)
        self.new_log()

    def test_unknown_function_can_not_be_pushed(self) -> None:
        def stranger(around: undo.Surroundings) -> None:
            pass
        self.assertRaises(ValueError, self.new_log().push, stranger)

    def test_two_steps_of_one_name_are_refused(self) -> None:
        def demo_undo(around: undo.Surroundings) -> None:
            pass
        self.assertRaises(ValueError, undo.step, demo_undo)

    def test_entry_that_was_run_is_not_run_again(self) -> None:
        with self.new_log() as log:
            entry = log.push(demo_undo, what='a')
            entry.run()
            entry.run()
        self.assertEqual(['undo a'], journal)

    def test_dropped_entry_is_not_run(self) -> None:
        with self.new_log() as log:
            log.push(demo_undo, what='a').drop()
        self.assertEqual([], journal)

    def test_done_is_written(self) -> None:
        log = self.new_log()
        log.push(demo_undo, what='a').run()
        log.push(demo_undo, what='b')
        self.assertEqual(
            ['b'], [each.arguments['what']
                    for each in undo.read(self.path).pending.values()])


class TestScope(UndoTestCase):

    def test_scope_undoes_what_was_pushed_within(self) -> None:
        log = self.new_log()
        log.push(demo_undo, what='outer')
        with log.scope():
            log.push(demo_undo, what='a')
            log.push(demo_undo, what='b')
        self.assertEqual(['undo b', 'undo a'], journal)

    def test_scope_undoes_when_an_error_passes(self) -> None:
        log = self.new_log()
        with self.assertRaisesRegex(KeyError, 'why'):
            with log.scope():
                log.push(demo_undo, what='a')
                raise KeyError('why')
        self.assertEqual(['undo a'], journal)

    def test_error_is_not_hidden_by_a_failed_undo(self) -> None:
        log = self.new_log()
        broken.add('a')
        with self.assertRaisesRegex(KeyError, 'why'):
            with log.scope():
                log.push(demo_undo, what='a')
                raise KeyError('why')
        self.assertEqual(1, log.pending)

    def test_outer_scope_that_ends_first_leaves_the_inner_ones(self) -> None:
        log = self.new_log()
        outer = log.scope()
        inner = log.scope()
        outer.__enter__()
        log.push(demo_undo, what='outer')
        inner.__enter__()
        log.push(demo_undo, what='inner')
        outer.__exit__(None, None, None)
        self.assertEqual(['undo outer'], journal)
        inner.__exit__(None, None, None)
        self.assertEqual(['undo outer', 'undo inner'], journal)

    def test_what_outlives_its_scope_goes_with_the_log(self) -> None:
        with self.new_log() as log:
            with log.scope():
                log.push(demo_undo, what='stays').outlive_scope()
                log.push(demo_undo, what='goes')
            self.assertEqual(['undo goes'], journal)
        self.assertEqual(['undo goes', 'undo stays'], journal)

    def test_push_after_an_inner_scope_belongs_to_the_outer_one(self) -> None:
        log = self.new_log()
        with log.scope():
            with log.scope():
                log.push(demo_undo, what='inner')
            log.push(demo_undo, what='outer')
        self.assertEqual(['undo inner', 'undo outer'], journal)


class TestEnd(UndoTestCase):

    def test_log_is_deleted_when_all_is_undone(self) -> None:
        with self.new_log() as log:
            log.push(demo_undo, what='a')
            self.assertTrue(os.path.exists(self.path))
        self.assertFalse(os.path.exists(self.path))

    def test_log_is_kept_when_an_undo_fails(self) -> None:
        broken.add('b')
        log = self.new_log()
        with self.assertRaisesRegex(exception.UndoFailed, 'b is stuck'):
            with log:
                for what in 'abc':
                    log.push(demo_undo, what=what)
        self.assertEqual(['undo c', 'undo b', 'undo a'], journal)
        self.assertEqual(
            ['b'], [each.arguments['what']
                    for each in undo.read(self.path).pending.values()])

    def test_kept_log_is_finished_later(self) -> None:
        self.test_log_is_kept_when_an_undo_fails()
        broken.clear()
        journal.clear()
        self.adopt().unwind()
        self.assertEqual(['undo b'], journal)
        self.assertFalse(os.path.exists(self.path))

    def test_undo_of_an_uninstalled_plugin_keeps_the_log(self) -> None:
        log = self.new_log()
        log.push(demo_undo, what='a')
        log.close()
        self.write(self.written().replace(b'"demo_undo"', b'"unheard_of"'))
        self.assertRaisesRegex(
            exception.UndoFailed, 'unheard_of', self.adopt().unwind)
        self.assertTrue(os.path.exists(self.path))


class TestLock(UndoTestCase):

    def test_one_guest_has_one_log(self) -> None:
        self.new_log()
        self.assertRaisesRegex(
            exception.GuestBusy, 'in flight', self.new_log)

    def test_living_owner_can_not_be_robbed(self) -> None:
        self.new_log()
        self.assertRaises(exception.GuestBusy, self.adopt)

    def test_refused_log_leaves_the_owners_alone(self) -> None:
        log = self.new_log()
        log.push(demo_undo, what='a')
        self.assertRaises(exception.GuestBusy, self.new_log)
        self.assertEqual(1, len(undo.read(self.path).pending))

    def test_what_a_living_process_left_names_the_guest(self) -> None:
        with self.new_log():
            self.assertRaisesRegex(
                exception.GuestBusy, 'instance-00000001 is in flight',
                undo.finish_left_over, self.state, self.guest, self.host)

    def test_dead_owners_unfinished_log_is_kept(self) -> None:
        log = self.new_log()
        log.push(demo_undo, what='a')
        log.close()
        self.assertRaisesRegex(
            exception.GuestBusy, 'cut off', self.new_log)
        self.assertEqual(1, len(undo.read(self.path).pending))

    def test_dead_owners_finished_log_is_used_again(self) -> None:
        log = self.new_log()
        log.push(demo_undo, what='a').run()
        content = self.written()
        log.close()
        self.write(content)
        self.new_log()
        self.assertEqual(1, self.written().count(b'\n'))

    def test_log_that_can_not_be_understood_is_kept(self) -> None:
        self.write(b'{"undo_log": 99}\n')
        self.assertRaisesRegex(
            exception.GuestBusy, 'version 99', self.new_log)
        self.assertEqual(b'{"undo_log": 99}\n', self.written())

    def test_lock_of_a_killed_process_is_free(self) -> None:
        program = (
            'import sys, os, signal\n'
            'from nova_snapshot_ext import undo\n'
            'from tests.unit import fakes, test_undo\n'
            'domain = fakes.FakeDomain()\n'
            'log = undo.UndoLog.create(sys.argv[1], fakes.guest_of(domain),'
            ' fakes.FakeHost(domain.journal))\n'
            'log.push(test_undo.demo_undo, what="a")\n'
            'os.kill(os.getpid(), signal.SIGKILL)\n')
        subprocess.run([sys.executable, '-c', program, self.state])
        self.adopt().unwind()
        self.assertEqual(['undo a'], journal)

    def test_child_process_does_not_hold_the_lock(self) -> None:
        log = self.new_log()
        log.push(demo_undo, what='a')
        child = subprocess.Popen(
            ['cat'], stdin=subprocess.PIPE, close_fds=False)
        self.addCleanup(child.communicate)
        log.close()
        self.assertEqual(1, self.adopt().pending)

    def test_link_in_the_place_of_a_log_is_not_followed(self) -> None:
        target = self.new_file('target', b'precious')
        os.symlink(target, self.path)
        self.assertRaises(OSError, self.new_log)
        with open(target, 'rb') as file:
            self.assertEqual(b'precious', file.read())

    def test_log_is_for_its_owner_alone(self) -> None:
        self.new_log()
        self.assertEqual(0o600, os.stat(self.path).st_mode & 0o777)


class TestAdopt(UndoTestCase):

    def leave(self) -> None:
        log = self.new_log()
        log.push(demo_undo, what='a')
        log.push(demo_undo, what='b').run()
        log.push(demo_guest_undo)
        log.close()
        journal.clear()

    def test_what_is_left_runs_newest_first(self) -> None:
        self.leave()
        self.adopt().unwind()
        self.assertEqual(
            ['undo instance-00000001 True', 'undo a'], journal)
        self.assertFalse(os.path.exists(self.path))

    def test_guest_is_looked_for_where_it_was(self) -> None:
        self.leave()
        asked = []
        undo.UndoLog.adopt(
            self.path, lambda *which: asked.append(which), self.host).close()
        self.assertEqual([(fakes.URI, fakes.UUID)], asked)

    def test_rights_may_depend_on_the_guest(self) -> None:
        self.leave()
        for guest in None, self.guest:
            log = undo.UndoLog.adopt(
                self.path, lambda *which: guest, lambda found: (
                    self.assertIs(guest, found), self.host)[1])
            self.assertIs(self.host, log.surroundings.host)
            log.close()

    def test_what_it_will_undo_can_be_told(self) -> None:
        self.leave()
        self.assertEqual(
            ('demo_guest_undo {}', 'demo_undo {"what": "a"}'),
            self.adopt().steps)

    def test_guest_that_is_gone_needs_no_undo(self) -> None:
        self.leave()
        undo.UndoLog.adopt(
            self.path, lambda *which: None, self.host).unwind()
        self.assertEqual(['undo a'], journal)

    def test_guest_that_goes_meanwhile_needs_no_undo(self) -> None:
        self.leave()
        self.domain.gone()
        self.adopt().unwind()
        self.assertFalse(os.path.exists(self.path))

    def test_guest_is_left_alone_after_a_reboot(self) -> None:
        self.leave()
        self.patch_name('nova_snapshot_ext.undo.boot_id', lambda: 'later')
        log = self.adopt()
        self.assertTrue(log.surroundings.rebooted)
        log.unwind()
        self.assertEqual(['undo a'], journal)
        self.assertFalse(os.path.exists(self.path))

    def test_living_owner_is_told_from_a_dead_one(self) -> None:
        log = self.new_log()
        log.push(demo_guest_undo).run()
        self.assertEqual(['undo instance-00000001 False'], journal)

    def test_there_may_be_none(self) -> None:
        self.assertRaises(FileNotFoundError, self.adopt)

    def test_lock_is_free_after_a_log_that_makes_no_sense(self) -> None:
        self.write(b'[]\n')
        self.assertRaises(ValueError, self.adopt)
        self.assertRaises(ValueError, self.adopt)

    def test_failed_undo_after_a_cut_line_is_still_known(self) -> None:
        log = self.new_log()
        log.push(demo_undo, what='a')
        log.push(demo_undo, what='b')
        log.push(demo_undo, what='c')
        log.close()
        self.write(self.written()[:-10])
        broken.add('a')
        self.assertRaises(exception.UndoFailed, self.adopt().unwind)
        self.assertEqual(
            ['a'], [each.arguments['what']
                    for each in undo.read(self.path).pending.values()])

    def test_any_cut_keeps_the_undo_of_every_step_that_was_taken(
            self) -> None:
        log = self.new_log()
        flushed = []
        for what in 'abc':
            log.push(demo_undo, what=what)
            flushed.append((what, len(self.written())))
        log.close()
        whole = self.written()
        for length in range(len(whole) + 1):
            self.write(whole[:length])
            journal.clear()
            self.adopt().unwind()
            # A step is taken after the flush of its whole line.
            self.assertEqual(
                [f'undo {what}' for what, end in reversed(flushed)
                 if end <= length], journal, f'cut at {length}')

    def test_any_flipped_byte_is_a_value_error_or_a_log(self) -> None:
        log = self.new_log()
        log.push(demo_undo, what='a', within_s=3)
        log.push(demo_undo, what='b').run()
        content = self.written()
        log.close()
        for position in range(len(content)):
            self.write(content[:position]
                       + bytes([content[position] ^ 0x15])
                       + content[position + 1:])
            try:
                undo.read(self.path)
            except ValueError:
                pass


class TestLockedFile(UndoTestCase):
    """What has the lock is what is read and written."""

    def test_log_with_another_name_is_left_alone(self) -> None:
        # As the directory's owner could make one of a file of root's.
        other = self.new_file('shadow', b'root\n')
        os.link(other, self.path)
        for use in self.new_log, self.adopt:
            self.assertRaisesRegex(
                exception.NotOurs, 'other names', use)
        os.unlink(self.path)
        self.assertEqual('root\n', open(other).read())
        self.new_log()

    def test_what_is_no_file_is_left_alone(self) -> None:
        os.mkfifo(self.path)
        self.assertRaisesRegex(
            exception.NotOurs, 'not a file', self.new_log)
        os.unlink(self.path)
        self.new_log()

    def replace_when_locked(self, content: bytes) -> None:
        """Put another file in the place of the log that is locked next."""
        real = undo.open_locked

        def open_locked(*arguments: typing.Any) -> int:
            descriptor = real(*arguments)
            other = self.new_file('other', content)
            os.rename(other, self.path)
            return descriptor
        self.patch_name('nova_snapshot_ext.undo.open_locked', open_locked)

    def test_log_that_was_locked_is_what_is_adopted(self) -> None:
        log = self.new_log()
        log.push(demo_undo, what='a')
        log.close()
        self.replace_when_locked(
            self.written().replace(b'"a"', b'"b"'))
        self.adopt().unwind()
        self.assertEqual(['undo a'], journal)

    def test_log_that_was_locked_is_what_must_be_finished(self) -> None:
        log = self.new_log()
        log.push(demo_undo, what='a')
        log.close()
        self.replace_when_locked(b'')
        self.assertRaises(exception.GuestBusy, self.new_log)


class TestCalling(UndoTestCase):
    """A call whose connection breaks may go on without us."""

    def call(self, error: Exception) -> bool:
        log = self.new_log()
        try:
            with log.calling():
                raise error
        except type(error):
            pass
        log.close()
        return log.surroundings.owner_died

    def test_way_back_looks_how_it_ends(self) -> None:
        for domain in libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE:
            self.assertTrue(self.call(guests.LibvirtError(
                'Managed save', fakes.libvirt_error(
                    libvirt.VIR_ERR_SYSTEM_ERROR, domain=domain))))

    def test_call_that_was_refused_has_ended(self) -> None:
        self.assertFalse(self.call(guests.LibvirtError(
            'Managed save', fakes.libvirt_error(
                libvirt.VIR_ERR_OPERATION_FAILED))))
        self.assertFalse(self.call(exception.GuestGone('gone')))


class TestRead(UndoTestCase):

    def test_logs_of_a_directory(self) -> None:
        self.new_log()
        self.new_file('state/other', b'')
        self.assertEqual([self.path], undo.logs_in(self.state))
        self.assertEqual([], undo.logs_in('/none'))

    def test_overdue_is_counted_in_uptime(self) -> None:
        self.patch_name('nova_snapshot_ext.undo.uptime', lambda: 100.0)
        log = self.new_log()
        log.push(demo_undo, within_s=10, what='a')
        log.push(demo_undo, what='b')
        self.assertEqual(
            [110.0, None],
            [each.overdue for each in undo.read(self.path).pending.values()])

    def test_first_line_says_whose_it_is(self) -> None:
        self.new_log()
        head = json.loads(self.written())
        self.assertEqual(
            (fakes.UUID, 'instance-00000001', fakes.URI, undo.boot_id(),
             os.getpid()),
            tuple(head[key] for key in
                  ('domain', 'name', 'uri', 'boot_id', 'pid')))

    def test_what_is_no_log_is_a_value_error(self) -> None:
        for content in (b'\xff\n', b'1\n', b'{}\n', b'null\n',
                        b'{"undo_log": 2}\n', b'{"undo_log": 1}\n',
                        b'{"undo_log": 1}\n[]\n',
                        b'{"undo_log": 1}\n{"entry": [1], "done": true}\n',
                        b'{"undo_log": 1}\n{"entry": 1}\n'):
            self.write(content)
            self.assertRaises(ValueError, undo.read, self.path)

    def test_log_without_a_whole_first_line_is_empty(self) -> None:
        self.write(b'{"undo_log"')
        self.assertEqual({}, undo.read(self.path).pending)
