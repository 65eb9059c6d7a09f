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
"""

import contextlib
import time
import typing

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
#: for asking whether an image is there: another question follows soon
_CHECK: dict[str, typing.Any] = {
    'timeout': 10,
    # Another thread's upload has the same token, and renews it in its turn.
    'allow_reauth': False,
    'connect_retries': 0,
    'status_code_retries': 0,
}
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
        #: the image whose deletion by others is news
        self._wanted = destination.image_id

    def check(self) -> None:
        image_id = self._wanted
        if image_id is None:
            return
        try:
            with _translated(f'image {image_id}'):
                status = self._get(image_id, **_CHECK)['status']
        except exception.ImageGone:
            status = 'deleted'
        if status in _DELETED and self._wanted == image_id:
            raise exception.ImageGone(f'Image {image_id} was deleted')

    def publish(
            self, image: image_bytes.ImageBytes, description: base.Description,
            verify_hash: bool, progress: requests.Progress,
            log: undo.UndoLog) -> base.Published:
        if self._image_id is not None:
            return base.Published(self._image_id, self._fill(
                self._image_id, image, description, verify_hash, progress))
        image_id = self._wanted = self._create(description)
        try:
            length = self._fill(
                image_id, image, description, verify_hash, progress)
        except BaseException:
            self._delete(image_id)
            raise
        return base.Published(image_id, length)

    def _fill(self, image_id: str, image: image_bytes.ImageBytes,
              description: base.Description, verify_hash: bool,
              progress: requests.Progress) -> int:
        """:returns: the length that was sent"""
        self._describe(image_id, description)
        announced: list[int] = []
        try:
            self._upload(image_id, image, verify_hash, progress, announced)
            self._verify(image_id, image, announced[-1], verify_hash)
        except exception.ImageDiffers:
            # It may be active by now, and whoever trusts it would delete
            # the disk: no image is better than another one.
            self._delete(image_id)
            raise
        except BaseException:
            if announced:
                self._delete_cut_off(image_id, announced)
            raise
        return announced[-1]

    def _create(self, description: base.Description) -> str:
        with _translated('a new image'):
            response = self._request('POST', '/images', json={
                'name': description.name,
                'disk_format': description.disk_format,
                'container_format': description.container_format})
        image_id: str = response.json()['id']
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
        changes: list[dict[str, str]] = []
        for name, value in wanted.items():
            if present.get(name) != value:
                changes.append({
                    'op': 'replace' if name in present else 'add',
                    'path': _pointer(name), 'value': value})
        for name in sorted(removed & present.keys() - wanted.keys()):
            changes.append({'op': 'remove', 'path': _pointer(name)})
        if changes:
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
                timeout=(self._send_timeout, None),
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
            with _translated(f'image {image_id}'):
                stored = self._settled(
                    image_id, _CUT_OFF_TIMEOUT_S, **_SHORTLY)
        except exception.ImageGone:
            return
        except exception.ImageServiceError as error:
            LOG.warning('Whether image %s is active with a part of its bytes '
                        'is not known: %s', image_id, error)
            return
        if stored['status'] == 'active' and stored['size'] not in announced:
            LOG.warning(
                'Image %s is active with %s bytes of %d; it is deleted',
                image_id, stored['size'], announced[-1])
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
        if stored['status'] != 'active' or stored['size'] != length:
            raise exception.ImageDiffers(
                f'Image {image_id} is {stored["status"]} with '
                f'{stored["size"]} bytes; {length} were sent')
        if not verify_hash:
            return
        algorithm = stored.get('os_hash_algo')
        if not algorithm:
            raise exception.ImageDiffers(
                f'Glance gives no hash of image {image_id} to compare')
        expected = image.digest(algorithm)
        if stored.get('os_hash_value') != expected:
            raise exception.ImageDiffers(
                f'Image {image_id} has the {algorithm} '
                f'{stored.get("os_hash_value")}, and {expected} was sent')

    def _get(self, image_id: str,
             **arguments: typing.Any) -> dict[str, typing.Any]:
        found: dict[str, typing.Any] = self._request(
            'GET', f'/images/{image_id}', **arguments).json()
        return found

    def _delete(self, image_id: str) -> None:
        self._wanted = None
        try:
            with _translated(f'image {image_id}'):
                self._request('DELETE', f'/images/{image_id}')
        except exception.ImageGone:
            pass
        except exception.ImageServiceError as error:
            LOG.warning('Image %s could not be deleted: %s', image_id, error)

    def _request(self, method: str, path: str,
                 **arguments: typing.Any) -> typing.Any:
        """One request through the SDK's proxy: its auth, its session, its
        time-outs; errors as the SDK raises them.
        """
        response = self._glance.request(path, method, **arguments)
        sdk_exceptions.raise_from_response(response)
        return response

    @contextlib.contextmanager
    def _attempting(self, image_id: str) -> typing.Iterator[
            typing.Iterator['_Attempt']]:
        with _translated(f'image {image_id}'):
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
def _translated(what: str) -> typing.Iterator[None]:
    try:
        yield
    except sdk_exceptions.HttpException as error:
        # Glance's details may be HTML; the status says enough.
        message = (f'Glance refused {what}: {error.status_code} '
                   f'{_first_line(error)}')
        if error.status_code in (404, 410):
            raise exception.ImageGone(message) from error
        raise exception.ImageRefused(message) from error
    except _BROKEN as error:
        raise exception.ImageServiceUnreachable(
            f'The connection to Glance for {what} broke: {error}') from error
    except (sdk_exceptions.SDKException,
            keystone_exceptions.ClientException) as error:
        raise exception.ImageServiceUnreachable(
            f'Glance can not be used for {what}: {error}') from error


def _first_line(error: sdk_exceptions.HttpException) -> str:
    details = str(error.details or error.message or '')
    return details.strip().partition('\n')[0][:200]


def _pointer(name: str) -> str:
    """A property's JSON pointer (RFC 6901, section 3)."""
    return '/' + name.replace('~', '~0').replace('/', '~1')
