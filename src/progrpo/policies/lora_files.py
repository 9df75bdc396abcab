"""LoRA files of others: diffusers' format, peft's folders, and kohya's where diffusers converts it.

A LoRA is two matrices for each layer and the scale of their product. Each format keeps the scale in another place:
diffusers and peft in settings beside the tensors, kohya in tensors of their own. Without any the scale is 1. A DoRA has
the lengths of rows beside the matrices.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name of a LoRA's file in diffusers' format."""
SETTINGS = "lora_adapter_metadata"
"""The name of peft's settings in the header of a file in diffusers' format."""
TRAINED_WITH = "progrpo_trained_with"
"""The name of the settings of training in the header of a file whose weights were rescaled for saving."""
MAGNITUDE = ".lora_magnitude_vector"
"""The end of the name of a DoRA's lengths, in peft's and diffusers' formats."""
HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")

_PEFT_FILE, _PEFT_SETTINGS, _PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
_KOHYA = ("lora_unet_", "lora_te")
_MATRIX = re.compile(r"(?P<layer>.+?)[._]lora(?:\d|_linear_layer)?[._](?P<side>A|B|down|up)\.weight", re.DOTALL)
_OTHER_KINDS = {
    "dora_scale": "DoRA in kohya's format, of which diffusers drops the lengths",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "vera_lambda": "VeRA",
    "on_input": "(IA)3",
    "lora_mid": "LoCon in Tucker's form",
    ".diff": "difference of whole weights",
    "lora_B.bias": "LoRA with biases",
}
"""The kinds that are no plain LoRA, by a part of their tensors' names."""
_SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_OTHER_SETTINGS = {
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "LoRA of replicated layers",
}
_REWRITES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the model's own weights: such a LoRA has a meaning beside those alone."""


LoraSettings = dict[str, Any]
"""Settings of peft's `LoraConfig` by name, as JSON has them."""


@dataclass(frozen=True)
class LoraWeights:
    """The weights of a LoRA, float32, by the denoiser's names, and peft's configuration of it.

    The names are `LAYER.lora_A.weight` (r, I, ...), `LAYER.lora_B.weight` (O, r, ...) and, in a DoRA,
    `LAYER.lora_magnitude_vector` (O,).
    """

    tensors: dict[str, Tensor]
    config: LoraConfig
    rescaled: bool
    """Whether the configuration's alpha / r is in lora_B already, as `save_lora` writes it."""


def lora_file(is_first: bool, part: str) -> str:
    """The name of the file of a denoiser's LoRA: diffusers' own for the first, and one with the name of another."""
    return LORA_FILE if is_first else LORA_FILE.replace(".", f"_{part}.")


def second_loras(folder: Path) -> list[str]:
    """The names of the files of other denoisers' LoRAs than the first's."""
    return sorted(file.name for file in folder.glob(LORA_FILE.replace(".", "_*.")))


def read_lora(pipeline: DiffusionPipeline, denoiser_name: str, source: str, name: str = LORA_FILE) -> LoraWeights:
    """Read the LoRA of a folder, a file or a hub id; `name` is another file's for a second denoiser.

    ValueError, a part of a sentence, for what is no LoRA or DoRA of the denoiser alone.
    """
    file = _file(source) if name == LORA_FILE else _second_file(source, name)
    raw, header = _read(file)
    _require_whole(raw)
    if not_finite := [name for name, tensor in raw.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"its {min(not_finite)} has numbers that are not finite, as of a training that diverged; take another"
        )
    scaled = _scaled(raw)
    if any(name.startswith(_PEFT_PREFIX) for name in raw):
        tensors = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in scaled.items()}
        settings = _settings_beside(file)
    else:
        tensors = _converted(pipeline, denoiser_name, scaled)
        has_alphas = any(name.endswith(".alpha") for name in raw)  # which scale it then
        settings = {} if has_alphas else _settings_of(denoiser_name, json.loads(header.get(SETTINGS, "{}")))
    trained_with = json.loads(header.get(TRAINED_WITH, "{}"))
    return LoraWeights(tensors, _config(settings | trained_with, tensors), bool(trained_with))


# --- where the file is ------------------------------------------------------------------------------------------------


def _file(source: str) -> Path:
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return Path(path, _chosen(os.listdir(path)))
    if os.path.isfile(path):
        _require_safe([path])
        return Path(path)
    if not HUB_ID.fullmatch(source):
        raise ValueError("it is neither a folder, a file nor a hub id")
    return _from_hub(source)


def _second_file(source: str, name: str) -> Path:
    path = os.path.expanduser(source)
    if os.path.isfile(os.path.join(path, name)):
        return Path(path, name)
    if os.path.isdir(path) or os.path.isfile(path) or not HUB_ID.fullmatch(source):
        raise ValueError(f"this model has two denoisers, each with a LoRA; give a folder with {LORA_FILE} and {name}")
    return Path(hf_hub_download(source, name))


