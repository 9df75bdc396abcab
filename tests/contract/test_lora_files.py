"""LoRAs in the formats of others: each number finds its place at its scale, or a sentence says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from progrpo.policies.base import Policy
from progrpo.policies.load import load_policy
from progrpo.policies.settings import ModelSettings

SETTINGS = ModelSettings(lora_rank=2, lora_alpha=4, max_sequence_length=8, resolution=16)
FILE = "pytorch_lora_weights.safetensors"


@torch.no_grad()
def velocity(policy: Policy, prompts: Any) -> Tensor:
    x = torch.randn(len(prompts), *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    return policy.predict(x, torch.tensor(700.0), policy.encode(prompts))


@pytest.fixture
def prompts(prompts_of: Any) -> Any:
    return prompts_of("red cat", "blue dog")


@pytest.fixture
def saved(move: Any, tmp_path: Path, prompts: Any) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    """Save a policy of a folder after it has learnt, in tmp_path/own, and give the saved tensors and its output."""

    def of(folder: Path) -> tuple[dict[str, Tensor], Tensor]:
        policy: Any = load_policy(replace(SETTINGS, path=str(folder)))
        move(policy, 0.2)
        policy.save(tmp_path / "own")
        return load_file(tmp_path / "own" / FILE), velocity(policy, prompts)

    return of


def same(actual: Tensor, expected: Tensor, rounding: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=10 * rounding, atol=rounding * expected.abs().max().item())


def in_both_ways(folder: Path, source: Path, prompts: Any) -> Tensor:
    """The output of the model with a LoRA, trained further and sampled from."""
    policy = load_policy(replace(SETTINGS, lora=str(source), path=str(folder)))
    expected = velocity(policy, prompts)
    same(velocity(load_policy(replace(SETTINGS, path=str(folder)), trained=source), prompts), expected)
    policy.save(source.parent / "again")
    same(velocity(load_policy(replace(SETTINGS, path=str(folder)), trained=source.parent / "again"), prompts), expected)
    return expected


def kohya(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """In kohya's format, with the same product for another alpha."""
    converted = {name: torch.as_tensor(t) for name, t in convert_state_dict_to_kohya(dict(tensors)).items()}
    for name in [name for name in converted if name.endswith(".alpha")]:
        up, rank = name.replace(".alpha", ".lora_up.weight"), int(converted[name])
        converted[name], converted[up] = torch.tensor(alpha), converted[up] * rank / alpha
    return converted


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("tiny_sdxl", "all"),
        ("tiny_sd", "several alphas"),
        pytest.param("tiny_sd", "all", marks=pytest.mark.slow),
        pytest.param("tiny_sdxl", "several alphas", marks=pytest.mark.slow),
    ],
)
def test_kohyas_files_are_as_strong_as_their_alphas_say(request, model, layers, saved, prompts, tmp_path):
    folder = request.getfixturevalue(model)
    tensors, expected = saved(folder)
    theirs = kohya(tensors, 1.0)
    if layers == "several alphas":
        first, second = [name for name in sorted(theirs) if name.endswith(".alpha")][:2]
        up, other = (name.replace(".alpha", ".lora_up.weight") for name in (first, second))
        theirs[first], theirs[up] = torch.tensor(0.5), theirs[up] * 2
        del theirs[second]  # which is as strong as alpha = r
        theirs[other] = theirs[other] / 2
    save_file({name: t.contiguous() for name, t in theirs.items()}, tmp_path / "my style.safetensors")
    same(in_both_ways(folder, tmp_path / "my style.safetensors", prompts), expected)


def test_a_file_of_kohyas_whose_layers_are_fused_is_taken_apart(tiny_flux, prompts, tmp_path):
    policy: Any = load_policy(replace(SETTINGS, path=str(tiny_flux)))
    block, draw = "transformer_blocks.0", torch.Generator().manual_seed(1)
    layers = [policy.denoiser.get_submodule(f"{block}.attn.to_{name}").base_layer for name in ("q", "k", "v")]
    out, (width, wide) = policy.denoiser.get_submodule(f"{block}.attn.to_out.0").base_layer, layers[0].weight.shape
    down, up = torch.randn(4, wide, generator=draw), torch.randn(3 * width, 4, generator=draw)
    file, name = tmp_path / "fused.safetensors", "lora_unet_double_blocks_0_img_attn_{}".format
    tensors = {f"{name('qkv')}.lora_down.weight": down, f"{name('qkv')}.lora_up.weight": up}
    tensors |= {f"{name('proj')}.lora_down.weight": down, f"{name('proj')}.lora_up.weight": up[:width].contiguous()}
    tensors[f"{name('qkv')}.alpha"] = torch.tensor(1.0)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, file)
    for layer, rows in zip(layers, up.split(width), strict=True):
        layer.weight.data += 0.25 * rows @ down
    out.weight.data += up[:width] @ down
    same(in_both_ways(tiny_flux, file, prompts), velocity(policy, prompts), 1e-4)
    save_file({**tensors, "lora_unet_double_blocks_99_img_attn_proj.lora_down.weight": down}, file)
    with pytest.raises(ValueError, match=r"^cannot use the LoRA .*fused.safetensors: its .*99.* one of two matrices"):
        load_policy(replace(SETTINGS, path=str(tiny_flux)), trained=file)
    far = {
        f"lora_unet_double_blocks_99_img_attn_proj.lora_{side}.weight": t.clone()
        for side, t in (("down", down), ("up", up))
    }
    save_file({**tensors, **far}, file)
    with pytest.raises(ValueError, match=r"^cannot use the LoRA .*fused.safetensors: Incompat|all of its names"):
        load_policy(replace(SETTINGS, path=str(tiny_flux)), trained=file)


