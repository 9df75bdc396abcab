"""The rule of each setting by its dotted name."""

from __future__ import annotations

import os

from progrpo.imports.translation import (
    Outcome,
    Rule,
    Setting,
    counted_in,
    ignored,
    no_equal,
    not_needed,
    only_at,
    to_choice,
    to_field,
    to_fields,
)
from progrpo.imports.verl_omni import algorithm, rewards, sampling

_MODEL = "actor_rollout_ref.model."
_ACTOR = "actor_rollout_ref.actor."
_OPTIM = f"{_ACTOR}optim."
_LOSS = f"{_ACTOR}diffusion_loss."
_ROLLOUT = "actor_rollout_ref.rollout."
_PIPELINE = f"{_ROLLOUT}pipeline."
_ALGO = f"{_ROLLOUT}algo."
_VALIDATION = f"{_ROLLOUT}val_kwargs."
_MESSAGES = "a row's `prompt` is a list of chat messages there, and a text here; write the users' texts to the file"
_PAIRS = (
    "its rows are pairs of another form; write lines with prompt, image_a, image_b and preference"
    " (docs/preferences.md) to the file"
)
_RUN_FOLDER = "progrpo train --out names the run's folder"
_LAUNCH = "accelerate launch or torchrun starts the processes"
_ENGINE = "the training process samples, without another engine"
_SHARDING = "--model.shard and --model.offload say where weights lie"
_PROFILER = "there is no profiler"
_SERVER = "a reward's own settings say where it runs"


def _files(field: str) -> Rule:
    """The rule of the training or validation file."""

    def rule(setting: Setting) -> Outcome:
        values = setting.value if isinstance(setting.value, list) else [setting.value]
        if len(values) != 1 or not isinstance(values[0], str):
            return no_equal("one file is read here; join them")
        file = os.path.expanduser(values[0])
        if field == "prompts.source" and algorithm.is_offline(setting):
            return no_equal(_PAIRS, {"prompts.pairs": os.path.splitext(file)[0] + ".jsonl"})
        return no_equal(_MESSAGES, {field: file})

    return rule


