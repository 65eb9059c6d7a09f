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

"""What nova-compute's configuration says of a snapshot."""

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


def request(conf: typing.Any, disk: disks.Disk, quiesce: requests.Quiesce,
            may_stop: bool, domain: requests.DomainSnapshot,
            ) -> requests.Request:
    """What a snapshot of a server is asked to be, but for the server itself.

    :param conf: Nova's configuration, with our options
    :param disk: the root disk
    """
    group = conf.snapshot_ext
    directory = conf.libvirt.snapshots_directory
    disabled = {}
    if conf.workarounds.disable_libvirt_livesnapshot:
        disabled['live'] = (
            '[workarounds] disable_libvirt_livesnapshot is set')
    return requests.Request(
        image_format=conf.libvirt.snapshot_image_format or (
            'raw' if disk.block else disk.format),
        compress=conf.libvirt.snapshot_compression,
        quiesce=quiesce,
        staging_directory=directory,
        staging_setting='[libvirt] snapshots_directory',
        scratch_directory=group.scratch_directory or directory,
        state_directory=state_directory(conf),
        socket_directory=group.socket_directory or state_directory(conf),
        managed_save_directory=group.managed_save_directory,
        freeze_timeout=group.freeze_timeout,
        copy_timeout=group.copy_timeout,
        convert_timeout=group.convert_timeout,
        may_stop=may_stop,
        disabled_flows=disabled,
        on_scratch_full=group.on_scratch_full,
        mover_python=group.mover_python,
        bandwidth=group.bandwidth,
        guest_share=group.guest_share,
        read_timeout=group.read_timeout,
        save_timeout=group.save_timeout,
        domain=domain)
