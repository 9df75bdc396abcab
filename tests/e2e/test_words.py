"""The words world as a user has it: train by the recogniser, evaluate on the suite, and do without rapidocr."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
from diffusers import StableDiffusion3Pipeline

from progrpo.cli import main
from progrpo.rewards.ocr import OCR
from progrpo.zoo import WEIGHTS
from progrpo.zoo.words.pretrain import measure

SMALL = {
    "--iterations": 1,
    "--prompts.per-iteration": 1,
    "--plan.group-size": 4,
    "--sampling.num-inference-steps": 2,
    "--eval.pictures": 3,
    "--eval.num-inference-steps": 2,
    "--audit.every": 0,
    "--model.dtype": "float32",
}


def test_the_recipe_trains_by_what_is_read(tmp_path: Path) -> None:
    pytest.importorskip("rapidocr")
    run = tmp_path / "run"
    options = [str(word) for option in SMALL.items() for word in option]
    assert main(["train", "words-flow", *options, "--out", str(run)]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and set(summary["held_out_after"]) == {"ocr"}
    assert set(summary["accuracy_by_kind_after"]) == {"2 letters", "3 letters", "4 letters"}
    assert summary["judge_after"] is None
    config = json.loads((run / "config.json").read_text())
    assert (config["prompts"]["source"], config["eval"]["prompts"]) == ("words", "words")


def test_the_model_alone_is_measured_on_words_by_what_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rapidocr")
    assert main(["eval", "words-flow", "--pictures", "3", "--num-inference-steps", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures["strict_by_kind"]) == {"2 letters", "3 letters", "4 letters"}


def test_the_suite_tells_words_apart_by_their_letters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rapidocr")
    size = ["--limit", "3", "--per-prompt", "2", "--num-inference-steps", "2", "--split", "validation"]
    assert main(["eval", "words-flow", "--suite", "words", *size, "--json", "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kinds"] == ["2 letters", "3 letters", "4 letters"] and result["score"] == "accuracy"
    assert {"accuracy", "ocr", "diversity", "vendi"} <= set(result["models"][0]["figures"])


def test_without_rapidocr_the_way_to_install_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rapidocr" else there(name))
    for command in (
        ["train", "words-flow", "--out", str(tmp_path / "run")],
        ["eval", "words-flow"],
        ["eval", "words-flow", "--suite", "words", "--out", str(tmp_path / "out")],
        ["pretrain", "words-flow", "--out", str(tmp_path / "state")],
    ):
        assert main(command) == 2
        assert "needs rapidocr, which is not installed: pip install 'progrpo[ocr]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_shipped_model_spells_as_its_card_says() -> None:
    """48 pictures have a standard error of 7 points."""
    pytest.importorskip("rapidocr")
    pipeline = StableDiffusion3Pipeline.from_pretrained(WEIGHTS / "words-flow")
    stated = json.loads((WEIGHTS / "words-flow" / "figures.json").read_text())
    scores = measure(pipeline, OCR.load(), "test", 48)
    assert scores["exact"] == pytest.approx(stated["test"]["10 steps"]["exact"], abs=0.2)
    assert stated["drawn"]["exact"] > 0.95 and stated["round_trip"]["exact"] > 0.95


def test_the_page_has_the_tables_of_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    words = importlib.import_module("words")
    page = (root / words.PAGE).read_text(encoding="utf-8")
    assert words.with_tables(page, json.loads((root / "docs/results/words_flow.json").read_text())) == page