def _updates(setting: Setting) -> Outcome:
    prompts = setting.count("data.train_batch_size")
    updates = max(1, prompts // setting.count())
    return to_fields({"optim.updates_per_rollout": updates}, f"{prompts} prompts divided by it")


def _warmup(setting: Setting) -> Outcome:
    if setting.value is None or setting.number() <= 0:
        return not_needed("off")
    return no_equal("optim.warmup counts iterations, and optimizer steps are counted there")


def _gradient_norm(setting: Setting) -> Outcome:
    if setting.name.endswith("optim.clip_grad") and f"{_ACTOR}grad_clip" in setting.all:
        return not_needed("grad_clip sets it")
    return to_fields({"optim.max_grad_norm": setting.value})


def _iterations(setting: Setting) -> Outcome:
    if setting.value is None:
        return no_equal("passes over the prompts decide; give --iterations")
    return to_fields({"iterations": setting.value})


def _epochs(setting: Setting) -> Outcome:
    if setting.all.get("trainer.total_training_steps") is not None:
        return not_needed("total_training_steps sets it")
    return no_equal("a pass over all prompts there; give --iterations")


def _every(field: str, off: Outcome) -> Rule:
    return lambda s: to_fields({field: s.value}) if s.number() > 0 else off


def _eval_pictures(setting: Setting) -> Outcome:
    if setting.number() > 0:
        return to_fields({"eval.pictures": setting.value})
    return no_equal("eval.pictures says how many pictures are sampled; 512")


def _correction(setting: Setting) -> Outcome:
    """The outcome of a correction for the difference between the rollout's engine and the trainer."""
    off = setting.value in (None, False) or not setting.name.endswith(("rollout_is", "rollout_rs", "bypass_mode"))
    why = "the training process samples, so there is nothing to correct"
    return not_needed(why) if off else no_equal(why)


_OTHER_LOSS = ignored("a setting of an algorithm that is not translated")


def _resume(setting: Setting) -> Outcome:
    return (
        no_equal("progrpo train --resume resumes its own runs only")
        if setting.value == "resume_path"
        else (not_needed("progrpo train --resume continues a run"))
    )


RULES: dict[str, Rule] = {
    "data.train_files": _files("prompts.source"),
    "data.val_files": _files("eval.prompts"),
    "data.train_batch_size": to_field("prompts.per_iteration"),
    "data.train_max_samples": only_at(-1, None, why="the whole file", otherwise="the whole file is used; cut it"),
    "data.val_max_samples": _eval_pictures,
    "data.shuffle": only_at(
        True, why="each prompt comes once before any comes again", otherwise="prompts are always shuffled here"
    ),
    "data.prompt_key": to_field("prompts.column"),
    "data.custom_cls.path": only_at(None, why="none", otherwise="files are read by their own formats here"),
    "data.custom_cls.name": ignored("it goes with custom_cls.path"),
    "data.custom_cls.collate_fn": ignored("it goes with custom_cls.path"),
    f"{_MODEL}path": sampling.path,
    algorithm.ALGORITHM: algorithm.named_again,
    f"{_MODEL}lora_rank": sampling.lora_rank,
    f"{_MODEL}lora_alpha": sampling.lora_alpha,
    f"{_MODEL}target_modules": sampling.lora_targets,
    f"{_MODEL}lora_init_weights": only_at("gaussian", why="the same here", otherwise="a LoRA starts as gaussian here"),
    f"{_MODEL}lora_adapter_path": lambda s: (
        not_needed("a fresh LoRA") if s.value is None else to_fields({"model.lora": s.text()})
    ),
    f"{_MODEL}lora_dtype": ignored("a LoRA's numbers are kept in float32"),
    f"{_MODEL}exclude_modules": only_at(None, why="none", otherwise="model.lora_targets names all layers"),
    f"{_MODEL}target_parameters": only_at(None, why="none", otherwise="model.lora_targets names layers"),
    f"{_MODEL}enable_gradient_checkpointing": to_field("model.activation_checkpointing"),
    f"{_MODEL}custom_chat_template": ignored("the model's own pipeline writes the prompt"),
    f"{_MODEL}external_lib": only_at(None, why="none", otherwise="no code of another package is loaded"),
    f"{_MODEL}trust_remote_code": only_at(False, why="the same here", otherwise="no code of a model is run"),
    f"{_MODEL}transformer_subfolder": only_at(
        "transformer", why="the same here", otherwise="the pipeline's own folder"
    ),
    f"{_OPTIM}lr": to_field("optim.lr"),
    f"{_OPTIM}weight_decay": to_field("optim.weight_decay"),
    f"{_OPTIM}betas": to_field("optim.betas"),
    f"{_OPTIM}clip_grad": _gradient_norm,
    f"{_ACTOR}grad_clip": _gradient_norm,
    f"{_OPTIM}optimizer": only_at("AdamW", why="the same here", otherwise="AdamW here, or optim.name adamw_8bit"),
    f"{_OPTIM}optimizer_impl": only_at("torch.optim", why="the same here", otherwise="torch's AdamW"),
    f"{_OPTIM}lr_scheduler_type": only_at(
        "constant", why="the same here", otherwise="a constant rate; see optim.decay"
    ),
    f"{_OPTIM}lr_warmup_steps": _warmup,
    f"{_OPTIM}lr_warmup_steps_ratio": only_at(0, None, why="off", otherwise="see optim.warmup, in iterations"),
    f"{_OPTIM}override_optimizer_config": only_at(
        None, why="none", otherwise="the settings of optim are all there are"
    ),
    f"{_ACTOR}ppo_mini_batch_size": _updates,
    f"{_ACTOR}ppo_micro_batch_size_per_gpu": lambda s: (
        not_needed("it is measured") if s.value is None else to_fields({"optim.microbatch": s.value})
    ),
    f"{_ACTOR}ppo_epochs": only_at(
        1, why="each picture is trained on once", otherwise="each picture is trained on once"
    ),
    f"{_ACTOR}use_kl_loss": algorithm.use_kl,
    f"{_ACTOR}kl_loss_coef": algorithm.kl_coefficient,
    f"{_ACTOR}use_distill_loss": only_at(False, why="off", otherwise="there is no distillation"),
    f"{_ACTOR}loss_scale_factor": only_at(None, why="none", otherwise="a loss has no factor"),
    f"{_ACTOR}fsdp_config.dtype": to_choice(
        "model.dtype",
        {
            **{"bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "fp16": "float16"},
            **{"float32": "float32", "fp32": "float32"},
        },
    ),
    f"{_ACTOR}fsdp_config.model_dtype": ignored("trained weights are kept in float32, frozen ones in model.dtype"),
    algorithm.LOSS: algorithm.loss,
    f"{_LOSS}clip_ratio": algorithm.of_objectives("clip_range", "grpo"),
    f"{_LOSS}adv_clip_max": algorithm.of_objectives("adv_clip_max", "grpo", "nft", "dgpo"),
    f"{_LOSS}mix_beta": algorithm.of_objectives("beta", "nft"),
    f"{_LOSS}ref_kl_coef": algorithm.of_objectives("kl_beta", "nft", "dgpo"),
    f"{_LOSS}adaptive_weight_min": only_at(1e-5, why="the same here", otherwise="1e-5 here"),
    f"{_LOSS}dpo_beta": algorithm.preference_beta,
    f"{_LOSS}dgpo_beta": algorithm.of_objectives("dpo_beta", "dgpo"),
    f"{_LOSS}dgpo_clip_range": algorithm.of_objectives("clip_range", "dgpo"),
    f"{_ROLLOUT}n": sampling.group_size,
    f"{_ROLLOUT}seed": ignored("noise follows from the run's seed"),
    f"{_PIPELINE}height": sampling.height,
    f"{_PIPELINE}width": sampling.width,
    f"{_PIPELINE}num_inference_steps": to_field("sampling.num_inference_steps"),
    f"{_PIPELINE}true_cfg_scale": sampling.guidance,
    f"{_PIPELINE}guidance_scale": sampling.guidance,
    f"{_PIPELINE}max_sequence_length": sampling.text_length,
    f"{_PIPELINE}num_frames": sampling.frames,
    f"{_ALGO}noise_level": sampling.noise_level,
    f"{_ALGO}sde_type": sampling.sampler,
    f"{_ALGO}sde_window_size": sampling.window_size,
    f"{_ALGO}sde_window_range": sampling.window_range,
    f"{_ALGO}sample_strategy": sampling.strategy,
    f"{_ALGO}iters_per_group": sampling.window_interval,
    f"{_ALGO}sde_window_seed": ignored("windows follow from the run's seed"),
    f"{_VALIDATION}n": only_at(1, why="a picture for each prompt", otherwise="a picture for each prompt"),
    f"{_VALIDATION}pipeline.height": sampling.eval_size,
    f"{_VALIDATION}pipeline.width": sampling.eval_size,
    f"{_VALIDATION}pipeline.num_frames": sampling.eval_size,
    f"{_VALIDATION}pipeline.max_sequence_length": sampling.eval_size,
    f"{_VALIDATION}pipeline.num_inference_steps": to_field("eval.num_inference_steps"),
    f"{_VALIDATION}pipeline.true_cfg_scale": sampling.eval_guidance,
    f"{_VALIDATION}pipeline.guidance_scale": sampling.eval_guidance,
    f"{_VALIDATION}algo.noise_level": only_at(0, why="no noise", otherwise="evaluations add no noise"),
    "algorithm.adv_estimator": algorithm.named_again,
    "algorithm.trainer_type": ignored("the algorithm decides it"),
    "algorithm.sample_source": algorithm.sample_source,
    "algorithm.paired_preference": ignored("the algorithm decides it"),
    "algorithm.norm_adv_by_std_in_grpo": only_at(
        True, why="the same here", otherwise="advantages are divided by a std here"
    ),
    "algorithm.global_std": algorithm.advantage_std,
    "algorithm.old_policy_decay_schedule": algorithm.average_schedule,
    "algorithm.old_policy_decay": only_at(None, why="a schedule", otherwise="averages follow their papers' schedules"),
    "algorithm.old_policy_update_interval": algorithm.average_interval,
    "algorithm.timestep_fraction": algorithm.timestep_fraction,
    "algorithm.train_timestep_range": algorithm.trained_range,
    "algorithm.train_timestep_count": algorithm.trained_count,
    "algorithm.adv_mode": only_at("continuous", why="the same here", otherwise="advantages are clipped, and no more"),
    "data.image_key": ignored("a row's picture is in the column `image`"),
    "trainer.total_training_steps": _iterations,
    "trainer.total_epochs": _epochs,
    "trainer.save_freq": _every("checkpoint.every", no_equal("checkpoints cannot be turned off")),
    "trainer.test_freq": _every("eval.every", to_fields({"eval.every": 0})),
    "trainer.max_actor_ckpt_to_keep": lambda s: (
        no_equal("checkpoint.keep of them are kept") if s.value is None else to_fields({"checkpoint.keep": s.value})
    ),
    "trainer.val_before_train": ignored("a run measures before and after training"),
    "trainer.val_only": only_at(False, why="the same here", otherwise="progrpo eval measures without training"),
    "trainer.resume_mode": _resume,
    "trainer.resume_from_path": lambda s: counted_in("trainer.resume_mode") if s.value else not_needed("nothing"),
    "trainer.v1.trainer_mode": only_at(
        "sync", why="sampling and training take turns", otherwise="sampling and training take turns here"
    ),
    "reward.custom_reward_function.name": rewards.one_function,
    "reward.custom_reward_function.path": rewards.one_function,
    "reward.reward_functions[].name": rewards.function_of_several,
    "reward.reward_functions[].path": rewards.function_of_several,
    "reward.reward_functions[].weight": rewards.weight,
    "reward.reward_functions[].required": ignored("a missing score is missing: reward.max_missing"),
    "reward.reward_functions[].use_rollout_sampling_params": ignored(_SERVER),
    "reward.reward_functions": ignored("none"),
    "reward.aggregation": rewards.aggregation,
}

_LOADING = ignored("prompts are read at once, and encoded at the start")
PREFIXES: dict[str, Rule] = {
    **dict.fromkeys(
        (f"data.{name}" for name in ("seed", "val_batch_size", "dataloader_num_workers", "max_prompt_length")), _LOADING
    ),
    **dict.fromkeys((f"data.{name}" for name in ("truncation", "filter_overlong_prompts", "tokenizer")), _LOADING),
    **dict.fromkeys(
        (
            f"data.{name}"
            for name in (
                *(
                    "use_shm",
                    "reward_fn_key",
                    "max_response",
                    "return_",
                    "image_patch",
                    "validation_shuffle",
                    "video_key",
                ),
                *("trust_remote", "sampler.", "datagen.", "apply_chat", "tool_config"),
            )
        ),
        _LOADING,
    ),
    **dict.fromkeys((f"{_MODEL}{name}" for name in ("pipeline.", "algo.")), sampling.training_copy),
    **dict.fromkeys(
        (
            f"{_MODEL}{name}"
            for name in (
                *("attn_backend", "extra_tokenizers", "fsdp_layer_prefixes", "model_type", "mtp", "tokenizer_path"),
                *("use_shm", "policy_state_adapters"),
            )
        ),
        ignored("a matter of how the model is run"),
    ),
    **dict.fromkeys((f"{_ACTOR}{name}" for name in ("fsdp_config.", "strategy", "veomni_config")), ignored(_SHARDING)),
    **dict.fromkeys(
        (f"{_ACTOR}{name}" for name in ("checkpoint.", "shuffle", "data_loader_seed", "use_no_sync")), ignored(_LAUNCH)
    ),
    **dict.fromkeys(
        (
            f"{_ROLLOUT}{name}"
            for name in (
                *(
                    "name",
                    "mode",
                    "nnodes",
                    "n_gpus",
                    "dtype",
                    "gpu_memory",
                    "enforce_eager",
                    "cudagraph",
                    "free_cache",
                ),
                *("tensor_model", "data_parallel", "expert_parallel", "pipeline_model", "max_num", "max_model"),
                *(
                    "enable_",
                    "engine_kwargs",
                    "agent.",
                    "load_format",
                    "layered_summon",
                    "log_prob_micro",
                    "prompt_length",
                ),
                *("rollout_attn", "calculate_log_probs", "rollout_adapter", "checkpoint_engine", "step_execution"),
                *(
                    "max_prompt_embed",
                    "skip_tokenizer",
                    "disable_log",
                    "scheduling_policy",
                    "logprobs_mode",
                    "prometheus",
                ),
            )
        ),
        ignored(_ENGINE),
    ),
    "actor_rollout_ref.ref.": ignored("the reference is the model at its start"),
    "diffusion/": ignored(_SHARDING),
    **dict.fromkeys(
        (f"{_PIPELINE}output_type", f"{_VALIDATION}pipeline.output_type"),
        only_at("pil", "np", "pt", why="rewards see pictures", otherwise="rewards see decoded pictures"),
    ),
    "reward.reward_functions[].": lambda s: no_equal("a setting of a reward that you write"),
    "actor_rollout_ref.hybrid_engine": ignored(_ENGINE),
    "actor_rollout_ref.nccl_timeout": ignored(_LAUNCH),
    **dict.fromkeys(
        (f"reward.{name}" for name in ("num_workers", "reward_model.", "reward_manager.", "models.", "sandbox")),
        ignored(_SERVER),
    ),
    **dict.fromkeys(
        (
            f"trainer.{name}"
            for name in ("project_name", "experiment_name", "default_", "rollout_data", "validation_data", "video_fps")
        ),
        ignored(_RUN_FOLDER),
    ),
    **dict.fromkeys(
        (f"trainer.{name}" for name in ("logger", "log_val")), ignored("metrics go to the run folder and its report")
    ),
    **dict.fromkeys(
        (
            f"trainer.{name}"
            for name in ("n_gpus", "nnodes", "device", "use_v1", "ray_", "esi_", "del_local", "v1.s", "v1.colocate")
        ),
        ignored(_LAUNCH),
    ),
    **dict.fromkeys(("ray_kwargs", "transfer_queue", "skip.", "hydra."), ignored(_LAUNCH)),
    **dict.fromkeys(
        ("global_profiler", f"{_ACTOR}profiler", f"{_ROLLOUT}profiler", "reward.reward_model.rollout.profiler"),
        ignored(_PROFILER),
    ),
    **dict.fromkeys(("algorithm.rollout_correction.", f"{_ACTOR}rollout_correction."), _correction),
    f"{_ACTOR}rollout_n": ignored("that of the rollout"),
    f"{_ACTOR}distill": ignored("there is no distillation"),
    **dict.fromkeys((f"{_LOSS}{name}" for name in ("kl_mask", "add_kl", "mse_", "ratio_norm")), _OTHER_LOSS),
    f"{_VALIDATION}algo.": ignored("evaluations add no noise"),
}
