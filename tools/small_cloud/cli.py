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

"""The command line of tools/cloud: one function a subcommand."""

import argparse
from collections.abc import Callable, Sequence
import os
import subprocess
import sys

from small_cloud import clients
from small_cloud import compute_conf
from small_cloud import errors
from small_cloud import lifecycle
from small_cloud import release
from small_cloud import services
from small_cloud import state as cloud_state

Command = Callable[[cloud_state.State, argparse.Namespace], int]


def _up(state: cloud_state.State, args: argparse.Namespace) -> int:
    with state.lock():
        lifecycle.up(state, driver=args.driver, nova=args.nova)
    return 0 if lifecycle.status(state) else 1


def _down(state: cloud_state.State, args: argparse.Namespace) -> int:
    if not state.root.exists():
        return 0
    with state.lock():
        lifecycle.down(state, purge=args.purge)
    return 0


def _status(state: cloud_state.State, args: argparse.Namespace) -> int:
    return 0 if lifecycle.status(state) else 1


def _env(state: cloud_state.State, args: argparse.Namespace) -> int:
    sys.stdout.write(clients.exports(state))
    return 0


def _run(state: cloud_state.State, args: argparse.Namespace) -> int:
    command = args.command[1:] if args.command[:1] == ['--'] else args.command
    if not command:
        raise errors.CloudError('nothing to run')
    environment = clients.environment(state)
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        raise errors.CloudError(f'{command[0]}: {error.strerror}') from None


def _logs(state: cloud_state.State, args: argparse.Namespace) -> int:
    path = state.log / f'{args.service}.log'
    if not path.exists():
        raise errors.CloudError(
            f'no such log; there are: '
            f'{" ".join(sorted(p.stem for p in state.log.glob("*")))}'
        )
    follow = ['-F'] if args.follow else []
    return subprocess.run(
        ['tail', '-n', str(args.lines), *follow, str(path)]
    ).returncode


def _restart_compute(
    state: cloud_state.State, args: argparse.Namespace
) -> int:
    with state.lock():
        lifecycle.restart_compute(state, driver=args.driver, kill=args.kill)
    return 0


def _stop_compute(state: cloud_state.State, args: argparse.Namespace) -> int:
    with state.lock():
        lifecycle.stop_compute(state, kill=args.kill)
    return 0


def _configure(state: cloud_state.State, args: argparse.Namespace) -> int:
    with state.lock():
        compute_conf.change_overrides(
            state, settings=args.set, removals=args.unset, reset=args.reset
        )
        for section, options in compute_conf.overrides(state).items():
            for name, value in options.items():
                print(f'{section}.{name}={value}')
        lifecycle.restart_compute(state, driver=args.driver)
    return 0


def _second(state: cloud_state.State, args: argparse.Namespace) -> int:
    with state.lock():
        if args.end:
            lifecycle.second_down(state)
        else:
            lifecycle.second_up(state, shared=args.shared)
    return 0


def _boot(state: cloud_state.State, args: argparse.Namespace) -> int:
    lifecycle.require(state, 'keystone', 'nova-api', lifecycle.COMPUTE)
    wait = ['--wait-writes'] if args.wait_writes else []
    return clients.run_inside(
        state,
        'boot_server.py',
        args.name,
        '--flavor',
        args.flavor,
        '--image',
        args.image,
        '--nic',
        args.nic,
        *wait,
    )


def _demo(state: cloud_state.State, args: argparse.Namespace) -> int:
    with state.lock():
        lifecycle.up(state, driver='ours')
    return clients.run_inside(
        state,
        'demo.py',
        '--flavor',
        args.flavor,
        '--image',
        lifecycle.IMAGE,
        '--flows',
        args.flows,
        '--staging',
        str(state.instances / 'snapshots'),
        '--images',
        str(state.root / 'glance' / 'images'),
    )


def _parser(state: cloud_state.State) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='cloud',
        description='A small OpenStack on this machine. Its state '
        'directory is $SMALL_CLOUD_DIR, by default '
        + cloud_state.DEFAULT_ROOT
        + '.',
    )
    commands = parser.add_subparsers(metavar='COMMAND', required=True)

    def add(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    def add_driver(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            '--driver',
            choices=sorted(compute_conf.DRIVERS),
            help='the driver of nova-compute from now on '
            f'(at first: {compute_conf.DEFAULT_DRIVER})',
        )

    command = add('up', _up, 'install, configure and start what is missing')
    add_driver(command)
    command.add_argument(
        '--nova',
        type=int,
        choices=release.every(),
        help='the release of Nova, and of all beside it, that a new cloud is '
        f'made of (without: {release.DEFAULT})',
    )
    command = add('down', _down, 'end everything, guests included')
    command.add_argument(
        '--purge', action='store_true', help='delete the state directory, too'
    )
    add('status', _status, 'show what runs; fails if something does not')
    add('env', _env, 'print the OS_* variables for a shell')
    command = add('run', _run, 'run a command with these variables')
    command.add_argument(
        'command', nargs=argparse.REMAINDER, metavar='-- CMD ...'
    )
    command = add('logs', _logs, 'show the end of a log')
    command.add_argument(
        'service', metavar='SERVICE', help=' '.join(services.catalogue(state))
    )
    command.add_argument('-f', '--follow', action='store_true')
    command.add_argument('-n', '--lines', type=int, default=50)
    command = add(
        'stop-compute', _stop_compute, 'end nova-compute with SIGTERM'
    )
    command.add_argument('--kill', action='store_true', help='SIGKILL instead')
    command = add(
        'restart-compute',
        _restart_compute,
        'end nova-compute with SIGTERM and start it',
    )
    command.add_argument('--kill', action='store_true', help='SIGKILL instead')
    add_driver(command)
    command = add(
        'configure',
        _configure,
        'change options of nova-compute and restart it',
    )
    command.add_argument(
        '--set', action='append', default=[], metavar='SECTION.OPTION=VALUE'
    )
    command.add_argument(
        '--unset', action='append', default=[], metavar='SECTION.OPTION'
    )
    command.add_argument(
        '--reset', action='store_true', help='forget every earlier --set first'
    )
    add_driver(command)
    command = add(
        'second-host',
        _second,
        'start a second host with nova-compute, for servers to move to',
    )
    command.add_argument(
        '--shared',
        action='store_true',
        help='have its instances where the first host has them, as on NFS',
    )
    command.add_argument(
        '--end',
        action='store_true',
        help='end it, and whatever is on it',
    )
    command = add(
        'demo',
        _demo,
        'bring everything up, take a snapshot by each flow, boot from each',
    )
    command.add_argument('--flavor', default='tiny')
    command.add_argument('--flows', default='backup,live,cold')
    command = add(
        'boot', _boot, 'boot a server and wait until its guest writes'
    )
    command.add_argument('name')
    command.add_argument('--flavor', default='tiny')
    command.add_argument('--image', default=lifecycle.IMAGE)
    command.add_argument(
        '--nic', default='none', help='none, auto, or a network'
    )
    command.add_argument(
        '--wait-writes',
        default=True,
        action=argparse.BooleanOptionalAction,
        help='wait until the console shows a counter that counts',
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    state = cloud_state.State.from_environment()
    args = _parser(state).parse_args(argv)
    if os.geteuid() != 0:
        print(
            'cloud: it starts daemons and has secrets: run it as root',
            file=sys.stderr,
        )
        return 1
    try:
        result: int = args.run(state, args)
    except errors.CloudError as error:
        print(f'cloud: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return result
