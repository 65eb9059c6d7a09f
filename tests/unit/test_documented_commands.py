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

"""The commands and files that documents name, against what there is.

What the parser of each program of ours says of a command; tests/cloud runs
those of the user's guide.
"""

import argparse
import collections.abc
import contextlib
import io
import os
import re
import subprocess

import fixtures
from oslo_config import cfg
from oslo_upgradecheck import upgradecheck

from benchmarks import cli as benchmarks
from nova_snapshot_ext.cmd import snapshot as nova_snapshot
from tests import documents
from tests.faults import cli as faults
from tests.faults import rollbacks
from tests.unit import base
from tests.unit import test_repository

Parse = collections.abc.Callable[[list[str]], object]

#: options that documents name of programs that are not ours
THEIRS = {
    '--force-share': 'qemu-img',
    '--load-snapshot': 'qemu-nbd',
    '--no-deps': 'pip',
    '--property': 'openstack',
    '--read-only': 'qemu-nbd',
}
#: what is made by a command, and what stands for a name
MADE = {'releasenotes/build/RELEASENOTES.rst', 'benchmarks/results/DATE.json'}


def status(words: list[str]) -> None:
    """Parse a command line of nova-snapshot-ext-status as it does."""
    conf = cfg.ConfigOpts()
    upgradecheck.register_cli_options(conf, upgradecheck.UpgradeCommands())
    conf([os.devnull if word == 'FILE' else word for word in words],
         project='nova', default_config_files=[])


def environments(words: list[str]) -> None:
    """Those that tox, or tools/run-tests, is to run."""
    names = [name for word in words for name in word.split(',')]
    missing = set(names) - test_repository.environments()
    if missing:
        raise ValueError(f'no such environment: {sorted(missing)}')


def after_option(words: list[str]) -> None:
    """``tox -e NAME …``"""
    if words[:1] != ['-e']:
        raise ValueError('no environment is named')
    environments(words[1:2])


def benchmarks_run(words: list[str]) -> None:
    """``benchmarks/run`` without a command takes and reports."""
    parser = benchmarks._parser()
    parser.parse_args(
        words if words[:1] in (['take'], ['report']) else ['take', *words])


