"""Flow-Factory's settings: a YAML file, as its `ff-train` takes it. What the file leaves out has Flow-Factory's own default, and is listed as such."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from progrpo.imports.account import (
    MOST_SETTINGS,
    UNIPC_LEVELS,
    Near,
    Outcome,
    Rule,
    Setting,
    Translation,
    choice,
    content_of,
    continued_lora,
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
from progrpo.messages import named, quoted

# What holds where a file is silent and ours would be another. Those of an objective hold for it alone.
_DEFAULTS: dict[str, Any] = {
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
_DEFAULTS_OF: dict[str, dict[str, Any]] = {
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
    "train.learning_rate": "learning_rate",
    "train.adam_weight_decay": "weight_decay",
    "train.adam_betas": "betas",
    "train.adam_epsilon": "eps",
    "train.max_grad_norm": "max_grad_norm",
}

_UNREGISTERED = "it has none of this name of its own, and what yours returns is not known here"
REWARDS = {
    "pickscore": Near("pickscore"),
    "clip": Near(
        "clipscore",
        1 / 2.5,
        "theirs is the cosine with the prompt, and of a video's first frame; ours is 2.5 times that, with 'A photo depicts '"
        " before the prompt, and never below 0",
    ),
    "ocr": Near(
        "ocr",
        differs="theirs has had the whole prompt as its target, or a mean over quotes by the longer text; ours is"
        " 1 - edits / length of what the prompt has in quotes",
    ),
    "geneval": Near(
        "geneval",
        differs="theirs is the mean over clauses of the least of number and colour, with a place by centres alone; both are in 0..1",
    ),
    "vllm_evaluate": Near(
        "vlm",
        differs="theirs is P(yes) / (P(yes) + P(no)) of 'Is it a beautiful image?', without the prompt; ours a mark of 0 to 10, over"
        " 10, for which a column `question` says what is asked",
    ),
    **{name: Near(name, differs=_UNREGISTERED) for name in ("hpsv2", "imagereward", "aesthetic", "clipscore")},
}  # in small letters, as it looks them up
_NOT_BUILT_IN = {
    "pickscore_rank": "PickScore's rank in its group over the group's size: a function with `groupwise = True`",
    "clap": "of sound",
    "imagebind": "of sound",
    "rational_rewards_t2i": "a judge's marks, from a server",
    "rational_rewards_edit": "a judge's marks, from a server",
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
    # it also names img_mlp.net.2.proj and txt_mlp.net.2.proj, which are no layers
    "qwen-image": (*_ATTENTION, "img_mlp.net.0.proj", "txt_mlp.net.0.proj"),
    "wan2_t2v": (*_WAN, "ffn.net.0.proj", "ffn.net.2"),
}
"""Its types of models that have a policy here, and the layers that `target_modules: default` is of each."""

# Its settings of the average that nft, awm and dgpo compare with, at the values that ours has.
_AVERAGES: dict[str, dict[str, Any]] = {
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
    """The configuration that a YAML file asks for, and what became of each setting. ValueError, one sentence, if it cannot be read or run."""
    file = Path(path)
    settings = {name: _number_if_one(value) for name, value in _read(file).items()}
    trainer = settings.get("train.trainer_type", "grpo")
    if isinstance(trainer, str):
        trainer = trainer.lower()  # as it looks them up
    if not isinstance(trainer, str) or trainer not in _DEFAULTS_OF:
        raise ValueError(
            f"{named(file)}: train.trainer_type {quoted(trainer)} has no equal here; there are {', '.join(_DEFAULTS_OF)}"
        )
    defaults = {**_DEFAULTS, **_DEFAULTS_OF[trainer], **{f"optimizers[0].{n}": v for n, v in _OPTIMIZER.items()}}
    silent = {name: value for name, value in defaults.items() if name not in settings}
    if "train.trainer_type" in settings:
        settings["train.trainer_type"] = trainer
    if str(settings.get("model.model_type")).lower() == "wan2_t2v":
        silent["scheduler.levels"] = "UniPC's"
    return translate(file, {**settings, **silent}, RULES, defaults=silent)


class _Loader(yaml.SafeLoader):
    """The safe one, for which a list of objects that are merged (`<<`) into one is no work without end."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_SETTINGS:
            raise ValueError("too many objects are merged into one another")


