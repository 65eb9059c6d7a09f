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

"""Hashes of files, computed in a process of their own."""

from nova_snapshot_ext import cancellation as cancellations
from nova_snapshot_ext import exception
from nova_snapshot_ext import processes

# coreutils' names of what hashlib and Glance call so.
_PROGRAMS = {name: f'{name}sum' for name in
             ('md5', 'sha1', 'sha224', 'sha256', 'sha384', 'sha512')}


def of_file(path: str, algorithm: str, timeout: int | None = None,
            cancellation: cancellations.Cancellation | None = None) -> str:
    """The hash of a file, in hexadecimal.

    :param algorithm: as hashlib names it
    :param timeout: seconds after which it is given up
    :param cancellation: ends it, too
    :raises TransferFailed: if it can't be computed
    """
    program = _PROGRAMS.get(algorithm)
    if program is None:
        raise exception.TransferFailed(
            f'The image service hashes by {algorithm}; known are '
            f'{", ".join(_PROGRAMS)}')
    try:
        output = processes.run(program, '--binary', path, timeout=timeout,
                               cancellation=cancellation)
    except exception.CommandFailed as error:
        raise exception.TransferFailed(
            f'{path} was not hashed: {error}') from error
    # A name with a backslash or a line break makes it begin with one.
    return output.lstrip('\\').split()[0]
