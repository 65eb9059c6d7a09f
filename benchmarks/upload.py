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

"""The floor: python-glanceclient uploads a file, when told to.

Run with the cloud's own Python: ``upload.py IMAGE FILE``. It says ``ready``
when it is signed on, and begins when it is sent a line.
"""

import os
import sys

import glanceclient
import openstack


def main(image_id: str, path: str) -> None:
    connection = openstack.connect(cloud='small')
    client = glanceclient.Client('2', session=connection.session)
    client.images.get(image_id)
    print('ready', flush=True)
    sys.stdin.readline()
    with open(path, 'rb') as file:
        # As our images are: their size is announced.
        client.images.upload(
            image_id, file, image_size=os.stat(path).st_size)


if __name__ == '__main__':
    main(*sys.argv[1:])
