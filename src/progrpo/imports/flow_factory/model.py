"""Rules of the model, its LoRA, and the data set."""

from __future__ import annotations

import os
import re
from pathlib import Path

from progrpo.imports.translation import (
    Outcome,
    Setting,
    counted_in,
    lora_to_train_further,
    no_equal,
    not_needed,
    to_fields,
)
from progrpo.messages import quoted

_ATTENTION = tuple(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
_ATTENTION += tuple(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))
_FF = tuple(f"{stream}.{name}" for stream in ("ff", "ff_context") for name in ("net.0.proj", "net.2"))
_FF2 = tuple(f"{stream}.{name}" for stream in ("ff", "ff_context") for name in ("linear_in", "linear_out"))
_WAN = tuple(f"{attention}.{name.removeprefix('attn.')}" for attention in ("attn1", "attn2") for name in _ATTENTION[:4])
_DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "sd3-5": _ATTENTION,
    "flux1": (*_ATTENTION, *_FF),
    "flux1-kontext": (*_ATTENTION, *_FF),
    "flux2-klein": (*_ATTENTION, *_FF2, "attn.to_qkv_mlp_proj"),
    # Flow-Factory also names img_mlp.net.2.proj and txt_mlp.net.2.proj, which are no layers
    "qwen-image": (*_ATTENTION, "img_mlp.net.0.proj", "txt_mlp.net.0.proj"),
    "wan2_t2v": (*_WAN, "ffn.net.0.proj", "ffn.net.2"),
}
"""The model types that have a policy here, and the layers that `target_modules: default` means for each."""


def path(setting: Setting) -> Outcome:
    if re.search(r"wan\W?2\W2", setting.text().lower()):
        raise ValueError(
            f"model.model_name_or_path {quoted(setting.value)} is a Wan 2.2, of two networks, which cannot be trained"
            " here"
        )
    return to_fields({"model.path": setting.value})


def model_type(setting: Setting) -> Outcome:
    if setting.value is not None and str(setting.value).lower() not in _DEFAULT_TARGETS:
        raise ValueError(
            f"model.model_type {quoted(setting.value)} is a type of model that cannot be trained here; there are"
            f" {', '.join(_DEFAULT_TARGETS)}"
        )
    return not_needed("read from the model itself")


def lora_rank(setting: Setting) -> Outcome:
    if setting.all.get("model.finetune_type") != "lora":
        return not_needed("all weights are trained")
    fields = {"model.lora_rank": setting.value}
    if setting.all.get("model.lora_alpha") is None:
        fields["model.lora_alpha"] = 2 * setting.count()
    return to_fields(fields)


def lora_alpha(setting: Setting) -> Outcome:
    if setting.all.get("model.finetune_type") != "lora":
        return not_needed("all weights are trained")
    return not_needed("twice the rank") if setting.value is None else to_fields({"model.lora_alpha": setting.value})


_RESUMING = "progrpo train --resume resumes its own runs only"


def _resumes_lora(setting: Setting) -> bool:
    kind = setting.all.get("model.resume_type") or setting.all.get("model.finetune_type")
    return kind == "lora" == setting.all.get("model.finetune_type")


def resumed(setting: Setting) -> Outcome:
    if setting.value is None:
        return not_needed("nothing to resume")
    return lora_to_train_further(setting) if _resumes_lora(setting) else no_equal(_RESUMING)


def resume_type(setting: Setting) -> Outcome:
    if setting.all.get("model.resume_path") is None:
        return not_needed("nothing to resume")
    return counted_in("model.lora") if _resumes_lora(setting) else no_equal(_RESUMING)


def targets(setting: Setting) -> Outcome:
    if setting.all.get("model.finetune_type") != "lora":
        return not_needed("all weights are trained")
    if isinstance(setting.value, list):
        return to_fields({"model.lora_targets": setting.value})
    layers = _DEFAULT_TARGETS.get(str(setting.all.get("model.model_type")).lower())
    if setting.value == "default" and layers:
        return to_fields({"model.lora_targets": list(layers)})
    if setting.value in ("default", "all"):
        return no_equal(
            "our default is used: attention and feed-forward of both streams; model.lora_targets takes another list"
        )
    return to_fields({"model.lora_targets": [setting.value]})


def dataset(setting: Setting) -> Outcome:
    if setting.name != "data.datasets[0].dataset_dir":
        return no_equal("one data set is read here; join them in one file")
    folder = Path(os.path.expanduser(setting.text()))
    # os.path, because Path's own methods raise for an unknown user and for a name that is too long
    is_text = os.path.isfile(folder / "train.txt") and not os.path.isfile(folder / "train.jsonl")
    end = ".txt" if is_text else ".jsonl"
    return to_fields({"prompts.source": str(folder / f"train{end}"), "eval.prompts": str(folder / f"test{end}")})
