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

"""A server with domain snapshots, as Nova's side of them sees it."""

import typing

from nova.compute import task_states
from nova.compute import vm_states
from nova import objects

from nova_snapshot_ext import domain_records
from nova_snapshot_ext import rebuilding
from tests.unit import fakes

objects.register_all()

IMAGES = tuple(f'1a6e0000-0000-4000-8000-00000000000{number}'
               for number in range(4))
BASE = 'ba5e0000-0000-4000-8000-000000000000'


def new_server(**fields: typing.Any) -> objects.Instance:
    """A server that was booted from BASE."""
    return objects.Instance(**{
        'uuid': fakes.UUID, 'id': 1, 'host': 'compute-1', 'project_id': 'p',
        'task_state': None, 'vm_state': vm_states.ACTIVE,
        'image_ref': BASE, 'kernel_id': '', 'ramdisk_id': '',
        'os_type': None, 'architecture': None, 'vm_mode': None,
        'auto_disk_config': False,
        'system_metadata': {
            'image_base_image_ref': BASE, 'image_min_disk': '1',
            'image_hw_disk_bus': 'virtio', 'owner': 'somebody'},
        'flavor': objects.Flavor(
            flavorid='tiny', vcpus=1, memory_mb=256, root_gb=1,
            ephemeral_gb=0, swap=0, extra_specs={}),
        **fields})


def rebuild_by_api(server: objects.Instance, image: str) -> None:
    """What nova-api does to a server before the driver sees it."""
    server.image_ref = image
    server.os_type = 'linux'
    server.task_state = task_states.REBUILDING
    for name in list(server.system_metadata):
        if name.startswith('image_'):
            del server.system_metadata[name]
    server.system_metadata.update({
        'image_base_image_ref': image, 'image_min_disk': '2',
        'image_snapshot_ext_flow': 'domain'})


def new_record(server: objects.Instance, number: int = 0,
               **changes: typing.Any) -> domain_records.Record:
    """A snapshot of a server as it is now."""
    return domain_records.Record(**{
        'name': f'snapshot-ext-{number:032x}', 'uuid': server.uuid,
        'image_id': IMAGES[number], 'title': f'title {number}',
        'parent': None, 'rollback': domain_records.Rollback.MEMORY,
        'taken_at': f'2026-11-27T10:00:0{number}+00:00',
        'disks': {'vda': '/instances/disk'}, 'capacities': {'vda': 1024},
        'domain_xml': '<domainsnapshot/>',
        'extra': {**rebuilding.remembered(server), 'image_shown': True},
        **changes})
