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

"""The second host: nova-compute and libvirtd in namespaces of this machine.

It has a name, and directories of its own for libvirt, for sockets and, unless
both are to share them, for instances. The network is the machine's: servers
that go from one host to the other while they run must have no ports, as both
would want the same device.
"""

import pathlib
import shutil
import uuid

from small_cloud import clients
from small_cloud import compute_conf
from small_cloud import compute_user
from small_cloud import databases
from small_cloud import endpoints
from small_cloud import guests
from small_cloud import processes
from small_cloud import qemu_conf
from small_cloud import services
from small_cloud import ssh
from small_cloud import state as cloud_state

NAME = endpoints.SECOND_HOST
COMPUTE = 'nova-compute-2'
SCRIPT = cloud_state.INSIDE / 'second_host'


def _root(state: cloud_state.State) -> pathlib.Path:
    return state.root / 'second'


def _own(state: cloud_state.State) -> dict[pathlib.Path, pathlib.Path]:
    """What is its own, by the path at which it is there."""
    root = _root(state)
    instances = root / 'nova' / state.instances.name
    # Mounted into what is mounted next.
    shared = {instances: state.instances} if _is_shared(state) else {}
    return shared | {
        state.nova: root / 'nova',
        pathlib.Path('/run/libvirt'): root / 'run-libvirt',
        pathlib.Path('/etc/libvirt'): root / 'etc-libvirt',
        pathlib.Path('/var/lib/libvirt'): root / 'lib-libvirt',
        pathlib.Path('/var/cache/libvirt'): root / 'cache-libvirt',
        pathlib.Path('/var/log/libvirt'): root / 'log-libvirt',
    }


def _shared(state: cloud_state.State) -> pathlib.Path:
    return _root(state) / 'shares-instances'


def _is_shared(state: cloud_state.State) -> bool:
    return _shared(state).exists()


def uri(state: cloud_state.State) -> str:
    """Its libvirtd, as seen from the machine."""
    socket = _root(state) / 'run-libvirt' / services.LIBVIRT_SOCKET.name
    return f'qemu+unix:///system?socket={socket}'


def catalogue(state: cloud_state.State) -> dict[str, services.Service]:
    """Its services, in the order in which they start."""
    etc, run = state.etc, _root(state) / 'run-libvirt'
    mounts = [str(path) for pair in _own(state).items() for path in pair]

    def there(*command: str) -> tuple[str, ...]:
        return (
            '/usr/bin/unshare',
            '--mount',
            '--uts',
            '--propagation',
            'unchanged',
            str(SCRIPT),
            NAME,
            *mounts,
            '--',
            *command,
        )

    def sshd(host: str) -> tuple[str, ...]:
        path = ssh.configuration(state, endpoints.SSH[host])
        return ('/usr/sbin/sshd', '-D', '-e', '-f', str(path))

    every = (
        services.Service(
            'sshd',
            sshd(endpoints.COMPUTE_HOST),
            services.tcp(endpoints.SSH[endpoints.COMPUTE_HOST]),
        ),
        services.Service(
            'sshd-2', there(*sshd(NAME)), services.tcp(endpoints.SSH[NAME])
        ),
        services.Service(
            'virtlogd-2',
            there(
                '/usr/sbin/virtlogd',
                f'--config={etc}/virtlogd.conf',
                f'--pid-file={run}/virtlogd.pid',
            ),
            services.unix(run / services.VIRTLOGD_SOCKET.name),
        ),
        services.Service(
            'libvirtd-2',
            there(
                '/usr/sbin/libvirtd',
                f'--config={etc}/libvirtd-2.conf',
                f'--pid-file={run}/libvirtd.pid',
            ),
            services.unix(run / services.LIBVIRT_SOCKET.name),
        ),
        services.Service(
            COMPUTE,
            there(
                '/usr/bin/setpriv',
                '--reuid=nova',
                '--regid=nova',
                '--init-groups',
                f'{state.bin}/nova-compute',
                '--config-file',
                f'{etc}/nova/nova.conf',
                '--config-file',
                f'{etc}/nova/nova-cpu-2.conf',
            ),
            environment=services.compute_environment(state),
            stop_timeout_s=services.COMPUTE_STOP_S,
        ),
    )
    return {service.name: service for service in every}


def _write(state: cloud_state.State, *, shared: bool) -> bool:
    """Directories and files.

    :returns: True if what nova-compute reads has changed.
    """
    if shared:
        _root(state).mkdir(mode=0o755, exist_ok=True)
        _shared(state).touch()
    own = _own(state)
    for directory in own.values():
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    compute_user.make_directories(own[state.nova])
    qemu_conf.copy(own[pathlib.Path('/etc/libvirt')])
    path = state.etc / 'libvirtd-2.conf'
    if not path.exists():
        lines = [
            line
            for line in (state.etc / 'libvirtd.conf').read_text().splitlines()
            if not line.startswith('host_uuid')
        ]
        # libvirt takes a host of the same UUID for itself.
        lines.append(f'host_uuid = "{uuid.uuid4()}"')
        state.write(path, '\n'.join(lines) + '\n')
    ssh.write(state)
    return compute_conf.write(
        state,
        'nova-cpu-2.conf',
        {
            'DEFAULT': {
                'host': NAME,
                'my_ip': endpoints.ADDRESSES[NAME],
            }
        },
    )


def runs(state: cloud_state.State) -> bool:
    return processes.alive(state, COMPUTE) is not None


def up(state: cloud_state.State, *, shared: bool) -> None:
    """Start what is missing, beside a cloud that is up.

    :param shared: whether a host that is not there yet is to have instances
        where the first one has them
    """
    if _write(state, shared=shared and not _root(state).exists()):
        processes.stop(state, COMPUTE, timeout_s=services.COMPUTE_STOP_S)
    every = catalogue(state).values()
    for service in every:
        services.start(state, service)
        services.wait(state, [service])
    known = processes.alive(state, COMPUTE)
    clients.wait_reports(
        state, {f'nova-compute@{NAME}': known.started_at if known else 0.0}
    )
    databases.nova_manage(state, 'cell_v2', 'discover_hosts')


def down(state: cloud_state.State) -> list[str]:
    """End it, its guests included.

    :returns: the names of the services that ran.
    """
    every = catalogue(state)
    ended = []
    for name in reversed(every):
        if name == 'libvirtd-2' and processes.alive(state, name):
            guests.destroy(state, uri(state))
            guests.undefine(state, uri(state))
        if services.stop(state, every[name]):
            ended.append(name)
    ssh.withdraw(state)
    return ended


def forget(state: cloud_state.State) -> None:
    """Have Nova forget the host, which is down; what it had is deleted."""
    clients.provision(state, [('forget_host', {'host': NAME})])
    shutil.rmtree(_root(state))
