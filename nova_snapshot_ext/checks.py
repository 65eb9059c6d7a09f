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

"""Whether a compute host is ready for this package; nothing is touched.

Each check takes nova-compute's configuration and gives its result. It reads
files, asks libvirt and starts the mover's interpreter, with the rights of
whoever calls it: those of nova-compute's user say what nova-compute could do.
"""

import collections
import collections.abc
import dataclasses
import os
import shutil

import libvirt
from oslo_config import cfg
from oslo_log import log as logging
from oslo_upgradecheck import upgradecheck

from nova_snapshot_ext import config_source
from nova_snapshot_ext import exception
from nova_snapshot_ext import guest as guests_
from nova_snapshot_ext import mover_stream
from nova_snapshot_ext import nova_interface
from nova_snapshot_ext import own_disks
from nova_snapshot_ext import plugins
from nova_snapshot_ext import request as requests
from nova_snapshot_ext import scratch
from nova_snapshot_ext import selection
from nova_snapshot_ext import settings
from nova_snapshot_ext import workspace

LOG = logging.getLogger(__name__)

Check = collections.abc.Callable[[cfg.ConfigOpts], upgradecheck.Result]

_PROGRAMS = ('qemu-img', 'qemu-nbd', 'sha512sum')
#: room for the images of one ordinary server, below which staging is a risk
_LITTLE_ROOM = 20 * 1024 ** 3


@dataclasses.dataclass(frozen=True)
class _Fault:
    """What a release of libvirt or QEMU mended."""

    mended_in: tuple[int, int, int]
    words: str


# From libvirt's NEWS and QEMU's change logs, and from what was seen here.
_LIBVIRT_FAULTS = (
    _Fault((9, 1, 0), 'block jobs may not be ended in good order'),
    _Fault((9, 10, 0), 'reverting a guest to an internal snapshot can crash '
           'libvirtd'),
    _Fault((10, 8, 0), 'other programs that ask for statistics during a '
           'backup job can crash libvirtd'),
)
_OLDEST_LIBVIRT = (8, 0, 0)
_OLDEST_QEMU = (6, 2, 0)


class _Findings:
    """Gathers what one check has to say."""

    def __init__(self) -> None:
        self._failures: list[str] = []
        self._warnings: list[str] = []

    def fail(self, words: str) -> None:
        self._failures.append(words)

    def warn(self, words: str) -> None:
        self._warnings.append(words)

    def result(self, fine: str) -> upgradecheck.Result:
        """:param fine: what to say where nothing is in the way"""
        words = '; '.join(self._failures + self._warnings)
        if self._failures:
            return upgradecheck.Result(upgradecheck.Code.FAILURE, words)
        if self._warnings:
            return upgradecheck.Result(upgradecheck.Code.WARNING, words)
        return upgradecheck.Result(upgradecheck.Code.SUCCESS, fine)


def loading(conf: cfg.ConfigOpts) -> upgradecheck.Result:
    """Whether nova-compute would load the driver."""
    found = _Findings()
    if conf.compute_driver != config_source.COMPUTE_DRIVER:
        found.fail(
            f'[DEFAULT] compute_driver is {conf.compute_driver}: remove it, '
            f'or set it to {config_source.COMPUTE_DRIVER}. Where nothing '
            f'sets it, [DEFAULT] config_source = snapshot_ext and '
            f'[snapshot_ext] driver = snapshot_ext are missing')
    elif 'snapshot_ext' not in conf.config_source:
        found.fail('[DEFAULT] config_source does not name snapshot_ext: '
                   'nova.virt.snapshot_ext can not be imported')
    return found.result(f'nova-compute loads {conf.compute_driver}')


def options(conf: cfg.ConfigOpts) -> upgradecheck.Result:
    """Whether the names in [snapshot_ext] stand for something."""
    found = _Findings()
    group = conf.snapshot_ext
    for error in plugins.unknown(group):
        found.fail(str(error))
    if group.image_service == 'directory' and not group.image_directory:
        found.fail('[snapshot_ext] image_service = directory needs '
                   'image_directory')
    if conf.libvirt.virt_type not in nova_interface.VIRT_TYPES:
        found.fail(
            f'[libvirt] virt_type is {conf.libvirt.virt_type}: every '
            f"snapshot would be Nova's own; served are "
            f'{", ".join(nova_interface.VIRT_TYPES)}')
    if 'streamed' in group.transfers and conf.libvirt.snapshot_compression:
        found.warn('[libvirt] snapshot_compression is set: the transfer '
                   'staged serves all snapshots, as streamed does not '
                   'compress')
    if (group.on_scratch_full == 'live'
            and conf.workarounds.disable_libvirt_livesnapshot):
        found.warn('[snapshot_ext] on_scratch_full = live has no effect with '
                   '[workarounds] disable_libvirt_livesnapshot')
    return found.result(f'flows {", ".join(group.flows)}, transfers '
                        f'{", ".join(group.transfers)}')


