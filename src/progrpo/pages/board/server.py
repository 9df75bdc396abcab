"""The board's server: it answers GET alone, and reads nothing but the runs that its list names.

The browser is told to run no script but the board's own, and to keep a run's page, which may be a stranger's, apart
from everything else. A page of another site that has its name resolved to this machine is refused by the Host header.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import socketserver
import sys
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from threading import Lock
from urllib.parse import parse_qs, urlsplit

from progrpo.environment import is_loopback
from progrpo.messages import named, raised
from progrpo.pages.board.listing import Listing
from progrpo.pages.compare import compare, comparison_page
from progrpo.pages.page import escape
from progrpo.pages.report import report_page, write_report
from progrpo.pages.run_data import inside
from progrpo.tracking.files import in_bytes

_OWN = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none';"
    " form-action 'self'; frame-ancestors 'none'"
)
_OF_RUNS = (  # an origin of its own, without network: reports have their scripts, styles and pictures inside
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_MOST_COMPARED = 60
_HTML = "text/html; charset=utf-8"


class BoardServer(ThreadingHTTPServer):
    """The server of one folder's runs."""

    daemon_threads = True

    def __init__(self, folder: Path, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.folder, self.host = folder, host
        self.listing = Listing(folder)
        self.writing = Lock()
        """Held while a report is written: two threads would write the same unfinished file."""
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # http.server's own asks a name server for this machine's name

    def handle_error(self, request: object, client_address: object) -> None:
        """Say in a line what went wrong, unless the browser has gone away."""
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError | TimeoutError):
            print(f"progrpo: board: {raised(error)}", file=sys.stderr)

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


def listening(folder: Path, host: str, port: int) -> BoardServer:
    try:
        return BoardServer(folder, host, port)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ValueError(f"cannot listen at {named(host)}, port {port}: {error}; --port 0 is any free port") from None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class _NotFound(Exception):
    """What was asked for is not there."""


class _Handler(BaseHTTPRequestHandler):
    server: BoardServer
    protocol_version = "HTTP/1.1"
    timeout = 30.0  # of a client that sends nothing
    server_version, sys_version = "progrpo", ""

    def do_GET(self) -> None:
        if not self.server.is_own_name(self.headers.get("Host")):
            return self._refuse(HTTPStatus.FORBIDDEN, "this name is not the board's: open the address that it printed")
        try:
            url = urlsplit(self.path)
            names = parse_qs(url.query, max_num_fields=_MOST_COMPARED).get("run", [])
            answer = _ANSWERS.get(url.path)
            if answer is None:
                raise _NotFound("there is no such page")
            kind, policy, body = answer(self.server, names)
        except _NotFound as error:
            return self._refuse(HTTPStatus.NOT_FOUND, str(error))
        except ValueError as error:
            return self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except OSError as error:
            return self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"a file of the run cannot be read: {error.strerror}")
        self._send(HTTPStatus.OK, kind, policy, body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the console is for what the user is to know."""

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        page = _document("progrpo board", f'<h1>{status.phrase}</h1><p class="note">{escape(sentence)}</p>{_BACK}')
        self._send(status, _HTML, _OWN, in_bytes(page))

    def _send(self, status: HTTPStatus, kind: str, policy: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", policy)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


# --- answers ----------------------------------------------------------------------------------------------------------

Answer = tuple[str, str, bytes]
"""The content type, the Content-Security-Policy and the body."""


def _board(server: BoardServer, names: Sequence[str]) -> Answer:
    title = escape(server.folder.resolve().name or server.folder)
    body = (files("progrpo.pages.board") / "board.html").read_text(encoding="utf-8").replace("{folder}", title)
    return _HTML, _OWN, in_bytes(_document(f"{title}: progrpo board", body))


def _style(server: BoardServer, names: Sequence[str]) -> Answer:
    pages = files("progrpo.pages")
    style = (pages / "page.css").read_bytes() + (pages / "board" / "board.css").read_bytes()
    return "text/css; charset=utf-8", _OWN, style


def _script(server: BoardServer, names: Sequence[str]) -> Answer:
    return "text/javascript; charset=utf-8", _OWN, (files("progrpo.pages.board") / "board.js").read_bytes()


def _runs(server: BoardServer, names: Sequence[str]) -> Answer:
    return "application/json", _OWN, json.dumps({"runs": server.listing.rows()}, allow_nan=False).encode()


def _report(server: BoardServer, names: Sequence[str]) -> Answer:
    (folder,) = _folders(server, names[:1])
    with server.writing:
        return _HTML, _OF_RUNS, _current_report(folder)


def _compare(server: BoardServer, names: Sequence[str]) -> Answer:
    page = comparison_page(compare(_folders(server, names)))
    return _HTML, _OF_RUNS, in_bytes(page)


_ANSWERS: dict[str, Callable[[BoardServer, Sequence[str]], Answer]] = {
    "/": _board,
    "/board.css": _style,
    "/board.js": _script,
    "/runs.json": _runs,
    "/report": _report,
    "/compare": _compare,
}


def _folders(server: BoardServer, names: Sequence[str]) -> list[Path]:
    """The folders of these runs, which the list must have: a name is never made a path."""
    listed = server.listing.folders()
    if not names or not set(names) <= listed.keys():
        raise _NotFound("there is no such run")
    return [listed[name] for name in names]


def _current_report(folder: Path) -> bytes:
    """The run's report.html, written anew if the run has gone on since. One that cannot be written is still shown."""
    path = folder / "report.html"
    if not (inside(folder, path) and path.is_file()) or _changed(path) < max(map(_changed, _sources(folder))):
        try:
            write_report(folder)
        except OSError:
            return in_bytes(report_page(folder))
    return path.read_bytes()


def _sources(folder: Path) -> list[Path]:
    return [folder / name for name in ("config.json", "metrics.jsonl", "summary.json")]


def _changed(path: Path) -> int:
    try:
        return os.lstat(path).st_mtime_ns
    except OSError:
        return 0


# --- HTML -------------------------------------------------------------------------------------------------------------

_BACK = '<p class="after"><a href="/">All runs</a></p>'


def _document(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<title>{title}</title><link rel="icon" href="data:,"><link rel="stylesheet" href="/board.css">'
        f'<script src="/board.js" defer></script></head>\n<body><main>\n{body}\n</main></body></html>\n'
    )