class TestCommands(base.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.useFixture(fixtures.PythonPathEntry(
            os.path.join(documents.ROOT, 'tools')))
        from small_cloud import cli as cloud
        from small_cloud import state
        self.parsers: dict[str, argparse.ArgumentParser] = {
            'nova-snapshot': nova_snapshot._parser(),
            'tools/cloud': cloud._parser(state.State.from_environment()),
            'python -m tests.faults': faults._parser(),
            'python -m tests.faults.rollbacks': rollbacks._parser(),
        }
        self.programs: dict[str, Parse] = {
            **{name: parser.parse_args
               for name, parser in self.parsers.items()},
            'nova-snapshot-ext-status': status,
            'benchmarks/run': benchmarks_run,
            'tools/run-tests': environments,
            'tox': after_option,
            # What comes behind "tox -e faults".
            '--': faults._parser().parse_args,
        }

    def refused(self, name: str, words: list[str]) -> str | None:
        """Why a program does not take a command line; None if it does."""
        with contextlib.redirect_stderr(io.StringIO()) as said, \
                contextlib.redirect_stdout(io.StringIO()):
            try:
                self.programs[name](words)
            except SystemExit as end:
                return said.getvalue() if end.code else None
            except (ValueError, cfg.Error) as error:
                return str(error)
        return None

    def test_our_programs_take_each(self) -> None:
        counted = dict.fromkeys(self.programs, 0)
        wrong = []
        for document, command in documents.commands():
            found = documents.program_of(command, self.programs)
            if found is None:
                continue
            name, words = found
            counted[name] += 1
            # One that is named without its arguments.
            if (name in self.parsers and len(words) == 1
                    and words[0] in _commands_of(self.parsers[name])):
                continue
            why = self.refused(name, words)
            if why is not None:
                wrong.append(f'{document}: {command}: {why}')
        self.assertEqual([], wrong)
        self.assertEqual([], [name for name, count in counted.items()
                              if count == 0])
        self.assertGreater(counted['nova-snapshot'], 20)

    def test_commands_that_are_none_are_refused(self) -> None:
        for command in (
                'nova-snapshot create DOMAIN --into DIR',
                'nova-snapshot create DOMAIN --to DIR --disks some',
                'nova-snapshot undo',
                'nova-snapshot-ext-status upgrade check --table',
                'tools/cloud up --driver theirs',
                'tools/run-tests fault',
                'benchmarks/run --round 1 --part pipes --store disc',
                'python -m tests.faults run --hours 1',
                'python -m tests.faults.rollbacks --hours 1',
                'tox -e nova31'):
            found = documents.program_of(command, self.programs)
            assert found is not None, command
            self.assertIsNotNone(self.refused(*found), command)

    def test_each_option_is_one(self) -> None:
        known = {'--config-file', '--json', *THEIRS}
        for parser in (*self.parsers.values(), benchmarks._parser()):
            known.update(_options_of(parser))
        self.assertIn('--quiesce', known)
        self.assertIn('--keep-caches', known)
        self.assertEqual([], [
            f'{document}: {literal}'
            for document, literal in documents.literals()
            if re.match('--[a-z]', literal)
            and re.split('[ =]', literal)[0] not in known])

    def test_each_command_of_the_command_line_has_its_paragraph(
            self) -> None:
        text = documents.read('doc/source/reference/cli.rst')
        self.assertEqual(
            _commands_of(self.parsers['nova-snapshot']),
            set(re.findall(r'^``nova-snapshot (\w+)', text, re.M)) - {
                'help'})

    def test_exit_codes_are_those_of_the_program(self) -> None:
        text = documents.read('doc/source/reference/cli.rst')
        self.assertEqual(
            ['0', *map(str, (nova_snapshot.FAILED, nova_snapshot.USAGE,
                             nova_snapshot.REFUSED, nova_snapshot.NO_DOMAIN,
                             nova_snapshot.BUSY))],
            re.findall(r'^(\d)  \w', text, re.M))


class TestPaths(base.TestCase):

    def test_each_path_in_the_repository_is_there(self) -> None:
        tops = {name.split('/')[0] for name in self._tracked()}
        named = [(document, literal)
                 for document, literal in documents.literals()
                 if re.fullmatch(r'[\w./-]+', literal)
                 and '/' in literal and literal.split('/')[0] in tops]
        self.assertGreater(len(named), 40)
        self.assertEqual([], [
            f'{document}: {path}' for document, path in named
            if path not in MADE
            and not os.path.exists(os.path.join(documents.ROOT, path))])

    def test_each_module_is_there(self) -> None:
        ours = {os.path.basename(name) for name in self._tracked()}
        named = [(document, literal)
                 for document, literal in documents.literals()
                 if re.fullmatch(r'[\w/]+\.py', literal)]
        self.assertGreater(len(named), 50)
        self.assertEqual([], [
            f'{document}: {path}' for document, path in named
            if os.path.basename(path) not in ours])

    def test_no_path_is_broken_by_the_end_of_a_line(self) -> None:
        # The blank in its place is shown.
        self.assertEqual([], [
            f'{document}: {literal}'
            for document, literal in documents.literals()
            if re.search(r'[\w>]/ \w', literal)])

    def test_nothing_is_left_of_a_merge(self) -> None:
        for document in documents.names():
            before = ''
            for line in documents.read(document).splitlines():
                self.assertNotRegex(line, r'^(<{7}|>{7}|\|{7})( |$)')
                if line == '=' * 7:
                    self.assertEqual(7, len(before), document)
                before = line

    def _tracked(self) -> list[str]:
        done = subprocess.run(['git', 'ls-files'], cwd=documents.ROOT,
                              capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.splitlines()
        # An sdist.
        return [os.path.relpath(os.path.join(directory, name),
                                documents.ROOT)
                for directory, _, names in os.walk(documents.ROOT)
                for name in names]


def _subparsers(parser: argparse.ArgumentParser,
                ) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _commands_of(parser: argparse.ArgumentParser) -> set[str]:
    return set(_subparsers(parser))


def _options_of(parser: argparse.ArgumentParser) -> set[str]:
    return set(parser._option_string_actions).union(*(
        _options_of(each) for each in _subparsers(parser).values()))
