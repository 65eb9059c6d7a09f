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

"""What the benchmarks compute of what they measure."""

import os
import pathlib

from benchmarks import console
from benchmarks import contestants
from benchmarks import proc
from benchmarks import report
from benchmarks import results
from benchmarks import spread
from benchmarks import table
from benchmarks import targets
from benchmarks import watching
from tests.unit import base

MIB = 1024 ** 2


def snapshot(contestant: str, seconds: float, **changes: object,
             ) -> results.Snapshot:
    return results.Snapshot(**{  # type: ignore[arg-type]
        'contestant': contestant, 'round': 1, 'data_gib': 2.0,
        'seconds': seconds, 'image_bytes': 2048 * MIB, 'staged_bytes': 0,
        'scratch_bytes': MIB, 'reserved_bytes': 160 * MIB,
        'touched_bytes': 2 * MIB, 'written_bytes': 4096,
        'device_bytes': None, 'pause_s': 0.1,
        'silence_s': 0.2, 'idle_silence_s': 0.02, 'rounds_per_s': 35.0,
        'idle_rounds_per_s': 50.0, 'compute_cpu_s': 1.0,
        'children_cpu_s': 2.0, 'qemu_cpu_s': 3.0, 'idle_qemu_cpu': 0.5,
        **changes})


def run_of(*snapshots: results.Snapshot) -> results.Results:
    return results.Results(
        about={'data_gib': 2.0, 'shares': [0, 90], 'date': 'today',
               'commit': 'abc', 'processors': 2, 'processor': 'one',
               'memory_gib': 8, 'kernel': '6', 'qemu': '7', 'libvirt': '9',
               'versions': {}, 'rounds': 5, 'growth_rounds': 1,
               'drop_caches': True, 'store': 'memory'},
        snapshots=list(snapshots))


class TestSpread(base.TestCase):

    def test_median_least_and_most(self) -> None:
        found = spread.Spread.of([3.0, 1.0, None, 2.0, 10.0])
        self.assertEqual(spread.Spread(2.5, 1.0, 10.0, 4), found)
        self.assertEqual('2.5 (1.0 – 10.0)', found.text(1))

    def test_what_looks_the_same_has_no_spread(self) -> None:
        self.assertEqual('1.25', spread.Spread.of([1.25]).text(2))
        self.assertEqual('1.3', spread.Spread.of([1.26, 1.34]).text(1))

    def test_nothing_measured(self) -> None:
        self.assertIsNone(spread.Spread.of([None]))
        self.assertIsNone(spread.ratio(None, spread.Spread.of([1.0])))
        self.assertIsNone(spread.ratio(
            spread.Spread.of([1.0]), spread.Spread.of([0.0])))

    def test_ratio_is_of_medians(self) -> None:
        self.assertEqual(2.0, spread.ratio(
            spread.Spread.of([4.0, 1.0, 100.0]), spread.Spread.of([2.0])))


