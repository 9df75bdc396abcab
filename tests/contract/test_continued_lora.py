"""A LoRA that was trained, by a run or by others, is what a policy of any family goes on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from progrpo.policies.base import Policy
from progrpo.policies.load import load_policy
from progrpo.policies.settings import ModelSettings

SETTINGS = ModelSettings(lora_rank=2, lora_alpha=4, max_sequence_length=8, resolution=16)
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def folder(family_at_length: Path) -> Path:
    return family_at_length


@pytest.fixture
def prompts(prompts_of: Any) -> Any:
    return prompts_of("red cat", "blue dog")


@torch.no_grad()
def velocity(policy: Policy, prompts: Any) -> Tensor:
    x = torch.randn(len(prompts), *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    return policy.predict(x, torch.tensor(700.0), policy.encode(prompts))


def same(actual: Tensor, expected: Tensor, rounding: float = 1e-5) -> None:
    """Up to the rounding of a network's products."""
    torch.testing.assert_close(actual, expected, rtol=10 * rounding, atol=rounding * expected.abs().max().item())


def settings_for(folder: Path) -> ModelSettings:
    return replace(SETTINGS, frames=3) if folder.name == "tiny-wan" else SETTINGS


def trained(folder: Path, move: Any, out: Path, **changes: Any) -> Any:
    """A policy that has learnt, and saved its LoRA."""
    policy = load_policy(replace(settings_for(folder), **changes, path=str(folder)))
    move(policy, 0.2)
    policy.save(out)
    return policy


def continued(folder: Path, source: Path | str, **changes: Any) -> Any:
    return load_policy(
        replace(settings_for(folder), lora=str(source), lora_rank=5, lora_alpha=5, **changes, path=str(folder))
    )


def settings_in(folder: Path) -> Any:
    with safe_open(folder / FILE, "pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


def test_it_goes_on_where_the_other_ended_and_is_saved_as_one(folder, move, prompts, tmp_path):
    first = trained(folder, move, tmp_path / "first")
    states = []
    for load in (
        lambda: load_policy(replace(settings_for(folder), path=str(folder))),
        lambda: continued(folder, tmp_path / "first"),
    ):
        torch.manual_seed(7)
        policy = load()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)  # diffusers draws while it loads a Wan
    assert policy.trainable.keys() == first.trainable.keys()
    assert all(p.requires_grad and torch.equal(p, first.trainable[name]) for name, p in policy.trainable.items())
    before = velocity(first, prompts)
    same(velocity(policy, prompts), before)
    policy.save(tmp_path / "same")
    assert settings_in(tmp_path / "same") == settings_in(tmp_path / "first")

    move(policy, 0.2)
    after = velocity(policy, prompts)
    assert (after - before).abs().max() > 1e-3
    with policy.weights("reference"):
        same(velocity(policy, prompts), before)
    policy.save(tmp_path / "second")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "second", local_files_only=True)
    other = load_policy(replace(settings_for(folder), path=str(folder)), trained=tmp_path / "second")
    same(velocity(other, prompts), after)
    denoiser = getattr(pipeline, policy.denoiser_name)
    loaded = dict(denoiser.named_parameters())
    assert denoiser.peft_config["default_0"].lora_alpha == 2
    for name, p in policy.trainable.items():
        assert torch.equal(loaded[name.replace(".default", ".default_0")], 2 * p if "lora_B" in name else p)


def applied(folder: Path, tensors: dict[str, Tensor]) -> Policy:
    """The model with B A added to its weights, as ComfyUI reads a file without alpha."""
    policy: Any = load_policy(replace(settings_for(folder), path=str(folder)))
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removeprefix(f"{policy.denoiser_name}.").removesuffix(".lora_A.weight")
            weight = policy.denoiser.get_submodule(layer).base_layer.weight
            weight.data += tensors[name.replace("lora_A", "lora_B")] @ a
    return policy


