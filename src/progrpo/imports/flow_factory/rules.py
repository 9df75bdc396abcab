"""The rule of each setting by its dotted name."""

from __future__ import annotations

from progrpo.imports.flow_factory import model, rewards, sampling, trainer
from progrpo.imports.outcome import Rule, no_equal, not_needed, to_fields
from progrpo.imports.shared_rules import UNIPC_LEVELS, ignored, mixed_precision, only_at, to_choice, to_field


def _first_optimizer(rule: Rule) -> Rule:
    return lambda s: rule(s) if s.name.startswith("optimizers[0].") else no_equal("there is one optimizer")


_RUN_FOLDER = "progrpo train --out names the run's folder"
_LAUNCH = "accelerate launch or torchrun starts the processes"
_LOADING = "prompts are read at once, and encoded at the start"
_CURRENT = "pictures are sampled from the current weights"
_ON_DEVICE = "these weights stay on the run's device"
_PUBLISHED_JUDGE = "a judge is asked its published question, with the settings published with it"
_ONE_DATA_SET = "one data set is read"

_OF_EVALUATIONS = (
    *("resolution", "height", "width", "num_frames", "per_device_batch_size", "seed", "guidance_scale"),
    *("guidance_scale_2", "num_inference_steps", "condition_image_size", "max_dataset_size", "split"),
)
"""Settings of evaluations that a data set may have for itself."""
_TRAINED_DTYPE = only_at("fp32", "float32", why="the same here", otherwise="trained weights are kept in float32")