class TestConsole(base.TestCase):

    def test_counters_that_come_in_pieces(self) -> None:
        parser = console.Parser()
        self.assertIsNone(parser.feed(b'booted from 7\r\ncoun'))
        self.assertIsNone(parser.feed(b'ter 12'))
        self.assertEqual(125, parser.feed(b'3\r\ncounter 124\r\ncounter 125'
                                          b'\r\ncounter 1'))
        self.assertEqual(126, parser.feed(b'26\n'))
        self.assertIsNone(parser.feed(b'\n'))

    def moments(self, *pairs: tuple[float, int]) -> list[console.Moment]:
        return [console.Moment(at, counter) for at, counter in pairs]

    def test_rounds_between_two_times(self) -> None:
        moments = self.moments((1, 10), (2, 20), (3, 31), (4, 40))
        self.assertEqual(21, console.rounds_between(moments, 1.5, 3.5))
        self.assertEqual(0, console.rounds_between(moments, 3.1, 3.9))
        self.assertEqual(0, console.rounds_between([], 0, 9))
        # What a guest had counted before it was watched is none of its pace.
        self.assertEqual(21, console.rounds_between(moments, 0.5, 3.5))

    def test_longest_silence_reaches_over_the_edges(self) -> None:
        moments = self.moments((1, 1), (1.5, 2), (4, 3), (4.5, 4))
        self.assertEqual(2.5, console.longest_silence(moments, 2, 3))
        self.assertEqual(0.5, console.longest_silence(moments, 4.1, 4.4))

    def test_silence_that_has_not_ended(self) -> None:
        self.assertEqual(5, console.longest_silence(
            self.moments((1, 1), (2, 2)), 0, 7))

    def test_file_that_begins_anew_or_is_replaced(self) -> None:
        path = pathlib.Path(self.new_file('console', b'counter 1\n'))
        with console.Follower(path) as follower:
            self.wait_opened(follower, path)
            self.assertEqual(5, follower.moments[-1].counter)
            path.write_bytes(b'counter 6\n')
            self.wait_for(follower, 6)
            new = pathlib.Path(self.new_file('new', b'counter 7\n'))
            new.replace(path)
            self.wait_for(follower, 7)
        # What was there before it was followed is old.
        self.assertNotIn(1, [each.counter for each in follower.moments])

    def wait_opened(self, follower: console.Follower,
                    path: pathlib.Path) -> None:
        """It may begin at the end of what is written until it opens."""
        while not follower.moments:
            with path.open('ab') as file:
                file.write(b'counter 5\n')
            follower.wait_past(0, 0.05)

    def wait_for(self, follower: console.Follower, counter: int) -> None:
        self.assertTrue(follower.wait_past(0, 10))
        while follower.moments[-1].counter != counter:
            at = follower.moments[-1].at
            self.assertTrue(follower.wait_past(at, 10))


class TestProc(base.TestCase):

    STAT = ('7 (a name) with) R 1 7 7 0 -1 4194560 1 2 3 4 '
            '150 50 300 100 20 0 1 0 5 6 7')

    def test_seconds_of_a_process_and_of_its_children(self) -> None:
        self.patch_name('benchmarks.proc._TICKS', 100)
        self.assertEqual((2.0, 4.0), proc.parse_stat(self.STAT))

    def test_bytes_sent_to_a_disk(self) -> None:
        self.assertEqual(4096, proc.parse_written(
            'wchar: 9\nread_bytes: 1\nwrite_bytes: 4096\n'
            'cancelled_write_bytes: 7\n'))

    def test_bytes_written_to_a_device(self) -> None:
        text = ('   8       0 sda 1 2 3 4 5 6 70 8 9 0 0\n'
                ' 254       1 vda1 1 2 3 4 5 6 10 8 9 0 0\n')
        self.assertEqual(5120, proc.parse_diskstats(text, (254 << 8) + 1))
        self.assertIsNone(proc.parse_diskstats(text, 99 << 8))

    def test_own_process(self) -> None:
        self.assertGreater(proc.used(os.getpid()).own_s, 0)
        self.assertGreater(proc.peak_resident_bytes(os.getpid()), MIB)


class TestWatching(base.TestCase):

    def test_what_files_take_of_the_disk(self) -> None:
        directory = pathlib.Path(self.new_directory('held'))
        self.assertEqual(0, watching.held_bytes(directory))
        self.assertEqual(0, watching.held_bytes(directory / 'gone'))
        (directory / 'below').mkdir()
        self.assertEqual(0, watching.held_bytes(directory))
        with (directory / 'below' / 'sparse').open('wb') as file:
            file.write(bytes(MIB))
            file.truncate(50 * MIB)
        held = watching.held_bytes(directory)
        self.assertTrue(MIB <= held < 2 * MIB, held)


