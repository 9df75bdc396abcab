"""verl-omni's settings are translated and accounted for one by one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from progrpo.config import RewardTerm
from progrpo.imports.outcome import STATUSES, Setting
from progrpo.imports.verl_omni.read import import_verl_omni
from progrpo.imports.verl_omni.rules import RULES

MODEL, ACTOR, ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("model", "actor", "rollout"))
LOSS, PIPELINE, ALGO = f"{ACTOR}.diffusion_loss", f"{ROLLOUT}.pipeline", f"{ROLLOUT}.algo"
ALGORITHM = f"{MODEL}.algorithm"
SETTINGS: dict[str, Any] = {
    **{"data.train_files": "data/train.parquet", "data.val_files": "data/test.parquet", "data.train_batch_size": 32},
    **{"data.max_prompt_length": 256, "data.seed": 42, "data.val_max_samples": 64},
    **{ALGORITHM: "flow_grpo", f"{MODEL}.path": "Qwen/Qwen-Image", f"{MODEL}.lora_rank": 64},
    **{f"{MODEL}.lora_alpha": 128, f"{MODEL}.target_modules": ["to_q", "to_k"], f"{MODEL}.attn_backend": "native"},
    **{f"{ACTOR}.optim.lr": "3e-4", f"{ACTOR}.optim.weight_decay": 1e-4, f"{ACTOR}.ppo_mini_batch_size": 16},
    **{f"{ACTOR}.ppo_micro_batch_size_per_gpu": 8, f"{ACTOR}.fsdp_config.model_dtype": "bfloat16"},
    **{f"{LOSS}.clip_ratio": 1e-5, f"{ACTOR}.use_kl_loss": False, f"{ACTOR}.strategy": "fsdp2"},
    **{f"{ROLLOUT}.name": "vllm_omni", f"{ROLLOUT}.n": 16, f"{ROLLOUT}.tensor_model_parallel_size": 1},
    **{f"{PIPELINE}.height": 384, f"{PIPELINE}.width": 384, f"{PIPELINE}.num_inference_steps": 10},
    **{f"{PIPELINE}.true_cfg_scale": 4.0, f"{PIPELINE}.max_sequence_length": 256, f"{ALGO}.noise_level": 1.2},
    **{f"{ALGO}.sde_type": "sde", f"{ALGO}.sde_window_size": 2, f"{ALGO}.sde_window_range": [0, 5]},
    f"{ROLLOUT}.val_kwargs.pipeline.num_inference_steps": 28,
    **{f"{ROLLOUT}.val_kwargs.algo.noise_level": 0.0, "reward.reward_model.enable": True, "reward.num_workers": 1},
    "reward.custom_reward_function.path": "verl_omni/utils/reward_score/pickscore_reward.py",
    "reward.custom_reward_function.name": "compute_score_pickscore",
    **{"trainer.total_training_steps": 300, "trainer.total_epochs": 15, "trainer.save_freq": 30},
    **{"trainer.test_freq": 20, "trainer.logger": ["console"], "trainer.n_gpus_per_node": 4},
}


def as_override(name: str, value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True).partition("\n")[0]
    return f"    '{name}={text}'"


def imported(folder: Path, changes: dict[str, Any] | None = None):
    """The settings with changes as a script."""
    lines = [as_override(name, value) for name, value in {**SETTINGS, **(changes or {})}.items()]
    file = folder / "run.sh"
    file.write_text(" \\\n".join(["python3 -m verl_omni.trainer.main_diffusion", *lines]) + ' "$@"\n')
    return import_verl_omni(str(file))


def statuses(translation) -> dict[str, str]:
    return {row.name: row.outcome.status for row in translation.rows}


def test_a_script_is_translated(tmp_path):
    config = imported(tmp_path).config
    assert (config.iterations, config.checkpoint.every, config.eval.every) == (300, 30, 20)
    model, sampling, optim = config.model, config.sampling, config.optim
    assert (model.path, model.weights, model.lora_rank, model.lora_alpha) == ("Qwen/Qwen-Image", "lora", 64, 128)
    assert (model.lora_targets, model.resolution, model.dtype) == (("to_q", "to_k"), 384, "bfloat16")
    assert (model.max_sequence_length, model.activation_checkpointing) == (256, True)
    assert (config.prompts.source, config.prompts.per_iteration) == ("data/train.parquet", 32)
    assert (config.eval.prompts, config.eval.pictures, config.eval.num_inference_steps) == ("data/test.parquet", 64, 28)
    assert (sampling.guidance_scale, sampling.embedded_guidance, config.eval.guidance_scale) == (4.0, False, 4.0)
    assert (sampling.sampler, sampling.noise_level) == ("flow_grpo", 1.2)
    assert (sampling.sde_window, sampling.sde_window_size, sampling.sde_window_end) == ("random", 2, 5)
    assert (config.plan.group_size, config.objective.name, config.objective.advantage) == (16, "grpo", "batch")
    assert (config.objective.grpo.clip_range, config.objective.grpo.kl_beta) == (1e-5, 0.0)
    assert (optim.lr, optim.weight_decay, optim.updates_per_rollout, optim.microbatch) == (3e-4, 1e-4, 2, 8)
    assert config.reward.terms == (RewardTerm("pickscore"),)


def test_every_setting_ends_in_one_list_once(tmp_path):
    more = {"surprise": 1, "odd": "${missing}", "later": "${data.seed}"}
    translation = imported(tmp_path, more)
    names = Counter(row.name for row in translation.rows)
    assert set(names.values()) == {1}
    assert {name for name in names if not name.endswith("(its default)")} == {*SETTINGS, *more}
    status = statuses(translation)
    assert set(status.values()) == set(STATUSES)
    assert (status["surprise"], status["odd"], status["later"]) == (STATUSES[2], STATUSES[3], STATUSES[2])
    assert status["data.train_files"] == "no equal here" and status[f"{ROLLOUT}.name"] == "not needed here"


def test_a_yaml_file_has_the_same_meaning(tmp_path):
    nested: dict[str, Any] = {}
    height = f"${{oc.select:{PIPELINE}.height,512}}"
    for name, value in {
        **SETTINGS,
        f"{ACTOR}._target_": "a.B",
        f"{ROLLOUT}.val_kwargs.pipeline.height": height,
    }.items():
        *parents, last = name.split(".")
        part = nested
        for step in parents:
            part = part.setdefault(step, {})
        part[last] = value
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(nested))
    translation = import_verl_omni(str(file))
    assert translation.config == imported(tmp_path).config
    status = statuses(translation)
    assert status[f"{ACTOR}._target_"] == status[f"{ROLLOUT}.val_kwargs.pipeline.height"] == "not needed here"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({ALGORITHM: "mix_grpo", f"{LOSS}.loss_mode": "flow_grpo"}, {"objective.name": "grpo"}),
        (
            {f"{LOSS}.loss_mode": "grpo_guard", f"{LOSS}.clip_ratio": 2e-6},
            {"objective.grpo.ratio": "guard", "objective.grpo.step_weights": "inverse_h"},
        ),
        (
            {ALGORITHM: "grpo_guard", "algorithm.adv_estimator": "flow_grpo"},
            {"objective.grpo.ratio": "guard", "objective.grpo.step_weights": "inverse_h"},
        ),
        ({ALGORITHM: "dance_grpo", f"{ALGO}.sde_type": "dance_sde"}, {"sampling.sampler": "dance"}),
        (
            {f"{ACTOR}.use_kl_loss": True, f"{ACTOR}.kl_loss_coef": 0.04},
            {"objective.grpo.kl_form": "flow_grpo", "objective.grpo.kl_beta": 0.04},
        ),
        (
            {
                **{ALGORITHM: "diffusion_nft", f"{LOSS}.mix_beta": 0.1, f"{LOSS}.ref_kl_coef": 1e-4},
                **{"algorithm.timestep_fraction": 0.5, "algorithm.old_policy_decay_schedule": "linear_to_0_5"},
            },
            {
                **{"objective.name": "nft", "objective.nft.beta": 0.1, "objective.nft.kl_beta": 1e-4},
                **{"objective.nft.draws": 5, "sampling.sde_window": "none"},
            },
        ),
        (
            {
                **{ALGORITHM: "dgpo", f"{LOSS}.dgpo_beta": 100.0, f"{LOSS}.dgpo_clip_range": 0.01},
                **{"algorithm.train_timestep_count": 4, "algorithm.train_timestep_range": [0, 7]},
                f"{LOSS}.ref_kl_coef": 0.02,
            },
            {
                **{"objective.name": "dgpo", "objective.dgpo.dpo_beta": 100.0, "objective.dgpo.clip_range": 0.01},
                **{"objective.dgpo.draws": 4, "objective.dgpo.time_fraction": 0.7, "objective.dgpo.kl_beta": 0.02},
            },
        ),
        (
            {ALGORITHM: "dpo", f"{LOSS}.dpo_beta": 100.0},
            {
                **{"objective.name": "dpo", "objective.dpo.beta": 50.0, "objective.dpo.draws": 1},
                **{"plan.group_size": 16, "plan.final_keep": 2, "objective.advantage": "group"},
            },
        ),
        (
            {ALGORITHM: "dpo", "algorithm.sample_source": "offline"},
            {"prompts.pairs": "data/train.jsonl", "prompts.per_iteration": 32, "objective.dpo.beta": 1000.0},
        ),
        (
            {f"{ALGO}.sample_strategy": "progressive", f"{ALGO}.iters_per_group": 5},
            {"sampling.sde_window": "sliding", "sampling.sde_window_interval": 5},
        ),
        ({f"{ALGO}.sde_window_size": None, f"{ALGO}.sde_window_range": None}, {"sampling.sde_window": "all"}),
        (
            {f"{MODEL}.path": "black-forest-labs/FLUX.1-dev", f"{PIPELINE}.guidance_scale": 3.5},
            {"sampling.guidance_scale": 3.5, "sampling.embedded_guidance": True, "eval.guidance_scale": 3.5},
        ),
        (
            {f"{MODEL}.path": "Tongyi-MAI/Z-Image", f"{ROLLOUT}.guidance_scale": 4.0},
            {"sampling.guidance_scale": 5.0, "sampling.embedded_guidance": False},
        ),
        (
            {f"{MODEL}.path": "Wan-AI/Wan2.2-T2V-A14B-Diffusers", f"{PIPELINE}.num_frames": 9},
            {"model.frames": 9, "reward.frames": 9, "sampling.guidance_scale": 4.0},
        ),
        ({f"{MODEL}.lora_rank": 0}, {"model.weights": "full", "model.lora_targets": ()}),
        ({f"{PIPELINE}.width": 512}, {"model.resolution": (384, 512)}),
        ({"algorithm.global_std": False}, {"objective.advantage": "group"}),
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


def test_rewards_are_one_function_or_several_with_weights(tmp_path):
    several = "reward.reward_functions"
    translation = imported(
        tmp_path,
        {
            **{f"{several}.read.path": "x/genrm_ocr.py", f"{several}.read.name": "compute_score_ocr"},
            **{f"{several}.read.weight": 0.5, f"{several}.small.weight": 0.25, f"{several}.own.name": "mine"},
            f"{several}.small.path": "x/jpeg_compressibility.py",
        },
    )
    assert translation.config.reward.terms == (
        RewardTerm("ocr", 0.5),
        RewardTerm("jpeg_compressibility", 0.25 / 500),
        RewardTerm("my_rewards:mine"),
    )
    status = statuses(translation)
    assert status["reward.custom_reward_function.name"] == "not needed here"
    assert status[f"{several}[small].path"] == "translated"
    assert status[f"{several}[read].name"] == status[f"{several}[own].name"] == "no equal here"


def test_what_is_left_out_has_their_default(tmp_path):
    file = tmp_path / "short.sh"
    file.write_text(f"python -m verl_omni.trainer.main_diffusion {ROLLOUT}.n=4 trainer.total_training_steps=5\n")
    translation = import_verl_omni(str(file))
    config = translation.config
    assert (config.prompts.per_iteration, config.optim.updates_per_rollout, config.optim.lr) == (1024, 4, 1e-6)
    assert (config.model.weights, config.model.resolution, config.sampling.noise_level) == ("full", 512, 1.0)
    given = {row.name for row in translation.rows if not row.name.endswith("(its default)")}
    assert given == {f"{ROLLOUT}.n", "trainer.total_training_steps", "a prompt file", "a reward"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({f"{LOSS}.loss_mode": "flow_dppo"}, "loss_mode 'flow_dppo' has no equal here; there are flow_grpo"),
        ({ALGORITHM: "flow_dppo"}, "'flow_dppo' has no equal here; there are flow_grpo, mix_grpo, dance_grpo"),
        ({f"{MODEL}.path": "ByteDance-Seed/BAGEL-7B-MoT"}, "cannot be trained here: it is no pipeline of diffusers"),
        ({f"{MODEL}.path": "Wan-AI/Wan2.2-TI2V-5B-Diffusers"}, "it has a timestep for each place"),
        ({f"{MODEL}.path": "dg845/LTX-2.3-Diffusers"}, "it makes sound with the video"),
        ({f"{ROLLOUT}.n": 1}, "plan.group_size must be between 2 and 100,000, not 1"),
        ({f"{ALGO}.sde_type": "other"}, "sde_type must be one of sde, dance_sde, cps, not 'other'"),
        ({f"{ALGO}.sde_window_range": "all"}, "sde_window_range must be a pair of steps, not 'all'"),
        ({"algorithm.sample_source": "offline"}, "algorithm.sample_source 'offline' goes with the algorithm dpo alone"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, changes, sentence):
    with pytest.raises(ValueError) as refused:
        imported(tmp_path, changes)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("python -m verl_omni.trainer.main_omni a.b=1", "starts 'verl_omni.trainer.main_omni'"),
        (f"python -m verl_omni.trainer.main_diffusion {ALGORITHM}=$(choose) a=1", "has no equal here"),
        ("ls", "starts no program with settings"),
    ],
)
def test_a_script_of_another_trainer_is_refused(tmp_path, command, sentence):
    file = tmp_path / "run.sh"
    file.write_text(command + "\n")
    with pytest.raises(ValueError) as refused:
        import_verl_omni(str(file))
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_each_rule_translates_nonsense_or_refuses_it_in_one_sentence(tmp_path):
    junk: tuple[Any, ...] = (None, True, -1, 0, 2.5, 10**30, float("nan"), "text", [], {}, [1, 2], {"a": 1}, "\n")
    settings = {row.name.removesuffix(" (its default)"): row.value for row in imported(tmp_path).rows}
    for rule_name, rule in RULES.items():
        name = rule_name.replace("[]", "[x]")
        for value in junk if name != f"{LOSS}.loss_mode" else ():  # which the import itself refuses
            try:
                assert rule(Setting(name, value, {**settings, name: value})).status in STATUSES
            except ValueError as refused:
                assert "\n" not in str(refused) and len(str(refused)) < 600, name


def test_pairs_without_a_place_are_learnt_from_a_file_to_write(tmp_path):
    changes = {ALGORITHM: "dpo", "algorithm.sample_source": "offline", "data.train_files": "${missing}"}
    translation = imported(tmp_path, changes)
    assert (translation.config.prompts.pairs, translation.config.objective.name) == ("pairs.jsonl", "dpo")
    assert statuses(translation)["algorithm.sample_source"] == "no equal here"


def test_a_long_text_has_the_models_own_length(tmp_path):
    translation = imported(tmp_path, {f"{PIPELINE}.max_sequence_length": 8192})
    assert translation.config.model.max_sequence_length is None
    assert statuses(translation)[f"{PIPELINE}.max_sequence_length"] == "no equal here"


def test_guidance_of_a_model_that_could_not_be_read_is_listed(tmp_path):
    changes = {f"{MODEL}.path": "${missing}", f"{PIPELINE}.guidance_scale": 3.5}
    translation = imported(tmp_path, changes)
    assert (translation.config.sampling.guidance_scale, translation.config.eval.guidance_scale) == (3.5, 3.5)
    assert statuses(translation)[f"{PIPELINE}.guidance_scale"] == "no equal here"


@pytest.mark.parametrize("path", ["models/MiniMax-H3/FL2VA", "Qwen/Qwen3-Omni-30B", "models/BAGEL/7B/"])
def test_a_model_is_known_by_its_folder_too(tmp_path, path):
    with pytest.raises(ValueError, match="cannot be trained here"):
        imported(tmp_path, {f"{MODEL}.path": path})


def test_a_folder_of_an_omni_package_is_no_model(tmp_path):
    assert imported(tmp_path, {f"{MODEL}.path": "verl_omni/Qwen-Image"}).config.model.path == "verl_omni/Qwen-Image"


def test_a_rewards_file_has_its_name_where_its_folder_could_not_be_read(tmp_path):
    script = [
        *("root=$(pwd)", "python3 -m verl_omni.trainer.main_diffusion", "    actor_rollout_ref.rollout.n=4"),
        *('    "+reward.reward_functions.a.path=$root/scores/jpeg_compressibility.py"',),
        *("    '+reward.reward_functions.a.name=compute_score'", "    '+reward.reward_functions.a.weight=0.5'"),
        *('    "+reward.reward_functions.b.path=$root"', '    "trainer.default_local_dir=$root/x"'),
    ]
    file = tmp_path / "run.sh"
    file.write_text(script[0] + "\n" + " \\\n".join(script[1:]) + "\n")
    translation = import_verl_omni(str(file))
    assert translation.config.reward.terms[0] == RewardTerm("jpeg_compressibility", 0.001)
    unread = {row.name for row in translation.rows if row.outcome.status == "could not be read"}
    assert unread == {"reward.reward_functions.b.path", "trainer.default_local_dir"}
