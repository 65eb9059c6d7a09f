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

"""The plots of the documentation."""

import collections.abc
import pathlib
import typing

import matplotlib

from benchmarks import contestants
from benchmarks import report
from benchmarks import results
from benchmarks import spread

matplotlib.use('svg')
# The same results give the same file.
matplotlib.rcParams['svg.hashsalt'] = 'nova_snapshot_ext'
matplotlib.rcParams['axes.spines.top'] = False
matplotlib.rcParams['axes.spines.right'] = False

from matplotlib import pyplot  # noqa: E402

_MIB = 1024 ** 2
_NOVA, _OURS, _FLOOR = '#c44e52', '#4c72b0', '#8c8c8c'
_COLOURS = {contestants.NOVA_LIVE: _NOVA, contestants.NOVA_COLD: _NOVA,
            contestants.FLOOR: _FLOOR}

Figure = collections.abc.Callable[[results.Snapshot], float | None]


def draw(taken: results.Results, directory: pathlib.Path) -> None:
    """Draw all plots that there are figures for."""
    directory.mkdir(parents=True, exist_ok=True)
    _bars(taken, directory / 'request-to-active.svg',
          'request to active, seconds', lambda each: each.seconds)
    _bars(taken, directory / 'guest-rounds.svg',
          "guest's rounds meanwhile ÷ idle", lambda each: each.share)
    _processor(taken, directory / 'processor.svg')
    _growth(taken, directory / 'growth.svg')


def _save(figure: typing.Any, path: pathlib.Path) -> None:
    figure.savefig(path, metadata={'Date': None}, bbox_inches='tight')
    pyplot.close(figure)


def _named(taken: results.Results) -> list[tuple[str, str]]:
    """From below: matplotlib counts upwards."""
    return [(name, label) for name, label in report.labels(taken).items()
            if taken.of(name)][::-1]


def _bars(taken: results.Results, path: pathlib.Path, label: str,
          of: Figure) -> None:
    """A bar for each median, and a point for each measurement."""
    named = _named(taken)
    figure, axes = pyplot.subplots(figsize=(7, 0.35 * len(named) + 1))
    for place, (name, _) in enumerate(named):
        values = [value for each in taken.of(name)
                  if (value := of(each)) is not None]
        found = spread.Spread.of(values)
        if found is not None:
            axes.barh(place, found.median, height=0.6, alpha=0.6,
                      color=_COLOURS.get(name, _OURS))
            axes.plot(values, [place] * len(values), '.', color='black',
                      markersize=4)
    axes.set_yticks(range(len(named)), [text for _, text in named])
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.grid(axis='x', alpha=0.3)
    _save(figure, path)


def _processor(taken: results.Results, path: pathlib.Path) -> None:
    """Seconds of a processor, one upon the other."""
    named = _named(taken)
    parts: tuple[tuple[str, str, Figure], ...] = (
        ('nova-compute (floor: the client)', '#4c72b0',
         lambda each: each.compute_cpu_s),
        ('mover, qemu-img, qemu-nbd', '#dd8452',
         lambda each: each.children_cpu_s),
        ('QEMU, the guest in it', '#cccccc', lambda each: each.qemu_cpu_s))
    figure, axes = pyplot.subplots(figsize=(7, 0.35 * len(named) + 1.4))
    left = [0.0] * len(named)
    for label, colour, of in parts:
        found = [spread.Spread.of(map(of, taken.of(name)))
                 for name, _ in named]
        widths = [each.median if each else 0.0 for each in found]
        axes.barh(range(len(named)), widths, left=left, height=0.6,
                  color=colour, label=label)
        left = [one + other for one, other in zip(left, widths)]
    axes.set_yticks(range(len(named)), [text for _, text in named])
    axes.set_xlabel('seconds of a processor')
    axes.grid(axis='x', alpha=0.3)
    axes.legend(loc='upper center', bbox_to_anchor=(0.4, -0.2), ncols=3,
                frameon=False, fontsize='small')
    _save(figure, path)


def _growth(taken: results.Results, path: pathlib.Path) -> None:
    """Each figure over the data in the disk."""
    figures: tuple[tuple[str, Figure], ...] = (
        ('request to active, s', lambda each: each.seconds),
        ('staged, MiB', lambda each: each.staged_bytes / _MIB),
        ('scratch, MiB', lambda each: each.scratch_bytes / _MIB),
        ('guest silent, s', lambda each: each.silence_s),
        ("guest's rounds ÷ idle", lambda each: each.share),
        ('CPU s without QEMU',
         lambda each: each.compute_cpu_s + each.children_cpu_s))
    grid, all_axes = pyplot.subplots(2, 3, figsize=(9, 5))
    for axes, (label, of) in zip(all_axes.flat, figures):
        for name, text in report.labels(taken).items():
            points = [
                (size, found.median) for size in taken.sizes
                if (found := spread.Spread.of(
                    map(of, taken.of(name, size)))) is not None]
            if len(points) > 1:
                axes.plot(*zip(*points), 'o-', markersize=4, label=text,
                          color=_COLOURS.get(name, _OURS))
        axes.set_title(label, fontsize='medium')
        axes.set_xlabel('data, GiB', fontsize='small')
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    handles, texts = all_axes.flat[0].get_legend_handles_labels()
    if handles:
        grid.legend(handles, texts, loc='lower center', ncols=3,
                    frameon=False, bbox_to_anchor=(0.5, -0.05))
    grid.tight_layout()
    _save(grid, path)
