"""The configuration: to JSON and back, what is refused and in which words, and what fields mean together."""

from __future__ import annotations

import dataclasses
import json

import pytest

from progrpo.config import (
    Config,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PlanConfig,
    RewardConfig,
    SamplingConfig,
    check,
    config_from_json,
    config_to_json,
    field_paths,
    from_dict,
    nearest,
    resolve_plan,
    to_dict,
    trained_steps,
)
from progrpo.rollout.plan import PRESETS, Plan, PrunePoint

EVERYTHING_SET = Config(
    recipe="mine",
    seed=3,
    model=ModelConfig(lora_targets=("to_q", "to_k")),
    sampling=SamplingConfig(shift=3.0),
    plan=PlanConfig(preset="custom", group_size=8, prune=((3, 6), (5, 4)), final_keep=2),
    optim=OptimConfig(betas=(0.8, 0.9)),
)


@pytest.mark.parametrize("config", [Config(), EVERYTHING_SET])
def test_a_config_survives_json(config):
    assert config_from_json(config_to_json(config)) == config


def test_absent_fields_keep_their_defaults():
    assert from_dict({"sampling": {"shift": 2}}) == Config(sampling=SamplingConfig(shift=2.0))


def test_whole_numbers_become_floats_where_floats_are_asked():
    lr = from_dict({"optim": {"lr": 1}}).optim.lr
    assert lr == 1.0 and type(lr) is float


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sampling": {"noise_levl": 0.5}}, "sampling.noise_levl is not a field; did you mean sampling.noise_level?"),
        ({"noise_level": 0.5}, "noise_level is not a field; did you mean sampling.noise_level?"),
        ({"samplng": {}}, "samplng is not a field; did you mean sampling?"),
        ({"zzz": 1}, "zzz is not a field"),
        ({"sampling": {"noise_level": "0.5"}}, "sampling.noise_level must be a number, not '0.5'"),
        ({"sampling": {"shift": "3"}}, "sampling.shift must be a number, not '3'"),
        ({"sampling": {"noise_level": True}}, "sampling.noise_level must be a number, not True"),
        ({"sampling": {"train_last_step": 1}}, "sampling.train_last_step must be true or false, not 1"),
        ({"sampling": 3}, "sampling must be an object of named fields, not 3"),
        ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"seed": True}, "seed must be a whole number, not True"),
        ({"seed": None}, "seed must be a whole number, not None"),
        ({"recipe": 3}, "recipe must be a text, not 3"),
        ({"model": {"weights": "lorra"}}, "model.weights must be one of lora, full, not 'lorra'"),
        ({"model": {"lora_targets": "to_q"}}, "model.lora_targets must be a list, not 'to_q'"),
        ({"model": {"lora_targets": ["to_q", 3]}}, "model.lora_targets[1] must be a text, not 3"),
        ({"optim": {"betas": [0.9]}}, "optim.betas must be a list of 2, not [0.9]"),
        ({"plan": {"prune": [[3, 4], [5]]}}, "plan.prune[1] must be a list of 2, not [5]"),
        ([], "a configuration must be an object of named fields, not []"),
    ],
)
def test_wrong_fields_and_types_are_refused_by_name(data, message):
    with pytest.raises(ValueError) as refused:
        from_dict(data)
    assert str(refused.value) == message


def test_text_that_is_not_json_is_refused():
    with pytest.raises(ValueError, match="not JSON"):
        config_from_json("{")


def test_every_field_has_a_path():
    def leaves(value):
        return sum(map(leaves, value.values())) if isinstance(value, dict) else 1

    paths = field_paths()
    assert len(paths) == len(set(paths)) == leaves(to_dict(Config()))
    assert {"seed", "optim.ema_decay", "objective.grpo.clip_range"} <= set(paths)


