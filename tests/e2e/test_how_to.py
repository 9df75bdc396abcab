"""The how-to examples of docs/, followed literally: a reward, a tracker, an objective and a model family."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import progrpo
from progrpo.cli import main
from progrpo.config import AuditSettings, Config, EvalSettings, ModelSettings, PromptSettings, SamplingSettings
from progrpo.policies.load import FAMILIES, policy_from_pipeline
from tests.e2e.test_readme import ROOT, snippet
from tests.support.policies import TOKENS, sample_by_diffusers, sample_without_noise
from tests.support.recorded_pipelines import build

ONE = ("--iterations", "1", "--audit.every", "0")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder whose modules can be imported, and are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


def write(page: str, marker: str) -> None:
    code = snippet(ROOT / page, marker)
    Path(code.splitlines()[0].removeprefix("# ")).write_text(code)


def test_a_reward_of_ones_own_reads_a_column(folder: Path, on_a_tiny_model: list[str]) -> None:
    write("docs/rewards.md", "reward")
    rows = [{"prompt": "a cat", "target": 0.5}, {"prompt": "a dog", "target": 0.1}, {"prompt": "a sky", "target": 0.2}]
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    given = ["--prompts.source", "rows.jsonl", "--eval.prompts", "rows.jsonl", "--reward.terms", "my_module:redness"]
    options = [w for i, w in enumerate(on_a_tiny_model) if not {w, on_a_tiny_model[i - 1]} & set(given)]
    assert main(["train", "smoke", "--out", "run", *ONE, *options, *given]) == 0
    [record] = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert 0 < record["reward/mean"] <= 1


def test_a_tracker_of_ones_own_hears_every_iteration(folder: Path, on_a_tiny_model: list[str]) -> None:
    write("docs/tracking.md", "tracker")
    options = [*ONE, *on_a_tiny_model, "--tracking.to", "my_trackers:FileTracker"]
    assert main(["train", "smoke", "--out", "run", *options]) == 0
    assert main(["train", "--resume", "run", "--iterations", "2"]) == 0
    records = [json.loads(line) for line in Path("run/own.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "reward/mean" in r] == [0, 1]


def test_an_objective_of_ones_own_trains(folder: Path, on_a_tiny_model: list[str]) -> None:
    write("docs/extending.md", "extending")
    objective = ["--objective.name", "my_parts:Reinforce", "--objective.custom", '{"scale": 0.5}']
    assert main(["train", "smoke", "--out", "run", *ONE, *on_a_tiny_model, *objective]) == 0
    [record] = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert record["update/grad_norm"] > 0


def test_a_latent_reward_of_ones_own_ranks(folder: Path, on_a_tiny_model: list[str]) -> None:
    write("docs/extending.md", "extending")
    plan = ["--plan.preset", "custom", "--plan.group-size", "4", "--plan.prune", "1", "2"]
    latent = ["--preview.latent-reward", "my_parts:calm"]
    assert main(["train", "smoke", "--out", "run", *ONE, *on_a_tiny_model, *plan, *latent]) == 0
    [record] = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert record["rollout/probed"] > 0


# --- a model family ---------------------------------------------------------------------------------------------------


@pytest.fixture
def family(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("docs/extending.md", "family")
    monkeypatch.setitem(FAMILIES, "AuraFlowPipeline", "my_family:AuraFlow")


def test_a_family_of_ones_own_draws_what_its_pipeline_draws(family: None) -> None:
    settings = ModelSettings(max_sequence_length=TOKENS, lora_rank=2, resolution=16)
    policy = policy_from_pipeline(build("aura-flow"), settings)
    expected = sample_by_diffusers(build("aura-flow"), policy, 1.0, "latent", max_sequence_length=TOKENS)
    torch.testing.assert_close(sample_without_noise(policy, 1.0), expected, rtol=0, atol=1e-5)


def test_a_family_of_ones_own_trains(family: None) -> None:
    config = Config(
        iterations=1,
        model=ModelSettings(max_sequence_length=TOKENS, lora_rank=2),
        prompts=PromptSettings(per_iteration=2),
        sampling=SamplingSettings(num_inference_steps=4),
        eval=EvalSettings(pictures=2, num_inference_steps=4),
        audit=AuditSettings(every=0),
    )
    run = progrpo.train(build("aura-flow"), ["a cat", "a dog"], "jpeg_compressibility", config=config, out="run")
    trained = build("aura-flow")
    trained.load_lora_weights(run.path / "lora")
    assert run.summary.read()["iterations"] == 1
