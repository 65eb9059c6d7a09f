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
"""Load the compute driver as nova-compute does, and print what came of it.

Its arguments are those of nova-compute. The result is one line of JSON, the
last one on standard output.
"""

# First, as in the program nova-compute: it decides on the concurrency
# backend as it is imported.
import nova.cmd.compute

import json
import sys

from nova import config
from nova import utils
from nova.virt import driver
from nova.virt import virtapi


def main() -> None:
    config.parse_args(sys.argv)
    loaded = type(driver.load_compute_driver(virtapi.VirtAPI()))
    patched = False
    if 'eventlet' in sys.modules:
        patched = sys.modules['eventlet'].patcher.is_monkey_patched('socket')
    print(json.dumps({
        'class': loaded.__name__,
        'module': loaded.__module__,
        'mro': [f'{each.__module__}.{each.__qualname__}'
                for each in loaded.__mro__],
        'compute_driver': nova.cmd.compute.CONF.compute_driver,
        'file': sys.modules[loaded.__module__].__file__,
        'nova': nova.__file__,
        'threading': utils.concurrency_mode_threading(),
        'eventlet_imported': 'eventlet' in sys.modules,
        'eventlet_patched': patched,
    }))


if __name__ == '__main__':
    main()
