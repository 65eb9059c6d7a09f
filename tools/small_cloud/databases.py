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

"""MariaDB's own files, the databases of the services, and their tables."""

import concurrent.futures
import os
import subprocess

from small_cloud import endpoints
from small_cloud import errors
from small_cloud import secrets
from small_cloud import state as cloud_state

NAMES = (
    'keystone',
    'glance',
    'placement',
    'neutron',
    'nova_api',
    'nova_cell0',
    'nova_cell1',
)


def prepare(state: cloud_state.State) -> None:
    """Make the system tables, before MariaDB starts for the first time."""
    if state.is_done('mariadb'):
        return
    subprocess.run(
        [
            'mariadb-install-db',
            f'--defaults-file={state.etc}/mariadb.cnf',
            '--user=mysql',
            '--auth-root-authentication-method=socket',
            '--skip-test-db',
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    state.mark_done('mariadb')


def create(state: cloud_state.State) -> None:
    """Make the empty databases and the user that owns them."""
    if state.is_done('databases'):
        return
    password = secrets.load(state)['database']
    statements = [
        f"CREATE USER IF NOT EXISTS openstack@localhost "
        f"IDENTIFIED BY '{password}';"
    ]
    for name in NAMES:
        statements += [
            f'CREATE DATABASE IF NOT EXISTS {name};',
            f'GRANT ALL ON {name}.* TO openstack@localhost;',
        ]
    # Through standard input, where no list of processes shows the password.
    subprocess.run(
        ['mariadb', f'--socket={state.mysql_socket}', '--user=root'],
        input='\n'.join(statements),
        text=True,
        check=True,
    )
    state.mark_done('databases')


def _manage(state: cloud_state.State, *argv: str, **environment: str) -> None:
    done = subprocess.run(
        [str(state.bin / argv[0]), *argv[1:]],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, 'PATH': state.path_for_commands(), **environment},
    )
    with open(state.log / 'manage.log', 'a') as log:
        log.write(f'== {" ".join(argv)}\n{done.stdout}\n')
    if done.returncode:
        raise errors.CloudError(
            f'failed: {" ".join(argv)}\n{done.stdout[-3000:]}'
        )


def nova_manage(state: cloud_state.State, *argv: str) -> None:
    etc = state.etc / 'nova'
    _manage(
        state,
        'nova-manage',
        '--config-file',
        str(etc / 'nova.conf'),
        '--config-file',
        str(etc / 'nova-controller.conf'),
        *argv,
    )


def _sync_keystone(state: cloud_state.State) -> None:
    def manage(*argv: str, **environment: str) -> None:
        _manage(
            state,
            'keystone-manage',
            '--config-file',
            str(state.etc / 'keystone' / 'keystone.conf'),
            *argv,
            **environment,
        )

    manage(
        'fernet_setup', '--keystone-user', 'root', '--keystone-group', 'root'
    )
    manage(
        'credential_setup',
        '--keystone-user',
        'root',
        '--keystone-group',
        'root',
    )
    manage('db_sync')
    manage(
        'bootstrap',
        '--bootstrap-public-url',
        endpoints.AUTH_URL,
        '--bootstrap-internal-url',
        endpoints.AUTH_URL,
        '--bootstrap-admin-url',
        endpoints.AUTH_URL,
        '--bootstrap-region-id',
        endpoints.REGION,
        OS_BOOTSTRAP_PASSWORD=secrets.load(state)['admin'],
    )


def _sync_nova(state: cloud_state.State) -> None:
    nova_manage(state, 'api_db', 'sync')
    # Templates keep the password out of the command line: {...} is filled in
    # from [database]connection by whoever reads the mapping.
    template = '{scheme}://{username}:{password}@{hostname}/%s?{query}'
    nova_manage(
        state,
        'cell_v2',
        'map_cell0',
        '--database_connection',
        template % 'nova_cell0',
    )
    nova_manage(state, 'db', 'sync')
    nova_manage(
        state,
        'cell_v2',
        'create_cell',
        '--name',
        'cell1',
        '--database_connection',
        template % 'nova_cell1',
        '--transport-url',
        '{scheme}://{username}:{password}@{hostname}:{port}/',
    )


def _sync_neutron(state: cloud_state.State) -> None:
    _manage(
        state,
        'neutron-db-manage',
        '--config-file',
        str(state.etc / 'neutron' / 'neutron.conf'),
        'upgrade',
        'heads',
    )


def _sync_rest(state: cloud_state.State) -> None:
    _manage(
        state,
        'glance-manage',
        '--config-file',
        str(state.etc / 'glance' / 'glance-api.conf'),
        'db_sync',
    )
    _manage(
        state,
        'placement-manage',
        '--config-file',
        str(state.etc / 'placement' / 'placement.conf'),
        'db',
        'sync',
    )


def sync(state: cloud_state.State) -> None:
    """Make the tables, and Keystone's first user, once."""
    steps = {
        'sync-nova': _sync_nova,
        'sync-keystone': _sync_keystone,
        'sync-neutron': _sync_neutron,
        'sync-rest': _sync_rest,
    }
    todo = {
        name: step for name, step in steps.items() if not state.is_done(name)
    }

    def run(name: str) -> None:
        todo[name](state)
        state.mark_done(name)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, todo))
