"""The board: its list, and its server against what a browser or a stranger may ask."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote

import pytest

from progrpo.pages.board import serve
from progrpo.pages.board.listing import Listing
from progrpo.pages.board.server import BoardServer
from progrpo.pages.serving import listening
from progrpo.tracking.lock import only_writer
from progrpo.tracking.run_folder import RunFolder

EVIL = '"><script>alert(1)</script> \u202eمرحبا 😀'


def write(folder: Path, records: int = 3, **summary: Any) -> Path:
    run = RunFolder.create(folder)
    run.log_config({"recipe": "mine", "seed": 1, "iterations": 3, "reward": {"terms": [{"name": "shapes"}]}})
    for i in range(records):
        run.log({"iteration": i, "seconds": 2.0, "reward/mean": 0.5 + i}, i)
    figures: Any = {"status": "finished", "iterations": 3, "wall_seconds": 9.0, "reward_before": 0.5, **summary}
    run.summary.write(figures)
    return folder


@pytest.fixture
def board(tmp_path: Path) -> Iterator[BoardServer]:
    root = tmp_path / "runs"
    write(root / "one")
    write(root / "deep" / "two")
    (tmp_path / "secret").mkdir()
    write(tmp_path / "secret" / "run")
    with listening(BoardServer, root, "127.0.0.1", 0) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(board: BoardServer, path: str, method: str = "GET", host: str = "localhost") -> tuple[int, str, Any]:
    """The status, the body and the headers of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", board.server_address[1], timeout=20)
    try:
        connection.putrequest(method, path, skip_host=True)
        connection.putheader("Host", host)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers
    finally:
        connection.close()


# --- the list ---------------------------------------------------------------------------------------------------------


def test_the_list_follows_a_run(tmp_path):
    listing = Listing(tmp_path)
    folder = write(tmp_path / "a", 2, status="running", iterations=1)
    (row,) = listing.rows()
    assert (row["name"], row["status"], row["done"], row["iterations"]) == ("a", "killed", 2, 3)
    with only_writer(folder):
        assert listing.rows()[0]["status"] == "running"
        RunFolder(folder).log({"iteration": 2, "seconds": 3.0, "reward/mean": 9.0}, 2)
        (row,) = listing.rows()
        assert (row["done"], row["reward_now"], row["seconds"]) == (3, 9.0, 3.0)
    write(tmp_path / "b")
    assert {row["name"]: row["status"] for row in listing.rows()} == {"a": "killed", "b": "finished"}
    (tmp_path / "b" / "config.json").unlink()
    assert [row["name"] for row in listing.rows()] == ["a"]


def test_only_what_changed_is_read_again(tmp_path, monkeypatch):
    write(tmp_path / "a")
    write(tmp_path / "b")
    listing = Listing(tmp_path)
    listing.rows()
    opened: list[str] = []
    real = Path.open

    def watched(path: Path, *args: Any) -> Any:
        opened.append(path.name)
        return real(path, *args)

    monkeypatch.setattr(Path, "open", watched)
    listing.rows()
    assert opened == []
    RunFolder(tmp_path / "b").log({"iteration": 3, "seconds": 1.0}, 3)
    opened.clear()
    listing.rows()
    assert sorted(opened) == ["config.json", "metrics.jsonl", "summary.json"]


def test_a_long_file_of_metrics_is_read_from_its_end(tmp_path):
    folder = write(tmp_path / "a", 0, status="running", iterations=0)
    lines = [json.dumps({"iteration": i, "seconds": 1.0, "filling": "x" * 100}) for i in range(2000)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"iteration": 2000, "sec')  # its writer is at a line
    assert Listing(tmp_path).rows()[0]["done"] == 2000


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize("damage", ['{"a":', "[1]", "\xff", "[" * 10_000])
def test_a_damaged_run_is_said_and_hides_no_other(tmp_path, name, damage):
    write(tmp_path / "a")
    write(tmp_path / "b")
    (tmp_path / "a" / name).write_text(damage, encoding="latin-1")
    rows = {row["name"]: row for row in Listing(tmp_path).rows()}
    assert rows["b"]["error"] is None and rows["a"]["status"] == "damaged"
    assert str(rows["a"]["error"]).startswith("a cannot be read as progrpo writes it")


@pytest.mark.parametrize(
    "change",
    [
        {"iterations": "many", "reward_before": "<b>", "wall_seconds": float("inf"), "status": ["x"]},
        {"recipe": EVIL, "status": EVIL},
        {"iterations": float("nan")},
        {"iterations": 10**400},
    ],
)
def test_values_of_another_kind_are_left_out(tmp_path, change):
    folder = write(tmp_path / "a")
    (folder / "summary.json").write_text(json.dumps(change))
    json.dumps(Listing(tmp_path).rows(), allow_nan=False)


def test_links_out_of_the_folder_are_not_listed(tmp_path):
    write(tmp_path / "far" / "a")
    root = tmp_path / "runs"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "far" / "a")
    (root / "folder").symlink_to(tmp_path / "far")
    assert Listing(root).rows() == []
    folder = write(root / "b")
    (folder / "summary.json").unlink()
    (folder / "summary.json").symlink_to(tmp_path / "far" / "a" / "summary.json")
    (row,) = Listing(root).rows()
    assert row["status"] == "damaged" and "link out of the run folder" in str(row["error"])


