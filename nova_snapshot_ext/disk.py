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

"""A guest's disks as libvirt describes them, and their backing chains.

Formats come from libvirt, or from headers that no guest can write. Nothing
here looks at the bytes of a disk to guess what it is.
"""

import dataclasses
import json
import os
import typing
from xml.etree import ElementTree

from oslo_utils.imageutils import format_inspector

from nova_snapshot_ext import exception
from nova_snapshot_ext import qemu_img


#: of a chain; QEMU opens them one within the other, and so do we
_MOST_LAYERS = 100


@dataclasses.dataclass(frozen=True)
class Layer:
    """One image of a disk's backing chain."""

    path: str
    #: QEMU's name of the format: ``qcow2`` or ``raw``, never guessed
    format: str
    #: whether path is a block device
    block: bool = False


@dataclasses.dataclass(frozen=True)
class Disk:
    """One disk of a domain."""

    #: the name libvirt knows it by, such as ``vda``
    target: str
    #: libvirt's type of the source: ``file``, ``block``, ``network`` …
    kind: str
    #: libvirt's device: ``disk``, ``cdrom``, ``lun`` …
    device: str
    #: path of the file or block device, '' for other kinds
    path: str
    #: driver format in the domain, '' where it is not set
    format: str
    encrypted: bool
    #: other guests may write to it at the same time
    shared: bool
    #: what the guest writes is not in path, and is lost when it stops
    transient: bool
    #: layers below the top one as a running domain shows them, nearest
    #: first; None where libvirt does not tell
    backing: tuple[Layer, ...] | None
    #: the guest can't write to it
    readonly: bool = False

    @classmethod
    def from_element(cls, element: ElementTree.Element) -> 'Disk':
        """:param element: ``<disk>`` of a domain's XML"""
        source = element.find('source')
        driver = element.find('driver')
        kind = element.get('type', '')
        path = '' if source is None else (
            source.get('file') or source.get('dev') or '')
        return cls(
            target=target_of(element),
            kind=kind,
            device=element.get('device', 'disk'),
            path=path,
            format='' if driver is None else driver.get('type', ''),
            encrypted=(element.find('.//encryption') is not None
                       or is_dm_crypt(path)),
            shared=element.find('shareable') is not None,
            transient=element.find('transient') is not None,
            backing=_backing_of(element),
            readonly=(element.find('readonly') is not None
                      or element.get('device') == 'cdrom'),
        )

    @property
    def block(self) -> bool:
        """Whether the disk's source is a block device."""
        return self.kind == 'block'


def target_of(element: ElementTree.Element) -> str:
    """The name that libvirt knows a ``<disk>`` by, '' if it has none."""
    target = element.find('target')
    return '' if target is None else target.get('dev', '')


def _backing_of(
        element: ElementTree.Element) -> tuple[Layer, ...] | None:
    """The chain below ``<disk>`` or ``<backingStore>``, None if unknown.

    An empty ``<backingStore/>`` ends a chain; none at all means that libvirt
    has not looked (https://libvirt.org/formatdomain.html, backingStore).
    """
    layers: list[Layer] = []
    store = element.find('backingStore')
    while store is not None and store.get('type'):
        source = store.find('source')
        fmt = store.find('format')
        path = None if source is None else (
            source.get('file') or source.get('dev'))
        if path is None or fmt is None or not fmt.get('type'):
            return None
        layers.append(Layer(path, fmt.get('type', ''),
                            store.get('type') == 'block'))
        store = store.find('backingStore')
    return None if store is None else tuple(layers)


def is_dm_crypt(path: str) -> bool:
    """Whether path is the plain text side of a device-mapper crypt target.

    The kernel's name of its UUID begins with ``CRYPT-`` (cryptsetup, FAQ
    section 6.13 names the prefix; Nova's encrypted LVM disks are such).
    """
    if not path.startswith('/dev/'):
        return False
    device = os.path.basename(os.path.realpath(path))
    try:
        with open(f'/sys/class/block/{device}/dm/uuid') as uuid:
            return uuid.read().startswith('CRYPT-')
    except OSError:
        return False


def chain_of(disk: Disk) -> tuple[Layer, ...]:
    """Every layer of a disk, its own first.

    :raises UnsafeDisk: if a header refers to a data file, or to a backing
        file whose format is not recorded, or can't be read
    """
    if disk.format not in ('raw', 'qcow2'):
        raise exception.UnsafeDisk(
            f'{disk.target} has the format {disk.format or "(none)"}; only '
            f'raw and qcow2 can be snapshot')
    top = Layer(disk.path, disk.format, disk.block)
    if disk.format == 'raw':
        return (top,)
    if disk.backing is not None:
        if len(disk.backing) >= _MOST_LAYERS:
            raise exception.UnsafeDisk(
                f'{disk.target} is made of more than {_MOST_LAYERS} images')
        for layer in (top, *disk.backing):
            _check_header(layer)
        return (top, *disk.backing)
    return chain_from_headers(top)


