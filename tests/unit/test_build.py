"""From a configuration to objects: the dtype that is measured, absolute paths, and how an iteration samples."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from progrpo.config import (
    AuditSettings,
    Config,
    EvalSettings,
    GRPOSettings,
    ModelSettings,
    ObjectiveSettings,
    PlanSettings,
    PreviewSettings,
    PromptSettings,
    RewardSettings,
    RewardTerm,
    SamplingSettings,
)
from progrpo.objectives.advantage import posterior_means
from progrpo.objectives.grpo import GRPO
from progrpo.policies.load import fastest_dtype, policy_from_pipeline
from progrpo.rewards.base import Refusal
from progrpo.rollout.sampling import load_sampler, ode, sampler_name
from progrpo.training.absolute_paths import with_absolute_paths
from progrpo.training.build import (
    objective_from,
    policy_context,
    ranking_from,
    resolve_dtype,
    sampling_from,
)
from progrpo.training.distributed import Ranks
from progrpo.training.inputs import audits_warning, noise_warning


def test_a_dtype_that_is_named_stays():
    config = Config(model=ModelSettings(dtype="float16"))
    assert resolve_dtype(config, Ranks()) is config


def test_auto_is_measured_once_and_written_down():
    chosen = resolve_dtype(Config(model=ModelSettings(dtype="auto")), Ranks())
    assert chosen.model.dtype in ("float32", "bfloat16") and chosen == Config(model=chosen.model)
    assert resolve_dtype(chosen, Ranks()) is chosen
    assert fastest_dtype(torch.device("cpu")) in ("float32", "bfloat16")


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("model", "home/lora", "taesd", "owner/local", "shapes", "shapes-flow"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "prompts.txt").touch()
    (tmp_path / "tuned.safetensors").touch()
    (tmp_path / "pairs.jsonl").touch()
    term = RewardTerm("clipscore", model="owner/local", cache="scores")
    votes = RewardTerm("votes", model="~/not-made-yet")
    config = Config(
        model=ModelSettings(path="model", lora="~/lora", single_file="tuned.safetensors"),
        prompts=PromptSettings(source="prompts.txt", pairs="pairs.jsonl"),
        preview=PreviewSettings(decoder="tiny", tiny_decoder="./taesd"),
        reward=RewardSettings((term, votes)),
        eval=EvalSettings(prompts="dataset:owner/local", rewards=(replace(term, name="vlm", cache=""),)),
    )
    absolute = with_absolute_paths(config)
    assert (absolute.model.path, absolute.model.lora) == (f"{tmp_path}/model", f"{tmp_path}/home/lora")
    assert absolute.model.single_file == f"{tmp_path}/tuned.safetensors"
    assert (absolute.prompts.source, absolute.prompts.pairs, absolute.eval.prompts) == (
        f"{tmp_path}/prompts.txt",
        f"{tmp_path}/pairs.jsonl",
        f"dataset:{tmp_path}/owner/local",
    )
    assert absolute.preview.tiny_decoder == f"{tmp_path}/taesd"
    assert absolute.reward.terms == (
        replace(term, model=f"{tmp_path}/owner/local", cache=f"{tmp_path}/scores"),
        replace(votes, model=f"{tmp_path}/home/not-made-yet"),
    )
    assert absolute.eval.rewards == config.eval.rewards  # a vision model's name is its server's
    assert with_absolute_paths(absolute) == absolute
    parted = with_absolute_paths(Config(eval=EvalSettings(prompts="dataset:owner/local:part")))
    assert parted.eval.prompts == f"dataset:{tmp_path}/owner/local:part"
    names = Config(model=ModelSettings("owner/hub"), eval=EvalSettings(prompts="dataset:owner/hub:part"))
    assert with_absolute_paths(names) == names and with_absolute_paths(Config()) == Config()


@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_a_window_is_stochastic_and_stored_and_the_rest_follows_the_ode(tiny_policy, ratio):
    config = Config(
        sampling=SamplingSettings(
            num_inference_steps=6, sde_window="sliding", sde_window_size=2, sde_window_interval=1
        ),
        objective=ObjectiveSettings(grpo=GRPOSettings(ratio=ratio)),
    )
    needs = config.objective.loss.stores
    sampling = sampling_from(config, tiny_policy(), needs, iteration=2)
    assert sampling.process.noise_levels == (0, 0, 0.7, 0.7, 0, 0) and sampling.record.steps == {2, 3}
    assert sampling.record.means == (ratio == "guard")


def test_the_clip_range_is_the_published_one_in_proportion_to_the_latent_unless_it_is_given(tiny_policy):
    policy, given = tiny_policy(), ObjectiveSettings(grpo=GRPOSettings(clip_range=3e-3))
    assert objective_from(Config(), policy).clip_range == pytest.approx(1e-4 * (16 * 64 * 64) / (4 * 8 * 8))
    assert objective_from(Config(objective=given), policy).clip_range == 3e-3


# --- samplers of families ---------------------------------------------------------------------------------------------

FLOW, DIFFUSION = ("sd3", "flux", "kontext", "flux2_klein", "qwen_image"), ("sd", "sd_v", "sdxl")
FAMILIES = FLOW + DIFFUSION


@pytest.fixture(scope="module")
def policy_of(request, tiny_policy):
    """A family's policy, made once."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = tiny_policy(folder=request.getfixturevalue(f"tiny_{family}"))
        return made[family]

    return of


