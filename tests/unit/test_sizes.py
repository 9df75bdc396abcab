"""Sizes without weights against published parameter counts, closed forms, and allocated memory."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from progrpo.cli import main
from progrpo.config import (
    AuditSettings,
    Config,
    DGPOSettings,
    GRPOSettings,
    NFTSettings,
    ObjectiveSettings,
    OptimSettings,
    PlanSettings,
    PromptSettings,
    RewardSettings,
    RewardTerm,
    SamplingSettings,
    resolve_plan,
    trained_steps,
)
from progrpo.policies.architectures import ARCHITECTURES
from progrpo.policies.load import load_policy
from progrpo.policies.settings import ModelSettings
from progrpo.policies.sizes import Sizes, _from_config, _measured, sizes
from progrpo.recipes import load_recipe
from progrpo.training.estimate import (
    _latents,
    _leaner,
    _memory,
    _with_microbatches,
    estimate,
    sizes_for,
)
from progrpo.training.gpus import GPU
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
    ("Tongyi-MAI/Z-Image", "transformer"): 6_154_908_736,
    ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", "transformer"): 1_604_462_752,
    ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", "text_encoder"): 2_614_341_888,
    ("Qwen/Qwen-Image", "text_encoder"): 8_292_166_656,
}


@pytest.mark.parametrize(("path", "part"), PARAMETERS)
def test_the_parameters_are_those_of_the_published_models(path, part):
    module = _from_config(*ARCHITECTURES[path].components[part])
    assert isinstance(module, nn.Module)
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
    settings = ModelSettings(weights=weights)
    policy: Any = load_policy(settings)
    predicted = sizes(settings, 8, 4, 4)
    embeds = {name: torch.randn(4, *shape) for name, shape in policy.family.condition_shapes().items()}

    def train() -> None:
        policy.predict(torch.randn(4, *policy.latent_shape), torch.tensor(500.0), Condition(embeds)).sum().backward()

    train()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        train()
    now = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        now += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, now)
    assert predicted.train_bytes == pytest.approx(most, rel=0.15)
    assert predicted.trained == sum(p.numel() for p in policy.trainable.values())
    assert predicted.frozen == sum(p.numel() for p in policy.denoiser.parameters()) - predicted.trained
    assert predicted.latent == 8 * 16 * 16
    # of frozen weights no gradient is computed
    assert predicted.train_flops / predicted.call_flops == pytest.approx(3 if weights == "full" else 2, rel=0.05)


def test_checkpointing_takes_another_forward_pass_and_less_memory(tiny_sd3):
    plain, checkpointed = (
        sizes(ModelSettings(str(tiny_sd3), activation_checkpointing=on, resolution=16), 2, 4, 2) for on in (False, True)
    )
    assert plain.call_flops == checkpointed.call_flops
    assert checkpointed.train_flops == pytest.approx(1.5 * plain.train_flops, rel=0.1)
    assert checkpointed.train_bytes < plain.train_bytes


def test_a_decoder_takes_what_the_policy_gives_it_and_not_latents(tiny_qwen_image):
    predicted = sizes(ModelSettings(str(tiny_qwen_image), resolution=16), 2, 2, 2)  # one of videos
    assert predicted.latent == 4 * 8 * 8 and predicted.decode_flops > 0 and predicted.train_bytes > 0


@pytest.mark.parametrize("model", [pytest.param("tiny_wan", marks=pytest.mark.slow), "tiny_kontext"])
def test_a_size_that_is_not_square_is_counted_by_its_area(request, model):
    """Also of a video, and beside a source, which is of the same size."""
    path, frames = str(request.getfixturevalue(model)), 3 if model == "tiny_wan" else None

    def sizes_at(height: int, width: int) -> Any:
        return sizes(
            ModelSettings(path, resolution=(height, width), frames=frames, lora_rank=2),
            1,
            1,
            1,
        )

    wide, square = sizes_at(8, 32), sizes_at(16, 16)
    assert wide.latent == square.latent and wide.call_flops == square.call_flops
    assert wide.train_flops == square.train_flops and wide.decode_flops > 0


def test_latents_at_their_most_by_hand():
    """A group of 24 holds where each is, the network's output, the first noise, and each latent of the path once."""
    base = replace(load_recipe("sd3"), sampling=SamplingSettings(num_inference_steps=10, latent_dtype="bfloat16"))
    flat = replace(base, plan=PlanSettings("none"))
    assert _latents(flat, resolve_plan(flat), False, 1) == {
        "call": 24 * (4 + 4 + 4 + 2 * 10),
        "decoding": 24 * (4 + 4 + 2 * 10),
        "step": 24 * (4 + 4 + 7 * 4 + 2 * 10),
        "update": 24 * (4 + 2 * 10),
    }
    pruned = replace(base, plan=PlanSettings("custom", group_size=24, prune=((4, 6),)))
    assert _latents(pruned, resolve_plan(pruned), False, 1) == {
        "call": 24 * (4 + 4 + 4 + 2 * 5),
        "decoding": 24 * (4 + 4 + 4 + 4 + 2 * 5),
        "step": 24 * (4 + 4 + 7 * 4 + 2 * 4),  # of the step before anyone is pruned
        "update": 6 * (4 + 2 * 10),
    }
    single = replace(
        pruned, sampling=SamplingSettings(num_inference_steps=10), optim=OptimSettings(updates_per_rollout=2)
    )
    latents = _latents(single, resolve_plan(single), True, 1)
    assert latents["call"] == 24 * (4 + 4 + 4 * 5 + 4 * 4)  # where it is is the path's end, and steps' means are kept
    assert latents["update"] == 6 * (4 + 4 * 10 + 4 * 9) * 1.5


