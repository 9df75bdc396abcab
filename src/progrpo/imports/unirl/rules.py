"""The rule of each setting of UniRL by its dotted name."""

from __future__ import annotations

from progrpo.imports.outcome import Rule, counted_in, no_equal, not_needed, to_fields
from progrpo.imports.shared_rules import ignored, named_below, only_at, to_choice, to_field
from progrpo.imports.unirl import outcomes, rewards

_LORA: dict[str, Rule] = {
    "rank": outcomes.rank,
    "alpha": to_field("model.lora_alpha"),
    "target_modules": outcomes.targets,
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
    "save_interval": outcomes.save,
    "save_dir": ignored(_RUN_FOLDER),
    "eval_interval": to_field("eval.every"),
    "eval_num_prompts": to_field("eval.pictures", "a picture for each prompt here"),
    "eval_samples_per_prompt": only_at(1, why="a picture for each prompt", otherwise="a picture for each prompt"),
    "eval_chunk_prompts": ignored("evaluations use sampling.microbatch"),
    "eval_eta": only_at(0, why="no noise", otherwise="evaluations add no noise"),
    "eval_sampling.num_inference_steps": to_field("eval.num_inference_steps"),
    "eval_sampling.guidance_scale": outcomes.eval_scale,
    "accumulate_rollouts": only_at(1, why="the same here", otherwise="an iteration samples and trains once"),
    "load_dir": only_at(
        None, "", why="nothing to resume", otherwise="progrpo train --resume resumes its own runs only"
    ),
    "weight_sync_interval": only_at(1, why="the current weights sample", otherwise="the current weights sample here"),
    "bundle._target_": outcomes.bundle,
    "bundle.config": ignored(_OWN_NAMES),
    "pipeline.strategy": ignored(_OWN_NAMES),
    "bundle.config.pretrained_model_ckpt_path": outcomes.path,
    "bundle.config.model_precision": to_choice("model.dtype", outcomes.DTYPES),
    "bundle.config.shift": lambda s: counted_in("sampling.shift") if "pipeline.shift" in s.all else outcomes.shift(s),
    "bundle.config.max_sequence_length": lambda s: (
        counted_in("model.max_sequence_length")
        if "pipeline.max_sequence_length" in s.all
        else to_fields({"model.max_sequence_length": s.value})
    ),
    "pipeline.shift": outcomes.shift,
    "pipeline.max_sequence_length": to_field("model.max_sequence_length"),
    "pipeline.trajectory_precision": to_choice("sampling.latent_dtype", outcomes.DTYPES),
    "pipeline.logprob_precision": only_at("fp32", why="the same here", otherwise="log-probs are computed in float32"),
    "pipeline.strategy._target_": outcomes.kernel,
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
    "backend.lora_cfg": outcomes.full,
    **{f"backend.lora_cfg.{name}": outcomes.unless_shadow(rule) for name, rule in _LORA.items()},
    **{f"backend.ema_lora_cfg.{name}": rule for name, rule in _LORA.items()},
    "rollout.forward_batch_size": to_field("sampling.microbatch"),
    "reward.backend._target_": rewards.reward,
    "reward.backend.config.batch_size": rewards.reward_batch,
    "reward.backend.config.required_rewards": rewards.remote_rewards,
    "reward.backend.config.sub_metric_reduce": ignored("a reward gives one score"),
    "reward.backend.config.aggregation_method": only_at(
        "weighted_sum", why="the same here", otherwise="rewards are summed here"
    ),
    "algorithm._target_": outcomes.algorithm,
    "algorithm.clip_range": outcomes.of("grpo", "clip_range"),
    "algorithm.clip_schedule": only_at("constant", why="the same here", otherwise="the clip range is constant"),
    "algorithm.beta": outcomes.beta,
    "algorithm.old_logp_source": ignored("old log-probs are those of sampling, and compared with the update's own"),
    "algorithm.params": ignored(_SAME),
    "algorithm.adv_sat_std": outcomes.of("nft", "adv_clip_max"),
    "algorithm.adv_std_saturate": outcomes.of("nft", "adv_clip_max"),
    "algorithm.adv_mode": only_at("raw", "continuous", why="the same here", otherwise="advantages are only clipped"),
    "algorithm.use_adaptive_weight": only_at(True, why="the same here", otherwise="errors normalise themselves here"),
    "algorithm.train_timestep_mode": only_at("all", why="the same here", otherwise="objective.nft.draws levels"),
    "algorithm.shuffle_train_timesteps": ignored("microbatches mix noise levels"),
    "algorithm.apply_time_shift_in_loss": only_at(False, why="off", otherwise="levels follow the sampling grid"),
    "algorithm.training_timestep_fraction": outcomes.draws,
    "algorithm.ref_deviation_coef": outcomes.reference,
    "stack.micro_batch_size": to_field("optim.microbatch"),
    "stack.max_grad_norm": to_field("optim.max_grad_norm"),
    "stack.num_updates_per_batch": to_field("optim.updates_per_rollout"),
    "data_source.args.run.data_path": outcomes.file("prompts.source"),
    "data_source.args.run.eval_data_path": outcomes.file("eval.prompts"),
    "data_source.args.run.seed": ignored("prompts are ordered by the run's seed"),
    "data_source.args.algorithm.prompts_per_rollout": lambda s: (
        counted_in("prompts.per_iteration")
        if s.value == s.all.get("batch_size")
        else no_equal("batch_size is used: prompts of an iteration")
    ),
    "sampling.num_inference_steps": outcomes.steps,
    "sampling.guidance_scale": outcomes.guidance,
    "sampling.height": outcomes.height,
    "sampling.width": lambda s: counted_in("model.resolution"),
    "sampling.num_frames": outcomes.frames,
    "sampling.eta": outcomes.noise,
    "sampling.samples_per_prompt": lambda s: to_fields(
        {"plan.preset": "custom", "plan.group_size": s.value}, "no pruning; --plan.preset late prunes"
    ),
    "sampling.seed": to_field("seed"),
    "sampling.init_same_noise": lambda s: (
        not_needed("off")
        if not s.value
        else no_equal("no step adds noise")
        if outcomes.adds_no_noise(s)
        else to_fields({"sampling.same_latent": True})
    ),
    "sampling.post_window_ode.order": lambda s: no_equal("steps after the window are of first order"),
    "sampling.post_window_ode.compress_ratio": lambda s: no_equal("no step after the window is left out"),
    "sampling.scheduler.num_timesteps": ignored("the steps of sampling"),
    "sampling.scheduler.num_sde_steps": outcomes.noisy_steps,
    "sampling.scheduler.timestep_fraction": outcomes.fraction,
    "sampling.scheduler.config.strategy": outcomes.window,
    "sampling.scheduler.config.window_size": outcomes.window_size,
    "sampling.scheduler.config.iters_per_window": outcomes.interval,
    "sampling.scheduler.config.overlap_size": outcomes.overlap,
    "sampling.scheduler.config.init_timestep": only_at(
        0, why="windows begin at the first step", otherwise="windows begin at the first step here"
    ),
    "sampling.scheduler.config.roll_back": only_at(
        True, why="the same here", otherwise="a window begins again after the last step here"
    ),
}

