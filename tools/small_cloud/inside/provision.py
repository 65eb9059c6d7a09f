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

"""What the cloud holds: users, endpoints, flavors, the guest image.

Run with the cloud's own Python and OS_* variables; every step can run again.
Its orders come as JSON on standard input: they hold a password.
"""

import datetime
import json
import math
import sys
import time
from typing import Any

import openstack

FLAVORS = (
    # name, vcpus, RAM in MiB, disk in GiB
    ('tiny', 1, 256, 1),
    ('small', 1, 256, 2),
    ('medium', 1, 256, 5),
)
SERVICES = (
    # type, name, user
    ('image', 'glance', 'glance'),
    ('placement', 'placement', 'placement'),
    ('network', 'neutron', 'neutron'),
    ('compute', 'nova', 'nova'),
)


def identity(
    cloud: openstack.connection.Connection, orders: dict[str, Any]
) -> None:
    """Users of the services, and the catalog."""
    keystone = cloud.identity
    project = keystone.find_project('service') or keystone.create_project(
        name='service', domain_id='default'
    )
    roles = [
        keystone.find_role(name) or keystone.create_role(name=name)
        for name in ('admin', 'service')
    ]
    for type_, name, user_name in SERVICES:
        user = keystone.find_user(user_name) or keystone.create_user(
            name=user_name,
            domain_id='default',
            default_project_id=project.id,
            password=orders['service_password'],
        )
        for role in roles:
            keystone.assign_project_role_to_user(project, user, role)
        service = keystone.find_service(name) or keystone.create_service(
            type=type_, name=name
        )
        known = {
            e.interface for e in keystone.endpoints(service_id=service.id)
        }
        for interface in {'public', 'internal'} - known:
            keystone.create_endpoint(
                service_id=service.id,
                interface=interface,
                region_id=orders['region'],
                url=orders['urls'][type_],
            )


def flavors(
    cloud: openstack.connection.Connection, orders: dict[str, Any]
) -> None:
    for name, vcpus, ram, disk in FLAVORS:
        if cloud.compute.find_flavor(name) is None:
            cloud.compute.create_flavor(
                name=name, vcpus=vcpus, ram=ram, disk=disk
            )


def image(
    cloud: openstack.connection.Connection, orders: dict[str, Any]
) -> None:
    """The guest, with a channel for its agent, in place of earlier ones."""
    earlier = list(cloud.image.images(name=orders['name']))
    cloud.create_image(
        orders['name'],
        filename=orders['path'],
        disk_format='raw',
        container_format='bare',
        visibility='public',
        wait=True,
        use_import=False,
        meta={'hw_qemu_guest_agent': 'yes'},
    )
    for old in earlier:
        cloud.image.delete_image(old)


def wait_services(
    cloud: openstack.connection.Connection, orders: dict[str, Any]
) -> None:
    """Wait until each of Nova's services has reported after it was started."""
    end = time.monotonic() + orders['timeout_s']
    while True:
        reported = {}
        for service in cloud.compute.services():
            at = datetime.datetime.fromisoformat(
                service.updated_at or '1970-01-01'
            )
            # Not its state: one that is forced down reports all the same.
            reported[f'{service.binary}@{service.host}'] = at.replace(
                tzinfo=datetime.UTC
            ).timestamp()
        late = [
            name
            for name, since in orders['since'].items()
            # Rounded up: the last report of the one before may fall into
            # the same second.
            if reported.get(name, 0) < math.ceil(since)
        ]
        if not late:
            return
        if time.monotonic() > end:
            sys.exit(f'no report from {", ".join(late)}; see their logs')
        time.sleep(0.3)


def forget_host(
    cloud: openstack.connection.Connection, orders: dict[str, Any]
) -> None:
    """Delete the service of a host, and its servers, which have no disks."""
    for server in cloud.compute.servers(
        all_projects=True, host=orders['host']
    ):
        cloud.compute.delete_server(server)
        cloud.compute.wait_for_delete(server)
    for service in cloud.compute.services(host=orders['host']):
        cloud.compute.delete_service(service)


def main() -> None:
    steps = {
        f.__name__: f
        for f in (identity, flavors, image, wait_services, forget_host)
    }
    cloud = openstack.connect()
    for step, orders in json.load(sys.stdin):
        steps[step](cloud, orders)


if __name__ == '__main__':
    main()
