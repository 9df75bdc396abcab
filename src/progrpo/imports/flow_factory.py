"""The import of Flow-Factory's settings: a YAML file, as for its `ff-train`.

A setting that the file leaves out has Flow-Factory's own default, and is listed as such.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from progrpo.imports.translation import (
    MOST_SETTINGS,
    UNIPC_LEVELS,
    NearestReward,
    Outcome,
    Rule,
    Setting,
    Translation,
    counted_in,
    flatten,
    ignored,
    lora_to_train_further,
    mixed_precision,
    no_equal,
    not_needed,
    only_at,
    read_bytes,
    reward_outcome,
    to_choice,
    to_field,
    to_fields,
    translate,
)
from progrpo.messages import named, quoted

# Flow-Factory's defaults that differ from ours. Those of an objective hold only for it.
_DEFAULTS: dict[str, object] = {
    "mixed_precision": "bf16",
    "num_processes": 1,
    "model.model_name_or_path": "black-forest-labs/FLUX.1-dev",
    "model.finetune_type": "full",
    "model.lora_rank": 8,
    "model.target_modules": "all",
    "train.trainer_type": "grpo",
    "train.resolution": 512,
    "train.num_inference_steps": 10,
    "train.guidance_scale": 3.5,
    "train.per_device_batch_size": 1,
    "train.group_size": 1,
    "train.unique_sample_num_per_epoch": 8,
    "train.gradient_step_per_epoch": 2,
    "train.gradient_accumulation_steps": "auto",
    "train.max_epochs": None,
    "train.seed": 42,
    "train.global_std": True,
    "train.advantage_aggregation": "gdpo",
    "train.adv_clip_range": 5.0,
    "train.kl_beta": 0,
    "train.ema_decay": 0.995,
    "train.ema_update_interval": 10,
    "train.ema_decay_schedule": "power",
    "train.latent_storage_dtype": "fp16",
    "train.adv_eps": 1e-6,
    "scheduler.dynamics_type": "Flow-SDE",
    "scheduler.noise_level": 0.7,
    "scheduler.num_sde_steps": 1,
    "eval.num_inference_steps": 30,
    "eval.guidance_scale": 3.5,
    "eval.eval_freq": 10,
    "log.save_freq": 10,
}
_DEFAULTS_BY_TRAINER: dict[str, dict[str, object]] = {
    "grpo": {"train.clip_range": 1e-4, "train.kl_type": "x-based"},
    "grpo-guard": {"train.clip_range": 1e-4, "train.kl_type": "x-based"},
    "nft": {
        "train.nft_beta": 1.0,
        "train.off_policy": False,
        "train.num_train_timesteps": 0,
        "train.timestep_range": 0.9,
    },
    "awm": {
        "train.awm_weighting": "Uniform",
        "train.ema_kl_beta": 0,
        "train.clip_range": 1e-4,
        "train.num_train_timesteps": 0,
        "train.timestep_range": 0.9,
    },
    "dgpo": {
        "train.dpo_beta": 100.0,
        "train.clip_range": 1e-4,
        "train.num_train_timesteps": 0,
        "train.timestep_range": 0.6,
    },
}
_OPTIMIZER = {"learning_rate": 1e-5, "weight_decay": 1e-4, "betas": [0.9, 0.999], "max_grad_norm": 1.0}
_OLD_OPTIMIZER = {
    "learning_rate": "learning_rate",
    "adam_weight_decay": "weight_decay",
    "adam_betas": "betas",
    "adam_epsilon": "eps",
    "max_grad_norm": "max_grad_norm",
}
"""The optimizer's settings as older files have them under `train`, and their names today."""

_ONLY_OURS = ("hpsv2", "imagereward", "aesthetic", "clipscore")
_JUDGES = ("vllm_evaluate", "rational_rewards_t2i", "rational_rewards_edit")
_MISSING_MARKS = (
    "there a mark that is missing is left out of the mean, here the score is missing; name its model if the server"
    " knows it by another name than its hub id"
)
_UNREGISTERED = "it has no reward of this name, and the values of yours are not known here"
REWARDS = {
    "pickscore": NearestReward("pickscore"),
    "clip": NearestReward(
        "clipscore",
        1 / 2.5,
        "theirs is the cosine with the prompt, and of a video's first frame; ours is 2.5 times that, with"
        " 'A photo depicts ' before the prompt, and never below 0",
    ),
    "ocr": NearestReward(
        "ocr",
        difference="theirs compares with the whole prompt, or is a mean over quotes by the longer text; ours is"
        " 1 - edits / length of the text that the prompt has in quotes",
    ),
    "geneval": NearestReward(
        "geneval",
        difference="theirs is the mean over clauses of the least of number and colour, with a place by centres alone;"
        " both are in 0..1",
    ),
    "vllm_evaluate": NearestReward(
        "vlm",
        difference="theirs is P(yes) / (P(yes) + P(no)) of 'Is it a beautiful image?', without the prompt; ours is a"
        " mark of 0 to 10, over 10, and a column `question` holds the question",
    ),
    "rational_rewards_t2i": NearestReward("rationalrewards", difference=_MISSING_MARKS),
    "rational_rewards_edit": NearestReward("rationalrewards_edit", difference=_MISSING_MARKS),
    **{name: NearestReward(name, difference=_UNREGISTERED) for name in _ONLY_OURS},
}
"""Rewards by name in small letters, as Flow-Factory looks them up."""
_NOT_BUILT_IN = {
    "pickscore_rank": "PickScore's rank in its group over the group's size: a function with `groupwise = True`",
    "clap": "of sound",
    "imagebind": "of sound",
    "consistent_editing": "a judge of edits",
}

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

