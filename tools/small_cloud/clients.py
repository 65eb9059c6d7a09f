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

"""How a client signs on (OS_* variables, openrc, clouds.yaml); running one."""

from collections.abc import Mapping, Sequence
import json
import os
import shlex
import subprocess

from small_cloud import endpoints
from small_cloud import errors
from small_cloud import secrets
from small_cloud import state as cloud_state


def variables(state: cloud_state.State) -> dict[str, str]:
    """The administrator's OS_* variables."""
    return {
        'OS_AUTH_TYPE': 'password',
        'OS_AUTH_URL': endpoints.AUTH_URL,
        'OS_IDENTITY_API_VERSION': '3',
        'OS_USERNAME': 'admin',
        'OS_PASSWORD': secrets.load(state)['admin'],
        'OS_PROJECT_NAME': 'admin',
        'OS_USER_DOMAIN_NAME': 'Default',
        'OS_PROJECT_DOMAIN_NAME': 'Default',
        'OS_REGION_NAME': endpoints.REGION,
        # Without it the command line asks for 2.1, which has no `--nic none`.
        'OS_COMPUTE_API_VERSION': '2.90',
    }


def exports(state: cloud_state.State) -> str:
    return ''.join(
        f'export {name}={shlex.quote(value)}\n'
        for name, value in variables(state).items()
    )


def write(state: cloud_state.State) -> None:
    """Write openrc and clouds.yaml."""
    state.write(state.root / 'openrc', exports(state), mode=0o600)
    # JSON is YAML.
    os_ = variables(state)
    state.write(
        state.root / 'clouds.yaml',
        json.dumps(
            {
                'clouds': {
                    'small': {
                        'auth': {
                            'auth_url': os_['OS_AUTH_URL'],
                            'username': 'admin',
                            'password': os_['OS_PASSWORD'],
                            'project_name': 'admin',
                            'user_domain_name': 'Default',
                            'project_domain_name': 'Default',
                        },
                        'region_name': endpoints.REGION,
                        'identity_api_version': 3,
                    }
                }
            },
            indent=1,
        )
        + '\n',
        mode=0o600,
    )


def environment(state: cloud_state.State) -> dict[str, str]:
    """The caller's environment, made one of this cloud's administrator."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith('OS_') or name == 'OS_CLIENT_CONFIG_FILE'
    }
    return {
        **kept,
        **variables(state),
        'PATH': f'{state.bin}:{os.environ.get("PATH", os.defpath)}',
    }


def run_inside(state: cloud_state.State, script: str, *argv: str) -> int:
    """Run a script of ours with the cloud's Python and our own output."""
    return subprocess.run(
        [str(state.bin / 'python'), str(cloud_state.INSIDE / script), *argv],
        env=environment(state),
    ).returncode


def provision(
    state: cloud_state.State, steps: Sequence[tuple[str, Mapping[str, object]]]
) -> None:
    """Run steps of inside/provision.py, in one process."""
    done = subprocess.run(
        [str(state.bin / 'python'), str(cloud_state.INSIDE / 'provision.py')],
        input=json.dumps(steps),
        text=True,
        env=environment(state),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise errors.CloudError(done.stdout[-3000:])


def wait_reports(
    state: cloud_state.State, since: Mapping[str, float]
) -> None:
    """Wait until Nova's services have reported since they were started.

    :param since: of `binary@host`, when it was started: seconds since the
        epoch.
    """
    provision(state, [('wait_services', {'since': since, 'timeout_s': 120})])
