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

"""The servers that are measured: their disks hold random data, and they
write as fast as they can.
"""

import collections.abc
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import subprocess
import typing

from benchmarks import cloud as clouds
from benchmarks import commands
from benchmarks import console
from benchmarks import errors
from benchmarks import progress

GIB = 1024 ** 3
_IMAGE = f'{clouds.PREFIX}guest'
#: where the boot partition begins (tools/guest/build)
_FAT_OFFSET = '1M'
#: where random data begins, well behind the guest's own 256 MiB
_DATA_OFFSET = GIB
_TIMEOUT_S = 300.0


@dataclasses.dataclass(frozen=True)
class Guest:
    """One server, with what is known of it."""

    server: typing.Any
    data_gib: float
    console: pathlib.Path
    #: a finished image of its disk, as it was before it started
    finished: pathlib.Path


def upload_image(cloud: clouds.Cloud) -> None:
    """Give Glance the guest, with a writer that does not pause."""
    disk = cloud.work / 'guest.img'
    shutil.copyfile(cloud.guest_disk, disk)
    fat = f'{disk}@@{_FAT_OFFSET}'
    menu = commands.run('mtype', '-i', fat, '::syslinux.cfg')
    if 'mode=disk' not in menu:
        raise errors.BenchmarkError(
            f'the guest\'s boot menu looks different: {menu}')
    changed = cloud.work / 'syslinux.cfg'
    changed.write_text(menu.replace('mode=disk', 'mode=disk pace_ms=0'))
    commands.run('mcopy', '-o', '-i', fat, changed, '::syslinux.cfg')
    cloud.images.create_image(
        _IMAGE, filename=str(disk), disk_format='raw',
        container_format='bare', wait=True, use_import=False,
        hw_qemu_guest_agent='yes')
    disk.unlink()
    progress.say('the image of the guests is in Glance')


@contextlib.contextmanager
def practising(cloud: clouds.Cloud) -> collections.abc.Iterator[None]:
    """Have a server for what nova-compute does after each start, see
    :attr:`clouds.Cloud.practice`.
    """
    with _server(cloud, f'{clouds.PREFIX}practice', 1) as server:
        cloud.compute.pause_server(server)
        cloud.wait_status(server, 'PAUSED')
        cloud.practice = server
        try:
            yield
        finally:
            cloud.practice = None


@contextlib.contextmanager
def writing(cloud: clouds.Cloud,
            data_gib: float) -> collections.abc.Iterator[Guest]:
    """Have a server with so much random data in its disk."""
    # A root disk is of whole GiB.
    disk_gib = math.ceil(data_gib + _DATA_OFFSET / GIB)
    name = f'{clouds.PREFIX}{data_gib:g}'
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_server(cloud, name, disk_gib))
        progress.say(f'{name} is active')
        guest = Guest(server, data_gib,
                      cloud.instance(server) / 'console.log',
                      cloud.work / f'{name}.qcow2')
        _wait_writes(guest)
        cloud.compute.stop_server(server)
        cloud.wait_status(server, 'SHUTOFF')
        stack.callback(guest.finished.unlink, missing_ok=True)
        _fill(cloud, guest, disk_gib * GIB)
        progress.say(f'{name} was stopped, and its disk filled')
        cloud.compute.start_server(server)
        cloud.wait_status(server, 'ACTIVE')
        _wait_writes(guest)
        progress.say(f'{name} writes; {data_gib:g} GiB of random data in '
                     f'its disk')
        yield guest


@contextlib.contextmanager
def _server(cloud: clouds.Cloud, name: str,
            disk_gib: int) -> collections.abc.Iterator[typing.Any]:
    """Have a server that is active."""
    with contextlib.ExitStack() as stack:
        flavor = cloud.compute.create_flavor(
            name=name, vcpus=1, ram=256, disk=disk_gib)
        stack.callback(cloud.compute.delete_flavor, flavor)
        server = cloud.compute.create_server(
            name=name, networks='none', flavor_id=flavor.id,
            image_id=cloud.images.find_image(
                _IMAGE, ignore_missing=False).id)
        stack.callback(_delete, cloud, server)
        cloud.wait_status(server, 'ACTIVE')
        yield server


def _delete(cloud: clouds.Cloud, server: typing.Any) -> None:
    cloud.compute.delete_server(server)
    cloud.compute.wait_for_delete(server, interval=0.5, wait=_TIMEOUT_S)


def _wait_writes(guest: Guest) -> None:
    with console.Follower(guest.console) as follower:
        if not follower.wait_past(0, _TIMEOUT_S):
            raise errors.BenchmarkError(
                f'{guest.server.name} does not write; see {guest.console}')


def _fill(cloud: clouds.Cloud, guest: Guest, size: int) -> None:
    """Put a disk with random data in place of a stopped server's.

    It is an overlay over the same image, as Nova makes them. The guest's
    file system grows over the data, and does not touch most of it.
    """
    disk = cloud.instance(guest.server) / 'disk'
    owner = disk.stat()
    base = json.loads(commands.run(
        'qemu-img', 'info', '--output=json', '-f', 'qcow2',
        disk))['full-backing-filename']
    new = disk.with_name('disk.new')
    commands.run('qemu-img', 'create', '-q', '-f', 'qcow2', '-F', 'raw',
                 '-b', base, new, str(size))
    length = int(guest.data_gib * GIB)
    noise = cloud.work / 'noise'
    with noise.open('wb') as file:
        subprocess.run(['head', '-c', str(length), '/dev/urandom'],
                       stdout=file, check=True)
    commands.run(
        'qemu-img', 'convert', '-n', '-W', '-m', '4', '-f', 'raw', noise,
        '--target-image-opts',
        f'driver=raw,offset={_DATA_OFFSET},size={length},file.driver=qcow2,'
        f'file.file.driver=file,file.file.filename={new}')
    noise.unlink()
    os.chown(new, owner.st_uid, owner.st_gid)
    new.chmod(owner.st_mode & 0o777)
    new.replace(disk)
    commands.run('qemu-img', 'convert', '-W', '-m', '16', '-f', 'qcow2',
                 '-O', 'qcow2', disk, guest.finished)
