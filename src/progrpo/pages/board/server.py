"""The board's server: it answers GET alone, and reads nothing but the runs that its list names.

The browser is told to keep a run's page, which may be a stranger's, apart from everything else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from threading import Lock

from progrpo.pages.board.listing import Listing
from progrpo.pages.compare import compare, comparison_page
from progrpo.pages.page import escape
from progrpo.pages.report import report_page, write_report
from progrpo.pages.run_data import inside
from progrpo.pages.serving import CSS, HTML, JAVASCRIPT, JSON, OWN, Answer, Fields, NotFound, PageServer
from progrpo.tracking.files import in_bytes

_OF_RUNS = (  # an origin of its own, without network: reports have their scripts, styles and pictures inside
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class BoardServer(PageServer):
    """The server of one folder's runs."""

    name = "board"

    def __init__(self, folder: Path, host: str, port: int) -> None:
        self.listing = Listing(folder)
        self.writing = Lock()
        """Held while a report is written: two threads would write the same unfinished file."""
        super().__init__(folder, host, port)

    def get(self, path: str, fields: Fields) -> Answer:
        if path not in _ANSWERS:
            raise NotFound("there is no such page")
        return _ANSWERS[path](self, fields.get("run", []))


# --- answers ----------------------------------------------------------------------------------------------------------


def _board(server: BoardServer, names: Sequence[str]) -> Answer:
    title = escape(server.folder.resolve().name or server.folder)
    body = (files("progrpo.pages.board") / "board.html").read_text(encoding="utf-8").replace("{folder}", title)
    return HTML, OWN, in_bytes(server.document(f"{title}: progrpo board", body))


def _style(server: BoardServer, names: Sequence[str]) -> Answer:
    pages = files("progrpo.pages")
    return CSS, OWN, (pages / "page.css").read_bytes() + (pages / "board" / "board.css").read_bytes()


def _script(server: BoardServer, names: Sequence[str]) -> Answer:
    return JAVASCRIPT, OWN, (files("progrpo.pages.board") / "board.js").read_bytes()


def _runs(server: BoardServer, names: Sequence[str]) -> Answer:
    return JSON, OWN, json.dumps({"runs": server.listing.rows()}, allow_nan=False).encode()


def _report(server: BoardServer, names: Sequence[str]) -> Answer:
    (folder,) = _folders(server, names[:1])
    with server.writing:
        return HTML, _OF_RUNS, _current_report(folder)


def _compare(server: BoardServer, names: Sequence[str]) -> Answer:
    page = comparison_page(compare(_folders(server, names)))
    return HTML, _OF_RUNS, in_bytes(page)


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
        raise NotFound("there is no such run")
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
