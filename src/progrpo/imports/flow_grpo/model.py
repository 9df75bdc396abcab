"""Rules of the model, its LoRA, and the data set."""

from __future__ import annotations

from pathlib import Path

from progrpo.imports.flow_grpo.scripts import kind_of, last_part
from progrpo.imports.outcome import Outcome, Setting, counted_in, no_equal, not_needed, to_fields
from progrpo.imports.shared_rules import lora_to_train_further
from progrpo.messages import quoted

_NO_POLICY = {"bagel": "BAGEL"}
"""Models that have a script there and no policy here."""


def path(setting: Setting) -> Outcome:
    for part, model in _NO_POLICY.items():
        if part in last_part(setting.text()):
            raise ValueError(f"pretrained.model {quoted(setting.value)} is a {model}, which cannot be trained here")
    return to_fields({"model.path": setting.value})


def script_model(setting: Setting) -> Outcome:
    return Outcome("translated", "by the model's name; the settings that its script fixes are listed as script.*")


def _has_size(setting: Setting) -> bool:
    return "height" in setting.all and "width" in setting.all


def resolution(setting: Setting) -> Outcome:
    if _has_size(setting):
        return not_needed("its script for videos reads height and width")
    return to_fields({"model.resolution": setting.value})


def height(setting: Setting) -> Outcome:
    if not _has_size(setting):
        return no_equal("there is no width beside it; give --model.resolution HEIGHT WIDTH")
    return to_fields({"model.resolution": [setting.value, setting.all["width"]]})


def width(setting: Setting) -> Outcome:
    if not _has_size(setting):
        return no_equal("there is no height beside it; give --model.resolution HEIGHT WIDTH")
    return counted_in("model.resolution")


def lora_path(setting: Setting) -> Outcome:
    if not setting.value:
        return not_needed("a fresh LoRA")
    return lora_to_train_further(setting) if setting.all.get("use_lora") else not_needed("all weights are trained")


def _changes_pictures(setting: Setting) -> bool:
    return kind_of(setting) in ("FLUX Kontext", "Qwen-Image-Edit")


def dataset(setting: Setting) -> Outcome:
    has_columns = _changes_pictures(setting) or setting.all.get("prompt_fn") == "geneval"
    folder, end = setting.text(), "_metadata.jsonl" if has_columns else ".txt"
    train, test = (str(Path(folder, name + end)) for name in ("train", "test"))
    return to_fields({"prompts.source": train, "eval.prompts": test})


def prompt_fn(setting: Setting) -> Outcome:
    if _changes_pictures(setting):
        return not_needed("its scripts for edits read train_metadata.jsonl, with the pictures to change")
    if setting.value in ("general_ocr", "geneval"):
        return Outcome("translated", "it chooses among the files in `dataset`")
    return no_equal("prompts come from a file here: its train.txt")
