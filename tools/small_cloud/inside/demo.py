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

"""The main job: a snapshot by each flow, and a server from each image.

Run with the cloud's own Python and OS_* variables.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import threading
import time
import typing
import uuid

import openstack

WAIT_S = 300.0
COLUMNS = (
    'flow',
    'seconds',
    'guest pause s',
    'consistency',
    'bytes staged',
    'image bytes',
    'image check',
    'server boots',
)


class Staged:
    """How much the staging directory held at most, in bytes."""

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak = 0

    def __enter__(self) -> 'Staged':
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            held = 0
            for path in self._directory.rglob('*'):
                try:
                    held += path.lstat().st_blocks * 512
                except FileNotFoundError:
                    continue
            self.peak = max(self.peak, held)


def counter(cloud: typing.Any, server: typing.Any) -> int:
    """The number that the guest's writer printed last, 0 if none."""
    console = (
        cloud.compute.get_server_console_output(server.id)['output'] or ''
    )
    found = re.findall(r'counter (\d+)\r?\n', console)
    return int(found[-1]) if found else 0


def wait(true: typing.Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        if time.monotonic() > deadline:
            sys.exit(f'waited {WAIT_S:.0f} s for {what}')
        time.sleep(0.2)


def boot(cloud: typing.Any, name: str, image: str, flavor: str) -> typing.Any:
    """Boot a server and wait until its guest writes."""
    server = cloud.compute.create_server(
        name=name,
        networks='none',
        image_id=cloud.image.find_image(image, ignore_missing=False).id,
        flavor_id=cloud.compute.find_flavor(flavor, ignore_missing=False).id,
    )
    server = cloud.compute.wait_for_server(server, interval=0.5, wait=WAIT_S)
    wait(lambda: counter(cloud, server) > 0, f'{name} to write')
    return server


def take(
    cloud: typing.Any,
    server: typing.Any,
    flow: str,
    arguments: argparse.Namespace,
) -> list[str]:
    """One snapshot, as a tenant takes it; a row of the table."""
    name = f'{server.name}-{flow}'
    begun = time.monotonic()
    with Staged(arguments.staging) as staged:
        subprocess.run(
            [
                'openstack',
                'server',
                'image',
                'create',
                '--wait',
                '--name',
                name,
                '--property',
                f'snapshot_flow={flow}',
                server.name,
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.monotonic() - begun
    image = cloud.image.find_image(name, ignore_missing=False)
    before = counter(cloud, server)
    wait(lambda: counter(cloud, server) > before, f'{server.name} to write')
    check = subprocess.run(
        [
            'qemu-img',
            'check',
            '-q',
            '-f',
            image.disk_format,
            str(arguments.images / image.id),
        ]
    )
    second = boot(cloud, f'{name}-boot', image.id, arguments.flavor)
    row = [
        flow,
        f'{seconds:.1f}',
        '{:.2f}'.format(
            int(image.properties['snapshot_ext_guest_pause_ms']) / 1000
        ),
        image.properties['snapshot_ext_consistency'],
        str(staged.peak),
        str(image.size),
        'clean' if check.returncode == 0 else f'failed: {check.returncode}',
        'yes',
    ]
    cloud.compute.delete_server(second)
    cloud.compute.wait_for_delete(second, wait=WAIT_S)
    cloud.image.delete_image(image)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--flavor', required=True)
    parser.add_argument('--image', required=True)
    parser.add_argument('--flows', required=True)
    parser.add_argument('--staging', type=pathlib.Path, required=True)
    parser.add_argument('--images', type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    cloud = openstack.connect()
    cloud.compute.default_microversion = '2.79'
    name = f'demo-{uuid.uuid4().hex[:8]}'
    print(
        f'Booting {name}; its guest writes while snapshots are taken',
        flush=True,
    )
    server = boot(cloud, name, arguments.image, arguments.flavor)
    try:
        rows = [
            take(cloud, server, flow, arguments)
            for flow in arguments.flows.split(',')
        ]
    finally:
        cloud.compute.delete_server(server)
        cloud.compute.wait_for_delete(server, wait=WAIT_S)
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows)]
    for row in (COLUMNS, tuple('-' * width for width in widths), *rows):
        print(
            '  '.join(
                cell.ljust(width) for cell, width in zip(row, widths)
            ).rstrip()
        )
    return 0 if all(row[6] == 'clean' for row in rows) else 1


if __name__ == '__main__':
    sys.exit(main())