def _read(path: Path) -> dict[str, Any]:
    """Its settings by their dotted names."""
    content = content_of(path)
    try:
        data = yaml.load(content, _Loader)
        if not isinstance(data, dict) or not data:
            raise ValueError("it holds no settings by name")
        settings = flattened(_in_one_shape(data))
        return {re.sub(r"(rewards\[\d+\]\.weight)\.(.*)", r"\1[\2]", name): value for name, value in settings.items()}
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{named(path)} is no settings file: {' '.join(str(error).split())[:200]}") from None


def _in_one_shape(data: dict[Any, Any]) -> dict[Any, Any]:
    """Older files in the shape of newer ones: one reward or data set without a list, and the optimizer's settings under `train`."""
    data = {str(key): value for key, value in data.items()}
    for one, many in (("reward", "rewards"), ("rewards", "rewards"), ("eval_rewards", "eval_rewards")):
        if isinstance(data.get(one), dict):
            data[many] = [data.pop(one)]
    train = data.get("train")
    if isinstance(train, dict) and "optimizers" not in data:
        old = {new: train[key] for name, new in _OLD_OPTIMIZER.items() if (key := name.partition(".")[2]) in train}
        data["train"] = {key: value for key, value in train.items() if f"train.{key}" not in _OLD_OPTIMIZER}
        if old:
            data["optimizers"] = [old]
    if isinstance(train, dict) and "beta_dpo" in train:
        train = data["train"] = {
            "dpo_beta" if key == "beta_dpo" else key: value for key, value in data["train"].items()
        }
    files = data.get("data")
    if isinstance(files, dict) and "dataset_dir" in files and "datasets" not in files:
        rest = {key: value for key, value in files.items() if key != "dataset_dir"}
        data["data"] = {"datasets": [{"dataset_dir": files["dataset_dir"]}], **rest}
    return data


def _number_if_one(value: Any) -> Any:
    """1e-4 is a text in YAML 1.1, and a number to whoever wrote it."""
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?\d{1,20}(\.\d{0,20})?[eE][-+]?\d{1,3}", value)
    return float(value) if is_number else value


# --- rules ------------------------------------------------------------------------------------------------------------


def _trainer(setting: Setting) -> str:
    return str(setting.all["train.trainer_type"])


def _objective(setting: Setting) -> str:
    return _trainer(setting).removesuffix("-guard")


def _of_objective(field: str, *trainers: str) -> Rule:
    """The field of that name of the objective in use, if it is one of these."""

    def rule(setting: Setting) -> Outcome:
        if trainers and _objective(setting) not in trainers:
            return not_needed(f"{_trainer(setting)} does not read it")
        return sets({f"objective.{_objective(setting)}.{field}": setting.value})

    return rule


def _trainer_type(setting: Setting) -> Outcome:
    fields = {"objective.name": _objective(setting)}
    if setting.value == "grpo-guard":
        fields["objective.grpo.ratio"] = "guard"
    return sets(fields)


def _end(setting: Setting, start: Callable[[float], float]) -> float | None:
    """Of a range that begins where `start(end)` says, or one number for it; None for another range."""
    if isinstance(setting.value, list):
        low, high = setting.value if len(setting.value) == 2 else (None, None)
        return float(high) if isinstance(high, int | float) and low == start(high) else None
    return setting.number()


def _symmetric(setting: Setting) -> float | None:
    """What bounds both sides alike."""
    return _end(setting, lambda end: -end)


def _clip_range(setting: Setting) -> Outcome:
    bound, objective = _symmetric(setting), _objective(setting)
    if objective == "nft":
        return not_needed("nft does not read it")
    if bound is None:
        return no_equal("both sides are clipped alike here; ours is the published one")
    return sets({f"objective.{objective}.clip_range": bound})


def _adv_clip_range(setting: Setting) -> Outcome:
    bound = _symmetric(setting)
    if bound is None:
        return no_equal("both sides are clipped alike here")
    return sets({f"objective.{_objective(setting)}.adv_clip_max": bound})


def _kl_type(setting: Setting) -> Outcome:
    form = setting.one_of({"x-based": "latent", "v-based": "velocity"})
    if _objective(setting) == "grpo":
        return sets({"objective.grpo.kl_form": form})
    return not_needed("velocities here, too") if form == "velocity" else no_equal("velocities are compared here")


def _aggregation(setting: Setting) -> Outcome:
    if setting.one_of({"sum": False, "gdpo": True}):
        return translated(objective__advantage="gdpo", note="whose std is the batch's")
    return sets({"objective.advantage": "batch" if setting.all.get("train.global_std") else "group"})


