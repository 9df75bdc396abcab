"""Recorded pairs in place of sampled groups: what they become, and what a run learns from them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from progrpo.cli import main
from progrpo.policies.load import load_policy
from progrpo.policies.settings import ModelSettings
from progrpo.preferences.pairs import Pair, read_pairs, write_pairs
from progrpo.preferences.recorded import recorded_pairs
from progrpo.types import Prompt
from progrpo.zoo.shapes import world


@pytest.fixture(scope="module")
def shapes_policy():
    return load_policy(ModelSettings("shapes-flow"))


@pytest.fixture
def pairs_file(tmp_path):
    """Six pairs of the shapes world: flat pictures, of which the brighter is preferred; one tie, one split vote."""
    pairs = []
    votes = (1.0, 0.0, 1.0, 0.5, 0.75, 0.0)
    for i, (prompt, vote) in enumerate(zip(world.sample_prompts("train", 6, seed=0), votes, strict=True)):
        a, b = tmp_path / f"{i}-a.png", tmp_path / f"{i}-b.png"
        for path, light in zip((a, b), (200, 60) if vote > 0.5 else (60, 200), strict=True):
            Image.fromarray(np.full((64, 64, 3), light, np.uint8)).save(path)
        pairs.append(Pair(Prompt(prompt.text), a, b, vote, strength=2.0 if i == 2 else 1.0))
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    return tmp_path / "pairs.jsonl"


def test_a_pair_is_a_group_of_two_finished_trajectories(pairs_file, shapes_policy):
    prompts = [pair.as_prompt() for pair in read_pairs(pairs_file)]
    slots = torch.arange(len(prompts)) + 3
    rolled = recorded_pairs(shapes_policy, prompts, slots)
    assert rolled.group_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert torch.equal(rolled.trajectories.slot_N, slots[rolled.group_N])
    assert rolled.trajectories.member_N.tolist() == [0, 1] * 6
    first = Image.open(prompts[0].columns["image_a"])
    torch.testing.assert_close(rolled.trajectories.x_NCHW[:1], shapes_policy.encode_pictures([first]))
    assert rolled.survivors.value_N.tolist() == [1, 0, 0, 1, 1, 0, 0.5, 0.5, 0.75, 0.25, 0, 1]
    assert rolled.weight_P is not None
    assert rolled.weight_P.tolist() == [1, 1, 2, 0, 0.5, 1]
    assert np.array_equal(rolled.pictures.images_NHWC[0].numpy(), np.asarray(first))


@pytest.mark.parametrize("advantage", ["group", "batch"])
def test_the_weight_of_a_pair_is_that_of_its_advantages(pairs_file, shapes_policy, advantage):
    from progrpo.config import ObjectiveSettings
    from progrpo.rollout.noise import NoiseKey
    from progrpo.rollout.sampling import ode
    from progrpo.training.distributed import Ranks
    from progrpo.training.experience import AdvantageEstimator

    prompts = [pair.as_prompt() for pair in read_pairs(pairs_file)]
    rolled = recorded_pairs(shapes_policy, prompts, torch.arange(len(prompts)))
    estimator = AdvantageEstimator(ObjectiveSettings(advantage=advantage, adv_eps=1e-12), 5.0, {"shapes": 1.0}, Ranks())
    experience, tally = estimator.experience(rolled, ode(shapes_policy, 4, 1.0, 8), NoiseKey(0, 0))
    expected = [1, -1, -1, 1, 2, -2, 0, 0, 0.5, -0.5, -1, 1]
    assert experience.advantages_N.tolist() == pytest.approx(expected)
    assert "reward/mean" not in tally.sums  # a preference has no mean


@pytest.mark.parametrize(
    "objective", ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "dgpo"))]
)
def test_a_run_learns_from_recorded_pairs_and_samples_none(pairs_file, tmp_path, objective, capsys):
    out = tmp_path / "run"
    command = ["train", "smoke", "--objective.name", objective, "--prompts.pairs", str(pairs_file), "--out", str(out)]
    assert main([*command, "--iterations", "3", "--eval.pictures", "2"]) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3 and all(record["rollout/nfe"] == record["rollout/decodes"] == 0 for record in records)
    assert all("reward/mean" not in record for record in records)
    assert sum(record["rollout/trained_steps"] for record in records) > 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["cost"]["counted"]["nfe"] == summary["cost"]["predicted"]["nfe"] == 0
    assert "2 recorded pairs of" in capsys.readouterr().out
    assert "nothing is sampled" in (out / "report.html").read_text()
    if objective == "dpo":
        assert records[0]["update/dpo_loss"] <= 2 * math.log(2) + 1e-6
        assert records[0]["update/dpo_accuracy"] == 0.5


@pytest.mark.slow
def test_a_stopped_run_on_pairs_goes_on_as_if_it_had_not_stopped(pairs_file, tmp_path):
    base = ["smoke", "--objective.name", "dpo", "--prompts.pairs", str(pairs_file), "--eval.pictures", "2"]
    base += ["--plan.preset", "auto"]  # a plan is not read with pairs, nor when the run goes on
    exact = ["--model.dtype", "float32", "--sampling.microbatch", "12", "--optim.microbatch", "40"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main(["train", *base, *exact, "--iterations", "4", "--out", str(straight)]) == 0
    assert main(["train", *base, *exact, "--iterations", "2", "--out", str(stopped)]) == 0
    assert main(["train", "--resume", str(stopped), "--iterations", "4"]) == 0
    losses = [
        [json.loads(line)["update/dpo_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (straight, stopped)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_faults_of_the_pairs_file_are_listed_before_a_model_is_loaded(pairs_file, tmp_path, capsys):
    with pairs_file.open("a") as file:
        file.write('{"prompt": "a cross", "image_a": "gone.png", "image_b": "0-a.png", "preference": "a"}\nnot JSON\n')
    out = tmp_path / "run"
    command = ["train", "smoke", "--objective.name", "dpo", "--prompts.pairs", str(pairs_file), "--out", str(out)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "line 7" in error and "gone.png" in error and "line 8" in error
    assert not out.exists()