# The settings of the averages with which nft, awm and dgpo compare, at the values of ours.
_AVERAGES: dict[str, dict[str, object]] = {
    "nft": {
        "train.ema_decay": 0.5,
        "train.ema_update_interval": 1,
        "train.ema_decay_schedule": "piecewise_linear",
        "train.flat_steps": 0,
        "train.ramp_rate": 1e-3,
    },
    "awm": {"train.ema_update_interval": 1, "train.ema_decay_schedule": "linear"},
    "dgpo": {"train.ema_ref_max_decay": 0.3, "train.ema_ref_ramp_rate": 1e-3},
}


def import_flow_factory(path: str) -> Translation:
    """The configuration that a YAML file asks for, and the outcome of each setting.

    ValueError, one sentence, if the file cannot be read or the settings cannot be run.
    """
    file = Path(path)
    settings = {name: _as_number(value) for name, value in _read(file).items()}
    trainer = settings.get("train.trainer_type", "grpo")
    if isinstance(trainer, str):
        trainer = trainer.lower()  # as it looks them up
    if not isinstance(trainer, str) or trainer not in _DEFAULTS_BY_TRAINER:
        raise ValueError(
            f"{named(file)}: train.trainer_type {quoted(trainer)} has no equal here; there are"
            f" {', '.join(_DEFAULTS_BY_TRAINER)}"
        )
    optimizer = {f"optimizers[0].{name}": value for name, value in _OPTIMIZER.items()}
    defaults = {**_DEFAULTS, **_DEFAULTS_BY_TRAINER[trainer], **optimizer}
    left_out = {name: value for name, value in defaults.items() if name not in settings}
    if "train.trainer_type" in settings:
        settings["train.trainer_type"] = trainer
    if str(settings.get("model.model_type")).lower() == "wan2_t2v":
        left_out["scheduler.levels"] = "UniPC's"
    return translate(file, {**settings, **left_out}, RULES, defaults=left_out)


class _Loader(yaml.SafeLoader):
    """The safe loader, with a limit on objects that are merged (`<<`) into one, which could take work without end."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_SETTINGS:
            raise ValueError("too many objects are merged into one another")


def _read(path: Path) -> dict[str, object]:
    """The settings of a file by their dotted names."""
    content = read_bytes(path)
    try:
        data = yaml.load(content, _Loader)
        if not isinstance(data, dict) or not data:
            raise ValueError("it holds no settings by name")
        settings = flatten(_in_new_form(data))
        return {re.sub(r"(rewards\[\d+\]\.weight)\.(.*)", r"\1[\2]", name): value for name, value in settings.items()}
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{named(path)} is no settings file: {' '.join(str(error).split())[:200]}") from None


def _in_new_form(original: Mapping[object, object]) -> dict[str, object]:
    """The data of an older file in the form of newer ones.

    Older files have one reward or data set without a list, and the optimizer's settings under `train`.
    """
    data = {str(key): value for key, value in original.items()}
    for one, many in (("reward", "rewards"), ("rewards", "rewards"), ("eval_rewards", "eval_rewards")):
        if isinstance(data.get(one), dict):
            data[many] = [data.pop(one)]
    train = data.get("train")
    if isinstance(train, dict) and "optimizers" not in data:
        old = {new: train[key] for key, new in _OLD_OPTIMIZER.items() if key in train}
        train = data["train"] = {key: value for key, value in train.items() if key not in _OLD_OPTIMIZER}
        if old:
            data["optimizers"] = [old]
    if isinstance(train, dict) and "beta_dpo" in train:
        data["train"] = {"dpo_beta" if key == "beta_dpo" else key: value for key, value in train.items()}
    files = data.get("data")
    if isinstance(files, dict) and "dataset_dir" in files and "datasets" not in files:
        rest = {key: value for key, value in files.items() if key != "dataset_dir"}
        data["data"] = {"datasets": [{"dataset_dir": files["dataset_dir"]}], **rest}
    return data


def _as_number(value: object) -> object:
    """The number that a text such as 1e-4 means, which YAML 1.1 reads as a text; any other value as it is."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d{1,20}(\.\d{0,20})?[eE][-+]?\d{1,3}", value):
        return float(value)
    return value


# --- rules ------------------------------------------------------------------------------------------------------------


def _trainer(setting: Setting) -> str:
    return str(setting.all["train.trainer_type"])


def _objective(setting: Setting) -> str:
    return _trainer(setting).removesuffix("-guard")


