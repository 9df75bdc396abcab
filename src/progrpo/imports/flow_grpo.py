"""The import of flow_grpo's settings: a function of a Python file, as in `--config config/grpo.py:pickscore_sd3`.

flow_grpo has a script for each kind of model. A script fixes in its code what the files do not say (the LoRA's size and
layers, the length of prompts, Wan's step), and leaves some of their settings unread. `Scripts` holds what it fixes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from progrpo.imports.python_settings import Reading, read_settings
from progrpo.imports.translation import (
    UNIPC_LEVELS,
    NearestReward,
    Outcome,
    Row,
    Rule,
    Setting,
    Translation,
    Unread,
    counted_in,
    flatten,
    group_outcome,
    ignored,
    lora_to_train_further,
    mixed_precision,
    no_equal,
    not_needed,
    only_at,
    part_of,
    reward_outcome,
    to_choice,
    to_field,
    to_fields,
    translate,
)
from progrpo.messages import named, quoted
from progrpo.recipes import flux_pickscore, sd35m_pickscore

Script = Literal["auto", "plain", "fast", "guard"]

REWARDS = {
    "pickscore": NearestReward("pickscore"),
    "imagereward": NearestReward("imagereward"),
    "aesthetic": NearestReward("aesthetic"),
    "hpsv2_score": NearestReward("hpsv2"),
    "ocr": NearestReward("ocr"),
    "geneval": NearestReward("geneval_flow_grpo"),
    "unifiedreward": NearestReward(
        "unifiedreward",
        difference="there pictures are first resized to 512 by 512, and an answer without a score counts as 0; ours"
        " asks the server in OPENAI_BASE_URL, or in the term's url",
    ),
    "deqa": NearestReward(
        "deqa",
        1 / 5,
        "theirs asks a server, which sees JPEGs; ours sees the pictures, and needs 17 GB of memory itself",
    ),
    "image_similarity": NearestReward(
        "clip_similarity", difference="ours first crops the source to the picture's shape, as FLUX.1 Kontext sees it"
    ),
    "jpeg_compressibility": NearestReward("jpeg_compressibility", 1 / 500),
    "jpeg_incompressibility": NearestReward("jpeg_incompressibility"),
    "clipscore": NearestReward(
        "clipscore",
        100 / 30 / 2.5,
        "theirs is 100 / 30 of the cosine with the prompt; ours puts 'A photo depicts ' before the prompt, and is never"
        " below 0",
    ),
}
_NOT_BUILT_IN = {
    "video_ocr": "the mean over every fourth frame that shows something of the text",
    "qwenvl": "Qwen2.5-VL-7B's mark of 1 to 5 for aesthetics, over 5; the prompt is not read",
}

_GPU_NAMES = ("gpu_number", "gpu_numbers", "gpu_num", "num_gpus", "n_gpus")
"""Names that functions of the files give the number of GPUs."""

_ALGORITHM = "train.algorithm"
_REPEATS = "sample.sample_time_per_prompt"
_OLDER_WINDOW = "sample.train_num_steps"
_ONLY_THESE = (
    "only GRPO and DPO are translated from flow_grpo, since the other settings mean something else under another"
    " algorithm"
)


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
_NO_POLICY = {"bagel": "BAGEL"}
"""Models that have a script there and no policy here."""
_NEVER = 1_000_000
"""The number of updates from which on flow_grpo's DPO updates its reference in no real run."""


def import_flow_grpo(config: str, gpus: int | None = None, script: Script = "auto") -> Translation:
    """The configuration that `FILE:FUNCTION` asks for, and the outcome of each setting.

    `gpus` is the number of GPUs if the file does not say it. `script` is the training script that reads the settings:
    `plain` (all steps are noisy and trained), `fast` (a window) or `guard` (GRPO-Guard's ratio). `auto` decides by the
    names and by whether the file sets a window. ValueError, one sentence, for a file that cannot be read or settings
    that cannot be run.
    """
    file, function = _file_and_function(config)
    reading = read_settings(file, function)
    try:
        settings = _bracketed(flatten(reading.settings))
    except ValueError as error:
        raise ValueError(f"{named(file)}: {error}") from None
    unread = {name: value for name, value in settings.items() if isinstance(value, Unread)}
    known = {name: value for name, value in settings.items() if name not in unread}
    if _ALGORITHM in unread:
        raise ValueError(
            f"{named(file)}: {_ALGORITHM} could not be read (line {unread[_ALGORITHM].line}); {_ONLY_THESE}"
        )
    if _ALGORITHM in known:  # first, since the others may mean something else under an algorithm that is refused
        known = {_ALGORITHM: known[_ALGORITHM], **known}
    known["gpu_number"] = gpus if gpus is not None else _num_gpus(reading, config)
    known["script"] = _script(file, function, reading) if script == "auto" else script
    known["script.model"] = _model_kind(known)
    known |= _fixed_by_scripts(known)
    rows = [Row(name, value.text, value.outcome) for name, value in unread.items()]
    rows += [Row("a statement", value.text, value.outcome) for value in reading.unread]
    return translate(file, known, RULES, rows)


