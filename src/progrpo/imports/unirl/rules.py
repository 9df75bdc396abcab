"""The rule of each setting of UniRL by its dotted name."""

from __future__ import annotations

import os
import re

from progrpo.imports.translation import (
    NearestReward,
    Outcome,
    Rule,
    Setting,
    counted_in,
    ignored,
    no_equal,
    not_needed,
    only_at,
    reward_outcome,
    to_choice,
    to_field,
    to_fields,
)
from progrpo.messages import quoted

ALGORITHMS = {"FlowGRPO": "grpo", "DiffusionNFT": "nft"}
"""UniRL's algorithms that have an objective here, by the name of their class."""
_MODELS = (
    *("sd3", "qwen_image", "qwen_image21", "qwen_image_edit_plus", "flux2_klein", "z_image", "wan21", "wan22"),
    *("hunyuan_video", "hunyuan_video10", "hunyuan_video15"),
)
"""The models that have a policy here, by the name of their package."""
_OWN_SHIFT = ("qwen_image", "flux2_klein")
"""Models whose shift follows from the size, and for which the setting is not read, by the beginning of their name."""
_KERNELS = {"FlowSDEStrategy": "flow_grpo", "DanceSDEStrategy": "dance", "CPSSDEStrategy": "cps_reduced"}
_FIRST_FRAME = "there a video's first frame is scored, here every frame"
_NOT_COMPARED = "its scale has not been compared with ours"
REWARDS = {
    "PickScoreRewardScorer": NearestReward("pickscore"),
    "VideoPickScoreScorer": NearestReward("pickscore", difference=_FIRST_FRAME),
    "HPSv2RewardScorer": NearestReward("hpsv2"),
    "HPSv3RewardScorer": NearestReward("hpsv3", difference=_NOT_COMPARED),
    "ImageRewardScorer": NearestReward("imagereward", difference=_NOT_COMPARED),
    "AestheticRewardScorer": NearestReward("aesthetic", difference=_NOT_COMPARED),
    "ClipRewardScorer": NearestReward("clipscore", difference=_NOT_COMPARED),
    "OCRRewardScorer": NearestReward("ocr", difference=_NOT_COMPARED),
}
_DTYPES = {
    **{"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16"},
    **{"fp32": "float32", "float32": "float32"},
}
_STEPS = "sampling.num_inference_steps"


def _class(setting: Setting) -> str:
    """The name of the class that a `_target_` names."""
    return setting.text().rpartition(".")[2]


def _objective(setting: Setting) -> str:
    return ALGORITHMS[str(setting.all["algorithm._target_"]).rpartition(".")[2]]


def _model(setting: Setting) -> str:
    """The name of the model's package, from the class of its bundle."""
    found = re.search(r"\.models\.(\w+)\.", str(setting.all["bundle._target_"]))
    return found.group(1) if found else str(setting.all["bundle._target_"])


def _bundle(setting: Setting) -> Outcome:
    if _model(setting) not in _MODELS:
        raise ValueError(
            f"{setting.name} is of {quoted(_model(setting))}, which cannot be trained here; there are"
            f" {', '.join(_MODELS)}"
        )
    return not_needed("read from the model itself")


def _path(setting: Setting) -> Outcome:
    if "ti2v" in setting.text().lower():
        raise ValueError(
            f"{setting.name} {quoted(setting.value)} has a timestep for each place, as no policy here does"
        )
    return to_fields({"model.path": os.path.expanduser(setting.text())})


def _shift(setting: Setting) -> Outcome:
    if _model(setting).startswith(_OWN_SHIFT):
        return not_needed("the model's own shift follows from the size in both")
    return to_fields({"sampling.shift": setting.value})


def _algorithm(setting: Setting) -> Outcome:
    return to_fields({"objective.name": _objective(setting)})


def _kernel(setting: Setting) -> Outcome:
    if _adds_no_noise(setting):
        return not_needed("no step adds noise")
    if _class(setting) not in _KERNELS:
        raise ValueError(f"{setting.name} {quoted(_class(setting))} has no equal here; there are {', '.join(_KERNELS)}")
    return to_fields({"sampling.sampler": _KERNELS[_class(setting)]})


def _adds_no_noise(setting: Setting) -> bool:
    return setting.all.get("sampling.scheduler.num_sde_steps", 1) == 0 or setting.all.get("sampling.eta") == 0


