"""The configuration: to JSON and back, what is refused and in which words, and what fields mean together."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from progrpo.checks import check
from progrpo.config import (
    Config,
    EvalSettings,
    GRPOSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimSettings,
    PlanSettings,
    PromptSettings,
    RewardSettings,
    RewardTerm,
    SamplingSettings,
    config_from_json,
    config_to_json,
    from_dict,
    last_equal_step,
    learning_rate,
    prompt_cost,
    resolve_plan,
    stochastic_steps,
    to_dict,
    trained_items,
    trained_steps,
    trains_transitions,
)
from progrpo.messages import nearest
from progrpo.objectives.settings import LossSettings, Stored
from progrpo.rollout.plan import PRESETS, Plan, PrunePoint
from progrpo.settings import Values, field_paths

EVERYTHING_SET = Config(
    recipe="mine",
    seed=3,
    model=ModelSettings(lora_targets=("to_q", "to_k")),
    sampling=SamplingSettings(shift=3.0),
    plan=PlanSettings(preset="custom", group_size=8, prune=((3, 6), (5, 4)), final_keep=2),
    optim=OptimSettings(betas=(0.8, 0.9)),
)
STOPS_GROUPS = Plan(6, (PrunePoint(1, 4),), keep_groups=1)
NOISY = {"terms": [{"name": "shapes"}, {"name": "nsfw", "weight": 0.0}], "noise": "nsfw"}


class OfTransitions:
    """An objective of one's own that trains transitions."""

    @dataclasses.dataclass(frozen=True)
    class Settings(LossSettings):
        @property
        def stores(self) -> Stored:
            return "transitions"


class LikeGRPO:
    Settings = GRPOSettings


@pytest.mark.parametrize("config", [Config(), EVERYTHING_SET])
def test_a_config_survives_json(config):
    assert config_from_json(config_to_json(config)) == config


