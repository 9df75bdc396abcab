"""Single-file checkpoints, as ComfyUI and A1111 have them: their networks, by diffusers' own loaders."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import FromSingleFileMixin
from safetensors import safe_open
from torch import nn

from progrpo.messages import named
from progrpo.policies.hub import UnfitError
from progrpo.policies.lora_files import is_lora

_AUTOENCODER = ("first_stage_model.", "vae.")
_ENCODERS = {
    "CLIPTextModel": ("cond_stage_model.", "conditioner.embedders.", "text_encoders.clip_"),
    "CLIPTextModelWithProjection": ("conditioner.embedders.", "text_encoders.clip_"),
    "T5EncoderModel": ("text_encoders.t5xxl.",),
}
"""The beginnings of the names of tensors that belong to a text encoder of this class."""


def check_single_file(path: str) -> str:
    """The file's path. ValueError for what is no checkpoint in safetensors."""
    file = os.path.expanduser(path)
    if not file.endswith(".safetensors"):
        raise ValueError(
            f"model.single_file: {named(path)} is no safetensors file; other formats can run code and are never read"
        )
    if not os.path.isfile(file):
        raise ValueError(f"model.single_file: there is no file {named(path)}")
    if is_lora(file):
        raise ValueError(f"model.single_file: {named(path)} is a LoRA; give it as model.lora")
    return file


def networks_inside(file: str, index: Mapping[str, object], denoiser_name: str) -> set[str]:
    """The names of a pipeline's networks whose weights are in the file: the denoiser, and others that it has."""
    with safe_open(file, "pt") as stored:
        tensors = tuple(stored.keys())

    def has(beginnings: tuple[str, ...]) -> bool:
        return any(tensor.startswith(beginnings) for tensor in tensors)

    encoders = {
        name for name, entry in index.items() if isinstance(entry, list) and has(_ENCODERS.get(str(entry[-1]), ()))
    }
    return {denoiser_name, *encoders, *(["vae"] if has(_AUTOENCODER) else [])}


def load_single_file(
    file: str,
    folder: Path,
    inside: Collection[str],
    others: Mapping[str, object],
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, nn.Module]:
    """Load the networks `inside` the file for the pipeline of `folder`, each in its dtype of `dtypes` or in `default`.

    `others` are the pipeline's networks that the file lacks. ValueError for a pipeline of which diffusers reads no
    single files, and for a file that does not fill a network.
    """
    class_name = str(diffusers.DiffusionPipeline.load_config(folder)["_class_name"])
    kind: Any = getattr(diffusers, class_name)
    if not issubclass(kind, FromSingleFileMixin):
        raise UnfitError(f"diffusers reads no single files of a {class_name}; leave model.single_file empty")
    asked = {name: dtypes.get(name, dtypes["default"]) for name in inside}
    widest = torch.float32 if torch.float32 in asked.values() else dtypes["default"]
    try:
        pipeline = kind.from_single_file(file, config=str(folder), dtype=widest, **others)
    except NotImplementedError:  # torch's, for tensors of the network that the file did not fill
        pipeline = None
    networks: dict[str, nn.Module] = {name: getattr(pipeline, name) for name in inside} if pipeline else {}
    if not networks or any(value.is_meta for network in networks.values() for value in network.state_dict().values()):
        raise UnfitError(
            f"it lacks tensors of the model's {' or '.join(sorted(inside))}; give the model that it was made from as"
            " model.path"
        )
    for name, network in networks.items():
        if network.dtype != asked[name]:
            network.to(asked[name])
    return networks
