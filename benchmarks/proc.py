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

"""What processes have used, as /proc tells: processor, writes, memory."""

import dataclasses
import os
import pathlib
import re

PROC = pathlib.Path('/proc')
_TICKS = os.sysconf('SC_CLK_TCK')


@dataclasses.dataclass(frozen=True)
class Used:
    """Seconds of a processor, and bytes written to disks."""

    own_s: float
    #: of children that have ended and were waited for
    children_s: float
    #: children included, like those seconds
    written_bytes: int

    def since(self, earlier: 'Used') -> 'Used':
        return Used(self.own_s - earlier.own_s,
                    self.children_s - earlier.children_s,
                    self.written_bytes - earlier.written_bytes)


def parse_stat(text: str) -> tuple[float, float]:
    """Own seconds and those of children, of /proc/PID/stat (proc(5))."""
    # The name stands in brackets, and may hold blanks and brackets.
    fields = text[text.rindex(')') + 2:].split()
    user, system, child_user, child_system = map(int, fields[11:15])
    return ((user + system) / _TICKS,
            (child_user + child_system) / _TICKS)


def parse_written(text: str) -> int:
    """Bytes that /proc/PID/io says were sent to a disk."""
    found = re.search(r'^write_bytes: (\d+)$', text, re.MULTILINE)
    return int(found.group(1)) if found else 0


def used(pid: int) -> Used:
    """:raises OSError: if the process is gone"""
    own, children = parse_stat((PROC / str(pid) / 'stat').read_text())
    return Used(own, children,
                parse_written((PROC / str(pid) / 'io').read_text()))


def peak_resident_bytes(pid: int) -> int:
    """:raises OSError: if the process is gone"""
    status = (PROC / str(pid) / 'status').read_text()
    found = re.search(r'^VmHWM:\s+(\d+) kB$', status, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def with_argument(argument: str) -> list[int]:
    """The processes that have an argument in their command line."""
    wanted = argument.encode()
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                if wanted in (entry / 'cmdline').read_bytes().split(b'\0'):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def parse_diskstats(text: str, device: int) -> int | None:
    """Bytes that were written to a device; None if it is not listed."""
    for line in text.splitlines():
        fields = line.split()
        if os.makedev(int(fields[0]), int(fields[1])) == device:
            return int(fields[9]) * 512
    return None


def device_written_bytes(path: pathlib.Path) -> int | None:
    """Bytes that were written to the device that a directory lies on."""
    return parse_diskstats((PROC / 'diskstats').read_text(),
                           path.stat().st_dev)