@pytest.mark.parametrize(
    ("model", "rslora"),
    [
        ("tiny_sd3", False),
        ("tiny_sd", True),
        pytest.param("tiny_sd3", True, marks=pytest.mark.slow),
        pytest.param("tiny_sd", False, marks=pytest.mark.slow),
    ],
)
def test_pefts_folders_are_as_strong_as_their_settings_say(request, model, prompts, tmp_path, rslora):
    folder = request.getfixturevalue(model)
    policy: Any = load_policy(
        replace(SETTINGS, lora_targets=("to_k",), path=str(folder))
    )  # whose network is then peft's alone
    pipeline = DiffusionPipeline.from_pretrained(folder)
    network = getattr(pipeline, policy.denoiser_name)
    patterns: Any = {"rank_pattern": {"to_v": 3}, "alpha_pattern": {"to_v": 9}}
    theirs = get_peft_model(
        network, LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], use_rslora=rslora, **patterns)
    )
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path / "lora")  # as flow_grpo does
    policy.family.denoiser = network
    expected = velocity(policy, prompts)
    same(in_both_ways(folder, tmp_path / "lora", prompts), expected)
    same(in_both_ways(folder, tmp_path / "lora" / "adapter_model.safetensors", prompts), expected)
    settings = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(settings.read_text())
    cases = {
        "it is a LOHA": {"peft_type": "LOHA"},
        "it is a DoRA": {"use_dora": True},
        "it began with pissa_niter_4, which changed": {"init_lora_weights": "pissa_niter_4"},
        "its alpha is 0": {"lora_alpha": 0},
    }
    for sentence, change in cases.items():
        settings.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=rf"^cannot use the LoRA .*lora: {sentence}"):
            load_policy(replace(SETTINGS, path=str(folder)), trained=tmp_path / "lora")
    settings.unlink()
    with pytest.raises(ValueError, match=r"peft's format, and adapter_config.json, which holds its scale, is not"):
        load_policy(replace(SETTINGS, lora=str(tmp_path / "lora"), path=str(folder)))


def test_a_folders_only_file_is_its_lora_whatever_its_name(tiny_sd3, saved, prompts, tmp_path, monkeypatch):
    _, expected = saved(tiny_sd3)
    (folder := tmp_path / "named").mkdir()
    shutil.copy(tmp_path / "own" / FILE, folder / "my_style.safetensors")
    same(in_both_ways(tiny_sd3, folder, prompts), expected)
    named = {name.replace(".weight", ".default.weight"): t for name, t in load_file(tmp_path / "own" / FILE).items()}
    save_file(named, tmp_path / "default.safetensors")
    same(in_both_ways(tiny_sd3, tmp_path / "default.safetensors", prompts), expected)
    shutil.copy(tmp_path / "own" / FILE, folder / "another.safetensors")
    with pytest.raises(
        ValueError, match=r"a folder with 2 files in safetensors; give one of them, such as another.saf"
    ):
        load_policy(replace(SETTINGS, path=str(tiny_sd3)), trained=folder)
    (torn := tmp_path / "torn.safetensors").write_bytes((tmp_path / "own" / FILE).read_bytes()[:-9])
    with pytest.raises(
        ValueError, match=r"^cannot use the LoRA .*: torn.safetensors is no file in safetensors, or a dam"
    ):
        load_policy(replace(SETTINGS, path=str(tiny_sd3)), trained=torn)
    (pickled := tmp_path / "pickled").mkdir()
    (pickled / "adapter_model.bin").touch()
    for source in (pickled, pickled / "adapter_model.bin"):
        with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle, which can run code and is never read"):
            load_policy(replace(SETTINGS, path=str(tiny_sd3)), trained=source)


def test_a_lora_in_the_place_of_a_model_and_a_model_in_that_of_a_lora_are_named(tiny_sd3, saved, tmp_path):
    saved(tiny_sd3)
    shutil.copytree(tmp_path / "own", tmp_path / "run" / "lora")
    for path in (tmp_path / "own", tmp_path / "own" / FILE, tmp_path / "run"):
        with pytest.raises(
            ValueError, match=r"^model.path: .* is a LoRA; give the model that it belongs to, and the LoRA"
        ):
            load_policy(replace(SETTINGS, path=str(path)))
    for folder in (tiny_sd3, tiny_sd3 / "transformer"):
        with pytest.raises(
            ValueError, match=r"^cannot use the LoRA .*: it is a folder with a whole model or denoiser, and"
        ):
            load_policy(replace(SETTINGS, lora=str(folder), path=str(tiny_sd3)))
    shutil.copytree(tiny_sd3, tmp_path / "both")
    shutil.copy(tmp_path / "own" / FILE, tmp_path / "both")
    load_policy(replace(SETTINGS, path=str(tmp_path / "both")))


def test_what_diffusers_has_no_names_for_is_refused(tiny_sd3, tiny_sd, saved, tmp_path):
    tensors, _ = saved(tiny_sd)
    save_file({n: t.contiguous() for n, t in kohya(tensors, 1.0).items()}, tmp_path / "kohya.safetensors")
    with pytest.raises(
        ValueError, match=r"diffusers does not know all of its names for a StableDiffusion3Pipeline; conv"
    ):
        load_policy(replace(SETTINGS, path=str(tiny_sd3)), trained=tmp_path / "kohya.safetensors")
