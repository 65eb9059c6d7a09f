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

"""What CI and the contributor's guide call, against what there is."""

import collections.abc
import configparser
import os
import pathlib
import re
import subprocess
import sys
import typing

import yaml

import nova_snapshot_ext
from tests.unit import base

ROOT = os.path.dirname(os.path.dirname(nova_snapshot_ext.__file__))


def read(*path: str) -> str:
    with open(os.path.join(ROOT, *path)) as file:
        return file.read()


def environments() -> set[str]:
    """Those of tox.ini."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(read('tox.ini'))
    return {name for section in parser.sections()
            if section.startswith('testenv:')
            for name in section.removeprefix('testenv:').strip(
                '{}').split(',')}


def by_default() -> list[str]:
    """Those that tools/run-tests runs."""
    [found] = re.findall(
        r'environments=\(([^)]+)\)', read('tools', 'run-tests'))
    return str(found).split()


class TestEnvironments(base.TestCase):

    def test_all_tests_are_there(self) -> None:
        self.assertEqual(set(), set(by_default()) - environments())

    def test_only_these_need_nova(self) -> None:
        # Environments without it would lack a whole module of tests.
        modules = [
            '.'.join(path.relative_to(ROOT).with_suffix('').parts)
            for folder in ('functional', 'cloud', 'faults')
            for path in sorted(pathlib.Path(ROOT, 'tests', folder).rglob(
                '[!_]*.py')) if 'without' not in path.parts]
        self.assertIn('tests.cloud.test_status', modules)
        subprocess.run(
            [sys.executable, '-c',
             'import importlib, sys\n'
             'sys.modules["nova"] = None\n'
             'for name in sys.argv[1:]:\n'
             '    importlib.import_module(name)\n', *modules],
            cwd=ROOT, check=True)

    def test_ci_runs_what_a_developer_does(self) -> None:
        workflow = yaml.safe_load(read('.github', 'workflows', 'ci.yml'))
        matrix = workflow['jobs']['tests']['strategy']['matrix']
        self.assertEqual(
            sorted([*by_default(), 'nova32', 'nova33']),
            sorted(' '.join(matrix['environments']).split()))

    def test_zuul_calls_tox_environments_and_jobs_that_are_there(
            self) -> None:
        document = yaml.safe_load(read('.zuul.yaml'))
        jobs = {each['job']['name']: each['job'] for each in document
                if 'job' in each}
        called = set(self._called(jobs.values()))
        self.assertLess({'pep8', 'nova', 'functional'}, called)
        self.assertEqual(set(), called - environments())
        for job in jobs.values():
            if 'run' in job:
                self.assertIn('tools/run-tests', read(job['run']))
        [project] = (each['project'] for each in document
                     if 'project' in each)
        self.assertEqual(
            [], [name for name in project['check']['jobs']
                 if name not in jobs])

    def _called(self, jobs: collections.abc.Iterable[dict[str, typing.Any]],
                ) -> collections.abc.Iterator[str]:
        for job in jobs:
            given = job.get('vars', {})
            if job['parent'] != 'devstack-tempest':
                # Tempest has environments of its own.
                yield from re.findall(
                    r'[\w-]+', given.get('tox_envlist', ''))
            yield from given.get('environments', '').split()

    def test_guide_has_each_environment(self) -> None:
        rows = re.findall(r'^   \* - (``tox -e .*``)$',
                          read('CONTRIBUTING.rst'), re.M)
        self.assertEqual(environments(), {
            name for row in rows
            for name in re.findall(r'``(?:tox -e )?([\w-]+)', row)})
