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

"""The faults: what happens to a snapshot that is held at a step."""

import collections.abc
import contextlib
import dataclasses
import json
import os
import random
import signal
import typing
import uuid

import libvirt

from tests.faults import command
from tests.faults import filesystems
from tests.faults import glance
from tests.faults import plan
from tests.faults import subjects
from tests.functional import libvirtd


class Scene(typing.Protocol):
    """What a fault can reach."""

    random: random.Random
    moment: plan.Moment
    command: command.Command
    subject: subjects.Subject
    libvirtd: libvirtd.Libvirtd
    glance: glance.Glance
    #: ``scratch``, ``staging``, ``state``
    filesystems: dict[str, filesystems.SmallFileSystem]

    def start_libvirtd(self) -> None:
        """Start it after it was killed, and look everything up anew."""

    def ours(self, kind: str) -> list[int]:
        """The processes of the snapshot of one kind: ``guard``, ``mover``,
        ``qemu-nbd``, ``qemu-img``."""


Action = collections.abc.Callable[[Scene], None]


def nothing(scene: Scene) -> None:
    """What most faults need later, and nothing is mended."""


def _always(moment: plan.Moment) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Fault:
    """One kind of fault.

    :ivar inject: applies it while the command line is held
    :ivar later: a second later, when the command line goes on
    :ivar mend: when the command line has ended and the guest was looked at
    :ivar applies: whether it can come at a moment
    :ivar leaves: the state that the guest has to be in at the end, where
        that is not what it had
    :ivar service: the image service that it is tried with
    """

    name: str
    inject: Action
    later: Action = nothing
    mend: Action = nothing
    applies: collections.abc.Callable[[plan.Moment], bool] = _always
    leaves: str | None = None
    service: str = 'directory'

    def leaves_guest(self, moment: plan.Moment, before: str) -> str:
        """:param before: its state before the snapshot"""
        if self.leaves == 'undefined':
            return 'gone' if moment.state == 'off' else 'transient'
        return self.leaves or before


# Processes

def _kill_command(scene: Scene) -> None:
    scene.command.signal()


def _terminate_command(scene: Scene) -> None:
    scene.command.signal(signal.SIGTERM)


def _killing(kind: str) -> Action:
    def kill(scene: Scene) -> None:
        for pid in scene.ours(kind):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return kill


def _kill_both(scene: Scene) -> None:
    # In this order: the guard would be faster than we are.
    _killing('guard')(scene)
    _kill_command(scene)


def _stop_mover(scene: Scene) -> None:
    for pid in scene.ours('mover'):
        os.kill(pid, signal.SIGSTOP)


def _stop_mover_and_kill_command(scene: Scene) -> None:
    # One that runs ends by itself when nobody wants its image any more.
    _stop_mover(scene)
    _kill_command(scene)


def _with_process(kind: str) -> Fault:
    return Fault(f'{kind} killed', _killing(kind),
                 applies=lambda moment: kind in moment.processes)


# libvirt and the guest

def _kill_libvirtd(scene: Scene) -> None:
    scene.libvirtd.kill()


def _kill_libvirtd_and_command(scene: Scene) -> None:
    scene.libvirtd.kill()
    _kill_command(scene)


def _start_libvirtd(scene: Scene) -> None:
    scene.start_libvirtd()


def _kill_qemu(scene: Scene) -> None:
    pid = scene.subject.qemu()
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


def _runs(moment: plan.Moment) -> bool:
    return moment.state == 'running'


def _is_on(moment: plan.Moment) -> bool:
    return moment.state in ('running', 'paused')


def _undefine(scene: Scene) -> None:
    scene.subject.guest.domain.undefineFlags(
        libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE)


def _destroy(scene: Scene) -> None:
    scene.subject.guest.domain.destroy()


def _destroy_and_undefine(scene: Scene) -> None:
    _destroy(scene)
    _undefine(scene)


def _shut_down(scene: Scene) -> None:
    scene.subject.guest.domain.shutdownFlags(
        libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)