def _of(objective: str, field: str) -> Rule:
    """The rule of a setting that is a field of this objective."""
    return lambda s: (
        to_fields({f"objective.{objective}.{field}": s.value}) if _objective(s) == objective else not_needed("not read")
    )


def _beta(setting: Setting) -> Outcome:
    if _objective(setting) == "nft":
        return to_fields({"objective.nft.beta": setting.value})
    return to_fields({"objective.grpo.kl_beta": setting.value, "objective.grpo.kl_form": "exact"})


def _reference(setting: Setting) -> Outcome:
    if setting.number() == 0:
        return to_fields({"objective.nft.kl_beta": 0.0})
    return no_equal("objective.nft.kl_beta weighs the same distance; it is 1e-4 unless you set it")


def _draws(setting: Setting) -> Outcome:
    draws = max(1, int(setting.count(_STEPS) * setting.number()))
    return to_fields({"objective.nft.draws": draws, "objective.nft.time_fraction": setting.value})


# --- LoRA -------------------------------------------------------------------------------------------------------------


def _rank(setting: Setting) -> Outcome:
    return to_fields({"model.weights": "lora", "model.lora_rank": setting.value})


def _has_shadow(setting: Setting) -> bool:
    """Whether the LoRA stands in the block that also keeps an old policy."""
    return "backend.ema_lora_cfg.rank" in setting.all


def _unless_shadow(rule: Rule) -> Rule:
    return lambda setting: not_needed("ema_lora_cfg is read") if _has_shadow(setting) else rule(setting)


def _full(setting: Setting) -> Outcome:
    """The outcome of a file without a LoRA."""
    if _has_shadow(setting):
        return not_needed("ema_lora_cfg is read")
    if _model(setting) == "wan22":
        raise ValueError("it has no backend.lora_cfg, and a Wan 2.2's two networks are trained by a LoRA here")
    return to_fields({"model.weights": "full"}, "no LoRA")


def _targets(setting: Setting) -> Outcome:
    if isinstance(setting.value, list):
        return to_fields({"model.lora_targets": setting.value})
    return no_equal("our default is used: attention and feed-forward; model.lora_targets takes a list of layers' names")


_LORA: dict[str, Rule] = {
    "rank": _rank,
    "alpha": to_field("model.lora_alpha"),
    "target_modules": _targets,
    "dropout": only_at(0, why="none", otherwise="a LoRA has no dropout"),
    "bias": only_at("none", why="none", otherwise="a LoRA has no bias"),
    "task_type": ignored("a matter of peft"),
    "shadow_adapter": ignored("the name of the old policy"),
    "timing": only_at("rollout_end", why="the same here", otherwise="averages follow after each iteration"),
    "ema_decay": ignored("its schedule decides"),
    "ema_decay_type": only_at("warmup", why="the same here", otherwise="min(.001 n, .5) here after iteration n"),
    "ema_flat_steps": only_at(0, why="the same here", otherwise="min(.001 n, .5) here after iteration n"),
    "ema_uprate": only_at(1e-3, why="the same here", otherwise="min(.001 n, .5) here after iteration n"),
    "ema_uphold": only_at(0.5, why="the same here", otherwise="min(.001 n, .5) here after iteration n"),
}

# --- sampling ---------------------------------------------------------------------------------------------------------


def _height(setting: Setting) -> Outcome:
    other = setting.all.get("sampling.width", setting.value)
    return to_fields({"model.resolution": setting.value if setting.value == other else [setting.value, other]})


def _frames(setting: Setting) -> Outcome:
    if setting.count() == 1:
        return not_needed("a picture")
    return to_fields({"model.frames": setting.value, "reward.frames": setting.value}, "rewards score every frame")


def _guidance(setting: Setting) -> Outcome:
    # Z-Image counts from 0 there
    scale = max(1.0, setting.number() + (_model(setting) == "z_image"))
    fields: dict[str, object] = {"sampling.guidance_scale": scale, "eval.guidance_scale": scale}
    if _model(setting) in ("hunyuan_video", "hunyuan_video10") and scale > 1:
        fields["sampling.embedded_guidance"] = True
    return to_fields(fields)


def _noise(setting: Setting) -> Outcome:
    if _adds_no_noise(setting):
        return not_needed("no step adds noise")
    return to_fields({"sampling.noise_level": setting.value})


