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

"""The user of nova-compute, and its way to root: sudo and rootwrap."""

import grp
import pathlib
import pwd
import re
import shutil
import subprocess

from small_cloud import errors
from small_cloud import state as cloud_state

SUDOERS = pathlib.Path('/etc/sudoers.d/small-cloud-nova')
GROUPS = ('libvirt', 'kvm')


def ensure(state: cloud_state.State) -> None:
    """The user nova exists, and may reach libvirt's socket and /dev/kvm."""
    try:
        pwd.getpwnam('nova')
    except KeyError:
        subprocess.run(
            [
                'useradd',
                '--system',
                '--user-group',
                '--shell',
                '/bin/sh',
                '--home-dir',
                str(state.nova),
                '--no-create-home',
                'nova',
            ],
            check=True,
        )
    # No password, and yet not locked: sshd lets it in by its key.
    subprocess.run(['usermod', '--password', '*', 'nova'], check=True)
    for name in GROUPS:
        if 'nova' not in grp.getgrnam(name).gr_mem:
            subprocess.run(
                ['usermod', '--append', '--groups', name, 'nova'], check=True
            )
    make_directories(state.nova)


def make_directories(home: pathlib.Path) -> None:
    """What nova-compute needs in its state path."""
    for path in (home, home / 'instances', home / 'tmp'):
        path.mkdir(mode=0o755, exist_ok=True)
        path.chmod(0o755)
        own(path)


def own(path: pathlib.Path) -> None:
    shutil.chown(path, 'nova', 'nova')


def allow_root(state: cloud_state.State) -> None:
    """Write the sudoers file, and rootwrap's from those that Nova ships."""
    shipped = state.venv / 'etc' / 'nova'
    ours = state.etc / 'nova'
    rootwrap = (shipped / 'rootwrap.conf').read_text()
    rootwrap = re.sub(
        r'(?m)^filters_path=.*', f'filters_path={ours}/rootwrap.d', rootwrap
    )
    rootwrap = re.sub(r'(?m)^exec_dirs=', f'exec_dirs={state.bin},', rootwrap)
    state.write(ours / 'rootwrap.conf', rootwrap)

    # Nova's filter lets pass exactly one file below /etc; nova-compute has
    # two, and privsep hands all of them to its helper.
    two = ' '.join(
        f'--config-file, {re.escape(str(ours))}/{name},'
        for name in (r'nova\.conf', r'nova-cpu(-2)?\.conf')
    )
    text = (shipped / 'rootwrap.d' / 'compute.filters').read_text()
    filters, count = re.subn(r'--config-file, /etc/\S+,', lambda _: two, text)
    if not count:
        raise errors.CloudError(
            'rootwrap\'s filters of this Nova look different: '
            f'{shipped / "rootwrap.d" / "compute.filters"}'
        )
    state.write(ours / 'rootwrap.d' / 'compute.filters', filters)

    command = f'{state.bin}/nova-rootwrap {ours}/rootwrap.conf'
    path = state.path_for_commands()
    state.write(
        SUDOERS,
        f'Defaults:nova !requiretty, secure_path="{path}"\n'
        f'nova ALL=(root) NOPASSWD: {command} *\n',
        mode=0o440,
    )


def withdraw_root(state: cloud_state.State) -> None:
    """Nobody needs the way to root while the cloud is down."""
    if (
        SUDOERS.exists()
        and f'{state.bin}/nova-rootwrap' in SUDOERS.read_text()
    ):
        SUDOERS.unlink()