def nova(conf: cfg.ConfigOpts) -> upgradecheck.Result:
    """Whether this Nova has what the driver overrides and calls."""
    found = _Findings()
    for words in nova_interface.differences():
        found.fail(f'this release of Nova is not served: {words}')
    version = nova_interface.version()
    if version not in nova_interface.TESTED:
        found.warn(f'Nova {version} was not tested; tested are '
                   f'{", ".join(map(str, nova_interface.TESTED))}')
    return found.result(f'Nova {version}')


def hypervisor(conf: cfg.ConfigOpts) -> upgradecheck.Result:
    """What is known of this libvirt and this QEMU."""
    found = _Findings()
    uri = _uri(conf)
    try:
        connection = libvirt.openReadOnly(uri)
        try:
            ours = _version(connection.getLibVersion())
            qemu = _version(connection.getVersion())
        finally:
            connection.close()
    except libvirt.libvirtError as error:
        found.fail(f'libvirt at {uri} can not be asked: {error}')
        return found.result('')
    if ours < _OLDEST_LIBVIRT or qemu < _OLDEST_QEMU:
        found.fail(
            f'libvirt {_shown(ours)} and QEMU {_shown(qemu)} are too old: '
            f'{_shown(_OLDEST_LIBVIRT)} and {_shown(_OLDEST_QEMU)} are the '
            f'oldest that Nova takes')
    for fault in _LIBVIRT_FAULTS:
        if ours < fault.mended_in:
            found.warn(f'libvirt {_shown(ours)}: {fault.words} (mended in '
                       f'{_shown(fault.mended_in)})')
    return found.result(f'libvirt {_shown(ours)}, QEMU {_shown(qemu)}')


def programs(conf: cfg.ConfigOpts) -> upgradecheck.Result:
    """Whether what is run beside QEMU is installed."""
    found = _Findings()
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        found.fail(f'{", ".join(missing)} can not be found in PATH (Debian, '
                   f'Ubuntu: qemu-utils, coreutils)')
    if 'streamed' in conf.snapshot_ext.transfers:
        why = mover_stream.why_not(conf.snapshot_ext.mover_python)
        if why is not None:
            found.warn(f'the transfer streamed can not serve: {why}')
    return found.result('qemu-img, qemu-nbd, libnbd')


def directories(conf: cfg.ConfigOpts) -> upgradecheck.Result:
    """Whether there is a place, and room, for what a snapshot needs."""
    found = _Findings()
    group = conf.snapshot_ext
    staging = conf.libvirt.snapshots_directory
    scratches = group.scratch_directory or staging
    state = settings.state_directory(conf)
    for path, setting in ((staging, '[libvirt] snapshots_directory'),
                          (scratches, '[snapshot_ext] scratch_directory'),
                          (state, '[snapshot_ext] state_directory')):
        try:
            # What is missing is made when it is needed.
            workspace.check_directory(_nearest(path), setting)
        except exception.InvalidSetting as error:
            found.fail(str(error))
    try:
        workspace.check_socket_parent(group.socket_directory or state)
    except exception.InvalidSetting as error:
        found.fail(str(error))
    least = scratch.least_bytes(2 ** 63)
    if workspace.free_bytes(scratches) < least:
        found.fail(f'{scratches} has no room for the {least} bytes that the '
                   f'scratch of a backup job begins with; [snapshot_ext] '
                   f'scratch_directory can name another place')
    if 'staged' in group.transfers:
        free = workspace.free_bytes(staging)
        if free < _LITTLE_ROOM:
            found.warn(f'{staging} has {free} bytes free, and the transfer '
                       f'staged and the flow live need as much as an image')
    return found.result(f'{staging}, {scratches}, {state}')