def _global_std(setting: Setting) -> Outcome:
    if setting.all.get("train.advantage_aggregation") == "gdpo":
        return not_needed("gdpo normalises by group, then by batch")
    return Outcome("translated", "counted in objective.advantage")


def _size(setting: Setting, part: str) -> list[Any]:
    """Height and width under `train` or `eval`: those of the resolution, of which one number is a square, unless they are given themselves."""
    # 1024 where it is not said (of an evaluation), 512 where it is empty
    told = setting.all.get(f"{part}.resolution", 1024) or 512
    sides = told if isinstance(told, list) else [told]
    given = (setting.all.get(f"{part}.{side}") for side in ("height", "width"))
    return [side if own is None else own for side, own in zip((sides[0], sides[:2][-1]), given, strict=True)]


def _resolution(setting: Setting) -> Outcome:
    height, width = _size(setting, "train")
    return sets({"model.resolution": height if height == width else [height, width]})


def _side(setting: Setting) -> Outcome:
    if setting.value is None:
        return not_needed("train.resolution says it")
    return Outcome("translated", "counted in model.resolution")


def _eval_size(setting: Setting) -> Outcome:
    same = _size(setting, "eval") == _size(setting, "train")
    return (
        not_needed("evaluations have the size of training")
        if same
        else no_equal("evaluations have the size of training")
    )


def _eval_frames(setting: Setting) -> Outcome:
    if setting.value in (None, setting.all.get("train.num_frames")):
        return not_needed("evaluations have the length of training")
    return no_equal("evaluations have the length of training")


def _guidance(setting: Setting) -> Outcome:
    fields = {"sampling.guidance_scale": max(1.0, setting.number())}
    model = str(setting.all.get("model.model_name_or_path")).lower()
    # FLUX.2 klein is guided by a pair of calls
    if "flux" in model and "klein" not in model and setting.number() > 1:
        fields["sampling.embedded_guidance"] = True
    return sets(fields)


def _microbatch(setting: Setting) -> Outcome:
    return translated(sampling__microbatch=setting.value, optim__microbatch=setting.value)


def _steps_of_epoch(setting: Setting) -> Outcome:
    if setting.all.get("train.gradient_accumulation_steps") == "auto":
        return sets({"optim.updates_per_rollout": setting.value})
    return not_needed("gradient_accumulation_steps says so instead")


