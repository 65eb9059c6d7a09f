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

"""One snapshot, or one upload, with everything around it measured."""

import collections.abc
import contextlib
import os
import pathlib
import subprocess
import sys
import time
import typing

from benchmarks import cloud as clouds
from benchmarks import console
from benchmarks import contestants
from benchmarks import errors
from benchmarks import guests
from benchmarks import proc
from benchmarks import progress
from benchmarks import results
from benchmarks import touched
from benchmarks import watching

_DROP_CACHES = pathlib.Path('/proc/sys/vm/drop_caches')
_UPLOAD = pathlib.Path(__file__).with_name('upload.py')


def settle(drop_caches: bool) -> None:
    """Let what came before write what it left, and forget what it read."""
    os.sync()
    if drop_caches:
        _DROP_CACHES.write_text('3\n')


def can_drop_caches() -> bool:
    try:
        _DROP_CACHES.write_text('1\n')
    except OSError:
        return False
    return True


def measure(cloud: clouds.Cloud, guest: guests.Guest,
            contestant: contestants.Contestant, number: int, *,
            idle_s: float, drop_caches: bool) -> results.Snapshot:
    """Measure one contestant; no image is left.

    :param number: of the round
    :param idle_s: how long the guest is watched alone before
    """
    if contestant.setup is not None:
        cloud.set_up(contestant.setup)
    settle(drop_caches)
    qemu = watching.Qemu(str(guest.server.id))
    with console.Follower(guest.console) as follower:
        idle_from = time.monotonic()
        time.sleep(idle_s)
        idle_until = time.monotonic()
        qemu.look()
        idle_qemu = qemu.seconds / (idle_until - idle_from)
        with _request(cloud, guest, contestant) as request:
            qemu = watching.Qemu(str(guest.server.id))
            pid = request.pid
            before = proc.used(pid)
            device_before = proc.device_written_bytes(cloud.root)
            with _touched(guest, contestant) as clusters, watching.Watch(
                    cloud.staging, cloud.scratch, qemu) as watch:
                began = time.monotonic()
                image_id = request.send()
                image = cloud.wait_active(image_id)
                ended = time.monotonic()
                # Files are removed, and processes end, after that.
                request.finish()
            used = proc.used(pid).since(before)
        os.sync()
        device_after = proc.device_written_bytes(cloud.root)
        if not follower.wait_past(ended, 60):
            raise errors.BenchmarkError(
                f'{guest.server.name} stopped writing under '
                f'{contestant.name}')
    _check(contestant, image.properties)
    cloud.delete_image(image_id)
    moments = follower.moments
    pause = image.properties.get('snapshot_ext_guest_pause_ms')
    measured = results.Snapshot(
        contestant=contestant.name, round=number, data_gib=guest.data_gib,
        seconds=ended - began, image_bytes=image.size,
        staged_bytes=watch.staged_bytes, scratch_bytes=watch.scratch_bytes,
        reserved_bytes=watch.reserved_bytes,
        touched_bytes=clusters.bytes if clusters else None,
        written_bytes=used.written_bytes if contestant.setup else 0,
        device_bytes=(None if device_before is None or device_after is None
                      else device_after - device_before),
        pause_s=int(pause) / 1000 if pause is not None else None,
        silence_s=console.longest_silence(moments, began, ended),
        idle_silence_s=console.longest_silence(
            moments, idle_from, idle_until),
        rounds_per_s=console.rounds_between(
            moments, began, ended) / (ended - began),
        idle_rounds_per_s=console.rounds_between(
            moments, idle_from, idle_until) / (idle_until - idle_from),
        compute_cpu_s=used.own_s, children_cpu_s=used.children_s,
        qemu_cpu_s=qemu.seconds, idle_qemu_cpu=idle_qemu)
    progress.say(
        f'round {number}, {guest.data_gib:g} GiB, {contestant.name}: '
        f'{measured.seconds:.1f} s, guest at '
        f'{100 * (measured.share or 0):.0f} % of '
        f'{measured.idle_rounds_per_s:.0f} rounds a second, silent for '
        f'{measured.silence_s:.2f} s, staged '
        f'{measured.staged_bytes / guests.GIB:.2f} GiB')
    return measured


class _Request(typing.Protocol):
    """What is asked for, and the process that does it."""

    pid: int

    def send(self) -> str:
        """:returns: the image's id"""

    def finish(self) -> None:
        """Wait until nothing of it is left to do."""


class _SnapshotRequest:
    def __init__(self, cloud: clouds.Cloud, guest: guests.Guest,
                 flow: str | None) -> None:
        self._cloud = cloud
        self._server = guest.server
        self._flow = flow
        self.pid = cloud.compute_pid()

    def send(self) -> str:
        return self._cloud.request_snapshot(self._server, self._flow)

    def finish(self) -> None:
        self._cloud.wait_status(self._server, 'ACTIVE')


class _UploadRequest:
    """An upload in a process of its own, which is started before."""

    def __init__(self, image_id: str, process: 'subprocess.Popen[str]',
                 ) -> None:
        self._image_id = image_id
        self._process = process
        self.pid = process.pid

    def send(self) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write('\n')
        self._process.stdin.flush()
        return self._image_id

    def finish(self) -> None:
        """It is not reaped here: what it used can be seen until then."""
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)


@contextlib.contextmanager
def _request(cloud: clouds.Cloud, guest: guests.Guest,
             contestant: contestants.Contestant,
             ) -> collections.abc.Iterator[_Request]:
    if contestant.setup is not None:
        yield _SnapshotRequest(cloud, guest, contestant.flow)
        return
    image_id = cloud.create_image()
    process = subprocess.Popen(
        [sys.executable, str(_UPLOAD), image_id, str(guest.finished)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != 'ready\n':
            raise errors.BenchmarkError(f'{_UPLOAD} can not sign on')
        yield _UploadRequest(image_id, process)
    finally:
        process.kill()
        process.communicate()


def _touched(
        guest: guests.Guest, contestant: contestants.Contestant,
) -> contextlib.AbstractContextManager[touched.Touched | None]:
    """Only a backup job has a scratch to compare it with."""
    if contestant.flow != 'backup':
        return contextlib.nullcontext()
    return touched.counted(str(guest.server.id))


def _check(contestant: contestants.Contestant,
           properties: dict[str, typing.Any]) -> None:
    """:raises BenchmarkError: if something else served"""
    if contestant.setup is None:
        return
    served = (properties.get('snapshot_ext_flow'),
              properties.get('snapshot_ext_transfer'))
    if served != (contestant.flow, contestant.transfer):
        raise errors.BenchmarkError(
            f'{contestant.name}: served were flow and transfer {served}')
