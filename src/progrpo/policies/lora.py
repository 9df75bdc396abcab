"""A LoRA in a denoiser: one that is trained further is loaded, and every one is saved.

A saved LoRA means the same to every reader: alpha / rank is in lora_B, and alpha is the rank, as a reader of tensors
alone assumes. The alpha of training is in the header, for those who train it further: with another split Adam's steps
would be others.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Set
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor

from progrpo.messages import named
from progrpo.policies.dora import Magnitude
from progrpo.policies.hub import reason_of
from progrpo.policies.lora_files import MAGNITUDE, SETTINGS, TRAINED_WITH, lora_file, read_lora

ADAPTER = "default"
"""The name of the trained adapter in peft."""


def add_lora(denoiser: ModelMixin, config: LoraConfig) -> None:
    """Add a LoRA's layers to the denoiser, as diffusers does, also to one of the few that diffusers adds none to."""
    if hasattr(denoiser, "add_adapter"):
        denoiser.add_adapter(config, ADAPTER)
    else:
        inject_adapter_in_model(config, denoiser, ADAPTER)
        denoiser.peft_config = {ADAPTER: config}


def continue_lora(pipeline: DiffusionPipeline, denoiser_name: str, source: str, part: str) -> None:
    """Add the LoRA of a folder, a file or a hub id to the denoiser `part`, in float32.

    It is the file's bit for bit. Only one that was saved here with an alpha / rank that is no power of two is it up to
    rounding. ValueError, one sentence, for what is no LoRA of this denoiser alone: every number in the file must find
    its place.
    """
    denoiser = getattr(pipeline, part)
    try:
        lora = read_lora(pipeline, denoiser_name, source, lora_file(part == denoiser_name, part))
        _require_layers(lora.tensors, denoiser)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a misfit, which is refused below; what peft draws is replaced
            if hasattr(denoiser, "load_lora_adapter"):
                metadata = lora.config.to_dict()
                denoiser.load_lora_adapter(dict(lora.tensors), prefix=None, metadata=metadata, adapter_name=ADAPTER)
            else:
                add_lora(denoiser, lora.config)
        in_float32(denoiser)  # what was loaded was rounded to the base's dtype
        _require_loaded(lora.tensors, denoiser)
        scale = _scales(denoiser) if lora.rescaled else {}
        own = {name: tensor / scale.get(name, 1.0) for name, tensor in lora.tensors.items()}
        set_peft_model_state_dict(denoiser, own, ADAPTER)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds: of safetensors, of the hub, of peft at another model's shapes
        raise ValueError(f"cannot use the LoRA {named(source)}: {reason_of(error, source)}") from error


def save_lora(denoiser: ModelMixin, denoiser_name: str, file: Path) -> None:
    """Write the LoRA in diffusers' format, under the name of the pipeline's first denoiser."""
    config: LoraConfig = denoiser.peft_config[ADAPTER]
    scale, layers = _scales(denoiser), get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    tensors = {f"{denoiser_name}.{name}": (t * scale.get(name, 1.0)).contiguous() for name, t in layers.items()}
    trained_with = {name: getattr(config, name) for name in ("lora_alpha", "alpha_pattern", "use_rslora")}
    settings = config.to_dict() | {"lora_alpha": config.r, "alpha_pattern": config.rank_pattern, "use_rslora": False}
    settings["target_modules"] = sorted(config.target_modules)  # a set: equal weights should be equal files
    header = {SETTINGS: {f"{denoiser_name}.{name}": v for name, v in settings.items()}, TRAINED_WITH: trained_with}
    file.parent.mkdir(parents=True, exist_ok=True)
    texts = {name: json.dumps(value, sort_keys=True) for name, value in header.items()}
    save_file(tensors, file, {"format": "pt", **texts})


def in_float32(denoiser: ModelMixin) -> None:
    """Cast the trained parameters to float32: peft follows the base's dtype, in which small updates vanish.

    Their layers no longer cast their inputs to float32: autocast casts them back, to the same numbers.
    """
    for name, parameter in denoiser.named_parameters():
        if f".{ADAPTER}." in name:
            parameter.data = parameter.data.float()
    for module in denoiser.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
    _own_magnitudes(denoiser)


def magnitudes(denoiser: ModelMixin) -> dict[str, Tensor]:
    """The lengths of rows of each layer that a DoRA adapts; none of a plain LoRA."""
    modules = denoiser.named_modules()
    return {name.partition(MAGNITUDE)[0]: module.weight for name, module in modules if isinstance(module, Magnitude)}


def _own_magnitudes(denoiser: ModelMixin) -> None:
    """Give the layers of a DoRA modules that compute in float32, with the lengths of the base's rows."""
    for module in denoiser.modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_magnitude_vector:
            module.lora_magnitude_vector[ADAPTER] = Magnitude(module.get_base_layer())


def _scales(denoiser: ModelMixin) -> dict[str, float]:
    """The factor of each layer's product in peft, by the name of the layer's second matrix."""
    layers = {name: module for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)}
    return {f"{name}.lora_B.weight": float(module.scaling[ADAPTER]) for name, module in layers.items()}


def _require_layers(tensors: Mapping[str, Tensor], denoiser: ModelMixin) -> None:
    layers = {name for name, _ in denoiser.named_modules()}
    _refuse({name for name in tensors if name.partition(".lora_")[0] not in layers})


def _require_loaded(tensors: Mapping[str, Tensor], denoiser: ModelMixin) -> None:
    loaded = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    other_names = tensors.keys() ^ loaded.keys()
    _refuse(other_names or {name for name in tensors if tensors[name].shape != loaded[name].shape})


def _refuse(names: Set[str]) -> None:
    if names:
        raise ValueError(f"its {min(names)} has no place in this model; it is of another")