def test_absent_fields_keep_their_defaults():
    assert from_dict({"sampling": {"shift": 2}}) == Config(sampling=SamplingSettings(shift=2.0))


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
        ({"prompts": {"order": None}}, "prompts.order must be one of turn, signal, not None"),
        ({"recipe": 3}, "recipe must be a text, not 3"),
        ({"model": {"weights": "lorra"}}, "model.weights must be one of lora, full, not 'lorra'"),
        ({"model": {"resolution": [480]}}, "model.resolution must be a list of 2, not [480]"),
        ({"model": {"resolution": [480, "832"]}}, "model.resolution[1] must be a whole number, not '832'"),
        ({"model": {"resolution": "480x832"}}, "model.resolution must be a whole number, not '480x832'"),
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
        return sum(map(leaves, value.values())) if isinstance(value, dict) and not isinstance(value, Values) else 1

    paths = field_paths(Config)
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
        (Config(model=ModelSettings(max_sequence_length=513)), "model.max_sequence_length must be between 1 and 512"),
        (Config(model=ModelSettings(frames=0)), "model.frames must be between 1 and 1,024"),
        (Config(model=ModelSettings(resolution=4)), "model.resolution must be between 8 and 4,096 pixels, one number"),
        (
            Config(model=ModelSettings(resolution=(480, 8320))),
            "model.resolution must be between 8 and 4,096 pixels, one",
        ),
        (Config(reward=RewardSettings(frames=0)), "reward.frames must be between 1 and 1,024"),
        (Config(sampling=SamplingSettings(noise_level=0.0)), "sampling.noise_level must be above 0"),
        (Config(sampling=SamplingSettings(noise_level=float("nan"))), "sampling.noise_level must be above 0"),
        (Config(sampling=SamplingSettings(shift=-1.0)), "sampling.shift must be above 0, or empty"),
        (
            Config(sampling=SamplingSettings(sde_window_end=-3)),
            "sampling.sde_window_end must be at least 1, or empty for all steps that can be trained, not -3",
        ),
        (Config(sampling=SamplingSettings(guidance_scale=0.5)), "sampling.guidance_scale must be at least 1, not 0.5"),
        (Config(sampling=SamplingSettings(num_inference_steps=1)), "sampling.num_inference_steps must be at least 2"),
        (
            Config(reward=RewardSettings((RewardTerm("verifier"),))),
            "reward.terms[0].name must be one of shapes, ",
        ),
        (
            Config(reward=RewardSettings((RewardTerm("module:"),))),
            "reward.terms[0].name must be one of shapes, ",
        ),
        (Config(optim=OptimSettings(lr=float("inf"))), "optim.lr must be above 0, not inf"),
        (Config(optim=OptimSettings(betas=(0.9, 1.0))), "optim.betas must be two numbers at least 0 and below 1"),
        (Config(optim=OptimSettings(ema_decay=1.0)), "optim.ema_decay must be at least 0 and below 1, not 1.0"),
        (Config(eval=EvalSettings(pictures=0)), "eval.pictures must be between 1 and 1,000,000, not 0"),
        (
            Config(plan=PlanSettings(preset="flash", group_size=12)),
            "plan.group_size, plan.prune and plan.final_keep are",
        ),
        (
            Config(plan=PlanSettings(preset="custom", group_size=1)),
            "plan.group_size must be between 2 and 100,000, not 1",
        ),
        (Config(plan=PlanSettings(preset="custom", prune=((9, 4),))), "prune step 9 saves no network call"),
        (
            Config(objective=ObjectiveSettings(baseline="group")),
            "objective.baseline must be survivors under a plan",
        ),
        (
            Config(prompts=PromptSettings(split_groups=True), objective=ObjectiveSettings(name="dgpo")),
            "prompts.split_groups must be false for objective.name dgpo",
        ),
        (
            Config(model=ModelSettings(shard=True, compile=True)),
            "model.shard must be false for model.compile",
        ),
        (
            Config(model=ModelSettings(shard=True, quantize="int8")),
            "model.shard must be false for model.quantize: weights in 8 bits are not sharded",
        ),
        (
            Config(model=ModelSettings("shapes-flow", "full", shard=True), optim=OptimSettings("adamw_8bit")),
            "model.shard must be false for optim.name adamw_8bit with model.weights full",
        ),
        (Config(model=ModelSettings(shard=True)), "sampling.microbatch must be given for model.shard"),
        (
            Config(model=ModelSettings("shapes-flow", "full", quantize="int8")),
            "model.quantize must be none for model.weights full: weights in 8 bits are frozen, so train a LoRA",
        ),
        (Config(seed="1"), "seed must be a whole number, not '1'"),  # type: ignore[arg-type]
    ],
)
def test_values_out_of_range_are_refused_by_name(config, start):
    with pytest.raises(ValueError) as refused:
        check(config)
    message = str(refused.value)
    assert message.startswith(start) and "\n" not in message


@pytest.mark.parametrize(
    ("config", "end"),
    [
        (Config(reward=RewardSettings((RewardTerm("pickscor"),))), "not 'pickscor'; did you mean pickscore?"),
        (
            Config(reward=RewardSettings((RewardTerm("mine.warm"),))),
            "or `module:function`, not 'mine.warm'; a function warm of a module is mine:warm",
        ),
        (
            Config(reward=RewardSettings((RewardTerm("./mine.py:warm"),))),
            "not './mine.py:warm'; a module is named as Python imports it; write mine:warm",
        ),
        (Config(sampling=SamplingSettings(sampler="dancer")), "`module:step`, not 'dancer'; did you mean dance?"),
    ],
)
def test_a_wrong_name_comes_with_the_right_one(config, end):
    with pytest.raises(ValueError) as refused:
        check(config)
    assert str(refused.value).endswith(end)


def test_the_group_is_a_baseline_where_all_of_it_is_rewarded():
    keeps_all = {"preset": "custom", "group_size": 24, "prune": [[2, 24]], "final_keep": 12}
    pairs = {"objective": {"name": "sft"}, "prompts": {"pairs": "pairs.jsonl"}}
    for fields in ({"plan": {"preset": "posthoc"}}, {"plan": keeps_all}, {"plan": {"preset": "auto"}, **pairs}):
        check(from_dict({**fields, "objective": {**fields.get("objective", {}), "baseline": "group"}}))


