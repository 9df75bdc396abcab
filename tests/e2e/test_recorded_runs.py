"""Runs of pipelines that have no family of their own, by the command line: train, resume, sample."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from progrpo.cli import main
from tests.support.recorded_pipelines import RECORDED_PIPELINES, build


@pytest.mark.parametrize("name", ["z-image", "pixart-sigma"])  # a flow model and a diffusion model
def test_a_run_is_trained_resumed_and_sampled(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = RECORDED_PIPELINES[name]
    build(name).save_pretrained("model")
    (tmp_path / "prompts.txt").write_text("red cat\nblue dog\n")
    options = ["--model.path", "model", "--model.resolution", str(case.resolution), "--model.lora-rank", "2"]
    options += ["--model.max-sequence-length", str(case.tokens), "--sampling.guidance-scale", "3"]
    options += ["--prompts.source", "prompts.txt", "--eval.prompts", "prompts.txt", "--eval.pictures", "2"]
    options += ["--reward.terms", "jpeg_compressibility", "--prompts.per-iteration", "1", "--audit.every", "0"]
    assert main(["train", "smoke", "--out", "run", *options, "--iterations", "1", "--checkpoint.every", "1"]) == 0
    assert main(["train", "--resume", "run", "--iterations", "2"]) == 0
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    assert (tmp_path / "run/lora/pytorch_lora_weights.safetensors").is_file()
    assert main(["sample", "run", "--prompt", "red cat", "--out", "pictures"]) == 0
    (picture,) = (tmp_path / "pictures").glob("*.png")
    assert Image.open(picture).size == (case.resolution, case.resolution)
