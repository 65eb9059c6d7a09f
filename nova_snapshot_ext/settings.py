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

"""What configuration says of a snapshot: [snapshot_ext], and Nova's own."""

import os
import typing

from nova_snapshot_ext import disk as disks
from nova_snapshot_ext import request as requests


def state_directory(conf: typing.Any) -> str:
    """Where undo logs are kept.

    :param conf: Nova's configuration, with our options
    """
    return (conf.snapshot_ext.state_directory
            or os.path.join(conf.state_path, 'snapshot-ext'))


def request(group: typing.Any, staging: str, state: str, /,
            disks: requests.Disks | None = None,
            **others: typing.Any) -> requests.Request:
    """What [snapshot_ext] says, and what its caller says beside it.

    :param group: its options
    :param staging: the staging directory
    :param state: the state directory
    :param disks: None for what the options say
    :param others: fields of the request
    """
    return requests.Request(
        staging_directory=staging,
        scratch_directory=group.scratch_directory or staging,
        state_directory=state,
        socket_directory=group.socket_directory or state,
        managed_save_directory=group.managed_save_directory,
        freeze_timeout=group.freeze_timeout,
        copy_timeout=group.copy_timeout,
        convert_timeout=group.convert_timeout,
        on_scratch_full=group.on_scratch_full,
        mover_python=group.mover_python,
        bandwidth=group.bandwidth,
        guest_share=group.guest_share,
        read_timeout=group.read_timeout,
        save_timeout=group.save_timeout,
        disks=disks or requests.Disks(group.disks),
        **others)


def server_request(
        conf: typing.Any, disk: disks.Disk, quiesce: requests.Quiesce,
        may_stop: bool, domain: requests.DomainSnapshot,
        which: requests.Disks | None = None,
        **others: typing.Any) -> requests.Request:
    """What a snapshot of a server of Nova's is asked to be.

    :param conf: Nova's configuration, with our options
    :param disk: the root disk
    :param which: disks it is of; None for what the configuration says
    :param others: fields of the request
    """
    disabled = {}
    if conf.workarounds.disable_libvirt_livesnapshot:
        disabled['live'] = (
            '[workarounds] disable_libvirt_livesnapshot is set')
    return request(
        conf.snapshot_ext, conf.libvirt.snapshots_directory,
        state_directory(conf),
        image_format=conf.libvirt.snapshot_image_format or (
            'raw' if disk.block else disk.format),
        compress=conf.libvirt.snapshot_compression,
        quiesce=quiesce,
        staging_setting='[libvirt] snapshots_directory',
        may_stop=may_stop,
        disabled_flows=disabled,
        domain=domain,
        disks=which,
        group=domain.image_id,
        **others)
