"""flow_grpo's settings: a function of a Python file, as its scripts take it with `--config config/grpo.py:pickscore_sd3`.

It has a script for each kind of models, which fixes in its code what the files do not say (the adapter's size and places, the length of
prompts, Wan's step) and leaves some of their settings unread: `Scripts` says what.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from progrpo.imports.account import (
    UNIPC_LEVELS,
    Near,
    Outcome,
    Row,
    Rule,
    Setting,
    Translation,
    choice,
    continued_lora,
    counted_in,
    flattened,
    ignored,
    no_equal,
    not_needed,
    only,
    precision,
    reward_outcome,
    sets,
    to,
    translate,
    translated,
)
from progrpo.imports.python_settings import Reading, Unread, read_settings
from progrpo.messages import named, quoted
from progrpo.recipes import flux_pickscore, sd35m_pickscore

Script = Literal["auto", "plain", "fast", "guard"]

REWARDS = {
    "pickscore": Near("pickscore"),
    "imagereward": Near("imagereward"),
    "aesthetic": Near("aesthetic"),
    "hpsv2_score": Near("hpsv2"),
    "ocr": Near("ocr"),
    "geneval": Near("geneval_flow_grpo"),
    "jpeg_compressibility": Near("jpeg_compressibility", 1 / 500),
    "jpeg_incompressibility": Near("jpeg_incompressibility"),
    "clipscore": Near(
        "clipscore",
        100 / 30 / 2.5,
        "theirs is 100 / 30 of the cosine with the prompt; ours puts 'A photo depicts ' before it, and is never below 0",
    ),
}
_NOT_BUILT_IN = {
    "video_ocr": "the mean over every fourth frame that shows something of the text",
    "deqa": "DeQA's quality of the picture, from a server",
    "qwenvl": "Qwen2.5-VL-7B's mark of 1 to 5 for aesthetics, over 5; the prompt is not read",
    "unifiedreward": "UnifiedReward-7B's mark of 1 to 5, over 5, from a server",
    "image_similarity": "the cosine of CLIP ViT-L/14's features of the picture and of its source",
}

_GPUS = (
    "gpu_number",
    "gpu_numbers",
    "gpu_num",
    "num_gpus",
    "n_gpus",
)  # names that its functions give the number of GPUs

_ALGORITHM = "train.algorithm"
_AGAIN = "sample.sample_time_per_prompt"
_OLDER_WINDOW = "sample.train_num_steps"
_GRPO_ALONE = (
    "only GRPO is translated from flow_grpo, since the other settings mean something else under another algorithm"
)


@dataclass(frozen=True)
class Scripts:
    """What flow_grpo's scripts for one kind of models fix in their code; `windows`: they read a window of noisy steps, fast or not."""

    lora_rank: int
    lora_alpha: int
    lora_targets: tuple[str, ...]
    max_sequence_length: int
    windows: bool = False


_SD3, _FLUX = sd35m_pickscore().model, flux_pickscore().model
_MLP = tuple(f"{stream}_mlp.{name}" for stream in ("img", "txt") for name in ("net.0.proj", "net.2"))
SCRIPTS = {
    "SD3": Scripts(32, 64, _SD3.lora_targets, 128),
    "FLUX": Scripts(64, 128, _FLUX.lora_targets, 128),
    "FLUX Kontext": Scripts(64, 128, (*_FLUX.lora_targets, "proj_mlp"), 128),
    "Qwen-Image": Scripts(64, 128, (*_SD3.lora_targets, *_MLP), 512, windows=True),
    # of its names those that a model of text to video has
    "Wan": Scripts(32, 64, ("to_k", "to_out.0", "to_q", "to_v"), 512),
}
_NO_POLICY = {
    "bagel": "BAGEL",
    "qwen-image-edit": "Qwen-Image-Edit",
}  # which it has scripts for, and we no policy


