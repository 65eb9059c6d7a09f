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

"""Images of further disks of a backup that Nova has rotated out.

Nova keeps so many backups of a server, and deletes the images of older ones:
those that it knows, of root disks.
"""

import collections.abc
import re
import typing
import urllib.parse

from openstack import exceptions as sdk_exceptions

from nova_snapshot_ext import exception
from nova_snapshot_ext.images import base
from nova_snapshot_ext.images import glance as glance_
from nova_snapshot_ext.images import presence

#: says of which kind of backup (``daily`` …) an image of a further disk is
PROPERTY = 'snapshot_ext_backup_type'

_TIMEOUT_S = 30
_MOST = 1000
_ID = re.compile('[0-9a-f-]{36}')


def delete_rotated(glance: typing.Any, uuid: str, backup_type: str,
                   ) -> collections.abc.Iterator[str]:
    """Delete images of further disks whose root disk's image is gone.

    One that is protected stays, and one that is refused keeps no other.

    :param glance: openstacksdk's image proxy, with the rights of who has
        backups of the server taken: it is shown the images of all of them
    :param uuid: the server's
    :returns: which are deleted, one after the other
    :raises ImageServiceError: if Glance does not do it
    """
    refused: exception.ImageServiceError | None = None
    shown: dict[str, bool] = {}
    for image in _of_backups(glance, uuid, backup_type):
        if image.get('protected') or not _is_of_backup(
                image, uuid, backup_type):
            continue
        image_id, group = image['id'], image[base.GROUP]
        if group not in shown:
            shown[group] = presence.is_shown(glance, group)
        if shown[group]:
            continue
        try:
            _delete(glance, image_id)
        except exception.ImageServiceError as error:
            refused = refused or error
        else:
            yield image_id
    if refused is not None:
        raise refused


def _is_of_backup(image: dict[str, typing.Any], uuid: str,
                  backup_type: str) -> bool:
    """Whether it was made here for a further disk of such a backup.

    All of it is looked at, whatever Glance was asked for. What somebody has
    made of such an image may have its properties, but for its id.
    """
    image_id, group = image.get('id'), image.get(base.GROUP)
    return (_is_id(image_id) and _is_id(group) and image_id != group
            and image.get(base.OWN_ID) == image_id
            and image.get('instance_uuid') == uuid
            and image.get(PROPERTY) == backup_type
            and not image.get('os_hidden'))


def _is_id(value: object) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def _of_backups(glance: typing.Any, uuid: str, backup_type: str,
                ) -> list[dict[str, typing.Any]]:
    """Those that are not hidden: of backups that are whole."""
    query = urllib.parse.urlencode({
        'instance_uuid': uuid, PROPERTY: backup_type, 'limit': _MOST})
    with glance_.translated(f'the images of server {uuid}'):
        response = glance.request(
            f'/images?{query}', 'GET', timeout=_TIMEOUT_S)
        sdk_exceptions.raise_from_response(response)
        try:
            found = [dict(image) for image in response.json()['images']]
        except (KeyError, TypeError, ValueError) as error:
            raise exception.ImageServiceError(
                f'Glance says of the images of server {uuid} what makes no '
                f'sense') from error
    return found


def _delete(glance: typing.Any, image_id: str) -> None:
    try:
        with glance_.translated(f'image {image_id}'):
            response = glance.request(
                f'/images/{image_id}', 'DELETE', timeout=_TIMEOUT_S)
            sdk_exceptions.raise_from_response(response)
    except exception.ImageGone:
        pass        # it was there a moment ago