ONES = Sizes(*[1] * len(fields(Sizes)))


def test_memory_is_enough_for_the_window_that_takes_most():
    """A random window may lie late in the first iteration, where fewer members live."""

    def peaks(window: Literal["first", "random"], seed: int) -> dict[str, float]:
        base = load_recipe("smoke")
        sampling = replace(base.sampling, num_inference_steps=8, sde_window=window, sde_window_size=2)
        config = replace(
            base,
            seed=seed,
            sampling=sampling,
            plan=PlanSettings("custom", group_size=24, prune=((3, 6),)),
            objective=ObjectiveSettings("grpo"),
            optim=replace(base.optim, reuse_rollout=True),
        )
        starts.append(trained_steps(config, 0).start)
        return _memory(config, resolve_plan(config), ONES, 1).peaks

    starts: list[int] = []
    first = peaks("first", 0)
    assert all(peaks("random", seed) == first for seed in range(4)) and max(starts) > 3


def test_members_that_processes_share_are_counted_once():
    """A group of 24 over 4 processes is 6 trajectories on each."""
    base = replace(
        load_recipe("smoke"), plan=PlanSettings("custom", group_size=24), objective=ObjectiveSettings("grpo")
    )
    split = replace(base, prompts=replace(base.prompts, per_iteration=1, split_groups=True))
    small = replace(split, plan=PlanSettings("custom", group_size=6))
    shared, own = (_memory(c, resolve_plan(c), ONES, n).parts for c, n in ((split, 4), (small, 1)))
    for part in ("latents while sampling", "latents in the update"):
        assert shared[part] == own[part]


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "objective"), [(((1, 2),), "grpo"), ((), "nft")], ids=["pruned", "nft"])
def test_an_iterations_memory_is_what_it_holds(plan, objective, monkeypatch):
    """The most beyond what was there before it, of a second iteration: Adam's moments are there by then."""
    config = Config(
        prompts=PromptSettings(per_iteration=2),
        sampling=SamplingSettings(num_inference_steps=3, microbatch=4),
        plan=PlanSettings("custom", group_size=6, prune=plan),
        objective=ObjectiveSettings(name=objective, nft=NFTSettings(draws=1)),
        optim=OptimSettings(microbatch=2),
        audit=AuditSettings(every=0),
    )
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    predicted, measured = importlib.import_module("memory").iteration(config)
    assert predicted["sampling"] == pytest.approx(measured["sampling"], rel=0.15)
    assert predicted["update"] == pytest.approx(measured["update"], rel=0.15)


@pytest.mark.slow
def test_what_would_make_it_fit():
    """It is the largest microbatches that fit; if none does, also what costs time."""
    base = replace(
        load_recipe("smoke"),
        sampling=SamplingSettings(num_inference_steps=6, microbatch=16),
        optim=OptimSettings(microbatch=16),
    )
    plan = resolve_plan(base)

    def peaks(config: Config) -> dict[str, float]:
        return _memory(config, plan, sizes_for(config), 1).peaks

    def changed(changes: dict[str, Any]) -> Config:
        sampling = changes.get("sampling.microbatch", 16)
        leaner = changes.get("model.activation_checkpointing", False)
        config = _with_microbatches(base, sampling, changes.get("optim.microbatch", 16))
        return replace(config, model=replace(config.model, activation_checkpointing=leaner))

    half = peaks(_with_microbatches(base, 16, 8))
    roomy = GPU(1.001 * max(half.values()) / 0.9, 1)
    assert _leaner(base, plan, roomy, 1) == {"optim.microbatch": 8}
    tight = GPU(1.03 * max(peaks(_with_microbatches(base, 1, 1)).values()) / 0.9, 1)
    changes = _leaner(base, plan, tight, 1)
    assert max(peaks(changed(changes)).values()) <= 0.9 * tight.memory
    assert _leaner(base, plan, GPU(0.001, 1), 1) == {}


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_what_processes_share_out(weights):
    """A LoRA stays whole everywhere, weights that are trained in full do not."""
    base = load_recipe("smoke")
    config = replace(base, model=replace(base.model, weights=weights, shard=True))
    predicted = sizes_for(config)
    alone, shared = (_memory(config, resolve_plan(config), predicted, count).parts for count in (1, 2))
    assert shared["frozen weights"] == alone["frozen weights"] / 2
    for part in ("trained weights, optimizer", "copies of trained weights", "gradients"):
        assert shared[part] == alone[part] / (2 if weights == "full" else 1)


