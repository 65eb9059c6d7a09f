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

"""A Glance that can be killed, stopped and told what to answer.

Usage: python -m tests.faults.glance DIRECTORY [PORT]

It prints its URL and obeys one JSON document a line, which is answered by
one: the images there are. What was stored is in DIRECTORY, and is found there
again by one that is started after it was killed.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import typing

from tests import fake_glance

#: more than any command line is held
_TIMEOUT_S = 300


class Server(fake_glance.FakeGlance):

    def __init__(self, directory: pathlib.Path, port: int) -> None:
        super().__init__(port)
        self.directory = directory
        self._lock = threading.Lock()
        kept = directory / 'images.json'
        if kept.exists():
            self.images = json.loads(kept.read_text())

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of connections that break: they are meant to."""

    def stored(self, body: bytes) -> None:
        (self.directory / fake_glance.IMAGE).write_bytes(body)

    def changed(self) -> None:
        with self._lock:
            new = self.directory / 'images.json.new'
            new.write_text(json.dumps(self.images))
            os.replace(new, self.directory / 'images.json')

    def obey(self, wanted: dict[str, typing.Any]) -> object:
        self.refused.update(wanted.get('refuse', {}))
        self.cut_at = wanted.get('cut_at', self.cut_at)
        if 'forget' in wanted:
            self.refused.clear()
            self.cut_at = None
        if 'delete' in wanted:
            self.images.clear()
            self.changed()
        return list(self.images.values())


class Glance:
    """One, as whoever started it sees it."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        directory.mkdir()
        self._port = 0
        self.start()

    def start(self) -> None:
        """Start it, after it was killed with the same address."""
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'tests.faults.glance',
             str(self.directory), str(self._port)],
            cwd=pathlib.Path(__file__).parents[2], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        self._port = int(self.url.rsplit(':', 1)[1].split('/')[0])

    def tell(self, **wanted: object) -> list[dict[str, typing.Any]]:
        """:returns: the images that it has now"""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(wanted) + '\n')
        self._process.stdin.flush()
        found: list[dict[str, typing.Any]] = json.loads(
            self._process.stdout.readline())
        return found

    def kill(self) -> None:
        self._process.kill()
        self.close()

    def restart(self) -> None:
        """Start it again, unless it runs."""
        if self._process.poll() is not None:
            self.start()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    @property
    def image(self) -> pathlib.Path:
        """The bytes of the image that was active last."""
        return self.directory / fake_glance.IMAGE

    def clouds_yaml(self) -> str:
        """What openstacksdk has to know of it."""
        return json.dumps({'clouds': {'faults': {
            'auth_type': 'none', 'auth': {'endpoint': self.url},
            'image_endpoint_override': self.url,
            'image_api_version': '2'}}})

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def main() -> None:
    fake_glance.Handler.timeout = _TIMEOUT_S
    directory, port = sys.argv[1:]
    server = Server(pathlib.Path(directory), int(port))
    threading.Thread(target=server.serve_forever, args=(0.05,),
                     daemon=True).start()
    print(server.url, flush=True)
    for line in sys.stdin:
        print(json.dumps(server.obey(json.loads(line))), flush=True)
    # Threads that serve would be waited for.
    os._exit(0)


if __name__ == '__main__':
    main()
