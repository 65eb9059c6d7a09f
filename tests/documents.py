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

"""The documents of the repository, and the literals and blocks in them."""

import collections.abc
import pathlib
import re
import shlex
import textwrap

ROOT = pathlib.Path(__file__).parents[1]

Found = collections.abc.Iterator[tuple[str, str]]


def names() -> list[str]:
    """Paths of all that is written in reStructuredText by hand."""
    return [*(f'{name}.rst' for name in (
        'README', 'CONTRIBUTING', 'HACKING', 'SECURITY', 'devstack/README')),
        *sorted(str(path.relative_to(ROOT))
                for path in (ROOT / 'doc' / 'source').rglob('*.rst'))]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def literals() -> Found:
    """What is between double backquotes, in one line."""
    for name in names():
        for literal in re.findall(r'``(.+?)``', read(name), re.S):
            yield name, ' '.join(literal.split())


def blocks(language: str = '') -> Found:
    """Literal blocks, without what they are indented by.

    :param language: those that a directive says to be of it; without: those
        of which nothing is said
    """
    begin = (re.compile(rf'^( *)\.\. code-block:: {language}$') if language
             else re.compile(r'^( *)(?!\.\. \w+::).*::$'))
    for name in names():
        lines = read(name).splitlines()
        for number, line in enumerate(lines):
            begun = begin.match(line)
            if begun:
                yield name, _below(lines[number + 1:], len(begun.group(1)))


def _below(lines: list[str], indent: int) -> str:
    """The lines that are indented by more."""
    found = []
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        found.append(line)
    return textwrap.dedent('\n'.join(found)).strip('\n')


def commands() -> Found:
    """Literals, and lines of blocks without a prompt, a remark, and the
    end of a line."""
    yield from literals()
    for language in ('', 'console'):
        for name, block in blocks(language):
            for line in re.sub(r'\\\n *', '', block).splitlines():
                yield name, re.sub(r'^[#$] |   +\(.*\)$', '', line)


def program_of(command: str, programs: collections.abc.Iterable[str],
               ) -> tuple[str, list[str]] | None:
    """:returns: which of the programs it is of, and the arguments, those that
    may be left out included; None if it is of none, or is the name alone"""
    for program in sorted(programs, key=len, reverse=True):
        if command.startswith(f'{program} '):
            arguments = command.removeprefix(f'{program} ')
            # A command of those that are listed elsewhere.
            arguments = re.sub(r'COMMAND \.\.\.$', 'recover', arguments)
            return program, shlex.split(re.sub(r'[][]', '', arguments))
    return None
