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
"""Print, one a line, the modules that config_source needs beside oslo.config.

Nova parses its configuration, and so imports that module, before it decides
on its concurrency backend.
"""

import sys

from oslo_config import cfg  # noqa: F401
from oslo_config import sources  # noqa: F401

before = set(sys.modules)
import nova_snapshot_ext.config_source  # noqa: E402,F401

print('\n'.join(sorted(set(sys.modules) - before)))
