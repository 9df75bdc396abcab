"""Flow-Factory's own values of settings that a file leaves out, and the names of settings in older files."""

from __future__ import annotations

# Flow-Factory's defaults that differ from ours. Those of an objective hold only for it.
DEFAULTS: dict[str, object] = {
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
_PAIRS: dict[str, object] = {
    "train.beta": 2000.0,
    "train.weighting_scheme": "logit_normal",
    "train.num_train_timesteps": 1,
    "train.timestep_range": 0.99,
}
DEFAULTS_BY_TRAINER: dict[str, dict[str, object]] = {
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
    "dpo": _PAIRS,
    "offline-dpo": _PAIRS,
    "dgpo": {
        "train.dpo_beta": 100.0,
        "train.clip_range": 1e-4,
        "train.num_train_timesteps": 0,
        "train.timestep_range": 0.6,
    },
}
OPTIMIZER = {"learning_rate": 1e-5, "weight_decay": 1e-4, "betas": [0.9, 0.999], "max_grad_norm": 1.0}
OLDER_NAMES = {
    **{
        f"train.{older}": f"optimizers[0].{today}"
        for older, today in {
            "learning_rate": "learning_rate",
            "adam_weight_decay": "weight_decay",
            "adam_betas": "betas",
            "adam_epsilon": "eps",
            "max_grad_norm": "max_grad_norm",
        }.items()
    },
    **{
        f"{section}.{older}": f"scheduler.{today}"
        for section in ("train", "scheduler")
        for older, today in {
            "dynamics_type": "dynamics_type",
            "sde_type": "dynamics_type",
            "noise_level": "noise_level",
            **dict.fromkeys(("num_train_steps", "num_noise_steps"), "num_sde_steps"),
            **dict.fromkeys(("train_steps", "noise_steps"), "sde_steps"),
        }.items()
    },
    **{f"train.{name}": f"log.{name}" for name in ("save_dir", "save_freq")},
    "train.beta_dpo": "train.dpo_beta",
}
"""The names of settings in older files, and their names today. Those of `train.eval_args` are under `eval` today."""
