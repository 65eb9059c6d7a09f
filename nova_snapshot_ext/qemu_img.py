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

import contextlib
import subprocess

from oslo_concurrency import processutils

from nova_snapshot_ext import cancellation as cancellations
from nova_snapshot_ext import exception

#: for reading a header: what a crafted one may cost before it is ended
INSPECT_LIMITS = processutils.ProcessLimits(
    cpu_time=30, address_space=1024 ** 3)
#: for moving data: far above what qemu-img maps, so that a fault of its
#: can't take the host's memory
CONVERT_LIMITS = processutils.ProcessLimits(
    address_space=8 * 1024 ** 3, core_file_size=0)


def run(*arguments: str, limits: processutils.ProcessLimits | None = None,
        timeout: int | None = None,
        cancellation: cancellations.Cancellation | None = None) -> str:
    """Run it to its end.

    :param timeout: seconds after which it is killed
    :param cancellation: ends it, too
    :returns: what it printed
    :raises CommandFailed: if it could not be run, failed or was killed
    """
    started: list['subprocess.Popen[bytes]'] = []
    ending = contextlib.ExitStack()

    def may_be_ended(process: 'subprocess.Popen[bytes]') -> None:
        started.append(process)
        if cancellation is not None:
            ending.enter_context(cancellation.ending(process.terminate))

    try:
        output, _ = processutils.execute(
            'qemu-img', *arguments, prlimit=limits, timeout=timeout,
            on_execute=may_be_ended)
    except processutils.ProcessExecutionError as error:
        raise exception.CommandFailed(
            f'qemu-img {arguments[0]} failed: '
            f'{(error.stderr or "").strip() or error}') from error
    except OSError as error:
        raise exception.CommandFailed(
            f'qemu-img can not be run: {error}') from error
    except Exception as error:
        # Under eventlet it is a class of eventlet's own.
        if type(error).__name__ != 'TimeoutExpired':
            raise
        raise exception.CommandFailed(
            f'qemu-img {arguments[0]} took longer than '
            f'{timeout} seconds') from error
    finally:
        ending.close()
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    return str(output)
