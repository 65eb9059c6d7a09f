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

"""Which release of Nova the cloud has, and what differs from one to another:
what is beside it in its time, and how it is told its concurrency backend."""

import pathlib

from small_cloud import errors
from small_cloud import state as cloud_state

DEFAULT = 34
_HERE = pathlib.Path(__file__).resolve().parent
_CONSTRAINTS = {
    DEFAULT: _HERE / 'constraints.txt',
    **{
        int(path.stem.removeprefix('constraints-nova')): path
        for path in _HERE.glob('constraints-nova*.txt')
    },
}


def every() -> list[int]:
    return sorted(_CONSTRAINTS)


def constraints(state: cloud_state.State) -> pathlib.Path:
    """The versions of all that the cloud is made of."""
    return _CONSTRAINTS[of(state)]


def of(state: cloud_state.State) -> int:
    chosen = _choice(state)
    return int(chosen.read_text()) if chosen.exists() else DEFAULT


def compute_environment(
    state: cloud_state.State, backend: str | None
) -> dict[str, str]:
    """What tells nova-compute its concurrency backend, beside its files.

    :param backend: as [DEFAULT] concurrency_backend has it, if it is set
    """
    # That option is from 34 on. Before, the environment alone says so, and
    # eventlet is the default.
    if backend is None or of(state) >= 34:
        return {}
    threads = '1' if backend == 'threading' else '0'
    return {'OS_NOVA_DISABLE_EVENTLET_PATCHING': threads}


def choose(state: cloud_state.State, release: int | None) -> None:
    """Make a new cloud of this release; None leaves it as it is.

    Databases are not taken from one to another.
    """
    if release is None or release == of(state):
        return
    if state.is_made():
        raise errors.CloudError(
            f'{state.root} has Nova {of(state)}: name another directory by '
            f'SMALL_CLOUD_DIR, or delete this one by `down --purge`'
        )
    state.write(_choice(state), f'{release}\n')


def _choice(state: cloud_state.State) -> pathlib.Path:
    return state.etc / 'release'
