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

"""What is installed: Debian's packages, a virtual environment, our own."""

from collections.abc import Iterator, Mapping
import contextlib
import hashlib
import os
import pathlib
import subprocess

from small_cloud import errors
from small_cloud import processes
from small_cloud import release
from small_cloud import state as cloud_state

PYTHON = '/usr/bin/python3'
HERE = pathlib.Path(__file__).resolve().parent
POLICY = pathlib.Path('/usr/sbin/policy-rc.d')

DEBIAN = (
    'adduser',
    'dmidecode',
    'dmsetup',
    'gcc',
    'genisoimage',
    'git',
    'iproute2',
    'iptables',
    'libc6-dev',
    'libvirt-clients',
    'libvirt-daemon',
    'libvirt-daemon-driver-qemu',
    'libvirt-daemon-system',
    'libvirt-dev',
    'mariadb-client',
    'mariadb-server',
    'openssh-client',
    'openssh-server',
    'pkg-config',
    'procps',
    'python3',
    'python3-dev',
    'python3-libnbd',
    'python3-venv',
    'qemu-system-x86',
    'qemu-utils',
    'rabbitmq-server',
    'sudo',
)


def _run(argv: list[str], more: Mapping[str, str] | None = None) -> None:
    environment = {
        **os.environ,
        'DEBIAN_FRONTEND': 'noninteractive',
        **(more or {}),
    }
    done = subprocess.run(
        argv,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise errors.CloudError(
            f'failed ({done.returncode}): {" ".join(argv)}\n'
            f'{done.stdout[-4000:]}'
        )


def _missing() -> list[str]:
    listed = subprocess.run(
        [
            'dpkg-query',
            '-W',
            '-f',
            '${Package} ${db:Status-Status}\n',
            *DEBIAN,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ).stdout
    installed = {
        line.split()[0]
        for line in listed.splitlines()
        if line.endswith(' installed')
    }
    return [name for name in DEBIAN if name not in installed]


@contextlib.contextmanager
def _no_service_starts() -> Iterator[None]:
    """Keep Debian's packages from starting their daemons."""
    before = POLICY.read_bytes() if POLICY.exists() else None
    mode = POLICY.stat().st_mode & 0o7777 if before is not None else 0o755
    POLICY.write_text('#!/bin/sh\nexit 101\n')
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        if before is None:
            POLICY.unlink()
        else:
            POLICY.write_bytes(before)
            POLICY.chmod(mode)


def install_debian() -> bool:
    """Install what is missing of Debian's packages.

    :returns: True if something was.
    """
    missing = _missing()
    if not missing:
        return False
    with _no_service_starts():
        _run(['apt-get', 'update'])
        install = [
            'apt-get',
            'install',
            '-y',
            '--no-install-recommends',
            *missing,
        ]
        if not pathlib.Path('/run/systemd/system').exists():
            # Without this libvirt's dependencies replace the init system.
            if subprocess.run(
                ['dpkg-query', '-W', 'libvirt-daemon-system-systemd'],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            ).returncode:
                install.append('libvirt-daemon-system-sysv')
        _run(install)
    return True


def _digest(*paths: pathlib.Path) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(path.read_bytes() if path.exists() else b'')
    return total.hexdigest()


def make_venv(state: cloud_state.State) -> bool:
    """Fill the virtual environment with the pinned packages.

    :returns: True if there was something to do.
    """
    wanted = HERE / 'requirements.txt', release.constraints(state)
    digest = _digest(*wanted)
    if state.is_done('venv', digest):
        return False
    _run([PYTHON, '-m', 'venv', str(state.venv)])
    _run(
        [
            str(state.bin / 'pip'),
            'install',
            '--disable-pip-version-check',
            '-r',
            str(wanted[0]),
            '-c',
            str(wanted[1]),
        ]
    )
    _link_libnbd(state)
    state.mark_done('venv', digest)
    return True


def _site_packages(state: cloud_state.State) -> pathlib.Path:
    return next((state.venv / 'lib').glob('python3*')) / 'site-packages'


def _link_libnbd(state: cloud_state.State) -> None:
    """Show Debian's libnbd binding to the environment; PyPI has none."""
    debian = pathlib.Path('/usr/lib/python3/dist-packages')
    for source in (debian / 'nbd.py', *debian.glob('libnbdmod.*.so')):
        link = _site_packages(state) / source.name
        link.unlink(missing_ok=True)
        link.symlink_to(source)


def has_own_package() -> bool:
    return any(
        (cloud_state.CHECKOUT / name).exists()
        for name in ('setup.cfg', 'pyproject.toml')
    )


def install_own(state: cloud_state.State) -> bool:
    """Install this checkout, editable if the user nova can read it there.

    :returns: True if it is installed now.
    """
    if not has_own_package():
        return False
    checkout = cloud_state.CHECKOUT
    # Entry points live in the metadata, so an edit of these needs a new
    # install.
    metadata = _digest(
        *(
            checkout / name
            for name in ('setup.cfg', 'setup.py', 'pyproject.toml')
        )
    )
    version = f'{checkout} {metadata}'
    package = checkout / 'nova_snapshot_ext'
    if state.is_done('own', version):
        return True
    readable = processes.can_read('nova', package / '__init__.py')
    editable = ['--editable'] if readable else []
    # The build must leave no generated files in the checkout, and needs a
    # version where there is no git to tell one.
    environment = {
        'SKIP_GENERATE_AUTHORS': '1',
        'SKIP_WRITE_GIT_CHANGELOG': '1',
    }
    if not (checkout / '.git').exists():
        environment['PBR_VERSION'] = '0.0.0'
    _run(
        [
            str(state.bin / 'pip'),
            'install',
            '--disable-pip-version-check',
            '--no-deps',
            '--force-reinstall',
            *editable,
            str(checkout),
        ],
        environment,
    )
    if readable:
        state.mark_done('own', version)  # a copy is made anew by every `up`
    return True