def rights(conf: cfg.ConfigOpts) -> upgradecheck.Result:
    """Whether who calls this has the rights of nova-compute."""
    found = _Findings()
    if os.geteuid():
        helper = nova_interface.root_helper(conf)
        if shutil.which(helper) is None:
            found.fail(f"{helper}, by which Nova's privileged helper is "
                       f'started, can not be found')
    else:
        found.warn("run it as nova-compute's user: what root may do says "
                   'nothing of what that user may')
    return found.result(f'user {os.geteuid()}')


def confinement(conf: cfg.ConfigOpts) -> upgradecheck.Result:
    """Whether a security module confines QEMU, which was not tested."""
    found = _Findings()
    for name, path, on in (
            ('AppArmor', '/sys/module/apparmor/parameters/enabled', 'Y'),
            ('SELinux', '/sys/fs/selinux/enforce', '1')):
        try:
            with open(path) as file:
                if file.read().strip() == on:
                    found.warn(
                        f'{name} is in force, with which this package was '
                        f'not tested: QEMU must be let into [snapshot_ext] '
                        f'scratch_directory and socket_directory. Where it '
                        f'is not, the flow backup fails before anything is '
                        f'frozen, and the next flow serves')
        except OSError:
            continue
    return found.result('neither AppArmor nor SELinux is in force')


def guests(conf: cfg.ConfigOpts) -> upgradecheck.Result:
    """Which flow would serve each guest on this host."""
    found = _Findings()
    serving: collections.Counter[str] = collections.Counter()
    uri = _uri(conf)
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as error:
        found.fail(f'libvirt at {uri} can not be used: {error}')
        return found.result('')
    try:
        for domain in connection.listAllDomains():
            guest = guests_.Guest(domain, uri)
            try:
                serving[_flow_of(conf, guest)] += 1
            except exception.SnapshotError as error:
                found.warn(f'{guest.name}: {error}')
    finally:
        connection.close()
    return found.result(', '.join(
        f'{name} would serve {count}'
        for name, count in serving.most_common()) or 'there is no guest')


def _flow_of(conf: cfg.ConfigOpts, guest: guests_.Guest) -> str:
    """The flow that would serve a guest now.

    :raises SnapshotError: if none would
    """
    disk = guest.root_disk()
    request = settings.server_request(
        conf, disk, requests.Quiesce.IF_POSSIBLE, may_stop=True,
        domain=requests.DomainSnapshot())
    # nova-compute makes it with the first snapshot of a host.
    request = dataclasses.replace(
        request, scratch_directory=_nearest(request.scratch_directory))
    disks = tuple(
        each.disk for each in own_disks.chosen(guest, request.disks))
    return selection.candidates(
        selection.wish(None, None, conf.snapshot_ext.flows, []), guest,
        disks, request)[0].name


#: by the names that the command shows
ALL: dict[str, Check] = {
    'Loading of the driver': loading,
    'Settings': options,
    'Nova': nova,
    'libvirt and QEMU': hypervisor,
    'Programs': programs,
    'Directories': directories,
    'Rights': rights,
    'Guests': guests,
    'Security modules': confinement,
}


def _uri(conf: cfg.ConfigOpts) -> str:
    uri: str = conf.libvirt.connection_uri or 'qemu:///system'
    return uri


def checked(check: Check, conf: cfg.ConfigOpts) -> upgradecheck.Result:
    """The result of a check, also of one that could not be made."""
    try:
        return check(conf)
    except Exception as error:
        return upgradecheck.Result(
            upgradecheck.Code.FAILURE,
            f'it could not be checked: {type(error).__name__}: {error}')


#: what nova-compute says at its start where something is in the way; the
#: rest it finds out for itself, or takes long
_AT_START = ('Nova', 'Programs', 'Directories', 'Security modules')


def say_at_start(conf: cfg.ConfigOpts) -> None:
    """Log what deserves attention; nothing keeps nova-compute from starting.
    """
    for name in _AT_START:
        result = checked(ALL[name], conf)
        if result.code is not upgradecheck.Code.SUCCESS:
            LOG.log(logging.ERROR
                    if result.code is upgradecheck.Code.FAILURE
                    else logging.WARNING, '%s: %s', name, result.details)


def _version(number: int) -> tuple[int, int, int]:
    """As virGetVersion() counts: 1,000,000 * major + 1,000 * minor + release
    """
    return number // 1000000, number // 1000 % 1000, number % 1000


def _shown(version: tuple[int, int, int]) -> str:
    return '.'.join(map(str, version))


def _nearest(path: str) -> str:
    """A directory, or the nearest parent of one that is missing."""
    path = os.path.abspath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path
