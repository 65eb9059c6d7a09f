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

"""What Nova's root daemon does for us, asked by a user without rights.

Arguments: a configuration file, and an empty directory that the user may
enter. The result is one line of JSON: by a request's name, the owner and
group of what it was for, or the error.
"""

import json
import os
import socket
import sys

import nova.conf
import nova.privsep
from oslo_privsep import priv_context

from nova_snapshot_ext import exception
from nova_snapshot_ext import privileged

NOBODY = 65534
GROUP = 4242
SERVER = '5ee7e4f9-6b1f-4d8a-8d7e-0a1b2c3d4e5f'


def main(configuration: str, directory: str) -> None:
    nova.conf.CONF([], project='nova', default_config_files=[configuration])
    context = nova.privsep.sys_admin_pctxt
    context.conf.helper_command = ' '.join((
        os.path.join(os.path.dirname(sys.executable), 'privsep-helper'),
        '--config-file', configuration))
    # A process of its own, as rootwrap starts it.
    context.start(priv_context.Method.ROOTWRAP)
    server = os.path.join(directory, SERVER)
    os.mkdir(server)
    disk, theirs = os.path.join(server, 'disk'), f'{directory}/theirs'
    for path in (disk, theirs):
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    ours = os.path.join(directory, 'snapshot-ext-0123abcd')
    os.mkdir(ours, mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f'{ours}/nbd')
    os.symlink(theirs, f'{ours}/link')
    os.chown(ours, NOBODY, -1)
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    found = {}
    for name, function, path, *owner in (
            ('socket', privileged.take_socket, f'{ours}/nbd'),
            ('link', privileged.take_socket, f'{ours}/link'),
            ('directory', privileged.let_group_pass, ours, GROUP),
            ('other', privileged.let_group_pass, directory, GROUP),
            ('disk', privileged.give_disk, disk, NOBODY, GROUP),
            ('theirs', privileged.give_disk, theirs, NOBODY, GROUP)):
        try:
            function(path, *owner)
        except exception.NotOurs as error:
            found[name] = str(error)
        else:
            status = os.stat(path)
            found[name] = [status.st_uid, status.st_gid]
    print(json.dumps(found))
    context.stop()


if __name__ == '__main__':
    main(*sys.argv[1:])
