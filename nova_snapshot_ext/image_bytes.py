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

"""An image's bytes, as transfers give them to image services."""

import abc
import typing


class ImageBytes(abc.ABC):
    """An image's bytes, as a transfer gives them to an image service."""

    #: the exact number of bytes, of what was opened last
    length: int
    #: the bytes stay readable after the disk is thawed
    independent: bool

    @abc.abstractmethod
    def open(self, algorithm: str | None = None) -> typing.BinaryIO:
        """The bytes from the first one on, as often as it is asked for.

        What was opened before is no longer read.

        :param algorithm: the hash that :meth:`digest` will be asked for when
            all is read, so that it can be computed meanwhile
        :raises TransferFailed: if they can't be had
        """

    @abc.abstractmethod
    def digest(self, algorithm: str) -> str:
        """The hash of all bytes that were opened last, in hexadecimal.

        :param algorithm: a name that hashlib knows
        :raises TransferFailed: if it can't be computed
        """