def _file_and_function(config: str) -> tuple[Path, str]:
    head, colon, tail = config.rpartition(":")
    return (Path(head), tail) if colon and tail.isidentifier() else (Path(config), "")


def _bracketed(settings: Mapping[str, object]) -> dict[str, object]:
    """Write rewards, whose names are the user's, as `reward_fn[NAME]`."""
    return {f"reward_fn[{n[10:]}]" if n.startswith("reward_fn.") else n: value for n, value in settings.items()}


def _num_gpus(reading: Reading, config: str) -> object:
    for name in _GPU_NAMES:
        if name in reading.names and not isinstance(reading.names[name], Unread):
            return reading.names[name]
    raise ValueError(
        f"{named(config)} does not say on how many GPUs it runs, on which its numbers of batches depend; give --gpus"
    )


def _script(file: Path, function: str, reading: Reading) -> str:
    guard = "guard" in file.stem or "rationorm" in function or "guard" in function
    if guard or reading.settings.get("rationorm") is True:
        return "guard"
    windowed = reading.assigned & {"sample.sde_window_size", "sample.sde_type", _OLDER_WINDOW}
    return "fast" if windowed else "plain"


def _model_kind(settings: Mapping[str, object]) -> str:
    """The kind of model whose script it is, by the model's name; SD3 if the name says nothing."""
    name = _last_part(settings.get("pretrained.model", ""))
    if "frames" in settings or re.search(r"wan\W?[12]", name):
        return "Wan"
    if "qwen" in name:
        return "Qwen-Image-Edit" if "edit" in name else "Qwen-Image"
    if "flux" in name or "kontext" in name:
        return "FLUX Kontext" if "kontext" in name else "FLUX"
    return "SD3"


def _last_part(model: object) -> str:
    """The last part of a model's path or hub id, in small letters."""
    return str(model).lower().rstrip("/").rpartition("/")[2]


def _fixed_by_scripts(settings: Mapping[str, object]) -> dict[str, object]:
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
        **(_FIXED_FOR_DPO if str(settings.get(_ALGORITHM)).lower() == "dpo" else {}),
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


# --- rules ------------------------------------------------------------------------------------------------------------


def _kind(setting: Setting) -> str:
    return str(setting.all["script.model"])


def _is_flux(setting: Setting) -> bool:
    return _kind(setting).startswith("FLUX")


def _reads_windows(setting: Setting) -> bool:
    return setting.all["script"] == "fast" or SCRIPTS[_kind(setting)].reads_window


def _has_window(setting: Setting) -> bool:
    if _is_dpo(setting):
        return False
    size = setting.all.get("sample.sde_window_size")
    return _reads_windows(setting) and size != 0 and _OLDER_WINDOW not in setting.all


def _unless_wan(rule: Rule) -> Rule:
    """The rule, for a setting that the script for Wan does not read."""
    return lambda setting: (
        not_needed("its script for Wan does not read it") if _kind(setting) == "Wan" else rule(setting)
    )


def _is_dpo(setting: Setting) -> bool:
    return str(setting.all.get(_ALGORITHM)).lower() == "dpo"


def _only_grpo(rule: Rule) -> Rule:
    """The rule, for a setting that the script for DPO does not read."""
    return lambda setting: not_needed("its script for DPO does not read it") if _is_dpo(setting) else rule(setting)