def test_nearest_looks_at_the_whole_name_and_at_its_last_part():
    names = ["sampling.shift", "optim.lr", "sampling.microbatch", "optim.microbatch"]
    assert nearest("sampling.microbtch", names) == "; did you mean sampling.microbatch?"
    assert nearest("optim.microbtch", names) == "; did you mean optim.microbatch?"
    assert nearest("microbatch", names[::-1]) == "; did you mean optim.microbatch?"
    assert nearest("sampling.shft", names) == "; did you mean sampling.shift?"
    assert nearest("shift", names) == "; did you mean sampling.shift?"
    assert nearest("zzz", names) == ""


def test_defaults_are_right():
    check(Config())
    check(EVERYTHING_SET)


@pytest.mark.parametrize(
    ("config", "start"),
    [
        (Config(seed=-1), "seed must be at least 0, not -1"),
        (Config(iterations=0), "iterations must be at least 1, not 0"),
        (Config(recipe="../x"), "recipe must be a name of letters"),
        (Config(model=ModelConfig(max_sequence_length=513)), "model.max_sequence_length must be between 1 and 512"),
        (Config(sampling=SamplingConfig(noise_level=0.0)), "sampling.noise_level must be above 0"),
        (Config(sampling=SamplingConfig(noise_level=float("nan"))), "sampling.noise_level must be above 0"),
        (Config(sampling=SamplingConfig(shift=-1.0)), "sampling.shift must be above 0, or empty"),
        (Config(sampling=SamplingConfig(guidance_scale=0.5)), "sampling.guidance_scale must be at least 1, not 0.5"),
        (Config(sampling=SamplingConfig(num_inference_steps=1)), "sampling.num_inference_steps must be at least 2"),
        (Config(reward=RewardConfig("verifier")), "reward.name must be `shapes` or `module:function`"),
        (Config(reward=RewardConfig("module:")), "reward.name must be `shapes` or `module:function`"),
        (Config(optim=OptimConfig(lr=float("inf"))), "optim.lr must be above 0, not inf"),
        (Config(optim=OptimConfig(betas=(0.9, 1.0))), "optim.betas must be two numbers at least 0 and below 1"),
        (Config(optim=OptimConfig(ema_decay=1.0)), "optim.ema_decay must be at least 0 and below 1, not 1.0"),
        (Config(eval=EvalConfig(pictures=0)), "eval.pictures must be at least 1, not 0"),
        (Config(plan=PlanConfig(preset="flash", group_size=12)), "plan.group_size, plan.prune and plan.final_keep are"),
        (Config(plan=PlanConfig(preset="custom", group_size=1)), "plan.group_size must be at least 2, not 1"),
        (Config(plan=PlanConfig(preset="custom", prune=((9, 4),))), "prune step 9 saves no network call"),
        (Config(objective=ObjectiveConfig(baseline="group")), "objective.baseline must be survivors under a plan"),
        (Config(seed="1"), "seed must be a whole number, not '1'"),  # type: ignore[arg-type]
    ],
)
def test_values_out_of_range_are_refused_by_name(config, start):
    with pytest.raises(ValueError) as refused:
        check(config)
    message = str(refused.value)
    assert message.startswith(start) and "\n" not in message


def test_the_group_is_a_baseline_where_all_of_it_is_rewarded():
    check(Config(objective=ObjectiveConfig(baseline="group"), plan=PlanConfig(preset="posthoc")))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_configured(name):
    plan, steps = PRESETS[name]
    config = from_dict({"plan": {"preset": name}, "sampling": {"num_inference_steps": steps}})
    check(config)
    assert resolve_plan(config) == plan


def test_a_custom_plan_is_read_from_its_fields():
    assert resolve_plan(EVERYTHING_SET) == Plan(8, (PrunePoint(3, 6), PrunePoint(5, 4)), 2)


def test_the_last_step_is_trained_only_on_request():
    assert trained_steps(Config(), 0) == range(9)
    assert trained_steps(Config(sampling=SamplingConfig(train_last_step=True)), 0) == range(10)
    check(Config(sampling=SamplingConfig(num_inference_steps=1, train_last_step=True), plan=PlanConfig(preset="none")))


def test_json_is_plain():
    text = config_to_json(EVERYTHING_SET)
    assert json.loads(text) == json.loads(json.dumps(dataclasses.asdict(EVERYTHING_SET))) and text.endswith("}\n")
