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

"""The services: how each is started, what shows that it answers, its end."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import http.client
import pathlib
import socket
import time

from small_cloud import backing_conf
from small_cloud import compute_conf
from small_cloud import endpoints
from small_cloud import errors
from small_cloud import processes
from small_cloud import release
from small_cloud import state as cloud_state
from small_cloud import wsgi

LIBVIRT_SOCKET = pathlib.Path('/run/libvirt/libvirt-sock')
VIRTLOGD_SOCKET = pathlib.Path('/run/libvirt/virtlogd-sock')
# What systemd's unit of a packaged nova-compute would grant before it is
# killed.
COMPUTE_STOP_S = 200.0


@dataclasses.dataclass(frozen=True)
class Service:
    """One process and its children."""

    name: str
    argv: tuple[str, ...]
    answers: Callable[[], bool] | None = None
    user: str | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Belongs to the machine rather than to a cloud: one that already runs is
    # used.
    shared: bool = False
    stop_timeout_s: float = 20


def tcp(port: int) -> Callable[[], bool]:
    def answers() -> bool:
        with socket.socket() as connection:
            connection.settimeout(1)
            return connection.connect_ex((endpoints.HOST, port)) == 0

    return answers


def unix(path: pathlib.Path) -> Callable[[], bool]:
    def answers() -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1)
            try:
                return connection.connect_ex(str(path)) == 0
            except OSError:
                return False

    return answers


def _http(port: int) -> bool:
    connection = http.client.HTTPConnection(endpoints.HOST, port, timeout=5)
    try:
        connection.request('GET', '/')
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def compute_environment(state: cloud_state.State) -> dict[str, str]:
    """That of nova-compute."""
    return {
        'HOME': str(state.nova),
        **release.compute_environment(state, compute_conf.backend(state)),
    }


def catalogue(state: cloud_state.State) -> dict[str, Service]:
    """Every service, in the order in which they start."""
    etc, bin_ = state.etc, state.bin
    nova_conf = ('--config-file', str(etc / 'nova' / 'nova.conf'))
    controller = (
        *nova_conf,
        '--config-file',
        str(etc / 'nova' / 'nova-controller.conf'),
    )
    services = [
        Service(
            'mariadb',
            ('/usr/sbin/mariadbd', f'--defaults-file={etc}/mariadb.cnf'),
            unix(state.mysql_socket),
            user='mysql',
        ),
        Service(
            'epmd',
            ('/usr/bin/epmd', '-address', endpoints.HOST),
            tcp(endpoints.EPMD),
            user='rabbitmq',
            shared=True,
        ),
        Service(
            'virtlogd',
            ('/usr/sbin/virtlogd', '-f', f'{etc}/virtlogd.conf'),
            unix(VIRTLOGD_SOCKET),
            shared=True,
        ),
        Service(
            'rabbitmq',
            ('/usr/lib/rabbitmq/bin/rabbitmq-server',),
            tcp(endpoints.RABBIT),
            user='rabbitmq',
            environment=backing_conf.rabbitmq_environment(state),
        ),
        Service(
            'libvirtd',
            ('/usr/sbin/libvirtd', '-f', f'{etc}/libvirtd.conf'),
            unix(LIBVIRT_SOCKET),
            shared=True,
        ),
    ]
    for api in wsgi.apis(state).values():
        services.append(
            Service(
                api.name,
                (f'{bin_}/uwsgi', '--ini', f'{etc}/{api.name}-uwsgi.ini'),
                lambda port=api.port: _http(port),  # type: ignore[misc]
                environment=api.environment,
            )
        )
    services += [
        Service('nova-conductor', (f'{bin_}/nova-conductor', *controller)),
        Service('nova-scheduler', (f'{bin_}/nova-scheduler', *controller)),
        Service(
            'nova-compute',
            (
                f'{bin_}/nova-compute',
                *nova_conf,
                '--config-file',
                str(etc / 'nova' / 'nova-cpu.conf'),
            ),
            user='nova',
            environment=compute_environment(state),
        ),
    ]
    return {service.name: service for service in services}


def _last_lines(state: cloud_state.State, name: str) -> str:
    text = (state.log / f'{name}.log').read_text(errors='replace')
    return '\n'.join(text.splitlines()[-15:])


def start(state: cloud_state.State, service: Service) -> bool:
    """Start a service unless it runs.

    :returns: True if it was started by this call.
    """
    if processes.alive(state, service.name):
        return False
    if service.answers is not None and service.answers():
        if service.shared:
            return False
        raise errors.CloudError(
            f'something that is not this cloud\'s answers in place of '
            f'{service.name}'
        )
    # What a killed service has left would hold its port.
    processes.stop(state, service.name)
    environment = {
        'PATH': state.path_for_commands(),
        'HOME': '/root',
        'LANG': 'C.UTF-8',
        # Root's services import from the checkout; they leave nothing there.
        'PYTHONDONTWRITEBYTECODE': '1',
        **service.environment,
    }
    processes.start(
        state,
        service.name,
        service.argv,
        environment=environment,
        user=service.user,
    )
    return True


def wait(
    state: cloud_state.State,
    services: Iterable[Service],
    timeout_s: float = 120,
) -> None:
    """Wait until each of them answers, or say which one doesn't and why."""
    end = time.monotonic() + timeout_s
    for service in services:
        while not (service.answers is None or service.answers()):
            if processes.record(state, service.name) and not processes.alive(
                state, service.name
            ):
                raise errors.CloudError(
                    f'{service.name} has ended:\n'
                    f'{_last_lines(state, service.name)}'
                )
            if time.monotonic() > end:
                raise errors.CloudError(
                    f'{service.name} does not answer:\n'
                    f'{_last_lines(state, service.name)}'
                )
            time.sleep(0.1)


def stop(state: cloud_state.State, service: Service) -> str | None:
    return processes.stop(
        state, service.name, timeout_s=service.stop_timeout_s
    )
