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

"""Where everything of one cloud lies: the state directory and its parts."""

from collections.abc import Iterator
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shutil

from small_cloud import errors

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
INSIDE = pathlib.Path(__file__).resolve().parent / 'inside'
DEFAULT_ROOT = '/var/lib/small-cloud'


@dataclasses.dataclass(frozen=True)
class State:
    """The state directory of one cloud."""

    root: pathlib.Path

    @classmethod
    def from_environment(cls) -> 'State':
        return cls(
            pathlib.Path(
                os.path.abspath(
                    os.environ.get('SMALL_CLOUD_DIR', DEFAULT_ROOT)
                )
            )
        )

    @property
    def etc(self) -> pathlib.Path:
        return self.root / 'etc'

    @property
    def log(self) -> pathlib.Path:
        return self.root / 'log'

    @property
    def run(self) -> pathlib.Path:
        return self.root / 'run'

    @property
    def venv(self) -> pathlib.Path:
        return self.root / 'venv'

    @property
    def bin(self) -> pathlib.Path:
        return self.venv / 'bin'

    @property
    def nova(self) -> pathlib.Path:
        """Home and state path of the user nova."""
        return self.root / 'nova'

    @property
    def instances(self) -> pathlib.Path:
        return self.nova / 'instances'

    @property
    def guest(self) -> pathlib.Path:
        """What tools/guest/build made."""
        return self.root / 'guest'

    @property
    def mysql_socket(self) -> pathlib.Path:
        return self.root / 'mysql-run' / 'mysqld.sock'

    def path_for_commands(self) -> str:
        """The PATH of every service: the virtual environment comes first."""
        return (
            f'{self.bin}:/usr/local/sbin:/usr/local/bin'
            ':/usr/sbin:/usr/bin:/sbin:/bin'
        )

    def create(self) -> None:
        """Make the directories, open for QEMU's own user on the way down."""
        for path in (
            self.root,
            self.etc,
            self.log,
            self.run,
            self.root / 'done',
        ):
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
        closed = [
            str(p)
            for p in (self.root, *self.root.parents)
            if not p.stat().st_mode & 0o001
        ]
        if closed:
            raise errors.CloudError(
                'QEMU runs as a user of its own and could not reach its '
                f'disks; let others pass through: chmod o+x {" ".join(closed)}'
            )

    def owned_directory(
        self, name: str, user: str, mode: int = 0o755
    ) -> pathlib.Path:
        """A directory below the root that belongs to a service's user."""
        path = self.root / name
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        path.chmod(mode)
        shutil.chown(path, user, user)
        return path

    def write(
        self,
        path: pathlib.Path,
        text: str,
        *,
        mode: int = 0o644,
        group: str = 'root',
    ) -> bool:
        """Write a file whole or not at all.

        :returns: True if its content changed.
        """
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        changed = not path.exists() or path.read_text() != text
        temporary = path.with_name(path.name + '.new')
        # Secrets must never be readable, not even between open and chmod.
        handle = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600
        )
        with os.fdopen(handle, 'w') as stream:
            stream.write(text)
        shutil.chown(temporary, 'root', group)
        temporary.chmod(mode)
        temporary.rename(path)
        return changed

    def is_done(self, step: str, version: str = '') -> bool:
        marker = self.root / 'done' / step
        return marker.exists() and marker.read_text() == version

    def is_made(self) -> bool:
        """Whether it holds more than files that are written anew."""
        done = self.root / 'done'
        return done.exists() and any(done.iterdir())

    def mark_done(self, step: str, version: str = '') -> None:
        """Remember that a step which is needed once has been taken."""
        self.write(self.root / 'done' / step, version)

    def forget(self, step: str) -> None:
        (self.root / 'done' / step).unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep two commands from changing the same cloud at once."""
        self.root.mkdir(mode=0o755, parents=True, exist_ok=True)
        with open(self.root / 'lock', 'w') as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise errors.CloudError(
                    f'another command is at work on {self.root}'
                ) from None
            yield
