"""A killed run goes on where it was and ends the same, bit for bit; `make kill-test` kills a hundred times."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from progrpo.config import config_to_json

STAGES = (
    5,
    10,
    15,
)  # what of a checkpoint's writing is not done any more: in the midst of its tensors, later, and near its end


@pytest.mark.slow
def test_a_killed_run_is_a_straight_run(tiny_sd3, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    kill = importlib.import_module("kill")
    config = kill.configuration(tmp_path)
    config = replace(config, iterations=6, model=replace(config.model, path=str(tiny_sd3), lora_rank=2, lora_alpha=4))
    (tmp_path / "config.json").write_text(config_to_json(config))
    # it exits where runs differ
    campaign = kill.Campaign(tmp_path / "config.json", tmp_path, 0, STAGES, "checkpoints").go(5)
    assert campaign.kills >= 5 and campaign.bytes_lost == 0
    assert sum(times for stage, times in campaign.by_stage.items() if stage.startswith("checkpoints: ")) >= len(STAGES)
