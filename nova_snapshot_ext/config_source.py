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

"""How Nova finds the driver: an oslo.config driver named by nova.conf.

``config_source = snapshot_ext`` in ``[DEFAULT]`` and ``driver = snapshot_ext``
in ``[snapshot_ext]`` make oslo.config open the entry point
``oslo.config.driver: snapshot_ext`` when it parses, which makes
``nova.virt.snapshot_ext`` importable and answers for ``compute_driver``.
A value in a configuration file wins over this one.

Nova parses its configuration once before it decides on its concurrency
backend. Whatever is imported here is imported in front of that decision, so
this module imports the standard library and oslo.config only.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import typing

from oslo_config import cfg
from oslo_config import sources

MODULE = 'nova.virt.snapshot_ext'
DRIVER_CLASS = 'SnapshotLibvirtDriver'
COMPUTE_DRIVER = f'snapshot_ext.{DRIVER_CLASS}'


class _DriverModule(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes the one module name importable that Nova will ask for.

    ``nova.virt.driver.load_compute_driver`` looks below ``nova.virt`` alone.
    A file there would break an editable Nova; a name costs nothing.
    """

    def find_spec(
            self, fullname: str, path: object, target: object = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != MODULE:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        driver = importlib.import_module('nova_snapshot_ext.driver')
        setattr(module, DRIVER_CLASS, getattr(driver, DRIVER_CLASS))


class SnapshotExtSource(sources.ConfigurationSource):
    """Answers ``[DEFAULT] compute_driver``, and nothing else."""

    def get(self, group_name: str | None, option_name: str,
            opt: typing.Any) -> tuple[typing.Any, cfg.LocationInfo | None]:
        if (group_name or 'DEFAULT', option_name) == (
                'DEFAULT', 'compute_driver'):
            return COMPUTE_DRIVER, cfg.LocationInfo(
                cfg.Locations.user, 'config_source snapshot_ext')
        return sources._NoValue, None


class SnapshotExtSourceDriver(sources.ConfigurationSourceDriver):
    """Makes the driver importable and set, by configuration alone.

    The only setting that it needs is ``driver = snapshot_ext`` in the group
    that ``config_source`` names.
    """

    def list_options_for_discovery(self) -> list[typing.Any]:
        return []

    def open_source_from_opt_group(
            self, conf: cfg.ConfigOpts,
            group_name: str) -> SnapshotExtSource:
        if not any(isinstance(finder, _DriverModule)
                   for finder in sys.meta_path):
            sys.meta_path.append(_DriverModule())
        return SnapshotExtSource()
