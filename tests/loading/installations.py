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
"""Virtual environments in which Nova is installed one way or the other.

Nova's dependencies are installed once: in the environment that runs the
tests. Each environment made here sees them through a folder of links in which
Nova itself and this package are left out, and gets those two of its own.
"""

import atexit
import collections.abc
import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = pathlib.Path(__file__).resolve().parent / 'scripts'

_OURS = 'nova_snapshot_ext'
_TIMEOUT_S = 600


def run(command: collections.abc.Sequence[str | os.PathLike[str]],
        **options: object) -> 'subprocess.CompletedProcess[str]':
    """Run a command.

    :raises AssertionError: with its output, if it fails
    """
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=_TIMEOUT_S, **options)
    if done.returncode:
        raise AssertionError(
            f'{command} ended with {done.returncode}\n'
            f'{done.stdout}\n{done.stderr}')
    return done


def _pip(*arguments: str | os.PathLike[str]) -> None:
    run([sys.executable, '-m', 'pip', '--quiet', *arguments])


@functools.cache
def _workshop() -> pathlib.Path:
    """A folder for all that is built, gone when the process ends."""
    # unittest's module cleanups would be too early: other modules of the
    # process use it too.
    folder = tempfile.TemporaryDirectory(prefix='loading-')
    atexit.register(folder.cleanup)
    return pathlib.Path(folder.name)


@functools.cache
def our_wheel() -> pathlib.Path:
    """A wheel of this checkout, as it would be built from a clean one."""
    # setuptools builds in the tree: two test processes would meet there, and
    # an old build/ would end up in the wheel.
    source = _workshop() / 'checkout'
    shutil.copytree(ROOT, source, symlinks=True, ignore=(
        shutil.ignore_patterns(
            '.eggs', '.mypy_cache', '.stestr', '.tox', '.venv', '*.egg-info',
            '__pycache__', 'build', 'dist')))
    folder = _workshop() / 'wheel'
    _pip('wheel', '--no-deps', '--wheel-dir', folder, source)
    wheel, = folder.glob('*.whl')
    return wheel


@functools.cache
def _nova_source() -> pathlib.Path:
    """Nova's source distribution, unpacked."""
    folder = _workshop() / 'source'
    _pip('download', '--no-deps', '--no-binary', 'nova', '--dest', folder,
         _nova_requirement())
    archive, = folder.glob('nova-*.tar.gz')
    shutil.unpack_archive(archive, folder)
    source, = (path for path in folder.iterdir() if path.is_dir())
    return source


def _nova_requirement() -> str:
    return f'nova=={importlib.metadata.version("nova")}'


@functools.cache
def _dependencies() -> pathlib.Path:
    """This environment's packages, without Nova and without ours."""
    folder = _workshop() / 'dependencies'
    folder.mkdir()
    for kind in {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}:
        for path in pathlib.Path(kind).iterdir():
            name = path.name.partition('-')[0]
            if (name in ('nova', _OURS) or path.suffix == '.pth'
                    or name.startswith('__editable__')):
                continue
            (folder / path.name).symlink_to(path)
    return folder


@dataclasses.dataclass(frozen=True)
class Installation:
    """One virtual environment."""

    folder: pathlib.Path

    @property
    def python(self) -> str:
        return str(self.folder / 'bin' / 'python')

    @classmethod
    def make(cls, name: str) -> 'Installation':
        """One with Nova's dependencies, and without Nova."""
        made = cls(_workshop() / name)
        # Debian's interpreter finds its libraries by its real path.
        venv.create(made.folder, symlinks=True, with_pip=False)
        packages = pathlib.Path(run([
            made.python, '-I', '-c',
            'import sysconfig; print(sysconfig.get_path("purelib"))',
        ]).stdout.strip())
        (packages / 'dependencies.pth').write_text(f'{_dependencies()}\n')
        return made

    def install(self, *what: str | os.PathLike[str]) -> None:
        _pip('--python', self.python, 'install', '--no-deps', *what)

    def script(
            self, name: str, *arguments: str,
            environment: collections.abc.Mapping[str, str] | None = None,
    ) -> 'subprocess.CompletedProcess[str]':
        """Run a file of ``scripts``: isolated, so that neither the checkout
        nor the tests' environment can be imported from."""
        return run(
            [self.python, '-I', SCRIPTS / name, *arguments],
            cwd=self.folder, env={
                key: value for key, value in os.environ.items()
                if not key.startswith(('OS_NOVA_', 'PYTHON'))
            } | dict(environment or {}))


@functools.cache
def nova_as_wheel() -> Installation:
    made = Installation.make('nova-as-wheel')
    made.install(_nova_requirement(), our_wheel())
    return made


@functools.cache
def nova_as_editable() -> Installation:
    """As devstack installs it."""
    made = Installation.make('nova-as-editable')
    made.install('--editable', _nova_source())
    made.install(our_wheel())
    return made


@functools.cache
def nova_without_us() -> Installation:
    made = Installation.make('nova-without-us')
    made.install(_nova_requirement())
    return made
