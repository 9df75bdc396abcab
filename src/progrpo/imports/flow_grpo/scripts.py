"""flow_grpo's scripts: which of them reads a file's settings, and what it fixes in its code.

There is a script for each kind of model. Its code fixes what the files do not say (the LoRA's size and layers, the
length of prompts, Wan's step), and it leaves some of their settings unread. `Scripts` holds what it fixes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from progrpo.imports.outcome import Setting
from progrpo.recipes import flux_pickscore, sd35m_pickscore

Script = Literal["auto", "plain", "fast", "guard"]
ALGORITHM = "train.algorithm"
OLDER_WINDOW = "sample.train_num_steps"


@dataclass(frozen=True)
class Scripts:
    """Settings that flow_grpo's scripts for one kind of model fix in their code.

    `reads_window`: also the scripts that are not fast read a window of noisy steps.
    """

    lora_rank: int
    lora_alpha: int
    lora_targets: tuple[str, ...]
    max_sequence_length: int
    reads_window: bool = False


_SD3, _FLUX = sd35m_pickscore().model, flux_pickscore().model
_MLP = tuple(f"{stream}_mlp.{name}" for stream in ("img", "txt") for name in ("net.0.proj", "net.2"))
SCRIPTS = {
    "SD3": Scripts(32, 64, _SD3.lora_targets, 128),
    "FLUX": Scripts(64, 128, _FLUX.lora_targets, 128),
    "FLUX Kontext": Scripts(64, 128, (*_FLUX.lora_targets, "proj_mlp"), 128),
    "Qwen-Image": Scripts(64, 128, (*_SD3.lora_targets, *_MLP), 512, reads_window=True),
    "Qwen-Image-Edit": Scripts(64, 128, (*_SD3.lora_targets, *_MLP), 512, reads_window=True),
    # those of the script's names that a text-to-video model has
    "Wan": Scripts(32, 64, ("to_k", "to_out.0", "to_q", "to_v"), 512),
}
_FIXED_FOR_DPO: dict[str, object] = {
    "script.sampling_policy": "the reference",
    "script.noise_levels": "logit-normal",
}
_FIXED_FOR_WAN: dict[str, object] = {
    "script.sampler": "flow_grpo_wan",
    "script.levels": "UniPC's",
    "script.activation_checkpointing": True,
}


def model_kind(settings: Mapping[str, object]) -> str:
    """The kind of model whose script it is, by the model's name; SD3 if the name says nothing."""
    name = last_part(settings.get("pretrained.model", ""))
    if "frames" in settings or re.search(r"wan\W?[12]", name):
        return "Wan"
    if "qwen" in name:
        return "Qwen-Image-Edit" if "edit" in name else "Qwen-Image"
    if "flux" in name or "kontext" in name:
        return "FLUX Kontext" if "kontext" in name else "FLUX"
    return "SD3"


def last_part(model: object) -> str:
    """The last part of a model's path or hub id, in small letters."""
    return str(model).lower().rstrip("/").rpartition("/")[2]


def fixed_by_scripts(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings that the scripts for this kind of model fix in their code."""
    kind = str(settings["script.model"])
    scripts = SCRIPTS[kind]
    lora: dict[str, object] = {
        "script.lora_rank": scripts.lora_rank,
        "script.lora_alpha": scripts.lora_alpha,
        "script.lora_targets": list(scripts.lora_targets),
    }
    return {
        **(lora if settings.get("use_lora") else {}),
        "script.max_sequence_length": scripts.max_sequence_length,
        "script.eval_prompts": "all of the test file",
        **(_FIXED_FOR_WAN if kind == "Wan" else {}),
        **({"script.source_size": "stretched to a square"} if kind == "Qwen-Image-Edit" else {}),
        **(_FIXED_FOR_DPO if str(settings.get(ALGORITHM)).lower() == "dpo" else {}),
    }


def kind_of(setting: Setting) -> str:
    return str(setting.all["script.model"])


def is_flux(setting: Setting) -> bool:
    return kind_of(setting).startswith("FLUX")


def is_dpo(setting: Setting) -> bool:
    return str(setting.all.get(ALGORITHM)).lower() == "dpo"


def reads_windows(setting: Setting) -> bool:
    return setting.all["script"] == "fast" or SCRIPTS[kind_of(setting)].reads_window