@pytest.mark.parametrize(
    ("objective", "keep_best", "copies"),
    [
        (ObjectiveSettings(), False, 1),  # it lasts to the first update
        (ObjectiveSettings(), True, 1),  # the best weights are copied after it
        (ObjectiveSettings(grpo=GRPOSettings(kl_beta=0.1)), True, 2),
        (ObjectiveSettings(name="nft", nft=NFTSettings(kl_beta=0.0)), False, 2),
    ],
)
def test_copies_of_full_weights_are_counted_from_the_start(objective, keep_best, copies):
    base = load_recipe("smoke")
    config = replace(
        base,
        model=replace(base.model, weights="full"),
        objective=objective,
        optim=OptimSettings(ema_decay=0.0),
        eval=replace(base.eval, keep_best=keep_best),
    )
    memory = _memory(config, resolve_plan(config), sizes_for(config), 1)
    trained = memory.parts["gradients"]
    assert memory.parts["copies of trained weights"] == pytest.approx(copies * trained)
    others = sum(memory.parts[part] for part in ("frozen weights", "decoder", "rewards", "text encoders"))
    at_start = 1 + len(objective.loss.averages)
    assert memory.peaks["start"] == pytest.approx(others + (1 + at_start) * trained)


@pytest.mark.parametrize(
    ("processes", "prompts", "optim", "counted"),
    [(1, 2, {}, True), (2, 2, {}, False), (1, 1, {}, False), (1, 2, {"noise_scale": False}, False)],
)
def test_a_second_gradient_is_counted_where_the_noise_scale_is_measured(processes, prompts, optim, counted):
    base = load_recipe("smoke")
    model = replace(base.model, weights="full", shard=True)
    config = replace(base, model=model, prompts=PromptSettings(per_iteration=prompts), optim=OptimSettings(**optim))
    memory = _memory(config, resolve_plan(config), sizes_for(config), processes)
    assert memory.parts["gradients of a half"] == (memory.parts["gradients"] if counted else 0) >= 0
    without = replace(config, optim=replace(config.optim, noise_scale=False))
    least = _memory(without, resolve_plan(without), sizes_for(without), processes).peaks["update"]
    assert memory.peaks["update"] == pytest.approx(least + memory.parts["gradients of a half"])


def test_rewards_are_counted_where_their_networks_are_known():
    terms = (
        RewardTerm("pickscore"),
        RewardTerm("hpsv2", url="http://elsewhere:8000"),
        RewardTerm("shapes"),
        RewardTerm("ocr"),
    )
    estimated = estimate(replace(load_recipe("smoke"), reward=RewardSettings(terms)), "l4", 0.35, 1)
    assert estimated["memory_gb"]["rewards"] == pytest.approx(2 * 986_109_441 / 1e9)
    assert estimated["rewards_not_counted"] == ["ocr"]


@pytest.mark.parametrize(
    ("objective", "passes"),
    [
        (ObjectiveSettings(), 0),
        (ObjectiveSettings(grpo=GRPOSettings(kl_beta=0.1)), 1),
        (ObjectiveSettings(name="nft"), 2),
        (ObjectiveSettings(name="awm"), 2),
        (ObjectiveSettings(name="elbo"), 2),
        (ObjectiveSettings(name="dgpo", dgpo=DGPOSettings(kl_beta=0.0)), 2),
    ],
)
def test_passes_under_other_weights(objective, passes):
    assert objective.loss.extra_forwards == passes


def test_the_command_says_what_fits(capsys):
    args = ("plan", "quickstart", "--gpu", "l4", "--json")
    assert main([*args]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["fits"] and whole["parameters"] == whole["trained_parameters"] == 2_301_216
    assert main([*args, "--processes", "2", "--share-of-peak", "0.7"]) == 0
    half = json.loads(capsys.readouterr().out)
    assert half["seconds_per_iteration"] == pytest.approx(whole["seconds_per_iteration"] / 4)
    assert half["memory_gb"]["latents in the update"] == pytest.approx(whole["memory_gb"]["latents in the update"] / 2)
    assert main(["plan", "smoke", "--gpu", "l4", "--model.path", "some/model"]) == 2
    assert "the size of some/model is not known here; give its folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("model_index.json", "[1]", r"cannot load .*: TypeError, .*"),
        ("model_index.json", '{"_class_name": "AllegroPipeline"}', r".* is a AllegroPipeline; progrpo trains .*"),
        ("model_index.json", '{"_class_name": "WanPipeline", "expand_timesteps": true}', r"this is a Wan 2\.2 .*"),
        ("vae/config.json", "{", r"cannot load .*: Expecting property name .*"),
        ("transformer/config.json", None, r"cannot load .*: \[Errno 2\] No such file .*"),
        ("transformer/config.json", '{"num_layers": "x"}', r"cannot load .*: TypeError, .*"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused_in_a_sentence(tiny_sd3, tmp_path, file, text, reason):
    configs = shutil.ignore_patterns("*.safetensors")
    folder = shutil.copytree(tiny_sd3, tmp_path / "model", ignore=configs)
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    with pytest.raises(ValueError, match=rf"^model\.path: {reason}$"):
        sizes(ModelSettings(str(folder)), 1, 1, 1)
