"""Flow-Factory's settings are translated and accounted for one by one."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from progrpo.config import RewardTerm
from progrpo.imports.flow_factory.read import import_flow_factory
from progrpo.imports.flow_factory.rules import RULES
from progrpo.imports.outcome import STATUSES

SETTINGS: dict[str, Any] = {
    "launcher": "accelerate",
    "num_processes": 8,
    "mixed_precision": "bf16",
    "data": {
        "datasets": [
            {"name": "mine", "dataset_dir": "prompts", "train": {"weight": 1, "max_dataset_size": 9}, "eval": {}}
        ]
    },
    "model": {
        **{
            "finetune_type": "lora",
            "lora_rank": 32,
            "target_modules": ["attn.to_q", "attn.to_k"],
            "model_type": "sd3-5",
        },
        "model_name_or_path": "somebody/stable-diffusion-3.5",
    },
    "train": {
        **{"trainer_type": "grpo", "advantage_aggregation": "sum", "clip_range": "1e-4", "adv_clip_range": [-5.0, 5.0]},
        **{
            "kl_type": "v-based",
            "kl_beta": 0.001,
            "resolution": [512, 512],
            "num_inference_steps": 10,
            "guidance_scale": 4.5,
        },
        **{"per_device_batch_size": 8, "group_size": 24, "global_std": True, "unique_sample_num_per_epoch": 48},
        **{
            "gradient_step_per_epoch": 2,
            "gradient_accumulation_steps": "auto",
            "ema_decay": 0.99,
            "ema_update_interval": 4,
        },
        **{"enable_gradient_checkpointing": True, "seed": 3, "max_epochs": 100},
    },
    "scheduler": {
        "dynamics_type": "CPS",
        "noise_level": 0.8,
        "num_sde_steps": 3,
        "sde_steps": [0, 1, 2, 3, 4],
        "seed": 1,
    },
    "eval": {"resolution": 512, "guidance_scale": 1.0, "num_inference_steps": 40, "eval_freq": 20},
    "rewards": [
        {"name": "a", "reward_model": "PickScore", "batch_size": 16, "device": "cuda", "dtype": "bfloat16"},
        {"name": "b", "reward_model": "mine.judges.Judge", "weight": 0.5},
    ],
    "eval_rewards": [
        {"name": "c", "reward_model": "PickScore", "batch_size": 32},
        {"name": "d", "reward_model": "CLIP"},
    ],
    "optimizers": [{"name": "default", "learning_rate": 3e-4, "betas": [0.9, 0.99], "eps": 1e-8, "max_grad_norm": 0.5}],
    "log": {"save_freq": 30, "save_dir": "saves"},
}


def imported(folder: Path, **changes: Any):
    """The settings with changes by dotted names, None to leave one out."""
    settings = deepcopy(SETTINGS)
    for name, value in changes.items():
        part, _, rest = name.partition("__")
        if rest:
            settings[part][rest] = value
        else:
            settings[part] = value
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(settings))
    return import_flow_factory(str(file))


def statuses(translation) -> dict[str, str]:
    return {row.name: row.outcome.status for row in translation.rows}


def test_a_file_is_translated(tmp_path):
    config = imported(tmp_path).config
    assert (config.iterations, config.seed, config.checkpoint.every) == (100, 3, 30)
    model = config.model
    assert (model.weights, model.lora_rank, model.lora_alpha, model.lora_targets) == (
        "lora",
        32,
        64,
        ("attn.to_q", "attn.to_k"),
    )
    assert (model.path, model.resolution, model.dtype) == ("somebody/stable-diffusion-3.5", 512, "bfloat16")
    assert model.activation_checkpointing
    assert (config.prompts.source, config.prompts.per_iteration) == ("prompts/train.jsonl", 48)
    sampling = config.sampling
    assert (sampling.sampler, sampling.noise_level, sampling.latent_dtype) == ("cps_reduced", 0.8, "float16")
    assert (sampling.sde_window, sampling.sde_window_size, sampling.sde_window_end) == ("random", 3, 5)
    assert (sampling.microbatch, config.optim.microbatch, config.plan.group_size) == (8, 8, 24)
    assert (config.objective.name, config.objective.advantage) == ("grpo", "batch")
    grpo = config.objective.grpo
    assert (grpo.clip_range, grpo.adv_clip_max, grpo.kl_beta, grpo.kl_form) == (1e-4, 5.0, 1e-3, "velocity")
    optim = config.optim
    assert (optim.lr, optim.betas, optim.max_grad_norm, optim.updates_per_rollout) == (3e-4, (0.9, 0.99), 0.5, 2)
    assert optim.ema_decay == pytest.approx(0.99**0.25, abs=1e-6)
    assert (config.eval.every, config.eval.guidance_scale) == (20, 1.0)
    assert config.reward.terms == (
        RewardTerm("pickscore", batch_size=16, device="cuda", dtype="float32"),
        RewardTerm("my_rewards:Judge", 0.5),
    )
    assert config.eval.rewards == (RewardTerm("clipscore"),)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train__resolution": [480, 832]}, (480, 832)),
        ({"train__resolution": [512]}, 512),
        ({"train__resolution": None}, 512),
        ({"train__height": 480, "train__width": 832}, (480, 832)),
        ({"train__width": 768}, (512, 768)),
        ({"train__resolution": [480, 832], "train__height": 832}, 832),
    ],
)
def test_a_size_is_height_and_width(tmp_path, changes, expected):
    translation = imported(tmp_path, **changes)
    assert translation.config.model.resolution == expected
    assert {statuses(translation)[name.replace("__", ".")] for name in changes} == {"translated"}


def test_an_evaluation_of_another_size_or_length_has_no_equal(tmp_path):
    wide = {"train__resolution": [480, 832], "train__num_frames": 33}
    same = {"eval__resolution": 480, "eval__width": 832, "eval__num_frames": 33}
    translation = imported(tmp_path, **wide, **same)
    assert translation.config.model.frames == 33
    assert {statuses(translation)[name.replace("__", ".")] for name in same} == {"not needed here"}
    other = {"eval__resolution": [832, 480], "eval__num_frames": 17}
    status = statuses(imported(tmp_path, **wide, **other))
    assert {status[name.replace("__", ".")] for name in other} == {"no equal here"}


def test_every_setting_ends_in_one_list_once(tmp_path):
    translation = imported(tmp_path, surprise={"a": [1, {"b": 2}]}, train__later=None)
    names = Counter(row.name for row in translation.rows)

    def leaves(value, name=""):
        if isinstance(value, dict) and value:
            return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{name}.{key}".strip("."))]
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            return [leaf for i, item in enumerate(value) for leaf in leaves(item, f"{name}[{i}]")]
        return [name]

    given = [*leaves(SETTINGS), "surprise.a[0]", "surprise.a[1].b", "train.later"]
    assert set(names.values()) == {1}
    assert {name for name in names if not name.endswith("(its default)")} == set(given)
    status = statuses(translation)
    assert set(status.values()) == set(STATUSES[:3])
    assert {status[name] for name in given[-3:]} == {"no equal here"}
    assert status["rewards[1].reward_model"] == "no equal here" and status["scheduler.sde_steps"] == "translated"


def test_what_a_file_leaves_out_has_their_default_and_not_ours(tmp_path):
    file = tmp_path / "short.yaml"
    file.write_text("model: {finetune_type: lora}\ntrain: {group_size: 4}\nrewards: {reward_model: OCR}")
    translation = import_flow_factory(str(file))
    config = translation.config
    assert (config.model.path, config.model.lora_rank, config.model.lora_alpha) == (
        "black-forest-labs/FLUX.1-dev",
        8,
        16,
    )
    assert config.sampling.embedded_guidance and config.sampling.guidance_scale == 3.5
    assert (config.sampling.sde_window, config.sampling.sde_window_size) == ("random", 1)
    assert (config.objective.advantage, config.objective.grpo.kl_form, config.optim.lr) == ("gdpo", "latent", 1e-5)
    assert config.reward.terms == (RewardTerm("ocr"),)
    assert statuses(translation)["model.lora_rank (its default)"] == "translated"
    assert statuses(translation)["a prompt file"] == "no equal here" and "a reward" not in statuses(translation)


@pytest.mark.parametrize(
    ("trainer", "changes", "expected"),
    [
        ("grpo-guard", {"scheduler__dynamics_type": "Flow-SDE"}, {"ratio": "guard", "clip_range": 1e-4}),
        (
            "nft",
            {"train__nft_beta": 0.5, "train__timestep_range": 0.5},
            {"beta": 0.5, "draws": 5, "time_fraction": 0.5},
        ),
        (
            "awm",
            {"train__ema_kl_beta": 1, "train__clip_range": 1},
            {"average_beta": 1.0, "clip_range": 1.0, "draws": 9},
        ),
        (
            "dgpo",
            {"train__beta_dpo": 50, "train__num_train_timesteps": 4},
            {"dpo_beta": 50.0, "draws": 4, "time_fraction": 0.6},
        ),
    ],
)
def test_each_trainer_has_its_objective(tmp_path, trainer, changes, expected):
    ode = {} if trainer == "grpo-guard" else {"scheduler": {"dynamics_type": "ODE"}}
    config = imported(tmp_path, train__trainer_type=trainer, **ode, **changes).config
    assert config.objective.name == trainer.removesuffix("-guard")
    part = getattr(config.objective, config.objective.name)
    assert {name: getattr(part, name) for name in expected} == expected
    assert config.sampling.sde_window == ("none" if ode else "random")


def test_no_row_is_of_a_setting_that_nobody_gave(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train: {group_size: 4}\nrewards: [{reward_model: OCR}]\n")
    given = {row.name for row in import_flow_factory(str(file)).rows if not row.name.endswith("(its default)")}
    assert given == {"train.group_size", "rewards[0].reward_model", "a prompt file"}


@pytest.mark.parametrize(("model", "embedded"), [("FLUX.1-dev", True), ("FLUX.2-klein-base-4B", False)])
def test_which_flux_has_embedded_guidance(tmp_path, model, embedded):
    sampling = imported(tmp_path, model__model_name_or_path=f"black-forest-labs/{model}").config.sampling
    assert (sampling.guidance_scale, sampling.embedded_guidance) == (4.5, embedded)


def test_a_slow_average_stays_one(tmp_path):
    slow = imported(tmp_path, train__ema_decay=0.9999, train__ema_update_interval=10).config.optim.ema_decay
    assert slow == pytest.approx(0.9999**0.1, abs=1e-6) and slow < 1


def test_accumulation_counts_updates(tmp_path):
    config = imported(tmp_path, train__gradient_accumulation_steps=6).config
    assert config.optim.updates_per_rollout == 48 * 24 // (8 * 8) // 6


def test_older_files_have_the_same_meaning(tmp_path):
    old = deepcopy(SETTINGS)
    old["train"] |= {"learning_rate": 3e-4, "adam_betas": [0.9, 0.99], "max_grad_norm": 0.5}
    del old["optimizers"]
    old["data"] = {"dataset_dir": "prompts"}
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(old))
    assert import_flow_factory(str(file)).config == imported(tmp_path).config


@pytest.mark.parametrize(
    ("section", "kind", "count", "pool"),
    [
        ("train", "sde_type", "num_noise_steps", "noise_steps"),
        ("train", "dynamics_type", "num_train_steps", "train_steps"),
        ("scheduler", "dynamics_type", "num_train_steps", "train_steps"),
    ],
)
def test_noise_of_older_files_has_the_same_meaning(tmp_path, section, kind, count, pool):
    old = deepcopy(SETTINGS)
    noise = {kind: "CPS", "noise_level": 0.8, count: 3, pool: [0, 1, 2, 3, 4]}
    old["scheduler"] = {"seed": 1}
    old[section] |= noise
    old["train"] |= {"save_freq": 30, "eval_args": old.pop("eval")}
    del old["log"]
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(old))
    translation = import_flow_factory(str(file))
    assert translation.config == imported(tmp_path).config
    assert not [row.name for row in translation.rows if row.outcome.note == "not a setting that this import knows"]


def test_a_setting_by_its_older_and_its_newer_name_is_not_lost(tmp_path):
    translation = imported(tmp_path, train__noise_level=0.3)
    assert translation.config.sampling.noise_level == 0.8
    assert statuses(translation)["train.noise_level"] == "no equal here"


@pytest.mark.parametrize(("steps", "fate"), [(40, "not needed here"), (28, "no equal here")])
def test_a_data_set_may_have_its_own_evaluation(tmp_path, steps, fate):
    own = {"num_inference_steps": steps}
    sets = [{"name": name, "dataset_dir": name, "train": {"weight": 1}, "eval": own} for name in ("a", "b")]
    status = statuses(imported(tmp_path, data={"datasets": [*sets, {"name": "c", "dataset_dir": "c", "eval": {}}]}))
    assert status["data.datasets[0].eval.num_inference_steps"] == fate
    assert status["data.datasets[1].eval.num_inference_steps"] == "not needed here"
    assert status["data.datasets[2].dataset_dir"] == "no equal here"


def test_rewards_of_its_registry_are_ours(tmp_path):
    rewards = [
        {"reward_model": "HPSv2", "weight": 2.0, "hps_version": "v2.1"},
        {"reward_model": "geneval2_soft_tifa", "aggregation": "gm", "data_path": "prompts"},
    ]
    translation = imported(tmp_path, rewards=rewards, eval_rewards=[])
    assert translation.config.reward.terms == (RewardTerm("hpsv2", 2.0), RewardTerm("soft_tifa"))
    status = statuses(translation)
    assert (status["rewards[0].reward_model"], status["rewards[1].reward_model"]) == ("translated", "no equal here")
    assert (status["rewards[0].hps_version"], status["rewards[1].aggregation"]) == ("not needed here",) * 2


def test_a_home_that_nobody_has_is_a_folder_like_another(tmp_path):
    assert (
        imported(tmp_path, data={"dataset_dir": "~nobody-here/x"}).config.prompts.source == "~nobody-here/x/train.jsonl"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train__trainer_type": "crd"},
            "train.trainer_type 'crd' has no equal here; there are grpo, grpo-guard, nft, awm, dpo, offline-dpo, dgpo",
        ),
        (
            {"train__group_size": 1},
            "mine.yaml asks for what cannot be run here: plan.group_size must be between 2 and 100,000, not 1",
        ),
        ({"train__kl_type": "z"}, "train.kl_type must be one of x-based, v-based, not 'z'"),
        ({"scheduler__dynamics_type": "ODE"}, "sampling.sde_window must leave objective.name grpo stochastic steps"),
        ({"data": {"dataset_dir": "d" * 5000}}, "asks for what cannot be run here: prompts.source must"),
        (
            {"train__num_inference_steps": 1, "scheduler__sde_steps": None},
            "sampling.num_inference_steps must be at least 2, not 1",
        ),
        ({"train__ema_update_interval": 0}, "train.ema_update_interval must be a whole number of at least 1, not 0"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError) as refused:
        imported(tmp_path, **changes)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"just a text",
        b"a: [",
        b"\xff\xfe\x00",
        b"a: !!python/object/apply:os.system ['true']",
        b"a: &a [*a, {b: *a}]",
        b"l0: &l0 {a: 1, b: 2}\n"
        + b"".join(b"l%d: &l%d {a: *l%d, b: *l%d}\n" % (i, i, i - 1, i - 1) for i in range(1, 30)),
        b"a: " + b"[" * 1500,
        b"l0: &l0 [1, 2]\n" + b"".join(b"l%d: &l%d [*l%d, *l%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 60)),
        b"l0: &l0 {a: 1}\n" + b"".join(b"l%d: &l%d {<<: [*l%d, *l%d]}\n" % (i, i, i - 1, i - 1) for i in range(1, 60)),
    ],
)
def test_a_file_that_is_no_settings_is_refused_in_one_sentence(tmp_path, content):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError) as refused:
        import_flow_factory(str(file))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_nonsense_is_translated_or_refused_in_one_sentence(tmp_path):
    """Every setting that has a rule, one after the other."""
    junk: tuple[Any, ...] = (None, True, -1, 0, 2.5, 10**30, float("nan"), "text", [], {}, [1, 2], {"a": 1}, "\n")
    for i, name in enumerate(RULES):
        settings, value = deepcopy(SETTINGS), junk[i % len(junk)]
        *parents, last = name.replace("[]", ".0").split(".")
        part: Any = settings
        for step in parents:
            part = part[int(step)] if step.isdigit() else part.setdefault(step, {})
        part[last] = value
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(settings))
        try:
            import_flow_factory(str(file))
        except ValueError as refused:
            assert "\n" not in str(refused) and len(str(refused)) < 600, (name, value)
