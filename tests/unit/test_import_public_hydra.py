"""Public settings of verl-omni and UniRL, from tables of what differs between them: every setting is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from progrpo.config import Config, RewardTerm
from progrpo.imports.unirl.read import import_unirl
from progrpo.imports.verl_omni.read import import_verl_omni

UNKNOWN = "not a setting that this import knows"


def values(config: Config, paths: dict[str, Any]) -> dict[str, Any]:
    by_path: dict[str, Any] = {}
    for path in paths:
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name)
        by_path[path] = value
    return by_path


# --- verl-omni --------------------------------------------------------------------------------------------------------

MODEL, ACTOR, ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("model", "actor", "rollout"))
LOSS, PIPELINE, ALGO, TRUE_CFG = f"{ACTOR}.diffusion_loss", f"{ROLLOUT}.pipeline", f"{ROLLOUT}.algo", "true_cfg_scale"
READ_BY_A_MODEL = {
    **{"reward.num_workers": 1, "reward.reward_model.enable": True, "reward.reward_model.model_path": "some/judge"},
    **{"reward.reward_model.rollout.name": "vllm", "reward.reward_model.rollout.tensor_model_parallel_size": 4},
    "reward.custom_reward_function.path": "verl_omni/utils/reward_score/genrm_ocr.py",
    "reward.custom_reward_function.name": "compute_score_ocr",
}
COMMON = {
    **{"data.train_files": "t.parquet", "data.val_files": "v.parquet", "data.max_prompt_length": 256},
    **{f"{ACTOR}.optim.lr": "3e-4", f"{ACTOR}.optim.weight_decay": 1e-4, f"{ACTOR}.ppo_mini_batch_size": 16},
    **{f"{ACTOR}.ppo_micro_batch_size_per_gpu": 16, f"{ACTOR}.fsdp_config.param_offload": True},
    **{f"{ACTOR}.fsdp_config.optimizer_offload": True, f"{ACTOR}.fsdp_config.model_dtype": "bfloat16"},
    **{f"{ROLLOUT}.name": "vllm_omni", f"{ROLLOUT}.n": 16, f"{ROLLOUT}.agent.num_workers": 4},
    **{f"{ROLLOUT}.tensor_model_parallel_size": 1, f"{ROLLOUT}.load_format": "safetensors"},
    **{f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": 32, f"{ROLLOUT}.layered_summon": True},
    **{f"{ROLLOUT}.val_kwargs.pipeline.num_inference_steps": 50, f"{ROLLOUT}.val_kwargs.algo.noise_level": 0.0},
    **{"actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 32, "trainer.logger": ["console", "wandb"]},
    **{"trainer.project_name": "p", "trainer.experiment_name": "e", "trainer.log_val_generations": 8},
    **{"trainer.val_before_train": False, "trainer.n_gpus_per_node": 4, "trainer.nnodes": 1, "trainer.save_freq": 30},
    **{"trainer.test_freq": 30, "trainer.total_epochs": 15, "trainer.total_training_steps": 300},
}
QWEN = {
    **{**COMMON, **READ_BY_A_MODEL, "data.train_batch_size": 32, f"{MODEL}.path": "Qwen/Qwen-Image"},
    **{f"{MODEL}.lora_rank": 64, f"{MODEL}.lora_alpha": 128, f"{MODEL}.target_modules": ["to_q", "to_k"]},
    **{f"{PIPELINE}.max_sequence_length": 256},
}
SDE = {
    **{f"{ALGO}.noise_level": 1.2, f"{ALGO}.sde_type": "sde", f"{ALGO}.sde_window_size": 2},
    **{f"{ALGO}.sde_window_range": [0, 5], f"{PIPELINE}.{TRUE_CFG}": 4.0},
}
SD35 = {
    **{**COMMON, "data.train_batch_size": 8, "data.val_max_samples": 32, "data.truncation": "error", "data.seed": 42},
    **{f"{MODEL}.path": "stabilityai/stable-diffusion-3.5-medium", f"{MODEL}.attn_backend": "native"},
    **{f"{MODEL}.custom_chat_template": "x", f"{MODEL}.extra_tokenizers": {"clip": {"path": "tokenizer"}}},
    **{f"{MODEL}.lora_rank": 32, f"{MODEL}.lora_alpha": 64, f"{ACTOR}.ppo_mini_batch_size": 4},
    **{f"{ACTOR}.use_kl_loss": False, f"{ACTOR}.strategy": "fsdp2", f"{ROLLOUT}.rollout_attn_backend": "TORCH_SDPA"},
    **{f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size": 1, f"{ROLLOUT}.n": 8, f"{ROLLOUT}.seed": 42},
    **{f"{PIPELINE}.height": 384, f"{PIPELINE}.width": 384, f"{PIPELINE}.num_inference_steps": 10},
    **{f"{PIPELINE}.max_sequence_length": 256, f"{ROLLOUT}.engine_kwargs.vllm_omni.max_num_seqs": 256},
    **{"trainer.use_v1": True, "trainer.v1.trainer_mode": "sync"},
}
PAIRS = {
    **{"algorithm.trainer_type": "direct_preference", "algorithm.paired_preference": True},
    **{f"{MODEL}.algorithm": "dpo", f"{MODEL}.model_type": "diffusion_dpo_model", f"{LOSS}.loss_mode": "dpo"},
    **{f"{MODEL}.external_lib": "verl_omni.pipelines.dpo", f"{LOSS}.dpo_beta": 100.0},
}
WINDOW = {"sampling.sde_window": "random", "sampling.sde_window_size": 2, "sampling.sde_window_end": 5}
SCRIPTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flowgrpo/qwen_image/ocr_lora": (
        {**QWEN, **SDE, f"{MODEL}.algorithm": "flow_grpo", f"{ROLLOUT}.step_execution": True},
        {**WINDOW, "sampling.guidance_scale": 4.0, "prompts.per_iteration": 32, "optim.updates_per_rollout": 2},
    ),
    "flowgrpo/sd35/ocr_lora_v1": (
        {
            **{**SD35, **READ_BY_A_MODEL, f"{MODEL}.algorithm": "flow_grpo", f"{LOSS}.clip_ratio": "1e-5"},
            **{f"{PIPELINE}.guidance_scale": 1.0, f"{ALGO}.noise_level": 0.8, f"{ALGO}.sde_type": "cps"},
            **{f"{ALGO}.sde_window_size": 3, f"{ALGO}.sde_window_range": [0, 5], f"{ACTOR}.kl_loss_coef": 0.0},
        },
        {"sampling.sampler": "cps_reduced", "objective.grpo.clip_range": 1e-5, "model.resolution": 384},
    ),
    "flowgrpo/sd35/drm_lora": (
        {
            **{**SD35, f"{LOSS}.clip_ratio": "3e-6", f"{ACTOR}.use_kl_loss": True, f"{ACTOR}.kl_loss_coef": 0.01},
            **{f"{PIPELINE}.output_type": "latent", f"{ALGO}.sde_type": "cps", f"{ALGO}.noise_level": 0.8},
            **{f"{ALGO}.sde_window_size": 3, f"{ALGO}.sde_window_range": [0, 5], f"{PIPELINE}.guidance_scale": 1.0},
            **{f"{ROLLOUT}.val_kwargs.pipeline.guidance_scale": 1.0, f"{ROLLOUT}.dtype": "float32"},
            **{"reward.reward_functions.drm.path": "pkg://a.latent_client", "reward.reward_functions.drm.weight": 1.0},
            **{"reward.reward_functions.drm.name": "compute_score", "reward.reward_functions.drm.score_scale": 0.1},
            "trainer.max_actor_ckpt_to_keep": 3,
        },
        {
            **{"objective.grpo.kl_beta": 0.01, "objective.grpo.kl_form": "exact", "checkpoint.keep": 3},
            "reward.terms": (RewardTerm("my_rewards:latent_client"),),
        },
    ),
    "flowgrpo/qwen_image/ocr_lora_veomni": (
        {
            **{**QWEN, **SDE, "diffusion/model_engine": "veomni_diffusion", f"{ACTOR}.strategy": "veomni"},
            **{f"{ACTOR}.veomni_config.param_offload": True, "actor_rollout_ref.ref.veomni_config.strategy": "veomni"},
        },
        WINDOW,
    ),
    "flowgrpo/qwen_image/ocr_lora_rollout_corr": (
        {
            **{**QWEN, **SDE, "algorithm.rollout_correction.rollout_rs": "seq_mean_k1"},
            **{"algorithm.rollout_correction.rollout_is_threshold": 2.0, f"{ROLLOUT}.calculate_log_probs": True},
        },
        WINDOW,
    ),
    "flowgrpo/qwen_image_edit/lora": (
        {
            **{**QWEN, **SDE, f"{MODEL}.path": "Qwen/Qwen-Image-Edit-2511", f"{MODEL}.lora_dtype": "float32"},
            **{"algorithm.global_std": False, f"{ROLLOUT}.prompt_length": 8192, "trainer.resume_mode": "auto"},
            **{"trainer.default_local_dir": "out", "trainer.rollout_data_dir": "a", "trainer.validation_data_dir": "b"},
        },
        {"objective.advantage": "group", "model.path": "Qwen/Qwen-Image-Edit-2511"},
    ),
    "flowgrpo/z_image/ocr_lora": (
        {
            **{**QWEN, **SDE, f"{MODEL}.path": "Tongyi-MAI/Z-Image", f"{MODEL}.height": 1024, f"{MODEL}.width": 1024},
            **{f"{ROLLOUT}.guidance_scale": 4.0, f"{ROLLOUT}.height": 1024, f"{ROLLOUT}.width": 1024},
            **{f"{ROLLOUT}.max_sequence_length": 512, f"{ROLLOUT}.val_kwargs.num_inference_steps": 50},
            "reward.reward_manager.name": "visual",
        },
        {"sampling.guidance_scale": 5.0, "model.resolution": 1024, "eval.num_inference_steps": 50},
    ),
    "mixgrpo/qwen_image/ocr_lora": (
        {
            **{**QWEN, **SDE, f"{MODEL}.algorithm": "mix_grpo", f"{LOSS}.loss_mode": "flow_grpo"},
            **{"algorithm.adv_estimator": "flow_grpo", f"{ALGO}.sample_strategy": "random"},
            **{f"{ALGO}.sde_window_seed": 42, "trainer.use_v1": False},
        },
        {**WINDOW, "objective.name": "grpo"},
    ),
    "grpoguard/qwen_image/ocr_lora": (
        {
            **{**QWEN, **SDE, "algorithm.adv_estimator": "flow_grpo", f"{LOSS}.loss_mode": "grpo_guard"},
            **{f"{LOSS}.clip_ratio": "2e-6", f"{LOSS}.adv_clip_max": 5.0},
        },
        {"objective.grpo.ratio": "guard", "objective.grpo.clip_range": 2e-6},
    ),
    "diffusionnft/qwen_image/ocr_lora": (
        {
            **{**QWEN, f"{MODEL}.algorithm": "diffusion_nft", f"{MODEL}.model_type": "diffusion_nft_model"},
            **{f"{MODEL}.policy_state_adapters": ["default", "old"], f"{LOSS}.loss_mode": "diffusion_nft"},
            **{f"{LOSS}.clip_ratio": "1e-5", f"{LOSS}.mix_beta": 0.1, f"{LOSS}.ref_kl_coef": 1e-4},
            **{
                f"{LOSS}.adv_clip_max": 5.0,
                f"{ROLLOUT}.calculate_log_probs": False,
                f"{ROLLOUT}.rollout_adapter": "old",
            },
            **{"algorithm.old_policy_decay_schedule": "delayed_linear_to_0_999", "algorithm.adv_mode": "continuous"},
            **{"algorithm.old_policy_update_interval": 2, "algorithm.timestep_fraction": 1.0},
            **{"algorithm.trainer_type": "direct_preference", "data.train_max_samples": 7200},
        },
        {"objective.name": "nft", "objective.nft.beta": 0.1, "objective.nft.draws": 10},
    ),
    "dgpo/sd35/ocr_lora_v1": (
        {
            **{**SD35, f"{MODEL}.algorithm": "dgpo", f"{LOSS}.dgpo_beta": 100.0, f"{LOSS}.dgpo_clip_range": 0.01},
            **{f"{LOSS}.ref_kl_coef": 0.02, "algorithm.train_timestep_range": [0, 7], f"{ALGO}.noise_level": 0.0},
            **{"algorithm.train_timestep_count": 4, "algorithm.old_policy_decay_schedule": "linear_to_0_3"},
            **{"algorithm.old_policy_update_interval": 1, f"{PIPELINE}.guidance_scale": 4.5},
            **{f"{ROLLOUT}.max_prompt_embed_length": 333, "trainer.v1.sampler.drop_incomplete_groups": True},
            **{f"{ACTOR}.use_no_sync_for_gradient_accumulation": True, "reward.models.ocr.backend": "engine"},
            **{"reward.reward_functions.ocr.path": "x/genrm_ocr.py", "reward.reward_functions.ocr.weight": 1.0},
            **{"reward.reward_functions.ocr.name": "compute_score_ocr", "reward.reward_functions.ocr.required": True},
        },
        {"objective.name": "dgpo", "objective.dgpo.time_fraction": 0.7, "sampling.guidance_scale": 4.5},
    ),
    "dpo/qwen_image/online_lora": (
        {**QWEN, **PAIRS, "algorithm.sample_source": "online", f"{PIPELINE}.num_inference_steps": 35},
        {"objective.dpo.beta": 50.0, "plan.final_keep": 2, "plan.group_size": 16, "sampling.sde_window": "none"},
    ),
    "dpo/sd35/offline_lora": (
        {
            **{**SD35, **PAIRS, "algorithm.sample_source": "offline", "data.custom_cls.path": "pkg://x"},
            **{"data.custom_cls.name": "D", "data.custom_cls.collate_fn": "c", f"{MODEL}.pipeline.guidance_scale": 4.0},
        },
        {"objective.dpo.beta": 50.0, "prompts.pairs": "t.jsonl", "prompts.per_iteration": 8},
    ),
    "dancegrpo/flux1/full": (
        {
            **{**COMMON, "data.train_batch_size": 16, f"{MODEL}.path": "models/FLUX.1-dev", f"{MODEL}.lora_rank": 0},
            **{"algorithm.adv_estimator": "dance_grpo", f"{MODEL}.algorithm": "dance_grpo", f"{ACTOR}.ppo_epochs": 1},
            **{"algorithm.rollout_correction.bypass_mode": False, f"{MODEL}.pipeline.guidance_scale": 1.0},
            **{f"{LOSS}.loss_mode": "dance_grpo", f"{ACTOR}.optim.optimizer": "AdamW", f"{ACTOR}.shuffle": False},
            **{f"{ACTOR}.optim.lr_scheduler_type": "constant", f"{ACTOR}.optim.lr_warmup_steps": 0},
            **{
                f"{ACTOR}.optim.clip_grad": 1.0,
                f"{ROLLOUT}.enable_sleep_mode": True,
                f"{PIPELINE}.guidance_scale": 3.5,
            },
            **{f"{ALGO}.sde_type": "dance_sde", f"{ALGO}.noise_level": 0.3, f"{ALGO}.sde_window_size": None},
            **{f"{ALGO}.sde_window_range": None, "reward.custom_reward_function.name": "compute_score_hpsv2"},
            **{"trainer.test_freq": -1, "trainer.max_actor_ckpt_to_keep": 1, "trainer.device": "npu"},
        },
        {"sampling.sampler": "dance", "sampling.sde_window": "all", "sampling.embedded_guidance": True},
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_verl_omnis_script(tmp_path, name):
    settings, expected = SCRIPTS[name]
    file = tmp_path / "run.sh"
    lines = [
        f"'{key}={yaml.safe_dump(value, default_flow_style=True).partition(chr(10))[0]}'"
        for key, value in settings.items()
    ]
    file.write_text(" \\\n    ".join(["python3 -m verl_omni.trainer.main_diffusion", *lines]) + ' "$@"\n')
    translation = import_verl_omni(str(file))
    assert values(translation.config, expected) == expected
    assert [row.name for row in translation.rows if row.outcome.note == UNKNOWN] == []


# --- UniRL ------------------------------------------------------------------------------------------------------------


def unirl(package: str, path: str, sampling: dict[str, Any], scheduler: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The settings of a model's file, with what differs from FlowGRPO by a LoRA with PickScore."""
    backend = {
        **{
            "_target_": "unirl.train.backend.fsdp.FSDPBackend",
            "block_class_names": ["B"],
            "trainable_attr": "transformer",
        },
        "fsdp_cfg": {
            "_target_": "F",
            "param_dtype": "bf16",
            "activation_checkpointing": True,
            "use_torch_compile": False,
        },
        "optimizer_cfg": {"_target_": "O", "learning_rate": 3e-4, "adam_beta1": 0.9, "adam_beta2": 0.999},
        "scheduler_cfg": {"_target_": "S", "type": "constant", "warmup_steps": 0, "total_steps": 10000},
        "lora_cfg": {"_target_": "L", "rank": 64, "alpha": 128, "task_type": "F", "target_modules": ["to_q"]},
    }
    precision = {"autocast_precision": "bf16", "trajectory_precision": "fp16", "logprob_precision": "fp32"}
    return {
        **{"num_devices": 8, "batch_size": 48, "adv_use_global_std": True, "logging": {"run_name": "${oc.env:R,r}"}},
        "bundle": {
            "_target_": f"unirl.models.{package}.bundle.B.from_config",
            "config": {
                "_target_": "C",
                "pretrained_model_ckpt_path": f"${{oc.env:M,{path}}}",
                "model_precision": "bf16",
            },
        },
        "pipeline": {"shift": 5.0, **precision, "strategy": {"_target_": "unirl.sde.kernels.FlowSDEStrategy"}},
        "backend": backend,
        "rollout": {"_target_": "E", "stage_attrs": ["diffusion"], "forward_batch_size": 1},
        "reward": {
            "_target_": "R",
            "backend": {
                **{"_target_": "unirl.reward.local.pickscore.PickScoreRewardScorer", "base_device": "cuda"},
                "config": {"_target_": "P", "batch_size": 8, "device": "auto", "processor_id": "p", "model_id": "m"},
            },
        },
        "algorithm": {
            **{"_target_": "unirl.algorithms.flowgrpo.FlowGRPO", "stage_attr": "diffusion", "clip_range": 1e-4},
            **{"clip_schedule": "constant", "old_logp_source": "replay", "params": "${sampling}"},
            "conditions_cls": {"_target_": "hydra.utils.get_class", "path": "c"},
        },
        "stack": {"_target_": "T", "micro_batch_size": 1, "max_grad_norm": 1.0, "num_updates_per_batch": 2},
        "data_source": {
            "_target_": "D",
            "args": {"run": {"data_path": "t.txt", "eval_data_path": "e.txt", "seed": 42}, "algorithm": PROMPTS},
        },
        "sampling": {
            **{"_target_": "S", "guidance_scale": 1.0, "height": 512, "width": 512, "eta": 0.7, "seed": 42},
            **{"samples_per_prompt": 16, "init_same_noise": False, **sampling},
            "scheduler": {"_target_": "A", "num_timesteps": "${..num_inference_steps}", **scheduler},
        },
        **more,
    }


