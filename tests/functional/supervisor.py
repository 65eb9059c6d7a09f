#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""The first process of the private libvirt's namespaces.

Usage: unshare --mount --net --pid --fork ... supervisor.py DIRECTORY

libvirtd keeps its state in fixed places. This process puts directories of
its own over them, starts virtlogd and libvirtd, and obeys one word a line on
its standard input: "kill" and "start" libvirtd. When its input closes, it
ends; and since it is the first process of a PID namespace, the kernel then
kills everything in there: the daemons and every guest.

The standard library alone, since nothing else is needed.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

PLACES = {
    'etc': '/etc/libvirt',
    'run': '/run/libvirt',
    'lib': '/var/lib/libvirt',
    'cache': '/var/cache/libvirt',
    'log': '/var/log/libvirt',
}

LIBVIRTD_CONF = """\
auth_unix_rw = "none"
auth_unix_ro = "none"
unix_sock_rw_perms = "0777"
log_level = 3
"""

# The users are Debian's defaults. There is no AppArmor profile for paths of
# ours, and control groups belong to the host. QEMU's own mount namespace has
# another /dev and nothing else; libvirt cannot make it over what we put on
# /dev/kvm.
QEMU_CONF = """\
user = "libvirt-qemu"
group = "libvirt-qemu"
security_driver = "none"
cgroup_controllers = []
namespaces = []
"""

# Seconds that a daemon may take to open its socket
START_TIMEOUT = 60


class Supervisor:
    def __init__(self, directory: pathlib.Path) -> None:
        """Prepare the namespace.

        :param directory: where the daemons' state goes.
        """
        self.directory = directory
        self.pids: dict[str, int] = {}
        # Guests lose their parent when libvirtd daemonizes them, and become
        # ours. A zombie would look alive to libvirtd, which would wait.
        signal.signal(signal.SIGCHLD, self._reap)
        for name, place in PLACES.items():
            source = directory / name
            source.mkdir(exist_ok=True)
            source.chmod(0o755)
            os.makedirs(place, exist_ok=True)
            subprocess.run(['mount', '--bind', str(source), place],
                           check=True)
        # Of the new network namespace; libvirtd would look for interfaces
        # that it cannot see.
        subprocess.run(['mount', '-t', 'sysfs', 'sysfs', '/sys'], check=True)
        if os.path.exists('/dev/kvm'):
            # Where only root may open it, libvirt finds it when it probes
            # QEMU and misses it right after, and probes again, for eight
            # seconds, at every definition. Our guests do without it.
            nothing = directory / 'nothing'
            nothing.touch(mode=0o000)
            subprocess.run(['mount', '--bind', str(nothing), '/dev/kvm'],
                           check=True)
        etc = directory / 'etc'
        (etc / 'libvirtd.conf').write_text(LIBVIRTD_CONF)
        (etc / 'qemu.conf').write_text(QEMU_CONF)
        (etc / 'virtlogd.conf').write_text('')

    def _reap(self, *_args: object) -> None:
        while True:
            try:
                pid, _status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for name, known in list(self.pids.items()):
                if known == pid:
                    del self.pids[name]

    def start(self, name: str, socket: str) -> None:
        """Start a daemon and wait until it listens.

        :param name: of the program in /usr/sbin.
        :param socket: that it makes in /run/libvirt.
        """
        path = self.directory / 'run' / socket
        path.unlink(missing_ok=True)
        log = os.open(self.directory / f'{name}.log',
                      os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        program = f'/usr/sbin/{name}'
        self.pids[name] = os.posix_spawn(
            program,
            [program, '--pid-file', str(self.directory / f'{name}.pid')],
            {'PATH': os.environ.get('PATH', '/usr/sbin:/usr/bin'),
             'LC_ALL': 'C'},
            file_actions=[(os.POSIX_SPAWN_DUP2, log, 1),
                          (os.POSIX_SPAWN_DUP2, log, 2)])
        os.close(log)
        deadline = time.monotonic() + START_TIMEOUT
        while not path.exists():
            if name not in self.pids or time.monotonic() > deadline:
                raise SystemExit(f'{name} did not start')
            time.sleep(0.02)

    def kill(self, name: str) -> None:
        """Kill a daemon as a crash would, and wait until it is gone."""
        pid = self.pids.get(name)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        while name in self.pids:
            time.sleep(0.01)

    def run(self) -> None:
        """Start the daemons and obey until the input closes."""
        self.start('virtlogd', 'virtlogd-sock')
        self.start('libvirtd', 'libvirt-sock')
        print('done', flush=True)
        for line in sys.stdin:
            if line.strip() == 'kill':
                self.kill('libvirtd')
            elif line.strip() == 'start':
                self.start('libvirtd', 'libvirt-sock')
            print('done', flush=True)


if __name__ == '__main__':
    Supervisor(pathlib.Path(sys.argv[1])).run()