def _pool(setting: Setting) -> tuple[float, int]:
    """The share of the grid at which the pool of noisy steps begins, and the step before which it ends."""
    share = setting.all.get("sampling.scheduler.timestep_fraction", 1.0)
    given = share if isinstance(share, list) and len(share) == 2 else (0.0, share)
    ends = [end for end in given if isinstance(end, int | float) and 0 <= end <= 1]
    if len(ends) != 2:
        raise ValueError(f"sampling.scheduler.timestep_fraction must lie in 0..1, not {quoted(share)}")
    return ends[0], min(int(setting.count(_STEPS) * ends[1]), setting.count(_STEPS) - 1)


def _noisy_steps(setting: Setting) -> Outcome:
    """The outcome of the number of noisy steps, which are drawn from a pool for each rollout; ours lie side by side."""
    if setting.value == 0:
        return to_fields({"sampling.sde_window": "none"})
    _, end = _pool(setting)
    size = end if setting.value is None else min(setting.count(), end)
    if size >= setting.count(_STEPS) - 1:
        return to_fields({"sampling.sde_window": "all"})
    if size == end:
        return to_fields({"sampling.sde_window": "first", "sampling.sde_window_size": size})
    fields = {"sampling.sde_window": "random", "sampling.sde_window_size": size, "sampling.sde_window_end": end}
    return to_fields(fields, "side by side here, drawn one by one there")


def _fraction(setting: Setting) -> Outcome:
    if "sampling.scheduler.num_sde_steps" not in setting.all or setting.all["sampling.scheduler.num_sde_steps"] == 0:
        return not_needed("there is no pool of steps")
    start, _ = _pool(setting)
    if start > 0:
        return no_equal("windows may begin before its first step here")
    return counted_in("sampling.sde_window_end")


def _window(setting: Setting) -> Outcome:
    windows = {"progressive": "sliding", "random": "random", "all": "all"}
    return to_fields({"sampling.sde_window": setting.one_of(windows)})


def _has_window(setting: Setting, *strategies: str) -> bool:
    return str(setting.all.get("sampling.scheduler.config.strategy", "all")) in strategies


def _window_size(setting: Setting) -> Outcome:
    if not _has_window(setting, "progressive", "random"):
        return not_needed("there is no window")
    return to_fields({"sampling.sde_window_size": setting.value})


def _interval(setting: Setting) -> Outcome:
    if not _has_window(setting, "progressive"):
        return not_needed("only for a window that slides")
    return to_fields({"sampling.sde_window_interval": setting.value})


def _overlap(setting: Setting) -> Outcome:
    if not _has_window(setting, "progressive"):
        return not_needed("only for a window that slides")
    one_step = setting.value == setting.count("sampling.scheduler.config.window_size") - 1
    why = "a window moves on by one step"
    return not_needed(why) if one_step else no_equal(why)


# --- rewards and data -------------------------------------------------------------------------------------------------


def _reward(setting: Setting) -> Outcome:
    name = _class(setting)
    nearest = REWARDS.get(name)
    own = nearest.name if nearest else f"my_rewards:{name if name.isidentifier() else 'reward'}"
    return reward_outcome("reward.terms[0]", own, nearest, 1.0)


def _reward_batch(setting: Setting) -> Outcome:
    return to_fields({"reward.terms[0].batch_size": setting.value})


def _file(field: str) -> Rule:
    """The rule of a prompt file."""

    def rule(setting: Setting) -> Outcome:
        fields = {field: os.path.expanduser(setting.text())}
        path = str(setting.all.get("bundle.config.pretrained_model_ckpt_path")).lower()
        if _model(setting) == "qwen_image_edit_plus" or "i2v" in path:
            return no_equal("a line's picture is under `media` there, and a path in its `image` here", fields)
        return to_fields(fields)

    return rule


def _save(setting: Setting) -> Outcome:
    if setting.number() <= 0:
        return no_equal("checkpoints cannot be turned off")
    return to_fields({"checkpoint.every": setting.value})


_RUN_FOLDER = "progrpo train --out names the run's folder"
_LAUNCH = "accelerate launch or torchrun starts the processes"
_SHARDING = "--model.shard and --model.offload say where weights lie"
_SAME = "the same as under `sampling`"
_OWN_NAMES = "its settings are listed by their own names"

