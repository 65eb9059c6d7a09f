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

import importlib
import typing
from unittest import mock

from nova import exception

from tests.unit import base


def load(module: str) -> typing.Any:
    # Nova 32's API has eventlet patch the process that imports it.
    with mock.patch('nova.monkey_patch.patch', lambda: None):
        return importlib.import_module(module)


class TestExtraSpecs(base.TestCase):

    def test_flow_of_a_flavor_is_a_name(self) -> None:
        spec = load('nova_snapshot_ext.extra_specs').register()[0]
        for value in ('cold', 'live', 'my-flow_2'):
            spec.validate('snapshot_ext:flow', value)
        for value in ('', 'Cold', '1', 'a b', 'a;b'):
            self.assertRaises(exception.ValidationError, spec.validate,
                              'snapshot_ext:flow', value)

    def test_nova_finds_it(self) -> None:
        validators = load('nova.api.validation.extra_specs.validators')
        validators.validate('snapshot_ext:flow', 'cold')
        for name, value in (('snapshot_ext:flow', 'Not a flow'),
                            ('snapshot_ext:flaw', 'cold')):
            self.assertRaises(
                exception.ValidationError, validators.validate, name, value)
