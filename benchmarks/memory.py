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

"""The mover's memory, where a disk is as large and scattered as can be."""

import shutil
import time

from benchmarks import errors
from benchmarks import mover
from benchmarks import proc
from benchmarks import progress
from benchmarks import results
from nova_snapshot_ext import frozen
from tests.functional import nbd_servers

DISK_BYTES = 2 * 1024 ** 4
_CLUSTER = 64 * 1024
#: entries of eight bytes in a cluster of an L2 table, of two in one of
#: refcounts
_L2_ENTRIES = _CLUSTER // 8
_REFCOUNTS = _CLUSTER // 2
#: read behind the tables; the rest of the disk is more of the same
_DATA = 1024 ** 3


def why_not() -> str | None:
    """Why it can't be measured here, None if it can."""
    return None if shutil.which('qemu-nbd') else 'there is no qemu-nbd'


def measure() -> results.Memory:
    """Lay out 2 TiB of which every second 64 KiB hold data."""
    with nbd_servers.Alternating(DISK_BYTES) as export:
        disk = frozen.FrozenDisk(
            'vda', DISK_BYTES, export.socket, export.name)
        began = time.monotonic()
        with mover.running(disk) as process:
            laid_out_s = time.monotonic() - began
            cpu_s = proc.used(process.pid).own_s
            clusters = DISK_BYTES // _CLUSTER
            tables = clusters // _L2_ENTRIES
            refcounts = -(-(clusters // 2 + tables) // _REFCOUNTS)
            needed = (tables + refcounts) * _CLUSTER + _DATA
            if process.length < needed:
                raise errors.BenchmarkError(
                    f'an image of {process.length} bytes is not that of '
                    f'this disk')
            process.drain(needed)
            resident = proc.peak_resident_bytes(process.pid)
    progress.say(f'2 TiB laid out in {laid_out_s:.0f} s ({cpu_s:.0f} s of a '
                 f'processor), {resident / 1024 ** 2:.0f} MiB resident')
    return results.Memory(DISK_BYTES, resident, laid_out_s, cpu_s)