@pytest.mark.parametrize("alpha", [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 7])
def test_tensors_alone_are_the_trained_model(folder, move, prompts, tmp_path, alpha):
    policy = trained(folder, move, tmp_path, lora_alpha=alpha)
    expected = velocity(policy, prompts)
    same(velocity(applied(folder, load_file(tmp_path / FILE)), prompts), expected, 1e-4)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(load_file(tmp_path / FILE))  # the tensors, without a header
    policy.family.denoiser = getattr(pipeline, policy.denoiser_name)
    same(velocity(policy, prompts), expected, 1e-4)


@pytest.mark.parametrize(("alpha", "exact"), [(1, True), (2, True), (4, True), (6, False)])
def test_who_goes_on_gets_the_alpha_that_was_trained_with(tiny_sd3, move, prompts, tmp_path, alpha, exact):
    first = trained(tiny_sd3, move, tmp_path, lora_alpha=alpha)
    policy = continued(tiny_sd3, tmp_path)
    assert policy.denoiser.peft_config["default"].lora_alpha == alpha
    off = [(p - first.trainable[name]).abs() / p.abs() for name, p in policy.trainable.items()]
    assert max(map(torch.max, off)) <= (0 if exact else torch.finfo(torch.float32).eps)
    expected = velocity(first, prompts)
    same(velocity(policy, prompts), expected)


def test_what_was_saved_before_with_alpha_in_its_header_alone_still_means_the_same(tiny_sd3, move, prompts, tmp_path):
    first = trained(tiny_sd3, move, tmp_path)
    adapter = {**first.denoiser.peft_config["default"].to_dict(), "target_modules": ["to_q", "to_k", "to_v"]}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{name}": v for name, v in adapter.items()})}
    tensors = {f"transformer.{name}": t for name, t in get_peft_model_state_dict(first.denoiser).items()}
    save_file(tensors, tmp_path / "old.safetensors", {"format": "pt", **header})
    policy = continued(tiny_sd3, tmp_path / "old.safetensors")
    assert all(torch.equal(p, first.trainable[name]) for name, p in policy.trainable.items())
    assert policy.denoiser.peft_config["default"].lora_alpha == 4
    same(velocity(policy, prompts), velocity(first, prompts))


def test_in_low_precision_not_a_bit_of_it_is_lost(tiny_kontext, move, tmp_path):
    first = trained(tiny_kontext, move, tmp_path)
    policy = continued(tiny_kontext, tmp_path / FILE, dtype="bfloat16")
    assert all(
        p.dtype == torch.float32 and torch.equal(p, first.trainable[name]) for name, p in policy.trainable.items()
    )
    assert {p.dtype for _, p in policy.frozen() if p.dim() == 2 and p.is_floating_point()} == {torch.bfloat16}
    looked_at: Any = load_policy(
        replace(SETTINGS, dtype="bfloat16", path=str(tiny_kontext)), trained=tmp_path
    )  # as sample and eval do
    plain = dict(load_policy(replace(SETTINGS, dtype="bfloat16", path=str(tiny_kontext))).frozen())
    assert all(torch.equal(p, first.trainable[name]) for name, p in looked_at.trainable.items())
    assert all(torch.equal(p, plain[name]) for name, p in looked_at.frozen())


