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

"""What a run gave, as tables: on the terminal, as CSV, in the documentation.
"""

import collections.abc
import pathlib

from benchmarks import contestants
from benchmarks import results
from benchmarks import spread
from benchmarks import table
from benchmarks import targets

_MIB = 1024 ** 2
_NOTHING = '–'
#: rounds, for medians that can be compared
_ENOUGH = 5

Rows = collections.abc.Sequence[results.Snapshot]
#: heading, figure, digits behind the point
Column = tuple[
    str, collections.abc.Callable[[results.Snapshot], float | None], int]
Columns = collections.abc.Sequence[Column]

_SECONDS: Column = ('request to active, s', lambda each: each.seconds, 1)
_STAGED: Column = (
    'staged, MiB', lambda each: each.staged_bytes / _MIB, 0)
_SCRATCH: Column = (
    'scratch, MiB', lambda each: each.scratch_bytes / _MIB, 1)
_SILENCE: Column = ('guest silent, s', lambda each: each.silence_s, 2)
_DEVICE: Column = (
    'written by all, MiB',
    lambda each: (None if each.device_bytes is None
                  else each.device_bytes / _MIB), 0)
_SHARE: Column = ('rounds ÷ idle', lambda each: each.share, 2)
#: what a snapshot is for whoever asks for it, and for the guest
_SEEN: tuple[Column, ...] = (
    _SECONDS,
    ('guest pause, s', lambda each: each.pause_s, 2),
    _SILENCE,
    _SHARE,
    ('rounds a second, idle', lambda each: each.idle_rounds_per_s, 0),
)
#: what it costs the host
_COSTS: tuple[Column, ...] = (
    ('image, MiB', lambda each: each.image_bytes / _MIB, 0),
    _STAGED,
    _SCRATCH,
    ('reserved for it, MiB', lambda each: each.reserved_bytes / _MIB, 0),
    ('written by nova-compute, MiB',
     lambda each: each.written_bytes / _MIB, 1),
    _DEVICE,
    ('CPU of nova-compute, s', lambda each: each.compute_cpu_s, 1),
    ('CPU of mover, qemu-img, qemu-nbd, s',
     lambda each: each.children_cpu_s, 1),
    ('CPU of QEMU, s', lambda each: each.qemu_cpu_s, 1),
)
#: what an operator chooses a flow by
_CHOICE: tuple[Column, ...] = (
    _SECONDS, _SILENCE, _SHARE, _STAGED, _DEVICE)
_GROWTH: tuple[Column, ...] = (
    _SECONDS, _STAGED, _SCRATCH, _SILENCE, _SHARE,
    ('CPU without QEMU, s',
     lambda each: each.compute_cpu_s + each.children_cpu_s, 1),
)


def _headings(columns: Columns) -> tuple[str, ...]:
    return tuple(heading for heading, _, _ in columns)


def _cells(columns: Columns, rows: Rows) -> tuple[str, ...]:
    found = [(spread.Spread.of(map(figure, rows)), digits)
             for _, figure, digits in columns]
    return tuple(each.text(digits) if each is not None else _NOTHING
                 for each, digits in found)


def labels(taken: results.Results) -> dict[str, str]:
    """Names of those that were measured, in the order of the tables."""
    return {each.name: each.label
            for each in contestants.every(taken.about['shares'])
            if any(row.contestant == each.name for row in taken.snapshots)}


def _by_floor(taken: results.Results, found: Rows) -> str:
    """:param found: of one amount of data, and not empty"""
    value = spread.ratio(
        spread.Spread.of(each.seconds for each in found),
        spread.Spread.of(each.seconds for each in taken.of(
            contestants.FLOOR, found[0].data_gib)))
    return _NOTHING if value is None else f'{value:.2f}'


def contestants_table(taken: results.Results) -> table.Table:
    return table.Table(
        'contestants', f'Every contestant, {taken.data_gib:g} GiB of data: '
        f'median (least – most)',
        ('What', '÷ floor', *_headings(_SEEN)),
        [(label, _by_floor(taken, found), *_cells(_SEEN, found))
         for name, label in labels(taken).items()
         if (found := taken.of(name))])


def choice_table(taken: results.Results) -> table.Table:
    """Our flows by their best transfer, beside Nova's driver."""
    wanted = (*(f'{flow}-streamed' for flow in contestants.FLOWS),
              contestants.NOVA_LIVE, contestants.NOVA_COLD)
    names = labels(taken)
    return table.Table(
        'choice', f'A guest with {taken.data_gib:g} GiB of data: median '
        f'(least – most)',
        ('What', *_headings(_CHOICE)),
        [(names[name], *_cells(_CHOICE, taken.of(name)))
         for name in wanted if taken.of(name)])


def costs_table(taken: results.Results) -> table.Table:
    return table.Table(
        'costs', f'What it costs the host, {taken.data_gib:g} GiB of data: '
        f'median (least – most)',
        ('What', *_headings(_COSTS)),
        [(label, *_cells(_COSTS, found))
         for name, label in labels(taken).items()
         if (found := taken.of(name))])


