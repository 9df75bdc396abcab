"""What a model takes without its weights: published parameter counts, operations in closed form, memory as it is allocated."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from progrpo.cli import main
from progrpo.config import DGPOConfig, GRPOConfig, ObjectiveConfig, PlanConfig, SamplingConfig, resolve_plan
from progrpo.policies.architectures import ARCHITECTURES
from progrpo.policies.base import PolicySettings
from progrpo.policies.load import load_policy
from progrpo.policies.sizes import _built, _measured, sizes
from progrpo.recipes import load_recipe
from progrpo.training.estimate import _latents, _others
from progrpo.types import Condition

PARAMETERS = {
    ("stabilityai/stable-diffusion-3.5-medium", "transformer"): 2_243_171_520,
    ("black-forest-labs/FLUX.1-dev", "transformer"): 11_901_408_320,
    ("CompVis/stable-diffusion-v1-4", "unet"): 859_520_964,
    ("stabilityai/stable-diffusion-xl-base-1.0", "unet"): 2_567_463_684,
    ("CompVis/stable-diffusion-v1-4", "vae"): 83_653_863,
    ("CompVis/stable-diffusion-v1-4", "text_encoder"): 123_060_480,
    ("stabilityai/stable-diffusion-xl-base-1.0", "text_encoder_2"): 694_659_840,
    ("black-forest-labs/FLUX.1-dev", "text_encoder_2"): 4_762_310_656,
    ("Qwen/Qwen-Image", "transformer"): 20_430_401_088,
    ("Qwen/Qwen-Image", "text_encoder"): 8_292_166_656,
}


@pytest.mark.parametrize(("path", "part"), PARAMETERS)
def test_the_parameters_are_those_of_the_published_models(path, part):
    with torch.device("meta"):
        module = _built(*ARCHITECTURES[path][part])
    assert sum(p.numel() for p in module.parameters()) == PARAMETERS[path, part]


def test_operations_and_memory_of_a_matrix_product_by_hand():
    layer, x = nn.Linear(20, 30, bias=False), torch.zeros(8, 20)
    with torch.no_grad():
        assert _measured(lambda: layer(layer(x) @ layer.weight), [layer.weight, x]) == (
            2 * 8 * 20 * 30 * 3,
            4 * 8 * (20 + 30),  # the inner product and the outer one; the third is made when the first is gone
        )


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_memory_is_what_is_allocated(weights):
    """Within 15 %, as `benchmarks/memory.py` measures it at size."""
    settings = PolicySettings(weights=weights)
    policy: Any = load_policy("shapes-flow", settings)
    found = sizes("shapes-flow", settings, 8, 4, 4)
    told = {name: torch.randn(4, *shape) for name, shape in policy.condition_shapes().items()}

    def train() -> None:
        policy.predict(torch.randn(4, *policy.latent_shape), torch.tensor(500.0), Condition(told)).sum().backward()

    train()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        train()
    now = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        now += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, now)
    assert found.train_bytes == pytest.approx(most, rel=0.15)
    assert found.trained == sum(p.numel() for p in policy.trainable.values())
    assert found.frozen == sum(p.numel() for p in policy.denoiser.parameters()) - found.trained
    assert found.latent == 8 * 16 * 16
    # of frozen weights no gradient is computed
    assert found.train_flops / found.call_flops == pytest.approx(3 if weights == "full" else 2, rel=0.05)


def test_checkpointing_takes_another_forward_pass_and_less_memory(tiny_sd3):
    plain, checkpointed = (
        sizes(str(tiny_sd3), PolicySettings(activation_checkpointing=on, resolution=16), 2, 4, 2)
        for on in (False, True)
    )
    assert plain.call_flops == checkpointed.call_flops
    assert checkpointed.train_flops == pytest.approx(1.5 * plain.train_flops, rel=0.1)
    assert checkpointed.train_bytes < plain.train_bytes


def test_a_decoder_takes_what_the_policy_gives_it_and_not_latents(tiny_qwen_image):
    found = sizes(str(tiny_qwen_image), PolicySettings(resolution=16), 2, 2, 2)  # one of videos
    assert found.latent == 4 * 8 * 8 and found.decode_flops > 0 and found.train_bytes > 0


def test_latents_at_their_most_by_hand():
    base = replace(load_recipe("sd3"), sampling=SamplingConfig(num_inference_steps=10, latent_dtype="bfloat16"))
    place_and_output, kept = 2 * 4, 2 * 2
    flat = replace(base, plan=PlanConfig("none"))
    assert _latents(flat, resolve_plan(flat)) == 24 * (place_and_output + 9 * kept)
    pruned = replace(base, plan=PlanConfig("custom", group_size=24, prune=((4, 6),)))
    assert _latents(pruned, resolve_plan(pruned)) == 24 * (place_and_output + 5 * kept)


@pytest.mark.parametrize(
    ("objective", "passes"),
    [
        (ObjectiveConfig(), 0),
        (ObjectiveConfig(grpo=GRPOConfig(kl_beta=0.1)), 1),
        (ObjectiveConfig(name="nft"), 2),
        (ObjectiveConfig(name="awm"), 2),
        (ObjectiveConfig(name="dgpo", dgpo=DGPOConfig(kl_beta=0.0)), 2),
    ],
)
def test_passes_under_other_weights(objective, passes):
    assert _others(replace(load_recipe("sd3"), objective=objective)) == passes


def test_the_command_says_what_fits(capsys):
    args = ("plan", "quickstart", "--gpu", "l4", "--json")
    assert main([*args]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["fits"] and whole["parameters"] == whole["trained_parameters"] == 2_301_216
    assert main([*args, "--processes", "2", "--share-of-peak", "0.7"]) == 0
    half = json.loads(capsys.readouterr().out)
    assert half["seconds_per_iteration"] == pytest.approx(whole["seconds_per_iteration"] / 4)
    assert half["memory_gb"]["latents"] == pytest.approx(whole["memory_gb"]["latents"] / 2)
    assert main(["plan", "smoke", "--gpu", "l4", "--model.path", "some/model"]) == 2
    assert "how large some/model is is not known here; give its folder" in capsys.readouterr().err