RULES: dict[str, Rule] = {
    "num_devices": ignored(_LAUNCH),
    "batch_size": to_field("prompts.per_iteration"),
    "num_rollouts": to_field("iterations"),
    "adv_use_global_std": lambda s: to_fields({"objective.advantage": "batch" if s.value else "group"}),
    "save_interval": _save,
    "save_dir": ignored(_RUN_FOLDER),
    "load_dir": only_at(
        None, "", why="nothing to resume", otherwise="progrpo train --resume resumes its own runs only"
    ),
    "weight_sync_interval": only_at(1, why="the current weights sample", otherwise="the current weights sample here"),
    "bundle._target_": _bundle,
    "bundle.config": ignored(_OWN_NAMES),
    "pipeline.strategy": ignored(_OWN_NAMES),
    "bundle.config.pretrained_model_ckpt_path": _path,
    "bundle.config.model_precision": to_choice("model.dtype", _DTYPES),
    "bundle.config.shift": lambda s: counted_in("sampling.shift") if "pipeline.shift" in s.all else _shift(s),
    "bundle.config.max_sequence_length": lambda s: (
        counted_in("model.max_sequence_length")
        if "pipeline.max_sequence_length" in s.all
        else to_fields({"model.max_sequence_length": s.value})
    ),
    "pipeline.shift": _shift,
    "pipeline.max_sequence_length": to_field("model.max_sequence_length"),
    "pipeline.trajectory_precision": to_choice("sampling.latent_dtype", _DTYPES),
    "pipeline.logprob_precision": only_at("fp32", why="the same here", otherwise="log-probs are computed in float32"),
    "pipeline.strategy._target_": _kernel,
    "backend.trainable_attr": only_at("transformer", why="the same here", otherwise="the denoiser is trained"),
    "backend.fsdp_cfg.activation_checkpointing": to_field("model.activation_checkpointing"),
    "backend.fsdp_cfg.use_torch_compile": to_field("model.compile"),
    "backend.optimizer_cfg.learning_rate": to_field("optim.lr"),
    "backend.optimizer_cfg.adam_beta1": lambda s: to_fields(
        {"optim.betas": [s.number(), s.number("backend.optimizer_cfg.adam_beta2")]}
    ),
    "backend.optimizer_cfg.adam_beta2": lambda s: counted_in("optim.betas"),
    "backend.optimizer_cfg.adam_epsilon": only_at(1e-8, why="the same here", otherwise="1e-8 here"),
    "backend.optimizer_cfg.weight_decay": to_field("optim.weight_decay"),
    "backend.scheduler_cfg.type": only_at(
        "constant", why="the same here", otherwise="see optim.warmup and optim.decay"
    ),
    "backend.scheduler_cfg.warmup_steps": only_at(0, why="off", otherwise="optim.warmup counts iterations"),
    "backend.scheduler_cfg.total_steps": ignored("the rate is constant"),
    "backend.lora_cfg": _full,
    **{f"backend.lora_cfg.{name}": _unless_shadow(rule) for name, rule in _LORA.items()},
    **{f"backend.ema_lora_cfg.{name}": rule for name, rule in _LORA.items()},
    "rollout.forward_batch_size": to_field("sampling.microbatch"),
    "reward.backend._target_": _reward,
    "reward.backend.config.batch_size": _reward_batch,
    "algorithm._target_": _algorithm,
    "algorithm.clip_range": _of("grpo", "clip_range"),
    "algorithm.clip_schedule": only_at("constant", why="the same here", otherwise="the clip range is constant"),
    "algorithm.beta": _beta,
    "algorithm.old_logp_source": ignored("old log-probs are those of sampling, and compared with the update's own"),
    "algorithm.params": ignored(_SAME),
    "algorithm.adv_sat_std": _of("nft", "adv_clip_max"),
    "algorithm.adv_std_saturate": _of("nft", "adv_clip_max"),
    "algorithm.adv_mode": only_at("raw", "continuous", why="the same here", otherwise="advantages are only clipped"),
    "algorithm.use_adaptive_weight": only_at(True, why="the same here", otherwise="errors normalise themselves here"),
    "algorithm.train_timestep_mode": only_at("all", why="the same here", otherwise="objective.nft.draws levels"),
    "algorithm.shuffle_train_timesteps": ignored("microbatches mix noise levels"),
    "algorithm.apply_time_shift_in_loss": only_at(False, why="off", otherwise="levels follow the sampling grid"),
    "algorithm.training_timestep_fraction": _draws,
    "algorithm.ref_deviation_coef": _reference,
    "stack.micro_batch_size": to_field("optim.microbatch"),
    "stack.max_grad_norm": to_field("optim.max_grad_norm"),
    "stack.num_updates_per_batch": to_field("optim.updates_per_rollout"),
    "data_source.args.run.data_path": _file("prompts.source"),
    "data_source.args.run.eval_data_path": _file("eval.prompts"),
    "data_source.args.run.seed": ignored("prompts are ordered by the run's seed"),
    "data_source.args.algorithm.prompts_per_rollout": lambda s: (
        counted_in("prompts.per_iteration")
        if s.value == s.all.get("batch_size")
        else no_equal("batch_size is used: prompts of an iteration")
    ),
    "sampling.num_inference_steps": to_field("sampling.num_inference_steps"),
    "sampling.guidance_scale": _guidance,
    "sampling.height": _height,
    "sampling.width": lambda s: counted_in("model.resolution"),
    "sampling.num_frames": _frames,
    "sampling.eta": _noise,
    "sampling.samples_per_prompt": lambda s: to_fields(
        {"plan.preset": "custom", "plan.group_size": s.value}, "no pruning; --plan.preset standard prunes"
    ),
    "sampling.seed": to_field("seed"),
    "sampling.init_same_noise": lambda s: (
        not_needed("off")
        if not s.value
        else no_equal("no step adds noise")
        if _adds_no_noise(s)
        else to_fields({"sampling.same_latent": True})
    ),
    "sampling.scheduler.num_timesteps": ignored("the steps of sampling"),
    "sampling.scheduler.num_sde_steps": _noisy_steps,
    "sampling.scheduler.timestep_fraction": _fraction,
    "sampling.scheduler.config.strategy": _window,
    "sampling.scheduler.config.window_size": _window_size,
    "sampling.scheduler.config.iters_per_window": _interval,
    "sampling.scheduler.config.overlap_size": _overlap,
    "sampling.scheduler.config.init_timestep": only_at(
        0, why="windows begin at the first step", otherwise="windows begin at the first step here"
    ),
    "sampling.scheduler.config.roll_back": only_at(
        True, why="the same here", otherwise="a window begins again after the last step here"
    ),
}

