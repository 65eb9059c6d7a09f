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

"""Nova's configuration for a test: no file, our options, nothing set."""

import collections.abc

import nova.conf
from oslo_config import fixture as config_fixture

from nova_snapshot_ext import conf
from tests.unit import base


def use(test: base.TestCase) -> collections.abc.Callable[..., None]:
    """:returns: what sets options, as long as the test lasts"""
    conf.register_opts(nova.conf.CONF)
    config: collections.abc.Callable[..., None] = test.useFixture(
        config_fixture.Config(nova.conf.CONF)).config
    nova.conf.CONF([], project='nova', default_config_files=[],
                   default_config_dirs=[])
    return config
