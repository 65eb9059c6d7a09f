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

"""The image service ``directory``: a file, and a JSON document beside it."""

import collections.abc
import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil

from nova_snapshot_ext import beside
from nova_snapshot_ext import cancellation as cancellations
from nova_snapshot_ext import digest
from nova_snapshot_ext import exception
from nova_snapshot_ext import image_bytes
from nova_snapshot_ext.images import base
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo
from nova_snapshot_ext import workspace


#: seconds that the hash of an image may take: of 4 TiB by 200 MB/s
_HASH_TIMEOUT_S = 6 * 3600
_LOOK_S = 1.0
_PART = re.compile(r'\.[0-9a-f]{16}(\.json)?')


@undo.step
def remove_part(around: undo.Surroundings, path: str) -> None:
    """Remove what was written under a temporary name."""
    if not _PART.fullmatch(os.path.basename(path)):
        raise ValueError(f'{path} is not a file of ours')
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@undo.step
def remove_unfinished(around: undo.Surroundings,
                      names: dict[str, str]) -> None:
    """Take away the names that files got before all of them had theirs.

    :param names: of each file, by its temporary name
    """
    for part, path in names.items():
        if not _PART.fullmatch(os.path.basename(part)):
            raise ValueError(f'{part} is not a file of ours')
        # What somebody else has put there is his.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samefile(part, path):
                os.unlink(path)


@dataclasses.dataclass(frozen=True)
class _Written:
    """An image that is whole, under a temporary name."""

    part: str
    path: str
    length: int

    @property
    def names(self) -> dict[str, str]:
        """Those that its files get, by their temporary ones."""
        return {self.part: self.path,
                f'{self.part}.json': f'{self.path}.json'}


class DirectoryService(base.ImageService):
    """Writes into one directory: NAME.FORMAT and NAME.FORMAT.json."""

    def __init__(self, destination: base.Destination) -> None:
        if destination.directory is None:
            raise exception.InvalidSetting(
                destination.directory_setting, 'None',
                'the image service directory needs an existing directory')
        workspace.check_directory(
            destination.directory, destination.directory_setting)
        self._directory = destination.directory
        self._setting = destination.directory_setting

    def prepare(
            self, descriptions: collections.abc.Sequence[base.Description],
            most_bytes: int) -> None:
        for description in descriptions:
            self._free_path(description)
        free = workspace.free_bytes(self._directory)
        if free < most_bytes:
            raise exception.NotEnoughRoom(
                self._setting, self._directory, most_bytes, free)

    def publish(
            self, new: collections.abc.Sequence[base.NewImage],
            verify_hash: bool, log: undo.UndoLog) -> list[base.Published]:
        with log.scope():
            written = [self._write(each, verify_hash, log) for each in new]
            self._name(written, log)
        return [base.Published(each.path, each.length) for each in written]

    def _write(self, new: base.NewImage, verify_hash: bool,
               log: undo.UndoLog) -> _Written:
        path = self._free_path(new.description)
        part = os.path.join(self._directory, f'.{secrets.token_hex(8)}')
        document = f'{part}.json'
        for left in (part, document):
            log.push(remove_part, path=left)
        with new.made as image, _writing(path):
            self._write_bytes(image, part, new.progress)
            expected = image.digest('sha512')
            if verify_hash and _hash_of(
                    part, image.length, new.progress) != expected:
                raise exception.ImageServiceError(
                    f'{path} would not hold the bytes that were sent')
            _write_document(document, new.description, image, expected)
            return _Written(part, path, image.length)

    def _name(self, written: list[_Written], log: undo.UndoLog) -> None:
        """Give all files their names, or none."""
        names = {part: path for each in written
                 for part, path in each.names.items()}
        unfinished = log.push(remove_unfinished, names=names)
        for part, path in names.items():
            # A link, because it never replaces what somebody else has put
            # there meanwhile.
            with _writing(path):
                os.link(part, path)
        with _writing(self._directory):
            undo.flush_directory(self._directory)
        unfinished.drop()

    def _free_path(self, description: base.Description) -> str:
        name = description.name.replace('/', '_').lstrip('.') or 'image'
        if not name.isprintable():
            raise exception.InvalidSetting(
                'image name', name, 'a file is named so')
        path = os.path.join(
            self._directory, f'{name}.{description.disk_format}')
        for taken in (path, f'{path}.json'):
            if os.path.lexists(taken):
                raise exception.InvalidSetting(
                    'image name', description.name,
                    f'{taken} exists already')
        return path

    @staticmethod
    def _write_bytes(image: image_bytes.ImageBytes, path: str,
                     progress: requests.Progress) -> None:
        with (image.open('sha512') as source,
              open(path, 'xb', opener=_private) as target):
            shutil.copyfileobj(
                base.CountedReader(source, image.length, progress), target,
                1024 ** 2)
            target.flush()
            os.fsync(target.fileno())
        length = os.stat(path).st_size
        if length != image.length:
            raise exception.ImageServiceError(
                f'{length} bytes of {image.length} arrived in {path}')


@contextlib.contextmanager
def _writing(path: str) -> collections.abc.Iterator[None]:
    """Errors of writing, as one that says what can't be written."""
    try:
        yield
    except OSError as error:
        raise exception.ImageServiceError(
            f'{path} can not be written: {error}') from error


def _private(path: str, flags: int) -> int:
    # An image holds all that a guest does.
    return os.open(path, flags, 0o600)


def _hash_of(path: str, length: int, progress: requests.Progress) -> str:
    """The sha512 of a file; progress ends it, as it ends the writing.

    :raises SnapshotError: what progress raises, or TransferFailed
    """
    cancellation = cancellations.Cancellation()

    def look() -> bool:
        try:
            progress(length, length)
        except exception.SnapshotError as error:
            cancellation.cancel(error)
        return True

    with beside.repeated(look, _LOOK_S):
        try:
            return digest.of_file(path, 'sha512', timeout=_HASH_TIMEOUT_S,
                                  cancellation=cancellation)
        except exception.TransferFailed:
            cancellation.check()
            raise


def _write_document(path: str, description: base.Description,
                    image: image_bytes.ImageBytes, sha512: str) -> None:
    document = {
        'name': description.name,
        'disk_format': description.disk_format,
        'container_format': description.container_format,
        'size': image.length,
        'os_hash_algo': 'sha512',
        'os_hash_value': sha512,
        'properties': description.properties,
    }
    with open(path, 'x', opener=_private) as file:
        json.dump(document, file, indent=2, sort_keys=True)
        file.write('\n')
        file.flush()
        os.fsync(file.fileno())