class TestContestants(base.TestCase):

    def test_every_flow_by_every_transfer(self) -> None:
        names = {each.name for each in contestants.every((0,))}
        self.assertEqual(
            {f'{flow}-{transfer}' for flow in contestants.FLOWS
             for transfer in contestants.TRANSFERS}
            | {'nova-live', 'nova-cold', 'floor', contestants.FIRST}, names)

    def test_each_setup_is_needed_once_a_round(self) -> None:
        setups = [each.setup for each in contestants.every((0, 90))
                  if each.setup is not None]
        changes = [one for one, other in zip(setups, setups[1:])
                   if one != other]
        self.assertEqual(len(set(setups)) - 1, len(changes))

    def test_second_round_goes_backwards(self) -> None:
        known = contestants.every()
        self.assertEqual(list(known), contestants.round_of(known, 1))
        self.assertEqual(list(known)[::-1], contestants.round_of(known, 2))

    def test_unknown_name(self) -> None:
        error = self.assertRaises(
            ValueError, contestants.chosen, contestants.every(), ['nobody'])
        self.assertIn('nobody', str(error))
        self.assertIn('floor', str(error))


class TestResults(base.TestCase):

    def test_saved_and_loaded(self) -> None:
        taken = run_of(snapshot('floor', 10.0))
        taken.freezes.append(results.Freeze(2.0, 0.1, 0.2))
        taken.pipes.append(results.Pipe(2.0, 5, 1.0, 2.0))
        taken.memory.append(results.Memory(5, 6, 1.0, 2.0))
        taken.skipped.append('something')
        path = pathlib.Path(self.directory, 'saved.json')
        taken.save(path)
        self.assertEqual(taken, results.load(path))

    def test_what_it_has_already(self) -> None:
        taken = run_of(snapshot('floor', 10.0))
        self.assertTrue(taken.has('floor', 2.0, 1))
        self.assertFalse(taken.has('floor', 2.0, 2))
        self.assertFalse(taken.has('floor', 4.0, 1))


class TestTargets(base.TestCase):

    def verdicts(self, taken: results.Results) -> list[bool | None]:
        return [each.met for each in targets.all_of(taken)]

    def reached(self) -> results.Results:
        """A run that reaches everything, by little."""
        taken = run_of(
            snapshot('floor', 20.0),
            snapshot(contestants.FIRST, 21.0),
            snapshot(contestants.DEFAULT, 25.0, rounds_per_s=30.0),
            snapshot(contestants.NOVA_LIVE, 41.7, rounds_per_s=30.0))
        taken.freezes += [results.Freeze(1.0, 0.1, 0.1),
                          results.Freeze(8.0, 0.14, 0.1)]
        taken.pipes.append(results.Pipe(2.0, 5, 1.0, 1.0))
        taken.memory.append(results.Memory(5, 100 * MIB, 1.0, 1.0))
        return taken

    def test_all_reached(self) -> None:
        self.assertEqual([True] * 10, self.verdicts(self.reached()))

    def test_nothing_measured_reaches_nothing(self) -> None:
        self.assertEqual([None] * 10, self.verdicts(run_of()))

    def test_each_can_be_missed(self) -> None:
        taken = run_of(
            snapshot('floor', 20.0),
            snapshot(contestants.FIRST, 21.1),
            snapshot(contestants.DEFAULT, 25.1, rounds_per_s=29.9,
                     staged_bytes=1, scratch_bytes=4 * MIB),
            snapshot(contestants.NOVA_LIVE, 41.6, rounds_per_s=30.0))
        taken.freezes += [results.Freeze(1.0, 0.1, 0.1),
                          results.Freeze(8.0, 0.16, 0.1)]
        taken.pipes.append(results.Pipe(2.0, 5, 1.01, 1.0))
        taken.memory.append(results.Memory(5, 100 * MIB + 1, 1.0, 1.0))
        self.assertEqual([False] * 10, self.verdicts(taken))

    def test_pause_that_does_not_grow_can_be_too_long(self) -> None:
        taken = run_of()
        taken.freezes += [results.Freeze(size, 0.21, 0.1)
                          for size in (1.0, 8.0)]
        self.assertIn(False, self.verdicts(taken))

    def test_growth_does_not_count_for_ratios(self) -> None:
        taken = self.reached()
        taken.snapshots.append(
            snapshot(contestants.DEFAULT, 1000.0, data_gib=8.0))
        self.assertEqual([True] * 10, self.verdicts(taken))

    def test_metadata_of_a_scratch(self) -> None:
        self.assertEqual((6 + 2 * 3) * 64 * 1024,
                         targets.metadata_bytes(2.0))


