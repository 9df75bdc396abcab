"""flow_grpo's settings: a function of a Python file, as its scripts take it with `--config config/grpo.py:pickscore_sd3`.

What its scripts fix and its files do not say (the adapter's size and places, the length of prompts) is taken from our recipes with its
published settings (Flow-GRPO, arXiv 2505.05470).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from progrpo.imports.account import (
    Outcome,
    Row,
    Rule,
    Setting,
    Translation,
    choice,
    counted_in,
    flattened,
    ignored,
    no_equal,
    not_needed,
    only,
    precision,
    sets,
    to,
    translate,
    translated,
)
from progrpo.imports.python_settings import Reading, Unread, read_settings
from progrpo.recipes import flux_pickscore, sd35m_pickscore
from progrpo.words import named

Script = Literal["auto", "plain", "fast", "guard"]

REWARDS = (
    "pickscore",
    "ocr",
    "geneval",
    "clipscore",
    "imagereward",
    "aesthetic",
    "jpeg_compressibility",
    "jpeg_incompressibility",
)  # which have the same names here

_GPUS = (
    "gpu_number",
    "gpu_numbers",
    "gpu_num",
    "num_gpus",
    "n_gpus",
)  # names that its functions give the number of GPUs


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
    known["gpu_number"] = gpus if gpus is not None else _gpus(reading, config)
    known["script"] = _script(file, function, reading) if script == "auto" else script
    for name, value in _fixed_by_scripts(known).items():
        known.setdefault(name, value)
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
    if "guard" in file.stem or "rationorm" in function or "guard" in function:
        return "guard"
    windowed = "sample.sde_window_size" in reading.assigned or "sample.sde_type" in reading.assigned
    return "fast" if windowed else "plain"


def _fixed_by_scripts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What its scripts for a model of this kind write out themselves."""
    model = (flux_pickscore() if _is_flux(settings) else sd35m_pickscore()).model
    lora = {
        "script.lora_rank": model.lora_rank,
        "script.lora_alpha": model.lora_alpha,
        "script.lora_targets": list(model.lora_targets),
    }
    return {
        **(lora if settings.get("use_lora") else {}),
        "script.max_sequence_length": model.max_sequence_length,
        "script.eval_prompts": "all of the test file",
    }


def _is_flux(settings: Mapping[str, Any]) -> bool:
    return "flux" in str(settings.get("pretrained.model", "")).lower()


# --- rules ------------------------------------------------------------------------------------------------------------


def _has_window(setting: Setting) -> bool:
    size = setting.all.get("sample.sde_window_size")
    return setting.all["script"] == "fast" and size != 0


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
    if _is_flux(setting.all):
        fields["sampling.embedded_guidance"] = True
    if setting.all["script"] != "fast" or "sample.eval_guidance_scale" not in setting.all:
        fields["eval.guidance_scale"] = setting.value
    return sets(fields)


def _eval_guidance(setting: Setting) -> Outcome:
    if setting.all["script"] == "fast":
        return sets({"eval.guidance_scale": setting.value})
    return not_needed("its script for all steps evaluates with sample.guidance_scale")


def _cfg(setting: Setting) -> Outcome:
    if setting.value is True or setting.number("sample.guidance_scale") <= 1 or _is_flux(setting.all):
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
    if setting.all["script"] == "fast":
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


def _rows_a_batch(setting: Setting) -> int:
    """Pictures of a GPU's network call; an older script has prompts there, and pictures of each beside it."""
    mini = "sample.mini_num_image_per_prompt"
    return setting.count("sample.train_batch_size") * (setting.count(mini) if mini in setting.all else 1)


def _batches(setting: Setting) -> Outcome:
    pictures = setting.count("gpu_number") * _rows_a_batch(setting) * setting.count()
    prompts, rest = divmod(pictures, setting.count("sample.num_image_per_prompt"))
    note = f"of {pictures} pictures" + (", rounded down" if rest else "")
    return sets({"prompts.per_iteration": max(1, prompts)}, note)