@pytest.mark.parametrize("plan", [{"preset": "none"}, {"preset": "custom", "group_size": 6, "prune": [[2, 6]]}])
def test_a_plan_that_trains_on_everyone_has_nothing_to_adapt(plan):
    with pytest.raises(ValueError, match=r"^plan.adaptive must be false for a plan that trains on all \d+ members"):
        check(from_dict({"plan": {**plan, "adaptive": True}}))
    check(from_dict({"plan": {**plan, "final_keep": 4, "preset": "custom", "adaptive": True}}))


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
    assert trained_steps(Config(sampling=SamplingSettings(train_last_step=True)), 0) == range(10)
    check(
        Config(sampling=SamplingSettings(num_inference_steps=1, train_last_step=True), plan=PlanSettings(preset="none"))
    )


def test_json_is_plain():
    text = config_to_json(EVERYTHING_SET)
    assert json.loads(text) == json.loads(json.dumps(dataclasses.asdict(EVERYTHING_SET))) and text.endswith("}\n")


# --- windows and objectives -------------------------------------------------------------------------------------------

OBJECTIVES = ("grpo", "nft", "awm", "dgpo", "elbo")
WINDOWS = ("auto", "all", "first", "sliding", "random", "none")


def configured(objective="grpo", **sampling):
    return from_dict({"objective": {"name": objective}, "sampling": sampling})


