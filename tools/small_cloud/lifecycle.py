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

"""The cloud as a whole: up, down, restart of nova-compute."""

import concurrent.futures
import os
import pathlib
import shutil
import signal
import subprocess
import time

from small_cloud import backing_conf
from small_cloud import clients
from small_cloud import compute_conf
from small_cloud import compute_user
from small_cloud import databases
from small_cloud import endpoints
from small_cloud import errors
from small_cloud import guests
from small_cloud import kvm_device
from small_cloud import openstack_conf
from small_cloud import packages
from small_cloud import processes
from small_cloud import qemu_conf
from small_cloud import release
from small_cloud import second_host
from small_cloud import secrets
from small_cloud import services
from small_cloud import state as cloud_state
from small_cloud import wsgi

IMAGE = 'guest'
BACKING = ('mariadb', 'epmd', 'virtlogd', 'rabbitmq', 'libvirtd')
CONTROL = (
    'glance',
    'placement',
    'neutron',
    'nova-api',
    'nova-conductor',
    'nova-scheduler',
)
COMPUTE = 'nova-compute'


class Progress:
    """Says what is done and how long it took."""

    def __init__(self) -> None:
        self.begun = self.last = time.monotonic()

    def done(self, what: str) -> None:
        now = time.monotonic()
        print(f'{now - self.last:6.1f} s  {what}', flush=True)
        self.last = now

    def total(self, what: str) -> None:
        print(f'{time.monotonic() - self.begun:6.1f} s  {what}', flush=True)


def up(
    state: cloud_state.State, *, driver: str | None, nova: int | None = None
) -> None:
    """Install, configure, start; whatever is there already is left alone."""
    progress = Progress()
    state.create()
    release.choose(state, nova)
    compute_conf.choose_driver(state, driver)
    if packages.install_debian():
        progress.done('Debian packages')
    if packages.make_venv(state):
        progress.done('virtual environment')
    compute_user.ensure(state)
    _check_driver(state)
    compute_changed = _configure(state)
    progress.done('configuration')

    _start_backing(state)
    progress.done('databases, messages, libvirt')
    databases.create(state)
    databases.sync(state)
    progress.done('tables')
    _start(state, 'keystone')
    if not state.is_done('identity'):
        clients.provision(
            state,
            [
                (
                    'identity',
                    {
                        'region': endpoints.REGION,
                        'urls': endpoints.URLS,
                        'service_password': secrets.load(state)['service'],
                    },
                )
            ],
        )
        state.mark_done('identity')
    progress.done('keystone')
    # Conductor and scheduler need a Keystone user when they start;
    # nova-compute loses ten seconds if it starts before a conductor answers.
    _start(state, *CONTROL)
    progress.done('glance, placement, neutron, nova')
    if compute_changed:
        _stop_compute(state, kill=False)
    services.start(state, services.catalogue(state)[COMPUTE])
    _provision(state)
    _wait_nova(state, 'nova-conductor', 'nova-scheduler', COMPUTE)
    if not state.is_done('host'):
        databases.nova_manage(state, 'cell_v2', 'discover_hosts')
        state.mark_done('host')
    progress.done(
        f'nova-compute {release.of(state)} with the driver '
        f'"{compute_conf.driver(state)}"'
    )
    progress.total('in all')


def _check_driver(state: cloud_state.State) -> None:
    """Install our package; only our own driver cannot do without it."""
    try:
        installed, why = (
            packages.install_own(state),
            'it has no package to install',
        )
    except errors.CloudError as error:
        installed, why = False, str(error)
    if installed:
        return
    if compute_conf.driver(state) == 'ours':
        raise errors.CloudError(
            'this checkout is not installed, so there is only '
            f'Nova\'s driver (--driver nova): {why}'
        )
    print(f'this checkout is not installed: {why.splitlines()[0]}')


def _configure(state: cloud_state.State) -> bool:
    """Write every file.

    :returns: True if what nova-compute reads has changed.
    """
    backing_conf.write(state)
    openstack_conf.write(state)
    wsgi.write(state)
    compute_user.allow_root(state)
    clients.write(state)
    return compute_conf.write(state)


def _start(state: cloud_state.State, *names: str) -> None:
    every = services.catalogue(state)
    chosen = [every[name] for name in names]
    for service in chosen:
        services.start(state, service)
    services.wait(state, chosen)


def _start_backing(state: cloud_state.State) -> None:
    databases.prepare(state)
    kvm_device.allow_group(state)
    qemu_conf.extend()
    # RabbitMQ would start an epmd of its own, on every address.
    _start(state, 'mariadb', 'epmd', 'virtlogd')
    _start(state, 'rabbitmq', 'libvirtd')


def _provision(state: cloud_state.State) -> None:
    """Flavors and the guest image."""
    steps: list[tuple[str, dict[str, object]]] = []
    if not state.is_done('flavors'):
        steps.append(('flavors', {}))
    disk = _build_guest(state)
    if disk is not None:
        about = disk.stat()
        version = f'{about.st_size} {about.st_mtime_ns}'
        if not state.is_done('image', version):
            steps.append(('image', {'name': IMAGE, 'path': str(disk)}))
    if steps:
        clients.provision(state, steps)
        state.mark_done('flavors')
        if disk is not None:
            state.mark_done('image', version)


