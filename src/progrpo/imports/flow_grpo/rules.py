"""The rule of each setting by its dotted name."""

from __future__ import annotations

from progrpo.imports.flow_grpo import model, rewards, sampling, trainer
from progrpo.imports.flow_grpo.scripts import ALGORITHM, OLDER_WINDOW, is_dpo, kind_of
from progrpo.imports.outcome import Rule, no_equal, not_needed, to_fields
from progrpo.imports.shared_rules import UNIPC_LEVELS, ignored, mixed_precision, only_at, part_of, to_choice, to_field


def _unless_wan(rule: Rule) -> Rule:
    """The rule, for a setting that the script for Wan does not read."""
    return lambda setting: (
        not_needed("its script for Wan does not read it") if kind_of(setting) == "Wan" else rule(setting)
    )


def _only_grpo(rule: Rule) -> Rule:
    """The rule, for a setting that the script for DPO does not read."""
    return lambda setting: not_needed("its script for DPO does not read it") if is_dpo(setting) else rule(setting)


_UNUSED = "the training scripts do not read it"
_RUN_FOLDER = "progrpo train --out names the run's folder"
_BAGEL = "only the script for BAGEL reads it"

RULES: dict[str, Rule] = {
    "script": trainer.script,
    "gpu_number": part_of("prompts.per_iteration"),
    "script.model": model.script_model,
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
    "pretrained.model": model.path,
    "pretrained.revision": ignored(_UNUSED),
    "use_lora": lambda setting: to_fields({"model.weights": "lora" if setting.value else "full"}),
    "resolution": model.resolution,
    "height": model.height,
    "width": model.width,
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
    "dataset": model.dataset,
    "prompt_fn": model.prompt_fn,
    "prompt_fn_kwargs": ignored(_UNUSED),
    "reward_fn": lambda setting: no_equal("it is empty, or cannot be read"),
    "reward_fn[]": rewards.reward,
    "per_prompt_stat_tracking": only_at(
        True, why="advantages use each group's own mean", otherwise="advantages use each group's own mean"
    ),
    "sample.num_steps": to_field("sampling.num_inference_steps"),
    "sample.eval_num_steps": to_field("eval.num_inference_steps"),
    "sample.guidance_scale": sampling.guidance,
    "sample.eval_guidance_scale": sampling.eval_guidance,
    "sample.train_batch_size": lambda setting: to_fields({"sampling.microbatch": sampling.rows_per_batch(setting)}),
    "sample.mini_num_image_per_prompt": part_of("prompts.per_iteration"),
    "sample.num_image_per_prompt": sampling.group_size,
    sampling.REPEATS: part_of("plan.group_size"),
    OLDER_WINDOW: sampling.older_window,
    "sample.num_batches_per_epoch": sampling.batches,
    "sample.test_batch_size": ignored("evaluations use sampling.microbatch"),
    "sample.batch_size": ignored(_UNUSED),
    "sample.global_std": trainer.advantage_std,
    "sample.noise_level": _unless_wan(to_field("sampling.noise_level")),
    "sample.same_latent": _unless_wan(to_field("sampling.same_latent")),
    "sample.sde_type": _unless_wan(to_choice("sampling.sampler", {"sde": "flow_grpo", "cps": "cps_reduced"})),
    "sample.sde_window_size": sampling.window_size,
    "sample.sde_window_range": sampling.window_range,
    "sample.kl_reward": only_at(
        0,
        why="off",
        otherwise="the distance to the reference is in the loss (objective.grpo.kl_beta), not in the reward",
    ),
    ALGORITHM: trainer.algorithm,
    "train.batch_size": to_field("optim.microbatch"),
    "train.gradient_accumulation_steps": sampling.accumulation,
    "train.num_inner_epochs": only_at(
        1, why="each picture is trained on once", otherwise="each picture is trained on once"
    ),
    "train.use_8bit_adam": lambda setting: to_fields({"optim.name": "adamw_8bit" if setting.value else "adamw"}),
    "train.learning_rate": to_field("optim.lr"),
    "train.adam_beta1": trainer.betas,
    "train.adam_beta2": part_of("optim.betas"),
    "train.adam_weight_decay": to_field("optim.weight_decay"),
    "train.adam_epsilon": only_at(1e-8, why="the same here", otherwise="1e-8 here"),
    "train.max_grad_norm": to_field("optim.max_grad_norm"),
    "train.cfg": sampling.cfg,
    "train.adv_clip_max": _only_grpo(to_field("objective.grpo.adv_clip_max")),
    "train.clip_range": _only_grpo(to_field("objective.grpo.clip_range")),
    "train.ref_update_step": trainer.reference_updates,
    "train.highclip_range": lambda setting: (
        not_needed("both sides are clipped alike")
        if setting.value == setting.all.get("train.clip_range")
        else no_equal("both sides are clipped alike here, by train.clip_range")
    ),
    "train.clip_range_lt": ignored(_BAGEL),
    "train.clip_range_gt": ignored(_BAGEL),
    "train.timestep_shift": ignored(_BAGEL),
    "train.timestep_fraction": trainer.timestep_fraction,
    "train.beta": trainer.beta,
    "train.lora_path": model.lora_path,
    "train.ema": trainer.ema,
    "train.sft": only_at(0, why="off", otherwise="there is no supervised loss here"),
    "train.sft_batch_size": ignored("only for the supervised loss"),
    "diffusion_loss": ignored(_UNUSED),
}
