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

"""The image service ``glance``, by openstacksdk.

The exact size is announced before the first byte (Image API v2, PUT
/v2/images/{id}/file: Content-Length, and x-openstack-image-size from Glance
31 on), so that Glance refuses what does not fit and notices what is cut off.

An image is active as soon as its bytes are there. So those of further disks
are hidden (``os_hidden``) until that of the root disk, the last, is active.
"""

import collections.abc
import contextlib
import hashlib
import re
import time
import typing
import uuid

from keystoneauth1 import exceptions as keystone_exceptions
from openstack import exceptions as sdk_exceptions
from oslo_log import log as logging
import requests as http

from nova_snapshot_ext import exception
from nova_snapshot_ext import image_bytes
from nova_snapshot_ext.images import base
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import undo

LOG = logging.getLogger(__name__)

_RETRY_S = 1.0
_SAVING_TIMEOUT_S = 60.0
#: the same, where somebody waits for a snapshot to be over
_CUT_OFF_TIMEOUT_S = 10.0
#: for a question whose answer decides nothing but what is left behind
_SHORTLY: dict[str, typing.Any] = {'timeout': 10}
#: for deleting what is asked for once more if it stays: the disks are frozen
#: meanwhile
_TIDY: dict[str, typing.Any] = {'timeout': 30}
#: for asking whether an image is there: another question follows soon
_CHECK: dict[str, typing.Any] = {
    'timeout': 10,
    # Another thread's upload has the same token, and renews it in its turn.
    'allow_reauth': False,
    'connect_retries': 0,
    'status_code_retries': 0,
}
#: bytes of an answer; an image's document has some KiB
_MOST_ANSWER = 4 * 1024 ** 2
#: seconds that its body may take once it has begun
_ANSWER_TIMEOUT_S = 60.0
_ID = re.compile('[0-9A-Za-z-]{1,64}')
_DELETED = ('deleted', 'pending_delete')
#: what Glance hashes by if it is not told otherwise (hashing_algorithm)
_USUAL_HASH = 'sha512'
#: keystoneauth would send a body again that it has read already: with a new
#: token after 401, to another place, or after an error (Session.request)
_SENT_ONCE: dict[str, typing.Any] = {
    'allow_reauth': False,
    'redirect': False,
    'connect_retries': 0,
    'status_code_retries': 0,
}
#: what a broken connection looks like, from the socket up to the SDK
_BROKEN = (
    http.exceptions.ConnectionError,
    http.exceptions.ChunkedEncodingError,
    http.exceptions.Timeout,
    keystone_exceptions.ConnectFailure,
    keystone_exceptions.DiscoveryFailure,
    keystone_exceptions.UnknownConnectionError,
    keystone_exceptions.RetriableConnectionFailure,
    OSError,
)


_shown = exception.shown


