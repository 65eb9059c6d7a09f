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

"""What was measured, as it is kept in a file."""

import collections.abc
import dataclasses
import json
import os
import pathlib
import typing


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One snapshot, or one upload of a finished file."""

    contestant: str
    round: int
    #: random data in the guest's disk
    data_gib: float
    #: from the request until Glance shows the image as active
    seconds: float
    image_bytes: int
    #: at most, at one time
    staged_bytes: int
    scratch_bytes: int
    #: of the disk, for the scratch to grow into
    reserved_bytes: int
    #: 64 KiB clusters that the guest wrote to; None if nobody counted
    touched_bytes: int | None
    #: by nova-compute and the processes that it started
    written_bytes: int
    #: on the device that the cloud lies on, by everybody; None if unknown
    device_bytes: int | None
    #: what the image says; None if it does not
    pause_s: float | None
    #: longest silence of the guest's counter meanwhile, and before
    silence_s: float
    idle_silence_s: float
    #: of the guest's writer, a second: meanwhile, and before
    rounds_per_s: float
    idle_rounds_per_s: float
    #: seconds of a processor: nova-compute (the floor: the client), what it
    #: started (mover, qemu-img, qemu-nbd), and QEMU with the guest in it
    compute_cpu_s: float
    children_cpu_s: float
    qemu_cpu_s: float
    #: of QEMU, a second, before
    idle_qemu_cpu: float

    @property
    def share(self) -> float | None:
        """The guest's rounds meanwhile by those before."""
        if not self.idle_rounds_per_s:
            return None
        return self.rounds_per_s / self.idle_rounds_per_s


@dataclasses.dataclass(frozen=True)
class Freeze:
    """One guest frozen by ``backup``, and thawed at once."""

    data_gib: float
    pause_s: float
    silence_s: float


@dataclasses.dataclass(frozen=True)
class Pipe:
    """One export read twice: by the mover, and by qemu-img convert."""

    data_gib: float
    image_bytes: int
    mover_s: float
    convert_s: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """A mover on a disk whose extents hold data and nothing in turn."""

    disk_bytes: int
    resident_bytes: int
    #: until the mover says the length, and seconds of a processor for it
    laid_out_s: float
    laid_out_cpu_s: float


@dataclasses.dataclass
class Results:
    """Everything of one run."""

    #: when, on what, with which parameters
    about: dict[str, typing.Any] = dataclasses.field(default_factory=dict)
    snapshots: list[Snapshot] = dataclasses.field(default_factory=list)
    freezes: list[Freeze] = dataclasses.field(default_factory=list)
    pipes: list[Pipe] = dataclasses.field(default_factory=list)
    memory: list[Memory] = dataclasses.field(default_factory=list)
    #: what was not measured, and why
    skipped: list[str] = dataclasses.field(default_factory=list)

    def of(self, contestant: str, data_gib: float | None = None,
           ) -> list[Snapshot]:
        """What one contestant did, with so much data."""
        wanted = self.data_gib if data_gib is None else data_gib
        return [each for each in self.snapshots
                if each.contestant == contestant
                and each.data_gib == wanted]

    def has(self, contestant: str, data_gib: float, number: int) -> bool:
        return any(each.round == number
                   for each in self.of(contestant, data_gib))

    @property
    def data_gib(self) -> float:
        """What the contestants are compared with."""
        return float(self.about['data_gib'])

    @property
    def sizes(self) -> list[float]:
        """What growth is shown over."""
        return sorted({each.data_gib for each in self.snapshots}
                      | {each.data_gib for each in self.freezes})

    def save(self, path: pathlib.Path) -> None:
        """Write all of it, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f'{path.name}.new')
        new.write_text(json.dumps(dataclasses.asdict(self), indent=1) + '\n')
        os.replace(new, path)


_ROWS: dict[str, collections.abc.Callable[..., typing.Any]] = {
    'snapshots': Snapshot, 'freezes': Freeze, 'pipes': Pipe,
    'memory': Memory}


def load(path: pathlib.Path) -> Results:
    """Read what :meth:`Results.save` wrote."""
    saved = json.loads(path.read_text())
    return Results(about=saved['about'], skipped=saved['skipped'], **{
        name: [make(**row) for row in saved[name]]
        for name, make in _ROWS.items()})
