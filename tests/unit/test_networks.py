"""The contents of a model's files and the weights of its networks: whole, or refused in a sentence."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from progrpo.policies.load import load_policy
from progrpo.policies.settings import ModelSettings
from progrpo.types import Prompt

SETTINGS = ModelSettings(lora_rank=2)
TEXT, UNET = "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copy(tiny_sd, tmp_path):
    """The model, to be damaged."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


@pytest.fixture
def hub(tiny_sd, tmp_path, monkeypatch):
    """The model `owner/model` in the cache of a hub that cannot be reached, on a branch `other` and not on `main`."""
    repository = tmp_path / "hub" / "models--owner--model"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(tiny_sd, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "other").write_text(COMMIT)
    for name, value in (("HF_HUB_CACHE", str(tmp_path / "hub")), ("HF_HUB_OFFLINE", True)):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("diffusers.configuration_utils.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    return snapshot


def change(file: Path, changed: Any) -> None:
    save_file(changed(load_file(file)), file, {"format": "pt"})


def prefixed(prefix: str) -> Any:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def without(word: str) -> Any:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if word not in name}


def beside(file: Path, variant: str) -> Path:
    """A copy of weights as another variant: as many numbers again in the folder."""
    return Path(shutil.copy(file, file.with_name(file.name.replace(".safetensors", f".{variant}.safetensors"))))


def refusal(path: Path | str, **changes: Any) -> str:
    with pytest.raises(ValueError) as refused:
        load_policy(replace(SETTINGS, **changes, path=str(path)))
    said = str(refused.value)
    assert said.isprintable()
    return said


@pytest.mark.parametrize("file", [TEXT, UNET, VAE])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_weights_under_other_names_are_none(copy, file, prefix):
    change(copy / file, prefixed(prefix))
    said = refusal(copy)
    assert f"{(copy / file).parent} lacks " in said and f"its names begin with {prefix}, as those of" in said


@pytest.mark.parametrize(
    ("file", "word"), [(TEXT, "token_embedding"), (UNET, "conv_in.bias"), (VAE, "decoder.conv_out")]
)
def test_what_a_file_lacks_is_not_made_up_where_another_variant_has_it(copy, file, word):
    beside(copy / file, "fp16")
    change(copy / file, without(word))
    assert re.search(
        rf"{re.escape(str((copy / file).parent))} lacks \d of the \d+ tensors .* such as \S*{word}", refusal(copy)
    )


def test_weights_of_another_size_are_refused(copy):
    change(copy / TEXT, lambda tensors: {n: t[:-1] if "token_embedding" in n else t for n, t in tensors.items()})
    assert f"{copy / 'text_encoder'} lacks 1 of the" in refusal(copy)
    shutil.rmtree(copy / "text_encoder")
    assert f"{copy / 'text_encoder'}" in refusal(copy)


def test_what_a_trained_denoiser_lacks_is_refused(copy, tmp_path):
    load_policy(ModelSettings(str(copy), weights="full")).save(tmp_path / "trained")
    change(tmp_path / "trained" / Path(UNET).name, prefixed("module."))
    with pytest.raises(ValueError, match=r"^trained weights: cannot load .*trained lacks .* begin with module\., as"):
        load_policy(replace(SETTINGS, path=str(copy)), trained=tmp_path / "trained")


def test_a_model_of_the_hub_is_read_at_its_revision_and_is_as_whole_as_a_folder(hub, copy):
    there: Any = load_policy(ModelSettings("owner/model", lora_rank=2, revision="other"))
    here: Any = load_policy(replace(SETTINGS, path=str(copy)))
    for mine, theirs in zip(here.denoiser.parameters(), there.denoiser.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    prompts = [Prompt("red cat", {})]
    assert torch.equal(here.encode(prompts).tensors["prompt_embeds"], there.encode(prompts).tensors["prompt_embeds"])
    assert "try again with a network, or give a folder" in refusal("owner/model")  # there is no main in the cache
    change(hub / TEXT, prefixed("module."))
    said = refusal("owner/model", revision="other")
    assert said.startswith("model.path: cannot load owner/model") and "text_encoder lacks" in said


def test_a_folder_has_no_revision(copy):
    for path in (copy, "shapes-flow"):
        assert refusal(path, revision="main").startswith(
            f"model.revision: {path} is no hub id, and has no revision main;"
        )


def test_a_variant_is_read_where_it_is_and_named_where_it_is_all_there_is(copy):
    plain: Any = load_policy(replace(SETTINGS, path=str(copy)))
    for file in (TEXT, UNET):
        beside(copy / file, "fp16")
        change(copy / file, lambda tensors: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    chosen: Any = load_policy(replace(SETTINGS, variant="fp16", path=str(copy)))  # the autoencoder has no variant
    for mine, theirs in zip(plain.denoiser.parameters(), chosen.denoiser.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert "it has no weights of the variant ema, of others fp16; leave model.variant empty" in refusal(
        copy, variant="ema"
    )
    for file in (TEXT, UNET):
        (copy / file).unlink()
    said = refusal(copy)
    assert (
        f"{copy / 'text_encoder'} holds the variant fp16 of its weights alone; give model.variant fp16, or --variant"
        " fp16" in said
    )


def test_pickles_and_single_files_are_refused_with_what_to_do_instead(copy, tmp_path):
    (copy / UNET).rename(copy / "unet" / "diffusion_pytorch_model.bin")
    said = refusal(copy)
    assert (
        "unet holds its weights as diffusion_pytorch_model.bin" in said
        and "save_pretrained(FOLDER) writes safetensors" in said
    )
    single = tmp_path / "v1-5.safetensors"
    save_file({"model.diffusion_model.x": torch.zeros(1)}, single)
    for path in (single, "models/v1-5.ckpt"):
        assert refusal(path).startswith(f"model.path: {path} is a single file; give it as model.single_file")


def test_a_safety_checker_that_is_not_there_is_not_missed(copy):
    index = copy / "model_index.json"
    stated = json.loads(index.read_text()) | {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    index.write_text(json.dumps(stated))  # as that of SD 1.x
    assert load_policy(replace(SETTINGS, path=str(copy))).denoiser_name == "unet"


def test_every_part_comes_in_its_dtype(tiny_sd):
    for weights in ("lora", "full"):
        policy: Any = load_policy(replace(SETTINGS, weights=weights, dtype="bfloat16", path=str(tiny_sd)))
        pipeline = policy.pipeline
        assert pipeline.text_encoder.dtype == pipeline.vae.dtype == torch.bfloat16
        frozen = torch.float32 if weights == "full" else torch.bfloat16
        assert {p.dtype for name, p in policy.denoiser.named_parameters() if "lora" not in name} == {frozen}