def _algorithm(setting: Setting) -> Outcome:
    algorithm = str(setting.value).lower()
    if algorithm not in ("grpo", "dpo"):
        raise ValueError(f"{_ALGORITHM} {quoted(setting.value)} has no equal here: {_ONLY_THESE}")
    if algorithm == "grpo":
        return not_needed("the same here")
    fields = {"objective.name": "dpo", "objective.advantage": "group", "sampling.sde_window": "all"}
    return to_fields(fields, "pairs of equal weight, sampled with noise")


def _model(setting: Setting) -> Outcome:
    for part, model in _NO_POLICY.items():
        if part in _last_part(setting.text()):
            raise ValueError(f"pretrained.model {quoted(setting.value)} is a {model}, which cannot be trained here")
    return to_fields({"model.path": setting.value})


def _script_model(setting: Setting) -> Outcome:
    return Outcome("translated", "by the model's name; the settings that its script fixes are listed as script.*")


def _has_size(setting: Setting) -> bool:
    return "height" in setting.all and "width" in setting.all


def _resolution(setting: Setting) -> Outcome:
    if _has_size(setting):
        return not_needed("its script for videos reads height and width")
    return to_fields({"model.resolution": setting.value})


def _height(setting: Setting) -> Outcome:
    if not _has_size(setting):
        return no_equal("there is no width beside it; give --model.resolution HEIGHT WIDTH")
    return to_fields({"model.resolution": [setting.value, setting.all["width"]]})


def _width(setting: Setting) -> Outcome:
    if not _has_size(setting):
        return no_equal("there is no height beside it; give --model.resolution HEIGHT WIDTH")
    return counted_in("model.resolution")


def _script_kind(setting: Setting) -> Outcome:
    if _is_dpo(setting):
        return not_needed("there is one script for DPO")
    if setting.one_of({"plain": False, "fast": False, "guard": True}):
        return to_fields({"objective.grpo.ratio": "guard", "objective.grpo.step_weights": "inverse_h"})
    if setting.value == "fast":
        return Outcome("translated", "a window of noisy steps, and only these are trained: sampling.sde_window_*")
    return Outcome("translated", "every step is noisy, and all but the last are trained; --script names another")


def _guidance(setting: Setting) -> Outcome:
    fields: dict[str, object] = {"sampling.guidance_scale": setting.value}
    if _is_flux(setting):
        fields["sampling.embedded_guidance"] = True
    if not _reads_eval_guidance(setting) or "sample.eval_guidance_scale" not in setting.all:
        fields["eval.guidance_scale"] = setting.value
    return to_fields(fields)


def _reads_eval_guidance(setting: Setting) -> bool:
    return setting.all["script"] == "fast" and _kind(setting) in ("SD3", "FLUX")


def _eval_guidance(setting: Setting) -> Outcome:
    if _reads_eval_guidance(setting):
        return to_fields({"eval.guidance_scale": setting.value})
    return not_needed("its script evaluates with sample.guidance_scale")


def _cfg(setting: Setting) -> Outcome:
    if _is_dpo(setting):
        return not_needed("DPO trains without guidance in both")
    if setting.value is True or setting.number("sample.guidance_scale") <= 1 or _is_flux(setting):
        return not_needed("sampling and training have the same guidance here")
    return no_equal("sampling and training have the same guidance here, sampling.guidance_scale")


def _window_size(setting: Setting) -> Outcome:
    if not _has_window(setting):
        return not_needed("the script reads no window, or it is all steps")
    return to_fields(
        {"sampling.sde_window": "random", "sampling.sde_window_size": setting.value},
        "one window for all prompts of an iteration; there one for each batch",
    )


