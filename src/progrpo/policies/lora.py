"""A LoRA in a denoiser: one that is there already as what is trained further, and what is saved of any.

What is saved means the same to every reader: alpha / rank is in lora_B, and alpha is the rank. A reader of tensors alone, which
knows no alpha, takes just that. The alpha that it was trained with is in the header, for those who train it further: with another
split Adam's steps would be others.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor

from progrpo.messages import named
from progrpo.policies.hub import reason_of
from progrpo.policies.lora_files import LORA_FILE, SETTINGS, TRAINED_WITH, read_lora

ADAPTER = "default"
"""What peft calls the adapter that is trained."""


def continue_lora(pipeline: DiffusionPipeline, denoiser_name: str, source: str) -> None:
    """Give the denoiser the LoRA of a folder, a file or a hub id, in float32.

    Bit for bit, but for one that was saved here and trained with an alpha / rank that is no power of two: that is up to rounding.
    ValueError, one sentence, for what is no LoRA of this denoiser alone: every number in the file must find its place.
    """
    denoiser = getattr(pipeline, denoiser_name)
    try:
        lora = read_lora(pipeline, denoiser_name, source)
        _require_layers(lora.tensors, denoiser)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a misfit, which is said below; what peft draws is replaced
            denoiser.load_lora_adapter(
                dict(lora.tensors), prefix=None, metadata=lora.config.to_dict(), adapter_name=ADAPTER
            )
        in_float32(denoiser)  # what was loaded was rounded to the base's dtype
        _require_taken(lora.tensors, denoiser)
        scale = _scales(denoiser) if lora.rescaled else {}
        own = {name: tensor / scale.get(name, 1.0) for name, tensor in lora.tensors.items()}
        set_peft_model_state_dict(denoiser, own, ADAPTER)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds: of safetensors, of the hub, of peft at another model's shapes
        raise ValueError(f"cannot use the LoRA {named(source)}: {reason_of(error, source)}") from error


def save_lora(denoiser: ModelMixin, denoiser_name: str, folder: Path) -> None:
    """Write the LoRA in diffusers' format."""
    config: LoraConfig = denoiser.peft_config[ADAPTER]
    scale, layers = _scales(denoiser), get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    tensors = {f"{denoiser_name}.{name}": (t * scale.get(name, 1.0)).contiguous() for name, t in layers.items()}
    trained_with = {name: getattr(config, name) for name in ("lora_alpha", "alpha_pattern", "use_rslora")}
    settings = config.to_dict() | {"lora_alpha": config.r, "alpha_pattern": config.rank_pattern, "use_rslora": False}
    settings["target_modules"] = sorted(config.target_modules)  # a set: equal weights should be equal files
    header = {SETTINGS: {f"{denoiser_name}.{name}": v for name, v in settings.items()}, TRAINED_WITH: trained_with}
    folder.mkdir(parents=True, exist_ok=True)
    texts = {name: json.dumps(value, sort_keys=True) for name, value in header.items()}
    save_file(tensors, folder / LORA_FILE, {"format": "pt", **texts})


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


def _scales(denoiser: ModelMixin) -> dict[str, float]:
    """What peft multiplies a layer's product by, under the name of its second matrix."""
    layers = {name: module for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)}
    return {f"{name}.lora_B.weight": float(module.scaling[ADAPTER]) for name, module in layers.items()}


def _require_layers(own: Mapping[str, Tensor], denoiser: ModelMixin) -> None:
    layers = {name for name, _ in denoiser.named_modules()}
    if strange := [name for name in own if name.partition(".lora_")[0] not in layers]:
        raise ValueError(f"its {min(strange)} has no place in this model; it is of another")


def _require_taken(own: Mapping[str, Tensor], denoiser: ModelMixin) -> None:
    taken = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    strange = own.keys() ^ taken.keys() or {name for name in own if own[name].shape != taken[name].shape}
    if strange:
        raise ValueError(f"its {min(strange)} has no place in this model; it is of another")
