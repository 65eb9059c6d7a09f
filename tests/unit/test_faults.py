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

"""What the harness of tests/faults makes of what it saw."""

import dataclasses
import pathlib
import random
import subprocess
import sys
import textwrap
import typing

from tests.faults import faults
from tests.faults import harness
from tests.faults import known
from tests.faults import mutants
from tests.faults import plan
from tests.faults import report
from tests.faults import results
from tests.unit import base

WAY = plan.Scenario('backup', 'streamed', 'agent')
OTHER = plan.Scenario('cold', 'staged', 'qcow2', 'glance')


def moment(number: int, **changes: typing.Any) -> plan.Moment:
    return plan.Moment(**{
        'number': number, 'name': f'step {number}', 'again': 0,
        'state': 'running', 'processes': frozenset({'guard'}), **changes})


def tried(number: int, fault: str = 'guard killed',
          **changes: typing.Any) -> plan.Try:
    return plan.Try(**{
        'scenario': WAY, 'number': number, 'step': f'step {number}',
        'fault': fault, 'seed': 1, 'ended': 'done', 'by': 'itself',
        'image': 'complete', 'seconds': 0.5, **changes})


class TestApplicable(base.TestCase):

    def names(self, **changes: typing.Any) -> set[str]:
        return {fault.name for _, _, fault in harness.applicable(
            {WAY: [moment(1, **changes)]}, lambda scenario, fault: True)}

    def test_process_that_is_not_there_is_not_killed(self) -> None:
        self.assertIn('guard killed', self.names())
        self.assertNotIn('mover killed', self.names())
        self.assertIn('mover killed', self.names(
            processes=frozenset({'mover'})))

    def test_guest_that_is_off_is_not_destroyed(self) -> None:
        self.assertNotIn('guest destroyed', self.names(state='off'))
        self.assertIn('guest destroyed', self.names(state='paused'))
        self.assertNotIn('guest powers off', self.names(state='paused'))

    def test_faults_of_glance_need_glance(self) -> None:
        self.assertNotIn('Glance killed', self.names())
        cells = harness.applicable(
            {OTHER: [moment(1)]}, lambda scenario, fault: True)
        self.assertIn('Glance killed', [fault.name for _, _, fault in cells])

    def test_undefined_guest_is_gone_if_it_was_off(self) -> None:
        fault = faults.BY_NAME['guest undefined']
        self.assertEqual('gone', fault.leaves_guest(
            moment(1, state='off'), 'running'))
        self.assertEqual('transient', fault.leaves_guest(
            moment(1), 'running'))
        self.assertEqual('running', faults.BY_NAME[
            'guard killed'].leaves_guest(moment(1), 'running'))


class TestPlan(base.TestCase):

    def test_each_way_has_a_name_of_its_own(self) -> None:
        names = [str(each) for each in plan.SCENARIOS]
        self.assertEqual(len(names), len(set(names)))
        self.assertIn('cold, backup job, staged, directory', names)
        self.assertIn('domain, streamed, glance', names)
        self.assertIn('domain, disks alone, streamed, directory', names)

    def test_every_flow_is_tried(self) -> None:
        self.assertEqual({'backup', 'cold', 'domain', 'live'},
                         {each.flow for each in plan.SCENARIOS})


class TestResults(base.TestCase):

    def test_saved_results_come_back(self) -> None:
        found = results.Results(tries=[tried(1, harm=('it is off',))])
        found.steps[str(WAY)] = [moment(1), moment(2)]
        path = pathlib.Path(self.directory) / 'results.json'
        found.save(path)
        self.assertEqual(found, results.load(path))

    def test_runs_side_by_side_add_up(self) -> None:
        one = results.Results('2026-01-02', {str(WAY): [moment(1)]},
                              [tried(1)], 50.0, 'libvirt 9.0.0')
        two = results.Results('2026-01-01', {str(OTHER): [moment(2)]},
                              [tried(2)], 60.0, 'libvirt 9.0.0')
        self.assertEqual(results.Results(
            '2026-01-01', one.steps | two.steps, [tried(1), tried(2)], 60.0,
            'libvirt 9.0.0'), results.joined([one, two]))

    def test_least_tried_come_first(self) -> None:
        guard = faults.BY_NAME['guard killed']
        cells = [(WAY, moment(number), guard) for number in range(1, 5)]
        found = results.Results(tries=[tried(number)
                                       for number in (1, 2, 4)])
        order = found.least_tried(cells, random.Random(1))
        self.assertEqual(3, order[0][1].number)
        self.assertEqual({1, 2, 3, 4}, {cell[1].number for cell in order})

    def test_a_few_show_every_fault(self) -> None:
        chosen = [faults.BY_NAME[name] for name in (
            'guard killed', 'command line killed', 'QEMU killed')]
        cells = [(WAY, moment(number), fault)
                 for number in range(1, 9) for fault in chosen]
        order = results.Results().least_tried(cells, random.Random(1))
        self.assertEqual(set(chosen), {fault for _, _, fault in order[:3]})


