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

"""Configuration files of Keystone, Glance, Placement, Neutron and Nova."""

from small_cloud import endpoints
from small_cloud import ini
from small_cloud import secrets
from small_cloud import state as cloud_state


def write(state: cloud_state.State) -> None:
    _keystone(state)
    _glance(state)
    _placement(state)
    _neutron(state)
    _nova(state)


def database_url(state: cloud_state.State, name: str) -> str:
    password = secrets.load(state)['database']
    return (
        f'mysql+pymysql://openstack:{password}@localhost/{name}'
        f'?unix_socket={state.mysql_socket}'
    )


def _database(state: cloud_state.State, name: str) -> dict[str, object]:
    return {'connection': database_url(state, name), 'max_pool_size': 5}


def _transport(state: cloud_state.State) -> str:
    password = secrets.load(state)['rabbit']
    return (
        f'rabbit://openstack:{password}@{endpoints.HOST}:{endpoints.RABBIT}/'
    )


def _service_auth(state: cloud_state.State, user: str) -> dict[str, object]:
    """How a service signs on to Keystone."""
    return {
        'auth_type': 'password',
        'auth_url': endpoints.AUTH_URL,
        'username': user,
        'password': secrets.load(state)['service'],
        'project_name': 'service',
        'user_domain_name': 'Default',
        'project_domain_name': 'Default',
        'region_name': endpoints.REGION,
    }


def _authtoken(state: cloud_state.State, user: str) -> dict[str, object]:
    return {
        **_service_auth(state, user),
        'www_authenticate_uri': endpoints.AUTH_URL,
        'service_token_roles': 'service',
        'service_token_roles_required': 'true',
    }


def _logging(**more: object) -> dict[str, object]:
    return {'use_stderr': 'true', **more}


def _keystone(state: cloud_state.State) -> None:
    etc = state.etc / 'keystone'
    state.write(
        etc / 'keystone.conf',
        ini.render(
            {
                'DEFAULT': _logging(),
                'database': _database(state, 'keystone'),
                # The default takes a third of a second for every sign-on.
                'identity': {'password_hash_rounds': 4},
                'token': {'provider': 'fernet'},
                'fernet_tokens': {'key_repository': etc / 'fernet-keys'},
                'credential': {'key_repository': etc / 'credential-keys'},
                # Its cache lives in each worker: a second one would serve a
                # catalog from before the endpoints existed.
                'cache': {'enabled': 'false'},
            }
        ),
        mode=0o600,
    )


def _glance(state: cloud_state.State) -> None:
    data = state.root / 'glance'
    for name in ('images', 'staging', 'tasks'):
        (data / name).mkdir(mode=0o750, parents=True, exist_ok=True)
    state.write(
        state.etc / 'glance' / 'glance-api.conf',
        ini.render(
            {
                'DEFAULT': _logging(
                    enabled_backends='file:file',
                    transport_url=_transport(state),
                ),
                'database': _database(state, 'glance'),
                'glance_store': {'default_backend': 'file'},
                'file': {'filesystem_store_datadir': data / 'images'},
                'os_glance_staging_store': {
                    'filesystem_store_datadir': data / 'staging'
                },
                'os_glance_tasks_store': {
                    'filesystem_store_datadir': data / 'tasks'
                },
                'paste_deploy': {
                    'flavor': 'keystone',
                    'config_file': state.venv
                    / 'etc'
                    / 'glance'
                    / 'glance-api-paste.ini',
                },
                'keystone_authtoken': _authtoken(state, 'glance'),
                'oslo_concurrency': {'lock_path': data / 'tasks'},
            }
        ),
        mode=0o600,
    )


def _placement(state: cloud_state.State) -> None:
    state.write(
        state.etc / 'placement' / 'placement.conf',
        ini.render(
            {
                'DEFAULT': _logging(),
                'placement_database': _database(state, 'placement'),
                'api': {'auth_strategy': 'keystone'},
                'keystone_authtoken': _authtoken(state, 'placement'),
            }
        ),
        mode=0o600,
    )


def _neutron(state: cloud_state.State) -> None:
    data = state.root / 'neutron'
    data.mkdir(mode=0o750, exist_ok=True)
    state.write(
        state.etc / 'neutron' / 'neutron.conf',
        ini.render(
            {
                'DEFAULT': _logging(
                    core_plugin='ml2',
                    service_plugins='',
                    auth_strategy='keystone',
                    transport_url=_transport(state),
                    state_path=data,
                    api_paste_config=state.venv
                    / 'etc'
                    / 'neutron'
                    / 'api-paste.ini',
                    # No agent listens, and Nova need not hear of ports that
                    # have none.
                    dhcp_agent_notification='false',
                    notify_nova_on_port_status_changes='false',
                    notify_nova_on_port_data_changes='false',
                ),
                'database': _database(state, 'neutron'),
                'keystone_authtoken': _authtoken(state, 'neutron'),
                'ml2': {
                    'type_drivers': 'local',
                    'tenant_network_types': 'local',
                    'mechanism_drivers': 'tap',
                    'extension_drivers': '',
                },
                'oslo_concurrency': {'lock_path': data / 'lock'},
            }
        ),
        mode=0o600,
    )


def _nova(state: cloud_state.State) -> None:
    """nova.conf for all of Nova, and databases for all but nova-compute."""
    etc = state.etc / 'nova'
    state.write(
        etc / 'nova.conf',
        ini.render(
            {
                'DEFAULT': _logging(
                    host=endpoints.COMPUTE_HOST,
                    my_ip=endpoints.HOST,
                    rootwrap_config=etc / 'rootwrap.conf',
                    transport_url=_transport(state),
                    state_path=state.nova,
                    # The start is over when the service reports; 10 s is the
                    # default.
                    report_interval=5,
                    # There is no other host.
                    allow_resize_to_same_host='true',
                ),
                'api': {'auth_strategy': 'keystone'},
                'keystone_authtoken': _authtoken(state, 'nova'),
                'service_user': {
                    **_service_auth(state, 'nova'),
                    'send_service_user_token': 'true',
                },
                'placement': _service_auth(state, 'nova'),
                'neutron': _service_auth(state, 'nova'),
                'glance': {'region_name': endpoints.REGION},
                'quota': {'instances': -1, 'cores': -1, 'ram': -1},
                'oslo_concurrency': {'lock_path': state.nova / 'tmp'},
            }
        ),
        mode=0o640,
        group='nova',
    )
    state.write(
        etc / 'nova-controller.conf',
        ini.render(
            {
                'DEFAULT': {
                    # One node: guests that do nothing may share two cores.
                    'initial_cpu_allocation_ratio': 16
                },
                'api_database': _database(state, 'nova_api'),
                'database': _database(state, 'nova_cell1'),
                'conductor': {'workers': 1},
                'scheduler': {'workers': 1},
            }
        ),
        mode=0o600,
    )
