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

"""What is known of a guest's domain snapshots survives, whole."""

import dataclasses
import json
import os

from nova_snapshot_ext import domain_records
from nova_snapshot_ext import exception
from tests.unit import base
from tests.unit import fakes

ONE, TWO, THREE = (f'snapshot-ext-{32 * letter}' for letter in 'abc')


def record(name: str, parent: str | None = None, **changes: object,
           ) -> domain_records.Record:
    made = domain_records.Record(
        name=name, uuid=fakes.UUID, image_id=f'image-{name[-1]}',
        title=f'title {name[-1]}', parent=parent,
        rollback=domain_records.Rollback.MEMORY,
        taken_at=f'2026-01-01T00:00:0{ord(name[-1]) - ord("a")}+00:00',
        disks={'vda': '/disk'}, capacities={'vda': 1024 ** 2},
        domain_xml='<domainsnapshot/>', extra={'image_ref': 'base'})
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


class TestRecords(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.records = domain_records.Records(self.state, fakes.UUID)

    def again(self) -> domain_records.Records:
        """As another process sees them."""
        return domain_records.Records(self.state, fakes.UUID)

    def add_three(self) -> None:
        for name, parent in ((ONE, None), (TWO, ONE), (THREE, TWO)):
            self.records.add(record(name, parent))

    def test_there_may_be_none(self) -> None:
        self.assertEqual([], self.records.all())
        self.assertIsNone(self.records.current)
        self.assertIsNone(self.records.find('image-a'))
        self.records.remove(ONE)
        self.records.forget()
        self.assertEqual([], os.listdir(self.state))
        self.assertEqual([], domain_records.uuids(self.state))

    def test_what_is_added_is_found_by_all_its_names(self) -> None:
        self.add_three()
        self.assertEqual([ONE, TWO, THREE],
                         [each.name for each in self.again().all()])
        for which in ('image-b', TWO, 'title b'):
            self.assertEqual(record(TWO, ONE), self.again().find(which))
        self.assertEqual(THREE, self.again().current)
        self.assertEqual([fakes.UUID], domain_records.uuids(self.state))

    def test_external_one_has_its_files(self) -> None:
        made = record(ONE, files=domain_records.Files(
            {'vda': 'raw'}, '/memory'))
        self.records.add(made)
        self.assertEqual(made, self.again().find(ONE))
        self.assertTrue(made.external)
        # An older release reads what it knows.
        self.records.replace(record(ONE))
        with open(os.path.join(self.records.directory,
                               f'{ONE}.json')) as file:
            self.assertNotIn('files', json.load(file))

    def test_guest_stays_where_it_is_when_a_record_is_written_anew(
            self) -> None:
        self.add_three()
        moved: list[str | None] = []
        self.patch_name(
            'nova_snapshot_ext.domain_records.Records.set_current',
            lambda records, name: moved.append(name))
        self.records.replace(record(ONE, title='other'))
        self.records.remove(ONE)
        self.assertEqual([], moved)
        self.assertEqual([None, TWO], [
            each.parent for each in self.again().all()])

    def test_newest_of_a_title_is_found(self) -> None:
        for name in (TWO, ONE):
            self.records.add(record(name, title='same'))
        found = self.records.find('same')
        assert found is not None
        self.assertEqual(TWO, found.name)

    def test_children_of_one_that_goes_are_its_parents(self) -> None:
        self.add_three()
        self.records.set_current(TWO)
        self.records.remove(TWO)
        self.assertEqual([(ONE, None), (THREE, ONE)], [
            (each.name, each.parent) for each in self.again().all()])
        self.assertEqual(ONE, self.again().current)
        self.records.remove(ONE)
        self.assertEqual(
            [None], [each.parent for each in self.again().all()])
        self.assertIsNone(self.again().current)

    def test_one_that_can_not_be_read_does_not_keep_another(self) -> None:
        self.add_three()
        with open(f'{self.records.directory}/{THREE}.json', 'w'):
            pass
        self.records.remove(ONE)
        self.assertEqual([(TWO, None)], [
            (each.name, each.parent) for each in self.records.readable()])

    def test_directories_that_another_makes_or_drops_meanwhile(self) -> None:
        parent = os.path.dirname(self.records.directory)
        real = os.mkdir
        done: list[str] = []

        def mkdir(path: str, *arguments: int, **more: int) -> None:
            done.append(path)
            if len(done) == 1:
                real(parent)            # by another
            elif len(done) == 2:
                os.rmdir(parent)
            real(path, *arguments, **more)
        self.patch_name('os.geteuid', lambda: 1234)
        self.patch_name('os.mkdir', mkdir)
        self.records.add(record(ONE))
        self.assertEqual(4, len(done))
        self.assertEqual([ONE], [each.name for each in self.records.all()])

    def test_last_one_leaves_nothing(self) -> None:
        self.add_three()
        for name in (ONE, TWO, THREE):
            self.records.remove(name)
            self.records.remove(name)
        self.assertEqual([], os.listdir(self.state))

    def test_other_guests_are_left_alone(self) -> None:
        self.records.add(record(ONE))
        other = domain_records.Records(
            self.state, fakes.UUID.replace('5', '6'))
        other.add(record(ONE))
        self.records.forget()
        self.assertEqual(1, len(other.all()))

    def test_record_is_flushed_before_it_has_its_name(self) -> None:
        seen = []
        real = os.fsync

        def fsync(descriptor: int) -> None:
            real(descriptor)
            path = os.readlink(f'/proc/self/fd/{descriptor}')
            seen.append(path.removeprefix(self.records.directory))
        self.patch_name('os.fsync', fsync)
        self.records.add(record(ONE))
        [first] = [path for path in seen if ONE in path]
        self.assertRegex(first, '\\.json\\.[0-9a-f]{8}$')
        self.assertIn('', seen)         # the directory

    def test_record_that_was_cut_off_is_none(self) -> None:
        self.records.add(record(ONE))
        with open(f'{self.records.directory}/{TWO}.json.12345678', 'w'):
            pass
        self.assertEqual([ONE], [each.name for each in self.records.all()])
        self.records.remove(ONE)
        self.assertEqual([], os.listdir(self.state))

    def test_record_that_makes_no_sense_is_named(self) -> None:
        self.records.add(record(ONE))
        path = f'{self.records.directory}/{ONE}.json'
        for content in ('', '{}', '[]', '{"domain_snapshot": 2}',
                        '{"domain_snapshot": 1, "rollback": "memory"}'):
            with open(path, 'w') as file:
                file.write(content)
            self.assertRaisesRegex(
                exception.SnapshotError, path, self.records.all)
        self.records.forget()
        self.assertEqual([], os.listdir(self.state))

    def test_current_one_that_is_gone_is_none(self) -> None:
        self.records.add(record(ONE))
        self.records.set_current(TWO)
        self.assertIsNone(self.records.current)

    def test_names_lead_nowhere_else(self) -> None:
        for uuid in ('..', '', f'{fakes.UUID}/..', 'x' * 36):
            self.assertRaises(ValueError, domain_records.Records,
                              self.state, uuid)
        for name in ('..', '../a', 'theirs', ONE + '0'):
            self.assertRaises(
                ValueError, self.records.add,
                dataclasses.replace(record(ONE), name=name))
            self.records.remove(name)
        self.assertEqual([], os.listdir(self.state))

    def test_root_makes_none_that_nova_could_not_change(self) -> None:
        chowned = []
        self.patch_name('os.fchown', lambda descriptor, uid, gid: (
            chowned.append((uid, gid))))
        self.patch_name('os.geteuid', lambda: 0)
        os.chown(self.state, 1234, 1234) if os.getuid() == 0 else (
            self.skipTest('it takes root'))
        self.records.add(record(ONE))
        status = os.stat(self.records.directory)
        self.assertEqual((1234, 1234), (status.st_uid, status.st_gid))
        self.assertEqual([(1234, 1234)] * 2, chowned)