def _older_window(setting: Setting) -> Outcome:
    """The size of the window in an older fast script, which began anywhere in the grid's first half."""
    if not _reads_windows(setting):
        return not_needed("the script reads no window")
    size, steps = setting.count(), setting.count("sample.num_steps")
    return to_fields(
        {
            "sampling.sde_window": "random",
            "sampling.sde_window_size": size,
            "sampling.sde_window_end": min(steps // 2 + size, steps - 1),
        },
        "pictures of a batch share the steps before the window there; here each has its own",
    )


def _window_range(setting: Setting) -> Outcome:
    if not _has_window(setting):
        return not_needed("the script reads no window, or it is all steps")
    if not isinstance(setting.value, tuple | list) or len(setting.value) != 2:
        raise ValueError(f"sample.sde_window_range must be a pair of steps, not {setting.value!r}")
    first, end = setting.value
    last = setting.count("sample.num_steps") - 1
    if not isinstance(end, int) or first != 0:
        return no_equal("windows begin anywhere from the first step on here")
    if end > last:
        return to_fields({"sampling.sde_window_end": last}, "the last step is nearly deterministic and never trained")
    return to_fields({"sampling.sde_window_end": end})


def _timestep_fraction(setting: Setting) -> Outcome:
    if _is_dpo(setting):
        draws = max(1, int(setting.count("sample.num_steps") * setting.number()))
        return to_fields({"objective.dpo.draws": draws}, "steps times the fraction")
    if _reads_windows(setting):
        return not_needed("the window says which steps are trained")
    steps = setting.count("sample.num_steps")
    trained = int(steps * setting.number())
    if trained >= steps:
        return to_fields(
            {"sampling.train_last_step": True},
            "the last step is nearly deterministic and its log-prob overflows; better false",
        )
    all_but_last = "all steps but the last are trained"
    return not_needed(all_but_last) if trained == steps - 1 else no_equal(all_but_last)


def _count_or_one(setting: Setting, name: str) -> int:
    """The number of a setting that few files have; 1 without it."""
    return setting.count(name) if name in setting.all else 1


def _rows_per_batch(setting: Setting) -> int:
    """The pictures of a GPU's network call. An older script sets prompts there, and the pictures of each elsewhere."""
    return setting.count("sample.train_batch_size") * _count_or_one(setting, "sample.mini_num_image_per_prompt")


def _batches(setting: Setting) -> Outcome:
    pictures = setting.count("gpu_number") * _rows_per_batch(setting) * setting.count()
    prompts, rest = divmod(pictures, setting.count("sample.num_image_per_prompt"))
    repeats = _count_or_one(setting, _REPEATS)
    note = f"of {pictures * repeats} pictures" + (", rounded down" if rest else "")
    return to_fields({"prompts.per_iteration": max(1, prompts)}, note)


def _batches_trained(setting: Setting) -> int:
    return setting.count("sample.num_batches_per_epoch") * _count_or_one(setting, _REPEATS)


def _updates(setting: Setting) -> int:
    return max(1, _batches_trained(setting) // setting.count("train.gradient_accumulation_steps"))


def _group_size(setting: Setting) -> Outcome:
    size = setting.count() * _count_or_one(setting, _REPEATS)
    return group_outcome(size, _is_dpo(setting), "plain GRPO; --plan.preset standard prunes")


def _accumulation(setting: Setting) -> Outcome:
    return to_fields({"optim.updates_per_rollout": _updates(setting)}, "batches of an epoch divided by it")


def _lora_path(setting: Setting) -> Outcome:
    if not setting.value:
        return not_needed("a fresh LoRA")
    return lora_to_train_further(setting) if setting.all.get("use_lora") else not_needed("all weights are trained")


def _ema(setting: Setting) -> Outcome:
    if not setting.value:
        return to_fields({"optim.ema_decay": 0.0})
    if _kind(setting).startswith("Qwen-Image"):
        return no_equal("its script for Qwen-Image keeps no average, and fails at it; none is kept here")
    if _is_dpo(setting):
        return to_fields({"optim.ema_decay": round(0.9 ** (_updates(setting) / 8), 4)}, "0.9 there every eighth update")
    # it takes a tenth at each batch from every eighth update to the next; ours is updated once per iteration
    decay = round(0.9 ** (_batches_trained(setting) / 8), 4)
    return to_fields({"optim.ema_decay": decay}, "0.9 there at each batch of every eighth update")


def _reference_updates(setting: Setting) -> Outcome:
    if not _is_dpo(setting):
        return not_needed("only its script for DPO reads it")
    why = "the reference stays the model at its start"
    return not_needed(why) if setting.number() >= _NEVER else no_equal(why)


def _beta(setting: Setting) -> Outcome:
    if _is_dpo(setting):
        return to_fields({"objective.dpo.beta": setting.number() / 2}, "its loss halves it")
    fields: dict[str, object] = {"objective.grpo.kl_beta": setting.value}
    note = ""
    if setting.number() > 0 and setting.all.get("sample.sde_type") == "cps":
        note = "CPS's std is the step's, so its form is the exact one"
    elif setting.number() > 0 and _kind(setting) == "Wan":
        fields["objective.grpo.kl_form"] = "exact"
    elif setting.number() > 0:
        fields["objective.grpo.kl_form"] = "flow_grpo"
    return to_fields(fields, note)


def _changes_pictures(setting: Setting) -> bool:
    return _kind(setting) in ("FLUX Kontext", "Qwen-Image-Edit")


def _dataset(setting: Setting) -> Outcome:
    has_columns = _changes_pictures(setting) or setting.all.get("prompt_fn") == "geneval"
    folder, end = setting.text(), "_metadata.jsonl" if has_columns else ".txt"
    train, test = (str(Path(folder, name + end)) for name in ("train", "test"))
    return to_fields({"prompts.source": train, "eval.prompts": test})


def _prompt_fn(setting: Setting) -> Outcome:
    if _changes_pictures(setting):
        return not_needed("its scripts for edits read train_metadata.jsonl, with the pictures to change")
    if setting.value in ("general_ocr", "geneval"):
        return Outcome("translated", "it chooses among the files in `dataset`")
    return no_equal("prompts come from a file here: its train.txt")


def _reward(setting: Setting) -> Outcome:
    name = setting.name[len("reward_fn[") : -1]
    index = [other for other in setting.all if other.startswith("reward_fn[")].index(setting.name)
    nearest = REWARDS.get(name)
    own = nearest.name if nearest else f"my_rewards:{name if name.isidentifier() else 'reward'}"
    return reward_outcome(f"reward.terms[{index}]", own, nearest, setting.number(), _NOT_BUILT_IN.get(name, ""))


def _advantage_std(setting: Setting) -> Outcome:
    if _is_dpo(setting):
        return not_needed("all pairs have equal weight")
    advantage = "batch" if setting.value else "group"
    return to_fields({"objective.advantage": advantage}, "the std of all pictures, or of each group")


def _betas(setting: Setting) -> Outcome:
    return to_fields({"optim.betas": [setting.number(), setting.number("train.adam_beta2")]})


_UNUSED = "the training scripts do not read it"
_RUN_FOLDER = "progrpo train --out names the run's folder"
_BAGEL = "only the script for BAGEL reads it"

RULES: dict[str, Rule] = {
    "script": _script_kind,
    "gpu_number": part_of("prompts.per_iteration"),
    "script.model": _script_model,
    "script.sampler": to_field("sampling.sampler", "a rate of sigma_1 sigma; sample.noise_level is not read"),
    "script.levels": lambda setting: no_equal(UNIPC_LEVELS),
    "script.activation_checkpointing": to_field("model.activation_checkpointing"),
    "script.lora_rank": to_field("model.lora_rank"),
    "script.lora_alpha": to_field("model.lora_alpha"),
    "script.lora_targets": to_field("model.lora_targets"),
    "script.max_sequence_length": to_field("model.max_sequence_length"),
    "script.source_size": lambda setting: no_equal(
        "a source is cropped to the sampled size here, and a line brings one, `image`"
    ),
    "script.sampling_policy": lambda setting: no_equal("pictures are sampled from the current weights here"),
    "script.noise_levels": lambda setting: no_equal(
        "noise levels are drawn evenly from the sampling grid here, with the model's own shift"
    ),
    "script.eval_prompts": lambda setting: no_equal("eval.pictures says how many pictures are sampled; 512"),
    "pretrained.model": _model,
    "pretrained.revision": ignored(_UNUSED),
    "use_lora": lambda setting: to_fields({"model.weights": "lora" if setting.value else "full"}),
    "resolution": _resolution,
    "height": _height,
    "width": _width,
    "frames": to_field("model.frames"),
    "mixed_precision": mixed_precision,
    "activation_checkpointing": _unless_wan(to_field("model.activation_checkpointing")),
    "fsdp_optimizer_offload": only_at(False, why="off", otherwise="the optimizer stays on the device"),
    "allow_tf32": ignored("a setting of torch's arithmetic"),
    "seed": to_field("seed"),
    "num_epochs": to_field("iterations", "there a run is meant to be stopped by hand"),
    "save_freq": to_field("checkpoint.every"),
    "num_checkpoint_limit": to_field("checkpoint.keep"),
    "eval_freq": to_field("eval.every"),
    "run_name": ignored(_RUN_FOLDER),
    "run_project": ignored(_RUN_FOLDER),
    "rationorm": part_of("script"),
    "train_attribute": only_at(None, why="the whole file", otherwise="the whole file is used; cut it"),
    "logdir": ignored(_RUN_FOLDER),
    "save_dir": ignored(_RUN_FOLDER),
    "debug": ignored(_UNUSED),
    "resume_from": only_at(
        None, "", why="nothing to resume", otherwise="progrpo train --resume resumes its own runs only"
    ),
    "dataset": _dataset,
    "prompt_fn": _prompt_fn,
    "prompt_fn_kwargs": ignored(_UNUSED),
    "reward_fn": lambda setting: no_equal("it is empty, or cannot be read"),
    "reward_fn[]": _reward,
    "per_prompt_stat_tracking": only_at(
        True, why="advantages use each group's own mean", otherwise="advantages use each group's own mean"
    ),
    "sample.num_steps": to_field("sampling.num_inference_steps"),
    "sample.eval_num_steps": to_field("eval.num_inference_steps"),
    "sample.guidance_scale": _guidance,
    "sample.eval_guidance_scale": _eval_guidance,
    "sample.train_batch_size": lambda setting: to_fields({"sampling.microbatch": _rows_per_batch(setting)}),
    "sample.mini_num_image_per_prompt": part_of("prompts.per_iteration"),
    "sample.num_image_per_prompt": _group_size,
    _REPEATS: part_of("plan.group_size"),
    _OLDER_WINDOW: _older_window,
    "sample.num_batches_per_epoch": _batches,
    "sample.test_batch_size": ignored("evaluations use sampling.microbatch"),
    "sample.batch_size": ignored(_UNUSED),
    "sample.global_std": _advantage_std,
    "sample.noise_level": _unless_wan(to_field("sampling.noise_level")),
    "sample.same_latent": _unless_wan(to_field("sampling.same_latent")),
    "sample.sde_type": _unless_wan(to_choice("sampling.sampler", {"sde": "flow_grpo", "cps": "cps_reduced"})),
    "sample.sde_window_size": _window_size,
    "sample.sde_window_range": _window_range,
    "sample.kl_reward": only_at(
        0,
        why="off",
        otherwise="the distance to the reference is in the loss (objective.grpo.kl_beta), not in the reward",
    ),
    _ALGORITHM: _algorithm,
    "train.batch_size": to_field("optim.microbatch"),
    "train.gradient_accumulation_steps": _accumulation,
    "train.num_inner_epochs": only_at(
        1, why="each picture is trained on once", otherwise="each picture is trained on once"
    ),
    "train.use_8bit_adam": lambda setting: to_fields({"optim.name": "adamw_8bit" if setting.value else "adamw"}),
    "train.learning_rate": to_field("optim.lr"),
    "train.adam_beta1": _betas,
    "train.adam_beta2": part_of("optim.betas"),
    "train.adam_weight_decay": to_field("optim.weight_decay"),
    "train.adam_epsilon": only_at(1e-8, why="the same here", otherwise="1e-8 here"),
    "train.max_grad_norm": to_field("optim.max_grad_norm"),
    "train.cfg": _cfg,
    "train.adv_clip_max": _only_grpo(to_field("objective.grpo.adv_clip_max")),
    "train.clip_range": _only_grpo(to_field("objective.grpo.clip_range")),
    "train.ref_update_step": _reference_updates,
    "train.highclip_range": lambda setting: (
        not_needed("both sides are clipped alike")
        if setting.value == setting.all.get("train.clip_range")
        else no_equal("both sides are clipped alike here, by train.clip_range")
    ),
    "train.clip_range_lt": ignored(_BAGEL),
    "train.clip_range_gt": ignored(_BAGEL),
    "train.timestep_shift": ignored(_BAGEL),
    "train.timestep_fraction": _timestep_fraction,
    "train.beta": _beta,
    "train.lora_path": _lora_path,
    "train.ema": _ema,
    "train.sft": only_at(0, why="off", otherwise="there is no supervised loss here"),
    "train.sft_batch_size": ignored("only for the supervised loss"),
    "diffusion_loss": ignored(_UNUSED),
}
