"""A model of two denoisers by noise level (Wan 2.2): both are trained, and each row gets the one of its timestep."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from progrpo.cli import main
from progrpo.config import ObjectiveSettings, PlanSettings, SamplingSettings
from progrpo.objectives.grpo import GRPO
from progrpo.objectives.settings import GRPOSettings
from progrpo.policies.export import save_merged
from progrpo.policies.load import policy_from_pipeline
from progrpo.policies.settings import ModelSettings
from progrpo.policies.sizes import sizes
from progrpo.publish.export import export_lora
from progrpo.rewards.frames import FrameAverageReward
from progrpo.rewards.function import FunctionReward
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.rollout.rollout import rollout
from progrpo.rollout.sampler import Sampler
from progrpo.training.build import sampling_from
from tests.support.pipelines import FRAMES, wan22
from tests.support.policies import (
    PROMPTS,
    load,
    noise,
    perturb,
    sample_by_diffusers,
    sample_without_noise,
    untouched_pipeline,
)
from tests.support.recorded_pipelines import wan22_image_to_video
from tests.support.rewards import mixture_of_one

SECOND = "pytorch_lora_weights_transformer_2.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    wan22().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(folder: Path) -> Any:
    """One whose LoRAs have learnt something, for tests that leave it so."""
    policy = load(folder, "lora")
    perturb(policy)
    return policy


def with_loras(folder: Path, policy: Any, into: Path) -> Any:
    """The pipeline with the policy's saved LoRAs, by its own loader."""
    policy.save(into)
    pipeline = untouched_pipeline(folder)
    pipeline.load_lora_weights(into, adapter_name="high", local_files_only=True)
    pipeline.load_lora_weights(
        into, weight_name=SECOND, adapter_name="low", load_into_transformer_2=True, local_files_only=True
    )
    return pipeline


def test_its_steps_go_to_both(policy):
    at = policy.levels(4).timestep[:-1]
    assert (at >= policy.denoiser.boundary).sum() == 2


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_with_its_saved_loras_the_pipeline_samples_as_the_policy_does(folder, policy, tmp_path, guidance_scale):
    latents = sample_by_diffusers(with_loras(folder, policy, tmp_path), policy, guidance_scale, "latent")
    ours = sample_without_noise(policy, guidance_scale)
    torch.testing.assert_close(ours, latents, rtol=0, atol=1e-4)
    untrained = sample_by_diffusers(untouched_pipeline(folder), policy, guidance_scale, "latent")
    assert (ours - untrained).abs().max() > 0.01


def test_a_saved_lora_is_trained_further(folder, policy, tmp_path):
    policy.save(tmp_path)
    again = load(folder, "lora", lora=str(tmp_path))
    torch.testing.assert_close(sample_without_noise(again, 1.0), sample_without_noise(policy, 1.0), rtol=0, atol=1e-4)
    (tmp_path / SECOND).unlink()
    with pytest.raises(ValueError, match=f"two denoisers, each with a LoRA; give a folder with .* and {SECOND}"):
        load(folder, "lora", lora=str(tmp_path))


def test_each_row_gets_the_network_of_its_timestep(policy):
    x, condition = noise(policy), policy.encode(PROMPTS)
    timesteps = torch.tensor([200.0, 990.0])
    both = policy.predict(x, timesteps, condition, 3.5)
    for row, timestep in enumerate(timesteps):
        alone = torch.tensor([row])
        one = policy.predict(x[alone], timestep, condition.take(alone), 3.5)
        torch.testing.assert_close(one[0], both[row], rtol=1e-5, atol=1e-5)


def reached(policy: Any, timesteps: Tensor) -> set[str]:
    """The networks whose LoRAs get gradients."""
    for p in policy.trainable.values():
        p.grad = None
    policy.predict(noise(policy), timesteps, policy.encode(PROMPTS)).square().mean().backward()
    names = {name.partition(".")[0] for name, p in policy.trainable.items() if p.grad is not None and p.grad.any()}
    for p in policy.trainable.values():
        p.grad = None
    return names


def test_gradients_reach_the_network_of_a_timestep(policy):
    assert {name.partition(".")[0] for name in policy.trainable} == {"transformer", "transformer_2"}
    assert reached(policy, torch.tensor(990.0)) == {"transformer"}
    assert reached(policy, torch.tensor(200.0)) == {"transformer_2"}
    assert reached(policy, torch.tensor([990.0, 200.0])) == {"transformer", "transformer_2"}


