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

"""uWSGI, the web server of each API."""

import dataclasses

from small_cloud import endpoints
from small_cloud import ini
from small_cloud import state as cloud_state


@dataclasses.dataclass(frozen=True)
class Api:
    """One API that uWSGI serves."""

    name: str
    port: int
    module: str
    environment: dict[str, str]
    processes: int = 1
    threads: int = 8


def apis(state: cloud_state.State) -> dict[str, Api]:
    etc = state.etc
    every = (
        Api(
            'keystone',
            endpoints.KEYSTONE,
            'keystone.wsgi.api:application',
            {'OS_KEYSTONE_CONFIG_DIR': str(etc / 'keystone')},
            processes=2,
            threads=4,
        ),
        # An upload keeps a thread busy for its whole length.
        Api(
            'glance',
            endpoints.GLANCE,
            'glance.wsgi.api:application',
            {'OS_GLANCE_CONFIG_DIR': str(etc / 'glance')},
            processes=2,
            threads=6,
        ),
        Api(
            'placement',
            endpoints.PLACEMENT,
            'placement.wsgi.api:application',
            {'OS_PLACEMENT_CONFIG_DIR': str(etc / 'placement')},
        ),
        Api(
            'neutron',
            endpoints.NEUTRON,
            'neutron_api:application',
            {
                'OS_NEUTRON_CONFIG_DIR': str(etc / 'neutron'),
                'OS_NEUTRON_CONFIG_FILES': 'neutron.conf',
            },
        ),
        Api(
            'nova-api',
            endpoints.NOVA,
            'nova.wsgi.osapi_compute:application',
            {
                'OS_NOVA_CONFIG_DIR': str(etc / 'nova'),
                # Nova takes the first one for paste's.
                'OS_NOVA_CONFIG_FILES': ';'.join(
                    (
                        str(state.venv / 'etc' / 'nova' / 'api-paste.ini'),
                        'nova.conf',
                        'nova-controller.conf',
                    )
                ),
            },
        ),
    )
    return {api.name: api for api in every}


def write(state: cloud_state.State) -> None:
    for api in apis(state).values():
        state.write(
            state.etc / f'{api.name}-uwsgi.ini',
            ini.render(
                {
                    'uwsgi': {
                        'http-socket': f'{endpoints.HOST}:{api.port}',
                        'module': api.module,
                        'pythonpath': cloud_state.INSIDE,
                        'master': 'true',
                        'processes': api.processes,
                        'threads': api.threads,
                        'enable-threads': 'true',
                        # Each worker makes its own connections: none is shared
                        # by a fork.
                        'lazy-apps': 'true',
                        'need-app': 'true',
                        'die-on-term': 'true',
                        'reload-mercy': 5,
                        'worker-reload-mercy': 5,
                        # uWSGI ends every connection with its answer; a client
                        # that is not told so sends its next request into a
                        # closed one.
                        'add-header': 'Connection: close',
                        'buffer-size': 65535,
                        # python-glanceclient sends chunks of 1 MiB and a
                        # little over. With the limit of 1 MiB a large upload
                        # ends in "unable to receive chunked part", and Nova
                        # deletes the image.
                        'chunked-input-limit': 16 * 1024 * 1024,
                        'chunked-input-timeout': 60,
                        'socket-timeout': 60,
                    }
                }
            ),
        )