def import_flow_grpo(config: str, gpus: int | None = None, script: Script = "auto") -> Translation:
    """The configuration that `FILE:FUNCTION` asks for, and what became of each setting.

    `gpus`: on how many it runs, where the file does not say. `script`: which of its training scripts reads the settings, since they
    differ: `plain` (all steps are noisy and trained), `fast` (a window), `guard` (GRPO-Guard's ratio); `auto` tells from the names and
    from whether the file sets a window. ValueError, one sentence, on a file that cannot be read or settings that cannot be run.
    """
    file, function = _file_and_function(config)
    reading = read_settings(file, function)
    try:
        settings = _bracketed(flattened(reading.settings))
    except ValueError as error:
        raise ValueError(f"{named(file)}: {error}") from None
    unread = {name: value for name, value in settings.items() if isinstance(value, Unread)}
    known = {name: value for name, value in settings.items() if name not in unread}
    if _ALGORITHM in unread:
        raise ValueError(
            f"{named(file)}: {_ALGORITHM} could not be read (line {unread[_ALGORITHM].line}); {_GRPO_ALONE}"
        )
    known["gpu_number"] = gpus if gpus is not None else _gpus(reading, config)
    known["script"] = _script(file, function, reading) if script == "auto" else script
    known["script.model"] = _model_kind(known)
    known |= _fixed_by_scripts(known)
    rows = [Row(name, value.text, _unread(value)) for name, value in unread.items()]
    rows += [Row("a statement", value.text, _unread(value)) for value in reading.unread]
    return translate(file, known, RULES, rows)


def _file_and_function(config: str) -> tuple[Path, str]:
    head, colon, tail = config.rpartition(":")
    return (Path(head), tail) if colon and tail.isidentifier() else (Path(config), "")


def _unread(value: Unread) -> Outcome:
    return Outcome("could not be read", f"{value.file}, line {value.line}; what is not set stays at our default")


def _bracketed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rewards, whose names are the user's, as `reward_fn[NAME]`."""
    return {f"reward_fn[{n[10:]}]" if n.startswith("reward_fn.") else n: value for n, value in settings.items()}


def _gpus(reading: Reading, config: str) -> Any:
    for name in _GPUS:
        if name in reading.names and not isinstance(reading.names[name], Unread):
            return reading.names[name]
    raise ValueError(
        f"{named(config)} does not say on how many GPUs it runs, which its batches are counted by; give --gpus"
    )


def _script(file: Path, function: str, reading: Reading) -> str:
    guard = "guard" in file.stem or "rationorm" in function or "guard" in function
    if guard or reading.settings.get("rationorm") is True:
        return "guard"
    windowed = reading.assigned & {"sample.sde_window_size", "sample.sde_type", _OLDER_WINDOW}
    return "fast" if windowed else "plain"


def _model_kind(settings: Mapping[str, Any]) -> str:
    """Whose script it is, by the model's name; SD3's where that tells nothing."""
    name = _last_part(settings.get("pretrained.model", ""))
    if "frames" in settings or re.search(r"wan\W?[12]", name):
        return "Wan"
    if "qwen" in name:
        return "Qwen-Image"
    if "flux" in name or "kontext" in name:
        return "FLUX Kontext" if "kontext" in name else "FLUX"
    return "SD3"


def _last_part(model: Any) -> str:
    """The last part of a model's path or hub id, in small letters."""
    return str(model).lower().rstrip("/").rpartition("/")[2]