def chain_from_headers(top: Layer) -> tuple[Layer, ...]:
    """Every layer below one, its own first, where libvirt does not tell.

    :raises UnsafeDisk: as :func:`chain_of`
    """
    layers = [top]
    while layers[-1].format == 'qcow2':
        _check_header(layers[-1])
        info = image_info(layers[-1])
        backing = info.get('full-backing-filename')
        if backing is None:
            break
        fmt = info.get('backing-filename-format')
        if fmt not in ('raw', 'qcow2'):
            raise exception.UnsafeDisk(
                f'{layers[-1].path} has a backing file of the format '
                f'{fmt or "(not recorded)"}; raw or qcow2 must be recorded')
        if not os.path.isabs(backing) or len(layers) >= _MOST_LAYERS:
            raise exception.UnsafeDisk(
                f'{layers[-1].path} has a backing file that is not a plain '
                f'path: {backing}')
        layers.append(Layer(backing, fmt, _is_block(backing)))
    return tuple(layers)


def _is_block(path: str) -> bool:
    return os.path.realpath(path).startswith('/dev/')


def _check_header(layer: Layer) -> None:
    """Refuse a qcow2 header that names other host files than its backing.

    :raises UnsafeDisk: see above
    """
    if layer.format != 'qcow2':
        return
    inspector = format_inspector.QcowInspector()
    try:
        with open(layer.path, 'rb') as image:
            inspector.eat_chunk(image.read(64 * 1024))
    except OSError as error:
        raise exception.UnsafeDisk(
            f'The header of {layer.path} can not be read: '
            f'{error}') from error
    if not inspector.format_match:
        raise exception.UnsafeDisk(
            f'{layer.path} is qcow2 for libvirt, and has no qcow2 header')
    # Not safety_check(): it also refuses a backing file, which a disk of
    # Nova's has by design, and whose layers are checked here one by one.
    try:
        inspector.check_data_file()
        inspector.check_unknown_features()
    except format_inspector.SafetyViolation as violation:
        raise exception.UnsafeDisk(
            f'{layer.path} is not safe to read: {violation}') from violation


def image_info(layer: Layer) -> dict[str, typing.Any]:
    """``qemu-img info`` of one layer, whoever has it open."""
    options = layer_options(layer) | {'force-share': True}
    info: dict[str, typing.Any] = json.loads(qemu_img.run(
        'info', '--output', 'json', json_name(options),
        limits=qemu_img.INSPECT_LIMITS))
    return info


def layer_options(layer: Layer) -> dict[str, typing.Any]:
    """QEMU's block options that open one layer (qemu(1), -blockdev)."""
    return {
        'driver': layer.format,
        'file': {
            'driver': 'host_device' if layer.block else 'file',
            'filename': layer.path,
        },
    }


def chain_options(chain: tuple[Layer, ...]) -> dict[str, typing.Any]:
    """QEMU's block options that open a whole chain, every format named.

    What a header says of a backing file is not used: the options say which
    it is, or that there is none.
    """
    top, *below = chain
    options = layer_options(top)
    if top.format == 'qcow2':
        options['backing'] = chain_options(tuple(below)) if below else None
    return options


def json_name(options: dict[str, typing.Any]) -> str:
    """Block options as a file name (qemu-img(1), the json: pseudo-protocol).

    Other than --image-opts, it can say that there is no backing file.
    """
    return 'json:' + json.dumps(options)


def allocated_bytes(layer: Layer, capacity: int) -> int:
    """Bytes that a layer's data can take at most once it is copied.

    :param capacity: the disk's size in bytes, the answer for a block device
        and for a file that can't be looked at
    """
    if layer.block:
        return capacity
    try:
        return min(os.stat(layer.path).st_blocks * 512, capacity)
    except OSError:
        return capacity


def image_bytes(chain: tuple[Layer, ...], capacity: int) -> int:
    """Bytes that one flat image of a chain can take at most.

    Tables of a qcow2 file take under a five-hundredth of its data; a
    compressed layer may grow to the whole disk.
    """
    allocated = sum(allocated_bytes(layer, capacity) for layer in chain)
    if any(layer.format == 'qcow2' for layer in chain[1:]):
        allocated = capacity
    data = min(allocated, capacity)
    return data + data // 500 + 1024 ** 2
