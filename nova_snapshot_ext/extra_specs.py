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

"""What flavors may say to us, for Nova's API to check.

Loaded by nova-api through ``nova.api.extra_spec_validators`` (Nova, API
validation, extra specs); the package must be installed there too.
"""

from nova.api.validation.extra_specs import base

EXTRA_SPEC_VALIDATORS = [
    base.ExtraSpecValidator(
        name='snapshot_ext:flow',
        description=(
            'The flow that takes snapshots of instances of this flavor, '
            'such as ``cold`` or ``live``. Which are installed is known to '
            'the compute hosts.'),
        value={'type': str, 'pattern': r'[a-z][a-z0-9_-]*'},
    ),
]


def register() -> list[base.ExtraSpecValidator]:
    return EXTRA_SPEC_VALIDATORS