def shares_table(taken: results.Results) -> table.Table:
    """What guest and snapshot get under each setting of guest_share."""
    names = labels(taken)
    settings = [
        (str(share), taken.of(f'{contestants.DEFAULT}-share-{share}'))
        for share in taken.about['shares']]
    columns = (_SECONDS, _SHARE, _SILENCE)
    rows = [(setting, _by_floor(taken, found), *_cells(columns, found))
            for setting, found in settings if found]
    if rows and contestants.DEFAULT in names:
        found = taken.of(contestants.DEFAULT)
        rows.append(('the default', _by_floor(taken, found),
                     *_cells(columns, found)))
    return table.Table(
        'shares', 'backup and streamed under settings of guest_share',
        ('guest_share', '÷ floor', *_headings(columns)), rows)


def growth_table(taken: results.Results) -> table.Table:
    return table.Table(
        'growth', 'Growth over the data in the disk',
        ('What', 'Data, GiB', '÷ floor', *_headings(_GROWTH)),
        [(label, f'{size:g}', _by_floor(taken, found),
          *_cells(_GROWTH, found))
         for name, label in labels(taken).items()
         if len({each.data_gib for each in taken.snapshots
                 if each.contestant == name}) > 1
         for size in taken.sizes if (found := taken.of(name, size))])


def freezes_table(taken: results.Results) -> table.Table:
    rows = []
    for size in taken.sizes:
        found = [each for each in taken.freezes if each.data_gib == size]
        pause = spread.Spread.of(1000 * each.pause_s for each in found)
        silence = spread.Spread.of(1000 * each.silence_s for each in found)
        if pause is not None and silence is not None:
            rows.append((f'{size:g}', str(pause.count), pause.text(0),
                         silence.text(0)))
    return table.Table(
        'freezes', 'The guest while backup freezes its disk',
        ('Data, GiB', 'Times', 'Pause, ms', 'Silent, ms'), rows)


def mover_table(taken: results.Results) -> table.Table:
    rows = []
    for what, values, digits in (
            ('reading and laying out into a pipe, s',
             [each.mover_s for each in taken.pipes], 2),
            ('qemu-img convert -W -m 16 into a file on tmpfs, s',
             [each.convert_s for each in taken.pipes], 2),
            ('speed of the first ÷ the second',
             [each.convert_s / each.mover_s for each in taken.pipes], 2),
            ('2 TiB of alternating extents: resident, MiB',
             [each.resident_bytes / _MIB for each in taken.memory], 0),
            ('2 TiB of alternating extents: laid out in, s',
             [each.laid_out_s for each in taken.memory], 1),
            ('2 TiB of alternating extents: seconds of a processor for it',
             [each.laid_out_cpu_s for each in taken.memory], 1)):
        found = spread.Spread.of(values)
        if found is not None:
            rows.append((what, found.text(digits)))
    return table.Table('mover', 'The mover alone', ('What', 'Measured'),
                       rows)


def about_table(taken: results.Results) -> table.Table:
    about = taken.about
    rows = [
        ('when, and of which commit', f'{about["date"]}, {about["commit"]}'),
        ('host', f'{about["processors"]} × {about["processor"]}, '
         f'{about["memory_gib"]} GiB, Linux {about["kernel"]}'),
        ('software', ', '.join(
            [f'QEMU {about["qemu"]}', f'libvirt {about["libvirt"]}', *(
                f'{name} {version}'
                for name, version in about['versions'].items())])),
        ('rounds', f'{about["rounds"]}; {about["growth_rounds"]} for growth'
         + ('' if about['rounds'] >= _ENOUGH else
            f'. A trial: figures that count take {_ENOUGH}')),
        ('page cache', 'dropped before each' if about['drop_caches']
         else 'kept'),
        ('Glance keeps images', {
            'memory': 'in memory, as if on another host',
            'disk': 'on the disk that the guest has too'}[about['store']]),
    ]
    if taken.skipped:
        rows.append(('not measured', '; '.join(taken.skipped)))
    return table.Table('about', 'The run', ('What', ''), rows)


def tables(taken: results.Results) -> list[table.Table]:
    """All of them, also those without rows: nothing was measured then."""
    return [about_table(taken), contestants_table(taken),
            choice_table(taken), costs_table(taken), shares_table(taken),
            growth_table(taken), freezes_table(taken), mover_table(taken),
            targets.as_table(taken)]


def text(taken: results.Results) -> str:
    """For the terminal; what is to be reached comes last, where it is seen.
    """
    return '\n'.join(each.text() for each in tables(taken) if each.rows)


def write(taken: results.Results, path: pathlib.Path,
          documentation: pathlib.Path) -> None:
    """Write CSV beside the results, and the documentation's tables.

    :param path: of the results
    """
    documentation.mkdir(parents=True, exist_ok=True)
    for each in tables(taken):
        path.with_name(f'{path.stem}-{each.name}.csv').write_text(each.csv())
        # An ending that Sphinx does not take for a page of its own
        (documentation / f'{each.name}.inc').write_text(
            each.rst() if each.rows else 'Not measured in this run.\n')
