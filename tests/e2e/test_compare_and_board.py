"""Pages of runs through the command line: comparisons, and the board as a process that follows a run."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import cast
from urllib.request import urlopen

import pytest

from progrpo.cli import main
from progrpo.tracking.run_folder import RunFolder

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "pages.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run, and its copies as if with another seed and with another learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["train", "smoke", "--out", str(folder / "a"), "--eval.every", "1", "--eval.pictures", "2"]
    assert main([*words, "--audit.every", "0"]) == 0
    config = RunFolder(folder / "a").config.read()
    optim = cast("dict[str, object]", config["optim"])
    changed: dict[str, dict[str, object]] = {"b": {"seed": 1}, "c": {"optim": {**optim, "lr": 0.003}}}
    for name, changes in changed.items():
        shutil.copytree(folder / "a", folder / name)
        RunFolder(folder / name).config.write({**config, **changes})
    return folder


def test_runs_are_compared(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [str(runs / name) for name in "abc"]
    assert main(["compare", *folders]) == 0
    assert capsys.readouterr().out.strip() == "compare.html"
    page = Path("compare.html").read_text()
    assert "smoke, lr 0.001" in page and "smoke, lr 0.003" in page and "Process-hours" in page
    assert main(["compare", *folders, "--json", "--out", "none.html"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [[run["seed"] for run in recipe["runs"]] for recipe in figures["recipes"]] == [[0, 1], [0]]
    assert list(figures["differences"]) == ["optim.lr"] and not Path("none.html").exists()
    assert all(run["processes"] == 1 for recipe in figures["recipes"] for run in recipe["runs"])
    assert len(figures["recipes"][0]["curves"]["eval/graded"]["mean"]) == 2


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("a",), "a comparison needs two runs or more"),
        (("a", "a"), "a is given twice"),
        (("a", "d"), "d is no run folder (it holds no config.json)"),
        (("a", "b", "--out", "a/config.json"), "--out must be the name of a page, such as compare.html"),
        (("a", "b", "--out", "no/c.html"), "no/c.html cannot be written: No such file or directory"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(runs)
    assert main(["compare", *words]) == 2
    assert f"progrpo: error: {sentence}" in capsys.readouterr().err


def test_the_board_follows_and_ends(runs):
    command = [sys.executable, "-m", "progrpo", "board", str(runs), "--port", "0"]
    # a shell that starts tests in the background has its programs ignore Ctrl-C
    ends = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    board = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=ends)
    try:
        assert board.stdout is not None
        line = board.stdout.readline()
        url = line.split(" at ")[1].split()[0]
        assert url.startswith("http://127.0.0.1:") and "Ctrl-C ends it" in line
        assert [run["done"] for run in json.load(urlopen(f"{url}runs.json"))["runs"]] == [2, 2, 2]
        with (runs / "a" / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"iteration": 2, "seconds": 7.0}) + "\n")
        listed = {run["name"]: run for run in json.load(urlopen(f"{url}runs.json"))["runs"]}
        assert listed["a"]["seconds"] == 7.0
        assert b"progrpo run report" in urlopen(f"{url}report?run=a").read()
        board.send_signal(signal.SIGINT)
        out, err = board.communicate(timeout=30)
        assert (board.returncode, out, err) == (130, "", "progrpo: interrupted\n")
    finally:
        board.kill()
        board.communicate()


def test_the_benchmark_of_pages_runs():
    """With a dozen runs; docs/pages.md has its figures with two hundred."""
    command = [sys.executable, str(BENCHMARK), "--runs", "12", "--iterations", "20", "--compared", "4", "--json"]
    results = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    assert results["runs"] == 12 and results["compared"] == 4