class GlanceService(base.ImageService):
    """Fills an image that waits in Glance, or makes one."""

    def __init__(self, destination: base.Destination) -> None:
        if destination.glance is None:
            raise exception.InvalidSetting(
                'image_service', 'glance', 'there is no cloud to send it to')
        self._glance = destination.glance
        self._image_id = destination.image_id
        self._attempts = 1 + destination.retries
        self._send_timeout = destination.send_timeout
        self._answer_timeout = destination.answer_timeout
        self._announce = destination.announce
        self._begin_further = destination.begin_further
        self._end_further = destination.end_further
        #: images of further disks
        self._further: set[str] = set()
        #: the image whose deletion by others is news
        self._wanted = destination.image_id

    def check(self) -> None:
        image_id = self._wanted
        if image_id is None:
            return
        try:
            with translated(f'image {image_id}'):
                status = self._get(image_id, **_CHECK)['status']
        except exception.ImageGone:
            status = 'deleted'
        if status in _DELETED and self._wanted == image_id:
            raise exception.ImageGone(f'Image {image_id} was deleted')

    def publish(
            self, new: collections.abc.Sequence[base.NewImage],
            verify_hash: bool, log: undo.UndoLog) -> list[base.Published]:
        *further, root = new
        sent: list[int] = []
        if not further:
            return [self._publish_root(root, verify_hash, sent)]
        added: list[str] = []
        root_id = self._image_id
        try:
            owner = self._owner()
            published = [self._add_hidden(each, owner, verify_hash, added)
                         for each in further]
            published.append(self._publish_root(root, verify_hash, sent))
            root_id = published[-1].location
            for image_id in added:
                self._show(image_id)
        except BaseException:
            # It may be active by now, and Nova deletes no active image. If
            # it is not, it may be wanted again.
            gone = (not sent or root_id is None or self._waits(root_id)
                    or self._delete(root_id, **_TIDY))
            # If it stays, it may be whole, which the others are then: they
            # are remembered, and shown or deleted as it is there or not.
            if gone or self._image_id is None:
                for image_id in added:
                    if self._delete(image_id, **_TIDY):
                        self._end_further(image_id)
            raise
        return published

    def _owner(self) -> str | None:
        """The project that the image of the root disk belongs to; None if it
        is not made yet, and will be of who makes the others."""
        if self._image_id is None:
            return None
        found = None
        with self._attempting(self._image_id) as attempts:
            for attempt in attempts:
                with attempt:
                    found = self._get(self._image_id).get('owner')
        return found if isinstance(found, str) else None

    def _add_hidden(self, new: base.NewImage, owner: str | None,
                    verify_hash: bool, added: list[str]) -> base.Published:
        """Make an image of its own that nobody sees yet, and fill it.

        :param added: gets its id before it is made
        """
        image_id = str(uuid.uuid4())
        self._begin_further(image_id)
        self._further.add(image_id)
        added.append(image_id)
        document = {
            **new.description.properties,
            base.OWN_ID: image_id,
            'id': image_id,
            'name': new.description.name,
            'disk_format': new.description.disk_format,
            'container_format': new.description.container_format,
            'visibility': 'private',
            'os_hidden': True,
            **({} if owner is None else {'owner': owner})}
        with self._attempting(image_id) as attempts:
            for attempt in attempts:
                with attempt:
                    try:
                        self._request('POST', '/images', json=document)
                    except sdk_exceptions.ConflictException:
                        # Nobody else has this id: only an answer was lost.
                        self._get(image_id)
        return self._send(image_id, new, verify_hash, [])

    def _show(self, image_id: str) -> None:
        """Have an image of a further disk be seen by everybody who may."""
        with self._attempting(image_id) as attempts:
            for attempt in attempts:
                with attempt:
                    self._change(image_id, [{
                        'op': 'replace', 'path': '/os_hidden',
                        'value': False}])

    def _waits(self, image_id: str) -> bool:
        """Whether an image surely waits for its bytes."""
        try:
            with translated(f'image {image_id}'):
                return bool(
                    self._get(image_id, **_SHORTLY)['status'] == 'queued')
        except exception.ImageServiceError:
            return False

    def _publish_root(self, new: base.NewImage, verify_hash: bool,
                      sent: list[int]) -> base.Published:
        """:param sent: gets the length of each body that was begun"""
        if self._image_id is not None:
            return self._fill(self._image_id, new, verify_hash, sent)
        image_id = self._wanted = self._create(new.description)
        try:
            return self._fill(image_id, new, verify_hash, sent)
        except BaseException:
            self._delete(image_id)
            raise

    def _fill(self, image_id: str, new: base.NewImage, verify_hash: bool,
              sent: list[int]) -> base.Published:
        self._describe(image_id, new.description)
        try:
            return self._send(image_id, new, verify_hash, sent)
        except exception.ImageDiffers:
            # It may be active by now, and whoever trusts it would delete
            # the disk: no image is better than another one.
            self._delete(image_id)
            raise
        except BaseException:
            if sent:
                self._delete_cut_off(image_id, sent)
            raise

    def _send(self, image_id: str, new: base.NewImage, verify_hash: bool,
              sent: list[int]) -> base.Published:
        with new.made as image:
            self._upload(image_id, image, verify_hash, new.progress, sent)
            self._verify(image_id, image, sent[-1], verify_hash)
        return base.Published(image_id, sent[-1])

    def _create(self, description: base.Description) -> str:
        with translated('a new image'):
            image_id = _image_of(self._request('POST', '/images', json={
                'name': description.name,
                'disk_format': description.disk_format,
                'container_format': description.container_format})).get('id')
        if not (isinstance(image_id, str) and _ID.fullmatch(image_id)):
            raise exception.ImageServiceError(
                f'Glance made an image with the id {_shown(image_id)}')
        return image_id

    def _describe(self, image_id: str,
                  description: base.Description) -> None:
        wanted = {
            'name': description.name,
            'disk_format': description.disk_format,
            'container_format': description.container_format,
            **description.properties}
        with self._attempting(image_id) as attempts:
            for attempt in attempts:
                with attempt:
                    self._patch(image_id, wanted, description.removed)

    def _patch(self, image_id: str, wanted: dict[str, str],
               removed: frozenset[str]) -> None:
        present = self._get(image_id)
        changes: list[dict[str, typing.Any]] = []
        for name, value in wanted.items():
            if present.get(name) != value:
                changes.append({
                    'op': 'replace' if name in present else 'add',
                    'path': _pointer(name), 'value': value})
        for name in sorted(removed & present.keys() - wanted.keys()):
            changes.append({'op': 'remove', 'path': _pointer(name)})
        if changes:
            self._change(image_id, changes)

    def _change(self, image_id: str,
                changes: list[dict[str, typing.Any]]) -> None:
        """:param changes: a JSON patch"""
        self._request(
            'PATCH', f'/images/{image_id}', json=changes, headers={
                'Content-Type':
                    'application/openstack-images-v2.1-json-patch'})

    def _upload(self, image_id: str, image: image_bytes.ImageBytes,
                verify_hash: bool, progress: requests.Progress,
                announced: list[int]) -> None:
        """:param announced: gets the length of each body that was begun"""
        algorithm = _USUAL_HASH if verify_hash else None
        with self._attempting(image_id) as attempts:
            for attempt in attempts:
                with attempt:
                    # Before it is opened: that may give another length.
                    status = self._settled(image_id)['status']
                    if status == 'active' and announced:
                        return      # only the answer was lost
                    # Each attempt opens the image anew: what a broken one
                    # has read is gone, and the rest alone would be another
                    # image.
                    with image.open(algorithm) as file:
                        progress(0, image.length)
                        self._put(image_id, file, image.length, progress,
                                  announced)

    def _put(self, image_id: str, file: typing.BinaryIO, length: int,
             progress: requests.Progress, announced: list[int]) -> None:
        if image_id not in self._further:
            self._announce(length)
        announced.append(length)
        try:
            self._request(
                'PUT', f'/images/{image_id}/file',
                data=base.CountedReader(file, length, progress),
                headers={
                    'Content-Type': 'application/octet-stream',
                    'X-OpenStack-Image-Size': str(length)},
                # urllib3 has the first one on the socket while it connects
                # and sends. The answer takes as long as Glance's store.
                timeout=(self._send_timeout, self._answer_timeout),
                **_SENT_ONCE)
        except sdk_exceptions.ConflictException:
            # It waits for no bytes: those that it has are not of this body.
            announced.pop()
            raise

    def _settled(self, image_id: str, patience: float = _SAVING_TIMEOUT_S,
                 **arguments: typing.Any) -> dict[str, typing.Any]:
        """The image, when no upload that broke is under way.

        Glance takes no new bytes while it has not noticed that the old ones
        ended. Asking also renews a token that ran out during the last
        attempt: the upload itself must not.
        """
        deadline = time.monotonic() + patience
        while (found := self._get(image_id, **arguments))[
                'status'] == 'saving':
            if time.monotonic() > deadline:
                break
            time.sleep(_RETRY_S)
        return found

    def _delete_cut_off(self, image_id: str, announced: list[int]) -> None:
        """Delete an image that is a part of what should have been sent.

        Before release 31 Glance is not told the size and may take the bytes
        that came for the image; Nova deletes no active image.
        """
        try:
            with translated(f'image {image_id}'):
                stored = self._settled(
                    image_id, _CUT_OFF_TIMEOUT_S, **_SHORTLY)
        except exception.ImageGone:
            return
        except exception.ImageServiceError as error:
            LOG.warning('Whether image %s is active with a part of its bytes '
                        'is not known: %s', image_id, error)
            return
        if stored['status'] == 'active' and (
                stored.get('size') not in announced):
            LOG.warning(
                'Image %s is active with %s bytes of %d; it is deleted',
                image_id, _shown(stored.get('size')), announced[-1])
            self._delete(image_id)

    def _verify(self, image_id: str, image: image_bytes.ImageBytes,
                length: int, verify_hash: bool) -> None:
        """:param length: that was sent

        :raises ImageDiffers: if Glance has other bytes than were sent
        """
        with self._attempting(image_id) as attempts:
            for attempt in attempts:
                with attempt:
                    stored = self._get(image_id)
        size = stored.get('size')
        # In Python, True is 1.
        if stored['status'] != 'active' or type(size) is not int or (
                size != length):
            raise exception.ImageDiffers(
                f'Image {image_id} is {_shown(stored["status"])} with '
                f'{_shown(size)} bytes; {length} were sent')
        if not verify_hash:
            return
        algorithm = stored.get('os_hash_algo')
        if not algorithm:
            raise exception.ImageDiffers(
                f'Glance gives no hash of image {image_id} to compare')
        if not _is_hash(algorithm):
            raise exception.ImageDiffers(
                f'Glance gives a hash of image {image_id} that is not known '
                f'here: {_shown(algorithm)}')
        expected = image.digest(algorithm)
        if stored.get('os_hash_value') != expected:
            raise exception.ImageDiffers(
                f'Image {image_id} has the {algorithm} '
                f'{_shown(stored.get("os_hash_value"))}, and {expected} was '
                f'sent')

    def _get(self, image_id: str,
             **arguments: typing.Any) -> dict[str, typing.Any]:
        return _image_of(
            self._request('GET', f'/images/{image_id}', **arguments))

    def _delete(self, image_id: str, **arguments: typing.Any) -> bool:
        """:returns: whether it is surely gone"""
        if image_id not in self._further:
            self._wanted = None
        try:
            with translated(f'image {image_id}'):
                self._request(
                    'DELETE', f'/images/{image_id}', **arguments)
        except exception.ImageGone:
            pass
        except exception.ImageServiceError as error:
            LOG.warning('Image %s could not be deleted: %s', image_id, error)
            return False
        return True

    def _request(self, method: str, path: str,
                 **arguments: typing.Any) -> typing.Any:
        """One request through the SDK's proxy: its auth and its session;
        errors as the SDK raises them.
        """
        if self._glance.session.timeout is None:
            # Without [glance] timeout it would wait without end.
            arguments.setdefault('timeout', self._send_timeout)
        response = self._glance.request(
            path, method, stream=True, **arguments)
        _take_answer(response)
        sdk_exceptions.raise_from_response(response)
        return response

    @contextlib.contextmanager
    def _attempting(self, image_id: str) -> typing.Iterator[
            typing.Iterator['_Attempt']]:
        # That somebody deletes one of a further disk is no word about the
        # snapshot: it has failed. Nor is it if we deleted that of the root
        # disk.
        gone = (exception.ImageGone if image_id == self._wanted
                else exception.ImageRefused)
        with translated(f'image {image_id}', gone):
            yield self._attempts_of(image_id)

    def _attempts_of(self, image_id: str) -> typing.Iterator['_Attempt']:
        for number in range(1, self._attempts + 1):
            attempt = _Attempt(last=number == self._attempts)
            yield attempt
            if attempt.error is None:
                return
            LOG.warning('Attempt %d of %d at image %s broke: %s', number,
                        self._attempts, image_id, attempt.error)
            time.sleep(_RETRY_S)


