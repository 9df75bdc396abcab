"""The base of the servers of local pages: who may ask, what the browser may do with an answer, how one is sent.

The browser is told to run no script but the page's own. A page of another site that has its name resolved to this
machine is refused by the Host header, and one that sends a form here by its Origin.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import socketserver
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qs, urlsplit

from progrpo.environment import is_loopback
from progrpo.messages import named, raised
from progrpo.pages.page import escape
from progrpo.tracking.files import in_bytes

S = TypeVar("S", bound="PageServer")

OWN = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
    " base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
"""The Content-Security-Policy of a server's own pages."""
HTML = "text/html; charset=utf-8"
CSS = "text/css; charset=utf-8"
JAVASCRIPT = "text/javascript; charset=utf-8"
JSON = "application/json"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_MOST_FIELDS = 60
_MOST_BYTES = 100_000

Answer = tuple[str, str, bytes]
"""The content type, the Content-Security-Policy and the body."""
Fields = dict[str, list[str]]
"""The fields of an address after the question mark."""


class NotFound(Exception):
    """The error for a request of something that is not there."""


class PageServer(ThreadingHTTPServer):
    """The server of one folder's page, called `name` in messages and in the addresses of its style and script."""

    daemon_threads = True
    name: str

    def __init__(self, folder: Path, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.folder, self.host = folder, host
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # http.server's own asks a name server for this machine's name

    def get(self, path: str, fields: Fields) -> Answer:
        """The answer to GET. NotFound where there is no such page, ValueError where the question is wrong."""
        raise NotFound("there is no such page")

    takes_post = False
    """Whether the server answers POST at all."""

    def post(self, path: str, body: bytes) -> Answer:
        """The answer to POST with a body of JSON. Errors as for `get`."""
        raise NotFound("there is no such page")

    def handle_error(self, request: object, client_address: object) -> None:
        """Say in a line what went wrong, unless the browser has gone away."""
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError | TimeoutError):
            print(f"progrpo: {self.name}: {raised(error)}", file=sys.stderr)

    def is_own_name(self, header: str | None) -> bool:
        """Whether a Host header names this server, by an address or a name that only this machine has."""
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        if is_loopback(name):
            return True
        if is_loopback(self.host):
            return False
        return _is_address(name) or name in (self.host.lower(), socket.gethostname().lower())

    def document(self, title: str, body: str) -> str:
        """A page of this server. `title` and `body` are HTML."""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f'<title>{title}</title><link rel="icon" href="data:,"><link rel="stylesheet" href="/{self.name}.css">'
            f'<script src="/{self.name}.js" defer></script></head>\n<body><main>\n{body}\n</main></body></html>\n'
        )


def listening(kind: Callable[[Path, str, int], S], folder: Path, host: str, port: int) -> S:
    """The server of a folder's page, at its address. ValueError if it cannot listen there."""
    try:
        return kind(folder, host, port)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ValueError(f"cannot listen at {named(host)}, port {port}: {error}; --port 0 is any free port") from None


def serve_until_asked_to_end(server: PageServer, what: str, others: str) -> None:
    """Say where the page is, and serve it. `others` is what those who can reach a public address can do."""
    host, port = server.host, server.server_address[1]
    where = f"[{host}]" if ":" in host else host
    reach = "" if is_loopback(host) else f"; all who can reach this address can {others}"
    print(f"{what} at http://{where}:{port}/ (Ctrl-C ends it{reach})", flush=True)
    server.serve_forever()


def require_folder(folder: Path, instead: str) -> None:
    """Raise ValueError, with what to do instead, for what is no folder."""
    if not os.path.isdir(folder):
        raise ValueError(f"{named(folder)} is no folder; {instead}")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = 30.0  # of a client that sends nothing
    server_version, sys_version = "progrpo", ""
    disable_nagle_algorithm = True  # or an answer of two packets waits for the browser's delayed acknowledgement

    def do_GET(self) -> None:
        self._answer(lambda path, fields: self.server.get(path, fields))

    def do_POST(self) -> None:
        if not self.server.takes_post:
            return self.send_error(HTTPStatus.NOT_IMPLEMENTED, "Unsupported method ('POST')")
        self.close_connection = True  # unless the body is read, its bytes would be taken for the next request
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != self.headers.get("Host"):
            return self._refuse(HTTPStatus.FORBIDDEN, "this was sent by the page of another site")
        if self.headers.get_content_type() != JSON:  # a form of another site can send only other types unasked
            return self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"the body must be {JSON}")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or int(length) > _MOST_BYTES:
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body must have at most {_MOST_BYTES} bytes")
        body = self.rfile.read(int(length))
        self.close_connection = False
        self._answer(lambda path, fields: self.server.post(path, body))

    def _answer(self, answer: Callable[[str, Fields], Answer]) -> None:
        if not self.server.is_own_name(self.headers.get("Host")):
            name = self.server.name
            return self._refuse(
                HTTPStatus.FORBIDDEN, f"this name is not the {name}'s: open the address that it printed"
            )
        try:
            url = urlsplit(self.path)
            kind, policy, body = answer(url.path, parse_qs(url.query, max_num_fields=_MOST_FIELDS))
        except NotFound as error:
            return self._refuse(HTTPStatus.NOT_FOUND, str(error))
        except ValueError as error:
            return self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except OSError as error:
            file = "" if error.filename is None else f" ({error.filename})"
            return self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"a file is out of reach: {error.strerror}{file}")
        self._send(HTTPStatus.OK, kind, policy, body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the console is for what the user is to know."""

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        body = (
            f'<h1>{status.phrase}</h1><p class="note">{escape(sentence)}</p><p class="after"><a href="/">Back</a></p>'
        )
        page = self.server.document(f"progrpo {self.server.name}", body)
        self._send(status, HTML, OWN, in_bytes(page))

    def _send(self, status: HTTPStatus, kind: str, policy: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", policy)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
