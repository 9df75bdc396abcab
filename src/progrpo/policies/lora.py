"""A LoRA in diffusers' format as what is trained further: its rank, alpha and layers are the file's."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import hf_hub_download
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor

from progrpo.policies.hub import reason_of
from progrpo.words import named

ADAPTER = "default"
"""What peft calls the adapter that is trained."""
LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls a LoRA in its folder."""
HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")

_LAYER = re.compile(r"(?P<part>\w+)\..+\.lora_[AB]\.weight")


def continue_lora(pipeline: DiffusionPipeline, denoiser_name: str, source: str) -> None:
    """Give the denoiser the LoRA of a folder, a file or a hub id, in float32 and bit for bit.

    ValueError, one sentence, for what is no LoRA of this denoiser alone: every number in the file must find its place.
    """
    denoiser = getattr(pipeline, denoiser_name)
    try:
        file = _file(source)
        _require_plain(file, denoiser_name)
        found = type(pipeline).lora_state_dict(file.parent, weight_name=file.name, return_lora_metadata=True)
        tensors, metadata = found[0], found[-1]
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a misfit, which is said below; what peft draws is replaced
            denoiser.load_lora_adapter(tensors, prefix=denoiser_name, metadata=metadata, adapter_name=ADAPTER)
        in_float32(denoiser)  # what was loaded was rounded to the base's dtype
        own = {name.removeprefix(f"{denoiser_name}."): tensor for name, tensor in tensors.items()}
        _require_taken(own, denoiser)
        set_peft_model_state_dict(denoiser, own, ADAPTER)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds: of safetensors, of the hub, of peft at another model's shapes
        raise ValueError(f"model.lora: cannot train {named(source)} further: {reason_of(error, source)}") from error


def in_float32(denoiser: ModelMixin) -> None:
    """The parameters that are trained: peft follows the base's dtype, in which small updates vanish.

    Their layers no longer raise what comes in to float32 themselves: autocast lowers it again, to the same numbers.
    """
    for name, parameter in denoiser.named_parameters():
        if f".{ADAPTER}." in name:
            parameter.data = parameter.data.float()
    for module in denoiser.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


def _file(source: str) -> Path:
    path = os.path.expanduser(source)
    inside = os.path.join(path, LORA_FILE) if os.path.isdir(path) else path
    if os.path.isfile(inside) and inside.endswith(".safetensors"):
        return Path(inside)
    if os.path.exists(path):
        raise ValueError(f"it is neither a folder with a {LORA_FILE} nor a file in safetensors")
    if not HUB_ID.fullmatch(source):
        raise ValueError("it is neither a folder, a file nor a hub id")
    return Path(hf_hub_download(source, LORA_FILE))


def _require_plain(file: Path, denoiser_name: str) -> None:
    """Of the file itself: diffusers lets go of what it does not know."""
    with safe_open(file, "pt") as stored:
        parts = {found["part"] if (found := _LAYER.fullmatch(name)) else None for name in stored.keys()}  # noqa: SIM118
    if None in parts or not parts:
        raise ValueError("it is not a plain LoRA in diffusers' format, of lora_A and lora_B")
    if others := sorted(filter(None, parts - {denoiser_name})):
        raise ValueError(f"it adapts the {others[0]}, and what is trained here is the {denoiser_name} alone")


def _require_taken(own: dict[str, Tensor], denoiser: ModelMixin) -> None:
    taken = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    strange = own.keys() ^ taken.keys() or {name for name in own if own[name].shape != taken[name].shape}
    if strange:
        raise ValueError(f"its {min(strange)} has no place in this model; it is of another")