RULES: dict[str, Rule] = {
    "launcher": ignored(_LAUNCH),
    "config_file": ignored(_LAUNCH),
    "num_processes": ignored(_LAUNCH),
    "main_process_port": ignored(_LAUNCH),
    "num_machines": ignored(_LAUNCH),
    "mixed_precision": mixed_precision,
    "run_name": ignored(_RUN_FOLDER),
    "project": ignored(_RUN_FOLDER),
    "logging_backend": ignored("metrics go to the run folder and its report"),
    "model.model_name_or_path": model.path,
    "model.model_type": model.model_type,
    "model.finetune_type": to_choice("model.weights", {"lora": "lora", "full": "full"}),
    "model.lora_rank": model.lora_rank,
    "model.lora_alpha": model.lora_alpha,
    "model.target_modules": model.targets,
    "model.target_components": model.components,
    "model.master_weight_dtype": _TRAINED_DTYPE,
    "model.trainable_parameters_dtype": _TRAINED_DTYPE,
    "model.frozen_parameters_dtype": only_at(
        None, why="frozen weights are in model.dtype", otherwise="frozen weights are in model.dtype"
    ),
    "model.resume_path": model.resumed,
    "model.resume_type": model.resume_type,
    "model.resume_training_state": only_at(
        False, None, why="nothing to resume", otherwise="progrpo train --resume resumes its own runs only"
    ),
    "log.run_name": ignored(_RUN_FOLDER),
    "log.project": ignored(_RUN_FOLDER),
    "log.logging_backend": ignored("metrics go to the run folder and its report"),
    "log.save_dir": ignored(_RUN_FOLDER),
    "log.save_freq": lambda s: (
        no_equal("checkpoints cannot be turned off") if s.value == 0 else to_fields({"checkpoint.every": s.value})
    ),
    "log.verbose": ignored("metrics go to the run folder and its report"),
    "log.save_model_only": ignored("a checkpoint is the whole state, so that runs can be resumed"),
    "data.datasets[].dataset_dir": model.dataset,
    "data.datasets[].name": ignored("a label"),
    "data.datasets[].train.weight": ignored(_ONE_DATA_SET),
    "data.datasets[].train.max_dataset_size": only_at(
        None, why="the whole file", otherwise="the whole file is used; cut it"
    ),
    "data.datasets[].eval": ignored(_ONE_DATA_SET),
    **{f"data.datasets[].eval.{name}": model.own_evaluation for name in _OF_EVALUATIONS},
    "data.max_dataset_size": only_at(None, why="the whole file", otherwise="the whole file is used; cut it"),
    "data.preprocessing_batch_size": ignored(_LOADING),
    "data.dataloader_num_workers": ignored(_LOADING),
    "data.enable_preprocess": ignored(_LOADING),
    "data.preprocess_parallelism": ignored(_LOADING),
    "data.force_reprocess": ignored(_LOADING),
    "data.cache_dir": ignored(_LOADING),
    "data.sampler_type": ignored("any number of groups can be distributed over processes"),
    "data.sampler_subgroup_size": ignored("any number of groups can be distributed over processes"),
    "train.trainer_type": trainer.trainer_type,
    "train.resolution": sampling.resolution,
    "train.height": sampling.side,
    "train.width": sampling.side,
    "train.num_frames": sampling.frames,
    "train.frame_rate": ignored("frames are trained, whatever their rate"),
    "train.condition_image_size": sampling.source_size,
    "train.auto_resize": sampling.source_size,
    "train.num_inference_steps": to_field("sampling.num_inference_steps"),
    "train.guidance_scale": sampling.guidance,
    "train.max_epochs": trainer.iterations,
    "train.per_device_batch_size": sampling.microbatch,
    "train.guidance_scale_2": sampling.second_guidance,
    "train.group_size": sampling.group_size,
    "train.unique_sample_num_per_epoch": sampling.prompts_of_iteration,
    "train.gradient_step_per_epoch": sampling.steps_of_epoch,
    "train.gradient_accumulation_steps": sampling.accumulation,
    "train.num_inner_epochs": only_at(
        1, why="each picture is trained on once", otherwise="each picture is trained on once"
    ),
    "train.global_std": trainer.global_std,
    "train.advantage_aggregation": trainer.aggregation,
    "train.clip_range": trainer.clip_range,
    "train.adv_clip_range": trainer.adv_clip_range,
    "train.kl_type": trainer.kl_type,
    "train.kl_beta": trainer.kl_beta,
    "train.beta": trainer.preference_beta,
    "train.weighting_scheme": trainer.level_weighting,
    "train.logit_mean": ignored("it goes with weighting_scheme"),
    "train.logit_std": ignored("it goes with weighting_scheme"),
    "train.ref_param_device": ignored(_ON_DEVICE),
    "train.ema_decay": trainer.ema_decay,
    "train.ema_update_interval": trainer.ema_interval,
    "train.ema_device": ignored(_ON_DEVICE),
    "train.ema_decay_schedule": trainer.ema_schedule,
    "train.flat_steps": trainer.average,
    "train.ramp_rate": trainer.average,
    "train.warmup_steps": trainer.warmup,
    "train.ema_ref_max_decay": trainer.average,
    "train.ema_ref_ramp_rate": trainer.average,
    "train.ema_ref_device": ignored(_ON_DEVICE),
    "train.adv_eps": to_field("objective.adv_eps", "there it is the least std, and fixed"),
    "train.clip_kl": only_at(False, why="off", otherwise="the distance to the reference is not clipped"),
    "train.switch_ema_ref": lambda s: no_equal(_CURRENT) if trainer.objective_of(s) == "dgpo" else trainer.not_read(s),
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
        to_fields({"objective.awm.huber_power": s.value}) if trainer.objective_of(s) == "awm" else trainer.not_read(s)
    ),
    "train.enable_gradient_checkpointing": to_field("model.activation_checkpointing"),
    "train.latent_storage_dtype": sampling.latent_dtype,
    "train.offload_samples_to_cpu": only_at(False, why="off", otherwise="an iteration's latents stay on the device"),
    "train.shuffle_samples": ignored("microbatches mix steps and trajectories"),
    "train.reward_optimization_overlap": only_at(
        False, why="off", otherwise="reward.waves scores while the next pictures are sampled"
    ),
    "train.reward_optimization_overlap_mode": ignored("only for an overlap, which there is not here"),
    "train.reward_optimization_overlap_poll_interval": ignored("only for an overlap, which there is not here"),
    "train.seed": to_field("seed"),
    "train.nft_beta": trainer.to_objective("beta", "nft"),
    "train.ema_kl_beta": trainer.to_objective("average_beta", "awm"),
    "train.awm_weighting": trainer.weighting,
    "train.dpo_beta": trainer.to_objective("dpo_beta", "dgpo"),
    "train.num_train_timesteps": trainer.draws,
    "train.timestep_range": trainer.timestep_range,
    "train.use_shared_noise": only_at(True, why="a group shares its noise", otherwise="a group shares its noise"),
    "train.clip_dsm": only_at(True, why="the loss is clipped", otherwise="the loss is clipped"),
    "train.off_policy": trainer.off_policy,
    "scheduler.dynamics_type": sampling.dynamics,
    "scheduler.noise_level": sampling.noise_level,
    "scheduler.num_sde_steps": sampling.noisy_steps,
    "scheduler.sde_steps": sampling.pool,
    "scheduler.seed": ignored("windows follow from the run's seed"),
    "scheduler.flow_shift": to_field("sampling.shift"),
    "scheduler.levels": lambda s: no_equal(UNIPC_LEVELS),
    "eval.resolution": sampling.eval_size,
    "eval.height": sampling.eval_size,
    "eval.width": sampling.eval_size,
    "eval.num_frames": sampling.eval_frames,
    "eval.condition_image_size": sampling.source_size,
    "eval.auto_resize": sampling.source_size,
    "eval.num_inference_steps": to_field("eval.num_inference_steps"),
    "eval.guidance_scale": sampling.eval_guidance,
    "eval.guidance_scale_2": sampling.second_guidance,
    "eval.per_device_batch_size": ignored("evaluations use sampling.microbatch"),
    "eval.eval_freq": to_field("eval.every"),
    "eval.seed": lambda s: (
        not_needed("the same noise at every evaluation") if s.value is None else to_fields({"eval.seed": s.value})
    ),
    "rewards[].name": ignored("a label"),
    "rewards[].reward_model": rewards.reward_model,
    "rewards[].weight": rewards.weight,
    "rewards[].weight[]": rewards.weight_of_set,
    "rewards[].applicable_datasets": ignored("rewards of the data set that is read are used"),
    "rewards[].batch_size": rewards.reward_field("batch_size"),
    "rewards[].device": rewards.reward_field("device"),
    "rewards[].dtype": rewards.reward_dtype,
    "rewards[].async_reward": ignored("reward.waves scores while the next pictures are sampled"),
    "rewards[].num_workers": ignored("reward.waves scores while the next pictures are sampled"),
    "rewards[].api_base_url": rewards.judge_field("url"),
    "rewards[].vlm_model": rewards.judge_field("model"),
    "rewards[].timeout": rewards.judge_field("timeout"),
    "rewards[].max_retries": rewards.judge_field("retries"),
    "rewards[].api_key": ignored("the key is read from OPENAI_API_KEY in the environment"),
    "rewards[].max_concurrent": ignored("batch_size sets how many pictures are scored at once"),
    "rewards[].top_logprobs": ignored("marks are read here, not probabilities"),
    "rewards[].temperature": lambda s: no_equal(_PUBLISHED_JUDGE),
    "rewards[].max_tokens": lambda s: no_equal(_PUBLISHED_JUDGE),
    "rewards[].aspects": lambda s: no_equal(_PUBLISHED_JUDGE),
    "rewards[].reward_model_kwargs": only_at(None, {}, why="none", otherwise="a setting of a reward that you write"),
    "rewards[].hps_version": only_at("v2.1", why="the same here", otherwise="HPSv2.1 is asked here"),
    "rewards[].aggregation": rewards.soft_tifa_mean,
    **dict.fromkeys(
        ("rewards[].data_path", "rewards[].benchmark_jsonl"),
        lambda s: no_equal("a line of the prompts brings its own questions, in `vqa_list`"),
    ),
    "rewards[].canonicalize": ignored("marks are read here, not probabilities"),
    "optimizers[].name": ignored("a label"),
    "optimizers[].learning_rate": _first_optimizer(to_field("optim.lr")),
    "optimizers[].weight_decay": _first_optimizer(to_field("optim.weight_decay")),
    "optimizers[].betas": _first_optimizer(to_field("optim.betas")),
    "optimizers[].eps": _first_optimizer(only_at(1e-8, why="the same here", otherwise="1e-8 here")),
    "optimizers[].max_grad_norm": _first_optimizer(to_field("optim.max_grad_norm")),
}
RULES |= {f"eval_{name}": rule for name, rule in RULES.items() if name.startswith("rewards[]")}
