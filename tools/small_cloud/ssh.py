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

"""sshd on both hosts: by it Nova copies disks and libvirt moves guests."""

import pathlib
import subprocess

from small_cloud import compute_user
from small_cloud import endpoints
from small_cloud import state as cloud_state

CLIENTS = pathlib.Path('/etc/ssh/ssh_config.d/small-cloud.conf')
USERS = ('nova', 'root')


def _directory(state: cloud_state.State) -> pathlib.Path:
    return state.root / 'ssh'


def configuration(state: cloud_state.State, port: int) -> pathlib.Path:
    """That of the sshd which listens there."""
    return state.etc / f'sshd-{port}.conf'


def write(state: cloud_state.State) -> None:
    """Keys, once; sshd's configuration and that of its clients."""
    ours = _directory(state)
    ours.mkdir(mode=0o755, exist_ok=True)
    for name in ('host', *USERS):
        key = ours / name
        if not key.exists():
            subprocess.run(
                ['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', key],
                check=True,
            )
    compute_user.own(ours / 'nova')
    for port in endpoints.SSH.values():
        state.write(
            configuration(state, port),
            f'ListenAddress {endpoints.HOST}:{port}\n'
            f'HostKey {ours}/host\n'
            f'AuthorizedKeysFile {ours}/%u.pub\n'
            f'AllowUsers {" ".join(USERS)}\n'
            'PermitRootLogin prohibit-password\n'
            'AuthenticationMethods publickey\n'
            'UsePAM no\n'
            'PidFile none\n'
            'Subsystem sftp internal-sftp\n',
        )
    # Where sshd's unprivileged half lives.
    pathlib.Path('/run/sshd').mkdir(mode=0o755, exist_ok=True)
    host_key = (ours / 'host.pub').read_text()
    state.write(
        ours / 'known_hosts',
        ''.join(
            f'[{endpoints.HOST}]:{port} {host_key}'
            for port in endpoints.SSH.values()
        ),
    )
    # The addresses are those by which nova-compute knows the other one.
    state.write(
        CLIENTS,
        '# Written by tools/cloud, gone when it is down.\n'
        + ''.join(
            f'Match originalhost {host},{endpoints.ADDRESSES[host]} '
            f'localuser {",".join(USERS)}\n'
            f'    HostName {endpoints.HOST}\n'
            f'    Port {port}\n'
            f'    IdentityFile {ours}/%u\n'
            '    IdentitiesOnly yes\n'
            f'    UserKnownHostsFile {ours}/known_hosts\n'
            for host, port in endpoints.SSH.items()
        ),
    )


def withdraw(state: cloud_state.State) -> None:
    """Nobody needs the way while the cloud is down."""
    if CLIENTS.exists() and str(_directory(state)) in CLIENTS.read_text():
        CLIENTS.unlink()
