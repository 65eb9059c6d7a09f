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
import os
import typing


class Host(typing.Protocol):
    """The rights and habits of the program that takes a snapshot."""

    def chown(self, path: str, uid: int, gid: int) -> None:
        """Change a file's owner; -1 leaves one as it is.

        :param path: a file in a directory of ours, or a guest's own disk,
            with no symbolic link in it
        :raises OSError: if that is not allowed
        """

    def may_start(self) -> contextlib.AbstractContextManager[bool]:
        """Whether the guest that we stopped is still ours to start.

        Asked when it is off and nothing is under way. While the context
        lasts nobody deletes it; its dedicated CPUs are on line.
        """

    def may_resume(self) -> contextlib.AbstractContextManager[bool]:
        """Whether the guest that we started paused is still ours to resume.

        As long as it is up and paused by us, it is not down by anybody's
        will.
        """

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """While the context lasts nobody starts, stops or deletes the guest,
        nor is in the middle of it.

        Not for who holds up a caller that did just that.

        :raises UndoFailed: if that can't be had in time
        """


class PlainHost:
    """A host without Nova: the rights of the process, and no more."""

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(path, uid, gid, follow_symlinks=False)

    def may_start(self) -> contextlib.AbstractContextManager[bool]:
        return contextlib.nullcontext(True)

    def may_resume(self) -> contextlib.AbstractContextManager[bool]:
        return contextlib.nullcontext(True)

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()