class TestReport(base.TestCase):

    def test_cell_tells_the_images_and_what_fails(self) -> None:
        self.assertEqual('2c', report.cell([tried(1), tried(1)]))
        self.assertEqual('1c1n', report.cell(
            [tried(1), tried(1, image='none')]))
        self.assertEqual('1c!', report.cell([tried(1, wrong=('left',))]))

    def test_every_image_has_a_letter(self) -> None:
        self.assertEqual({'complete', 'none', 'queued', 'wrong', 'as it was'},
                         set(report.LETTERS))

    def test_rows_are_steps_and_columns_faults(self) -> None:
        found = results.Results(tries=[tried(2), tried(2, 'QEMU killed')])
        found.steps[str(WAY)] = [moment(1), moment(2)]
        made = report.by_step(found, WAY)
        codes = report.codes()
        self.assertEqual(
            ('Step', codes['guard killed'], codes['QEMU killed']),
            made.header)
        self.assertEqual([('1 step 1', '', ''), ('2 step 2', '1c', '1c')],
                         made.rows)

    def test_what_is_no_taking_comes_last(self) -> None:
        way = plan.Scenario('domain', 'streamed', 'raw',
                            action='revert, external')
        found = results.Results(tries=[
            tried(1, scenario=way, image='as it was'), tried(1)])
        for each in way, WAY:
            found.steps[str(each)] = [moment(1)]
        self.assertEqual(
            [('backup', 'streamed', 'directory'),
             ('domain, revert, external', '', '')],
            [row[:3] for row in report.by_way(found).rows])
        self.assertEqual([('1 step 1', '1a')],
                         report.by_step(found, way).rows)
        path = pathlib.Path(self.directory) / 'results.json'
        found.save(path)
        self.assertEqual(found, results.load(path))

    def test_what_fails_is_named_once_with_its_steps(self) -> None:
        bad = tried(1, wrong=('process mover 7',))
        found = results.Results(tries=[
            bad, dataclasses.replace(bad, step='step 3', number=3,
                                     wrong=('process mover 8',)),
            tried(2)])
        [row] = report.failing(found).rows
        self.assertEqual(('guard killed', 'backup', '2', 'step 1, step 3',
                          '``process mover N``', 'not known'), row)
        self.assertIn('3 faults, 0 guests harmed, 0 harmed as documented, '
                      '2 where', report.summary(found))

    def test_harm_that_is_documented_is_counted_on_its_own(self) -> None:
        self.patch(known, 'SHORTFALLS', (known.Shortfall(
            ('scratch read-only',), ('backup',), 'not write', 'so'),))
        named = tried(1, 'scratch read-only', harm=('it does not write',))
        both = tried(2, 'scratch read-only', harm=(
            'it does not write', 'it is off'))
        other = tried(3, harm=('it does not write',))
        found = results.Results(tries=[
            named, both, other, tried(4), tried(5, wrong=('left',))])
        found.steps[str(WAY)] = [moment(number) for number in range(1, 6)]
        self.assertIn('5 faults, 2 guests harmed, 1 harmed as documented, 4 '
                      'where', report.summary(found))
        self.assertEqual(
            {'scratch read-only': ('1', '1', '2'),
             'guard killed': ('1', '0', '2')},
            {row[1]: row[-3:] for row in report.by_fault(found).rows})
        self.assertEqual(('2', '1', '4'), report.by_way(found).rows[0][-3:])


class TestKnown(base.TestCase):

    def test_what_is_named_is_known_and_nothing_else(self) -> None:
        self.patch(known, 'SHORTFALLS', (known.Shortfall(
            ('scratch read-only',), ('backup',), 'job', 'QEMU is so'),))
        bad = tried(1, 'scratch read-only', harm=('it has a job: 5',))
        self.assertTrue(known.is_known(tried(1)))
        self.assertTrue(known.is_known(bad))
        self.assertEqual('QEMU is so', known.why(bad, bad.harm[0]))
        for other in (dataclasses.replace(bad, fault='scratch full'),
                      dataclasses.replace(bad, scenario=OTHER),
                      dataclasses.replace(bad, wrong=('process mover 7',))):
            self.assertFalse(known.is_known(other))


class TestMutants(base.TestCase):

    def test_each_undo_has_something_that_misses_it(self) -> None:
        shown = {*mutants.ON_GUESTS, *mutants.BY_UNIT_TESTS}
        self.assertEqual(mutants.undos(), shown)

    def test_undo_that_is_taken_out_does_nothing(self) -> None:
        script = textwrap.dedent('''
            from nova_snapshot_ext import undo
            from nova_snapshot_ext import workspace
            function = undo._STEPS['remove_directory']
            assert function is workspace.remove_directory
            try:
                function(None, path='/')
            except ValueError:
                print('refused')
        ''')
        for without, said in ((None, 'refused\n'), ('thaw', 'refused\n'),
                              ('remove_directory', '')):
            self.assertEqual(said, subprocess.run(
                [sys.executable, '-c', script], check=True, text=True,
                env=mutants.environment(without),
                stdout=subprocess.PIPE).stdout)
