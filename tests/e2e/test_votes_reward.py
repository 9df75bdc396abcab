"""A run whose reward is people's votes: a voter over HTTP beside it, and one who never votes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from progrpo.cli import main
from progrpo.pages.serving import listening
from progrpo.preferences.label.server import LabelServer
from progrpo.preferences.pairs import read_pairs
from progrpo.preferences.questions import WAITING, Questions
from progrpo.preferences.votes import VOTES, Votes
from tests.e2e.test_labelling import post, urlopen


@contextmanager
def voter(folder: Path) -> Iterator[None]:
    """Someone who prefers the picture with more red, through the page's server, until the block ends."""
    over = threading.Event()

    def server(folder: Path, host: str, port: int) -> LabelServer:
        return LabelServer(folder, host, port, Questions(folder), Votes(folder))

    def vote() -> None:
        address = f"http://127.0.0.1:{page.server_address[1]}/"
        while not over.wait(0.05):
            state = json.load(urlopen(f"{address}state.json?annotator=red", timeout=10))
            for asked in state["next"]:
                left, right = (redness(urlopen(address + asked[side][1:])) for side in ("left", "right"))
                choice = "tie" if left == right else "left" if left > right else "right"
                post(address, "vote", annotator="red", id=asked["id"], choice=choice)

    (folder / WAITING).mkdir(parents=True)
    with listening(server, folder, "127.0.0.1", 0) as page:
        serving = threading.Thread(target=page.serve_forever, kwargs={"poll_interval": 0.01})
        voting = threading.Thread(target=vote)
        serving.start()
        voting.start()
        try:
            yield
        finally:
            over.set()
            voting.join()
            page.shutdown()
            serving.join()


def redness(file) -> float:
    return float(np.asarray(Image.open(file).convert("RGB"))[..., 0].mean())


def train(folder: Path, tiny: list[str], **term: object) -> int:
    words = json.dumps({"name": "votes", "model": str(folder / "votes"), **term})
    few = ("--iterations", "1", "--audit.every", "0", "--eval.pictures", "2")
    return main(["train", "smoke", "--out", str(folder / "run"), *tiny, *few, "--reward.terms", words])


def test_a_run_is_rewarded_by_votes(tmp_path, on_a_tiny_model):
    with voter(tmp_path / "votes"):
        assert train(tmp_path, on_a_tiny_model, timeout=60) == 0
    pairs = read_pairs(tmp_path / "votes" / VOTES)
    assert {pair.annotator for pair in pairs} == {"red"} and len(pairs) >= 8
    for pair in pairs:
        red = [redness(path) for path in (pair.image_a, pair.image_b)]
        assert pair.preference == (0.5 if red[0] == red[1] else float(red[0] > red[1]))
    assert list((tmp_path / "votes" / WAITING).iterdir()) == []
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["rewards"]["missing"] == {"votes": 0}
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(metrics["reward/mean"]) < 2 and metrics["reward/std"] > 0


def test_without_votes_the_scores_are_missing_and_the_run_says_so(tmp_path, on_a_tiny_model, capsys):
    assert train(tmp_path, on_a_tiny_model, timeout=0.3) == 1
    error = capsys.readouterr().err
    assert "scores of reward votes are missing" in error and "nobody voted in time" in error
    assert not (tmp_path / "votes" / VOTES).exists()


@pytest.mark.parametrize(
    ("term", "sentence"),
    [
        ({"model": ""}, "reward 'votes': no folder is named"),
        ({"cache": "c"}, "ranks a group"),
        ({"processes": 2}, "ranks a group"),
    ],
)
def test_a_term_that_cannot_be_is_refused(tmp_path, on_a_tiny_model, capsys, term, sentence):
    assert train(tmp_path, on_a_tiny_model, **term) == 2
    assert sentence in capsys.readouterr().err
