"""The import of Flow-Factory's settings: a YAML file, as for its `ff-train`.

A setting that the file leaves out has Flow-Factory's own default, and is listed as such.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from progrpo.imports.files import flatten
from progrpo.imports.flow_factory.defaults import DEFAULTS, DEFAULTS_BY_TRAINER, OLDER_NAMES, OPTIMIZER
from progrpo.imports.flow_factory.rules import RULES
from progrpo.imports.translation import Translation, translate
from progrpo.imports.yaml_settings import read_yaml
from progrpo.messages import named, quoted

_SINGLE_PICTURES = "it learns from single pictures, and our sft from the winners of pairs (prompts.pairs)"


def import_flow_factory(path: str) -> Translation:
    """The configuration that a YAML file asks for, and the outcome of each setting.

    ValueError, one sentence, if the file cannot be read or the settings cannot be run.
    """
    file = Path(path)
    settings = {name: _as_number(value) for name, value in _read(file).items()}
    trainer = settings.get("train.trainer_type", "grpo")
    if isinstance(trainer, str):
        trainer = trainer.lower()  # as it looks them up
    if not isinstance(trainer, str) or trainer not in DEFAULTS_BY_TRAINER:
        reason = f": {_SINGLE_PICTURES}" if trainer == "sft" else ""
        raise ValueError(
            f"{named(file)}: train.trainer_type {quoted(trainer)} has no equal here{reason}; there are"
            f" {', '.join(DEFAULTS_BY_TRAINER)}"
        )
    optimizer = {f"optimizers[0].{name}": value for name, value in OPTIMIZER.items()}
    defaults = {**DEFAULTS, **DEFAULTS_BY_TRAINER[trainer], **optimizer}
    left_out = {name: value for name, value in defaults.items() if name not in settings}
    if "train.trainer_type" in settings:
        settings["train.trainer_type"] = trainer
    if str(settings.get("model.model_type")).lower() in ("wan2_t2v", "wan2_i2v"):
        left_out["scheduler.levels"] = "UniPC's"
    return translate(file, {**settings, **left_out}, RULES, defaults=left_out)


def _read(path: Path) -> dict[str, object]:
    """The settings of a file by their dotted names of today."""
    data = read_yaml(path)
    try:
        settings = flatten(_with_lists(data))
    except ValueError as error:
        raise ValueError(f"{named(path)} is no settings file: {error}") from None
    today = {_today(name, settings): value for name, value in settings.items()}
    return {re.sub(r"(rewards\[\d+\]\.weight)\.(.*)", r"\1[\2]", name): value for name, value in today.items()}


def _with_lists(original: Mapping[object, object]) -> dict[str, object]:
    """The data of a file with the lists of newer ones where older ones have one reward or data set."""
    data = {str(key): value for key, value in original.items()}
    for one, many in (("reward", "rewards"), ("rewards", "rewards"), ("eval_rewards", "eval_rewards")):
        if isinstance(data.get(one), dict):
            data[many] = [data.pop(one)]
    files = data.get("data")
    if isinstance(files, dict) and "dataset_dir" in files and "datasets" not in files:
        rest = {key: value for key, value in files.items() if key != "dataset_dir"}
        data["data"] = {"datasets": [{"dataset_dir": files["dataset_dir"]}], **rest}
    return data


def _today(name: str, settings: Mapping[str, object]) -> str:
    """The name that a setting of an older file has today; the same where the file also has the newer one."""
    newer = OLDER_NAMES.get(name, name.replace("train.eval_args.", "eval."))
    return name if newer in settings else newer


def _as_number(value: object) -> object:
    """The number that a text such as 1e-4 means, which YAML 1.1 reads as a text; any other value as it is."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d{1,20}(\.\d{0,20})?[eE][-+]?\d{1,3}", value):
        return float(value)
    return value
