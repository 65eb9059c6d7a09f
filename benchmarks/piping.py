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

"""Reading and laying out into a pipe, against qemu-img convert."""

import json
import pathlib
import shutil
import tempfile
import time

from benchmarks import cloud as clouds
from benchmarks import commands
from benchmarks import errors
from benchmarks import freezing
from benchmarks import guests
from benchmarks import measuring
from benchmarks import mover
from benchmarks import progress
from benchmarks import results
from nova_snapshot_ext import frozen

_TMPFS = pathlib.Path('/dev/shm')


def measure(cloud: clouds.Cloud, guest: guests.Guest, rounds: int,
            drop_caches: bool) -> list[results.Pipe]:
    """Read the disk of a guest that stands still, each way in turn."""
    cloud.compute.pause_server(guest.server)
    cloud.wait_status(guest.server, 'PAUSED')
    try:
        with freezing.frozen_by_backup(cloud, guest) as disks, \
                tempfile.TemporaryDirectory(dir=_TMPFS) as directory:
            return [_round(number, guest, disks.disks[0],
                           pathlib.Path(directory), drop_caches)
                    for number in range(1, rounds + 1)]
    finally:
        cloud.compute.unpause_server(guest.server)
        cloud.wait_status(guest.server, 'ACTIVE')


def _round(number: int, guest: guests.Guest, disk: frozen.FrozenDisk,
           directory: pathlib.Path, drop_caches: bool) -> results.Pipe:
    measuring.settle(drop_caches)
    began = time.monotonic()
    with mover.running(disk) as process:
        process.drain(process.length)
        process.wait()
        mover_s = time.monotonic() - began
    free = shutil.disk_usage(directory).free
    if free < process.length * 1.1:
        raise errors.BenchmarkError(
            f'{_TMPFS} has {free} bytes free for an image of '
            f'{process.length}')
    measuring.settle(drop_caches)
    image = directory / 'image'
    began = time.monotonic()
    commands.run(
        'qemu-img', 'convert', '-W', '-m', '16', '-O', 'qcow2',
        f'json:{json.dumps(disk.block_options())}', image)
    convert_s = time.monotonic() - began
    image.unlink()
    progress.say(f'round {number}, {guest.data_gib:g} GiB read: mover into '
                 f'a pipe {mover_s:.2f} s, convert {convert_s:.2f} s')
    return results.Pipe(guest.data_gib, process.length, mover_s, convert_s)
