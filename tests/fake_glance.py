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

"""As much of Glance as an upload needs, over HTTP."""

import hashlib
import http.server
import json
import threading
import typing
import unittest
import urllib.parse

IMAGE = 'c0ffee00-0000-4000-8000-000000000001'
PREFIX = '/v2/images'


class FakeGlance(http.server.ThreadingHTTPServer):
    """As much of the Image API v2 as an upload needs.

    :ivar plan: by method and what follows the image's id: what to do to the
        next requests: a status, ``cut`` to break the connection, ``lost
        answer`` to break it when all is done, ``older`` to take what came
        for the image, ``stall`` to read nothing
    :ivar refused: by the same, or ``*``: the status that every request gets
        from now on, those whose bytes are under way included
    :ivar cut_at: of the next image's bytes, the part after which the
        connection breaks, once
    """

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(('127.0.0.1', port), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}/v2/'
        self.images: dict[str, dict[str, typing.Any]] = {}
        self.plan: dict[str, list[object]] = {}
        self.refused: dict[str, int] = {}
        self.cut_at: float | None = None
        self.seen: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.short_by = 0
        self.wrong_hash = False
        self.stalled = threading.Event()

    def add(self, **properties: typing.Any) -> None:
        self.images[properties.get('id', IMAGE)] = {
            'id': IMAGE, 'status': 'queued', 'size': None, 'name': 'snap',
            'disk_format': None, 'container_format': None, **properties}

    def stored(self, body: bytes) -> None:
        """Called with the bytes of an image that is active from now on."""

    def changed(self) -> None:
        """Called when a request was served."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    # Seconds; a body that is announced and does not come ends the test.
    timeout = 5
    server: FakeGlance
    #: that the request is about
    image_id = ''

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, status: int, document: object = None,
               **headers: str) -> None:
        body = b'' if document is None else json.dumps(document).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self) -> None:
        if not self.path.startswith(PREFIX):
            self.answer(200, {'versions': [{
                'id': 'v2.17', 'status': 'CURRENT', 'links': [{
                    'rel': 'self', 'href': self.server.url}]}]},
                Connection='close')
            return
        _, _, path = self.path.removeprefix(PREFIX).partition('/')
        self.image_id, slash, rest = path.partition('/')
        key = f'{self.command} {slash}{rest}'.strip()
        self.server.seen.append(key)
        planned = self.server.plan.get(key, [])
        what = planned.pop(0) if planned else None
        length = int(self.headers.get('Content-Length', 0))
        if what == 'cut':
            self.rfile.read(min(length, 1000))
            self.close_connection = True
            return
        if what == 'stall':
            self.server.stalled.wait(60)
            self.close_connection = True
            return
        if what == 'older':
            self.server.images[self.image_id].update(status='saving')
        body = self.read_body(length)
        what = what or self.server.refused.get(
            key, self.server.refused.get('*'))
        if key == 'PUT /file':
            self.server.headers.append(dict(self.headers))
            self.server.bodies.append(body)
        if len(body) < length:
            # As Glance does: what was cut off is no image.
            self.close_connection = True
            if what == 'older':
                self.upload(body)
        elif what == 'lost answer':
            if self.command == 'POST':
                self.make(json.loads(body))
            else:
                self.upload(body)
            self.close_connection = True
        elif isinstance(what, int):
            self.answer(what, {'message': 'no way'}, Location=self.path,
                        **{'Retry-After': '0'})
        elif self.command == 'POST':
            if self.make(json.loads(body)):
                self.answer(201, self.server.images[self.image_id])
            else:
                self.answer(409, {'message': 'there is one of that id'})
        elif key == 'GET' and not self.image_id:
            self.answer(200, {'images': self.found()})
        elif self.image_id not in self.server.images:
            self.answer(404, {'message': 'not found'})
        elif key == 'PUT /file':
            self.upload(body)
            self.answer(204)
        elif self.command == 'PATCH':
            self.patch(json.loads(body))
            self.answer(200, self.server.images[self.image_id])
        elif self.command == 'DELETE':
            del self.server.images[self.image_id]
            self.answer(204)
        else:
            self.answer(200, self.server.images[self.image_id])

    def serve(self) -> None:
        self.handle_any()
        self.server.changed()

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = serve

    def read_body(self, length: int) -> bytes:
        """:returns: fewer bytes than length if the connection breaks"""
        body = b''
        try:
            while len(body) < length:
                cut_at = self.server.cut_at
                if cut_at is not None and self.path.endswith('/file') and (
                        len(body) >= cut_at * length):
                    self.server.cut_at = None
                    self.close_connection = True
                    break
                some = self.rfile.read1(min(length - len(body), 65536))
                if not some:
                    break
                body += some
        except OSError:
            # No more came in time, or the connection broke.
            self.close_connection = True
        return body

    def found(self) -> list[dict[str, typing.Any]]:
        """The images that have what is asked for, and are not hidden."""
        asked = dict(urllib.parse.parse_qsl(
            urllib.parse.urlsplit(self.path).query))
        asked.pop('limit', None)
        return [image for image in self.server.images.values()
                if not image.get('os_hidden')
                and all(image.get(name) == value
                        for name, value in asked.items())]

    def make(self, document: dict[str, typing.Any]) -> bool:
        """:returns: whether there was no such image"""
        self.image_id = document.setdefault('id', IMAGE)
        if self.image_id != IMAGE and self.image_id in self.server.images:
            return False
        self.server.add(**document)
        return True

    def upload(self, body: bytes) -> None:
        digest = hashlib.sha512(body).hexdigest()
        self.server.images[self.image_id].update(
            status='active', size=len(body) - self.server.short_by,
            os_hash_algo='sha512',
            os_hash_value='0' * 128 if self.server.wrong_hash else digest)
        self.server.stored(body)

    def patch(self, changes: list[dict[str, str]]) -> None:
        image = self.server.images[self.image_id]
        for change in changes:
            name = change['path'][1:].replace('~1', '/').replace('~0', '~')
            if (change['op'] == 'add') == (name in image):
                raise AssertionError(change)
            if change['op'] == 'remove':
                del image[name]
            else:
                image[name] = change['value']


def served(test: unittest.TestCase) -> FakeGlance:
    """One that answers until a test ends."""
    server = FakeGlance()
    thread = threading.Thread(
        target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    test.addCleanup(thread.join)
    test.addCleanup(server.server_close)
    test.addCleanup(server.shutdown)
    test.addCleanup(server.stalled.set)
    return server
