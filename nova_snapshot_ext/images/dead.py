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

"""An image in Glance whose snapshot did not live to see its end.

It is touched on a clear answer of Glance only: that it is the image of this
server, and in which state. All else changes nothing, and is asked again.
"""

import typing

from openstack import exceptions as sdk_exceptions

from nova_snapshot_ext import exception
from nova_snapshot_ext.images import base
from nova_snapshot_ext.images import glance as glance_
from nova_snapshot_ext import in_flight

#: where an image that is kept says what happened
PROPERTY = 'snapshot_ext_failure'

_TIMEOUT_S = 30
# What Nova's API writes on an image of a server, when it makes it.
_OF_SERVER = 'instance_uuid'
# An administrator may keep an image that is active from being read.
_FILLED = ('active', 'deactivated')


def settle(glance: typing.Any, snapshot: in_flight.Snapshot,
           announced: list[int], keep: str | None, patient: bool) -> str:
    """Have no image left that waits for bytes or has a part of them.

    :param glance: openstacksdk's image proxy, with rights on all images
    :param announced: the length of each body that Glance was sent
    :param keep: the reason to be written on an image that waits, None to
        delete it
    :param patient: an image that is ``saving`` may become whole yet
    :returns: what became of it
    :raises ImageGone: if Glance does not find it, or shows it to others only
    :raises ImageServiceError: if Glance gives no clear answer; nothing was
        changed, as far as one can know
    """
    name = f'image {snapshot.image_id}'
    with glance_.translated(name):
        image = _request(glance, 'GET', snapshot.image_id).json()
        if not isinstance(image, dict):
            raise exception.ImageServiceError(
                f'Glance says of {name} what makes no sense')
        if image.get(_OF_SERVER) != snapshot.instance_uuid:
            return f'{name} is not of this server, and left alone'
        status, size = image.get('status'), image.get('size')
        if status == 'active' and _is_part(size, announced):
            # Before release 31 Glance is not told the size, and may take
            # what came until then for all of it.
            _delete(glance, snapshot.image_id)
            return (f'{name} was active with {size} bytes of '
                    f'{announced[-1]}, and is deleted')
        if status == 'saving' and patient:
            raise exception.ImageServiceError(
                f'Glance may still get the last bytes of {name}')
        if status not in ('queued', 'saving'):
            return f'{name} is {status}, and left alone'
        if keep is None:
            _delete(glance, snapshot.image_id)
            return f'{name} was {status}, and is deleted'
        _patch(glance, snapshot.image_id,
               'replace' if PROPERTY in image else 'add', PROPERTY, keep)
        return f'{name} is {status}, and left with the reason in {PROPERTY}'


def is_whole(glance: typing.Any, snapshot: in_flight.Snapshot,
             announced: list[int]) -> bool:
    """Whether the image of the root disk is there for good.

    It is sent last: then those of further disks are whole as well.

    :param glance: as of :func:`settle`, which came before
    :raises ImageServiceError: if Glance gives no clear answer
    """
    image = _shown(glance, snapshot.image_id)
    return (image is not None
            and image.get(_OF_SERVER) == snapshot.instance_uuid
            and image.get('status') in _FILLED
            and image.get('size') in announced)


def settle_further(glance: typing.Any, snapshot: in_flight.Snapshot,
                   image_id: str, whole: bool, failed: bool) -> str:
    """Have the image of a further disk be there with that of the root disk,
    or not at all.

    :param image_id: of the further disk
    :param whole: what :func:`is_whole` says of that of the root disk
    :param failed: the snapshot has, as far as its owner was told: one that
        is not hidden any more is deleted as well
    :returns: what became of it
    :raises ImageGone: as :func:`settle` does
    :raises ImageServiceError: if Glance gives no clear answer
    """
    name = f'image {image_id}'
    image = _shown(glance, image_id)
    if image is None:
        raise exception.ImageGone(f'{name} is not found')
    if image.get(base.GROUP) != snapshot.image_id:
        return f'{name} is not of this snapshot, and left alone'
    hidden, status = image.get('os_hidden'), image.get('status')
    # One that is not hidden was shown when all were whole.
    if not hidden and (whole or not failed):
        return f'{name} is {status}, and left alone'
    with glance_.translated(name):
        if whole and status in _FILLED:
            _patch(glance, image_id, 'replace', 'os_hidden', False)
            return f'{name} is {status}, and not hidden any more'
        _delete(glance, image_id)
    return f'{name} of a further disk is deleted'


def _shown(glance: typing.Any,
           image_id: str) -> dict[str, typing.Any] | None:
    """An image as Glance shows it, None if it shows none.

    :raises ImageServiceError: if it gives no clear answer
    """
    name = f'image {image_id}'
    try:
        with glance_.translated(name):
            image = _request(glance, 'GET', image_id).json()
    except exception.ImageGone:
        return None
    if not isinstance(image, dict) or image.get('id') != image_id:
        raise exception.ImageServiceError(
            f'Glance says of {name} what makes no sense')
    return image


def _is_part(size: object, announced: list[int]) -> bool:
    """Whether that is less than was announced, and no whole body."""
    return (isinstance(size, int) and size not in announced
            and size < max(announced, default=0))


def _delete(glance: typing.Any, image_id: str) -> None:
    try:
        _request(glance, 'DELETE', image_id)
    except sdk_exceptions.NotFoundException:
        pass        # it was there a moment ago


def _patch(glance: typing.Any, image_id: str, operation: str, name: str,
           value: object) -> None:
    _request(
        glance, 'PATCH', image_id,
        json=[{'op': operation, 'path': f'/{name}', 'value': value}],
        headers={'Content-Type':
                 'application/openstack-images-v2.1-json-patch'})


def _request(glance: typing.Any, method: str, image_id: str,
             **arguments: typing.Any) -> typing.Any:
    response = glance.request(
        f'/images/{image_id}', method, timeout=_TIMEOUT_S, **arguments)
    sdk_exceptions.raise_from_response(response)
    return response