def is_lora(path: str) -> bool:
    """Whether a file or folder is a LoRA, or a run that trained one, as far as names tell."""
    if os.path.isdir(path):
        index, *loras = (
            os.path.isfile(os.path.join(path, name))
            for name in ("model_index.json", LORA_FILE, f"lora/{LORA_FILE}", _PEFT_FILE)
        )
        return any(loras) and not index
    if not os.path.isfile(path):
        return False
    try:
        with safe_open(path, "pt") as stored:
            return any(_MATRIX.fullmatch(name) for name in stored.keys())  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError):
        return False


def _chosen(names: Collection[str]) -> str:
    """The file of a folder that is its LoRA."""
    if "model_index.json" in names or any(name.startswith("diffusion_pytorch_model") for name in names):
        raise ValueError("it is a folder with a whole model or denoiser, and no LoRA")
    files = sorted(name for name in names if name.endswith(".safetensors"))
    for name in (LORA_FILE, _PEFT_FILE):
        if name in files:
            return name
    if len(files) > 1:
        raise ValueError(f"it is a folder with {len(files)} files in safetensors; give one of them, such as {files[0]}")
    if not files:
        _require_safe(names)
        raise ValueError(f"it is a folder without a LoRA: with neither {LORA_FILE} nor {_PEFT_FILE}")
    return files[0]


def _require_safe(names: Iterable[str]) -> None:
    for name in sorted(names):
        if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")):
            raise ValueError(
                f"{os.path.basename(name)} is a pickle, which can run code and is never read here; load it where you"
                " trust it and save it as safetensors"
            )


def _from_hub(source: str) -> Path:
    try:
        return Path(hf_hub_download(source, LORA_FILE))
    except EntryNotFoundError as error:
        missing = error
    try:
        hf_hub_download(source, _PEFT_SETTINGS)
        return Path(hf_hub_download(source, _PEFT_FILE))
    except LocalEntryNotFoundError:  # the hub cannot be asked
        raise missing from None
    except EntryNotFoundError:
        raise ValueError(f"it has neither {LORA_FILE} nor {_PEFT_FILE}; download its file and give that") from None


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and header. Peft's own name of the adapter is left out of the tensors' names."""
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (it is no dict)
            named_plainly = {
                name.replace(".default.weight", ".weight").replace(f"{MAGNITUDE}.weight", MAGNITUDE): tensor
                for name, tensor in tensors.items()
            }
            return named_plainly, stored.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file.name} is no file in safetensors, or a damaged one ({error})") from None


# --- what is in it ----------------------------------------------------------------------------------------------------


def _require_whole(tensors: Mapping[str, Tensor]) -> None:
    """ValueError for a file that holds more or less than both matrices of each layer, and a DoRA's lengths.

    The libraries below drop what they do not know.
    """
    names = tensors.keys()
    sides: dict[str, set[str]] = {}
    for name in names:
        for fragment, kind in _OTHER_KINDS.items():
            if fragment in name:
                raise ValueError(f"it is a {kind} ({name}), and only LoRAs and peft's DoRAs are used here")
        if match := _MATRIX.fullmatch(name):
            sides.setdefault(match["layer"], set()).add(match["side"])
    ends = (".alpha", MAGNITUDE)
    alone = [n for n in names if not _MATRIX.fullmatch(n) and all(n.removesuffix(end) not in sides for end in ends)]
    if not sides:
        raise ValueError("it is not a LoRA: no tensor in it is one of lora_A and lora_B, or of lora_down and lora_up")
    if alone:
        raise ValueError(f"it is not a plain LoRA, since it holds {min(alone)}")
    if half := [layer for layer, layer_sides in sides.items() if len(layer_sides) != 2]:
        raise ValueError(f"its {min(half)} has one of two matrices, so that the file is damaged")
    magnitudes = {name.removesuffix(MAGNITUDE): t for name, t in tensors.items() if name.endswith(MAGNITUDE)}
    if magnitudes and (rest := sides.keys() - magnitudes.keys()):
        raise ValueError(f"it is a DoRA whose {min(rest)} has no {MAGNITUDE[1:]}, so that the file is damaged")
    if wide := [layer for layer, tensor in magnitudes.items() if tensor.ndim != 1]:
        raise ValueError(f"it is a DoRA of convolutions ({min(wide)}), and only those of linear layers are used here")


def _scaled(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in float32 with kohya's scales, alpha / r, in their second matrices.

    Their alpha is then r, where a reader needs one.
    """
    matrices = [(name, match) for name in raw if (match := _MATRIX.fullmatch(name))]
    ranks = {match["layer"]: len(raw[name]) for name, match in matrices if match["side"] in ("A", "down")}
    scaled = {}
    for name, match in matrices:
        layer = match["layer"]
        is_second = match["side"] in ("B", "up")
        alpha = raw.get(f"{layer}.alpha")
        scale = float(alpha) / ranks[layer] if is_second and alpha is not None else 1.0
        scaled[name] = raw[name].float() * scale
        if name.startswith(_KOHYA):
            scaled[f"{layer}.alpha"] = torch.tensor(float(ranks[layer]))
    return scaled | {name: tensor.float() for name, tensor in raw.items() if name.endswith(MAGNITUDE)}


