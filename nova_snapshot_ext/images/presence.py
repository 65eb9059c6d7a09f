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

"""Whether Glance has an image, asked by who may see those of any project."""

import typing

from openstack import exceptions as sdk_exceptions

from nova_snapshot_ext import exception
from nova_snapshot_ext.images import glance as glance_

_TIMEOUT_S = 30
_DELETED = ('deleted', 'pending_delete')


def is_shown(glance: typing.Any, image_id: str) -> bool:
    """Whether Glance shows an image that was not deleted.

    It says the same of one that is not there and of one that one may not
    see: False tells something only to who was shown it before.

    :param glance: openstacksdk's image proxy
    :raises ImageServiceError: if Glance gives no clear answer
    """
    try:
        with glance_.translated(f'image {image_id}'):
            response = glance.request(
                f'/images/{image_id}', 'GET', timeout=_TIMEOUT_S)
            sdk_exceptions.raise_from_response(response)
            image = response.json()
    except exception.ImageGone:
        return False
    if not isinstance(image, dict) or image.get('id') != image_id:
        raise exception.ImageServiceError(
            f'Glance says of image {image_id} what makes no sense')
    return image.get('status') not in _DELETED
