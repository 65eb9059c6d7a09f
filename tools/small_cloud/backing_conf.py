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

"""Configuration of what OpenStack stands on: MariaDB, RabbitMQ, libvirt."""

import shutil
import uuid

from small_cloud import endpoints
from small_cloud import ini
from small_cloud import secrets
from small_cloud import state as cloud_state


def write(state: cloud_state.State) -> None:
    _mariadb(state)
    _rabbitmq(state)
    _libvirt(state)


def _mariadb(state: cloud_state.State) -> None:
    state.owned_directory('mysql', 'mysql', 0o700)
    run = state.owned_directory('mysql-run', 'mysql')
    state.write(
        state.etc / 'mariadb.cnf',
        ini.render(
            {
                'mysqld': {
                    'datadir': state.root / 'mysql',
                    'socket': state.mysql_socket,
                    'pid_file': run / 'mysqld.pid',
                    'user': 'mysql',
                    'skip_networking': 1,
                    'max_connections': 400,
                    # The databases are thrown away with the cloud: speed
                    # before durability.
                    'innodb_flush_log_at_trx_commit': 0,
                    'innodb_doublewrite': 0,
                    'performance_schema': 0,
                    'skip_log_bin': 1,
                    'character_set_server': 'utf8mb3',
                    'collation_server': 'utf8mb3_general_ci',
                }
            }
        ),
    )


def _rabbitmq(state: cloud_state.State) -> None:
    home = state.owned_directory('rabbitmq', 'rabbitmq', 0o700)
    state.write(state.etc / 'rabbitmq' / 'enabled_plugins', '[].\n')
    state.write(
        state.etc / 'rabbitmq' / 'env.conf',
        '# Empty, so that the system-wide file is not read.\n',
    )
    state.write(
        state.etc / 'rabbitmq' / 'rabbitmq.conf',
        f'listeners.tcp.1 = {endpoints.HOST}:{endpoints.RABBIT}\n'
        'log.console = true\n'
        'log.file = false\n'
        'default_user = openstack\n'
        f'default_pass = {secrets.load(state)["rabbit"]}\n'
        # A guest's disk may fill the host up to its limit; messages are few.
        'disk_free_limit.absolute = 50MB\n',
        mode=0o640,
        group='rabbitmq',
    )
    cookie = home / '.erlang.cookie'
    if not cookie.exists():
        state.write(cookie, secrets.load(state)['erlang_cookie'])
    cookie.chmod(0o600)
    shutil.chown(cookie, 'rabbitmq', 'rabbitmq')


def rabbitmq_environment(state: cloud_state.State) -> dict[str, str]:
    etc, home = state.etc / 'rabbitmq', state.root / 'rabbitmq'
    return {
        'HOME': str(home),
        # An address for a name: `localhost` need not resolve on a bare
        # machine.
        'RABBITMQ_USE_LONGNAME': 'true',
        'RABBITMQ_NODENAME': f'rabbit@{endpoints.HOST}',
        'RABBITMQ_CONFIG_FILE': str(etc / 'rabbitmq'),
        'RABBITMQ_CONF_ENV_FILE': str(etc / 'env.conf'),
        'RABBITMQ_ENABLED_PLUGINS_FILE': str(etc / 'enabled_plugins'),
        'RABBITMQ_MNESIA_BASE': str(home / 'mnesia'),
        'RABBITMQ_LOG_BASE': str(home / 'log'),
        'RABBITMQ_LOGS': '-',
        'RABBITMQ_DIST_PORT': str(endpoints.RABBIT_DISTRIBUTION),
        'RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS': (
            '-kernel inet_dist_use_interface {127,0,0,1}'
        ),
        'ERL_EPMD_ADDRESS': endpoints.HOST,
    }


def _libvirt(state: cloud_state.State) -> None:
    path = state.etc / 'libvirtd.conf'
    if path.exists():
        return  # the host's UUID stays what it was
    state.write(
        path,
        # The socket is guarded by its group alone, as on a host without
        # polkit.
        'unix_sock_group = "libvirt"\n'
        'unix_sock_ro_perms = "0777"\n'
        'unix_sock_rw_perms = "0770"\n'
        'auth_unix_ro = "none"\n'
        'auth_unix_rw = "none"\n'
        'log_outputs = "2:stderr"\n'
        # A bare machine may have neither a machine id nor DMI tables.
        f'host_uuid = "{uuid.uuid4()}"\n',
    )
    state.write(state.etc / 'virtlogd.conf', 'log_outputs = "3:stderr"\n')