PROMPTS = {"prompts_per_rollout": "${batch_size}"}
POOL = {"num_sde_steps": 3, "timestep_fraction": [0.0, 0.5]}
SLIDING = {
    "config": {
        **{"_target_": "W", "strategy": "progressive", "window_size": 4, "iters_per_window": 25, "init_timestep": 0},
        **{"overlap_size": 1, "roll_back": True, "max_iters_per_window": 10, "min_iters_per_window": 1},
    }
}
FILES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd3/trainside": (
        unirl("sd3", "stabilityai/stable-diffusion-3.5-medium", {"num_inference_steps": 10}, POOL),
        {"sampling.sde_window_size": 3, "sampling.sde_window_end": 5, "sampling.shift": 5.0},
    ),
    "sd3/mixgrpo": (
        unirl("sd3", "s/sd3", {"num_inference_steps": 10, "init_same_noise": True}, SLIDING),
        {"sampling.sde_window": "sliding", "sampling.same_latent": True, "sampling.sde_window_interval": 25},
    ),
    "qwen_image/mixgrpo": (
        unirl("qwen_image", "Qwen/Qwen-Image", {"num_inference_steps": 12, "init_same_noise": True}, SLIDING),
        {"sampling.shift": None, "sampling.sde_window_size": 4},
    ),
    "flux2_klein/trainside": (
        unirl("flux2_klein", "black-forest-labs/FLUX.2-klein-base-9B", {"num_inference_steps": 10}, POOL),
        {"sampling.embedded_guidance": False, "sampling.latent_dtype": "float16"},
    ),
    "z_image/trainside": (
        unirl("z_image", "Tongyi-MAI/Z-Image", {"num_inference_steps": 12, "guidance_scale": 0.0}, POOL),
        {"sampling.guidance_scale": 1.0, "sampling.sde_window_end": 6},
    ),
    "hunyuan_video/t2v_trainside": (
        unirl(
            "hunyuan_video", "hunyuanvideo-community/HunyuanVideo", {"num_inference_steps": 10, "num_frames": 5}, POOL
        ),
        {"model.frames": 5, "sampling.guidance_scale": 1.0},
    ),
    "hunyuan_video15/t2v_dancegrpo": (
        unirl("hunyuan_video15", "h/HunyuanVideo-1.5", {"num_inference_steps": 16, "guidance_scale": 0.0}, POOL),
        {"sampling.guidance_scale": 1.0, "sampling.sde_window_end": 8},
    ),
    "wan22/t2v_14b": (
        unirl(
            "wan22",
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            {"num_inference_steps": 20, "num_frames": 1},
            {"timestep_fraction": [0.0, 0.2], "num_sde_steps": None},
            num_rollouts=1000,
        ),
        {"sampling.sde_window": "first", "sampling.sde_window_size": 4, "iterations": 1000},
    ),
    "sd3/vllmomni": (
        unirl(
            "sd3",
            "s/sd3",
            {"num_inference_steps": 10},
            POOL,
            weight_sync_interval=1,
            sync={"_target_": "L", "verify": True},
            rollout={"_target_": "V", "model_config": "${bundle.config}", "config": {"modality": "sd3_t2i"}},
        ),
        {"objective.name": "grpo", "sampling.sampler": "flow_grpo"},
    ),
}


