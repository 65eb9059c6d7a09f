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

"""The command: ``take`` measures, ``report`` makes tables and plots of it."""

import argparse
import collections.abc
import dataclasses
import datetime
import os
import pathlib
import signal
import sys
import typing

from benchmarks import errors
from benchmarks import results

_HERE = pathlib.Path(__file__).resolve().parent
RESULTS = _HERE / 'results'
DOCUMENTATION = _HERE.parent / 'doc' / 'source' / 'reference' / 'benchmarks'


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(',') if word)


def _shares(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(',') if word)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(',') if word)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='benchmarks/run', description='Measure snapshots by Nova\'s '
        'driver and by ours on the small cloud, and report. Without a '
        'command: take, then report.')
    commands = parser.add_subparsers(
        dest='command', required=True, metavar='COMMAND')
    take = commands.add_parser(
        'take', help='measure; needs root and the small cloud',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    take.add_argument('--rounds', type=int, default=5,
                      help='how often each contestant is measured')
    take.add_argument('--data', type=float, default=2, metavar='GIB',
                      help='random data in the guest\'s disk')
    take.add_argument('--growth', type=_numbers, default=(1, 4, 8),
                      metavar='GIB,...', help='other amounts of data, for '
                      'growth; empty for none')
    take.add_argument('--growth-rounds', type=int, default=1,
                      help='rounds with each of these')
    take.add_argument('--shares', type=_shares, default=(0, 90),
                      metavar='N,...', help='settings of [snapshot_ext] '
                      'guest_share beside the default; empty for none')
    take.add_argument('--idle', type=float, default=4, metavar='SECONDS',
                      help='how long the guest is watched alone before each')
    take.add_argument('--keep-caches', action='store_true',
                      help='do not drop the host\'s page cache before each')
    take.add_argument('--store', choices=('disk', 'memory'), default='disk',
                      help='where Glance keeps images meanwhile: on the disk '
                      'that the guest has too, or on tmpfs, as if its disk '
                      'were another host\'s')
    take.add_argument('--only', type=_words, default=(), metavar='NAME,...',
                      help='these contestants')
    take.add_argument('--parts', type=_words, default=(), metavar='PART,...',
                      help='of snapshots, growth, freezes, pipes, memory; '
                      'empty for all')
    take.add_argument('--output', type=pathlib.Path, metavar='FILE',
                      help='where results are saved (default: a new file in '
                      'benchmarks/results). What it has already is not '
                      'measured again.')
    report = commands.add_parser(
        'report', help='make the tables and the plots of saved results')
    report.add_argument('results', type=pathlib.Path, nargs='?',
                        help='default: the newest in benchmarks/results')
    report.add_argument('--documentation', type=pathlib.Path,
                        default=DOCUMENTATION, metavar='DIR',
                        help='where the tables and plots of the '
                        'documentation go (default: %(default)s)')
    return parser


def _take(options: argparse.Namespace) -> int:
    # What report does not need, and its interpreter need not have.
    from benchmarks import about
    from benchmarks import cloud as clouds
    from benchmarks import measuring
    from benchmarks import progress
    from benchmarks import taking

    if os.geteuid():
        raise errors.BenchmarkError('it restarts nova-compute and looks '
                                    'into other processes: run it as root')
    unknown = set(options.parts) - set(taking.PARTS)
    if unknown:
        raise errors.BenchmarkError(
            f'--parts {",".join(sorted(unknown))}: there are '
            f'{", ".join(taking.PARTS)}')
    package = about.installed_package()
    if package != clouds.CHECKOUT / 'nova_snapshot_ext':
        progress.say(f'nova-compute runs {package}, which is not this '
                     f'checkout')
    drop_caches = not options.keep_caches and measuring.can_drop_caches()
    if not drop_caches and not options.keep_caches:
        progress.say('the page cache can not be dropped here; it is kept')
    parameters = taking.Parameters(
        rounds=options.rounds, data_gib=options.data,
        growth_gib=options.growth, growth_rounds=options.growth_rounds,
        shares=options.shares, idle_s=options.idle,
        drop_caches=drop_caches, store=options.store, only=options.only,
        parts=options.parts or taking.PARTS)
    path = options.output or RESULTS / (
        f'{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M}.json')
    taken = results.load(path) if path.exists() else results.Results()
    taken.about = about.describe(dataclasses.asdict(parameters))
    try:
        run = taking.Run(parameters, taken, path)
    except ValueError as error:
        raise errors.BenchmarkError(f'--only: {error}') from error
    # So that whatever was made is removed, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run.take(clouds.Cloud())
    taken.save(path)
    progress.say(f'saved as {path}')
    return 0


def _report(options: argparse.Namespace) -> int:
    from benchmarks import plots
    from benchmarks import report

    path = options.results or max(
        RESULTS.glob('*.json'), default=None,
        key=lambda each: each.stat().st_mtime)
    if path is None:
        raise errors.BenchmarkError(f'there are no results in {RESULTS}')
    taken = results.load(path)
    report.write(taken, path, options.documentation)
    plots.draw(taken, options.documentation)
    print(report.text(taken))
    return 0


_COMMANDS: dict[str, typing.Callable[[argparse.Namespace], int]] = {
    'take': _take, 'report': _report}


def main(arguments: collections.abc.Sequence[str] | None = None) -> int:
    """The command. :returns: its exit code"""
    options = _parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except (errors.BenchmarkError, OSError) as error:
        print(f'benchmarks: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
