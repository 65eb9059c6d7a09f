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

"""The options of [snapshot_ext]."""

import typing

from oslo_config import cfg

GROUP = cfg.OptGroup(
    'snapshot_ext',
    title='Instance snapshots',
    help="""
How instance snapshots are taken by ``nova_snapshot_ext``.

To load it, nova.conf of nova-compute names it as a source of configuration::

    [DEFAULT]
    config_source = snapshot_ext
    [snapshot_ext]
    driver = snapshot_ext
""")

OPTS = [
    cfg.ListOpt(
        'flows',
        default=['backup', 'live', 'cold'],
        help="""
The flows that may serve when nobody asks for one, best first.

The first flow that can serve a guest as it is now takes the snapshot. Why
each earlier one was passed over is logged.

Possible values:

* names of installed flows: ``backup`` (a running guest, by a backup job with
  a scratch), ``live`` (a running guest, by a block copy), ``cold`` (a guest
  that is off, or stopped for a moment by a managed save), ``domain`` (one that
  stays in the guest's disks, to be rolled back to: better asked for)

Related options:

* ``request_flows``
* ``[workarounds] disable_libvirt_livesnapshot`` takes ``live`` out
"""),
    cfg.ListOpt(
        'request_flows',
        default=['backup', 'live', 'cold', 'domain'],
        help="""
The flows that a tenant may ask for by the image property ``snapshot_flow``.

A flow that a flavor names by the extra spec ``snapshot_ext:flow`` is the
operator's choice, and need not be listed.

Possible values:

* names of installed flows, or nothing to refuse every such request

Related options:

* ``max_domain_snapshots`` and ``max_domain_snapshots_gb`` limit what
  ``domain`` leaves on the host
"""),
    cfg.IntOpt(
        'max_domain_snapshots',
        default=8,
        min=0,
        help="""
How many snapshots of the flow ``domain`` one guest may have.

Each stays in the guest's disks until its image, or the server, is deleted.

Possible values:

* 0: none is taken
* a number
"""),
    cfg.IntOpt(
        'max_domain_snapshots_gb',
        default=100,
        min=0,
        help="""
GiB that the disks of one guest may take on the host beyond their size for the
flow ``domain`` to take another snapshot.

A snapshot holds the guest's memory, as far as it is in use, and whatever of
the disks the guest overwrites or deletes afterwards. What is looked at is what
the files take (as ``du`` shows it) with the memory that would be added. It is
looked at when a snapshot is asked for only: what the guest overwrites later is
not limited by it, and is at most the disks' size for each snapshot.

Possible values:

* 0: no such limit
* a number of GiB

Related options:

* ``max_domain_snapshots``
"""),
    cfg.StrOpt(
        'disks',
        default='root',
        choices=[
            ('root', 'the root disk, as of Nova\'s own snapshots'),
            ('all', 'the ephemeral disks and the swap disk as well, at the '
                    'same instant'),
        ],
        help="""
The disks that a snapshot is of.

Each becomes an image of its own. Those of further disks belong to the
project of the root disk's image, are private, and appear with it or not at
all. Volumes, CD-ROMs and config drives are never included. Shelving and
cross-cell resizes are of the root disk alone: Nova deletes their image when
it is used.

A tenant can ask for one or the other by the image property
``snapshot_disks``, which goes first.

Related options:

* ``scratch_directory`` has the scratch of each disk
* ``dead_image`` says what becomes of images of a dead nova-compute
"""),
    cfg.ListOpt(
        'transfers',
        default=['streamed', 'staged'],
        help="""
How the frozen disk becomes an image, best first; the first that can serve
does. Why each earlier one was passed over is logged.

Possible values:

* names of installed transfers: ``streamed`` (qcow2 and raw images, sent while
  the disk is read), ``staged`` (``qemu-img convert`` into a file in
  ``[libvirt] snapshots_directory``)

Related options:

* ``mover_python`` must have libnbd's Python binding for ``streamed``
"""),
    cfg.StrOpt(
        'mover_python',
        default='/usr/bin/python3',
        help="""
The Python that reads disks for the transfer ``streamed``.

It must have libnbd's binding, which comes with the distribution
(``python3-libnbd``) and not from PyPI, and need not be the one that Nova runs
in. Python 3.10 or later.

Possible values:

* the absolute path of an interpreter
"""),
    cfg.IntOpt(
        'bandwidth',
        default=0,
        min=0,
        help="""
MiB of a guest's disk that a transfer moves in a second, at most: what
``streamed`` reads, or what ``staged`` writes into its file.

Holes do not count.

Possible values:

* 0: as fast as it can be read and sent
* a number of MiB per second, for each snapshot
"""),
    cfg.IntOpt(
        'guest_share',
        default=60,
        min=0,
        max=99,
        help="""
How much of its speed a guest's disk keeps while the transfer ``streamed``
reads it, in per cent.

libvirt's block statistics say for which part of the time the guest waits for
its disk. A guest that waits for longer than it may lose has the disk for
itself for this share of the time: nothing is read then. One that waits less
has less, and one that does nothing costs the snapshot nothing. The mover gives
way on the processors too.

A snapshot always goes on: whatever the share, all its rests together take no
longer than reading at 8 MiB a second would, 36 hours for 1 TiB of data. So a
guest keeps less of a slow disk: with a share of 60, of one that gives the
snapshot less than 12 MiB a second between the rests; with 95, less than 152.

Possible values:

* 0: the snapshot comes first; it is read as fast as it can be sent
* 1 to 99

Related options:

* ``bandwidth`` is a ceiling in any case
"""),
    cfg.IntOpt(
        'read_timeout',
        default=300,
        min=1,
        help="""
Seconds in which whatever serves a frozen disk must answer a read of the
transfer ``streamed``. The snapshot fails otherwise.
"""),
    cfg.IntOpt(
        'send_timeout',
        default=300,
        min=1,
        help="""
Seconds in which Glance must take the next MiB of an image. The upload counts
as broken otherwise.

Other requests to Glance must be answered in that time, if ``[glance] timeout``
says nothing else.

Related options:

* ``answer_timeout``
* ``[glance] num_retries``: how often a broken upload is tried again
"""),
    cfg.IntOpt(
        'answer_timeout',
        default=3600,
        min=1,
        help="""
Seconds in which Glance must answer when it has all bytes of an image.

A store may take them only then. The upload counts as broken otherwise.

Related options:

* ``send_timeout``
"""),
    cfg.StrOpt(
        'dead_image',
        default='delete',
        choices=[
            ('delete', 'it is deleted'),
            ('keep', 'it stays, with the reason in the property '
                     '``snapshot_ext_failure``'),
        ],
        help="""
What becomes of an image that was being filled when nova-compute died.

It concerns images that Glance still shows as ``queued`` or ``saving``. One
that is active with a part of its bytes is deleted in any case, and one that
is active and whole stays. Those of further disks (``disks``) stay if that of
the root disk is whole, and are deleted otherwise.

Related options:

* ``dead_image_auth``
"""),
    cfg.StrOpt(
        'dead_image_auth',
        default='service_user',
        help="""
The group of nova.conf that has the credentials for ``dead_image``.

The rights of the request that made the image died with nova-compute. These
must suffice to see, change and delete images of any project: with Glance's
own policy, those of a user with the role ``admin``.

They are also asked whether the images of snapshots of the flow ``domain``
still exist. These snapshots are deleted from the guest's disk when they are
not shown an image any more that they were shown when it was made: they must
not lose that right.

Possible values:

* the name of a group with the options of keystoneauth (``auth_type``,
  ``auth_url``, ``username``, …)
"""),
    cfg.StrOpt(
        'image_service',
        default='glance',
        help="""
Where images land.

Possible values:

* ``glance``
* ``directory``: a file and a JSON document in ``image_directory``. The image
  that Nova's API made in Glance gets no data then and stays ``queued``.
"""),
    cfg.StrOpt(
        'image_directory',
        help="""
The directory of the image service ``directory``.

Possible values:

* an absolute path that exists and is writable
"""),
    cfg.StrOpt(
        'verify',
        default='size',
        choices=[
            ('size', 'the image service must report the exact size sent'),
            ('hash', 'it must report the hash of the bytes sent as well'),
        ],
        help="""
What is compared before an image counts as taken.

Snapshots whose disk is deleted afterwards (shelve, cross-cell resize) are
always compared by hash.
"""),
    cfg.StrOpt(
        'encrypted',
        default='nova',
        choices=[
            ('nova', "Nova's own snapshot serves"),
            ('refuse', 'no snapshot is taken'),
        ],
        help="""
What happens to snapshots of guests whose root disk is encrypted.

No flow reads such a disk: its image would hold the plain text.
"""),
    cfg.StrOpt(
        'state_directory',
        help="""
Where undo logs are kept while a snapshot is in flight.

It must be on a local disk that survives a reboot, and writable by
nova-compute's user.

Possible values:

* an absolute path; by default ``snapshot-ext`` in ``[DEFAULT] state_path``

Related options:

* ``socket_directory``
"""),
    cfg.StrOpt(
        'socket_directory',
        help="""
Where the sockets are made that guests' disks are read from.

QEMU makes some of them and nova-compute connects. Where libvirtd and
nova-compute run in different containers, both must have this directory under
the same path, such as one below a shared ``/run`` or ``/var/lib/nova``.

It is made if it is missing, and other users may pass through it but not list
it; what is inside is for one snapshot and one user each. It must be writable
by nova-compute's user, and not longer than 72 bytes (a socket's path is
limited to 107).

Possible values:

* an absolute path; by default ``state_directory``
"""),
    cfg.StrOpt(
        'scratch_directory',
        help="""
Where a backup job keeps what a guest overwrites during its snapshot.

The flow ``backup`` has such a job, and ``cold`` for disks that can't hold an
internal snapshot. The scratch holds what the guest overwrites meanwhile, by
clusters of 64 KiB. 128 MiB for each snapshot, and more for a guest that writes
fast, are reserved ahead of that. When no more room can be reserved the
snapshot is ended; the guest goes on.

Possible values:

* an absolute path that QEMU can reach too; by default ``[libvirt]
  snapshots_directory``

Related options:

* ``on_scratch_full``
"""),
    cfg.StrOpt(
        'on_scratch_full',
        default='fail',
        choices=[
            ('fail', 'the snapshot fails'),
            ('live', 'the flow ``live`` begins anew, once'),
        ],
        help="""
What happens to a snapshot that was ended because its scratch ran short.

``live`` serves then if it comes after ``backup`` in ``flows`` and can serve
the guest, and never where the request or the flavor named a flow. It takes as
much room in ``[libvirt] snapshots_directory`` as the disk's own layer.

Related options:

* ``flows``
* ``scratch_directory``
"""),
    cfg.StrOpt(
        'managed_save_directory',
        default='/var/lib/libvirt/qemu/save',
        help="""
Where libvirt saves the memory of a stopped guest, to look for room there.

Related options:

* ``save_image_format`` and the build of libvirt decide what is written there
"""),
    cfg.IntOpt(
        'save_timeout',
        default=3600,
        min=1,
        help="""
Seconds that the flow ``cold`` lets libvirt save a guest's memory.

The guest stands still meanwhile. When they are over, or the server is deleted,
the save is ended, and the guest runs on; another flow serves, or the snapshot
fails.
"""),
    cfg.IntOpt(
        'freeze_timeout',
        default=10,
        min=1,
        help="""
Seconds after which a guest's file systems are thawed whatever happens.

A guest that was thawed before its disk was frozen gives an image of the
consistency ``crash``, or no image if it must be quiesced.
"""),
    cfg.IntOpt(
        'copy_timeout',
        default=3600,
        min=1,
        help='Seconds that the block copy of the flow ``live`` may take.'),
    cfg.IntOpt(
        'convert_timeout',
        default=6 * 3600,
        min=1,
        help="""
Seconds that ``qemu-img convert`` may take, and then the program that computes
the hash of what it made.
"""),
]


def register_opts(conf: cfg.ConfigOpts) -> None:
    """Register [snapshot_ext]; calling it twice does no harm."""
    conf.register_group(GROUP)
    conf.register_opts(OPTS, group=GROUP)


def list_opts() -> list[tuple[cfg.OptGroup, list[typing.Any]]]:
    """What the sample configuration is generated from."""
    return [(GROUP, list(OPTS))]
