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

"""What is to be reached, and what was."""

import collections.abc
import dataclasses
import math

from benchmarks import contestants
from benchmarks import results
from benchmarks import spread
from benchmarks import table

_MIB = 1024 ** 2
_CLUSTER = 64 * 1024
#: two pauses as near as this are the same: what a busy host adds
_SAME_PAUSE_S = 0.05


@dataclasses.dataclass(frozen=True)
class Target:
    """One figure to be reached."""

    what: str
    figure: str
    #: in words; why not, where it was not measured
    measured: str
    #: None if it was not measured
    met: bool | None


def _seconds(taken: results.Results, name: str) -> spread.Spread | None:
    return spread.Spread.of(each.seconds for each in taken.of(name))


def _share(taken: results.Results, name: str) -> spread.Spread | None:
    return spread.Spread.of(each.share for each in taken.of(name))


def _limit(what: str, figure: str, value: float | None, *,
           most: float | None = None, least: float | None = None) -> Target:
    if value is None:
        return Target(what, figure, 'not measured', None)
    return Target(
        what, figure, f'{value:.2f}',
        (most is None or value <= most) and (
            least is None or value >= least))


def _no_files(taken: results.Results) -> collections.abc.Iterator[Target]:
    what, figure = 'bytes staged', '0'
    rows = taken.of(contestants.DEFAULT)
    staged = [each.staged_bytes for each in rows]
    if rows:
        yield Target(what, figure, str(max(staged)), not any(staged))
    else:
        yield Target(what, figure, 'not measured', None)
    what = 'scratch, at most'
    figure = '≤ 64 KiB clusters that the guest touched, and metadata'
    known = [each for each in rows if each.touched_bytes is not None]
    if not known:
        yield Target(what, figure, 'not measured', None)
        return
    widest = max(known, key=lambda each: each.scratch_bytes)
    yield Target(
        what, figure,
        f'{widest.scratch_bytes / _MIB:.1f} MiB; it touched '
        f'{(widest.touched_bytes or 0) / _MIB:.1f} MiB',
        all(each.scratch_bytes <= (each.touched_bytes or 0)
            + metadata_bytes(each.data_gib) for each in known))


def metadata_bytes(data_gib: float) -> int:
    """What the tables of a scratch take at most: a qcow2 file's header, its
    L1 table and refcounts, and an L2 table for each 512 MiB of the disk.
    """
    disk_gib = math.ceil(data_gib + 1)
    return _CLUSTER * (6 + 2 * disk_gib)


def _pause(taken: results.Results) -> Target:
    what, figure = 'guest pause to freeze (backup)', '≤ 0.2 s, no growth'
    pauses = [
        (size, found) for size in taken.sizes
        if (found := spread.Spread.of(
            each.pause_s for each in taken.freezes
            if each.data_gib == size)) is not None]
    if not pauses:
        return Target(what, figure, 'not measured', None)
    smallest, largest = pauses[0][1].median, pauses[-1][1].median
    return Target(
        what, figure,
        '; '.join(f'{found.median:.2f} s with {size:g} GiB'
                  for size, found in pauses),
        max(found.median for _, found in pauses) <= 0.2
        and largest <= smallest + _SAME_PAUSE_S)


def pipe_speed(taken: results.Results) -> spread.Spread | None:
    """The mover's speed by that of convert, of each round."""
    return spread.Spread.of(
        each.convert_s / each.mover_s for each in taken.pipes)


def all_of(taken: results.Results) -> list[Target]:
    """Every figure to be reached."""
    default, first = contestants.DEFAULT, contestants.FIRST
    floor = _seconds(taken, contestants.FLOOR)
    share = _share(taken, default)
    nova_share = _share(taken, contestants.NOVA_LIVE)
    speed = pipe_speed(taken)
    resident = spread.Spread.of(
        each.resident_bytes / _MIB for each in taken.memory)
    return [
        _limit('request to active ÷ floor, guest_share=0', '≤ 1.05',
               spread.ratio(_seconds(taken, first), floor), most=1.05),
        _limit('request to active ÷ floor, default settings', '≤ 1.25',
               spread.ratio(_seconds(taken, default), floor), most=1.25),
        _limit("request to active ÷ Nova's live, default settings",
               '≤ 0.60', spread.ratio(
                   _seconds(taken, default),
                   _seconds(taken, contestants.NOVA_LIVE)), most=0.6),
        *_no_files(taken),
        _pause(taken),
        _limit("guest's rounds ÷ idle, default settings", '≥ 0.6',
               share.median if share else None, least=0.6),
        _limit("guest's rounds ÷ idle, default settings",
               "no less than under Nova's live" + (
                   f' ({nova_share.median:.2f})' if nova_share else ''),
               share.median if share and nova_share else None,
               least=nova_share.median if nova_share else None),
        _limit('mover into a pipe ÷ convert -W -m 16, speed', '≥ 1.0',
               speed.median if speed else None, least=1.0),
        _limit("mover's resident memory, 2 TiB worst case, MiB", '≤ 100',
               resident.most if resident else None, most=100),
    ]


_VERDICTS = {True: 'yes', False: 'no', None: '–'}


def as_table(taken: results.Results) -> table.Table:
    return table.Table(
        'targets', 'What is to be reached, and what was',
        ('What', 'To be reached', 'Measured', 'Reached'),
        [(each.what, each.figure, each.measured, _VERDICTS[each.met])
         for each in all_of(taken)])