def _to_objective(field: str, *objectives: str) -> Rule:
    """The rule of a setting for which the objective in use has this field, if it is one of `objectives` (or any)."""

    def rule(setting: Setting) -> Outcome:
        if objectives and _objective(setting) not in objectives:
            return not_needed(f"{_trainer(setting)} does not read it")
        return to_fields({f"objective.{_objective(setting)}.{field}": setting.value})

    return rule


def _trainer_type(setting: Setting) -> Outcome:
    fields = {"objective.name": _objective(setting)}
    if setting.value == "grpo-guard":
        fields["objective.grpo.ratio"] = "guard"
    return to_fields(fields)


def _end(setting: Setting, start: Callable[[float], float]) -> float | None:
    """The end of a range that begins at `start(end)`, or the number that stands for it; None for another range."""
    if isinstance(setting.value, list):
        low, high = setting.value if len(setting.value) == 2 else (None, None)
        return float(high) if isinstance(high, int | float) and low == start(high) else None
    return setting.number()


def _symmetric(setting: Setting) -> float | None:
    """The bound, if it is the same on both sides."""
    return _end(setting, lambda end: -end)


def _clip_range(setting: Setting) -> Outcome:
    bound, objective = _symmetric(setting), _objective(setting)
    if objective == "nft":
        return not_needed("nft does not read it")
    if bound is None:
        return no_equal("both sides have the same clip range here: the published one")
    return to_fields({f"objective.{objective}.clip_range": bound})


def _adv_clip_range(setting: Setting) -> Outcome:
    bound = _symmetric(setting)
    if bound is None:
        return no_equal("both sides have the same clip range here")
    return to_fields({f"objective.{_objective(setting)}.adv_clip_max": bound})


def _kl_type(setting: Setting) -> Outcome:
    form = setting.one_of({"x-based": "latent", "v-based": "velocity"})
    if _objective(setting) == "grpo":
        return to_fields({"objective.grpo.kl_form": form})
    compared = "velocities are compared here"
    return not_needed(compared) if form == "velocity" else no_equal(compared)


def _aggregation(setting: Setting) -> Outcome:
    if setting.one_of({"sum": False, "gdpo": True}):
        return to_fields({"objective.advantage": "gdpo"}, "with the std of the batch")
    return to_fields({"objective.advantage": "batch" if setting.all.get("train.global_std") else "group"})


def _global_std(setting: Setting) -> Outcome:
    if setting.all.get("train.advantage_aggregation") == "gdpo":
        return not_needed("gdpo normalizes by group, then by batch")
    return counted_in("objective.advantage")


def _size(setting: Setting, section: str) -> tuple[object, object]:
    """Height and width under `train` or `eval`.

    A side that is given itself counts before the resolution, of which one number is a square.
    """
    # 1024 if it is left out (which only an evaluation's can be), 512 if it is empty
    resolution = setting.all.get(f"{section}.resolution", 1024) or 512
    sides = resolution if isinstance(resolution, list) else [resolution]
    height = setting.all.get(f"{section}.height")
    width = setting.all.get(f"{section}.width")
    return sides[0] if height is None else height, sides[:2][-1] if width is None else width


def _resolution(setting: Setting) -> Outcome:
    height, width = _size(setting, "train")
    return to_fields({"model.resolution": height if height == width else [height, width]})


def _side(setting: Setting) -> Outcome:
    if setting.value is None:
        return not_needed("train.resolution sets it")
    return counted_in("model.resolution")


def _eval_size(setting: Setting) -> Outcome:
    why = "evaluations have the size of training"
    return not_needed(why) if _size(setting, "eval") == _size(setting, "train") else no_equal(why)


def _eval_frames(setting: Setting) -> Outcome:
    why = "evaluations have the length of training"
    return not_needed(why) if setting.value in (None, setting.all.get("train.num_frames")) else no_equal(why)


def _guidance(setting: Setting) -> Outcome:
    fields = {"sampling.guidance_scale": max(1.0, setting.number())}
    model = str(setting.all.get("model.model_name_or_path")).lower()
    # FLUX.2 klein is guided by a pair of calls
    if "flux" in model and "klein" not in model and setting.number() > 1:
        fields["sampling.embedded_guidance"] = True
    return to_fields(fields)


def _microbatch(setting: Setting) -> Outcome:
    return to_fields({"sampling.microbatch": setting.value, "optim.microbatch": setting.value})


def _steps_of_epoch(setting: Setting) -> Outcome:
    if setting.all.get("train.gradient_accumulation_steps") == "auto":
        return to_fields({"optim.updates_per_rollout": setting.value})
    return not_needed("gradient_accumulation_steps sets it instead")


