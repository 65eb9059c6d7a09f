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

"""nova-cpu.conf: what nova-compute alone reads, and which driver it loads."""

from collections.abc import Iterable
import json

from small_cloud import errors
from small_cloud import ini
from small_cloud import state as cloud_state

# Ours is found through oslo.config's own plug point. compute_driver must not
# be set beside it: a value in a file would win over the one that the source
# gives.
DRIVERS: dict[str, ini.Sections] = {
    'ours': {
        'DEFAULT': {'config_source': 'snapshot_ext'},
        'snapshot_ext': {'driver': 'snapshot_ext'},
    },
    'nova': {'DEFAULT': {'compute_driver': 'libvirt.LibvirtDriver'}},
}
DEFAULT_DRIVER = 'ours'


def _base(state: cloud_state.State) -> ini.Sections:
    return {
        'DEFAULT': {
            'instances_path': state.instances,
            'initial_cpu_allocation_ratio': 16,
            # It takes this long to end even if it has nothing to do. Nova's
            # own 160 s are for the work of a real host.
            'manager_shutdown_timeout': 5,
            'graceful_shutdown_timeout': 15,
            # Without an agent nobody will ever say that a port is plugged.
            'vif_plugging_is_fatal': 'false',
            'vif_plugging_timeout': 0,
        },
        'libvirt': {
            'virt_type': 'qemu',
            # Emulated: the host's model would only cost what TCG can't do.
            'cpu_mode': 'none',
            'live_migration_scheme': 'ssh',
        },
        'vnc': {'enabled': 'false'},
    }


def _choices(state: cloud_state.State) -> dict[str, object]:
    path = state.etc / 'compute-choices.json'
    return json.loads(path.read_text()) if path.exists() else {}


def _choose(state: cloud_state.State, **new: object) -> None:
    state.write(
        state.etc / 'compute-choices.json',
        json.dumps({**_choices(state), **new}, indent=1) + '\n',
        mode=0o600,
    )


def driver(state: cloud_state.State) -> str:
    return str(_choices(state).get('driver', DEFAULT_DRIVER))


def choose_driver(state: cloud_state.State, name: str | None) -> None:
    """Take this driver from now on; None leaves it as it is."""
    if name is not None:
        _choose(state, driver=name)


def overrides(state: cloud_state.State) -> dict[str, dict[str, object]]:
    return _choices(state).get('overrides', {})  # type: ignore[return-value]


def backend(state: cloud_state.State) -> str | None:
    """Which concurrency backend is asked for."""
    asked = overrides(state).get('DEFAULT', {}).get('concurrency_backend')
    return None if asked is None else str(asked)


def _split(name: str) -> tuple[str, str]:
    section, dot, option = name.partition('.')
    if not (section and dot and option):
        raise errors.CloudError(f'not of the form section.option: {name}')
    return section, option


def change_overrides(
    state: cloud_state.State,
    *,
    settings: Iterable[str],
    removals: Iterable[str],
    reset: bool,
) -> None:
    """Merge extra options into those that were given before.

    :param settings: `section.option=value`; given several times for one
        option, it gets several values.
    :param removals: `section.option`
    :param reset: forget what was given before
    """
    changed = {} if reset else overrides(state)
    new: dict[tuple[str, str], list[str]] = {}
    for setting in settings:
        name, equals, value = setting.partition('=')
        if not equals:
            raise errors.CloudError(
                f'not of the form section.option=value: {setting}'
            )
        new.setdefault(_split(name.strip()), []).append(value.strip())
    for (section, option), values in new.items():
        changed.setdefault(section, {})[option] = (
            values if values[1:] else values[0]
        )
    for section, option in map(_split, removals):
        changed.get(section, {}).pop(option, None)
    _choose(state, overrides=changed)


def write(
    state: cloud_state.State,
    name: str = 'nova-cpu.conf',
    own: ini.Sections | None = None,
) -> bool:
    """Write nova-cpu.conf, or another host's.

    :param own: what that host alone has.
    :returns: True if it changed.
    """
    text = ini.render(
        ini.merge(
            _base(state), DRIVERS[driver(state)], overrides(state), own or {}
        ),
        'Written by tools/cloud; change it by `tools/cloud configure`.',
    )
    return state.write(
        state.etc / 'nova' / name, text, mode=0o640, group='nova'
    )
