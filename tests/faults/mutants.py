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

"""Whether each undo is missed: each is taken out, one at a time."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import typing

from benchmarks import table
from nova_snapshot_ext import plugins
from nova_snapshot_ext import undo
from tests.faults import faults
from tests.faults import harness
from tests.faults import plan

# Seconds for what comes at once where nothing is taken out
_PATIENCE_S = 15.0
_ROOT = pathlib.Path(__file__).parents[2]
_WITHOUT = pathlib.Path(__file__).with_name('without')
# As there.
_VARIABLE = 'NOVA_SNAPSHOT_EXT_WITHOUT_UNDO'


@dataclasses.dataclass(frozen=True)
class OnGuest:
    """A fault after which nothing but one undo brings all back.

    :ivar scenario: the way of the snapshot
    :ivar step: at which the fault comes
    """

    scenario: plan.Scenario
    step: str
    fault: str = 'command line killed'

    def __str__(self) -> str:
        return f'{self.scenario}: {self.step}: {self.fault}'


_BACKUP = plan.Scenario('backup', 'streamed', 'agent')
_COLD = plan.Scenario('cold', 'streamed', 'qcow2')

#: by the undo: what shows that it is missing
ON_GUESTS = {
    'thaw': OnGuest(_BACKUP, 'freeze_filesystems returned'),
    'end_backup': OnGuest(_BACKUP, 'begin_backup returned'),
    'remove_directory': OnGuest(_BACKUP, 'frozen'),
    'remove_part': OnGuest(_BACKUP, 'upload begun'),
    # One that is not stopped ends by itself.
    'end_mover': OnGuest(_BACKUP, 'upload begun',
                         'mover stopped, command line killed'),
    'end_copy': OnGuest(plan.Scenario('live', 'streamed', 'agent'),
                        'start_copy returned'),
    'start_guest': OnGuest(_COLD, 'save_memory returned'),
    'delete_internal_snapshot': OnGuest(_COLD, 'frozen'),
    'end_server': OnGuest(_COLD, 'frozen'),
    'let_run': OnGuest(plan.Scenario('cold', 'streamed', 'raw'),
                       'begin_backup returned'),
}
#: What the command line pushes for no guest that there is here (of several
#: disks, with devices of the host, with a disk that its user must borrow), or
#: for snapshots that stay and for rollbacks, and the unit tests that show it.
BY_UNIT_TESTS = {
    'come_back': 'tests.unit.test_domain',
    'delete_domain_snapshot': 'tests.unit.test_domain',
    'forget_domain_snapshot': 'tests.unit.test_domain',
    'let_taking_end': 'tests.unit.test_domain',
    'merge_external_snapshot': 'tests.unit.test_external',
    'let_overlays_be_taken': 'tests.unit.test_external',
    'come_back_to_overlays': 'tests.unit.test_external',
    'delete_left_overlays': 'tests.unit.test_external',
    'resume_guest': 'tests.unit.test_live',
    'attach_device': 'tests.unit.test_power',
    'restore_owner': 'tests.unit.test_borrowed',
    # Between two file names: no fault comes there.
    'remove_unfinished': 'tests.unit.test_directory',
}


def environment(name: str | None) -> dict[str, str]:
    """What a Python gets in which an undo does nothing.

    :param name: None for all that are there
    """
    changed = dict(os.environ)
    changed.pop(_VARIABLE, None)
    if name is not None:
        changed[_VARIABLE] = name
        changed['PYTHONPATH'] = os.pathsep.join(filter(None, (
            str(_WITHOUT), os.environ.get('PYTHONPATH'))))
    return changed


def undos() -> set[str]:
    """The names of all undos of this package."""
    plugins.load_all()
    return {name for name, function in undo._STEPS.items()
            if function.__module__.startswith('nova_snapshot_ext.')}


@dataclasses.dataclass(frozen=True)
class Found:
    """What came of one undo that was taken out.

    :ivar shown_by: the fault, or the tests
    :ivar without: what was wrong then
    :ivar complete: what was wrong with the undo in place
    """

    undo: str
    shown_by: str
    without: tuple[str, ...]
    complete: tuple[str, ...]

    @property
    def is_missed(self) -> bool:
        return bool(self.without) and not self.complete


def find(bench: harness.Bench, name: str) -> Found:
    """Take one undo out, and see what is missed; then see with it."""
    if name in ON_GUESTS:
        shown_by = ON_GUESTS[name]
        return Found(name, str(shown_by),
                     _on_guest(bench, shown_by, name),
                     _on_guest(bench, shown_by, None))
    if name in BY_UNIT_TESTS:
        module = BY_UNIT_TESTS[name]
        return Found(name, module, _by_tests(module, name),
                     _by_tests(module, None))
    return Found(name, 'nothing', (), ())


def _on_guest(bench: harness.Bench, wanted: OnGuest,
              without: str | None) -> tuple[str, ...]:
    with bench.running(environment(without)), bench.patient(_PATIENCE_S):
        trial = harness.Trial(bench, wanted.scenario, 0)
        tried = trial.attempt(
            plan.Moment(0, wanted.step, 0, 'running', frozenset()),
            faults.BY_NAME[wanted.fault], again=without is None)
    if tried is None:
        raise AssertionError(f'{wanted}: the step was not reached')
    if not tried.holds:
        bench.clear(wanted.scenario.guest)
    return tried.harm + tried.wrong


def _by_tests(module: str, without: str | None) -> tuple[str, ...]:
    done = subprocess.run(
        [sys.executable, '-m', 'unittest', module], cwd=_ROOT, text=True,
        env=environment(without), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    if not done.returncode:
        return ()
    return tuple(line for line in done.stdout.splitlines()
                 if line.startswith(('FAIL:', 'ERROR:'))) or (done.stdout,)


def shown(found: typing.Sequence[Found]) -> table.Table:
    return table.Table(
        'undos', 'What is missed of each undo that does nothing',
        ('Undo', 'Shown by', 'What was wrong without it', 'with it'),
        [(each.undo, each.shown_by,
          each.without[0].partition('\n')[0][:100] if each.without
          else 'nothing', '; '.join(each.complete)[:200] or 'nothing')
         for each in found])