def _converted(pipeline: DiffusionPipeline, denoiser_name: str, raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors to the denoiser's own names by diffusers, which knows the names of each format.

    A pipeline that diffusers loads no LoRAs for has its own names alone.
    """
    if not hasattr(pipeline, "lora_state_dict"):
        return {name.removeprefix(f"{denoiser_name}."): tensor for name, tensor in raw.items()}
    unet = {"unet_config": pipeline.unet.config} if denoiser_name == "unet" else {}
    converted = type(pipeline).lora_state_dict(dict(raw), return_lora_metadata=True, return_alphas=True, **unet)[0]
    tensors: dict[str, Tensor] = convert_unet_state_dict_to_peft(converted)
    adapted = {name.partition(".")[0] for name in tensors} & pipeline.components.keys()
    if others := sorted(adapted - {denoiser_name}):
        raise ValueError(
            f"it adapts the {others[0]}, and what is trained here is the {denoiser_name} alone; leave the tensors of"
            f" the {others[0]} out of the file, or merge them into the model's first"
        )
    own = {name.removeprefix(f"{denoiser_name}."): tensor for name, tensor in tensors.items()}
    if any(name.startswith(_KOHYA) for name in own) or not _is_all(own, raw):
        kind = type(pipeline).__name__
        raise ValueError(f"diffusers does not know all of its names for a {kind}; convert it to diffusers' format")
    return own


def _is_all(own: Mapping[str, Tensor], raw: Mapping[str, Tensor]) -> bool:
    """Whether nothing was dropped, by the sum of squares of second matrices: that stays where a layer is split.

    A DoRA's lengths are counted.
    """
    lengths = [sum(name.endswith(MAGNITUDE) for name in tensors) for tensors in (own, raw)]
    own_matrices, raw_matrices = _second_matrices(own), _second_matrices(raw)
    own_sum, raw_sum = (
        sum(float(t.double().square().sum()) for t in matrices) for matrices in (own_matrices, raw_matrices)
    )
    kept = len(own_matrices) >= len(raw_matrices) and lengths[0] == lengths[1]
    return kept and math.isclose(own_sum, raw_sum, rel_tol=1e-6)


def _second_matrices(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [t for name, t in tensors.items() if (match := _MATRIX.fullmatch(name)) and match["side"] in ("B", "up")]


# --- what scales it ---------------------------------------------------------------------------------------------------


def _settings_beside(file: Path) -> LoraSettings:
    """The settings in peft's folder."""
    path = file.with_name(_PEFT_SETTINGS)
    if not path.is_file():
        raise ValueError(
            f"it is in peft's format, and {_PEFT_SETTINGS}, which holds its scale, is not beside {file.name}; put"
            " it there"
        )
    settings: LoraSettings = json.loads(path.read_bytes())
    if (kind := settings.get("peft_type")) != "LORA":
        raise ValueError(f"it is a {kind}, and only LoRAs and peft's DoRAs are used here")
    return settings


def _settings_of(component: str, settings: LoraSettings) -> LoraSettings:
    """Select a component's settings from those in a header; where it was saved alone, all are its own."""
    if "r" in settings:
        return dict(settings)
    prefix = f"{component}."
    return {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}


def _config(settings: LoraSettings, tensors: Mapping[str, Tensor]) -> LoraConfig:
    """Peft's configuration of plain layers. Without settings ranks are the matrices' and the scale is 1."""
    for name, kind in _OTHER_SETTINGS.items():
        if settings.get(name):
            raise ValueError(f"it is a {kind}, and only LoRAs and peft's DoRAs are used here")
    is_dora = any(name.endswith(MAGNITUDE) for name in tensors)
    if settings.get("use_dora") and not is_dora:
        raise ValueError(f"it is a DoRA without {MAGNITUDE[1:]}, so that the file is damaged")
    if (began := str(settings.get("init_lora_weights"))).startswith(_REWRITES):
        raise ValueError(
            f"it began with {began}, which changed the model's own weights; have peft save it for the unchanged model"
            " (path_initial_model_for_weight_conversion)"
        )
    scaling = {name: settings[name] for name in _SCALING if name in settings} or _scaling_by_ranks(tensors)
    alphas = scaling["lora_alpha"], *scaling.get("alpha_pattern", {}).values()
    if not min(alphas) > 0:
        raise ValueError(f"its alpha is {min(alphas)}, with which a LoRA adds nothing")
    layers = sorted({name.partition(".lora_")[0] for name in tensors})
    return LoraConfig(target_modules=layers, init_lora_weights="gaussian", use_dora=is_dora, **scaling)


def _scaling_by_ranks(tensors: Mapping[str, Tensor]) -> LoraSettings:
    ranks = {f"^{name.partition('.lora_')[0]}": len(t) for name, t in tensors.items() if ".lora_A." in name}
    most = Counter(ranks.values()).most_common(1)[0][0]
    others = {layer: rank for layer, rank in ranks.items() if rank != most}
    return {"r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": dict(others)}