def test_a_lora_of_other_layers_and_several_ranks_keeps_them(tiny_sd3, move, prompts, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(tiny_sd3)
    layers, patterns = ["attn.to_q", "attn.to_v"], {"rank_pattern": {"to_v": 3}, "alpha_pattern": {"to_v": 9}}
    pipeline.transformer.add_adapter(LoraConfig(r=1, lora_alpha=2, target_modules=layers, **patterns))
    with torch.no_grad():
        for name, p in pipeline.transformer.named_parameters():
            if "lora_" in name:
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    pipeline.transformer.save_lora_adapter(tmp_path / "theirs", weight_name=FILE)
    file = tmp_path / "theirs" / FILE
    tensors = {f"transformer.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})  # as older scripts wrote it, without its settings
    policy = continued(tiny_sd3, tmp_path / "theirs")
    assert {name.split(".attn.")[1].split(".")[0] for name in policy.trainable} == {"to_q", "to_v"}
    assert {len(p) for name, p in policy.trainable.items() if "to_v.lora_A" in name} == {3}
    move(policy, 0.1)
    policy.save(tmp_path / "ours")
    again = continued(tiny_sd3, tmp_path / "ours")
    same(velocity(again, prompts), velocity(policy, prompts))


@pytest.mark.parametrize("rslora", [False, True])
def test_layers_of_several_strengths_are_saved_as_strong_as_they_are(tiny_sd3, prompts, tmp_path, rslora):
    pipeline = DiffusionPipeline.from_pretrained(tiny_sd3)
    layers = ["attn.to_q", "attn.to_v", "ff.net.2"]
    patterns = {"rank_pattern": {"to_v": 3}, "alpha_pattern": {"to_v": 9, "ff.net.2": 5}}
    config = LoraConfig(r=2, lora_alpha=4, target_modules=layers, use_rslora=rslora, **patterns)
    pipeline.transformer.add_adapter(config)
    with torch.no_grad():
        for name, p in pipeline.transformer.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    pipeline.transformer.save_lora_adapter(tmp_path, weight_name=FILE)  # its names, without the part's
    policy = continued(tiny_sd3, tmp_path)
    expected = velocity(policy, prompts)
    policy.save(tmp_path / "ours")
    policy.family.denoiser = pipeline.transformer  # as diffusers has it
    same(velocity(policy, prompts), expected, 1e-4)
    tensors = load_file(tmp_path / "ours" / FILE)
    same(velocity(applied(tiny_sd3, tensors), prompts), expected, 1e-4)
    for saved in (tmp_path / "ours", tensors):
        pipeline.unload_lora_weights()
        pipeline.load_lora_weights(saved)
        same(velocity(policy, prompts), expected, 1e-4)
    again = continued(tiny_sd3, tmp_path / "ours")
    config = again.denoiser.peft_config["default"]
    assert (config.lora_alpha, config.alpha_pattern, config.use_rslora) == (4, patterns["alpha_pattern"], rslora)
    same(velocity(again, prompts), expected)


def test_what_cannot_be_trained_further_is_said_in_a_sentence(
    tiny_sd3, tiny_sd, tiny_flux, move, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    trained(tiny_sd3, move, tmp_path / "sd3")
    trained(tiny_flux, move, tmp_path / "flux")
    trained(tiny_sd, move, tmp_path / "sd")
    own = load_file(tmp_path / "sd3" / FILE)
    name = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"

    def holding(tensors: dict[str, Tensor]) -> Path:
        save_file(tensors, tmp_path / "changed.safetensors")
        return tmp_path / "changed.safetensors"

    text = {f"text_encoder.a.lora_{side}.weight": torch.ones(1, 1) for side in "AB"}
    (empty := tmp_path / "empty").mkdir()
    cases = {
        "its single_transformer_blocks.* has no place in this model; it is of another": lambda: tmp_path / "flux",
        "its unet.* has no place in this model; it is of another$": lambda: tmp_path / "sd",
        "it adapts the text_encoder, and": lambda: holding({**own, **text}),
        "it is a DoRA": lambda: holding({**own, "transformer.a.dora_scale": torch.ones(1)}),
        "it is a LoKr": lambda: holding({"transformer.a.lokr_w1": torch.ones(1)}),
        "it is not a plain LoRA, since it holds b": lambda: holding({**own, "b": torch.ones(1)}),
        "it is not a LoRA": lambda: holding({"a": torch.ones(1)}),
        "size mismatch|shape": lambda: holding({**own, name: own[name][:, :-1].contiguous()}),
        "its .*to_q has one of two matrices": lambda: holding({n: t for n, t in own.items() if n != name}),
        "it is a folder without a LoRA": lambda: empty,
        "neither a folder, a file nor a hub id": lambda: tmp_path / "absent",
        "the hub.* cannot be reached": lambda: "nobody/nothing",
    }
    for message, source in cases.items():
        with pytest.raises(ValueError, match=rf"^cannot use the LoRA .*: .*({message})") as caught:
            continued(tiny_sd3, source())
        assert "\n" not in str(caught.value)
