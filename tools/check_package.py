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

"""Whether what would be uploaded to PyPI is whole, and works where it lands.

``tox -e package`` runs it. A source distribution and a wheel are built, as a
release is; what is in them, their metadata and their version are compared with
the repository; the wheel is installed into an empty environment.
"""

import email.parser
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAME = 'nova_snapshot_ext'

#: made by pbr and setuptools, and by reno, beside what is in the repository
GENERATED = {'AUTHORS', 'ChangeLog', 'PKG-INFO', 'RELEASENOTES.rst',
             'releasenotes/notes/reno.cache', 'setup.cfg'}

#: that pbr leaves out
LEFT_OUT = {'.gitignore'}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix='check-package-') as directory:
        check(pathlib.Path(directory))


def check(work: pathlib.Path) -> None:
    in_git = subprocess.run(
        ['git', '-C', ROOT, 'rev-parse', '--git-dir'],
        capture_output=True).returncode == 0
    if not in_git and 'PBR_VERSION' not in os.environ:
        sys.exit('There is neither git nor PBR_VERSION to tell a version.')
    dist = work / 'dist'
    # Not isolated: reno is to be there, whose notes go into the sdist.
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', dist,
        ROOT)
    [sdist] = dist.glob('*.tar.gz')
    [wheel] = dist.glob('*.whl')
    run(sys.executable, '-m', 'twine', 'check', '--strict', sdist, wheel)
    version = version_of(wheel)
    say(f'{wheel.name}: version {version}')
    with tarfile.open(sdist) as archive:
        # Python 3.11.2, that of Debian 12, has no filters yet.
        archive.extraction_filter = getattr(
            tarfile, 'data_filter', lambda member, path: member)
        archive.extractall(work)
    source = work / sdist.name.removesuffix('.tar.gz')
    if in_git:
        compare(source)
        try_versions(work)
    else:
        say('not in git: the files and versions of tags are not compared')
    # Where there is no git, as in what PyPI gives.
    expect(version, told_version(source), 'the version of the sdist')
    install(work, wheel, version)
    say('well')


def compare(source: pathlib.Path) -> None:
    """The sdist has what git has, and what is generated.

    check-manifest would build one of a copy without git, of which pbr can't
    tell the version.
    """
    known = set(output('git', '-C', ROOT, 'ls-files').splitlines())
    known -= LEFT_OUT
    found = {str(path.relative_to(source)) for path in source.rglob('*')
             if not path.is_dir()}
    found = {path for path in found if not path.startswith(
        f'{NAME}.egg-info/')}
    expect(set(), known - found, 'missing in the sdist')
    expect(GENERATED | known, found | GENERATED, 'what is in the sdist')
    for path in sorted(GENERATED):
        if not (source / path).stat().st_size:
            sys.exit(f'{path} of the sdist is empty')


def try_versions(work: pathlib.Path) -> None:
    """pbr tells a version of a clone with tags, and of one without."""
    clone = work / 'clone'
    run('git', 'clone', '--quiet', '--no-tags', ROOT, clone)
    without = told_version(clone)
    if '.dev' not in without:
        sys.exit(f'A clone without tags has the version {without}')
    tag = (*git(clone), 'tag', '-a', '-m', 'a release')
    run(*tag, '7.8.9')
    expect('7.8.9', told_version(clone), 'the version of a tag')
    run(*git(clone), 'commit', '--quiet', '--allow-empty', '-m', 'more')
    expect('7.8.10.dev1', told_version(clone), 'the version after a tag')


def git(clone: pathlib.Path) -> tuple[str | pathlib.Path, ...]:
    return ('git', '-C', clone, '-c', 'user.name=check',
            '-c', 'user.email=check@localhost')


def install(work: pathlib.Path, wheel: pathlib.Path, version: str) -> None:
    """The wheel brings what its commands take, but for Nova."""
    made = work / 'venv'
    venv.create(made)
    pip = (sys.executable, '-m', 'pip', '--python', made / 'bin' / 'python')
    constraints = os.environ.get(
        'TOX_CONSTRAINTS_FILE',
        ROOT / 'tools' / 'small_cloud' / 'constraints.txt')
    run(*pip, 'install', '--quiet', '-c', constraints, wheel)
    run(*pip, 'check')
    # Elsewhere: the checkout could be imported from.
    expect(f'nova-snapshot {version}',
           output(made / 'bin' / 'nova-snapshot', '--version', cwd=work),
           'nova-snapshot --version')
    run(made / 'bin' / 'nova-snapshot', '--help', cwd=work)
    run(made / 'bin' / 'nova-snapshot-ext-status', '--help', cwd=work)


def version_of(wheel: pathlib.Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        [path] = (name for name in archive.namelist()
                  if name.endswith('.dist-info/METADATA'))
        return str(email.parser.Parser().parsestr(
            archive.read(path).decode())['Version'])


def told_version(source: pathlib.Path) -> str:
    """What pbr says of a tree."""
    return output(sys.executable, 'setup.py', '--version',
                  cwd=source).splitlines()[-1]


def run(*command: str | pathlib.Path,
        cwd: pathlib.Path | None = None) -> None:
    output(*command, cwd=cwd)


def output(*command: str | pathlib.Path,
           cwd: pathlib.Path | None = None) -> str:
    """What a command says; it must not fail."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f'{" ".join(map(str, command))} ended with '
                 f'{done.returncode}:\n{done.stdout}{done.stderr}')
    return done.stdout.strip()


def expect(wanted: object, found: object, what: str) -> None:
    if wanted != found:
        if isinstance(wanted, set) and isinstance(found, set):
            wanted, found = wanted - found, found - wanted
        sys.exit(f'{what}: {found}, and not {wanted}')


def say(words: str) -> None:
    print(words, flush=True)


if __name__ == '__main__':
    main()
