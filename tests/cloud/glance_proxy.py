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

"""What stands between nova-compute and Glance, and breaks uploads."""

import collections.abc
import contextlib
import http.client
import http.server
import threading
import typing as ty

import fixtures

# What is of one connection, and not of the message (RFC 9110, 7.6.1), or is
# counted anew.
_HOP = {'connection', 'keep-alive', 'transfer-encoding', 'te', 'trailer',
        'upgrade', 'proxy-connection'}
_PIECE = 64 * 1024
# Seconds; Glance answers an upload when it has stored it.
_TIMEOUT_S = 120
CUT = 'cut'


class Proxy(fixtures.Fixture):
    """Passes everything on to Glance, but what it is told to break.

    :ivar url: for nova-compute
    :ivar plan: for the next uploads: the status that each is answered with
        when Glance has got the half of it, or CUT for none at all
    """

    url: str

    def __init__(self, host: str, port: int) -> None:
        """:param host: of Glance, as the port"""
        super().__init__()
        self.glance = (host, port)
        self.plan: list[int | str] = []

    def _setUp(self) -> None:
        proxy = self

        class Handler(_Handler):
            fixture = proxy

        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        server.daemon_threads = True
        self.url = f'http://127.0.0.1:{server.server_port}'
        thread = threading.Thread(target=server.serve_forever, args=(0.1,))
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    timeout = _TIMEOUT_S
    fixture: Proxy

    def log_message(self, *arguments: object) -> None:
        pass

    def serve(self) -> None:
        # Each request has a connection of its own: where a body ends is
        # seen by its end.
        self.close_connection = True
        upload = self.command == 'PUT' and self.path.endswith('/file')
        broken = self.fixture.plan.pop(0) if (
            upload and self.fixture.plan) else None
        length = int(self.headers.get('Content-Length', 0))
        glance = http.client.HTTPConnection(
            *self.fixture.glance, timeout=_TIMEOUT_S)
        with contextlib.closing(glance):
            self._send_head(glance)
            for piece in self._body(length if broken is None
                                    else length // 2):
                glance.send(piece)
            if broken is None:
                self._pass_answer(glance.getresponse())
                return
        if broken == CUT:
            return
        for _ in self._body(length - length // 2):
            pass
        self.send_response(ty.cast(int, broken))
        self.send_header('Content-Length', '0')
        self.send_header('Connection', 'close')
        self.end_headers()

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = serve

    def _send_head(self, glance: http.client.HTTPConnection) -> None:
        glance.putrequest(self.command, self.path, skip_host=True,
                          skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP:
                glance.putheader(name, value)
        glance.putheader('Connection', 'close')
        glance.endheaders()

    def _body(self, length: int) -> collections.abc.Iterator[bytes]:
        """So many more bytes of the request, or fewer if it breaks off."""
        while length and (piece := self.rfile.read(min(length, _PIECE))):
            length -= len(piece)
            yield piece

    def _pass_answer(self, answer: http.client.HTTPResponse) -> None:
        self.send_response(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP | {'date', 'server'}:
                self.send_header(name, value)
        self.send_header('Connection', 'close')
        self.end_headers()
        while piece := answer.read(_PIECE):
            self.wfile.write(piece)
