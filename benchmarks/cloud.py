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

"""The small cloud that everything is measured on (tools/cloud)."""

import collections.abc
import contextlib
import json
import os
import pathlib
import shutil
import signal
import time
import typing

import openstack
from openstack import exceptions as sdk_exceptions
from small_cloud import compute_conf
from small_cloud import processes
from small_cloud import state as cloud_state

from benchmarks import commands
from benchmarks import contestants
from benchmarks import errors
from benchmarks import progress

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]
_TOOL = CHECKOUT / 'tools' / 'cloud'
#: begins the name of whatever we make in the cloud
PREFIX = 'benchmark-'
#: seconds; how late an image can be seen to be active
_POLL_S = 0.25
_TIMEOUT_S = 900.0


def _ignore_signals() -> None:
    """Let nobody disturb what follows: it leaves things as they were.

    By handlers, which programs that are started do not inherit.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)


class Cloud:
    """The cloud's interfaces, and its files on this host."""

    def __init__(self) -> None:
        self._state = cloud_state.State.from_environment()
        self.root = self._state.root
        os.environ['OS_CLIENT_CONFIG_FILE'] = str(self.root / 'clouds.yaml')
        self._connection = openstack.connect(cloud='small')
        self.compute: typing.Any = self._connection.compute
        self.compute.default_microversion = '2.90'
        self.images: typing.Any = self._connection.image
        self._setup: contestants.Setup | None = None
        #: a small server that is paused; what nova-compute does for the first
        #: time since its start, it does with that
        self.practice: typing.Any = None

    # Places

    @property
    def work(self) -> pathlib.Path:
        """Ours, gone at the end; on the same disk as everything else."""
        return self.root / 'benchmark'

    @property
    def staging(self) -> pathlib.Path:
        return self._state.instances / 'snapshots'

    @property
    def scratch(self) -> pathlib.Path:
        """A directory of its own, to be told from what is staged."""
        return self._state.nova / 'benchmark-scratch'

    @property
    def _store(self) -> pathlib.Path:
        """Where Glance keeps images."""
        return self.root / 'glance' / 'images'

    @property
    def guest_disk(self) -> pathlib.Path:
        """The bootable disk that tools/guest has built."""
        return self._state.guest / 'disk.img'

    def instance(self, server: typing.Any) -> pathlib.Path:
        return self._state.instances / str(server.id)

    def compute_pid(self) -> int:
        known = processes.alive(self._state, 'nova-compute')
        if known is None:
            raise errors.BenchmarkError(
                'nova-compute does not run; tools/cloud up')
        return known.pid

    @contextlib.contextmanager
    def ours(self, store_in_memory: bool,
             ) -> collections.abc.Iterator[None]:
        """Have the cloud, and leave it as it was.

        :param store_in_memory: let Glance keep images in memory, as if its
            disk were another host's
        """
        before = self._choices()
        with contextlib.ExitStack() as stack:
            stack.callback(self._restore, before)
            stack.callback(self._remove_what_is_ours)
            stack.callback(_ignore_signals)
            self._remove_what_is_ours()
            self.work.mkdir(mode=0o755)
            self.scratch.mkdir(mode=0o755)
            shutil.chown(self.scratch, 'nova', 'nova')
            if store_in_memory:
                commands.run('mount', '-t', 'tmpfs', '-o', 'mode=0750',
                             'benchmark', self._store)
            yield

    def _choices(self) -> dict[str, typing.Any]:
        """Driver and settings, as tools/cloud keeps them."""
        path = self._state.etc / 'compute-choices.json'
        if not path.exists():
            return {}
        choices: dict[str, typing.Any] = json.loads(path.read_text())
        return choices

    def _restore(self, choices: dict[str, typing.Any]) -> None:
        if choices == self._choices():
            return
        settings = [
            f'{section}.{option}={value}'
            for section, options in choices.get('overrides', {}).items()
            for option, values in options.items()
            for value in (values if isinstance(values, list) else [values])]
        self._configure(contestants.Setup(
            choices.get('driver', compute_conf.DEFAULT_DRIVER),
            tuple(settings)))

    def _remove_what_is_ours(self) -> None:
        servers = [each for each in self.compute.servers()
                   if each.name.startswith(PREFIX)]
        for server in servers:
            self.compute.delete_server(server)
        for server in servers:
            self.compute.wait_for_delete(
                server, interval=0.5, wait=_TIMEOUT_S)
        for image in self.images.images():
            if (image.name or '').startswith(PREFIX):
                self.images.delete_image(image, ignore_missing=True)
        for flavor in self.compute.flavors():
            if flavor.name.startswith(PREFIX):
                self.compute.delete_flavor(flavor)
        # A killed run leaves it; Glance may have a file of it open.
        if os.path.ismount(self._store):
            commands.run('umount', '--lazy', self._store)
        for directory in (self.work, self.scratch):
            shutil.rmtree(directory, ignore_errors=True)

    # nova-compute

    def set_up(self, setup: contestants.Setup) -> None:
        """Have nova-compute run like this; it is restarted if it does not.
        """
        if setup == self._setup:
            return
        self._setup = None
        began = time.monotonic()
        self._configure(contestants.Setup(setup.driver, (
            *setup.settings,
            f'snapshot_ext.scratch_directory={self.scratch}')))
        self._practise()
        self._setup = setup
        progress.say(f'nova-compute restarted: {setup.driver} '
                     f'{" ".join(setup.settings)} '
                     f'({time.monotonic() - began:.0f} s)')

    def _practise(self) -> None:
        """Have nova-compute sign on, load what it needs, and start its
        privileged helper (which reads consoles, too).
        """
        if self.practice is None:
            return
        self.compute.get_server_console_output(self.practice, 1)
        image_id = self.request_snapshot(self.practice, None)
        self.wait_active(image_id)
        self.wait_status(self.practice, 'PAUSED')
        self.delete_image(image_id)

    def _configure(self, setup: contestants.Setup) -> None:
        commands.run(
            _TOOL, 'configure', '--reset', '--driver', setup.driver,
            *(f'--set={setting}' for setting in setup.settings))

    # Servers

    def wait_status(self, server: typing.Any, status: str) -> None:
        """Wait until a server is in a state and nothing is done to it."""
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            now = self.compute.get_server(server.id)
            if now.status == status and now.task_state is None:
                return
            if now.status == 'ERROR' or time.monotonic() > deadline:
                raise errors.BenchmarkError(
                    f'{server.name} is {now.status} ({now.task_state}) and '
                    f'not {status}')
            time.sleep(_POLL_S)

    # Images

    def request_snapshot(self, server: typing.Any, flow: str | None) -> str:
        """Ask for a snapshot as a tenant does. :returns: the image's id"""
        image = self.compute.create_server_image(
            server, f'{PREFIX}snapshot',
            metadata={} if flow is None else {'snapshot_flow': flow})
        return str(image.id)

    def create_image(self) -> str:
        """:returns: the id of an image without data"""
        image = self.images.create_image(
            f'{PREFIX}upload', disk_format='qcow2', container_format='bare',
            allow_duplicates=True)
        return str(image.id)

    def wait_active(self, image_id: str) -> typing.Any:
        """Wait until an image is active.

        :returns: the image
        :raises BenchmarkError: if it is deleted instead
        """
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                image = self.images.get_image(image_id)
            except sdk_exceptions.NotFoundException:
                break
            if image.status == 'active':
                return image
            time.sleep(_POLL_S)
        raise errors.BenchmarkError(
            f'image {image_id} did not become active; '
            f'tools/cloud logs nova-compute')

    def delete_image(self, image_id: str) -> None:
        self.images.delete_image(image_id, ignore_missing=True)
