"""`benchmarks/real.py --rehearse`: the code that real weights would run, on a built-in model."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = Path(__file__).parents[2] / "docs/results"


@pytest.mark.slow
def test_a_rehearsal_trains_two_arms_and_writes_page_and_upload(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    real = importlib.import_module("real")
    runs, out = tmp_path / "runs", tmp_path / "out"
    options = ["--rehearse", "shapes", "--seeds", "0", "--arms", "plain GRPO", "DGPO", "--hours", "0"]
    options += ["--runs", str(runs), "--out", str(out)]
    real.main(options)
    data = json.loads((out / "rehearsal.json").read_text())
    assert [run["arm"] for run in data["runs"]] == ["plain GRPO", "DGPO"] and set(data["configs"]) == {
        "plain GRPO",
        "DGPO",
    }
    for run in data["runs"]:
        assert run["gpu_hours"] > 0 and run["points"][-1]["kl"] is not None and len(run["agreement"][0]) == 10
        assert set(run["summary"]["held_out_after"]) == {"shapes_strict", "shapes_taste"}
    text = (out / "rehearsal.md").read_text()
    assert "is a rehearsal" in text and "| DGPO | 1 | 5 |" in text and "flow_grpo fast |" not in text
    images = [out / "rehearsal_hours.svg", out / "rehearsal_kl.svg"]
    assert all("polyline" in image.read_text() for image in images)
    (out / "rehearsal.md").write_text("")
    real.main([*options, "--page"])
    assert (out / "rehearsal.md").read_text() == text

    upload = tmp_path / "upload"
    upload.mkdir()
    places = {(run["arm"], 0): runs / real.folder_of(run["arm"]) / "seed0" for run in data["runs"]}
    real.write_upload([out / "rehearsal.json", out / "rehearsal.md", *images], places, "me/real", upload)
    assert (upload / "README.md").read_text() == text
    for arm in ("plain-grpo", "dgpo"):
        own = {path.name for path in (upload / "runs" / arm / "seed0").iterdir()}
        assert {"README.md", "config.json", "metrics.jsonl", "pytorch_lora_weights.safetensors"} <= own


@pytest.mark.skipif(not (RESULTS / "rehearsal.json").exists(), reason="no rehearsal is committed")
def test_the_committed_rehearsal_is_what_its_json_gives(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    real = importlib.import_module("real")
    data = json.loads((RESULTS / "rehearsal.json").read_text())
    files = {"rehearsal.md": real.page(data), **real.pictures(data)}
    for name, text in files.items():
        assert (RESULTS / name).read_text() == text
