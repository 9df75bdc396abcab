"""Streams that are gone, full or of another encoding: they do not end what a process works on."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import progrpo
from progrpo.cli import main
from progrpo.streams import failure_of, tolerant, tolerant_streams
from progrpo.tracking.console import Console
from progrpo.tracking.records import Metrics

RECORD: Metrics = {"iteration": 0, "seconds": 1.0, "reward/mean": None, "rollout/nfe": 10}


def unread_pipe():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", encoding="utf-8")


def full_disk():
    return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", encoding="utf-8")


def closed_terminal():
    main_side, terminal = pty.openpty()
    os.close(main_side)
    return os.fdopen(terminal, "w", encoding="utf-8")


def closed_file():
    file = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    file.close()
    return file


def full_pipe():
    """Of a reader that has set it not to block, as some terminals and programs do, and is slow."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    ends.append(read)  # it stays open
    return os.fdopen(write, "w", encoding="utf-8")


ends: list[int] = []
GONE = [unread_pipe, full_disk, closed_terminal, closed_file, full_pipe]


def let_go(stream):
    """Closed without a word of what it holds still."""
    if not stream.closed:
        os.dup2(nowhere := os.open(os.devnull, os.O_WRONLY), stream.fileno())
        os.close(nowhere)
        stream.close()


@pytest.mark.parametrize("gone", GONE)
def test_nothing_that_is_printed_raises(gone):
    stream = gone()
    with pytest.raises((OSError, ValueError)):
        print("a word", file=stream, flush=True)
    safe = tolerant(stream)
    print("a word", file=safe, flush=True)
    safe.writelines(["a", "b"])
    safe.flush()
    assert not safe.isatty() and failure_of(safe) is not None and tolerant(safe) is safe
    let_go(stream)


@pytest.mark.parametrize("gone", GONE)
def test_a_console_goes_on_in_silence(gone):
    stream = gone()
    console = Console(2, file=stream)
    console.say("hello")
    console.warn("careful")
    console.log(RECORD, 0)
    console.summary_table({"reward_before": 0.5})
    let_go(stream)


def test_a_terminal_that_closes_between_two_lines_is_left_in_silence():
    main_side, terminal = pty.openpty()
    stream = os.fdopen(terminal, "w", encoding="utf-8")
    console = Console(2, file=stream)
    console.log(RECORD, 0)
    assert b"iteration" in os.read(main_side, 4096)
    os.close(main_side)
    console.log({**RECORD, "iteration": 1}, 1)
    console.summary_table({"reward_before": 0.5})
    let_go(stream)


@pytest.mark.parametrize(
    ("encoding", "words"), [("ascii", "reward \\u2013"), ("cp1252", "reward –"), ("utf-8", "reward –")]
)
def test_a_character_that_the_encoding_lacks_is_written_as_its_escape(encoding, words):
    written = io.BytesIO()
    console = Console(2, file=io.TextIOWrapper(written, encoding=encoding, write_through=True))
    console.log(RECORD, 0)
    console.say("→ \ud800")
    said = written.getvalue().decode(encoding)
    assert words in said and said.endswith("\n") and ("\\ud800" in said)


def test_without_a_console_nothing_is_said(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    Console(2).log(RECORD, 0)
    with tolerant_streams():
        print("a word", file=sys.stderr)
        assert failure_of(sys.stdout) is None
    assert sys.stdout is None and sys.stderr is None


def test_the_streams_of_the_block_are_those_of_before_after_it():
    before = sys.stdout, sys.stderr
    with tolerant_streams():
        with tolerant_streams():
            pass
        assert sys.stdout.encoding == before[0].encoding and sys.stdout is not before[0]
        sys.stderr = other = io.StringIO()
    assert sys.stdout is before[0] and sys.stderr is other
    sys.stderr = before[1]


# --- the command line -------------------------------------------------------------------------------------------------


def run(script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(progrpo.__file__).parents[1])}
    command = script.replace("progrpo", f"{sys.executable} -m progrpo")
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=60)


def test_a_result_that_cannot_be_printed_is_a_failure_and_a_sentence():
    done = run("progrpo recipes > /dev/full")
    assert done.returncode == 1
    assert done.stderr == "progrpo: standard output cannot be written: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("lost", ["2> /dev/full", "2>&-", ">&- 2>&-", "> /dev/full 2> /dev/full"])
def test_a_mistake_has_its_exit_code_where_it_cannot_be_said(lost):
    assert run(f"progrpo bogus {lost}").returncode == 2


def test_an_encoding_without_a_character_does_not_make_a_mistake_of_a_result():
    done = run("PYTHONIOENCODING=ascii progrpo report /nowhere/“run”")
    assert done.returncode == 2 and "\\u201crun\\u201d is no run folder" in done.stderr


def test_files_are_not_given_the_numbers_of_closed_streams(tmp_path):
    """A library's word would be written into them."""
    probe = (
        "import os; from progrpo.cli import main; main(['--version']);"
        " print(os.open('{}', os.O_CREAT) > 2, file=open('{}', 'w'))"
    )
    (tmp_path / "probe.py").write_text(probe.format(tmp_path / "a", tmp_path / "found"))
    environment = {**os.environ, "PYTHONPATH": str(Path(progrpo.__file__).parents[1])}
    command = f"{sys.executable} {tmp_path / 'probe.py'} <&- >&- 2>&-"
    subprocess.run(["bash", "-c", command], env=environment, check=True, timeout=60)
    assert (tmp_path / "found").read_text() == "True\n"


def test_a_costly_result_goes_to_standard_error_where_standard_output_is_gone(monkeypatch, capfd):
    stream = unread_pipe()
    monkeypatch.setattr(sys, "stdout", stream)
    measured = ["eval", "shapes-flow", "--pictures", "2", "--num-inference-steps", "2", "--json"]
    assert main(measured) == 128 + signal.SIGPIPE
    assert json.loads(capfd.readouterr().err.partition("progrpo:")[0])["pictures"] == 2
    let_go(stream)


def test_pictures_that_are_written_are_no_failure_where_their_names_cannot_be_printed(monkeypatch, tmp_path):
    stream = full_disk()
    monkeypatch.setattr(sys, "stdout", stream)
    drawn = ["sample", "shapes-flow", "--prompt", "a red circle", "--out", str(tmp_path), "--num-inference-steps", "2"]
    assert main(drawn) == 0 and (tmp_path / "000-00.png").is_file()
    let_go(stream)