def _fixed_by_scripts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What its scripts for a model of this kind write out themselves."""
    scripts = SCRIPTS[settings["script.model"]]
    lora = {
        "script.lora_rank": scripts.lora_rank,
        "script.lora_alpha": scripts.lora_alpha,
        "script.lora_targets": list(scripts.lora_targets),
    }
    return {
        **(lora if settings.get("use_lora") else {}),
        "script.max_sequence_length": scripts.max_sequence_length,
        "script.eval_prompts": "all of the test file",
        **(_WANS if settings["script.model"] == "Wan" else {}),
    }


_WANS = {
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
    return setting.all["script"] == "fast" or SCRIPTS[_kind(setting)].windows


def _has_window(setting: Setting) -> bool:
    size = setting.all.get("sample.sde_window_size")
    return _reads_windows(setting) and size != 0 and _OLDER_WINDOW not in setting.all


def _unread_for_wan(rule: Rule) -> Rule:
    return lambda setting: (
        not_needed("its script for Wan does not read it") if _kind(setting) == "Wan" else rule(setting)
    )


def _algorithm(setting: Setting) -> Outcome:
    if str(setting.value).lower() != "grpo":
        raise ValueError(f"{_ALGORITHM} {quoted(setting.value)} has no equal here: {_GRPO_ALONE}")
    return not_needed("the same here")


def _model(setting: Setting) -> Outcome:
    for part, model in _NO_POLICY.items():
        if part in _last_part(setting.text()):
            raise ValueError(f"pretrained.model {quoted(setting.value)} is a {model}, which cannot be trained here")
    return sets({"model.path": setting.value})


def _scripts(setting: Setting) -> Outcome:
    return Outcome("translated", "as its name tells; what that kind's script fixes stands under script.*")


def _has_size(setting: Setting) -> bool:
    return "height" in setting.all and "width" in setting.all


def _resolution(setting: Setting) -> Outcome:
    if _has_size(setting):
        return not_needed("its script for videos reads height and width")
    return sets({"model.resolution": setting.value})


def _height(setting: Setting) -> Outcome:
    if not _has_size(setting):
        return no_equal("there is no width beside it; give --model.resolution HEIGHT WIDTH")
    return sets({"model.resolution": [setting.value, setting.all["width"]]})


def _width(setting: Setting) -> Outcome:
    if not _has_size(setting):
        return no_equal("there is no height beside it; give --model.resolution HEIGHT WIDTH")
    return Outcome("translated", "counted in model.resolution")


def _of_script(setting: Setting) -> Outcome:
    if setting.one_of({"plain": False, "fast": False, "guard": True}):
        return translated(objective__grpo__ratio="guard", objective__grpo__step_weights="inverse_h")
    if setting.value == "fast":
        return Outcome(
            "translated", "a window of noisy steps, which alone are trained; sampling.sde_window_* are from it"
        )
    return Outcome(
        "translated", "every step is noisy, and all but the last are trained, as here; --script says another"
    )


def _guidance(setting: Setting) -> Outcome:
    fields = {"sampling.guidance_scale": setting.value}
    if _is_flux(setting):
        fields["sampling.embedded_guidance"] = True
    if not _reads_eval_guidance(setting) or "sample.eval_guidance_scale" not in setting.all:
        fields["eval.guidance_scale"] = setting.value
    return sets(fields)


def _reads_eval_guidance(setting: Setting) -> bool:
    return setting.all["script"] == "fast" and _kind(setting) in ("SD3", "FLUX")


def _eval_guidance(setting: Setting) -> Outcome:
    if _reads_eval_guidance(setting):
        return sets({"eval.guidance_scale": setting.value})
    return not_needed("its script evaluates with sample.guidance_scale")


def _cfg(setting: Setting) -> Outcome:
    if setting.value is True or setting.number("sample.guidance_scale") <= 1 or _is_flux(setting):
        return not_needed("what is sampled and what is trained have the same guidance here")
    return no_equal("what is sampled and what is trained have the same guidance here, sampling.guidance_scale")


def _window_size(setting: Setting) -> Outcome:
    if not _has_window(setting):
        return not_needed("the script reads no window, or it is all steps")
    return translated(
        sampling__sde_window="random",
        sampling__sde_window_size=setting.value,
        note="one window for all prompts of an iteration; there one for each batch",
    )


def _older_window(setting: Setting) -> Outcome:
    """The size of the window in an older fast script, which began anywhere in the grid's first half."""
    if not _reads_windows(setting):
        return not_needed("the script reads no window")
    size, steps = setting.count(), setting.count("sample.num_steps")
    return translated(
        sampling__sde_window="random",
        sampling__sde_window_size=size,
        sampling__sde_window_end=min(steps // 2 + size, steps - 1),
        note="pictures of a batch share the steps before the window there; here each has its own",
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
        return sets({"sampling.sde_window_end": last}, "the last step is nearly deterministic and never trained")
    return sets({"sampling.sde_window_end": end})


def _timestep_fraction(setting: Setting) -> Outcome:
    if _reads_windows(setting):
        return not_needed("the window says which steps are trained")
    steps = setting.count("sample.num_steps")
    trained = int(steps * setting.number())
    if trained >= steps:
        return translated(
            sampling__train_last_step=True, note="its nearly deterministic step makes log-probs overflow; better false"
        )
    return (
        not_needed("all but the last are trained") if trained == steps - 1 else no_equal("all but the last are trained")
    )


def _times(setting: Setting, name: str) -> int:
    """How often, by a setting that few files have."""
    return setting.count(name) if name in setting.all else 1


def _rows_a_batch(setting: Setting) -> int:
    """Pictures of a GPU's network call; an older script has prompts there, and pictures of each beside it."""
    return setting.count("sample.train_batch_size") * _times(setting, "sample.mini_num_image_per_prompt")


def _batches(setting: Setting) -> Outcome:
    pictures = setting.count("gpu_number") * _rows_a_batch(setting) * setting.count()
    prompts, rest = divmod(pictures, setting.count("sample.num_image_per_prompt"))
    again = _times(setting, _AGAIN)
    note = f"of {pictures * again} pictures" + (", rounded down" if rest else "")
    return sets({"prompts.per_iteration": max(1, prompts)}, note)


def _batches_trained(setting: Setting) -> int:
    return setting.count("sample.num_batches_per_epoch") * _times(setting, _AGAIN)


def _updates(setting: Setting) -> int:
    return max(1, _batches_trained(setting) // setting.count("train.gradient_accumulation_steps"))


def _group_size(setting: Setting) -> Outcome:
    size = setting.count() * _times(setting, _AGAIN)
    return translated(plan__preset="custom", plan__group_size=size, note="plain GRPO; --plan.preset standard prunes")


def _accumulation(setting: Setting) -> Outcome:
    return sets({"optim.updates_per_rollout": _updates(setting)}, "batches of an epoch over it")


def _lora_path(setting: Setting) -> Outcome:
    if not setting.value:
        return not_needed("adapters begin anew")
    return continued_lora(setting) if setting.all.get("use_lora") else not_needed("all weights are trained")


def _ema(setting: Setting) -> Outcome:
    if not setting.value:
        return sets({"optim.ema_decay": 0.0})
    if _kind(setting) == "Qwen-Image":
        return no_equal("its script for Qwen-Image keeps no average, and fails at it; none is kept here")
    # after every eighth update each batch until the next takes a tenth again; ours is renewed once an iteration
    decay = round(0.9 ** (_batches_trained(setting) / 8), 4)
    return sets({"optim.ema_decay": decay}, "0.9 there at each batch of every eighth update")


def _beta(setting: Setting) -> Outcome:
    fields: dict[str, Any] = {"objective.grpo.kl_beta": setting.value}
    note = ""
    if setting.number() > 0 and setting.all.get("sample.sde_type") == "cps":
        note = "CPS's std is the step's, so its form is the exact one"
    elif setting.number() > 0 and _kind(setting) == "Wan":
        fields["objective.grpo.kl_form"] = "exact"
    elif setting.number() > 0:
        fields["objective.grpo.kl_form"] = "flow_grpo"
    return sets(fields, note)


def _dataset(setting: Setting) -> Outcome:
    has_columns = _kind(setting) == "FLUX Kontext" or setting.all.get("prompt_fn") == "geneval"
    folder, end = setting.text(), "_metadata.jsonl" if has_columns else ".txt"
    train, test = (str(Path(folder, name + end)) for name in ("train", "test"))
    return sets({"prompts.source": train, "eval.prompts": test})


def _prompt_fn(setting: Setting) -> Outcome:
    if _kind(setting) == "FLUX Kontext":
        return not_needed("its script for Kontext reads train_metadata.jsonl, with the pictures to change")
    if setting.value in ("general_ocr", "geneval"):
        return Outcome("translated", "which of the files in `dataset`")
    return no_equal("prompts come from a file; its train.txt is taken")


def _reward(setting: Setting) -> Outcome:
    name = setting.name[len("reward_fn[") : -1]
    place = [other for other in setting.all if other.startswith("reward_fn[")].index(setting.name)
    near = REWARDS.get(name)
    own = near.name if near else f"my_rewards:{name if name.isidentifier() else 'reward'}"
    return reward_outcome(f"reward.terms[{place}]", own, near, setting.number(), _NOT_BUILT_IN.get(name, ""))


def _statistics(setting: Setting) -> Outcome:
    return sets({"objective.advantage": "batch" if setting.value else "group"}, "std of all pictures, or of each group")


_STALE = "not read by the training scripts"
_PLACE = "progrpo train --out says where a run is kept"
_BAGEL = "read by the script for BAGEL alone"

RULES: dict[str, Rule] = {
    "script": _of_script,
    "gpu_number": counted_in("prompts.per_iteration"),
    "script.model": _scripts,
    "script.sampler": to("sampling.sampler", "a rate of sigma_1 sigma, whatever sample.noise_level says"),
    "script.levels": lambda setting: no_equal(UNIPC_LEVELS),
    "script.activation_checkpointing": to("model.activation_checkpointing"),
    "script.lora_rank": to("model.lora_rank"),
    "script.lora_alpha": to("model.lora_alpha"),
    "script.lora_targets": to("model.lora_targets"),
    "script.max_sequence_length": to("model.max_sequence_length"),
    "script.eval_prompts": lambda setting: no_equal("eval.pictures says how many are drawn; 512"),
    "pretrained.model": _model,
    "pretrained.revision": ignored(_STALE),
    "use_lora": lambda setting: sets({"model.weights": "lora" if setting.value else "full"}),
    "resolution": _resolution,
    "height": _height,
    "width": _width,
    "frames": to("model.frames"),
    "mixed_precision": precision,
    "activation_checkpointing": _unread_for_wan(to("model.activation_checkpointing")),
    "fsdp_optimizer_offload": only(False, why="off", otherwise="the optimizer stays on the device"),
    "allow_tf32": ignored("torch's own setting; arithmetic alone"),
    "seed": to("seed"),
    "num_epochs": to("iterations", "it is meant to be stopped by hand"),
    "save_freq": to("checkpoint.every"),
    "num_checkpoint_limit": to("checkpoint.keep"),
    "eval_freq": to("eval.every"),
    "run_name": ignored(_PLACE),
    "run_project": ignored(_PLACE),
    "rationorm": counted_in("script"),
    "train_attribute": only(None, why="the whole file", otherwise="the whole file is used; cut it"),
    "logdir": ignored(_PLACE),
    "save_dir": ignored(_PLACE),
    "debug": ignored(_STALE),
    "resume_from": only(
        None, "", why="nothing to resume", otherwise="progrpo train --resume goes on with runs of its own"
    ),
    "dataset": _dataset,
    "prompt_fn": _prompt_fn,
    "prompt_fn_kwargs": ignored(_STALE),
    "reward_fn": lambda setting: no_equal("it is empty, or cannot be read"),
    "reward_fn[]": _reward,
    "per_prompt_stat_tracking": only(
        True, why="groups have a mean of their own", otherwise="advantages are around each group's own mean"
    ),
    "sample.num_steps": to("sampling.num_inference_steps"),
    "sample.eval_num_steps": to("eval.num_inference_steps"),
    "sample.guidance_scale": _guidance,
    "sample.eval_guidance_scale": _eval_guidance,
    "sample.train_batch_size": lambda setting: sets({"sampling.microbatch": _rows_a_batch(setting)}),
    "sample.mini_num_image_per_prompt": counted_in("prompts.per_iteration"),
    "sample.num_image_per_prompt": _group_size,
    _AGAIN: counted_in("plan.group_size"),
    _OLDER_WINDOW: _older_window,
    "sample.num_batches_per_epoch": _batches,
    "sample.test_batch_size": ignored("evaluations take sampling.microbatch"),
    "sample.batch_size": ignored(_STALE),
    "sample.global_std": _statistics,
    "sample.noise_level": _unread_for_wan(to("sampling.noise_level")),
    "sample.same_latent": _unread_for_wan(to("sampling.same_latent")),
    "sample.sde_type": _unread_for_wan(choice("sampling.sampler", {"sde": "flow_grpo", "cps": "cps_reduced"})),
    "sample.sde_window_size": _window_size,
    "sample.sde_window_range": _window_range,
    "sample.kl_reward": only(
        0,
        why="off",
        otherwise="the distance to the reference is in the loss (objective.grpo.kl_beta), not in the reward",
    ),
    _ALGORITHM: _algorithm,
    "train.batch_size": to("optim.microbatch"),
    "train.gradient_accumulation_steps": _accumulation,
    "train.num_inner_epochs": only(
        1, why="each picture is trained on once", otherwise="each picture is trained on once"
    ),
    "train.use_8bit_adam": lambda setting: sets({"optim.name": "adamw_8bit" if setting.value else "adamw"}),
    "train.learning_rate": to("optim.lr"),
    "train.adam_beta1": lambda setting: sets({"optim.betas": [setting.number(), setting.number("train.adam_beta2")]}),
    "train.adam_beta2": counted_in("optim.betas"),
    "train.adam_weight_decay": to("optim.weight_decay"),
    "train.adam_epsilon": only(1e-8, why="the same here", otherwise="1e-8 here"),
    "train.max_grad_norm": to("optim.max_grad_norm"),
    "train.cfg": _cfg,
    "train.adv_clip_max": to("objective.grpo.adv_clip_max"),
    "train.clip_range": to("objective.grpo.clip_range"),
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
    "train.sft": only(0, why="off", otherwise="no supervised loss beside the reward's"),
    "train.sft_batch_size": ignored("of the supervised loss alone"),
    "diffusion_loss": ignored(_STALE),
}
