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

"""Neutron's API as uWSGI loads it, for a cloud without agents and plugins."""

from sqlalchemy import orm

# A plugin that nobody loads here would define this model and its relations;
# without them every port query fails: Port has no attribute
# 'port_forwardings'.
from neutron.db.models import port_forwarding  # noqa: F401
from neutron.wsgi.api import application  # noqa: F401

# The first queries of ports name relations that exist only from here on, once
# the models that the application has loaded are known, too.
orm.configure_mappers()
