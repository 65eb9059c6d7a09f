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

"""The errors of this package, one small family."""


def shown(value: object) -> str:
    """What others wrote, fit for a line of a message or a log."""
    words = str(value)
    if not words.isprintable():
        words = words.encode('unicode_escape').decode()
    return words if len(words) <= 200 else f'{words[:200]} …'


class SnapshotError(Exception):
    """A snapshot could not be taken; the message says why, and what helps."""


class InvalidSetting(SnapshotError):
    """A setting or a request has a value that is not allowed."""

    def __init__(self, setting: str, value: object, allowed: str) -> None:
        """:param setting: where it was set, as its owner knows it

        :param value: what was given
        :param allowed: what may be given instead
        """
        super().__init__(f'{setting} = {shown(value)} is not valid: {allowed}')


class NoFlowServes(SnapshotError):
    """None of the flows that may serve can, for the reasons given."""

    def __init__(self, what: str, obstacles: dict[str, str]) -> None:
        """:param what: whose choice it was, such as a setting's name

        :param obstacles: of each flow's name, why it can't serve
        """
        self.obstacles = dict(obstacles)
        reasons = '; '.join(f'{flow}: {why}'
                            for flow, why in obstacles.items())
        super().__init__(f'No flow of {what} can serve. {reasons}')


class NotEnoughRoom(SnapshotError):
    """A directory has less free space than the snapshot may need."""

    def __init__(self, setting: str, directory: str, needed: int,
                 free: int) -> None:
        """:param needed: bytes that the snapshot may take there

        :param free: bytes that are free there
        """
        super().__init__(
            f'{setting} = {directory} has {free} bytes free; this snapshot '
            f'may need {needed}')


class UnsafeDisk(SnapshotError):
    """A disk's file refers to what its guest must not reach."""


class NotOurs(SnapshotError):
    """A file was left alone: it is not what it should be."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)

    def __str__(self) -> str:
        path, why = self.args
        return f'{path} is left as it is: {why}'


class GuestGone(SnapshotError):
    """The domain does not exist (any more)."""


class GuestBusy(SnapshotError):
    """Another snapshot of the same guest is being taken."""


class Preempted(SnapshotError):
    """Something else is done to the guest, or may be, by its owner's will."""


class RollbackRefused(SnapshotError):
    """A guest can't go back to a snapshot; it was not touched."""


class DeletionRefused(SnapshotError):
    """A domain snapshot can't be deleted as things are; nothing was touched.
    """


class StartedByAnother(SnapshotError):
    """Somebody else has started a guest that was to go back to a snapshot: it
    is neither there nor what it was; what it was is kept as a snapshot."""


class FreezeFailed(SnapshotError):
    """The guest's disks could not be frozen; the guest is as it was."""


class DiskThawed(SnapshotError):
    """The disk did not stay frozen until its image was made."""


class CommandFailed(SnapshotError):
    """A program could not be run, or failed."""


class TransferFailed(SnapshotError):
    """The frozen disk could not be made into an image."""


class UndoFailed(SnapshotError):
    """A step of the way back failed; its undo log is kept."""


class GuestElsewhere(UndoFailed):
    """The guest is another host's, or nobody's, and will not come back."""


class ImageServiceError(SnapshotError):
    """The image service did not take the image."""


class ImageGone(ImageServiceError):
    """The image was deleted while its bytes were on the way."""


class ImageRefused(ImageServiceError):
    """The image service answered, and will not take the image."""


class ImageDiffers(ImageRefused):
    """The image service has other bytes than were sent."""


class ImageServiceUnreachable(ImageServiceError):
    """The image service could not be reached, or broke the connection."""