PREFIXES: dict[str, Rule] = {
    **dict.fromkeys(("logging.", "hydra."), ignored("metrics go to the run folder and its report")),
    **dict.fromkeys(
        ("transport_kind", "workers_per_device", "transfer_queue", "sync.", "num_nodes", "ray"), ignored(_LAUNCH)
    ),
    **dict.fromkeys(
        (
            f"bundle.config.{name}"
            for name in (
                *("_target_", "load_", "boundary_ratio", "num_train_timesteps", "vae_use_tiling", "hidden_state"),
                *("use_lora", "use_condition"),
            )
        ),
        ignored("read from the model itself"),
    ),
    **dict.fromkeys(
        ("pipeline.hidden_state", "pipeline.qwen3_extraction", "pipeline.use_condition"),
        ignored("read from the model itself"),
    ),
    "stack.shuffle": ignored("microbatches mix steps and trajectories"),
    **dict.fromkeys(
        ("bundle.config.autocast", "bundle.config.trajectory", "bundle.config.logprob"), ignored("as under `pipeline`")
    ),
    **dict.fromkeys(("pipeline._target_", "pipeline.autocast"), ignored("the model's own pipeline and dtype")),
    **dict.fromkeys(("backend._target_", "backend.block_class", "backend.fsdp_cfg."), ignored(_SHARDING)),
    **dict.fromkeys(
        (
            *("backend.optimizer_cfg._target_", "backend.scheduler_cfg._target_", "backend.lora_cfg._target_"),
            *(
                "backend.ema_lora_cfg._target_",
                "algorithm.stage_attr",
                "algorithm.conditions_cls.",
                "algorithm.params.",
            ),
            *("stack._target_", "data_source._target_", "sampling._target_", "sampling.scheduler.config._target_"),
            "sampling.scheduler._target_",
        ),
        ignored("the class that reads the settings beside it"),
    ),
    "rollout.": ignored("the training process samples, without another engine"),
    "reward._target_": ignored("the class that reads the settings beside it"),
    **dict.fromkeys(
        (
            f"reward.backend.{name}"
            for name in ("base_device", "config._target_", "config.device", "config.processor_id", "config.model_id")
        ),
        ignored("a reward's own settings say where it runs"),
    ),
    **dict.fromkeys(("sampling.autocast", "sampling.trajectory", "sampling.logprob"), ignored("as under `pipeline`")),
    **dict.fromkeys(
        ("sampling.scheduler.config.max_iters", "sampling.scheduler.config.min_iters"),
        ignored("only for a window whose intervals change"),
    ),
}
