"""Exports of a run: the matrices of the LoRA that it saved, and the whole model with its trained weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from progrpo.messages import named
from progrpo.policies.dora import scaled_to
from progrpo.policies.experts import parts_of
from progrpo.policies.load import apply_trained, family_of, locate, read_pipeline, reported_errors
from progrpo.policies.lora_files import MAGNITUDE, SETTINGS, TRAINED_WITH, lora_file
from progrpo.policies.networks import fetch, network_class
from progrpo.policies.settings import ModelSettings

DENOISERS = ("transformer", "unet")


def saved_lora(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The matrices A and B of each layer of a LoRA that a run has saved, float32, with the strength in B."""
    with reported_errors(file.parent, "trained weights"), safe_open(file, "pt") as stored:
        tensors = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118 (it is no dict)
        header = stored.metadata() or {}
        settings = {} if TRAINED_WITH in header else json.loads(header.get(SETTINGS, "{}"))
        layers = {name.partition(".lora_")[0] for name in tensors}
        return {
            layer.partition(".")[2]: (
                tensors[f"{layer}.lora_A.weight"],
                tensors[f"{layer}.lora_B.weight"] * _strength(layer, settings),
            )
            for layer in sorted(layers)
        }


def saved_magnitudes(file: Path) -> dict[str, Tensor]:
    """The trained lengths of rows of each layer of a DoRA that a run has saved; none of a plain LoRA."""
    with reported_errors(file.parent, "trained weights"), safe_open(file, "pt") as stored:
        names = [name for name in stored.keys() if name.endswith(MAGNITUDE)]  # noqa: SIM118 (it is no dict)
        return {name.removesuffix(MAGNITUDE).partition(".")[2]: stored.get_tensor(name).float() for name in names}


def _strength(layer: str, settings: Mapping[str, Any]) -> float:
    """The factor of a layer's product in a file whose header alone has it, as runs wrote them once."""
    if not settings:
        return 1.0
    component, _, name = layer.partition(".")
    own = {key.removeprefix(f"{component}."): value for key, value in settings.items()}
    rank, alpha = (
        own.get(pattern, {}).get(get_pattern_key(own.get(pattern, {}).keys(), name), own[default])
        for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    return float(alpha / rank**0.5 if own.get("use_rslora") else alpha / rank)


def denoiser_of(settings: ModelSettings) -> tuple[str, dict[str, Any]]:
    """The name of a model's pipeline and the configuration of its denoiser, without any weights."""
    source, revision = locate(settings.path, settings.revision), settings.revision or None
    kind = family_of(source, settings.revision)
    with reported_errors(source):
        index = DiffusionPipeline.load_config(source, revision=revision)
        denoiser: Any = network_class(index[kind.denoiser_name])
        config = denoiser.load_config(source, revision=revision, subfolder=kind.denoiser_name)
        return str(index["_class_name"]), dict(config)


def save_merged(settings: ModelSettings, trained: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write a whole model with what a run has trained in its denoiser, for `DiffusionPipeline.from_pretrained`.

    `trained` is the LoRA's folder or the denoiser's. The denoiser is computed in float32 and written in `dtype`. The
    other networks keep the dtype of their files.
    """
    source = locate(settings.path, settings.revision)
    kind = family_of(source, settings.revision)
    with reported_errors(source):
        files = fetch(source, settings.revision, settings.variant, kind.omitted_components)
        dtypes = {"default": torch.float32, **_stored_dtypes(files, settings.variant)}
        dtypes |= {name: torch.float32 for name in dtypes if name.startswith(kind.denoiser_name)}
    pipeline = read_pipeline(str(files), kind, settings, dtypes)
    if trained.name in DENOISERS:
        apply_trained(pipeline, kind.denoiser_name, trained)
    for name, denoiser in parts_of(pipeline, kind.denoiser_name).items():
        if trained.name not in DENOISERS:
            file = trained / lora_file(name == kind.denoiser_name, name)
            _merge(denoiser, saved_lora(file), saved_magnitudes(file))
        denoiser.to(dtype)
    pipeline.save_pretrained(folder)


@torch.no_grad()
def _merge(denoiser: ModelMixin, lora: Mapping[str, tuple[Tensor, Tensor]], magnitudes: Mapping[str, Tensor]) -> None:
    modules = dict(denoiser.named_modules())
    for layer, (first, second) in lora.items():
        weight = getattr(modules.get(layer), "weight", None)
        if weight is None or (len(second), *first.shape[1:]) != tuple(weight.shape):
            raise ValueError(f"the run's LoRA adapts {named(layer)}, which the model does not have in that size")
        weight += (second.flatten(1) @ first.flatten(1)).reshape(weight.shape)
        if layer in magnitudes:
            weight.copy_(scaled_to(weight, magnitudes[layer]))


def _stored_dtypes(folder: Path, variant: str) -> dict[str, torch.dtype]:
    """The dtype of each network's files; float32 where they are of several."""
    index = DiffusionPipeline.load_config(folder)
    return {
        name: _stored_dtype(folder / name, variant) for name, entry in index.items() if network_class(entry) is not None
    }


def _stored_dtype(folder: Path, variant: str) -> torch.dtype:
    files = sorted(folder.glob("*.safetensors"))
    chosen = [file for file in files if f".{variant}." in file.name] if variant else []
    dtypes = set()
    for file in chosen or files:
        with safe_open(file, "pt") as stored:
            dtypes |= {stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118 (it is no dict)
    kinds = {"F16": torch.float16, "BF16": torch.bfloat16}
    return kinds.get(dtypes.pop(), torch.float32) if len(dtypes) == 1 else torch.float32
