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

"""The mover: the process that reads an NBD export and writes an image.

The image goes to standard output, strictly forward. What there is to say goes
to standard error, each line a JSON object:

``{"looked": N, "of": N}``
    at which byte of the disk zeroes are looked for, every second while that
    goes on; at byte 0, when its server is asked where there is data
``{"length": N, "read": N}``
    the image's exact length in bytes, before its first one, and how many
    bytes of the disk were read to know it
``{"moved": N}``
    how much of it was written, every second, where ``--tell`` asks for that:
    to somebody who does not read the image
``{"written": N, "digest": "...", "read": N}``
    at the end, after the last byte; the digest if one was asked for, and how
    many bytes of the disk were read in all
``{"error": "..."}``
    why there is no (more of the) image

Lines that are no JSON are the words of a crash. The exit code is 0 after a
complete image only.

Standard input is the control socket. Each line that comes is a JSON object:

``{"begin": "sha512"}``
    write the image, and hash it so; null for no hash. It waits for this when
    it has said the length
``{"rest": N}``
    leave the disk alone for this part of the time from now on, from 0 to less
    than 1

When it closes, whoever wanted the image is dead, and so is the mover; likewise
when nobody reads the output any more.

It runs in an interpreter that has libnbd's binding, which is the
distribution's and not that of Nova's environment. So it imports the standard
library, ``nbd``, and what imports no more either.
"""

import argparse
import collections.abc
import hashlib
import json
import os
import queue
import select
import sys
import threading
import time
import traceback
import typing

from nova_snapshot_ext import clusters as clusters_
from nova_snapshot_ext import nbd
from nova_snapshot_ext import qcow2
from nova_snapshot_ext import tempo as tempos
from nova_snapshot_ext import zeroes

_ZEROES = memoryview(bytes(1024 ** 2))
_TELL_S = 1.0


class Output:
    """Where the image goes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._hash: typing.Any = None
        #: bytes
        self.written = 0
        #: called after each write: holes take their time as well
        self.told: collections.abc.Callable[[], None] = lambda: None

    def hash_by(self, algorithm: str | None) -> None:
        """:param algorithm: of the hash of all that is written, if any"""
        self._hash = hashlib.new(algorithm) if algorithm else None

    def write(self, data: bytes | memoryview) -> None:
        with memoryview(data) as view:
            if self._hash is not None:
                self._hash.update(view)
            done = 0
            while done < len(view):
                done += os.write(self._descriptor, view[done:])
            self.written += done
        self.told()

    def fill_to(self, position: int) -> None:
        """Write zeroes up to a position."""
        while self.written < position:
            self.write(_ZEROES[:position - self.written])

    @property
    def digest(self) -> str | None:
        return self._hash.hexdigest() if self._hash is not None else None


#: offset in the disk, and what is there
Data = collections.abc.Iterable[tuple[int, memoryview]]


class Image(typing.Protocol):
    """How an image of some format is made of a disk's clusters."""

    #: bytes
    length: int

    def write(self, data: Data, output: Output) -> None:
        """Write all of it.

        :param data: what the disk's clusters hold, in order
        """


class RawImage:
    """The disk, byte by byte; its holes are written and not read."""

    def __init__(self, clusters: clusters_.Clusters) -> None:
        self.length = clusters.size

    def write(self, data: Data, output: Output) -> None:
        for offset, view in data:
            output.fill_to(offset)
            output.write(view)
        output.fill_to(self.length)


class Qcow2Image:
    """Tables, then the clusters that hold data."""

    def __init__(self, clusters: clusters_.Clusters) -> None:
        self._layout = qcow2.Layout(clusters)
        self.length = self._layout.length

    def write(self, data: Data, output: Output) -> None:
        for table in self._layout.metadata():
            output.write(table)
        for _, view in data:
            output.write(view)
        # The disk may end within its last cluster.
        output.fill_to(self.length)


FORMATS: dict[str, collections.abc.Callable[
    [clusters_.Clusters], Image]] = {'qcow2': Qcow2Image, 'raw': RawImage}


def pieces(clusters: clusters_.Clusters,
           ) -> collections.abc.Iterator[nbd.Piece]:
    """What is to be read, in pieces that fit into a request."""
    for offset, length in clusters.runs():
        for done in range(0, length, nbd.REQUEST):
            yield offset + done, min(nbd.REQUEST, length - done)