@pytest.mark.parametrize("train_last_step", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_auto_is_all_for_transitions_and_none_for_the_others(objective, train_last_step):
    auto, every, never = (
        configured(objective, sde_window=kind, train_last_step=train_last_step) for kind in ("auto", "all", "none")
    )
    check(auto)
    same = every if objective == "grpo" else never
    assert trains_transitions(auto) == (objective == "grpo")
    for iteration in (0, 7):
        assert stochastic_steps(auto, iteration) == stochastic_steps(same, iteration)
        assert trained_steps(auto, iteration) == trained_steps(same, iteration)
        assert list(stochastic_steps(every, iteration)) == list(range(10))
        assert list(stochastic_steps(never, iteration)) == []


def test_grpo_without_stochastic_steps_is_refused():
    with pytest.raises(ValueError) as refused:
        check(configured(sde_window="none"))
    assert str(refused.value) == (
        "sampling.sde_window must leave objective.name grpo stochastic steps to train, so not be none;"
        " set it to auto, or take an objective that needs none: nft, awm, dgpo, elbo, dpo, sft"
    )


@pytest.mark.parametrize("objective", OBJECTIVES[1:])
@pytest.mark.parametrize("kind", WINDOWS)
def test_the_other_objectives_take_any_window_and_train_no_step(objective, kind):
    config = configured(objective, sde_window=kind)
    check(config)
    assert all(len(trained_steps(config, iteration)) == 0 for iteration in range(60))
    assert trained_items(config) == {"nft": 4, "awm": 6, "dgpo": 4, "elbo": 4}[objective]


@pytest.mark.parametrize("objective", OBJECTIVES[1:])
def test_one_step_is_enough_for_what_trains_no_step(objective):
    config = from_dict(
        {
            "objective": {"name": objective},
            "sampling": {"num_inference_steps": 1},
            "plan": {"preset": "none"},
        }
    )
    check(config)


@pytest.mark.parametrize("kind", ["first", "sliding", "random"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (
            {"sde_window_end": 10},
            "sampling.sde_window_end must be at most the 9 steps that may be trained, not 10"
            " (sampling.train_last_step adds the last)",
        ),
        (
            {"sde_window_end": 11, "train_last_step": True},
            "sampling.sde_window_end must be at most the 10 steps that may be trained, not 11"
            " (sampling.train_last_step adds the last)",
        ),
        (
            {"sde_window_size": 10},
            "sampling.sde_window_size must be at most the 9 steps that a window may lie in, not 10",
        ),
        (
            {"sde_window_size": 5, "sde_window_end": 4},
            "sampling.sde_window_size must be at most the 4 steps that a window may lie in, not 5",
        ),
        ({"sde_window_size": 0}, "sampling.sde_window_size must be at least 1, not 0"),
        ({"sde_window_interval": 0}, "sampling.sde_window_interval must be at least 1, not 0"),
        (
            {"sde_window_end": 0},
            "sampling.sde_window_end must be at least 1, or empty for all steps that can be trained, not 0",
        ),
    ],
)
def test_a_window_that_does_not_fit_is_refused(objective, kind, sampling, message):
    with pytest.raises(ValueError) as refused:
        check(configured(objective, sde_window=kind, **sampling))
    assert str(refused.value) == message


@pytest.mark.parametrize("kind", ["auto", "all"])
def test_the_size_of_a_window_matters_only_where_there_is_one(kind):
    check(configured(sde_window=kind, sde_window_size=99, sde_window_end=1))


@pytest.mark.parametrize("train_last_step", [False, True])
@pytest.mark.parametrize("kind", ["auto", "all", "first", "sliding", "random"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_trained_steps_are_stochastic_and_as_many_in_every_iteration(objective, kind, train_last_step):
    config = configured(
        objective, sde_window=kind, sde_window_size=2, sde_window_interval=3, train_last_step=train_last_step
    )
    check(config)
    last = 9 if train_last_step else 8
    for iteration in range(60):
        trained, stochastic = trained_steps(config, iteration), stochastic_steps(config, iteration)
        assert set(trained) <= set(stochastic) <= set(range(10))
        assert not trained or trained[-1] <= last
        if objective == "grpo":
            assert len(trained) == trained_items(config) > 0
            assert kind in ("auto", "all") or trained == stochastic


def test_trained_items_of_transitions_are_steps():
    assert trained_items(Config()) == 9
    assert trained_items(configured(train_last_step=True)) == 10
    for kind in ("first", "sliding", "random"):
        assert trained_items(configured(sde_window=kind)) == 3
        assert trained_items(configured(sde_window=kind, sde_window_size=9)) == 9


@pytest.mark.parametrize("objective", OBJECTIVES[1:])
def test_trained_items_of_the_others_are_draws(objective):
    config = from_dict({"objective": {"name": objective, objective: {"draws": 7}}})
    check(config)
    assert trained_items(config) == 7


# --- samplers ---------------------------------------------------------------------------------------------------------

PRESERVING = ("ddim", "cps", "cps_reduced")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sampler", PRESERVING)
def test_no_more_noise_than_there_is(sampler, objective):
    for noise_level in (None, 0.5, 1.0):
        check(configured(objective, sampler=sampler, noise_level=noise_level))
    with pytest.raises(ValueError) as refused:
        check(configured(objective, sampler=sampler, noise_level=1.1))
    assert str(refused.value) == (
        f"sampling.noise_level must be at most 1 for sampling.sampler {sampler}, not 1.1:"
        " a step cannot add more noise than there is at its end"
    )


@pytest.mark.parametrize("sampler", ["auto", "flow_grpo", "dance", "precise"])
def test_an_sde_may_have_any_noise(sampler):
    check(configured(sampler=sampler, noise_level=1.1))


@pytest.mark.parametrize("sampler", ["auto", "flow_grpo", "dance", *PRESERVING, "precise"])
def test_flow_grpos_kl_goes_with_a_diffusion_rate(sampler):
    def with_settings(objective):
        sections = {"name": objective, "grpo": {"kl_form": "flow_grpo"}}
        return from_dict({"sampling": {"sampler": sampler}, "objective": sections})

    check(with_settings("nft"))
    if sampler not in (*PRESERVING, "precise"):
        check(with_settings("grpo"))
    else:
        with pytest.raises(ValueError) as refused:
            check(with_settings("grpo"))
        assert str(refused.value) == (
            "objective.grpo.kl_form flow_grpo must go with a sampler that has a diffusion rate (flow_grpo, dance,"
            f" flow_grpo_wan), not {sampler}; take exact"
        )


def test_grpos_own_section_is_read_for_grpo_alone():
    mine = {"name": f"{__name__}:OfTransitions"}
    check(from_dict({"sampling": {"sampler": "cps_reduced"}, "objective": {**mine, "grpo": {"ratio": "guard"}}}))
    check(from_dict({"sampling": {"sampler": "cps"}, "objective": {**mine, "grpo": {"kl_form": "flow_grpo"}}}))
    with pytest.raises(ValueError) as refused:
        check(from_dict({"sampling": {"sde_window": "none"}, "objective": mine}))
    assert f"must leave objective.name {__name__}:OfTransitions stochastic steps" in str(refused.value)


def test_an_objective_of_ones_own_with_grpos_settings_has_grpos_rules():
    sections = {"name": f"{__name__}:LikeGRPO", "custom": {"ratio": "guard"}}
    with pytest.raises(ValueError, match=r"^objective.custom.ratio guard must go with a sampler whose log-prob"):
        check(from_dict({"sampling": {"sampler": "cps_reduced"}, "objective": sections}))


def test_a_guarded_ratio_goes_with_a_density():
    sections = {"name": "grpo", "grpo": {"ratio": "guard"}}
    check(from_dict({"sampling": {"sampler": "cps"}, "objective": sections}))
    with pytest.raises(ValueError) as refused:
        check(from_dict({"sampling": {"sampler": "cps_reduced"}, "objective": sections}))
    assert str(refused.value) == (
        "objective.grpo.ratio guard must go with a sampler whose log-prob is a density, not cps_reduced; take cps"
    )


def test_a_negative_prompt_goes_with_guidance_of_two_calls():
    def with_settings(**sampling: object) -> Config:
        return from_dict({"sampling": {"negative_prompt": "blurred", **sampling}})

    check(with_settings(guidance_scale=4.5))
    check(dataclasses.replace(with_settings(), eval=EvalSettings(guidance_scale=4.5)))
    with pytest.raises(
        ValueError, match=r"^sampling.negative_prompt must be empty where .* are 1, since it would have no"
    ):
        check(with_settings())
    with pytest.raises(
        ValueError, match=r"^sampling.negative_prompt must be empty for sampling.embedded_guidance: a model"
    ):
        check(with_settings(guidance_scale=3.5, embedded_guidance=True))


@pytest.mark.parametrize("kind", ["auto", "all", "first", "sliding", "random"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_members_begin_as_one_only_where_steps_part_them(objective, kind):
    config = dataclasses.replace(configured(objective, sde_window=kind, same_latent=True), plan=PlanSettings("none"))
    if stochastic_steps(config, 0):
        check(config)
    else:
        assert kind == "auto" and objective != "grpo"
        for parted in (config, configured(objective, sde_window="none", same_latent=True)):
            with pytest.raises(ValueError) as refused:
                check(parted)
            assert str(refused.value) == (
                "sampling.same_latent must be false where no step adds noise (sampling.sde_window):"
                " a group's members would be equal"
            )


@pytest.mark.parametrize(("kind", "latest"), [("all", 0), ("first", 0), ("sliding", 4), ("random", 4)])
def test_members_that_begin_as_one_are_parted_before_they_are_compared(kind, latest):
    def pruned(step: int) -> Config:
        base = configured("grpo", sde_window=kind, sde_window_size=2, sde_window_end=6, same_latent=True)
        return dataclasses.replace(base, plan=PlanSettings("custom", group_size=6, prune=((step, 3),)))

    check(pruned(latest + 1))
    with pytest.raises(ValueError, match=f"plan.prune must begin after step {latest} for sampling.same_latent"):
        check(pruned(latest))


@pytest.mark.parametrize("kind", ["all", "first", "sliding", "random"])
def test_the_last_equal_step_is_that_of_the_latest_window(kind):
    window = {"sde_window": kind, "sde_window_size": 2, "sde_window_end": 6, "sde_window_interval": 1}
    config = configured("grpo", same_latent=True, **window)
    assert last_equal_step(config) == max(stochastic_steps(config, iteration).start for iteration in range(40))
    assert last_equal_step(configured("grpo", **window)) == -1


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("prune", [(), ((0, 6),), ((2, 12), (3, 6)), ((8, 6),)])
def test_a_shared_call_saves_those_of_the_other_living_members(prune, guidance_scale):
    config = configured(
        "grpo",
        same_latent=True,
        sde_window="random",
        sde_window_size=2,
        sde_window_end=6,
        guidance_scale=guidance_scale,
    )
    plan = Plan(24, tuple(PrunePoint(*point) for point in prune))
    for iteration in range(12):
        first = stochastic_steps(config, iteration).start
        calls = sum(1 if step <= first else plan.living_at(step) for step in range(10))
        cost = prompt_cost(config, plan, prompts=3, iteration=iteration)
        assert cost.nfe == 3 * calls * (2 if guidance_scale > 1 else 1)


def test_an_unknown_sampler_or_dtype_is_refused_by_name():
    for field, value, words in (
        ("sampler", "ode", "auto, flow_grpo, dance, flow_grpo_wan, ddim, cps, cps_reduced, precise, or `module:step`"),
        ("latent_dtype", "float64", "float32, bfloat16, float16"),
    ):
        with pytest.raises(ValueError) as refused:
            check(configured(**{field: value}))
        assert str(refused.value) == f"sampling.{field} must be one of {words}, not {value!r}"


# --- numbers that follow ----------------------------------------------------------------------------------------------


def test_windows_by_hand():
    sliding = configured(sde_window="sliding", sde_window_size=2, sde_window_end=4, sde_window_interval=2)
    assert [stochastic_steps(sliding, i).start for i in range(8)] == [0, 0, 1, 1, 2, 2, 0, 0]
    whole = configured(sde_window="sliding", sde_window_size=3, sde_window_interval=1)
    assert [stochastic_steps(whole, i).start for i in range(8)] == [0, 1, 2, 3, 4, 5, 6, 0]  # up to the trained end
    seeds = [from_dict({"seed": seed, "sampling": {"sde_window": "random"}}) for seed in (0, 0, 1)]
    rows = [[stochastic_steps(config, i) for i in range(30)] for config in seeds]
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("nft.draws", 0, "at least 1"),
        ("awm.draws", 0, "at least 1"),
        ("dgpo.draws", 0, "at least 1"),
        ("nft.time_fraction", 0.0, "above 0 and at most 1"),
        ("awm.time_fraction", 1.01, "above 0 and at most 1"),
        ("dgpo.time_fraction", -0.5, "above 0 and at most 1"),
        ("nft.beta", 0.0, "above 0"),
        ("elbo.draws", 0, "at least 1"),
        ("elbo.kl_beta", -1.0, "at least 0"),
        ("awm.clip_range", 0.0, "above 0"),
        ("dgpo.clip_range", 0.0, "above 0"),
        ("dgpo.dpo_beta", 0.0, "above 0"),
        ("awm.average_beta", -1.0, "at least 0"),
        ("grpo.adv_clip_max", 0.0, "above 0"),
        ("nft.adv_clip_max", 0.0, "above 0"),
        ("grpo.kl_beta", -1.0, "at least 0"),
        ("nft.kl_beta", -1.0, "at least 0"),
    ],
)
def test_settings_of_objectives_out_of_range_are_refused_by_name(path, value, words):
    name, setting = path.split(".")
    with pytest.raises(ValueError) as refused:
        check(from_dict({"objective": {"name": name, name: {setting: value}}}))
    assert str(refused.value) == f"objective.{path} must be {words}, not {value!r}"


def test_the_learning_rate_rises_stays_and_falls():
    config = Config(iterations=10, optim=OptimSettings(lr=2.0, warmup=2, decay=0.4))
    rates = [learning_rate(config, t) for t in range(10)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5])
    assert {learning_rate(Config(optim=OptimSettings(lr=2.0)), t) for t in range(10)} == {2.0}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optim": {"reuse_rollout": True}, "objective": {"name": "dgpo"}}, "optim.reuse_rollout must be false for"),
        ({"plan": {"adaptive": True}, "audit": {"every": 0}}, "plan.adaptive must have audit.every above 0"),
        ({"preview": {"probe": True}, "audit": {"every": 0}}, "preview.probe must have audit.every above 0"),
        ({"preview": {"ode_steps": 0}}, "preview.ode_steps must be between 1 and 1,000"),
        ({"preview": {"probe_threshold": 2.0}}, "preview.probe_threshold must be between -1 and 1"),
        ({"sampling": {"microbatch": 0}}, "sampling.microbatch must be at least 1, or empty"),
        ({"reward": {"waves": 0}}, "reward.waves must be at least 1"),
        ({"plan": {"keep_groups": 0}}, "plan.keep_groups must be at least 1, or empty to stop no group, not 0"),
        ({"plan": {"keep_groups": 12}}, "plan.keep_groups must be below the 12 prompts of an iteration"),
        ({"plan": {"preset": "posthoc", "keep_groups": 2}}, "keep_groups must go with a prune point"),
        ({"plan": {"keep_groups": 2, "adaptive": True}}, "plan.keep_groups must be empty for plan.adaptive"),
        (
            {"plan": {"preset": "auto", "keep_groups": 2}},
            "plan.keep_groups must be empty for plan.preset auto: plans are judged by one group",
        ),
        (
            {"plan": {"preset": f"{__name__}:STOPS_GROUPS", "adaptive": True}},
            "plan.keep_groups must be empty for plan.adaptive: plans are judged by one group",
        ),
        ({"plan": {"keep_groups": 2}, "reward": {"waves": 2}}, "plan.keep_groups must be empty for reward.waves"),
        ({"plan": {"keep_groups": 2}, "preview": {"probe": True}}, "plan.keep_groups must be empty for preview.probe"),
        (
            {"plan": {"keep_groups": 2}, "objective": {"advantage": "gdpo"}},
            "plan.keep_groups must be empty for objective.advantage gdpo",
        ),
        (
            {"plan": {"keep_groups": 2}, "preview": {"latent_reward": "head"}, "prompts": {"order": "signal"}},
            "plan.keep_groups must be empty for preview.latent_reward with prompts.order signal: the head's scores of",
        ),
        ({"preview": {"tiny_decoder": "a/b"}}, "preview.tiny_decoder is read only where preview.decoder is tiny; set"),
        ({"preview": {"probe_threshold": 0.1}}, "preview.probe_threshold is read only with preview.probe; set it or"),
        (
            {"objective": {"name": "sft", "sft": {"final_negative_weight": 1.0}}},
            "objective.sft.final_negative_weight must be empty, since only chosen pictures are trained on, not 1.0",
        ),
        (
            {"objective": {"name": "dpo", "dpo": {"final_negative_weight": 0.5}}},
            "objective.dpo.final_negative_weight must be empty, since a pair needs both of its members, not 0.5",
        ),
        (
            {"reward": NOISY, "objective": {"advantage": "gdpo"}},
            "reward.noise must be empty for objective.advantage gdpo",
        ),
        *(
            (
                {"reward": {**NOISY, "noise": name}},
                f"reward.noise must name one of the rewards whose weight is 0, not {quoted}",
            )
            for name, quoted in (("shapes", "'shapes'"), ("other", "'other'"))
        ),
        (
            {"reward": NOISY, "prompts": {"split_groups": True}},
            "prompts.split_groups must be false for reward.noise",
        ),
        (
            {"plan": {"keep_groups": 2}, "prompts": {"split_groups": True}},
            "prompts.split_groups must be false for plan.keep_groups",
        ),
    ],
)
def test_what_the_engine_cannot_do_is_refused(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check(from_dict(fields))


def test_what_the_engine_can_do_is_not():
    for fields in (
        {"model": {"compile": True}},
        {"model": {"compile": True, "dtype": "bfloat16"}},
        {"optim": {"reuse_rollout": True}},
        {"plan": {"keep_groups": 4}},
        {
            "plan": {"preset": "posthoc", "adaptive": True},
            "preview": {"probe": True, "decoder": "tiny", "ode_steps": 2},
        },
    ):
        check(from_dict(fields))


# --- what is no configuration at all ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": 1, "seed": 2}', "not JSON, as a configuration must be: seed is given twice; leave one out"),
        (
            '{"model": {"path": "a", "path": "b"}}',
            "not JSON, as a configuration must be: path is given twice; leave one out",
        ),
        ("[" * 100_000, "not JSON, as a configuration must be: lists or objects are nested without end"),
        ('{"seed": 9223372036854775808}', "seed must be below 2**63, not 9223372036854775808"),
        ('{"optim": {"lr": 1' + "0" * 400 + "}}", "optim.lr must be below 2**63, not 1000"),
        (
            '{"model": {"path": "a\\u0000"}}',
            "model.path must be a text of one line, 4096 characters at most, not 'a\\x00'",
        ),
        ('{"model": {"path": "a\\nb"}}', "model.path must be a text of one line, 4096 characters at most, not 'a\\nb'"),
        ('{"model": {"path": "\\ud800"}}', "model.path must be a text of one line, 4096 characters at most, not"),
        (
            '{"model": {"path": "' + "x" * 5000 + '"}}',
            "model.path must be a text of one line, 4096 characters at most, not",
        ),
        ('{"a\\nb": 1}', "'a\\nb' is not a field"),
    ],
)
def test_json_that_no_run_can_use_is_refused_on_one_short_line(text, message):
    with pytest.raises(ValueError) as refused:
        config_from_json(text)
    assert str(refused.value).startswith(message)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500