def configured(grpo=None, **sampling):
    return Config(sampling=SamplingSettings(**sampling), objective=ObjectiveSettings(grpo=GRPOSettings(**(grpo or {}))))


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_is_the_familys_own_sampler(policy_of, family):
    policy, own = policy_of(family), "flow_grpo" if family in FLOW else "ddim"
    assert sampler_name(SamplingSettings(), policy) == own
    process = sampling_from(configured(), policy, "transitions", 0).process
    assert process.sampler is load_sampler(own) and process.prediction == policy.prediction


@pytest.mark.parametrize("sampler", ["flow_grpo", "dance"])
@pytest.mark.parametrize("family", DIFFUSION)
def test_the_sdes_of_flow_models_are_refused_on_diffusion_models(policy_of, family, sampler):
    message = f"^sampling.sampler: {sampler} is the SDE of flow models, .* a diffusion model; use ddim, cps or precise$"
    config, policy = configured(sampler=sampler), policy_of(family)
    with pytest.raises(ValueError, match=message):
        sampling_from(config, policy, "transitions", 0)
    with pytest.raises(ValueError, match=message):
        objective_from(config, policy)
    assert sampler_name(config.sampling, policy_of("sd3")) == sampler


@pytest.mark.parametrize(("family", "embedded"), [("flux", True), ("sd3", False)])
def test_guidance_is_counted_as_the_model_takes_it(policy_of, family, embedded):
    policy = policy_of(family)
    sampling = sampling_from(configured(guidance_scale=3.5, embedded_guidance=embedded), policy, "transitions", 0)
    assert sampling.nfe_per_call == (1 if embedded else 2) == ode(policy, 4, 3.5, 64).nfe_per_call
    wrong = configured(guidance_scale=3.5, embedded_guidance=not embedded)
    with pytest.raises(
        ValueError, match=rf"^sampling\.embedded_guidance must be {str(embedded).lower()}: this model (is|takes) "
    ):
        sampling_from(wrong, policy, "transitions", 0)
    assert sampling_from(configured(embedded_guidance=not embedded), policy, "transitions", 0).nfe_per_call == 1


def test_what_is_no_setting_of_the_model_reaches_the_policy():
    config = Config(seed=3, preview=PreviewSettings(decoder="tiny", tiny_decoder="small"))
    config = replace(config, sampling=replace(config.sampling, negative_prompt="green bird"))
    context = policy_context(config, Ranks())
    assert (context.lora_seed, context.decoder_for_previews, context.guide_away_from) == (3, "small", "green bird")
    full = replace(config, preview=replace(config.preview, decoder="full"))
    assert policy_context(full, Ranks()).decoder_for_previews == ""