def _accumulation(setting: Setting) -> Outcome:
    if setting.value == "auto":
        return not_needed("gradient_step_per_epoch says so")
    pictures = setting.count("train.unique_sample_num_per_epoch") * setting.count("train.group_size")
    batches = pictures // (setting.count("train.per_device_batch_size") * setting.count("num_processes"))
    return sets(
        {"optim.updates_per_rollout": max(1, batches // setting.count())}, f"{batches} batches of an epoch over it"
    )


def _iterations(setting: Setting) -> Outcome:
    if setting.value is None or setting.number() < 0:
        return sets({"iterations": 100_000}, "without end there; stop it by hand")
    return sets({"iterations": setting.value})


def _average(setting: Setting) -> Outcome:
    """A setting of the average that the objective compares with."""
    own = _AVERAGES.get(_objective(setting), {})
    if setting.name not in own:
        return not_needed(f"{_trainer(setting)} does not read it")
    here = own[setting.name]
    return not_needed("the same here") if setting.value == here else no_equal(f"{here} here, as published")


def _averages_for_evaluations(setting: Setting) -> bool:
    """Whether the average that `train.ema_decay` speaks of is for evaluations alone."""
    return _objective(setting) in ("grpo", "dgpo")


def _ema_decay(setting: Setting) -> Outcome:
    if _objective(setting) == "awm":
        return _awm_average(setting)
    if not _averages_for_evaluations(setting):
        return _average(setting)
    decay, every = setting.number(), setting.count("train.ema_update_interval")
    each = round(decay ** (1 / every), 6) if 0 < decay < 1 else decay
    return sets({"optim.ema_decay": each}, f"{decay:g} at every {every} epochs there")


def _awm_average(setting: Setting) -> Outcome:
    """A decay that rises to this over `warmup_steps` epochs in equal steps, if its schedule is that one."""
    if not _rises_in_equal_steps(setting):
        return no_equal("the average that awm compares with has a decay of min(.0003 n, .3) here after epoch n")
    ramp = round(setting.number() / setting.count("train.warmup_steps"), 9)
    return sets({"objective.awm.average_limit": setting.number(), "objective.awm.average_ramp": ramp})


def _ema_interval(setting: Setting) -> Outcome:
    if not _averages_for_evaluations(setting):
        return _average(setting)
    return Outcome("translated", "counted in optim.ema_decay")


def _ema_schedule(setting: Setting) -> Outcome:
    if not _averages_for_evaluations(setting):
        return _average(setting)
    same = setting.value in ("constant", "power")  # which begins lower, and is constant after some epochs
    return not_needed("the same here") if same else no_equal("an average has one decay")


def _rises_in_equal_steps(setting: Setting) -> bool:
    return setting.all.get("train.ema_decay_schedule") == "linear" and "train.warmup_steps" in setting.all


def _warmup(setting: Setting) -> Outcome:
    if _objective(setting) == "awm" and _rises_in_equal_steps(setting):
        return Outcome("translated", "counted in objective.awm.average_ramp")
    return not_needed("of a schedule that is not taken")


def _off_policy(setting: Setting) -> Outcome:
    """NFT draws its pictures from the old policy here, and the others from the weights in training."""
    nft = _objective(setting) == "nft"
    if bool(setting.value) is nft:
        return not_needed("the same here")
    return no_equal(f"pictures are from the {'old policy' if nft else 'weights in training'} here")


def _latent_dtype(setting: Setting) -> Outcome:
    names = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
    if setting.value is None:
        return no_equal("latents are kept in float32, or in what sampling.latent_dtype says")
    return sets({"sampling.latent_dtype": setting.one_of(names)})


def _is_ode(setting: Setting) -> bool:
    return setting.all.get("scheduler.dynamics_type") == "ODE"


def _dynamics(setting: Setting) -> Outcome:
    if _is_ode(setting):
        return translated(sampling__sde_window="none")
    return sets(
        {"sampling.sampler": setting.one_of({"flow-sde": "flow_grpo", "dance-sde": "dance", "cps": "cps_reduced"})}
    )


def _noise_level(setting: Setting) -> Outcome:
    return not_needed("the ODE adds none") if _is_ode(setting) else sets({"sampling.noise_level": setting.value})


def _noisy_steps(setting: Setting) -> Outcome:
    """So many steps, drawn from a list for each epoch; ours lie side by side."""
    if _is_ode(setting):
        return not_needed("the ODE adds no noise")
    last = setting.count("train.num_inference_steps") - 1
    pool = setting.all.get("scheduler.sde_steps") or list(range(last))
    if not isinstance(pool, list) or not all(isinstance(step, int) for step in pool):
        raise ValueError(f"scheduler.sde_steps must be a list of steps, not {quoted(pool)}")
    size = setting.count()
    if size >= last:
        return sets({"sampling.sde_window": "all"})
    end = min(max(pool) + 1, last)
    fields = {"sampling.sde_window": "random", "sampling.sde_window_size": size, "sampling.sde_window_end": end}
    return sets(fields, "side by side here, drawn one by one there")


def _pool(setting: Setting) -> Outcome:
    if _is_ode(setting) or setting.value is None:
        return not_needed("all but the last step")
    first = (
        min((step for step in setting.value if isinstance(step, int)), default=0)
        if isinstance(setting.value, list)
        else 0
    )
    if first > 0:
        return no_equal(f"sampling.sde_window_end is from it, but windows may begin before step {first} here")
    return Outcome("translated", "counted in sampling.sde_window_end")


def _model(setting: Setting) -> Outcome:
    if re.search(r"wan\W?2\W2", setting.text().lower()):
        raise ValueError(
            f"model.model_name_or_path {quoted(setting.value)} is a Wan 2.2, of two networks, which cannot be trained here"
        )
    return sets({"model.path": setting.value})


def _model_type(setting: Setting) -> Outcome:
    if setting.value is not None and str(setting.value).lower() not in _DEFAULT_TARGETS:
        raise ValueError(
            f"model.model_type {quoted(setting.value)} is of models that cannot be trained here; there are"
            f" {', '.join(_DEFAULT_TARGETS)}"
        )
    return not_needed("told from the model itself")


def _source_size(setting: Setting) -> Outcome:
    if "kontext" in str(setting.all.get("model.model_name_or_path")).lower():
        return not_needed("pictures to change have the size that the model's pipeline gives them")
    return no_equal("FLUX.1 Kontext alone is given pictures here; other models make theirs from the prompt")


def _frames(setting: Setting) -> Outcome:
    frames = setting.value
    every = isinstance(frames, int) and 1 <= frames <= 1024
    fields = {"model.frames": frames, **({"reward.frames": frames} if every else {})}
    return sets(fields, "its rewards score every frame of a video")


def _lora_rank(setting: Setting) -> Outcome:
    if setting.all.get("model.finetune_type") != "lora":
        return not_needed("all weights are trained")
    fields = {"model.lora_rank": setting.value}
    if setting.all.get("model.lora_alpha") is None:
        fields["model.lora_alpha"] = 2 * setting.count()
    return sets(fields)


def _lora_alpha(setting: Setting) -> Outcome:
    if setting.all.get("model.finetune_type") != "lora":
        return not_needed("all weights are trained")
    return not_needed("twice the rank") if setting.value is None else sets({"model.lora_alpha": setting.value})


_RESUMING = "progrpo train --resume goes on with runs of its own"


def _resumes_lora(setting: Setting) -> bool:
    kind = setting.all.get("model.resume_type") or setting.all.get("model.finetune_type")
    return kind == "lora" == setting.all.get("model.finetune_type")


def _resumed(setting: Setting) -> Outcome:
    if setting.value is None:
        return not_needed("nothing to resume")
    return continued_lora(setting) if _resumes_lora(setting) else no_equal(_RESUMING)


def _resume_type(setting: Setting) -> Outcome:
    if setting.all.get("model.resume_path") is None:
        return not_needed("nothing to resume")
    return Outcome("translated", "counted in model.lora") if _resumes_lora(setting) else no_equal(_RESUMING)


def _targets(setting: Setting) -> Outcome:
    if setting.all.get("model.finetune_type") != "lora":
        return not_needed("all weights are trained")
    if isinstance(setting.value, list):
        return sets({"model.lora_targets": setting.value})
    layers = _DEFAULT_TARGETS.get(str(setting.all.get("model.model_type")).lower())
    if setting.value == "default" and layers:
        return sets({"model.lora_targets": list(layers)})
    if setting.value in ("default", "all"):
        return no_equal(
            "attention and feed-forward of both streams, our default; model.lora_targets takes another list"
        )
    return sets({"model.lora_targets": [setting.value]})


def _dataset(setting: Setting) -> Outcome:
    if setting.name != "data.datasets[0].dataset_dir":
        return no_equal("one data set is read here; put them into one file")
    folder = Path(os.path.expanduser(setting.text()))
    # as os.path asks: Path's own raise at no such user and at a name that is too long
    is_text = os.path.isfile(folder / "train.txt") and not os.path.isfile(folder / "train.jsonl")
    end = ".txt" if is_text else ".jsonl"
    return sets({"prompts.source": str(folder / f"train{end}"), "eval.prompts": str(folder / f"test{end}")})


def _near(setting: Setting) -> Near | None:
    """Ours; under gdpo without its scale, which is divided out there."""
    near = REWARDS.get(setting.text().lower())
    scaled = setting.all.get("train.advantage_aggregation") != "gdpo"
    return near if near is None or scaled else replace(near, factor=1.0)


def _reward_name(setting: Setting) -> str:
    """Ours, or that of a function which the user writes."""
    last = re.split(r"[.:/]", setting.text())[-1]
    near = _near(setting)
    return near.name if near else f"my_rewards:{last if last.isidentifier() else 'reward'}"


def _applies(setting: Setting) -> bool:
    """Whether a reward is one of the data set that is read."""
    sets_of_it = setting.all.get(setting.name.rpartition(".")[0] + ".applicable_datasets")
    return not isinstance(sets_of_it, list) or setting.all.get("data.datasets[0].name") in sets_of_it


def _reward(setting: Setting) -> Outcome:
    own = _reward_name(setting)
    if not _applies(setting):
        return no_equal(
            f"of other data sets than the one that is read, {named(setting.all.get('data.datasets[0].name'))}"
        )
    trained = [
        Setting(n, v, setting.all) for n, v in setting.all.items() if re.fullmatch(r"rewards\[\d+\]\.reward_model", n)
    ]
    if setting.name.startswith("eval_") and own in [_reward_name(other) for other in trained if _applies(other)]:
        return not_needed("what is trained on is measured at every evaluation")
    what = _NOT_BUILT_IN.get(setting.text().lower(), "")
    return reward_outcome(_place(setting), own, _near(setting), _reward_weight(setting), what)


def _reward_weight(setting: Setting) -> float | None:
    """The outcome for a reward that is trained on, in the data set that is read."""
    if setting.name.startswith("eval_"):
        return None
    head = setting.name.rpartition(".")[0] + ".weight"
    names = head, f"{head}[{setting.all.get('data.datasets[0].name')}]"
    return next((setting.number(name) for name in names if name in setting.all), 1.0)


def _weight(setting: Setting) -> Outcome:
    if setting.name.startswith("eval_"):
        return not_needed("what is measured alone has no weight")
    if (refused := _beside(setting)) is not None:
        return refused
    return Outcome("translated", f"counted in {_place(setting)}.weight")


def _weight_of_set(setting: Setting) -> Outcome:
    own = setting.name.endswith(f"[{setting.all.get('data.datasets[0].name')}]")
    return _weight(setting) if own else not_needed("of a data set that is not read")


def _beside(setting: Setting) -> Outcome | None:
    """What becomes of a setting whose reward is not taken, or measured as it is trained on; None of another's."""
    head = re.sub(r"(\[\d+\]).*", r"\1", setting.name)
    model = setting.all.get(f"{head}.reward_model")
    if model is None:
        return not_needed("there is no reward beside it")
    reward = Setting(f"{head}.reward_model", model, setting.all)
    if not _applies(reward):
        return not_needed("its reward is not taken")
    return (
        not_needed("this reward is measured as it is trained on") if _reward(reward).fate == "not needed here" else None
    )


def _reward_field(field: str, names: Mapping[str, Any] | None = None) -> Rule:
    """A setting of a reward that ours has, too; of one that is only evaluated, where it is not trained on as well."""

    def rule(setting: Setting) -> Outcome:
        if (refused := _beside(setting)) is not None:
            return refused
        value = setting.one_of(names) if names else setting.value
        return sets({f"{_place(setting)}.{field}": value})

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
    if str(model).lower() != "pickscore" or _beside(setting) is not None:
        return _reward_field("dtype", _DTYPES)(setting)
    return sets({f"{_place(setting)}.dtype": "float32"}, "its PickScore computes in float32 whatever this says")


def _of_judge(field: str) -> Rule:
    """A setting of the server that `vlm` asks."""

    def rule(setting: Setting) -> Outcome:
        model = setting.all.get(setting.name.rpartition(".")[0] + ".reward_model")
        if str(model).lower() != "vllm_evaluate":
            return no_equal("of a reward that you write")
        return _reward_field(field)(setting)

    return rule


def _place(setting: Setting) -> str:
    index = re.findall(r"\[(\d+)\]", setting.name)[0]
    return f"{'eval.rewards' if setting.name.startswith('eval_') else 'reward.terms'}[{index}]"


def _first_optimizer(rule: Rule) -> Rule:
    return lambda s: rule(s) if s.name.startswith("optimizers[0].") else no_equal("there is one optimizer")


def _draws(setting: Setting) -> Outcome:
    objective = _objective(setting)
    if objective == "grpo":
        return not_needed("grpo trains the noisy steps")
    if setting.value in (None, 0):
        share = Setting("train.timestep_range", setting.all.get("train.timestep_range"), setting.all)
        draws = max(1, int(setting.count("train.num_inference_steps") * (_from_the_start(share) or 1)))
        return sets({f"objective.{objective}.draws": draws}, "all steps of train.timestep_range")
    return sets({f"objective.{objective}.draws": setting.value})


def _from_the_start(setting: Setting) -> float | None:
    """The share of the grid from its noisy end, where the range begins there."""
    return _end(setting, lambda end: 0)


def _range(setting: Setting) -> Outcome:
    objective, share = _objective(setting), _from_the_start(setting)
    if objective == "grpo":
        return not_needed("grpo trains the noisy steps")
    if share is None:
        return no_equal("noise levels are drawn from the grid's noisy end on")
    return sets({f"objective.{objective}.time_fraction": share})


def _weighting(setting: Setting) -> Outcome:
    if _objective(setting) != "awm":
        return not_needed(f"{_trainer(setting)} does not read it")
    names = {"uniform": "uniform", "t": "t", "t2": "t2", "t**2": "t2", "huber": "huber", "ghuber": "ghuber"}
    ours = names.get(str(setting.value).lower())
    return sets({"objective.awm.weighting": ours}) if ours else no_equal("uniform, our default")


_PLACE = "progrpo train --out says where a run is kept"
_LAUNCH = "accelerate launch or torchrun starts the processes"
_LOADING = "prompts are read at once, and encoded at the start"
_CURRENT = "pictures are from the weights in training"
_ON_DEVICE = "they stay on the run's device"
_ONE = "one data set is read"

RULES: dict[str, Rule] = {
    "launcher": ignored(_LAUNCH),
    "config_file": ignored(_LAUNCH),
    "num_processes": ignored(_LAUNCH),
    "main_process_port": ignored(_LAUNCH),
    "mixed_precision": precision,
    "run_name": ignored(_PLACE),
    "project": ignored(_PLACE),
    "logging_backend": ignored("metrics go to the run folder and its report"),
    "model.model_name_or_path": _model,
    "model.model_type": _model_type,
    "model.finetune_type": choice("model.weights", {"lora": "lora", "full": "full"}),
    "model.lora_rank": _lora_rank,
    "model.lora_alpha": _lora_alpha,
    "model.target_modules": _targets,
    "model.target_components": only(
        "transformer", ["transformer"], why="the denoiser is what is trained", otherwise="the denoiser alone is trained"
    ),
    "model.master_weight_dtype": only(
        "fp32", "float32", why="the same here", otherwise="trained weights are kept in float32"
    ),
    "model.resume_path": _resumed,
    "model.resume_type": _resume_type,
    "log.run_name": ignored(_PLACE),
    "log.project": ignored(_PLACE),
    "log.logging_backend": ignored("metrics go to the run folder and its report"),
    "log.save_dir": ignored(_PLACE),
    "log.save_freq": lambda s: (
        no_equal("checkpoints cannot be turned off") if s.value == 0 else sets({"checkpoint.every": s.value})
    ),
    "log.save_model_only": ignored("a checkpoint is the whole state, so that runs can go on"),
    "data.datasets[].dataset_dir": _dataset,
    "data.datasets[].name": ignored("a label"),
    "data.datasets[].train.weight": ignored(_ONE),
    "data.datasets[].train.max_dataset_size": only(
        None, why="the whole file", otherwise="the whole file is used; cut it"
    ),
    "data.datasets[].eval": ignored(_ONE),
    "data.max_dataset_size": only(None, why="the whole file", otherwise="the whole file is used; cut it"),
    "data.preprocessing_batch_size": ignored(_LOADING),
    "data.dataloader_num_workers": ignored(_LOADING),
    "data.enable_preprocess": ignored(_LOADING),
    "data.force_reprocess": ignored(_LOADING),
    "data.cache_dir": ignored(_LOADING),
    "data.sampler_type": ignored("groups are dealt to processes without a rule for their number"),
    "data.sampler_subgroup_size": ignored("groups are dealt to processes without a rule for their number"),
    "train.trainer_type": _trainer_type,
    "train.resolution": _resolution,
    "train.height": _side,
    "train.width": _side,
    "train.num_frames": _frames,
    "train.frame_rate": ignored("a video's frames are what is trained on"),
    "train.condition_image_size": _source_size,
    "train.auto_resize": _source_size,
    "train.num_inference_steps": to("sampling.num_inference_steps"),
    "train.guidance_scale": _guidance,
    "train.max_epochs": _iterations,
    "train.per_device_batch_size": _microbatch,
    "train.group_size": lambda s: translated(
        plan__preset="custom", plan__group_size=s.value, note="no pruning; --plan.preset standard prunes"
    ),
    "train.unique_sample_num_per_epoch": to("prompts.per_iteration"),
    "train.gradient_step_per_epoch": _steps_of_epoch,
    "train.gradient_accumulation_steps": _accumulation,
    "train.num_inner_epochs": only(
        1, why="each picture is trained on once", otherwise="each picture is trained on once"
    ),
    "train.global_std": _global_std,
    "train.advantage_aggregation": _aggregation,
    "train.clip_range": _clip_range,
    "train.adv_clip_range": _adv_clip_range,
    "train.kl_type": _kl_type,
    "train.kl_beta": _of_objective("kl_beta"),
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
    "train.adv_eps": to("objective.adv_eps", "stds are at least that there, and not settable"),
    "train.clip_kl": only(False, why="off", otherwise="the distance to the reference is not clipped"),
    "train.switch_ema_ref": lambda s: (
        no_equal(_CURRENT) if _objective(s) == "dgpo" else not_needed(f"{_trainer(s)} does not read it")
    ),
    "train.kl_cfg": only(1, why="the reference is not guided", otherwise="the reference is not guided"),
    "train.use_ema_ref": only(
        False, why="the reference is the model at its start", otherwise="the reference is the model at its start"
    ),
    "train.kl_weight": only(
        "Uniform", why="the same here", otherwise="distances to the reference count alike at all times"
    ),
    "train.time_sampling_strategy": only(
        "discrete", why="of the grid", otherwise="levels of the sampling grid are drawn"
    ),
    "train.time_shift": ignored("of logit-normal times alone"),
    "train.ghuber_power": lambda s: (
        sets({"objective.awm.huber_power": s.value})
        if _objective(s) == "awm"
        else not_needed(f"{_trainer(s)} does not read it")
    ),
    "train.enable_gradient_checkpointing": to("model.activation_checkpointing"),
    "train.latent_storage_dtype": _latent_dtype,
    "train.offload_samples_to_cpu": only(False, why="off", otherwise="an iteration's latents stay on the device"),
    "train.shuffle_samples": ignored("microbatches mix steps and trajectories"),
    "train.reward_optimization_overlap": only(
        False, why="off", otherwise="reward.waves scores while the next pictures are sampled"
    ),
    "train.reward_optimization_overlap_mode": ignored("of an overlap that is not there"),
    "train.reward_optimization_overlap_poll_interval": ignored("of an overlap that is not there"),
    "train.seed": to("seed"),
    "train.nft_beta": _of_objective("beta", "nft"),
    "train.ema_kl_beta": _of_objective("average_beta", "awm"),
    "train.awm_weighting": _weighting,
    "train.dpo_beta": _of_objective("dpo_beta", "dgpo"),
    "train.num_train_timesteps": _draws,
    "train.timestep_range": _range,
    "train.use_shared_noise": only(True, why="a group shares its noise", otherwise="a group shares its noise"),
    "train.clip_dsm": only(True, why="the loss is clipped", otherwise="the loss is clipped"),
    "train.off_policy": _off_policy,
    "scheduler.dynamics_type": _dynamics,
    "scheduler.noise_level": _noise_level,
    "scheduler.num_sde_steps": _noisy_steps,
    "scheduler.sde_steps": _pool,
    "scheduler.seed": ignored("windows follow from the run's seed"),
    "scheduler.flow_shift": to("sampling.shift"),
    "scheduler.levels": lambda s: no_equal(UNIPC_LEVELS),
    "eval.resolution": _eval_size,
    "eval.height": _eval_size,
    "eval.width": _eval_size,
    "eval.num_frames": _eval_frames,
    "eval.condition_image_size": _source_size,
    "eval.auto_resize": _source_size,
    "eval.num_inference_steps": to("eval.num_inference_steps"),
    "eval.guidance_scale": lambda s: sets({"eval.guidance_scale": max(1.0, s.number())}),
    "eval.per_device_batch_size": ignored("evaluations take sampling.microbatch"),
    "eval.eval_freq": to("eval.every"),
    "eval.seed": lambda s: (
        not_needed("the same noise at every evaluation") if s.value is None else sets({"eval.seed": s.value})
    ),
    "rewards[].name": ignored("a label"),
    "rewards[].reward_model": _reward,
    "rewards[].weight": _weight,
    "rewards[].weight[]": _weight_of_set,
    "rewards[].applicable_datasets": ignored("of the data set that is read, or not"),
    "rewards[].batch_size": _reward_field("batch_size"),
    "rewards[].device": _reward_field("device"),
    "rewards[].dtype": _reward_dtype,
    "rewards[].async_reward": ignored("reward.waves scores while the next pictures are sampled"),
    "rewards[].num_workers": ignored("reward.waves scores while the next pictures are sampled"),
    "rewards[].api_base_url": _of_judge("url"),
    "rewards[].vlm_model": _of_judge("model"),
    "rewards[].timeout": _of_judge("timeout"),
    "rewards[].max_retries": _of_judge("retries"),
    "rewards[].api_key": ignored("OPENAI_API_KEY in the environment is read"),
    "rewards[].max_concurrent": ignored("as many as batch_size says are asked about at once"),
    "rewards[].top_logprobs": ignored("marks are read, and not probabilities"),
    "rewards[].canonicalize": ignored("marks are read, and not probabilities"),
    "optimizers[].name": ignored("a label"),
    "optimizers[].learning_rate": _first_optimizer(to("optim.lr")),
    "optimizers[].weight_decay": _first_optimizer(to("optim.weight_decay")),
    "optimizers[].betas": _first_optimizer(to("optim.betas")),
    "optimizers[].eps": _first_optimizer(only(1e-8, why="the same here", otherwise="1e-8 here")),
    "optimizers[].max_grad_norm": _first_optimizer(to("optim.max_grad_norm")),
}
RULES |= {f"eval_{name}": rule for name, rule in RULES.items() if name.startswith("rewards[]")}