class _Attempt(contextlib.AbstractContextManager['_Attempt']):
    """One try: keeps the error of a broken connection, lets all others by."""

    def __init__(self, last: bool) -> None:
        self._last = last
        self.error: BaseException | None = None

    def __exit__(self, kind: type[BaseException] | None,
                 error: BaseException | None, traceback: object) -> bool:
        self.error = error
        return not self._last and _may_pass(error)


def _may_pass(error: BaseException | None) -> bool:
    """Whether another attempt may find the way, or the server, better."""
    # The SDK's errors of HTTP are OSErrors as well.
    if isinstance(error, sdk_exceptions.HttpException):
        return error.status_code in (502, 503, 504)
    return isinstance(error, _BROKEN)


@contextlib.contextmanager
def translated(
        what: str, gone: type[exception.ImageServiceError] =
        exception.ImageGone) -> typing.Iterator[None]:
    """Errors of the SDK, and of connections, as our own.

    :param what: the request was about, for the message
    :param gone: the error where it does not exist
    """
    try:
        yield
    except sdk_exceptions.HttpException as error:
        # Glance's details may be HTML; the status says enough.
        message = (f'Glance refused {what}: {error.status_code} '
                   f'{_first_line(error)}')
        if error.status_code in (404, 410):
            raise gone(message) from error
        raise exception.ImageRefused(message) from error
    except _BROKEN as error:
        raise exception.ImageServiceUnreachable(
            f'The connection to Glance for {what} broke: {error}') from error
    except (sdk_exceptions.SDKException,
            keystone_exceptions.ClientException) as error:
        raise exception.ImageServiceUnreachable(
            f'Glance can not be used for {what}: {error}') from error