def _updates(setting: Setting) -> int:
    batches, together = (
        setting.count("sample.num_batches_per_epoch"),
        setting.count("train.gradient_accumulation_steps"),
    )
    return max(1, batches // together)


def _accumulation(setting: Setting) -> Outcome:
    return sets({"optim.updates_per_rollout": _updates(setting)}, "batches of an epoch over it")


def _ema(setting: Setting) -> Outcome:
    if not setting.value:
        return sets({"optim.ema_decay": 0.0})
    # its average is renewed by a tenth at every eighth update, ours once an iteration
    decay = round(0.9 ** (_updates(setting) / 8), 4)
    return sets({"optim.ema_decay": decay}, "0.9 at every eighth update there")


def _beta(setting: Setting) -> Outcome:
    fields: dict[str, Any] = {"objective.grpo.kl_beta": setting.value}
    note = ""
    if setting.number() > 0 and setting.all.get("sample.sde_type") == "cps":
        note = "CPS's std is the step's, so its form is the exact one"
    elif setting.number() > 0:
        fields["objective.grpo.kl_form"] = "flow_grpo"
    return sets(fields, note)


def _dataset(setting: Setting) -> Outcome:
    folder, kind = setting.text(), setting.all.get("prompt_fn")
    end = "_metadata.jsonl" if kind == "geneval" else ".txt"
    train, test = (str(Path(folder, name + end)) for name in ("train", "test"))
    return sets({"prompts.source": train, "eval.prompts": test})


def _prompt_fn(setting: Setting) -> Outcome:
    if setting.value in ("general_ocr", "geneval"):
        return Outcome("translated", "which of the files in `dataset`")
    return no_equal("prompts come from a file; its train.txt is taken")


def _reward(setting: Setting) -> Outcome:
    name = setting.name[len("reward_fn[") : -1]
    place = [other for other in setting.all if other.startswith("reward_fn[")].index(setting.name)
    own = name if name in REWARDS else f"my_rewards:{name if name.isidentifier() else 'reward'}"
    fields = {f"reward.terms[{place}].name": own, f"reward.terms[{place}].weight": setting.number()}
    if own == name:
        return sets(fields)
    return no_equal(f"no built-in reward; write it as {own} (docs/rewards.md), which the configuration names", fields)


def _statistics(setting: Setting) -> Outcome:
    return sets({"objective.advantage": "batch" if setting.value else "group"}, "std of all pictures, or of each group")


_STALE = "not read by the training scripts"
_PLACE = "progrpo train --out says where a run is kept"
_BAGEL = "read by the script for BAGEL alone"

RULES: dict[str, Rule] = {
    "script": _of_script,
    "gpu_number": counted_in("prompts.per_iteration"),
    "script.lora_rank": to("model.lora_rank"),
    "script.lora_alpha": to("model.lora_alpha"),
    "script.lora_targets": to("model.lora_targets"),
    "script.max_sequence_length": to("model.max_sequence_length"),
    "script.eval_prompts": lambda setting: no_equal("eval.pictures says how many are drawn; 512"),
    "pretrained.model": to("model.path"),
    "pretrained.revision": only(
        "main", why="the hub's main branch here, too", otherwise="no field for a revision; give a folder as model.path"
    ),
    "use_lora": lambda setting: sets({"model.weights": "lora" if setting.value else "full"}),
    "resolution": _resolution,
    "height": _height,
    "width": _width,
    "frames": to("model.frames"),
    "mixed_precision": precision,
    "activation_checkpointing": to("model.activation_checkpointing"),
    "fsdp_optimizer_offload": only(False, why="off", otherwise="the optimizer stays on the device"),
    "allow_tf32": ignored("torch's own setting; arithmetic alone"),
    "seed": to("seed"),
    "num_epochs": to("iterations", "it is meant to be stopped by hand"),
    "save_freq": to("checkpoint.every"),
    "num_checkpoint_limit": to("checkpoint.keep"),
    "eval_freq": to("eval.every"),
    "run_name": ignored(_PLACE),
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
    "sample.num_image_per_prompt": lambda setting: translated(
        plan__preset="custom", plan__group_size=setting.value, note="plain GRPO; --plan.preset standard prunes"
    ),
    "sample.num_batches_per_epoch": _batches,
    "sample.test_batch_size": ignored("evaluations take sampling.microbatch"),
    "sample.batch_size": ignored(_STALE),
    "sample.global_std": _statistics,
    "sample.noise_level": to("sampling.noise_level"),
    "sample.same_latent": to("sampling.same_latent"),
    "sample.sde_type": choice("sampling.sampler", {"sde": "flow_grpo", "cps": "cps_reduced"}),
    "sample.sde_window_size": _window_size,
    "sample.sde_window_range": _window_range,
    "sample.kl_reward": only(
        0,
        why="off",
        otherwise="the distance to the reference is in the loss (objective.grpo.kl_beta), not in the reward",
    ),
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
    "train.clip_range_lt": ignored(_BAGEL),
    "train.clip_range_gt": ignored(_BAGEL),
    "train.timestep_shift": ignored(_BAGEL),
    "train.timestep_fraction": _timestep_fraction,
    "train.beta": _beta,
    "train.lora_path": only(
        None, "", why="adapters begin anew", otherwise="adapters begin anew; fuse that LoRA into a model folder"
    ),
    "train.ema": _ema,
    "train.sft": only(0, why="off", otherwise="no supervised loss beside the reward's"),
    "train.sft_batch_size": ignored("of the supervised loss alone"),
    "diffusion_loss": ignored(_STALE),
}
