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

"""qemu-img, run with limits, its errors as ours."""

from oslo_concurrency import processutils

from nova_snapshot_ext import cancellation as cancellations
from nova_snapshot_ext import processes

#: for reading a header: what a crafted one may cost before it is ended
INSPECT_LIMITS = processutils.ProcessLimits(
    cpu_time=30, address_space=1024 ** 3)
#: for moving data: far above what qemu-img maps, so that a fault of its
#: can't take the host's memory
CONVERT_LIMITS = processutils.ProcessLimits(
    address_space=8 * 1024 ** 3, core_file_size=0)


#: seconds for what reads or writes headers and tables only: where that takes
#: longer, storage hangs
TIMEOUT_S = 120


def run(*arguments: str, limits: processutils.ProcessLimits | None = None,
        timeout: int = TIMEOUT_S,
        cancellation: cancellations.Cancellation | None = None) -> str:
    """Run it to its end.

    :param timeout: seconds after which it is killed
    :param cancellation: ends it, too
    :returns: what it printed
    :raises CommandFailed: if it could not be run, failed or was killed
    """
    return processes.run('qemu-img', *arguments, limits=limits,
                         timeout=timeout, cancellation=cancellation)