def _accumulation(setting: Setting) -> Outcome:
    if setting.value == "auto":
        return not_needed("gradient_step_per_epoch sets it")
    pictures = setting.count("train.unique_sample_num_per_epoch") * setting.count("train.group_size")
    batches = pictures // (setting.count("train.per_device_batch_size") * setting.count("num_processes"))
    return to_fields(
        {"optim.updates_per_rollout": max(1, batches // setting.count())},
        f"{batches} batches of an epoch divided by it",
    )


def _iterations(setting: Setting) -> Outcome:
    if setting.value is None or setting.number() < 0:
        return to_fields({"iterations": 100_000}, "without end there; stop the run by hand")
    return to_fields({"iterations": setting.value})


def _average(setting: Setting) -> Outcome:
    """The outcome of a setting of the average with which the objective compares."""
    ours = _AVERAGES.get(_objective(setting), {})
    if setting.name not in ours:
        return not_needed(f"{_trainer(setting)} does not read it")
    here = ours[setting.name]
    return not_needed("the same here") if setting.value == here else no_equal(f"{here} here, as published")


def _averages_for_evaluations(setting: Setting) -> bool:
    """Whether the average of `train.ema_decay` is only for evaluations."""
    return _objective(setting) in ("grpo", "dgpo")


def _ema_decay(setting: Setting) -> Outcome:
    if _objective(setting) == "awm":
        return _awm_average(setting)
    if not _averages_for_evaluations(setting):
        return _average(setting)
    decay, every = setting.number(), setting.count("train.ema_update_interval")
    each = round(decay ** (1 / every), 6) if 0 < decay < 1 else decay
    return to_fields({"optim.ema_decay": each}, f"{decay:g} at every {every} epochs there")


def _awm_average(setting: Setting) -> Outcome:
    """The outcome of a decay that rises to this value over `warmup_steps` epochs in equal steps."""
    if not _rises_in_equal_steps(setting):
        return no_equal("the average with which awm compares has a decay of min(.0003 n, .3) here after epoch n")
    ramp = round(setting.number() / setting.count("train.warmup_steps"), 9)
    return to_fields({"objective.awm.average_limit": setting.number(), "objective.awm.average_ramp": ramp})


def _ema_interval(setting: Setting) -> Outcome:
    if not _averages_for_evaluations(setting):
        return _average(setting)
    return counted_in("optim.ema_decay")


def _ema_schedule(setting: Setting) -> Outcome:
    if not _averages_for_evaluations(setting):
        return _average(setting)
    same = setting.value in ("constant", "power")  # `power` begins lower, and is constant after some epochs
    return not_needed("the same here") if same else no_equal("an average has one decay")


def _rises_in_equal_steps(setting: Setting) -> bool:
    return setting.all.get("train.ema_decay_schedule") == "linear" and "train.warmup_steps" in setting.all


def _warmup(setting: Setting) -> Outcome:
    if _objective(setting) == "awm" and _rises_in_equal_steps(setting):
        return counted_in("objective.awm.average_ramp")
    return not_needed("of a schedule that is not used")


def _off_policy(setting: Setting) -> Outcome:
    """The outcome of a choice that is fixed here: NFT samples from its old policy, others from the current weights."""
    nft = _objective(setting) == "nft"
    if bool(setting.value) is nft:
        return not_needed("the same here")
    return no_equal(f"pictures are sampled from the {'old policy' if nft else 'current weights'} here")


def _latent_dtype(setting: Setting) -> Outcome:
    names = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
    if setting.value is None:
        return no_equal("latents are kept in float32, or in sampling.latent_dtype")
    return to_fields({"sampling.latent_dtype": setting.one_of(names)})


def _is_ode(setting: Setting) -> bool:
    return setting.all.get("scheduler.dynamics_type") == "ODE"


def _dynamics(setting: Setting) -> Outcome:
    if _is_ode(setting):
        return to_fields({"sampling.sde_window": "none"})
    samplers = {"flow-sde": "flow_grpo", "dance-sde": "dance", "cps": "cps_reduced"}
    return to_fields({"sampling.sampler": setting.one_of(samplers)})


def _noise_level(setting: Setting) -> Outcome:
    return not_needed("the ODE adds none") if _is_ode(setting) else to_fields({"sampling.noise_level": setting.value})


def _noisy_steps(setting: Setting) -> Outcome:
    """The outcome of the number of noisy steps, which are drawn from a list for each epoch; ours lie side by side."""
    if _is_ode(setting):
        return not_needed("the ODE adds no noise")
    last = setting.count("train.num_inference_steps") - 1
    pool = setting.all.get("scheduler.sde_steps") or list(range(last))
    if not isinstance(pool, list) or not all(isinstance(step, int) for step in pool):
        raise ValueError(f"scheduler.sde_steps must be a list of steps, not {quoted(pool)}")
    size = setting.count()
    if size >= last:
        return to_fields({"sampling.sde_window": "all"})
    end = min(max(pool) + 1, last)
    fields = {"sampling.sde_window": "random", "sampling.sde_window_size": size, "sampling.sde_window_end": end}
    return to_fields(fields, "side by side here, drawn one by one there")


def _pool(setting: Setting) -> Outcome:
    if _is_ode(setting) or setting.value is None:
        return not_needed("all but the last step")
    steps = setting.value if isinstance(setting.value, list) else []
    first = min((step for step in steps if isinstance(step, int)), default=0)
    if first > 0:
        return no_equal(f"it sets sampling.sde_window_end, but windows may begin before step {first} here")
    return counted_in("sampling.sde_window_end")


def _model(setting: Setting) -> Outcome:
    if re.search(r"wan\W?2\W2", setting.text().lower()):
        raise ValueError(
            f"model.model_name_or_path {quoted(setting.value)} is a Wan 2.2, of two networks, which cannot be trained"
            " here"
        )
    return to_fields({"model.path": setting.value})


def _model_type(setting: Setting) -> Outcome:
    if setting.value is not None and str(setting.value).lower() not in _DEFAULT_TARGETS:
        raise ValueError(
            f"model.model_type {quoted(setting.value)} is a type of model that cannot be trained here; there are"
            f" {', '.join(_DEFAULT_TARGETS)}"
        )
    return not_needed("read from the model itself")


def _source_size(setting: Setting) -> Outcome:
    if "kontext" in str(setting.all.get("model.model_name_or_path")).lower():
        return not_needed("source pictures have the size that the model's pipeline gives them")
    return no_equal("only FLUX.1 Kontext takes source pictures here; other models start from the prompt")


def _frames(setting: Setting) -> Outcome:
    frames = setting.value
    fields = {"model.frames": frames}
    if isinstance(frames, int) and 1 <= frames <= 1024:
        fields["reward.frames"] = frames
    return to_fields(fields, "its rewards score every frame of a video")


def _lora_rank(setting: Setting) -> Outcome:
    if setting.all.get("model.finetune_type") != "lora":
        return not_needed("all weights are trained")
    fields = {"model.lora_rank": setting.value}
    if setting.all.get("model.lora_alpha") is None:
        fields["model.lora_alpha"] = 2 * setting.count()
    return to_fields(fields)


def _lora_alpha(setting: Setting) -> Outcome:
    if setting.all.get("model.finetune_type") != "lora":
        return not_needed("all weights are trained")
    return not_needed("twice the rank") if setting.value is None else to_fields({"model.lora_alpha": setting.value})


_RESUMING = "progrpo train --resume resumes its own runs only"


def _resumes_lora(setting: Setting) -> bool:
    kind = setting.all.get("model.resume_type") or setting.all.get("model.finetune_type")
    return kind == "lora" == setting.all.get("model.finetune_type")


def _resumed(setting: Setting) -> Outcome:
    if setting.value is None:
        return not_needed("nothing to resume")
    return lora_to_train_further(setting) if _resumes_lora(setting) else no_equal(_RESUMING)


def _resume_type(setting: Setting) -> Outcome:
    if setting.all.get("model.resume_path") is None:
        return not_needed("nothing to resume")
    return counted_in("model.lora") if _resumes_lora(setting) else no_equal(_RESUMING)


def _targets(setting: Setting) -> Outcome:
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


def _dataset(setting: Setting) -> Outcome:
    if setting.name != "data.datasets[0].dataset_dir":
        return no_equal("one data set is read here; join them in one file")
    folder = Path(os.path.expanduser(setting.text()))
    # os.path, because Path's own methods raise for an unknown user and for a name that is too long
    is_text = os.path.isfile(folder / "train.txt") and not os.path.isfile(folder / "train.jsonl")
    end = ".txt" if is_text else ".jsonl"
    return to_fields({"prompts.source": str(folder / f"train{end}"), "eval.prompts": str(folder / f"test{end}")})


def _nearest(setting: Setting) -> NearestReward | None:
    """The reward of ours that is nearest; without its scale under gdpo, which divides the scale out."""
    nearest = REWARDS.get(setting.text().lower())
    scaled = setting.all.get("train.advantage_aggregation") != "gdpo"
    return nearest if nearest is None or scaled else replace(nearest, factor=1.0)


def _reward_name(setting: Setting) -> str:
    """The name of our reward, or of a function that the user writes."""
    last = re.split(r"[.:/]", setting.text())[-1]
    nearest = _nearest(setting)
    return nearest.name if nearest else f"my_rewards:{last if last.isidentifier() else 'reward'}"


def _applies(setting: Setting) -> bool:
    """Whether a reward applies to the data set that is read."""
    datasets = setting.all.get(setting.name.rpartition(".")[0] + ".applicable_datasets")
    return not isinstance(datasets, list) or setting.all.get("data.datasets[0].name") in datasets


def _reward(setting: Setting) -> Outcome:
    own = _reward_name(setting)
    if not _applies(setting):
        return no_equal(
            f"it is for other data sets than the one that is read, {named(setting.all.get('data.datasets[0].name'))}"
        )
    if setting.name.startswith("eval_") and own in _trained_rewards(setting):
        return not_needed("the trained rewards are measured at every evaluation")
    what = _NOT_BUILT_IN.get(setting.text().lower(), "")
    return reward_outcome(_place(setting), own, _nearest(setting), _reward_weight(setting), what)


def _trained_rewards(setting: Setting) -> list[str]:
    """Our names of the rewards that are trained on."""
    names = [name for name in setting.all if re.fullmatch(r"rewards\[\d+\]\.reward_model", name)]
    trained = [Setting(name, setting.all[name], setting.all) for name in names]
    return [_reward_name(reward) for reward in trained if _applies(reward)]


def _reward_weight(setting: Setting) -> float | None:
    """The weight of a reward for the data set that is read; None for a reward that is only evaluated."""
    if setting.name.startswith("eval_"):
        return None
    head = setting.name.rpartition(".")[0] + ".weight"
    names = head, f"{head}[{setting.all.get('data.datasets[0].name')}]"
    return next((setting.number(name) for name in names if name in setting.all), 1.0)


def _weight(setting: Setting) -> Outcome:
    if setting.name.startswith("eval_"):
        return not_needed("a reward that is only measured has no weight")
    dropped = _dropped_with_reward(setting)
    return counted_in(f"{_place(setting)}.weight") if dropped is None else dropped


def _weight_of_set(setting: Setting) -> Outcome:
    own = setting.name.endswith(f"[{setting.all.get('data.datasets[0].name')}]")
    return _weight(setting) if own else not_needed("for a data set that is not read")


def _dropped_with_reward(setting: Setting) -> Outcome | None:
    """The outcome of a setting whose reward is not used, or is measured as it is trained on; None for any other."""
    head = re.sub(r"(\[\d+\]).*", r"\1", setting.name)
    model = setting.all.get(f"{head}.reward_model")
    if model is None:
        return not_needed("it has no reward")
    reward = Setting(f"{head}.reward_model", model, setting.all)
    if not _applies(reward):
        return not_needed("its reward is not used")
    if _reward(reward).status == "not needed here":
        return not_needed("this reward is measured as it is trained on")
    return None


def _reward_field(field: str, names: Mapping[str, object] | None = None) -> Rule:
    """The rule of a reward's setting for which our rewards have this field."""

    def rule(setting: Setting) -> Outcome:
        dropped = _dropped_with_reward(setting)
        if dropped is not None:
            return dropped
        value = setting.one_of(names) if names else setting.value
        return to_fields({f"{_place(setting)}.{field}": value})

    return rule


_DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "float32": "float32",
    "fp32": "float32",
}


def _reward_dtype(setting: Setting) -> Outcome:
    model = setting.all.get(setting.name.rpartition(".")[0] + ".reward_model")
    if str(model).lower() != "pickscore" or _dropped_with_reward(setting) is not None:
        return _reward_field("dtype", _DTYPES)(setting)
    return to_fields({f"{_place(setting)}.dtype": "float32"}, "its PickScore always computes in float32")


def _judge_field(field: str) -> Rule:
    """The rule of a setting of the server that a judge asks."""

    def rule(setting: Setting) -> Outcome:
        model = setting.all.get(setting.name.rpartition(".")[0] + ".reward_model")
        if str(model).lower() not in _JUDGES:
            return no_equal("a setting of a reward that you write")
        return _reward_field(field)(setting)

    return rule


def _place(setting: Setting) -> str:
    index = re.findall(r"\[(\d+)\]", setting.name)[0]
    terms = "eval.rewards" if setting.name.startswith("eval_") else "reward.terms"
    return f"{terms}[{index}]"


def _first_optimizer(rule: Rule) -> Rule:
    return lambda s: rule(s) if s.name.startswith("optimizers[0].") else no_equal("there is one optimizer")


def _draws(setting: Setting) -> Outcome:
    objective = _objective(setting)
    if objective == "grpo":
        return not_needed("grpo trains the noisy steps")
    if setting.value in (None, 0):
        share = Setting("train.timestep_range", setting.all.get("train.timestep_range"), setting.all)
        draws = max(1, int(setting.count("train.num_inference_steps") * (_from_the_start(share) or 1)))
        return to_fields({f"objective.{objective}.draws": draws}, "all steps of train.timestep_range")
    return to_fields({f"objective.{objective}.draws": setting.value})


def _from_the_start(setting: Setting) -> float | None:
    """The share of the grid that the range covers, if it begins at the noisy end."""
    return _end(setting, lambda end: 0)


def _range(setting: Setting) -> Outcome:
    objective, share = _objective(setting), _from_the_start(setting)
    if objective == "grpo":
        return not_needed("grpo trains the noisy steps")
    if share is None:
        return no_equal("noise levels are drawn from the grid's noisy end here")
    return to_fields({f"objective.{objective}.time_fraction": share})


def _weighting(setting: Setting) -> Outcome:
    if _objective(setting) != "awm":
        return not_needed(f"{_trainer(setting)} does not read it")
    names = {"uniform": "uniform", "t": "t", "t2": "t2", "t**2": "t2", "huber": "huber", "ghuber": "ghuber"}
    ours = names.get(str(setting.value).lower())
    return to_fields({"objective.awm.weighting": ours}) if ours else no_equal("our default is used: uniform")


_RUN_FOLDER = "progrpo train --out names the run's folder"
_LAUNCH = "accelerate launch or torchrun starts the processes"
_LOADING = "prompts are read at once, and encoded at the start"
_CURRENT = "pictures are sampled from the current weights"
_ON_DEVICE = "these weights stay on the run's device"
_ONE_DATA_SET = "one data set is read"

RULES: dict[str, Rule] = {
    "launcher": ignored(_LAUNCH),
    "config_file": ignored(_LAUNCH),
    "num_processes": ignored(_LAUNCH),
    "main_process_port": ignored(_LAUNCH),
    "mixed_precision": mixed_precision,
    "run_name": ignored(_RUN_FOLDER),
    "project": ignored(_RUN_FOLDER),
    "logging_backend": ignored("metrics go to the run folder and its report"),
    "model.model_name_or_path": _model,
    "model.model_type": _model_type,
    "model.finetune_type": to_choice("model.weights", {"lora": "lora", "full": "full"}),
    "model.lora_rank": _lora_rank,
    "model.lora_alpha": _lora_alpha,
    "model.target_modules": _targets,
    "model.target_components": only_at(
        "transformer", ["transformer"], why="only the denoiser is trained", otherwise="only the denoiser is trained"
    ),
    "model.master_weight_dtype": only_at(
        "fp32", "float32", why="the same here", otherwise="trained weights are kept in float32"
    ),
    "model.resume_path": _resumed,
    "model.resume_type": _resume_type,
    "log.run_name": ignored(_RUN_FOLDER),
    "log.project": ignored(_RUN_FOLDER),
    "log.logging_backend": ignored("metrics go to the run folder and its report"),
    "log.save_dir": ignored(_RUN_FOLDER),
    "log.save_freq": lambda s: (
        no_equal("checkpoints cannot be turned off") if s.value == 0 else to_fields({"checkpoint.every": s.value})
    ),
    "log.save_model_only": ignored("a checkpoint is the whole state, so that runs can be resumed"),
    "data.datasets[].dataset_dir": _dataset,
    "data.datasets[].name": ignored("a label"),
    "data.datasets[].train.weight": ignored(_ONE_DATA_SET),
    "data.datasets[].train.max_dataset_size": only_at(
        None, why="the whole file", otherwise="the whole file is used; cut it"
    ),
    "data.datasets[].eval": ignored(_ONE_DATA_SET),
    "data.max_dataset_size": only_at(None, why="the whole file", otherwise="the whole file is used; cut it"),
    "data.preprocessing_batch_size": ignored(_LOADING),
    "data.dataloader_num_workers": ignored(_LOADING),
    "data.enable_preprocess": ignored(_LOADING),
    "data.force_reprocess": ignored(_LOADING),
    "data.cache_dir": ignored(_LOADING),
    "data.sampler_type": ignored("any number of groups can be distributed over processes"),
    "data.sampler_subgroup_size": ignored("any number of groups can be distributed over processes"),
    "train.trainer_type": _trainer_type,
    "train.resolution": _resolution,
    "train.height": _side,
    "train.width": _side,
    "train.num_frames": _frames,
    "train.frame_rate": ignored("frames are trained, whatever their rate"),
    "train.condition_image_size": _source_size,
    "train.auto_resize": _source_size,
    "train.num_inference_steps": to_field("sampling.num_inference_steps"),
    "train.guidance_scale": _guidance,
    "train.max_epochs": _iterations,
    "train.per_device_batch_size": _microbatch,
    "train.group_size": lambda s: to_fields(
        {"plan.preset": "custom", "plan.group_size": s.value}, "no pruning; --plan.preset standard prunes"
    ),
    "train.unique_sample_num_per_epoch": to_field("prompts.per_iteration"),
    "train.gradient_step_per_epoch": _steps_of_epoch,
    "train.gradient_accumulation_steps": _accumulation,
    "train.num_inner_epochs": only_at(
        1, why="each picture is trained on once", otherwise="each picture is trained on once"
    ),
    "train.global_std": _global_std,
    "train.advantage_aggregation": _aggregation,
    "train.clip_range": _clip_range,
    "train.adv_clip_range": _adv_clip_range,
    "train.kl_type": _kl_type,
    "train.kl_beta": _to_objective("kl_beta"),
    "train.ref_param_device": ignored(_ON_DEVICE),
    "train.ema_decay": _ema_decay,
    "train.ema_update_interval": _ema_interval,
    "train.ema_device": ignored(_ON_DEVICE),
    "train.ema_decay_schedule": _ema_schedule,
    "train.flat_steps": _average,
    "train.ramp_rate": _average,
    "train.warmup_steps": _warmup,
    "train.ema_ref_max_decay": _average,
    "train.ema_ref_ramp_rate": _average,
    "train.ema_ref_device": ignored(_ON_DEVICE),
    "train.adv_eps": to_field("objective.adv_eps", "there it is the least std, and fixed"),
    "train.clip_kl": only_at(False, why="off", otherwise="the distance to the reference is not clipped"),
    "train.switch_ema_ref": lambda s: (
        no_equal(_CURRENT) if _objective(s) == "dgpo" else not_needed(f"{_trainer(s)} does not read it")
    ),
    "train.kl_cfg": only_at(1, why="the reference is not guided", otherwise="the reference is not guided"),
    "train.use_ema_ref": only_at(
        False, why="the reference is the model at its start", otherwise="the reference is the model at its start"
    ),
    "train.kl_weight": only_at(
        "Uniform", why="the same here", otherwise="distances to the reference have equal weight at all times"
    ),
    "train.time_sampling_strategy": only_at(
        "discrete", why="the same here", otherwise="levels of the sampling grid are drawn"
    ),
    "train.time_shift": ignored("only for logit-normal times"),
    "train.ghuber_power": lambda s: (
        to_fields({"objective.awm.huber_power": s.value})
        if _objective(s) == "awm"
        else not_needed(f"{_trainer(s)} does not read it")
    ),
    "train.enable_gradient_checkpointing": to_field("model.activation_checkpointing"),
    "train.latent_storage_dtype": _latent_dtype,
    "train.offload_samples_to_cpu": only_at(False, why="off", otherwise="an iteration's latents stay on the device"),
    "train.shuffle_samples": ignored("microbatches mix steps and trajectories"),
    "train.reward_optimization_overlap": only_at(
        False, why="off", otherwise="reward.waves scores while the next pictures are sampled"
    ),
    "train.reward_optimization_overlap_mode": ignored("only for an overlap, which there is not here"),
    "train.reward_optimization_overlap_poll_interval": ignored("only for an overlap, which there is not here"),
    "train.seed": to_field("seed"),
    "train.nft_beta": _to_objective("beta", "nft"),
    "train.ema_kl_beta": _to_objective("average_beta", "awm"),
    "train.awm_weighting": _weighting,
    "train.dpo_beta": _to_objective("dpo_beta", "dgpo"),
    "train.num_train_timesteps": _draws,
    "train.timestep_range": _range,
    "train.use_shared_noise": only_at(True, why="a group shares its noise", otherwise="a group shares its noise"),
    "train.clip_dsm": only_at(True, why="the loss is clipped", otherwise="the loss is clipped"),
    "train.off_policy": _off_policy,
    "scheduler.dynamics_type": _dynamics,
    "scheduler.noise_level": _noise_level,
    "scheduler.num_sde_steps": _noisy_steps,
    "scheduler.sde_steps": _pool,
    "scheduler.seed": ignored("windows follow from the run's seed"),
    "scheduler.flow_shift": to_field("sampling.shift"),
    "scheduler.levels": lambda s: no_equal(UNIPC_LEVELS),
    "eval.resolution": _eval_size,
    "eval.height": _eval_size,
    "eval.width": _eval_size,
    "eval.num_frames": _eval_frames,
    "eval.condition_image_size": _source_size,
    "eval.auto_resize": _source_size,
    "eval.num_inference_steps": to_field("eval.num_inference_steps"),
    "eval.guidance_scale": lambda s: to_fields({"eval.guidance_scale": max(1.0, s.number())}),
    "eval.per_device_batch_size": ignored("evaluations use sampling.microbatch"),
    "eval.eval_freq": to_field("eval.every"),
    "eval.seed": lambda s: (
        not_needed("the same noise at every evaluation") if s.value is None else to_fields({"eval.seed": s.value})
    ),
    "rewards[].name": ignored("a label"),
    "rewards[].reward_model": _reward,
    "rewards[].weight": _weight,
    "rewards[].weight[]": _weight_of_set,
    "rewards[].applicable_datasets": ignored("rewards of the data set that is read are used"),
    "rewards[].batch_size": _reward_field("batch_size"),
    "rewards[].device": _reward_field("device"),
    "rewards[].dtype": _reward_dtype,
    "rewards[].async_reward": ignored("reward.waves scores while the next pictures are sampled"),
    "rewards[].num_workers": ignored("reward.waves scores while the next pictures are sampled"),
    "rewards[].api_base_url": _judge_field("url"),
    "rewards[].vlm_model": _judge_field("model"),
    "rewards[].timeout": _judge_field("timeout"),
    "rewards[].max_retries": _judge_field("retries"),
    "rewards[].api_key": ignored("the key is read from OPENAI_API_KEY in the environment"),
    "rewards[].max_concurrent": ignored("batch_size sets how many pictures are scored at once"),
    "rewards[].top_logprobs": ignored("marks are read here, not probabilities"),
    "rewards[].canonicalize": ignored("marks are read here, not probabilities"),
    "optimizers[].name": ignored("a label"),
    "optimizers[].learning_rate": _first_optimizer(to_field("optim.lr")),
    "optimizers[].weight_decay": _first_optimizer(to_field("optim.weight_decay")),
    "optimizers[].betas": _first_optimizer(to_field("optim.betas")),
    "optimizers[].eps": _first_optimizer(only_at(1e-8, why="the same here", otherwise="1e-8 here")),
    "optimizers[].max_grad_norm": _first_optimizer(to_field("optim.max_grad_norm")),
}
RULES |= {f"eval_{name}": rule for name, rule in RULES.items() if name.startswith("rewards[]")}
