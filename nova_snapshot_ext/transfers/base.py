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

"""What a transfer is: how a frozen disk becomes the bytes of an image."""

import abc
import contextlib

from nova_snapshot_ext import frozen
from nova_snapshot_ext import image_bytes
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo


class Transfer(abc.ABC):
    """A way to make an image; installed as ``nova_snapshot_ext.transfers``.

    One instance serves any number of snapshots, also at the same time.
    """

    #: whether its images are independent of the disk before they are sent
    independent: bool

    @abc.abstractmethod
    def obstacle(self, request: requests.Request) -> str | None:
        """Say why it can't make such an image, or None."""

    @abc.abstractmethod
    def image(
            self, disk: frozen.FrozenDisk, request: requests.Request,
            log: undo.UndoLog,
    ) -> contextlib.AbstractContextManager[image_bytes.ImageBytes]:
        """Make the disk's image readable for as long as the context lasts.

        Where the image is independent, the disk may be thawed meanwhile.

        :raises TransferFailed: if it can't be done
        """

    def staging_bytes(self, image_bytes: int) -> int:
        """Bytes that it may put into the staging directory.

        :param image_bytes: what the image can take at most
        """
        return 0
