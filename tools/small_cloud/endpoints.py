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

"""Where the services answer. All of them on the loopback interface."""

HOST = '127.0.0.1'
REGION = 'RegionOne'
COMPUTE_HOST = 'small-cloud'
SECOND_HOST = 'small-cloud-2'
# How the hosts know each other, on the loopback interface both.
ADDRESSES = {COMPUTE_HOST: HOST, SECOND_HOST: '127.0.0.2'}
# Where guests that move are taken in: libvirt refuses to name 127.0.0.1.
MIGRATION = ADDRESSES[SECOND_HOST]

KEYSTONE = 5000
NOVA = 8774
PLACEMENT = 8778
GLANCE = 9292
NEUTRON = 9696
RABBIT = 5672
RABBIT_DISTRIBUTION = 25672
EPMD = 4369
SSH = {COMPUTE_HOST: 10022, SECOND_HOST: 10023}

AUTH_URL = f'http://{HOST}:{KEYSTONE}/v3'
URLS = {
    'identity': AUTH_URL,
    'image': f'http://{HOST}:{GLANCE}',
    'placement': f'http://{HOST}:{PLACEMENT}',
    'network': f'http://{HOST}:{NEUTRON}',
    'compute': f'http://{HOST}:{NOVA}/v2.1',
}