# --- the server -------------------------------------------------------------------------------------------------------


def test_the_board_its_list_and_a_run(board):
    status, page, headers = ask(board, "/")
    assert status == 200 and '<h1 dir="auto">runs</h1>' in page and "<script>" not in page
    assert "script-src 'self'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
    for path in ("/board.css", "/board.js"):
        assert ask(board, path)[0] == 200
    status, listed, _ = ask(board, "/runs.json")
    assert status == 200 and {run["name"] for run in json.loads(listed)["runs"]} == {"one", "deep/two"}
    status, page, headers = ask(board, "/report?run=deep/two")
    assert status == 200 and "progrpo run report" in page
    policy = headers["Content-Security-Policy"]
    assert "sandbox allow-scripts;" in policy and "default-src 'none'" in policy and "connect-src" not in policy
    status, page, headers = ask(board, "/compare?run=one&run=deep/two")
    assert status == 200 and "progrpo comparison" in page and "sandbox" in headers["Content-Security-Policy"]


def test_a_report_is_written_when_the_run_has_gone_on(board):
    folder = board.folder / "one"
    ask(board, "/report?run=one")
    (folder / "report.html").write_text("as it was")
    assert ask(board, "/report?run=one")[1] == "as it was"
    RunFolder(folder).log({"iteration": 3, "seconds": 1.0}, 3)
    os.utime(folder / "metrics.jsonl", (2e9, 2e9))
    assert "progrpo run report" in ask(board, "/report?run=one")[1]
    assert "progrpo run report" in (folder / "report.html").read_text()


def test_a_report_that_is_a_link_is_not_followed(board, tmp_path):
    secret = tmp_path / "secret.html"
    secret.write_text("secret")
    os.utime(secret, (3e9, 3e9))
    (board.folder / "one" / "report.html").symlink_to(secret)
    status, page, _ = ask(board, "/report?run=one")
    assert status == 200 and "progrpo run report" in page and secret.read_text() == "secret"


def test_a_report_that_cannot_be_written_is_still_shown(board):
    (board.folder / "one" / "report.html").mkdir()
    status, page, _ = ask(board, "/report?run=one")
    assert status == 200 and "progrpo run report" in page


PATHS = (
    "../secret/run",
    "..",
    ".",
    "",
    "one/..",
    "one/../one",
    "/etc",
    "one\0",
    "one/",
    "./one",
    "%2e%2e",
    "..\\secret",
)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", ["report?run=", "compare?run=one&run="])
def test_a_name_is_no_path(board, name, kind):
    status, page, _ = ask(board, f"/{kind}{quote(name, safe='')}")
    assert status in (404, 422) and "report" not in page  # an empty name is none, and one run is no comparison


@pytest.mark.parametrize(
    "path",
    ["/one/config.json", "/../secret/run/config.json", "/%2e%2e/secret", "//etc/passwd", "/one", "/report", "*", "//["],
)
def test_there_are_no_other_pages(board, path):
    assert ask(board, path)[0] in (404, 422)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"])
def test_nothing_but_get_is_answered(board, method):
    assert ask(board, "/", method)[0] == 501


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "127.0.0.1.evil.example", "[", "10.0.0.1"])
def test_a_name_that_was_resolved_to_this_machine_is_refused(board, host):
    for path in ("/", "/runs.json", "/report?run=one"):
        status, page, _ = ask(board, path, host=host)
        assert status == 403 and "mine" not in page


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8100", "[::1]:8100", "LOCALHOST:1"])
def test_this_machines_names_are_known(board, host):
    assert ask(board, "/runs.json", host=host)[0] == 200


def test_errors_are_words(board):
    folder = write(board.folder / "x<b>")
    (folder / "config.json").write_text('{"recipe": ["<script>alert(1)</script>"')
    status, page, headers = ask(board, f"/report?run={quote('x<b>')}")
    assert (
        status == 422
        and "<script>" not in page
        and "<b>" not in page
        and "cannot be read" in page.replace("is not JSON", "cannot be read")
    )
    assert "script-src 'self'" in headers["Content-Security-Policy"]


def test_a_board_that_cannot_start_says_why(tmp_path, board):
    with pytest.raises(ValueError, match="is no folder; train a run first"):
        serve(tmp_path / "none", "127.0.0.1", 0)
    with pytest.raises(ValueError, match=r"cannot listen at 127\.0\.0\.1, port \d+: .*in use.*--port 0"):
        serve(tmp_path, "127.0.0.1", board.server_address[1])
    with pytest.raises(ValueError, match=r"cannot listen at no\.such\.name\.invalid"):
        serve(tmp_path, "no.such.name.invalid", 0)