def _build_guest(state: cloud_state.State) -> pathlib.Path | None:
    """The guest's disk, built anew if its sources have changed."""
    builder = cloud_state.CHECKOUT / 'tools' / 'guest' / 'build'
    if not os.access(builder, os.X_OK):
        print(f'no guest image: there is no {builder}')
        return None
    with open(state.log / 'guest-build.log', 'w') as log:
        done = subprocess.run(
            [str(builder), str(state.guest)],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise errors.CloudError(
            f'{builder} failed; tools/cloud logs guest-build'
        )
    return state.guest / 'disk.img'


def require(state: cloud_state.State, *names: str) -> None:
    """Say so plainly if what a command needs does not run."""
    for name in names:
        if not processes.alive(state, name):
            raise errors.CloudError(f'{name} does not run; tools/cloud up')


def _wait_nova(state: cloud_state.State, *names: str) -> None:
    """Wait until the services have reported since they were started."""
    since = {}
    for name in names:
        known = processes.alive(state, name)
        if known is None:
            raise errors.CloudError(
                f'{name} has ended; tools/cloud logs {name}'
            )
        since[f'{name}@{endpoints.COMPUTE_HOST}'] = known.started_at
    clients.wait_reports(state, since)


def restart_compute(
    state: cloud_state.State, *, driver: str | None = None, kill: bool = False
) -> None:
    """End nova-compute and start it with the configuration as it is now."""
    require(state, 'keystone', 'rabbitmq', 'nova-api', 'nova-conductor')
    compute_conf.choose_driver(state, driver)
    _check_driver(state)
    stop_compute(state, kill=kill)
    progress = Progress()
    compute_conf.write(state)
    services.start(state, services.catalogue(state)[COMPUTE])
    _wait_nova(state, COMPUTE)
    progress.done(
        f'nova-compute reports, driver "{compute_conf.driver(state)}"'
    )


def stop_compute(state: cloud_state.State, *, kill: bool) -> None:
    """End nova-compute; killed, all that it has started goes with it."""
    progress = Progress()
    how = _stop_compute(state, kill=kill)
    progress.done(f'nova-compute {how or "did not run"}')


def _stop_compute(state: cloud_state.State, *, kill: bool) -> str | None:
    return processes.stop(
        state,
        COMPUTE,
        timeout_s=services.COMPUTE_STOP_S,
        first=signal.SIGKILL if kill else signal.SIGTERM,
    )


def down(state: cloud_state.State, *, purge: bool) -> None:
    """End everything, the users of a service before the service."""
    progress = Progress()
    every = services.catalogue(state)

    def stop(*names: str) -> None:
        """End services that do not need each other."""
        with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
            ends = pool.map(
                services.stop,
                [state] * len(names),
                [every[name] for name in names],
            )
        ended = [name for name, how in zip(names, ends) if how]
        if ended:
            progress.done(f'ended: {" ".join(ended)}')

    _end_second(state, progress)
    stop(COMPUTE)
    if guests.processes_left(state) or purge and state.instances.exists():
        # libvirtd may have died before its guests.
        backing_conf.write(state)
        _start(state, 'virtlogd', 'libvirtd')
        if ran := guests.destroy(state):
            progress.done(f'{len(ran)} guests')
        if purge:
            guests.undefine(state)
    stop(*CONTROL)
    stop('keystone', 'libvirtd', 'rabbitmq')
    stop('virtlogd', 'epmd', 'mariadb')
    kvm_device.restore(state)
    qemu_conf.restore()
    compute_user.withdraw_root(state)
    if purge:
        shutil.rmtree(state.root)
        progress.done(f'{state.root} deleted')
    progress.total('in all')


def second_up(state: cloud_state.State, *, shared: bool) -> None:
    """Give the cloud, which must be up, a second host."""
    require(state, 'keystone', 'rabbitmq', 'nova-api', 'nova-conductor')
    progress = Progress()
    second_host.up(state, shared=shared)
    progress.done(f'nova-compute on {second_host.NAME}')


def second_down(state: cloud_state.State) -> None:
    """Take it away again, with the guests that are on it."""
    progress = Progress()
    _end_second(state, progress)
    progress.total('in all')


def _end_second(state: cloud_state.State, progress: Progress) -> None:
    if ended := second_host.down(state):
        progress.done(f'ended: {" ".join(ended)}')
        if processes.alive(state, 'nova-api'):
            second_host.forget(state)
            progress.done(f'Nova has no {second_host.NAME} any more')


def status(state: cloud_state.State) -> bool:
    """Print what runs.

    :returns: True if all of it does.
    """
    complete = True
    every = services.catalogue(state)
    if second_host.runs(state):
        every |= second_host.catalogue(state)
    for name, service in every.items():
        known = processes.alive(state, name)
        if (
            known is None
            and service.shared
            and service.answers
            and service.answers()
        ):
            text = 'answers, started by somebody else'
        elif known is None:
            text, complete = 'down', False
        elif service.answers is not None and not service.answers():
            text, complete = f'pid {known.pid}, does not answer', False
        else:
            age_s = time.time() - known.started_at
            text = f'pid {known.pid}, up for {age_s:.0f} s'
        print(f'{name:16}{text}')
    print(f'{"nova":16}{release.of(state)}')
    print(f'{"driver":16}{compute_conf.driver(state)}')
    if running := guests.names(state, running=True):
        print(f'{"guests":16}{" ".join(running)}')
    return complete