def move(options: argparse.Namespace, tempo: tempos.Tempo, output: Output,
         say: collections.abc.Callable[..., None],
         begin: collections.abc.Callable[[], str | None]) -> None:
    """Write the image, and say what there is to say.

    :param begin: waits until the image is wanted; gives the hash's algorithm
    """
    export = nbd.Export(options.unix, options.export, options.patience)
    if options.size is not None:
        export.check_size(options.size)
    if options.format == 'qcow2':
        # A size from hell must not take memory for its clusters first.
        qcow2.check_size(export.size)
    clusters = clusters_.Clusters(export.size)
    export.mark_data(
        clusters, _now_and_then(lambda: say(looked=0, of=export.size)))
    if options.format == 'qcow2':
        # In a raw image there is no place that zeroes could not take.
        zeroes.Finder(
            export, clusters, tempo, options.in_flight,
            lambda offset: say(looked=offset, of=export.size)).run()
    image = FORMATS[options.format](clusters)
    say(length=image.length, read=tempo.total)
    output.hash_by(begin())
    if options.tell:
        output.told = _now_and_then(lambda: say(moved=output.written))
    image.write(
        export.read(pieces(clusters), options.in_flight, tempo), output)
    if output.written != image.length:
        raise nbd.NbdError(
            f'{output.written} bytes of {image.length} were written')
    say(written=output.written, digest=output.digest, read=tempo.total)


def _now_and_then(tell: collections.abc.Callable[[], None],
                  ) -> collections.abc.Callable[[], None]:
    """Something that is called often, and done once a second."""
    told_at = time.monotonic()

    def may_tell() -> None:
        nonlocal told_at
        if time.monotonic() >= told_at + _TELL_S:
            told_at = time.monotonic()
            tell()
    return may_tell


def _say(**words: object) -> None:
    print(json.dumps(words), file=sys.stderr, flush=True)


def _obey(tempo: tempos.Tempo,
          begun: 'queue.SimpleQueue[str | None]') -> None:
    """Do what comes by the control socket, until nobody wants the image."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLIN)
    # An error is reported unasked: nobody can read the pipe (poll(2)).
    poll.register(sys.stdout.fileno(), 0)
    words = b''
    try:
        while sys.stdout.fileno() not in dict(poll.poll()) and (
                chunk := os.read(sys.stdin.fileno(), 4096)):
            *lines, words = (words + chunk).split(b'\n')
            for told in map(json.loads, lines):
                if 'begin' in told:
                    begun.put(told['begin'])
                tempo.rest = told.get('rest', tempo.rest)
    finally:
        os._exit(1)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='mover')
    parser.add_argument('--unix', required=True,
                        help='path of the socket of the export')
    parser.add_argument('--export', required=True, help='its name')
    parser.add_argument('--size', type=int,
                        help='bytes that the disk has')
    parser.add_argument('--format', required=True, choices=sorted(FORMATS))
    parser.add_argument('--in-flight', type=_positive, default=8,
                        help='reads that are under way at most')
    parser.add_argument('--bandwidth', type=int,
                        help='bytes a second that are read at most')
    parser.add_argument('--rest', type=float, default=0,
                        help='part of the time in which the disk is left '
                             'alone until the control socket says otherwise')
    parser.add_argument('--patience', type=_positive, default=300,
                        help='seconds in which the server must show a sign '
                             'of life')
    parser.add_argument('--nice', type=int, default=0,
                        help='how much others on the processors go first')
    parser.add_argument('--tell', action='store_true',
                        help='say every second how much was written')
    parser.add_argument('--token', help='what the process is found by')
    return parser


def main() -> typing.NoReturn:
    """The process; it has a thread that must not hold up its end."""
    code = 1
    try:
        options = _parser().parse_args()
        os.nice(options.nice)
        tempo = tempos.Tempo(options.bandwidth, options.rest)
        begun: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(
            target=_obey, args=[tempo, begun], daemon=True).start()
        move(options, tempo, Output(sys.stdout.fileno()), _say, begun.get)
        code = 0
    except SystemExit as error:
        code = typing.cast(int, error.code)
    except BrokenPipeError:
        pass
    except MemoryError:
        _say(error='there is not enough memory for a disk of this size')
    except (nbd.NbdError, qcow2.TooLarge, OSError, ValueError) as error:
        _say(error=str(error))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