def test_texts_may_hold_any_letters():
    path = "/home/Žofie/modèles 你好 (2)"
    assert config_from_json(json.dumps({"model": {"path": path}})).model.path == path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("smoke", "config must be a progrpo.config.Config, not 'smoke'"),
        (Config, "config must be a progrpo.config.Config, not <class"),
        (
            Config(sampling={"shift": 2.0}),  # type: ignore[arg-type]
            "sampling must be a progrpo.config.SamplingSettings, not {'shift': 2.0}",
        ),
        (
            Config(reward=RewardSettings(["shapes"])),  # type: ignore[arg-type]
            "reward.terms[0] must be a progrpo.config.RewardTerm, not 'shapes'",
        ),
        (
            Config(objective=ObjectiveSettings(nft=None)),  # type: ignore[arg-type]
            "objective.nft must be a progrpo.config.NFTSettings, not None",
        ),
        (Config(seed=object()), "seed must be a whole number, not <object object"),  # type: ignore[arg-type]
        (Config(seed=10**5000), "seed must be below 2**63, not something of type int that cannot be written"),
    ],
)
def test_what_python_code_puts_in_place_of_a_part_is_refused(config, message):
    with pytest.raises(ValueError) as refused:
        check(config)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"name": ".a:b"}, "reward.terms[0].name must be one of"),
        ({"name": "a:"}, "reward.terms[0].name must be one of"),
        ({"name": "ocr", "device": "gpu"}, "reward.terms[0].device must be auto, or a device by torch's name, such as"),
        (
            {"name": "ocr", "timeout": 1e300},
            "reward.terms[0].timeout must be above 0 and at most 86400 (a day), or empty",
        ),
        ({"name": "ocr", "retries": 1000}, "reward.terms[0].retries must be between 0 and 16, not 1000"),
        ({"name": "ocr", "processes": 10**6}, "reward.terms[0].processes must be between 0 and 256, not 1000000"),
        ("x*ocr", "reward.terms: the weight in 'x*ocr' is no number"),
        ('{"name": ', "reward.terms: '{\"name\": ' is not JSON"),
    ],
)
def test_rewards_that_no_run_can_use_are_refused(term, message):
    with pytest.raises(ValueError) as refused:
        check(from_dict({"reward": {"terms": [term]}}))
    assert str(refused.value).startswith(message)
