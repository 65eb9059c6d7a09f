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

"""What an image service is: where the bytes of an image land."""

import abc
import collections.abc
import contextlib
import dataclasses
import typing

from nova_snapshot_ext import exception
from nova_snapshot_ext import image_bytes
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo


#: the property that the images of one snapshot have in common
GROUP = 'snapshot_ext_group'
#: of an image of a further disk: its own id, which no copy of its properties
#: has. Cinder and Nova copy them to what is made of volumes and servers that
#: were made of the image.
OWN_ID = 'snapshot_ext_image'


@dataclasses.dataclass(frozen=True)
class Description:
    """What is known of an image beside its bytes."""

    name: str
    #: Glance's names: ``qcow2``, ``raw``, ``vmdk``, ``vdi``
    disk_format: str
    container_format: str
    properties: dict[str, str]
    #: properties that the image may have and must not keep
    removed: frozenset[str] = frozenset()
    #: properties that the images of further disks have beside ours
    further: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where an image shall land; each service reads what concerns it."""

    #: openstacksdk's image proxy, with the rights of whoever asked
    glance: typing.Any = None
    #: the image in Glance that waits for its bytes, None to make one
    image_id: str | None = None
    #: how often an upload is tried again when the connection breaks
    retries: int = 0
    #: seconds in which it must take the next bytes of an upload, or answer
    send_timeout: int = 300
    #: seconds in which it must answer when it has all bytes of an upload
    answer_timeout: int = 3600
    #: told the length of a body for that image before its first byte is sent
    announce: collections.abc.Callable[[int], None] = lambda length: None
    #: told the id of an image of a further disk before it is made, and when
    #: it is surely gone again
    begin_further: collections.abc.Callable[[str], None] = (
        lambda image_id: None)
    end_further: collections.abc.Callable[[str], None] = lambda image_id: None
    #: a directory, and how whoever set it knows it
    directory: str | None = None
    directory_setting: str = ''


@dataclasses.dataclass(frozen=True)
class NewImage:
    """An image that is to be published."""

    description: Description
    #: makes it, and keeps it readable for as long as the context lasts; to be
    #: entered once
    made: contextlib.AbstractContextManager[image_bytes.ImageBytes]
    #: told as bytes are read; an error that it raises ends the upload, and
    #: must come out of it
    progress: requests.Progress = requests.no_progress


@dataclasses.dataclass(frozen=True)
class Published:
    """What the image service has now."""

    #: Glance's id, or a path
    location: str
    length: int


class ImageService(abc.ABC):
    """One place for the images of one snapshot; installed as
    ``nova_snapshot_ext.image_services``.

    There is one for each disk, and they stand or fall together.
    """

    @abc.abstractmethod
    def __init__(self, destination: Destination) -> None:
        """:raises InvalidSetting: if the destination can't be used"""

    def prepare(self, descriptions: collections.abc.Sequence[Description],
                most_bytes: int) -> None:
        """Find out whether it could take such images, and touch nothing.

        :param most_bytes: what all of them can take at most
        :raises InvalidSetting: if a description is not acceptable
        :raises NotEnoughRoom: if they are known to be too big
        """

    def check(self) -> None:
        """Ask whether the image is still wanted; from any thread.

        Any other error than ImageGone says that it is not known.

        :raises ImageGone: if somebody deleted it
        """

    @abc.abstractmethod
    def publish(
            self, new: collections.abc.Sequence[NewImage], verify_hash: bool,
            log: undo.UndoLog) -> list[Published]:
        """Take the bytes and the descriptions, all of it or nothing.

        Nobody is to find one of the images who does not look for what is
        hidden, before all of them are whole. May be called again after it
        failed.

        :param new: in the order in which they are made and sent; the last is
            that of the root disk, and the one that may wait for its bytes
        :param verify_hash: compare the hash of what arrived, and never let
            an image stand whose hash differs
        :returns: what it has of each, in the same order
        :raises ImageServiceError: if it could not be done
        """


class CountedReader:
    """A file that tells how far it was read; what ``requests`` uploads.

    It has a length, so requests sends Content-Length and does not chunk
    (requests, Advanced Usage, Streaming Uploads).
    """

    def __init__(self, file: typing.BinaryIO, length: int,
                 progress: requests.Progress) -> None:
        self._file = file
        self._length = length
        self._done = 0
        self._progress = progress

    def __len__(self) -> int:
        return self._length

    def read(self, size: int = -1) -> bytes:
        # http.client asks for 8 KiB at a time if it is let.
        try:
            chunk = self._file.read(max(size, 1024 ** 2))
        except OSError as error:
            # Not to be taken for a broken connection.
            raise exception.TransferFailed(
                f'The image can not be read: {error}') from error
        self._done += len(chunk)
        self._progress(self._done, self._length)
        return chunk

    def __iter__(self) -> collections.abc.Iterator[bytes]:
        while chunk := self.read():
            yield chunk
