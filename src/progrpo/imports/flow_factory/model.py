"""Rules of the model, its LoRA, and the data set."""

from __future__ import annotations

import os
import re
from pathlib import Path

from progrpo.imports.outcome import Outcome, Setting, counted_in, no_equal, not_needed, to_fields
from progrpo.imports.shared_rules import lora_to_train_further
from progrpo.messages import quoted

_ATTENTION = tuple(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
_ATTENTION += tuple(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))
_FF = tuple(f"{stream}.{name}" for stream in ("ff", "ff_context") for name in ("net.0.proj", "net.2"))
_FF2 = tuple(f"{stream}.{name}" for stream in ("ff", "ff_context") for name in ("linear_in", "linear_out"))
_WAN = tuple(f"{attention}.{name.removeprefix('attn.')}" for attention in ("attn1", "attn2") for name in _ATTENTION[:4])
_MLP = tuple(f"feed_forward.{name}" for name in ("w1", "w2", "w3"))
_DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "sd3-5": _ATTENTION,
    "flux1": (*_ATTENTION, *_FF),
    "flux1-kontext": (*_ATTENTION, *_FF),
    "flux2": (*_ATTENTION, *_FF2, "attn.to_qkv_mlp_proj"),
    "flux2-klein": (*_ATTENTION, *_FF2, "attn.to_qkv_mlp_proj"),
    # Flow-Factory also names img_mlp.net.2.proj and txt_mlp.net.2.proj, which are no layers
    "qwen-image": (*_ATTENTION, "img_mlp.net.0.proj", "txt_mlp.net.0.proj"),
    "qwen-image-2.1": (*_ATTENTION[:4], "img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out"),
    "qwen-image-edit-plus": (*(name.removeprefix("attn.") for name in _ATTENTION), "net.0.proj", "net.2"),
    "z-image": (*(name.replace("attn.", "attention.") for name in _ATTENTION[:4]), *_MLP),
    "wan2_t2v": (*_WAN, "ffn.net.0.proj", "ffn.net.2"),
    "wan2_i2v": (*_WAN, "ffn.net.0.proj", "ffn.net.2"),
}
"""The model types that have a policy here, and the layers that `target_modules: default` means for each."""


_NO_POLICY = {
    "bagel": "it is no pipeline of diffusers",
    "sensenova": "it is no pipeline of diffusers",
    "ltx2": "it makes sound with the video, of which the policies know nothing",
    "minimax": "it makes sound with the video, of which the policies know nothing",
    "wan2_v2v": "it begins with a video, and prompts bring pictures at most",
}
"""Why a type of model has no policy here, by the beginning of its name."""


def _two_networks(setting: Setting) -> bool:
    """Whether the model is a Wan 2.2, by its name."""
    return bool(re.search(r"wan\W?2\W2", str(setting.all.get("model.model_name_or_path")).lower()))


def path(setting: Setting) -> Outcome:
    subject = f"model.model_name_or_path {quoted(setting.value)}"
    if _two_networks(setting) and re.search(r"ti2v|5b", setting.text().lower()):
        raise ValueError(f"{subject} has a timestep for each place, which no policy here can train")
    if _two_networks(setting) and setting.all.get("model.finetune_type") == "full":
        raise ValueError(f"{subject} has two networks, which are trained by a LoRA here and not in full")
    return to_fields({"model.path": setting.text()})


def model_type(setting: Setting) -> Outcome:
    kind = str(setting.value).lower()
    if setting.value is not None and kind not in _DEFAULT_TARGETS:
        reason = next((f": {why}" for name, why in _NO_POLICY.items() if kind.startswith(name)), "")
        raise ValueError(
            f"model.model_type {quoted(setting.value)} is a type of model that cannot be trained here{reason}; there"
            f" are {', '.join(_DEFAULT_TARGETS)}"
        )
    return not_needed("read from the model itself")


def takes_sources(setting: Setting) -> bool:
    """Whether the model's policy begins with a picture that each prompt brings."""
    kind, name = (str(setting.all.get(f"model.{part}")).lower() for part in ("model_type", "model_name_or_path"))
    return kind in ("qwen-image-edit-plus", "wan2_i2v") or any(part in name for part in ("kontext", "-edit", "i2v"))


def counts_guidance_from_0(setting: Setting) -> bool:
    """Whether a guidance scale of 0 is none for the model, as for Z-Image; for others it is 1."""
    return str(setting.all.get("model.model_type")).lower() == "z-image"


def components(setting: Setting) -> Outcome:
    value = setting.value if isinstance(setting.value, list) else [setting.value]
    both = ["transformer", "transformer_2"]
    if _two_networks(setting):
        why = "both networks are trained"
        return not_needed(why) if sorted(map(str, value)) == both else no_equal(why)
    why = "only the denoiser is trained"
    return not_needed(why) if value == ["transformer"] else no_equal(why)


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
    value = str(setting.value).removeprefix("transformer.")
    if value == "default" and layers:
        fields = {"model.lora_targets": list(layers)}
        one_of_two = value != setting.value and _two_networks(setting)
        return no_equal("both networks get these layers", fields) if one_of_two else to_fields(fields)
    if setting.value in ("default", "all"):
        return no_equal(
            "our default is used: attention and feed-forward of both streams; model.lora_targets takes another list"
        )
    return to_fields({"model.lora_targets": [setting.value]})


def own_evaluation(setting: Setting) -> Outcome:
    """The outcome of a setting of evaluations that a data set has for itself, and not those of `eval`."""
    if not setting.name.startswith("data.datasets[0]."):
        return not_needed("for a data set that is not read")
    name = setting.name.rpartition(".")[2]
    standard = {"split": "test", "max_dataset_size": None}.get(name, setting.all.get(f"eval.{name}"))
    return not_needed("that of eval") if setting.value == standard else no_equal("evaluations have eval's own here")


def dataset(setting: Setting) -> Outcome:
    if setting.name != "data.datasets[0].dataset_dir":
        head = setting.name.removesuffix("dataset_dir")
        is_trained = any(name.startswith(f"{head}train") for name in setting.all)
        other = "join them in one file" if is_trained else "this one is for evaluations: see eval.prompts"
        return no_equal(f"one data set is read here; {other}")
    folder = Path(os.path.expanduser(setting.text()))
    if setting.all["train.trainer_type"] == "offline-dpo":
        return no_equal(
            "its train.jsonl has the prompt under `input`, the pictures under `supervision`; write lines with prompt,"
            " image_a, image_b and preference (docs/preferences.md) to pairs.jsonl beside it",
            {"prompts.pairs": str(folder / "pairs.jsonl"), "eval.prompts": str(folder / "test.jsonl")},
        )
    # os.path, because Path's own methods raise for an unknown user and for a name that is too long
    is_text = os.path.isfile(folder / "train.txt") and not os.path.isfile(folder / "train.jsonl")
    end = ".txt" if is_text else ".jsonl"
    fields = {"prompts.source": str(folder / f"train{end}"), "eval.prompts": str(folder / f"test{end}")}
    if takes_sources(setting):
        return no_equal(
            "a line's `image` is a path from the file's folder here, and from `images` in it there; begin paths with"
            " images/",
            fields,
        )
    return to_fields(fields)
