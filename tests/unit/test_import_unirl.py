"""UniRL's settings are translated and accounted for one by one."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from progrpo.config import RewardTerm
from progrpo.imports.outcome import STATUSES, Setting
from progrpo.imports.unirl.read import import_unirl
from progrpo.imports.unirl.rules import RULES

SETTINGS: dict[str, Any] = {
    **{"num_devices": 8, "batch_size": 48, "adv_use_global_std": True, "num_rollouts": 200},
    "logging": {"report_to_wandb": False, "project_name": "${oc.env:PROJECT,mine}"},
    "bundle": {
        "_target_": "unirl.models.sd3.bundle.SD3Bundle.from_config",
        "config": {
            "_target_": "unirl.models.sd3.config.SD3PipelineConfig",
            "pretrained_model_ckpt_path": "${oc.env:PRETRAINED_MODEL,somebody/stable-diffusion-3.5}",
            **{"model_precision": "bf16", "shift": 3.0},
        },
    },
    "pipeline": {
        **{"_target_": "unirl.models.sd3.pipeline.SD3Pipeline", "shift": 3.0, "autocast_precision": "bf16"},
        **{"trajectory_precision": "bf16", "logprob_precision": "fp32"},
        "strategy": {"_target_": "unirl.sde.kernels.FlowSDEStrategy"},
    },
    "backend": {
        **{"_target_": "unirl.train.backend.fsdp.FSDPBackend", "trainable_attr": "transformer"},
        "fsdp_cfg": {"param_dtype": "bf16", "activation_checkpointing": True, "use_torch_compile": False},
        "optimizer_cfg": {"learning_rate": 3e-4, "adam_beta1": 0.9, "adam_beta2": 0.99, "weight_decay": 0.0},
        "scheduler_cfg": {"type": "constant", "warmup_steps": 0},
        "lora_cfg": {"rank": 32, "alpha": 64, "dropout": 0.0, "bias": "none", "target_modules": ["attn.to_q"]},
    },
    "rollout": {"_target_": "unirl.rollout.engine.Engine", "forward_batch_size": 16},
    "reward": {
        "_target_": "unirl.reward.service.RewardService",
        "backend": {
            "_target_": "unirl.reward.local.pickscore.PickScoreRewardScorer",
            "config": {"batch_size": 8, "device": "auto"},
        },
    },
    "algorithm": {
        **{"_target_": "unirl.algorithms.flowgrpo.FlowGRPO", "clip_range": "1e-4", "clip_schedule": "constant"},
        "params": "${sampling}",
    },
    "stack": {"micro_batch_size": 4, "max_grad_norm": 0.5, "num_updates_per_batch": 2},
    "data_source": {
        "args": {
            "run": {"data_path": "prompts/train.txt", "eval_data_path": "${oc.env:EVAL}", "seed": 42},
            "algorithm": {"prompts_per_rollout": "${batch_size}"},
        }
    },
    "sampling": {
        **{"num_inference_steps": 10, "guidance_scale": 4.5, "height": 512, "width": 768, "eta": 0.8, "seed": 7},
        **{"samples_per_prompt": 16, "init_same_noise": True},
        "scheduler": {"num_timesteps": "${..num_inference_steps}", "num_sde_steps": 3, "timestep_fraction": [0, 0.5]},
    },
}
NFT: dict[str, Any] = {
    "algorithm": {
        **{"_target_": "unirl.algorithms.diffusionnft.DiffusionNFT", "beta": 0.5, "adv_sat_std": 3.0},
        **{"training_timestep_fraction": 0.9, "ref_deviation_coef": 0.0, "adv_mode": "raw"},
    },
    "sampling.eta": 0.0,
    "sampling.init_same_noise": False,
    "sampling.scheduler.num_sde_steps": 0,
}


def imported(folder: Path, changes: dict[str, Any] | None = None):
    """The settings with changes by dotted names; one that is `...` is left out."""
    settings = deepcopy(SETTINGS)
    for name, value in (changes or {}).items():
        *parents, last = name.split(".")
        part = settings
        for step in parents:
            part = part.setdefault(step, {})
        if value is ...:
            del part[last]
        else:
            part[last] = value
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(settings))
    return import_unirl(str(file))


def statuses(translation) -> dict[str, str]:
    return {row.name: row.outcome.status for row in translation.rows}


def test_a_file_is_translated(tmp_path):
    config = imported(tmp_path).config
    model, sampling, optim = config.model, config.sampling, config.optim
    assert (config.iterations, config.seed, config.prompts.source) == (200, 7, "prompts/train.txt")
    assert (model.path, model.dtype, model.resolution) == ("somebody/stable-diffusion-3.5", "bfloat16", (512, 768))
    assert (model.weights, model.lora_rank, model.lora_alpha, model.lora_targets) == ("lora", 32, 64, ("attn.to_q",))
    assert (model.activation_checkpointing, model.compile) == (True, False)
    assert (sampling.sampler, sampling.noise_level, sampling.shift) == ("flow_grpo", 0.8, 3.0)
    assert (sampling.guidance_scale, config.eval.guidance_scale, sampling.same_latent) == (4.5, 4.5, True)
    assert (sampling.sde_window, sampling.sde_window_size, sampling.sde_window_end) == ("random", 3, 5)
    assert (sampling.latent_dtype, sampling.microbatch) == ("bfloat16", 16)
    assert (config.prompts.per_iteration, config.plan.group_size) == (48, 16)
    assert (config.objective.name, config.objective.advantage) == ("grpo", "batch")
    assert (config.objective.grpo.clip_range, config.objective.grpo.kl_beta) == (1e-4, 0.0)
    assert (optim.lr, optim.betas, optim.weight_decay, optim.max_grad_norm) == (3e-4, (0.9, 0.99), 0.0, 0.5)
    assert (optim.updates_per_rollout, optim.microbatch) == (2, 4)
    assert config.reward.terms == (RewardTerm("pickscore", batch_size=8),)


def test_every_setting_ends_in_one_list_once(tmp_path):
    translation = imported(tmp_path, {"surprise": {"a": 1}})
    names = Counter(row.name for row in translation.rows)
    assert set(names.values()) == {1}

    def leaves(value: Any, name: str = "") -> list[str]:
        if isinstance(value, dict):
            return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{name}.{key}".strip("."))]
        return [name]

    assert {name for name in names if not name.endswith("(its default)")} == {*leaves(SETTINGS), "surprise.a"}
    status = statuses(translation)
    assert set(status.values()) == set(STATUSES)
    assert status["data_source.args.run.eval_data_path"] == "could not be read"
    assert (status["surprise.a"], status["algorithm.params"]) == ("no equal here", "not needed here")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            NFT,
            {
                **{"objective.name": "nft", "objective.nft.beta": 0.5, "objective.nft.adv_clip_max": 3.0},
                **{"objective.nft.draws": 9, "objective.nft.time_fraction": 0.9, "objective.nft.kl_beta": 0.0},
                **{"sampling.sde_window": "none", "sampling.noise_level": None},
            },
        ),
        ({"algorithm.beta": 0.01}, {"objective.grpo.kl_beta": 0.01, "objective.grpo.kl_form": "exact"}),
        ({"pipeline.strategy._target_": "unirl.sde.kernels.DanceSDEStrategy"}, {"sampling.sampler": "dance"}),
        ({"pipeline.strategy._target_": "unirl.sde.kernels.CPSSDEStrategy"}, {"sampling.sampler": "cps_reduced"}),
        ({"sampling.scheduler.num_sde_steps": None}, {"sampling.sde_window": "first", "sampling.sde_window_size": 5}),
        ({"sampling.scheduler": {"num_timesteps": 10}}, {"sampling.sde_window": "all"}),
        (
            {
                "sampling.scheduler": {
                    "config": {"strategy": "progressive", "window_size": 4, "iters_per_window": 25, "overlap_size": 3}
                }
            },
            {
                **{"sampling.sde_window": "sliding", "sampling.sde_window_size": 4},
                **{"sampling.sde_window_interval": 25},
            },
        ),
        ({"backend.lora_cfg": ...}, {"model.weights": "full"}),
        ({"adv_use_global_std": ...}, {"objective.advantage": "group"}),
        (
            {"bundle._target_": "unirl.models.z_image.bundle.ZImageBundle.from_config"},
            {"sampling.guidance_scale": 5.5, "eval.guidance_scale": 5.5},
        ),
        (
            {"bundle._target_": "unirl.models.qwen_image.bundle.QwenImageBundle.from_config"},
            {"sampling.shift": None},
        ),
        ({"sampling.num_frames": 9}, {"model.frames": 9, "reward.frames": 9}),
        (
            {"reward.backend._target_": "unirl.reward.local.hpsv2.HPSv2RewardScorer"},
            {"reward.terms": (RewardTerm("hpsv2", batch_size=8),)},
        ),
        (
            {"reward.backend._target_": "mine.Judge"},
            {"reward.terms": (RewardTerm("my_rewards:Judge", batch_size=8),)},
        ),
    ],
)
def test_settings_mean_the_same_here(tmp_path, changes, expected):
    config = imported(tmp_path, changes).config
    by_path: dict[str, Any] = {}
    for path in expected:
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name)
        by_path[path] = value
    assert by_path == expected


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"sampling.scheduler.timestep_fraction": [0.2, 0.5]}, ["sampling.scheduler.timestep_fraction"]),
        ({"sampling.post_window_ode.compress_ratio": 0.4}, ["sampling.post_window_ode.compress_ratio"]),
        ({"weight_sync_interval": 4}, ["weight_sync_interval"]),
        ({"backend.scheduler_cfg.type": "cosine"}, ["backend.scheduler_cfg.type"]),
        ({"data_source.args.algorithm.prompts_per_rollout": 7}, ["data_source.args.algorithm.prompts_per_rollout"]),
        (
            {**NFT, "backend.ema_lora_cfg": {"rank": 8, "ema_uphold": 0.9}, "backend.lora_cfg": ...},
            ["backend.ema_lora_cfg.ema_uphold"],
        ),
    ],
)
def test_what_differs_is_listed(tmp_path, changes, names):
    status = statuses(imported(tmp_path, changes))
    assert {status[name] for name in names} == {"no equal here"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"algorithm._target_": "unirl.algorithms.flowdppo.FlowDPPO"},
            "'FlowDPPO' has no equal here; there are FlowGRPO",
        ),
        ({"bundle._target_": "unirl.models.bagel.bundle.B.from_config"}, "is of 'bagel', which cannot be trained here"),
        ({"bundle": ...}, "has no bundle._target_, so it trains no diffusion model by one algorithm"),
        (
            {"pipeline.strategy._target_": "unirl.sde.kernels.Other"},
            "'Other' has no equal here; there are FlowSDEStrategy",
        ),
        ({"sampling.samples_per_prompt": 1}, "plan.group_size must be between 2 and 100,000, not 1"),
        ({"sampling.scheduler.timestep_fraction": 2}, "sampling.scheduler.timestep_fraction must lie in 0..1, not 2"),
        (
            {"backend.lora_cfg": ..., "bundle._target_": "unirl.models.wan22.bundle.B.from_config"},
            "it has no backend.lora_cfg, and a Wan 2.2's two networks are trained by a LoRA here",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, changes, sentence):
    with pytest.raises(ValueError) as refused:
        imported(tmp_path, changes)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_each_rule_translates_nonsense_or_refuses_it_in_one_sentence(tmp_path):
    junk: tuple[Any, ...] = (None, True, -1, 0, 2.5, 10**30, float("nan"), "text", [], {}, [1, 2], {"a": 1}, "\n")
    settings = {row.name.removesuffix(" (its default)"): row.value for row in imported(tmp_path).rows}
    for name, rule in RULES.items():
        for value in junk if name != "algorithm._target_" else ():  # which the import itself refuses
            try:
                assert rule(Setting(name, value, {**settings, name: value})).status in STATUSES
            except ValueError as refused:
                assert "\n" not in str(refused) and len(str(refused)) < 600, name


def test_a_block_may_refer_to_a_section(tmp_path):
    own = SETTINGS["bundle"]["config"]
    changes = {
        **{"model_config": own, "bundle.config": "${model_config}", "pipeline.strategy": "${strategy}"},
        "strategy": {"_target_": "unirl.sde.kernels.DanceSDEStrategy"},
    }
    translation = imported(tmp_path, changes)
    assert translation.config.model.path == "somebody/stable-diffusion-3.5"
    assert translation.config.sampling.sampler == "dance"
    status = statuses(translation)
    assert status["model_config.model_precision"] == status["strategy._target_"] == "translated"
    assert status["bundle.config"] == status["model_config._target_"] == "not needed here"


def test_pictures_of_edits_are_listed(tmp_path):
    edits = "unirl.models.qwen_image_edit_plus.bundle.B.from_config"
    translation = imported(tmp_path, {"bundle._target_": edits, "save_interval": 5, "load_dir": "${oc.env:LOAD,}"})
    assert statuses(translation)["data_source.args.run.data_path"] == "no equal here"
    assert (translation.config.prompts.source, translation.config.checkpoint.every) == ("prompts/train.txt", 5)
    assert statuses(translation)["load_dir"] == "not needed here"


def test_a_model_that_edits_there_and_paints_here_is_listed(tmp_path):
    backend = {"_target_": "unirl.reward.remote.RemoteRewardBackend", "config": {"required_rewards": ["editreward"]}}
    klein = {"bundle._target_": "unirl.models.flux2_klein.bundle.Flux2KleinBundle.from_config"}
    path = "data_source.args.run.data_path"
    assert statuses(imported(tmp_path, klein))[path] == "translated"
    assert statuses(imported(tmp_path, {**klein, "reward.backend": backend}))[path] == "no equal here"


def test_the_lora_beside_an_old_policy_is_read(tmp_path):
    shadow = {"rank": 8, "alpha": 16, "ema_uprate": 1e-3, "ema_uphold": 0.5, "timing": "rollout_end"}
    translation = imported(tmp_path, {**NFT, "backend.ema_lora_cfg": shadow})
    assert (translation.config.model.lora_rank, translation.config.model.lora_targets) == (8, ())
    assert statuses(translation)["backend.lora_cfg.rank"] == "not needed here"


def test_what_a_file_leaves_out_of_a_run_has_their_default(tmp_path):
    translation = imported(tmp_path, {"num_rollouts": ...})
    config = translation.config
    assert (config.iterations, config.eval.every, config.eval.num_inference_steps) == (100, 0, 10)
    status = statuses(translation)
    assert status["num_rollouts (its default)"] == status["eval_interval (its default)"] == "translated"
    assert status["save_interval (its default)"] == "no equal here"


def test_evaluations_may_have_other_steps_and_guidance(tmp_path):
    own = {"eval_sampling": {"num_inference_steps": 28, "guidance_scale": 3.0}, "eval_interval": 20}
    config = imported(tmp_path, {**own, "eval_num_prompts": 64, "eval_samples_per_prompt": 4, "eval_eta": 0.0}).config
    assert (config.sampling.num_inference_steps, config.sampling.guidance_scale) == (10, 4.5)
    assert (config.eval.num_inference_steps, config.eval.guidance_scale) == (28, 3.0)
    assert (config.eval.every, config.eval.pictures) == (20, 64)


@pytest.mark.parametrize(("package", "frames"), [("wan22", 1), ("sd3", None)])
def test_a_video_of_one_frame_is_not_the_models_own_length(tmp_path, package, frames):
    bundle = f"unirl.models.{package}.bundle.Bundle.from_config"
    config = imported(tmp_path, {"bundle._target_": bundle, "sampling.num_frames": 1}).config
    assert config.model.frames == frames


def test_rewards_of_a_server_are_terms(tmp_path):
    backend = {
        "_target_": "unirl.reward.remote.RemoteRewardBackend",
        "config": {
            **{"base_url": "http://localhost:8080", "batch_size": 8, "aggregation_method": "weighted_sum"},
            **{"sub_metric_reduce": "first"},
            **{"required_rewards": ["hpsv2", "unified_reward", "odd"], "reward_weights": {"hpsv2": 0.2, "odd": 0.5}},
        },
    }
    translation = imported(tmp_path, {"reward.backend": backend})
    terms = (RewardTerm("hpsv2", 0.2), RewardTerm("unifiedreward"), RewardTerm("my_rewards:odd", 0.5))
    assert translation.config.reward.terms == terms
    assert statuses(translation)["reward.backend.config.required_rewards"] == "no equal here"
    assert not [row.name for row in translation.rows if row.outcome.note == "not a setting that this import knows"]
