"""The rule of each setting by its dotted name."""

from __future__ import annotations

import os

from progrpo.imports.outcome import Outcome, Rule, Setting, counted_in, no_equal, not_needed, to_fields
from progrpo.imports.shared_rules import ignored, only_at, to_choice, to_field
from progrpo.imports.verl_omni import algorithm, rewards, sampling, trainer
from progrpo.imports.verl_omni.sections import ACTOR, ALGO, DIFFUSION_LOSS, MODEL, OPTIM, PIPELINE, ROLLOUT, VALIDATION

_MESSAGES = "a row's `prompt` is a list of chat messages there, and a text here; write the users' texts to the file"
_PAIRS = (
    "its rows are pairs of another form; write lines with prompt, image_a, image_b and preference"
    " (docs/preferences.md) to the file"
)


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


RULES: dict[str, Rule] = {
    "data.train_files": _files("prompts.source"),
    "data.val_files": _files("eval.prompts"),
    "data.train_batch_size": to_field("prompts.per_iteration"),
    "data.train_max_samples": only_at(-1, None, why="the whole file", otherwise="the whole file is used; cut it"),
    "data.val_max_samples": trainer.eval_pictures,
    "data.shuffle": only_at(
        True, why="each prompt comes once before any comes again", otherwise="prompts are always shuffled here"
    ),
    "data.prompt_key": to_field("prompts.column"),
    "data.custom_cls.path": only_at(None, why="none", otherwise="files are read by their own formats here"),
    "data.custom_cls.name": ignored("it goes with custom_cls.path"),
    "data.custom_cls.collate_fn": ignored("it goes with custom_cls.path"),
    f"{MODEL}path": sampling.path,
    algorithm.ALGORITHM: algorithm.named_again,
    f"{MODEL}lora_rank": sampling.lora_rank,
    f"{MODEL}lora_alpha": sampling.lora_alpha,
    f"{MODEL}target_modules": sampling.lora_targets,
    f"{MODEL}lora_init_weights": only_at("gaussian", why="the same here", otherwise="a LoRA starts as gaussian here"),
    f"{MODEL}lora_adapter_path": lambda s: (
        not_needed("a fresh LoRA") if s.value is None else to_fields({"model.lora": s.text()})
    ),
    f"{MODEL}lora_dtype": ignored("a LoRA's numbers are kept in float32"),
    f"{MODEL}exclude_modules": only_at(None, why="none", otherwise="model.lora_targets names all layers"),
    f"{MODEL}target_parameters": only_at(None, why="none", otherwise="model.lora_targets names layers"),
    f"{MODEL}enable_gradient_checkpointing": to_field("model.activation_checkpointing"),
    f"{MODEL}custom_chat_template": ignored("the model's own pipeline writes the prompt"),
    f"{MODEL}external_lib": only_at(None, why="none", otherwise="no code of another package is loaded"),
    f"{MODEL}trust_remote_code": only_at(False, why="the same here", otherwise="no code of a model is run"),
    f"{MODEL}transformer_subfolder": only_at("transformer", why="the same here", otherwise="the pipeline's own folder"),
    f"{OPTIM}lr": to_field("optim.lr"),
    f"{OPTIM}weight_decay": to_field("optim.weight_decay"),
    f"{OPTIM}betas": to_field("optim.betas"),
    f"{OPTIM}clip_grad": trainer.gradient_norm,
    f"{ACTOR}grad_clip": trainer.gradient_norm,
    f"{OPTIM}optimizer": only_at("AdamW", why="the same here", otherwise="AdamW here, or optim.name adamw_8bit"),
    f"{OPTIM}optimizer_impl": only_at("torch.optim", why="the same here", otherwise="torch's AdamW"),
    f"{OPTIM}lr_scheduler_type": only_at("constant", why="the same here", otherwise="a constant rate; see optim.decay"),
    f"{OPTIM}lr_warmup_steps": trainer.warmup,
    f"{OPTIM}lr_warmup_steps_ratio": only_at(0, None, why="off", otherwise="see optim.warmup, in iterations"),
    f"{OPTIM}override_optimizer_config": only_at(None, why="none", otherwise="the settings of optim are all there are"),
    f"{ACTOR}ppo_mini_batch_size": trainer.updates,
    f"{ACTOR}ppo_micro_batch_size_per_gpu": lambda s: (
        not_needed("it is measured") if s.value is None else to_fields({"optim.microbatch": s.value})
    ),
    f"{ACTOR}ppo_epochs": only_at(
        1, why="each picture is trained on once", otherwise="each picture is trained on once"
    ),
    f"{ACTOR}use_kl_loss": algorithm.use_kl,
    f"{ACTOR}kl_loss_coef": algorithm.kl_coefficient,
    f"{ACTOR}use_distill_loss": only_at(False, why="off", otherwise="there is no distillation"),
    f"{ACTOR}loss_scale_factor": only_at(None, why="none", otherwise="a loss has no factor"),
    f"{ACTOR}fsdp_config.dtype": to_choice(
        "model.dtype",
        {
            **{"bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "fp16": "float16"},
            **{"float32": "float32", "fp32": "float32"},
        },
    ),
    f"{ACTOR}fsdp_config.model_dtype": ignored("trained weights are kept in float32, frozen ones in model.dtype"),
    algorithm.LOSS: algorithm.loss,
    f"{DIFFUSION_LOSS}clip_ratio": algorithm.of_objectives("clip_range", "grpo"),
    f"{DIFFUSION_LOSS}adv_clip_max": algorithm.of_objectives("adv_clip_max", "grpo", "nft", "dgpo"),
    f"{DIFFUSION_LOSS}mix_beta": algorithm.of_objectives("beta", "nft"),
    f"{DIFFUSION_LOSS}ref_kl_coef": algorithm.of_objectives("kl_beta", "nft", "dgpo"),
    f"{DIFFUSION_LOSS}adaptive_weight_min": only_at(1e-5, why="the same here", otherwise="1e-5 here"),
    f"{DIFFUSION_LOSS}dpo_beta": algorithm.preference_beta,
    f"{DIFFUSION_LOSS}dgpo_beta": algorithm.of_objectives("dpo_beta", "dgpo"),
    f"{DIFFUSION_LOSS}dgpo_clip_range": algorithm.of_objectives("clip_range", "dgpo"),
    f"{ROLLOUT}n": sampling.group_size,
    f"{ROLLOUT}seed": ignored("noise follows from the run's seed"),
    f"{PIPELINE}height": sampling.height,
    f"{PIPELINE}width": sampling.width,
    f"{PIPELINE}num_inference_steps": to_field("sampling.num_inference_steps"),
    f"{PIPELINE}true_cfg_scale": sampling.guidance,
    f"{PIPELINE}guidance_scale": sampling.guidance,
    f"{PIPELINE}max_sequence_length": sampling.text_length,
    f"{PIPELINE}num_frames": sampling.frames,
    f"{ALGO}noise_level": sampling.noise_level,
    f"{ALGO}sde_type": sampling.sampler,
    f"{ALGO}sde_window_size": sampling.window_size,
    f"{ALGO}sde_window_range": sampling.window_range,
    f"{ALGO}sample_strategy": sampling.strategy,
    f"{ALGO}iters_per_group": sampling.window_interval,
    f"{ALGO}sde_window_seed": ignored("windows follow from the run's seed"),
    f"{VALIDATION}n": only_at(1, why="a picture for each prompt", otherwise="a picture for each prompt"),
    f"{VALIDATION}pipeline.height": sampling.eval_size,
    f"{VALIDATION}pipeline.width": sampling.eval_size,
    f"{VALIDATION}pipeline.num_frames": sampling.eval_size,
    f"{VALIDATION}pipeline.max_sequence_length": sampling.eval_size,
    f"{VALIDATION}pipeline.num_inference_steps": to_field("eval.num_inference_steps"),
    f"{VALIDATION}pipeline.true_cfg_scale": sampling.eval_guidance,
    f"{VALIDATION}pipeline.guidance_scale": sampling.eval_guidance,
    f"{VALIDATION}algo.noise_level": only_at(0, why="no noise", otherwise="evaluations add no noise"),
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
    "trainer.total_training_steps": trainer.iterations,
    "trainer.total_epochs": trainer.epochs,
    "trainer.save_freq": trainer.every("checkpoint.every", no_equal("checkpoints cannot be turned off")),
    "trainer.test_freq": trainer.every("eval.every", to_fields({"eval.every": 0})),
    "trainer.max_actor_ckpt_to_keep": lambda s: (
        no_equal("checkpoint.keep of them are kept") if s.value is None else to_fields({"checkpoint.keep": s.value})
    ),
    "trainer.val_before_train": ignored("a run measures before and after training"),
    "trainer.val_only": only_at(False, why="the same here", otherwise="progrpo eval measures without training"),
    "trainer.resume_mode": trainer.resume,
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
    "reward.reward_functions[].use_rollout_sampling_params": ignored("a reward's own settings say where it runs"),
    "reward.reward_functions": ignored("none"),
    "reward.aggregation": rewards.aggregation,
}