def _take_answer(response: http.Response) -> None:
    """Read the body of an answer, as far as one of Glance's can go.

    :raises ImageServiceError: if there is more, or it does not end
    """
    deadline = time.monotonic() + _ANSWER_TIMEOUT_S
    content = bytearray()
    for chunk in response.iter_content(64 * 1024):
        content += chunk
        if len(content) > _MOST_ANSWER or time.monotonic() > deadline:
            response.close()
            raise exception.ImageServiceError(
                f'Glance gives an answer of more than {_MOST_ANSWER} bytes, '
                f'or for more than {_ANSWER_TIMEOUT_S:.0f} s')
    # Where requests itself keeps what it has read of a stream.
    response._content = bytes(content)


def _image_of(response: http.Response) -> dict[str, typing.Any]:
    """The image that an answer describes.

    :raises ImageServiceError: if it describes none
    """
    try:
        found = response.json()
    except (ValueError, RecursionError) as error:
        raise exception.ImageServiceError(
            f'Glance gives an answer that is not JSON: '
            f'{_shown(response.text)}') from error
    if not (isinstance(found, dict) and isinstance(
            found.get('status'), str)):
        raise exception.ImageServiceError(
            f'Glance gives an answer that is no image: {_shown(found)}')
    return found


def _is_hash(algorithm: object) -> bool:
    # Those called shake need a length.
    return (isinstance(algorithm, str)
            and algorithm in hashlib.algorithms_available
            and not algorithm.startswith('shake'))


def _first_line(error: sdk_exceptions.HttpException) -> str:
    details = str(error.details or error.message or '')
    return details.strip().partition('\n')[0][:200]


def _pointer(name: str) -> str:
    """A property's JSON pointer (RFC 6901, section 3)."""
    return '/' + name.replace('~', '~0').replace('/', '~1')
