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

"""What a flow may ask of whoever runs it, beyond libvirt."""

import contextlib
import typing

from nova_snapshot_ext import rights


class Host(typing.Protocol):
    """The rights and habits of the program that takes a snapshot."""

    def let_group_pass(self, path: str, gid: int) -> None:
        """Let a group pass through a directory of ours.

        :param path: of one that was just made, for its owner alone
        :raises NotOurs: if that is not allowed
        """

    def take_socket(self, path: str) -> None:
        """Make a socket that another user made our own.

        :param path: in a directory of ours, for its owner alone
        :raises NotOurs: if that is not allowed, or it is no socket
        """

    def give_disk(self, path: str, uid: int, gid: int) -> None:
        """Change the owner of a guest's disk; -1 leaves one as it is.

        :param path: of a file or a block device, with no link in it
        :raises NotOurs: if that is not allowed
        """

    def may_start(self) -> contextlib.AbstractContextManager[bool]:
        """Whether the guest that we stopped is still ours to start.

        Asked when it is off and nothing is under way. While the context
        lasts nobody deletes it, nor begins anything else with it; its
        dedicated CPUs are on line.

        :raises UndoFailed: if that can't be said yet: somebody is at work
            on it
        """

    def may_resume(self) -> contextlib.AbstractContextManager[bool]:
        """Whether the guest that we started paused is still ours to resume.

        As long as it is up and paused by us, it is not down by anybody's
        will.

        :raises UndoFailed: likewise
        """

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """While the context lasts nobody starts, stops, moves or deletes the
        guest, nor is in the middle of it.

        Not for who holds up a caller that did just that.

        :raises UndoFailed: if that can't be had in time
        """


class PlainHost:
    """A host without Nova: the rights of the process, and no more."""

    def let_group_pass(self, path: str, gid: int) -> None:
        rights.let_group_pass(path, gid)

    def take_socket(self, path: str) -> None:
        rights.take_socket(path)

    def give_disk(self, path: str, uid: int, gid: int) -> None:
        with rights.opened(path) as descriptor:
            rights.give_disk(descriptor, path, uid, gid)

    def may_start(self) -> contextlib.AbstractContextManager[bool]:
        return contextlib.nullcontext(True)

    def may_resume(self) -> contextlib.AbstractContextManager[bool]:
        return contextlib.nullcontext(True)

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()
