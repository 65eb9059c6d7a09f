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

"""The picture of what imports what, made of the source when docs are built.

Modules are in rooms, rooms in rows. A module imports from its own room and
from rows below, or there is no picture.
"""

import ast
import collections.abc
import dataclasses
import pathlib
import xml.sax.saxutils

PACKAGE = 'nova_snapshot_ext'


@dataclasses.dataclass(frozen=True)
class Room:
    """Modules that belong together; a trailing ``.`` stands for a package."""

    title: str
    modules: tuple[str, ...]

    def holds(self, module: str) -> bool:
        return any(module.startswith(each) if each.endswith('.')
                   else module == each for each in self.modules)


ROWS: tuple[tuple[Room, ...], ...] = (
    (Room('Nova comes in here', (
        'driver', 'rebuilding', 'reconcile', 'upkeep', 'checks',
        'cmd.status', 'privileged', 'notification', 'nova_interface',
        'nova_compat', 'config_source', 'extra_specs')),
     Room('The command line', ('cmd.snapshot', 'recovery'))),
    (Room('Recipes', (
        'snapshot', 'own_disks', 'rollback', 'selection', 'attendant',
        'progress')),),
    (Room('Flows', (
        'flows.', 'external_snapshot', 'external_rollback',
        'domain_obstacles', 'rollback_obstacles',
        'rollback_way')),
     Room('Transfers', ('transfers.',)),
     Room('Image services', ('images.',))),
    (Room('How disks are frozen', (
        'backup_job', 'scratch', 'power', 'internal_snapshot',
        'domain_snapshot', 'domain_records', 'external_files',
        'external_merge', 'disk_source', 'borrowed',
        'quiesce', 'qemu_nbd')),
     Room('How images are made', ('pace', 'mover_stream', 'digest'))),
    (Room('The guest, and the way back', (
        'guest', 'disk', 'qemu_img', 'undo', 'guard', 'workspace',
        'in_flight', 'settings')),),
    (Room('The mover, a process of its own', (
        'mover', 'nbd', 'qcow2', 'clusters', 'zeroes', 'tempo')),
     Room('What all know', (
         'request', 'frozen', 'image_bytes', 'host', 'account',
         'cancellation', 'plugins', 'processes', 'beside', 'rights', 'conf',
         'exception'))),
)

_WIDTH = 960
_LINE = 17
_PAD = 10
_GAP_X = 24
_GAP_Y = 46
_COLUMN = 122


def imports(package: pathlib.Path) -> dict[str, set[str]]:
    """Of each module, which others of the package it imports."""
    paths = {'.'.join(path.relative_to(package).with_suffix('').parts): path
             for path in sorted(package.rglob('*.py'))
             if path.name != '__init__.py'}
    return {name: set(_imported(path)) & set(paths)
            for name, path in paths.items()}


def _imported(path: pathlib.Path) -> collections.abc.Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            top, _, below = node.module.partition('.')
            if top == PACKAGE:
                for each in node.names:
                    yield f'{below}.{each.name}' if below else each.name


def _room_of(module: str) -> tuple[int, Room]:
    """:returns: its row, and itself"""
    found = [(number, room) for number, row in enumerate(ROWS)
             for room in row if room.holds(module)]
    if len(found) != 1:
        raise ValueError(f'{module} belongs into one room of doc/'
                         f'import_graph.py, and is in {len(found)}')
    return found[0]


def arrows(found: dict[str, set[str]]) -> dict[Room, set[Room]]:
    """Which rooms import from which, without what follows from others.

    :raises ValueError: if a module has no room, or an import does not go down
    """
    direct: dict[Room, set[Room]] = {
        room: set() for row in ROWS for room in row}
    for module, others in found.items():
        row, room = _room_of(module)
        for other in others:
            below, target = _room_of(other)
            if target is room:
                continue
            if below <= row:
                raise ValueError(
                    f'{module} imports {other}: "{room.title}" is not above '
                    f'"{target.title}"')
            direct[room].add(target)
    reach: dict[Room, set[Room]] = {}
    for row_ in reversed(ROWS):
        for room in row_:
            reach[room] = direct[room].union(
                *(reach[each] for each in direct[room]))
    return {room: targets - set().union(*(reach[each] for each in targets))
            for room, targets in direct.items()}


@dataclasses.dataclass(frozen=True)
class _Box:
    room: Room
    names: tuple[str, ...]
    x: float
    y: float
    width: float
    height: float
    columns: int


def _boxes(found: dict[str, set[str]]) -> dict[Room, _Box]:
    boxes = {}
    y = 1.0
    for row in ROWS:
        held = {room: tuple(
            sorted(name for name in found if room.holds(name)))
            for room in row}
        room_for = _WIDTH - _GAP_X * (len(row) - 1)
        total = sum(len(names) + 3 for names in held.values())
        x, tallest = 0.0, 0.0
        for room, names in held.items():
            width = room_for * (len(names) + 3) / total
            columns = max(1, int((width - _PAD) // _COLUMN))
            lines = -(-len(names) // columns)
            height = 2 * _PAD + _LINE * (lines + 1)
            boxes[room] = _Box(room, names, x, y, width, height, columns)
            x += width + _GAP_X
            tallest = max(tallest, height)
        y += tallest + _GAP_Y
    return boxes


def svg(found: dict[str, set[str]]) -> str:
    """The picture.

    :param found: as :func:`imports` gives it
    :raises ValueError: see :func:`arrows`
    """
    lead = arrows(found)
    boxes = _boxes(found)
    bottom = max(box.y + box.height for box in boxes.values()) + 1
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-1 0 '
        f'{_WIDTH + 2} {bottom:.0f}" font-family="sans-serif" '
        f'font-size="12">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" '
        'markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#456"/></marker></defs>']
    for room, targets in lead.items():
        for target in sorted(targets, key=lambda each: each.title):
            lines.append(_arrow(boxes[room], boxes[target]))
    for box in boxes.values():
        lines += _drawn(box)
    return '\n'.join([*lines, '</svg>', ''])


def _arrow(start: _Box, end: _Box) -> str:
    # Towards each other, as far as both reach.
    left = max(start.x, end.x)
    right = min(start.x + start.width, end.x + end.width)
    if left < right:
        x1 = x2 = (left + right) / 2
    else:
        x1, x2 = start.x + start.width / 2, end.x + end.width / 2
    return (f'<line x1="{x1:.0f}" y1="{start.y + start.height:.0f}" '
            f'x2="{x2:.0f}" y2="{end.y - 1:.0f}" stroke="#456" '
            f'marker-end="url(#tip)"/>')


def _drawn(box: _Box) -> collections.abc.Iterator[str]:
    yield (f'<rect x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" '
           f'height="{box.height:.0f}" rx="4" fill="#f4f7fa" '
           f'stroke="#456"/>')
    y = box.y + _PAD + _LINE - 5
    yield _text(box.x + _PAD, y, box.room.title, ' font-weight="bold"')
    per_column = -(-len(box.names) // box.columns)
    for number, name in enumerate(box.names):
        column, line = divmod(number, per_column)
        yield _text(
            box.x + _PAD + column * (box.width - _PAD) / box.columns,
            y + _LINE * (line + 1), name, ' font-family="monospace"')


def _text(x: float, y: float, words: str, more: str) -> str:
    return (f'<text x="{x:.0f}" y="{y:.0f}"{more}>'
            f'{xml.sax.saxutils.escape(words)}</text>')
