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

"""What the documentation says of the code, against the code."""

import ast
import collections.abc
import functools
import importlib.util
import os
import pathlib
import re
import sys
import types

import nova_snapshot_ext
from nova_snapshot_ext import qcow2
from nova_snapshot_ext import snapshot
from nova_snapshot_ext import workspace
from tests.unit import base

PACKAGE = os.path.dirname(nova_snapshot_ext.__file__)
DOC = os.path.join(os.path.dirname(PACKAGE), 'doc', 'source')

#: in place of what a message is given, such as a name
HOLE = '\0'
#: letters that a message must have beside its holes to be known by them
LEAST = 12

#: messages of others that the FAQ answers, and where they are from; None for
#: what is no Python
THEIRS = {
    "could not load configuration from 'snapshot_ext'. …": 'oslo_config.cfg',
    'Unable to load the virtualization driver': 'nova.virt.driver',
    'Guest agent is not responding: Guest agent disappeared while executing '
    'command': None,
    'I/O error, dev vda, sector N op 0x1:(WRITE)': None,
    'nbd-server-start: Failed to bind socket to PATH: Permission denied':
        None,
}


def read(*path: str) -> str:
    with open(os.path.join(DOC, *path)) as file:
        return file.read()


def load(path: str) -> types.ModuleType:
    """Import a file that is in no package."""
    spec = importlib.util.spec_from_file_location(
        os.path.basename(path).removesuffix('.py'), path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look for the module of a class there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def modules() -> collections.abc.Iterator[str]:
    """Paths of the package's modules, as they are below it."""
    for directory, _, names in os.walk(PACKAGE):
        for name in names:
            if name.endswith('.py') and name != '__init__.py':
                yield os.path.relpath(os.path.join(directory, name), PACKAGE)


def tree_of(path: str) -> ast.Module:
    with open(path) as file:
        return ast.parse(file.read())


def messages_of(path: str) -> set[str]:
    """All that a module says, with holes."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(re.sub(r'%(\(\w+\))?[-.\d]*[sdrf]', HOLE, node.value))
        elif isinstance(node, ast.JoinedStr):
            found.add(''.join(
                str(part.value) if isinstance(part, ast.Constant) else HOLE
                for part in node.values))
    return found


@functools.cache
def ours() -> frozenset[str]:
    return frozenset().union(*(
        messages_of(os.path.join(PACKAGE, path)) for path in modules()))


def is_said(title: str, messages: collections.abc.Set[str]) -> bool:
    """Whether a title is a message, or made of several."""
    if any(_is(title, message) for message in messages):
        return True
    if '; ' in title:
        return all(is_said(part, messages) for part in title.split('; ')
                   if _fragments(part))
    return bool(_fragments(title)) and all(
        any(part in message for message in messages)
        for part in _fragments(title))


def _is(title: str, message: str) -> bool:
    """Whether a message reads so when its holes are filled."""
    parts = message.split(HOLE)
    return (len(''.join(parts)) >= LEAST
            and all(part in title for part in parts)
            and re.fullmatch('.+'.join(map(re.escape, parts)),
                             title) is not None)


def _fragments(title: str) -> list[str]:
    """What of a title stands for itself.

    Words in capitals and … stand for what differs, vda for a disk's name; and
    some messages are put into others, behind a colon or an equals sign.
    """
    found = re.split(r'\b[A-Z]+\b|…|\bvda\b|: | = ', title)
    return [part.strip() for part in found if re.search('[a-z]', part)]


def titles() -> list[str]:
    """Those of the FAQ."""
    return re.findall(r'^(.+)\n-+$', read('admin', 'faq.rst'), re.M)


class TestFaq(base.TestCase):

    def test_each_title_is_a_message_literally(self) -> None:
        self.assertGreater(len(titles()), 50)
        self.assertEqual([], [
            title for title in titles()
            if title not in THEIRS and not is_said(title, ours())])

    def test_messages_of_others_are_theirs(self) -> None:
        self.assertEqual(set(), set(THEIRS) - set(titles()))
        for title, module in THEIRS.items():
            if module is None:
                continue
            spec = importlib.util.find_spec(module)
            assert spec is not None and spec.origin is not None
            self.assertTrue(is_said(
                title.replace("'snapshot_ext'", 'NAME'),
                messages_of(spec.origin)), title)

    def test_each_obstacle_is_a_message_literally(self) -> None:
        text = read('admin', 'faq.rst')
        section = text[text.index('No flow of WHOSE can serve'):
                       text.index('\nThe guest\n=')]
        obstacles = re.findall(r'^(\S.*)\n   \S', section, re.M)
        self.assertGreater(len(obstacles), 15)
        self.assertEqual([], [
            each for each in obstacles if not is_said(each, ours())])


class TestImports(base.TestCase):
    """The picture of the architecture."""

    def setUp(self) -> None:
        super().setUp()
        self.graph = load(os.path.join(DOC, os.pardir, 'import_graph.py'))
        self.found = self.graph.imports(pathlib.Path(PACKAGE))

    def test_each_module_is_in_the_picture(self) -> None:
        picture = self.graph.svg(self.found)
        for path in modules():
            name = path.removesuffix('.py').replace('/', '.')
            self.assertIn(f'>{name}</text>', picture)

    def test_import_that_goes_up_makes_no_picture(self) -> None:
        for module, other in (('undo', 'driver'), ('flows.cold', 'snapshot'),
                              ('flows.cold', 'transfers.base'),
                              ('transfers.staged', 'images.base')):
            changed = self.found | {module: self.found[module] | {other}}
            self.assertRaisesRegex(
                ValueError, f'{module} imports {other}', self.graph.arrows,
                changed)

    def test_module_without_a_room_makes_no_picture(self) -> None:
        self.assertRaisesRegex(
            ValueError, 'new_one belongs into one room', self.graph.arrows,
            self.found | {'new_one': set()})

    def test_what_follows_from_other_arrows_is_left_out(self) -> None:
        lead = {room.title: {target.title for target in targets}
                for room, targets in self.graph.arrows(self.found).items()}
        self.assertIn('Recipes', lead['Nova comes in here'])
        self.assertNotIn('What all know', lead['Nova comes in here'])
        self.assertEqual(set(), lead['What all know'])


class TestArchitecture(base.TestCase):

    def test_each_module_has_its_line(self) -> None:
        text = read('reference', 'architecture.rst')
        rooms = text[text.index('\nRooms\n'):text.index('Imports run one way')]
        self.assertEqual([], [
            path for path in modules()
            if os.path.basename(path) not in rooms])

    def test_modules_that_import_nova_are_named(self) -> None:
        importing = {path for path in modules() if any(
            name == 'nova' or name.startswith('nova.')
            for name in _imported(tree_of(os.path.join(PACKAGE, path))))}
        text = read('reference', 'architecture.rst')
        [named] = re.findall(r'Nova is imported by (.+?) alone', text, re.S)
        self.assertEqual(importing, set(re.findall(r'``(.+?)``', named)))


def _imported(tree: ast.Module) -> collections.abc.Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (each.name for each in names)
            case ast.ImportFrom(module=str(module)):
                yield module


class TestImageProperties(base.TestCase):

    def test_users_are_told_of_all_and_of_no_others(self) -> None:
        written = set()
        for path in modules():
            for node in ast.walk(tree_of(os.path.join(PACKAGE, path))):
                written.update(_properties_in(node))
        self.assertIn('snapshot_ext_guest_pause_ms', written)
        self.assertIn('snapshot_ext_rollback', written)
        self.assertIn('snapshot_ext_failure', written)
        self.assertEqual(written, set(re.findall(
            r'^   \* - ``(snapshot_ext_\w+)``', read('user', 'index.rst'),
            re.M)))


def _properties_in(node: ast.AST) -> collections.abc.Iterator[str]:
    """Names of image properties that a piece of code writes."""
    match node:
        # f'{PROPERTY}flow'
        case ast.JoinedStr(values=[
                ast.FormattedValue(value=ast.Name(id='PROPERTY')),
                ast.Constant(value=str(name))]):
            yield f'{snapshot.PROPERTY}{name}'
        # PROPERTY = 'snapshot_ext_failure', GROUP = 'snapshot_ext_group'
        case ast.Assign(
                targets=[ast.Name(id='PROPERTY' | 'GROUP' | 'OWN_ID')],
                value=ast.Constant(value=str(name))):
            if name != snapshot.PROPERTY:
                yield name
        # what a flow says, without the prefix
        case ast.FunctionDef(name='properties'):
            for part in ast.walk(node):
                match part:
                    case ast.Dict(keys=keys):
                        for key in keys:
                            if isinstance(key, ast.Constant):
                                yield f'{snapshot.PROPERTY}{key.value}'
                    case ast.Subscript(slice=ast.Constant(value=str(name)),
                                       ctx=ast.Store()):
                        yield f'{snapshot.PROPERTY}{name}'


class TestLimits(base.TestCase):
    """Those of the page of limits that are constants."""

    UNITS = {'s': 1, 'h': 3600, 'bytes': 1, 'MiB': 1024 ** 2,
             'GiB': 1024 ** 3, 'PiB': 1024 ** 5, '': 1}
    #: what follows of constants
    COMPUTED = {
        'workspace.py': {workspace.MAX_SOCKET_PARENT},
        # Entries of 8 bytes, of L2 tables of a cluster of 64 KiB.
        'qcow2.py': {qcow2._MAX_L1 // 8 * (2 ** 16 // 8) * 2 ** 16}}

    def test_each_is_in_the_module_that_is_named(self) -> None:
        found = re.findall(
            r'([^(|;]*) \(``([\w/]+\.py)``',
            re.sub(r'\s+', ' ', re.sub(
                r'^ +[*-] ', '|', read('admin', 'waits.rst'), flags=re.M)))
        self.assertGreater(len(found), 25)
        for words, module in found:
            constants = self.COMPUTED.get(
                module, constants_of(os.path.join(PACKAGE, module)))
            for number, unit in re.findall(
                    r'\b(\d+)(?: (s|h|bytes|[MGP]iB))?\b', words):
                self.assertIn(int(number) * self.UNITS[unit], constants,
                              f'{words} ({module})')


def constants_of(path: str) -> set[float]:
    """Numbers in a module, and what it computes of numbers alone."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.Constant, ast.BinOp)) and all(
                isinstance(part, (ast.Constant, ast.BinOp, ast.operator))
                for part in ast.walk(node)):
            value = eval(ast.unparse(node))
            if isinstance(value, (int, float)):
                found.add(value)
    return found
