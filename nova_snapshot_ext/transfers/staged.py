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

"""The transfer ``staged``: qemu-img makes a file, which is then sent."""

import collections.abc
import contextlib
import json
import os
import typing

from nova_snapshot_ext import beside
from nova_snapshot_ext import digest
from nova_snapshot_ext import disk as disks_
from nova_snapshot_ext import exception
from nova_snapshot_ext import frozen
from nova_snapshot_ext import image_bytes
from nova_snapshot_ext import qemu_img
from nova_snapshot_ext import request as requests
from nova_snapshot_ext.transfers import base
from nova_snapshot_ext import undo
from nova_snapshot_ext import workspace

FORMATS = ('qcow2', 'raw', 'vmdk', 'vdi')

_PROGRESS_S = 1.0
_SECTOR = 512


class StagedFile(image_bytes.ImageBytes):
    """An image in a file."""

    independent = True

    def __init__(self, path: str, request: requests.Request) -> None:
        self._path = path
        self._request = request
        self.length = os.stat(path).st_size

    def open(self, algorithm: str | None = None) -> typing.BinaryIO:
        return open(self._path, 'rb')

    def digest(self, algorithm: str) -> str:
        return digest.of_file(
            self._path, algorithm, timeout=self._request.convert_timeout,
            cancellation=self._request.cancellation)


class StagedTransfer(base.Transfer):
    """Touches the staging directory only."""

    independent = True

    def obstacle(self, request: requests.Request) -> str | None:
        if request.image_format not in FORMATS:
            return (f'it can not make {request.image_format} images, only '
                    f'{", ".join(FORMATS)}')
        return None

    def staging_bytes(self, image_bytes: int) -> int:
        return image_bytes

    @contextlib.contextmanager
    def image(
            self, disk: frozen.FrozenDisk, request: requests.Request,
            log: undo.UndoLog,
    ) -> collections.abc.Iterator[image_bytes.ImageBytes]:
        with log.scope():
            directory = workspace.make_directory(
                request.staging_directory, log)
            path = os.path.join(directory, disk.target)
            _check_size(disk, request)
            with _telling_size(path, disk.capacity, request.progress):
                _convert(disk, path, request)
            yield StagedFile(path, request)


def _check_size(disk: frozen.FrozenDisk, request: requests.Request) -> None:
    """:raises TransferFailed: if the export is not as long as the disk"""
    if not disk.capacity:
        return
    try:
        size = json.loads(qemu_img.run(
            'info', '--output', 'json', disks_.json_name(disk.block_options()),
            limits=qemu_img.INSPECT_LIMITS, timeout=request.read_timeout,
            cancellation=request.cancellation))['virtual-size']
    except exception.CommandFailed as error:
        raise exception.TransferFailed(
            f'{disk.target} can not be read: {error}') from error
    # QEMU counts sectors.
    if abs(size - disk.capacity) >= _SECTOR:
        raise exception.TransferFailed(
            f'The export of {disk.target} has {size} bytes, and the disk '
            f'{disk.capacity}')


def _convert(disk: frozen.FrozenDisk, path: str,
             request: requests.Request) -> None:
    arguments = ['convert', '-O', request.image_format]
    if request.compress and request.image_format == 'qcow2':
        arguments.append('-c')
    if request.bandwidth:
        arguments += ['-r', f'{request.bandwidth}M']
    arguments += [disks_.json_name(disk.block_options()), path]
    try:
        qemu_img.run(*arguments, limits=qemu_img.CONVERT_LIMITS,
                     timeout=request.convert_timeout,
                     cancellation=request.cancellation)
    except exception.CommandFailed as error:
        raise exception.TransferFailed(
            f'{disk.target} was not made into an image: {error}') from error


@contextlib.contextmanager
def _telling_size(path: str, capacity: int, progress: requests.Progress,
                  ) -> collections.abc.Iterator[None]:
    """Tell how much of a file is written while something else writes it."""
    def tell() -> bool:
        with contextlib.suppress(OSError):
            progress(os.stat(path).st_blocks * 512, capacity)
        return True

    with beside.repeated(tell, _PROGRESS_S):
        yield