@pytest.mark.parametrize(
    ("sampler", "published"), [("flow_grpo", 0.7), ("dance", 0.3), ("ddim", 1.0), ("cps", 0.8), ("precise", 1.5)]
)
def test_the_noise_level_is_the_published_one_unless_it_is_given(policy_of, sampler, published):
    for noise_level, expected in ((None, published), (0.2, 0.2)):
        config = configured(sampler=sampler, noise_level=noise_level, num_inference_steps=4)
        sampling = sampling_from(config, policy_of("sd3"), "transitions", 0)
        assert sampling.process.noise_levels == (expected,) * 4


def test_how_latents_begin_and_are_kept_reaches_sampling(policy_of):
    policy = policy_of("sd3")
    plain = sampling_from(configured(), policy, "transitions", 0)
    assert (plain.settings.same_latent, plain.latent_dtype) == (False, torch.float32)
    other = sampling_from(configured(same_latent=True, latent_dtype="bfloat16"), policy, "transitions", 0)
    assert (other.settings.same_latent, other.latent_dtype) == (True, torch.bfloat16)


@pytest.mark.parametrize("sampler", ["ddim", "cps", "cps_reduced", "precise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_last_step_without_noise_is_not_trained(policy_of, family, sampler):
    """CPS's std and DDIM's are 0 at clean data; only Stable Diffusion's grid, as it was published, ends before that."""
    policy, config = policy_of(family), configured(sampler=sampler, train_last_step=True, num_inference_steps=4)
    assert sampling_from(configured(sampler=sampler), policy, "transitions", 0).record.steps == set(range(9))
    if family in ("sd", "sd_v"):
        sampling = sampling_from(config, policy, "transitions", 0)
        assert sampling.record.steps == set(range(4)) and sampling.process.stds_T[3] > 0
    else:
        with pytest.raises(ValueError) as refused:
            sampling_from(config, policy, "transitions", 0)
        assert str(refused.value) == (
            f"sampling.train_last_step must be false: the last step of {sampler} on this model's grid"
            " has no noise or no length"
        )


def test_a_last_step_without_length_is_not_trained(tiny_pipeline, tiny_sd):
    """Where the grid's last timestep is 0, that of the data's end is 0 too: CPS adds noise in a step of no length."""
    pipeline = tiny_pipeline(tiny_sd)
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, steps_offset=0)
    policy = policy_from_pipeline(pipeline, ModelSettings(lora_rank=2))
    plain = sampling_from(configured(sampler="cps"), policy, "transitions", 0)
    assert plain.process.lengths_T[-1] == 0 and plain.process.stds_T[-1] > 0
    with pytest.raises(ValueError, match=r"train_last_step must be false: .* has no noise or no length"):
        sampling_from(configured(sampler="cps", train_last_step=True), policy, "transitions", 0)


@pytest.mark.parametrize("sampler", ["flow_grpo", "dance"])
def test_the_last_step_of_an_sde_has_noise(policy_of, sampler):
    config = configured(sampler=sampler, train_last_step=True, num_inference_steps=4)
    assert sampling_from(config, policy_of("sd3"), "transitions", 0).record.steps == set(range(4))


@pytest.mark.parametrize(
    ("sampler", "clip_of_all"),
    [
        ("flow_grpo", 1e-4 * 65536),
        ("dance", 1e-4 * 65536),
        ("ddim", 1e-4 * 16384),
        ("cps", 1e-5 * 65536),
        ("cps_reduced", 1e-5 * 65536),
        ("precise", 1e-4 * 65536),
    ],
)
def test_clip_ranges_by_sampler_and_by_ratio(policy_of, sampler, clip_of_all):
    """GRPO-Guard's is its own, since its ratios have another spread; a given one stays."""
    policy = policy_of("sd3")
    dims = math.prod(policy.latent_shape)
    assert objective_from(configured(sampler=sampler), policy).clip_range == pytest.approx(clip_of_all / dims)
    guard = objective_from(configured({"ratio": "guard"}, sampler=sampler), policy)
    assert guard.clip_range == pytest.approx(2e-6 * 65536 / dims)
    for ratio in ("plain", "guard"):
        given = configured({"ratio": ratio, "clip_range": 0.01}, sampler=sampler)
        assert objective_from(given, policy).clip_range == 0.01


def test_flow_grpos_kl_needs_a_diffusion_rate(policy_of):
    config = configured({"kl_form": "flow_grpo"})
    objective = objective_from(config, policy_of("sd3"))
    assert isinstance(objective, GRPO) and objective.settings.kl_form == "flow_grpo"
    for family, sampler in (("sd", "auto"), ("sdxl", "cps"), ("sd3", "ddim")):
        chosen = configured({"kl_form": "flow_grpo"}, sampler=sampler)
        with pytest.raises(ValueError) as refused:
            objective_from(chosen, policy_of(family))
        assert str(refused.value) == (
            "objective.grpo.kl_form: flow_grpo needs a flow model's diffusion rate; take exact for this sampler"
        )
    other = replace(config, objective=replace(config.objective, name="nft"))
    assert objective_from(other, policy_of("sd")).settings.stores == "latents"  # which has no such term


def test_members_are_chosen_by_their_expected_rewards_where_the_noise_is_known():
    terms = (RewardTerm("a", 2.0), RewardTerm("noise", 0.0), RewardTerm("b", -1.0))
    ranking = ranking_from(ObjectiveSettings(), RewardSettings(terms, noise="noise"))
    assert ranking is not None
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    parts = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts[:, 1] = torch.tensor([0.0, 1.0, 4.0, 0.5, 0.5, math.nan])
    expected = posterior_means(2 * parts[:, 0] - parts[:, 2], parts[:, 1], group, 2)
    torch.testing.assert_close(ranking(parts, group), expected, equal_nan=True)
    assert expected.isnan().tolist() == [False] * 5 + [True]
    parts[2, 1] = -0.5
    with pytest.raises(Refusal, match=r"variances, which are 0 or more, not -0\.5"):
        ranking(parts, group)


def test_a_process_whose_groups_were_all_stopped_has_no_expected_rewards():
    terms = (RewardTerm("a"), RewardTerm("noise", 0.0))
    ranking = ranking_from(ObjectiveSettings(), RewardSettings(terms, noise="noise"))
    assert ranking is not None
    expected = ranking(torch.empty(0, 2, dtype=torch.float64), torch.empty(0, dtype=torch.int64))
    assert expected.shape == (0,) and expected.dtype == torch.float64


@pytest.mark.parametrize(
    ("settings", "every", "iterations", "says"),
    [
        ({"plan": PlanSettings(adaptive=True)}, 5, 15, "^plan.adaptive cannot have an effect in 15 .* iteration 15; "),
        ({"plan": PlanSettings(adaptive=True)}, 5, 16, None),
        ({"plan": PlanSettings("auto")}, 5, 3, "^plan.preset auto cannot .* comes in iteration 3; raise iterations$"),
        ({"plan": PlanSettings("auto")}, 5, 4, None),
        ({"preview": PreviewSettings(probe=True)}, 1, 2, r"^preview.probe .* iteration 3; .* audit.every 1$"),
        ({}, 5, 1, None),
        ({"plan": PlanSettings(adaptive=True), "prompts": PromptSettings(pairs="p.jsonl")}, 5, 1, None),
    ],
)
def test_what_audits_come_too_late_for_is_said(settings, every, iterations, says):
    config = replace(Config(iterations=iterations, audit=AuditSettings(every=every)), **settings)
    warning = audits_warning(config)
    assert warning is None if says is None else warning is not None and re.search(says, warning)


@pytest.mark.parametrize(
    ("objective", "sampling", "says"),
    [
        ("nft", {"sampler": "cps"}, "^sampling.sampler cps cannot .*: sampling.sde_window auto .* objective.name nft$"),
        ("elbo", {"sampler": "cps", "noise_level": 0.5}, "^sampling.sampler cps and sampling.noise_level 0.5 cannot "),
        ("nft", {"sampler": "cps", "sde_window": "all"}, None),
        ("nft", {}, None),
        ("grpo", {"sampler": "cps"}, None),
    ],
)
def test_noise_that_no_step_adds_is_reported(objective, sampling, says):
    config = Config(objective=ObjectiveSettings(objective), sampling=SamplingSettings(**sampling))
    warning = noise_warning(config)
    assert warning is None if says is None else warning is not None and re.search(says, warning)
