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

"""Boot a server and wait until its guest writes.

Run with the cloud's own Python and OS_* variables.
"""

import argparse
import re
import sys
import time

import openstack


def counter(console: str) -> int | None:
    """The last number that the guest's writer has printed."""
    found = re.findall(r'counter (\d+)\r?\n', console)
    return int(found[-1]) if found else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('name')
    parser.add_argument('--flavor', required=True)
    parser.add_argument('--image', required=True)
    parser.add_argument('--nic', required=True)
    parser.add_argument('--wait-writes', action='store_true')
    parser.add_argument('--timeout', type=float, default=180)
    args = parser.parse_args()

    cloud = openstack.connect()
    compute = cloud.compute
    # 2.37 is the first that can ask for no network at all.
    compute.default_microversion = '2.79'
    begun = time.monotonic()
    image = cloud.image.find_image(args.image, ignore_missing=False)
    flavor = compute.find_flavor(args.flavor, ignore_missing=False)
    networks = (
        args.nic
        if args.nic in ('none', 'auto')
        else [
            {
                'uuid': cloud.network.find_network(
                    args.nic, ignore_missing=False
                ).id
            }
        ]
    )
    server = compute.create_server(
        name=args.name,
        image_id=image.id,
        flavor_id=flavor.id,
        networks=networks,
    )
    try:
        server = compute.wait_for_server(
            server, interval=0.5, wait=args.timeout
        )
    except openstack.exceptions.ResourceFailure as error:
        fault = compute.get_server(server.id).fault or {}
        sys.exit(f'{error}: {fault.get("message")}')
    except openstack.exceptions.SDKException as error:
        sys.exit(f'{args.name}: {error}')
    print(
        f'{args.name} {server.id} is ACTIVE '
        f'after {time.monotonic() - begun:.1f} s'
    )
    if not args.wait_writes:
        return

    first = None
    while True:
        console = compute.get_server_console_output(server.id)['output'] or ''
        now = counter(console)
        if first is None:
            first = now
        elif now is not None and now > first:
            print(
                f'{args.name} writes (counter {now}) '
                f'after {time.monotonic() - begun:.1f} s'
            )
            return
        if time.monotonic() - begun > args.timeout:
            sys.exit(
                f'{args.name} does not write; the end of its console:\n'
                f'{console[-2000:]}'
            )
        time.sleep(0.5)


if __name__ == '__main__':
    main()
