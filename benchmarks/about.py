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

"""What a run was made on, and of."""

import datetime
from importlib import metadata
import os
import pathlib
import platform
import re
import subprocess
import sys
import typing

from benchmarks import cloud as clouds
from benchmarks import commands
from benchmarks import errors

_PACKAGES = ('nova', 'glance', 'python-glanceclient', 'openstacksdk')


def installed_package() -> pathlib.Path:
    """Where the package lies that nova-compute runs."""
    done = subprocess.run(
        [sys.executable, '-P', '-c',
         'import nova_snapshot_ext as p; print(p.__file__)'],
        cwd='/', capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': ''})
    if done.returncode:
        raise errors.BenchmarkError(
            'nova_snapshot_ext is not installed in the cloud; '
            'tools/cloud up --driver ours')
    return pathlib.Path(done.stdout.strip()).parent


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found.group(1).strip() if found else 'unknown'


def _version(checkout: pathlib.Path) -> str:
    try:
        return commands.run('git', '-C', checkout, 'describe', '--always',
                            '--dirty').strip()
    except errors.BenchmarkError:
        return 'unknown'


def describe(parameters: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """What readers of the figures must know.

    :param parameters: of the run
    """
    return {
        **parameters,
        'date': datetime.datetime.now(datetime.UTC).isoformat(
            timespec='seconds'),
        'commit': _version(clouds.CHECKOUT),
        'processor': _first(
            r'^model name\s*: (.*)$',
            pathlib.Path('/proc/cpuinfo').read_text()),
        'processors': os.cpu_count(),
        'memory_gib': round(
            os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
            / 1024 ** 3),
        'kernel': platform.release(),
        'qemu': _first(r'version (\S+)', commands.run(
            'qemu-system-x86_64', '--version')),
        'libvirt': _first(r'(\S+)$', commands.run('virsh', '--version')),
        'versions': {name: metadata.version(name) for name in _PACKAGES},
    }
