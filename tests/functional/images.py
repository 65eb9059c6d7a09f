#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""What an image holds: the counters of the guest's writer, and its health.

The writer (tools/guest/writer.c) writes its counter to ten places of each
disk, strictly in order, so the places of one instant are n...n, n-1...n-1.
"""

import collections.abc
import json
import pathlib
import re
import struct
import subprocess
import tempfile
import typing as ty

PLACES = 10
RECORD = 4096          # bytes
AREA = 65536           # bytes; the places are aligned to it
HEADER = struct.Struct('<16sII')
MAGIC = b'snapshot-counter'
# Where the data partition of the guest's bootable disk starts, in bytes
DATA_PARTITION = 48 * 1024 * 1024

# A path or an NBD URL, and the format: ('/a/disk', 'qcow2')
Image = tuple[str | pathlib.Path, str]


class InconsistentImage(AssertionError):
    """Images do not hold one point in time."""


def run(*args: str | pathlib.Path) -> str:
    """Run a program and return what it printed.

    :param args: the program and its arguments.
    :returns: its standard output.
    :raises: AssertionError with its words, if it fails.
    """
    done = subprocess.run([str(a) for a in args], capture_output=True,
                          text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(
            f'{args} ended with {done.returncode}: {done.stdout}'
            f'{done.stderr}')
    return done.stdout


def _shared(in_use: bool) -> list[str]:
    return ['--force-share'] if in_use else []


def virtual_size(image: Image, in_use: bool = False) -> int:
    """The size of the disk that an image shows to a guest, in bytes."""
    path, form = image
    info = json.loads(run('qemu-img', 'info', *_shared(in_use), '-f', form,
                          '--output=json', path))
    return ty.cast(int, info['virtual-size'])


def counter_of(record: bytes) -> int:
    """The counter that one place holds.

    :param record: RECORD bytes.
    :returns: the counter; 0 if the place was never written.
    :raises: InconsistentImage if a write of it is half done.
    """
    if not record.strip(b'\0'):
        return 0
    magic, _disk, _place = HEADER.unpack_from(record)
    counters = struct.unpack_from(f'<{(RECORD - HEADER.size) // 8}Q',
                                  record, HEADER.size)
    if magic != MAGIC or len(set(counters)) != 1:
        raise InconsistentImage(f'no counter, or a torn one: {record[:64]!r}')
    return ty.cast(int, counters[0])


def counters(image: Image, in_use: bool = False) -> list[int]:
    """Read the counters of an image whose guest ran with mode=raw.

    :param image: its path, or the URL of an NBD export, and its format.
    :param in_use: whether QEMU has it open meanwhile.
    :returns: the counters of its places, in the order of writing.
    """
    path, form = image
    size = virtual_size(image, in_use)
    command = ['qemu-io', '-r', '-f', form]
    if in_use:
        command.append('-U')
    for place in range(PLACES):
        offset = size // PLACES * place // AREA * AREA
        command += ['-c', f'read -v {offset} {RECORD}']
    dump = run(*command, path)
    # "00000000:  73 6e ...  sn...": 16 bytes a line
    data = b''.join(
        bytes.fromhex(line)
        for line in re.findall(r'^[0-9a-f]{8,}:  (.{47})', dump, re.M))
    if len(data) != PLACES * RECORD:
        raise AssertionError(f'{path} could not be read: {dump[-500:]}')
    return [counter_of(data[start:start + RECORD])
            for start in range(0, len(data), RECORD)]


def check_order(read: collections.abc.Sequence[list[int]]) -> None:
    """Assert that counters are of one point in time.

    :param read: the counters of each disk, in the order of writing.
    :raises: InconsistentImage if they are not.
    """
    row = [counter for disk in read for counter in disk]
    if row != sorted(row, reverse=True) or row[0] - row[-1] > 1:
        raise InconsistentImage(f'not one point in time: {list(read)}')


def check_point_in_time(
    images: collections.abc.Sequence[Image], in_use: bool = False,
) -> list[list[int]]:
    """Assert that images hold one point in time of one guest.

    :param images: of every disk that the guest's writer (mode=raw) writes
        to, in its order.
    :param in_use: whether QEMU has them open meanwhile.
    :returns: the counters of each.
    :raises: InconsistentImage if they do not.
    """
    read = [counters(image, in_use) for image in images]
    check_order(read)
    return read


def filesystem_counters(
    image: Image, offset: int = 0, must_be_clean: bool = False,
) -> list[int]:
    """Read the counters from the ext4 in an image, after checking it.

    :param image: of a guest that ran with mode=fs or mode=disk.
    :param offset: in bytes, of the file system: 0 (mode=fs) or
        DATA_PARTITION (mode=disk).
    :param must_be_clean: whether a journal that wants replaying is an error,
        which tells a frozen file system from a crashed one.
    :returns: the counters of its places, in the order of writing.
    """
    path, form = image
    with tempfile.TemporaryDirectory(dir='/var/tmp') as directory:
        raw = pathlib.Path(directory) / 'raw'
        record = pathlib.Path(directory) / 'record'
        if offset:
            # The unit of a partition table, 512 bytes, also divides offset.
            run('qemu-img', 'convert', '-O', 'raw', '--image-opts',
                f'driver=raw,offset={offset},file.driver={form},'
                f'file.file.driver=file,file.file.filename={path}', raw)
        else:
            run('qemu-img', 'convert', '-f', form, '-O', 'raw', path, raw)
        needs_recovery = 'needs_recovery' in run('dumpe2fs', '-h', raw)
        if needs_recovery and must_be_clean:
            raise AssertionError(f'the file system in {path} was not frozen')
        if needs_recovery:
            subprocess.run(['e2fsck', '-y', '-E', 'journal_only', str(raw)],
                           capture_output=True, check=False)
        run('e2fsck', '-fn', raw)
        read = []
        for place in range(PLACES):
            run('debugfs', '-R', f'dump /{place}/place {record}', raw)
            read.append(counter_of(record.read_bytes()))
    return read


def check_filesystems_point_in_time(
    images: collections.abc.Sequence[Image], offset: int = 0,
    must_be_clean: bool = False,
) -> list[list[int]]:
    """Like check_point_in_time(), for guests with mode=fs or mode=disk.

    :param images: in the writer's order.
    :param offset: as in filesystem_counters().
    :param must_be_clean: as in filesystem_counters().
    :returns: the counters of each.
    """
    read = [filesystem_counters(image, offset, must_be_clean)
            for image in images]
    check_order(read)
    return read


def qemu_img_check(
    path: str | pathlib.Path, form: str = 'qcow2',
) -> dict[str, ty.Any]:
    """Assert that an image is sound and leaks no cluster.

    :param path: of the image.
    :param form: its format.
    :returns: qemu-img's findings.
    """
    return ty.cast(dict[str, ty.Any], json.loads(
        run('qemu-img', 'check', '-f', form, '--output=json', path)))


def compare(one: Image, other: Image, in_use: bool = False) -> None:
    """Assert that two images show a guest the same content.

    :param one: path or NBD URL, and format.
    :param other: likewise.
    :param in_use: whether QEMU has one of them open meanwhile.
    """
    run('qemu-img', 'compare', *_shared(in_use), '-f', one[1],
        '-F', other[1], one[0], other[0])