def _reset(scene: Scene) -> None:
    scene.subject.guest.domain.reset(0)


def _reboot_host(scene: Scene) -> None:
    """Nothing runs afterwards but libvirtd, and the boot has another id."""
    for kind in ('guard', 'mover', 'qemu-nbd', 'qemu-img'):
        _killing(kind)(scene)
    _kill_command(scene)
    scene.libvirtd.kill()
    _kill_qemu(scene)
    state = scene.filesystems['state']
    for name in state.names():
        if name.endswith('.undo'):
            path = state.path / name
            head, rest = path.read_text().split('\n', 1)
            path.write_text(json.dumps(
                json.loads(head) | {'boot_id': str(uuid.uuid4())})
                + '\n' + rest)
    _start_libvirtd(scene)


# File systems

def _filling(name: str) -> Action:
    return lambda scene: scene.filesystems[name].fill()


def _breaking(name: str) -> Action:
    return lambda scene: scene.filesystems[name].make_read_only()


def _mending(name: str) -> Action:
    return lambda scene: scene.filesystems[name].mend(
        lambda: scene.ours('guard'))


# Glance

def _refusing(what: str, status: int) -> Action:
    def refuse(scene: Scene) -> None:
        scene.glance.tell(refuse={what: status})
    return refuse


def _cut(scene: Scene) -> None:
    scene.glance.tell(cut_at=scene.random.random())


def _delete_image(scene: Scene) -> None:
    scene.glance.tell(delete=True)


def _of_glance(said: str, inject: Action, later: Action = nothing,
               mend: Action = nothing) -> Fault:
    return Fault(f'Glance {said}', inject, later, mend, service='glance')


FAULTS = (
    Fault('command line killed', _kill_command),
    Fault('command line terminated', _terminate_command),
    Fault('command line and guard killed', _kill_both),
    *(_with_process(kind)
      for kind in ('guard', 'mover', 'qemu-nbd', 'qemu-img')),
    Fault('mover stopped', _stop_mover,
          applies=lambda moment: 'mover' in moment.processes),
    Fault('mover stopped, command line killed', _stop_mover_and_kill_command,
          applies=lambda moment: 'mover' in moment.processes),
    Fault('libvirtd killed, restarted', _kill_libvirtd, _start_libvirtd),
    Fault('libvirtd and command line killed', _kill_libvirtd_and_command,
          _start_libvirtd),
    Fault('QEMU killed', _kill_qemu, applies=_is_on, leaves='off'),
    Fault('guest powers off', _shut_down, applies=_runs, leaves='off'),
    Fault('guest is reset', _reset, applies=_runs),
    Fault('guest destroyed', _destroy, applies=_is_on, leaves='off'),
    Fault('guest undefined', _undefine, leaves='undefined'),
    Fault('guest destroyed, undefined', _destroy_and_undefine,
          applies=_is_on, leaves='gone'),
    *(Fault(f'{said} {how}', action(name), mend=_mending(name))
      for name, said in (('scratch', 'scratch'), ('staging', 'staging'),
                         ('state', 'undo log'))
      for how, action in (('full', _filling), ('read-only', _breaking))),
    Fault('host rebooted', _reboot_host, leaves='off'),
    _of_glance('killed', lambda scene: scene.glance.kill(),
               mend=lambda scene: scene.glance.restart()),
    _of_glance('stopped', lambda scene: scene.glance.stop(),
               later=lambda scene: scene.glance.go_on()),
    _of_glance('answers 401', _refusing('*', 401)),
    _of_glance('answers 409', _refusing('PUT /file', 409)),
    _of_glance('answers 413', _refusing('PUT /file', 413)),
    _of_glance('answers 500', _refusing('*', 500)),
    _of_glance('answers 503', _refusing('*', 503)),
    _of_glance('cuts the connection', _cut),
    _of_glance('deletes the image', _delete_image),
    Fault('command line killed, Glance', _kill_command, service='glance'),
)
BY_NAME = {fault.name: fault for fault in FAULTS}
