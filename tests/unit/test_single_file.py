"""Single-file checkpoints against the pipelines that they were written from."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from progrpo.config import Config, config_to_json
from progrpo.policies.export import save_merged
from progrpo.policies.load import load_policy
from progrpo.policies.settings import ModelSettings
from progrpo.training.distributed import Ranks
from progrpo.training.trained_model import ModelChoice
from tests.support.single_files import write_sd, write_sd3_transformer


@torch.no_grad()
def moved(folder: Path) -> Any:
    """The pipeline with other weights, as a fine-tuned model has them."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    generator = torch.Generator().manual_seed(7)
    for network in (component for component in pipeline.components.values() if isinstance(component, torch.nn.Module)):
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return pipeline


def assert_equal(network: Any, other: Any) -> None:
    ours, theirs = network.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), next(
        name for name in ours if not torch.equal(ours[name], theirs[name])
    )


@pytest.fixture(scope="module")
def tuned(tiny_sd) -> Any:
    return moved(tiny_sd)


@pytest.fixture(scope="module")
def file(tuned, tmp_path_factory) -> Path:
    return write_sd(tuned, tmp_path_factory.mktemp("files") / "tuned.safetensors")


def settings(folder: Path, file: Path, **others: Any) -> ModelSettings:
    return ModelSettings(str(folder), single_file=str(file), **others)


def test_all_networks_of_a_whole_file_take_their_places(tiny_sd, tuned, file):
    pipeline: Any = load_policy(settings(tiny_sd, file, weights="full")).pipeline
    for name in ("unet", "vae", "text_encoder"):
        assert_equal(getattr(pipeline, name), getattr(tuned, name))


def test_a_transformer_alone_takes_the_denoisers_place(tiny_sd3, tmp_path):
    tuned = moved(tiny_sd3)
    file = write_sd3_transformer(tuned, tmp_path / "transformer.safetensors")
    pipeline: Any = load_policy(settings(tiny_sd3, file, weights="full")).pipeline
    assert_equal(pipeline.transformer, tuned.transformer)
    base = DiffusionPipeline.from_pretrained(tiny_sd3, use_safetensors=True)
    for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        assert_equal(getattr(pipeline, name), getattr(base, name))


def test_each_network_has_its_dtype(tiny_sd, file):
    pipeline: Any = load_policy(settings(tiny_sd, file, weights="full", dtype="bfloat16")).pipeline
    assert (pipeline.unet.dtype, pipeline.text_encoder.dtype) == (torch.float32, torch.bfloat16)


def test_what_was_trained_is_merged_into_the_file(tiny_sd, tuned, file, tmp_path):
    policy = load_policy(settings(tiny_sd, file, lora_rank=2))
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.fill_(0.1)
    (tmp_path / "lora").mkdir()
    policy.save(tmp_path / "lora")
    save_merged(settings(tiny_sd, file), tmp_path / "lora", tmp_path / "merged", torch.float32)
    merged: Any = DiffusionPipeline.from_pretrained(tmp_path / "merged", use_safetensors=True)
    assert_equal(merged.vae, tuned.vae)
    changed = {
        name.rpartition(".attn")[0]
        for name, value in merged.unet.state_dict().items()
        if not torch.equal(value, tuned.unet.state_dict()[name])
    }
    assert 0 < len(changed) < len(tuned.unet.state_dict())


def test_what_is_no_checkpoint_of_the_model_is_said_in_a_sentence(tiny_sd, tiny_sd3, tiny_wan, file, tmp_path):
    lora = tmp_path / "lora.safetensors"
    save_file({"unet.a.lora_A.weight": torch.zeros(1, 1), "unet.a.lora_B.weight": torch.zeros(1, 1)}, lora)
    part = tmp_path / "part.safetensors"
    save_file({name: value for name, value in load_file(file).items() if ".middle_block." not in name}, part)
    for folder, given, sentence in (
        (tiny_sd, tmp_path / "a.ckpt", "is no safetensors file; other formats can run code"),
        (tiny_sd, tmp_path / "a.safetensors", "there is no file"),
        (tiny_sd, lora, "is a LoRA; give it as model.lora"),
        (tiny_sd, part, "it lacks tensors of the model's text_encoder or unet or vae; give the model"),
        (tiny_sd3, file, "model.single_file: cannot load"),
        (tiny_wan, file, "diffusers reads no single files of a WanPipeline"),
    ):
        with pytest.raises(ValueError, match=sentence) as refused:
            load_policy(settings(folder, given))
        assert "\n" not in str(refused.value)


def test_a_file_as_the_model_itself_names_the_setting(file):
    with pytest.raises(ValueError, match=r"is a single file; give it as model\.single_file, and as model\.path the"):
        load_policy(replace(settings(file, file), single_file=""))


def test_a_runs_lora_on_another_model_brings_the_lora_alone(tiny_sd, file, tmp_path):
    trained = settings(tiny_sd, file, lora_rank=2)
    run, other = tmp_path / "run", tmp_path / "other"
    load_policy(trained).save(run / "lora")
    (run / "config.json").write_text(config_to_json(Config(model=trained)))
    (run / "summary.json").write_text("{}")
    shutil.copytree(tiny_sd, other)
    policy: Any = ModelChoice(str(other), lora=run).load(Ranks())
    alone: Any = load_policy(ModelSettings(str(other), weights="full")).pipeline
    assert_equal(policy.pipeline.vae, alone.vae)
    ours = {name.replace(".base_layer.", "."): weight for name, weight in policy.pipeline.unet.state_dict().items()}
    assert all(torch.equal(ours[name], weight) for name, weight in alone.unet.state_dict().items())