def written(folder: Path, settings: dict[str, Any]) -> str:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)


@pytest.mark.parametrize("name", FILES)
def test_unirls_file(tmp_path, name):
    settings, expected = FILES[name]
    translation = import_unirl(written(tmp_path, settings))
    assert values(translation.config, expected) == expected
    assert [row.name for row in translation.rows if row.outcome.note == UNKNOWN] == []


@pytest.mark.parametrize("package", ["bagel", "boogu_image", "ltx2", "minimax_h3"])
def test_unirls_file_of_a_model_without_a_policy(tmp_path, package):
    settings = unirl(package, "some/model", {"num_inference_steps": 10}, POOL)
    with pytest.raises(ValueError, match=f"is of '{package}', which cannot be trained here"):
        import_unirl(written(tmp_path, settings))


@pytest.mark.parametrize("algorithm", ["FlowDPPO", "FlashGRPO", "TempFlowGRPO", "DiffusionOPD", "SFT"])
def test_unirls_file_of_another_algorithm(tmp_path, algorithm):
    settings = unirl("sd3", "some/model", {"num_inference_steps": 10}, POOL)
    settings["algorithm"]["_target_"] = f"unirl.algorithms.other.{algorithm}"
    with pytest.raises(ValueError, match=f"'{algorithm}' has no equal here"):
        import_unirl(written(tmp_path, settings))