class TestTables(base.TestCase):

    TABLE = table.Table('name', 'Title', ('a', 'bb'),
                        [('1', ''), ('long, one', 'x')])

    def test_text(self) -> None:
        self.assertEqual(
            'Title\n\na          bb\n---------  --\n1\nlong, one  x\n',
            self.TABLE.text())

    def test_rst(self) -> None:
        self.assertEqual(
            '.. list-table:: Title\n   :header-rows: 1\n\n'
            '   * - a\n     - bb\n   * - 1\n     -\n'
            '   * - long, one\n     - x\n', self.TABLE.rst())

    def test_csv(self) -> None:
        self.assertEqual('a,bb\n1,\n"long, one",x\n', self.TABLE.csv())

    def test_contestants_by_the_floor(self) -> None:
        made = report.contestants_table(run_of(
            snapshot('floor', 10.0), snapshot('backup-streamed', 12.0),
            snapshot('backup-streamed', 14.0, round=2)))
        self.assertEqual(
            [('upload of the finished file', '1.00'),
             ('backup, streamed', '1.30')],
            [row[:2] for row in made.rows])
        self.assertEqual('13.0 (12.0 – 14.0)', made.rows[1][2])

    def test_flows_are_compared_by_their_best_transfer(self) -> None:
        made = report.choice_table(run_of(
            snapshot('nova-live', 20.0), snapshot('backup-staged', 13.0),
            snapshot('cold-streamed', 14.0),
            snapshot('backup-streamed', 12.0)))
        self.assertEqual(
            [('backup, streamed', '12.0'), ('cold, streamed', '14.0'),
             ("Nova's driver, live", '20.0')],
            [row[:2] for row in made.rows])

    def test_settings_of_guest_share_beside_the_default(self) -> None:
        default = snapshot('backup-streamed', 12.0)
        self.assertEqual([], report.shares_table(run_of(default)).rows)
        made = report.shares_table(run_of(
            default, snapshot('floor', 10.0),
            snapshot('backup-streamed-share-0', 11.0),
            snapshot('backup-streamed-share-90', 30.0, rounds_per_s=45.0)))
        self.assertEqual(
            [('0', '1.10', '11.0', '0.70'), ('90', '3.00', '30.0', '0.90'),
             ('the default', '1.20', '12.0', '0.70')],
            [row[:4] for row in made.rows])

    def test_every_row_has_a_cell_for_each_heading(self) -> None:
        taken = run_of(*(snapshot(each.name, 10.0, data_gib=size)
                         for each in contestants.every((0, 90))
                         for size in (2.0, 4.0)))
        for made in report.tables(taken):
            for row in made.rows:
                self.assertEqual(len(made.header), len(row), made.name)

    def test_few_rounds_are_called_a_trial(self) -> None:
        taken = run_of()
        self.assertNotIn('trial', report.about_table(taken).text())
        taken.about['rounds'] = 4
        self.assertIn('trial', report.about_table(taken).text())

    def test_growth_is_of_those_with_several_sizes(self) -> None:
        made = report.growth_table(run_of(
            snapshot('floor', 10.0), snapshot('nova-cold', 10.0),
            snapshot('floor', 40.0, data_gib=8.0)))
        self.assertEqual(['2', '8'], [row[1] for row in made.rows])

    def test_files_are_written(self) -> None:
        taken = run_of(snapshot('floor', 10.0))
        path = pathlib.Path(self.directory, 'run.json')
        documentation = pathlib.Path(self.directory, 'doc')
        report.write(taken, path, documentation)
        self.assertIn('upload of the finished file,1.00', path.with_name(
            'run-contestants.csv').read_text())
        self.assertIn('list-table', (
            documentation / 'targets.inc').read_text())
        self.assertEqual('Not measured in this run.\n', (
            documentation / 'growth.inc').read_text())
        self.assertIn('upload of the finished file', report.text(taken))