def test_survivors_are_bitwise_what_they_are_without_pruning(policy, tiny_config, redness):
    plans = Plan(4), Plan(4, (PrunePoint(0, 3), PrunePoint(2, 2)))
    config = tiny_config(sampling=SamplingSettings(num_inference_steps=4, microbatch=1))
    sampling, reward = sampling_from(config, policy, "transitions", 0), FrameAverageReward(FunctionReward(redness), 2)
    samplers = [Sampler(policy, mixture_of_one(reward), sampling, plan) for plan in plans]
    full, pruned = (
        rollout(sampler, PROMPTS, torch.arange(2), NoiseKey(3, 1), Meter()).trajectories for sampler in samplers
    )
    places = {who: i for i, who in enumerate(zip(full.slot_N.tolist(), full.member_N.tolist(), strict=True))}
    rows = [places[who] for who in zip(pruned.slot_N.tolist(), pruned.member_N.tolist(), strict=True)]
    assert len(rows) == 4 and torch.equal(full.x_NCHW[rows], pruned.x_NCHW)


def test_the_ratio_is_one_before_any_update(policy, tiny_trainer, tiny_config, first_experience):
    sampling = SamplingSettings(num_inference_steps=4, microbatch=3)
    settings = GRPOSettings(clip_range=3e-3)
    plan = PlanSettings(preset="custom", group_size=3)
    config = tiny_config(sampling=sampling, plan=plan, objective=ObjectiveSettings(grpo=settings))
    experience = first_experience(tiny_trainer(config, policy))
    items = torch.arange(len(experience) * len(experience.trajectories.path))
    with torch.no_grad():
        loss = GRPO(settings).loss(policy, experience, items)
    assert loss.maxima["ratio_max_deviation"] <= 1e-3 and loss.sums["clip_fraction"] == 0


def test_a_resumed_run_is_a_straight_one_bit_for_bit(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("red cat\nblue dog\n")
    options = ["--model.path", str(folder), "--model.resolution", "16", "--model.frames", str(FRAMES)]
    options += ["--model.max-sequence-length", "12", "--model.lora-rank", "2", "--sampling.guidance-scale", "3"]
    options += ["--prompts.source", "prompts.txt", "--eval.prompts", "prompts.txt", "--eval.pictures", "2"]
    options += ["--reward.terms", "jpeg_compressibility", "--prompts.per-iteration", "1", "--audit.every", "0"]
    train = ["train", "smoke", *options, "--checkpoint.every", "1"]
    assert main([*train, "--out", "straight", "--iterations", "2"]) == 0
    assert main([*train, "--out", "stopped", "--iterations", "1"]) == 0
    assert main(["train", "--resume", "stopped", "--iterations", "2"]) == 0
    for file in ("pytorch_lora_weights.safetensors", SECOND):
        straight, resumed = (load_file(Path(run, "lora", file)) for run in ("straight", "stopped"))
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())


def test_its_export_is_the_whole_model(folder, policy, tmp_path):
    policy.save(tmp_path / "lora")
    settings = ModelSettings(str(folder))
    with pytest.raises(ValueError, match=f"each with a LoRA, and one file holds one: take .* and {SECOND} of"):
        export_lora(tmp_path / "lora", settings, "diffusers", tmp_path / "file.safetensors")
    save_merged(settings, tmp_path / "lora", tmp_path / "merged", torch.float32)
    latents = sample_by_diffusers(untouched_pipeline(tmp_path / "merged"), policy, 1.0, "latent")
    torch.testing.assert_close(sample_without_noise(policy, 1.0), latents, rtol=0, atol=1e-4)


def test_its_sizes_are_those_of_both(folder):
    settings = ModelSettings(str(folder), lora_rank=2, resolution=16, frames=FRAMES, max_sequence_length=12)
    both, one = sizes(settings, 1, 1, 1), sizes(replace(settings, path=str(one_of(folder))), 1, 1, 1)
    assert (both.trained, both.frozen) == (2 * one.trained, 2 * one.frozen)
    assert both.call_flops == one.call_flops  # of a row


def one_of(folder: Path) -> Path:
    """The model without its second denoiser."""
    pipeline = wan22()
    pipeline.register_modules(transformer_2=None)
    pipeline.register_to_config(boundary_ratio=None)
    pipeline.save_pretrained(folder.parent / "tiny-wan-of-one")
    return folder.parent / "tiny-wan-of-one"


def test_all_weights_of_two_are_not_trained(folder):
    with pytest.raises(ValueError, match=r"model\.weights: a model of two denoisers is trained as two LoRAs; use lora"):
        load(folder, "full")


def test_a_part_of_one_is_refused(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    for change in ({"boundary_ratio": None}, {"transformer": [None, None]}, {"transformer_2": [None, None]}):
        (tmp_path / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(ValueError, match=r"this is a part of a Wan 2\.2; load it with its transformer, its"):
            load(tmp_path, "lora")


def test_one_that_is_learnt_from_its_call_has_two_as_well():
    policy = policy_from_pipeline(
        wan22_image_to_video(), ModelSettings(lora_rank=2, resolution=16, frames=5, max_sequence_length=12)
    )
    assert reached(policy, torch.tensor([990.0, 200.0])) == {"transformer", "transformer_2"}