PREFIXES: dict[str, Rule] = {
    **named_below("", "logging. hydra.", ignored("metrics go to the run folder and its report")),
    **named_below(
        "",
        "transport_kind workers_per_device transfer_queue sync. num_nodes ray layout train_fraction reward_fraction"
        " train_resident rollout_resident reward_resident worker_max save_mode",
        ignored(_LAUNCH),
    ),
    **named_below(
        "bundle.config.",
        "_target_ load_ boundary_ratio num_train_timesteps vae_use_tiling hidden_state use_lora lora_target_modules"
        " use_condition",
        ignored("read from the model itself"),
    ),
    **named_below("pipeline.", "hidden_state qwen3_extraction use_condition", ignored("read from the model itself")),
    "stack.shuffle": ignored("microbatches mix steps and trajectories"),
    **named_below("bundle.config.", "autocast trajectory logprob", ignored("as under `pipeline`")),
    **named_below("pipeline.", "_target_ autocast", ignored("the model's own pipeline and dtype")),
    **named_below("backend.", "_target_ block_class fsdp_cfg.", ignored(_SHARDING)),
    **named_below(
        "",
        "backend.optimizer_cfg._target_ backend.scheduler_cfg._target_ backend.lora_cfg._target_"
        " backend.ema_lora_cfg._target_ algorithm.stage_attr algorithm.conditions_cls. algorithm.params."
        " stack._target_ data_source._target_ sampling._target_ sampling.scheduler.config._target_"
        " sampling.scheduler._target_ sampling.post_window_ode._target_",
        ignored("the class that reads the settings beside it"),
    ),
    "rollout.": ignored("the training process samples, without another engine"),
    "reward._target_": ignored("the class that reads the settings beside it"),
    **named_below(
        "reward.backend.",
        "base_device config._target_ config.device config.processor_id config.model_id",
        ignored("a reward's own settings say where it runs"),
    ),
    "reward.backend.config.reward_weights.": lambda s: counted_in("reward.terms"),
    **named_below("reward.backend.config.", "base_url timeout", ignored("a term's url and timeout")),
    **named_below("sampling.", "autocast trajectory logprob", ignored("as under `pipeline`")),
    **named_below(
        "sampling.scheduler.config.", "max_iters min_iters", ignored("only for a window whose intervals change")
    ),
}
