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

"""Binds each port of the cloud to a tap device that leads nowhere.

Nova makes the device and gives it to the guest; no agent is needed. Neutron
finds this by the entry point in the directory beside it.
"""

from typing import Any

from neutron_lib.plugins.ml2 import api


class TapDriver(api.MechanismDriver):
    """Neutron's ML2 mechanism driver ``tap``."""

    def initialize(self) -> None:
        pass

    def bind_port(self, context: Any) -> None:
        for segment in context.segments_to_bind:
            context.set_binding(
                segment[api.ID], 'tap', {'port_filter': False}, 'ACTIVE'
            )
            return
