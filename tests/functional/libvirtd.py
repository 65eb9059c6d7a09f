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

"""A libvirtd of the tests' own.

It runs in namespaces where its state, its pid file and its network are its
own, so a libvirt of the host never notices. One serves a test process: it
starts with the first fixture that needs it and ends with the process, even
when that is killed.
"""

import atexit
import fcntl
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import typing as ty

import fixtures
import libvirt
from testtools import content
from testtools import content_type

PREFIX = 'nova-snapshot-ext-functional-'
_MORE = '# Of one test:\n'

_shared: 'Libvirtd | None' = None
_shared_lock = threading.Lock()
_event_loop: threading.Thread | None = None


def _scratch() -> pathlib.Path:
    """Where directories are made. /tmp may lack direct I/O."""
    return pathlib.Path(os.environ.get('TMPDIR', '/var/tmp'))


def detach_loops(directory: pathlib.Path) -> None:
    """Detach the loop devices of the files in a directory.

    :param directory: with everything below it.
    """
    listed = subprocess.run(
        ['losetup', '--list', '--noheadings', '--raw',
         '--output', 'NAME,BACK-FILE'],
        check=True, capture_output=True, text=True)
    for line in listed.stdout.splitlines():
        device, _space, backing = line.partition(' ')
        if backing.startswith(f'{directory}/'):
            subprocess.run(['losetup', '--detach', device], check=False)


def _sweep() -> None:
    """Remove what killed test processes left."""
    for directory in _scratch().glob(f'{PREFIX}*/'):
        try:
            with open(directory / 'lock', 'a') as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                detach_loops(directory)
                shutil.rmtree(directory, ignore_errors=True)
        except OSError:
            # Its owner lives.
            continue


class Libvirtd:
    """A private libvirtd, virtlogd and their guests.

    :ivar path: a directory that QEMU and the tests both see, mode 0755.
    :ivar uri: to open a connection with, from outside of the namespaces.
    """

    def __init__(self) -> None:
        # Held only while a directory exists whose lock nobody holds yet.
        with open(_scratch() / f'{PREFIX}lock', 'a') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _sweep()
            self.path = pathlib.Path(
                tempfile.mkdtemp(prefix=PREFIX, dir=_scratch()))
            # Open for as long as this process lives.
            self._lock = open(self.path / 'lock', 'a')
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path.chmod(0o755)
        self.socket = self.path / 'run' / 'libvirt-sock'
        self.uri = f'qemu+unix:///system?socket={self.socket}'
        self._process = subprocess.Popen(
            ['unshare', '--mount', '--net', '--pid', '--fork',
             '--kill-child', '--mount-proc', '--propagation', 'private',
             sys.executable,
             str(pathlib.Path(__file__).with_name('supervisor.py')),
             str(self.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            # An interrupt from the keyboard is for the tests, which stop us.
            start_new_session=True)
        self._answer()
        self._running = True

    def _answer(self) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline() != 'done\n':
            log = self.path / 'libvirtd.log'
            raise RuntimeError(
                'the private libvirtd did not obey: '
                f'{log.read_text() if log.exists() else "no log"}')

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f'{word}\n')
        self._process.stdin.flush()
        self._answer()

    def inside(self, *command: str | pathlib.Path) -> list[str]:
        """A command, made one that runs in the guests' mount namespace."""
        process = self._process.pid
        child = pathlib.Path(
            f'/proc/{process}/task/{process}/children').read_text().split()
        return ['nsenter', '--target', child[0], '--mount',
                *(str(word) for word in command)]

    def kill(self) -> None:
        """Kill libvirtd (SIGKILL). The guests run on."""
        self._tell('kill')
        self._running = False

    def start(self) -> None:
        """Start libvirtd again after a kill(); nothing if it runs."""
        if not self._running:
            self._tell('start')
            self._running = True

    def configure(self, lines: str = '') -> None:
        """Start libvirtd anew with more lines in its qemu.conf.

        :param lines: in place of those of an earlier call.
        """
        path = self.path / 'etc' / 'qemu.conf'
        common = path.read_text().partition(_MORE)[0]
        path.write_text(f'{common}{_MORE}{lines}\n')
        self.kill()
        self.start()

    def connect(self) -> libvirt.virConnect:
        """Open a connection that receives events.

        :returns: a new connection; the caller closes it.
        """
        run_event_loop()
        return libvirt.open(self.uri)

    def remove_domains(self, uuid: str | None = None) -> None:
        """Destroy and undefine domains, with all that libvirt keeps of them.

        :param uuid: of the one to remove; all of them without.
        """
        # A test may have killed the daemon, and its connections with it.
        self.start()
        connection = self.connect()
        try:
            for domain in connection.listAllDomains():
                if uuid in (None, domain.UUIDString()):
                    _remove_domain(domain)
        finally:
            connection.close()

    def stop(self) -> None:
        """End the daemons and every guest, and remove their files."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        detach_loops(self.path)
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def run_event_loop() -> None:
    """Run libvirt's default event loop in a thread, once a process.

    It has to be there before a connection is opened.
    """
    global _event_loop
    if _event_loop is not None:
        return
    libvirt.virEventRegisterDefaultImpl()
    # Errors come as exceptions; nobody needs them on stderr as well.
    libvirt.registerErrorHandler(lambda _context, _error: None, None)

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    _event_loop = threading.Thread(target=run, name='libvirt-events',
                                   daemon=True)
    _event_loop.start()


def shared() -> Libvirtd:
    """The libvirtd of this process, started at the first call."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Libvirtd()
            atexit.register(_shared.stop)
        return _shared


class LibvirtFixture(fixtures.Fixture):
    """A connection to the private libvirtd, and no domain left after it.

    :ivar libvirtd: what is connected to.
    :ivar connection: a libvirt.virConnect.
    """

    libvirtd: Libvirtd
    connection: libvirt.virConnect

    def _setUp(self) -> None:
        self.libvirtd = shared()
        self._connect()
        self.addCleanup(self.libvirtd.remove_domains)
        log = self.libvirtd.path / 'libvirtd.log'
        start = log.stat().st_size

        def read() -> ty.Iterator[bytes]:
            yield log.read_bytes()[start:]

        self.addDetail('libvirtd.log',
                       content.Content(content_type.UTF8_TEXT, read))

    def _connect(self) -> None:
        self.connection = self.libvirtd.connect()
        self.addCleanup(self.connection.close)

    def configure(self, lines: str) -> None:
        """Have more lines in libvirt's qemu.conf for as long as this lasts.

        :param lines: of it.
        """
        self.libvirtd.configure(lines)
        self.addCleanup(self.libvirtd.configure)
        self._connect()


def _remove_domain(domain: libvirt.virDomain) -> None:
    flags = libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    flags |= libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    flags |= libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    flags |= libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
    try:
        if domain.isActive():
            domain.destroy()
    except libvirt.libvirtError as e:
        # It ended by itself in between, or is gone.
        if e.get_error_code() not in (libvirt.VIR_ERR_OPERATION_INVALID,
                                      libvirt.VIR_ERR_NO_DOMAIN):
            raise
    try:
        domain.undefineFlags(flags)
    except libvirt.libvirtError as e:
        if e.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
