"""Before any update the policy is the one that sampled, and the check that says so can fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

from progrpo.config import ObjectiveSettings, OptimSettings, PlanSettings, SamplingSettings
from progrpo.objectives.base import Experience, Loss, Objective
from progrpo.objectives.grpo import GRPO
from progrpo.objectives.settings import GRPOSettings
from progrpo.policies.load import policy_from_pipeline
from progrpo.policies.settings import ModelSettings
from progrpo.rollout.sampling import load_sampler
from progrpo.training.checks import SelfCheckError, check_ratio, rounding_between, rounding_of_ratio
from tests.support.runs import load_pipeline

CLIP_RANGE = 3e-3
Rollouts = Callable[[float], Experience]


def losses(policy: Any, experience: Experience, microbatch: int, objective: Objective | None = None) -> list[Loss]:
    objective = objective or GRPO(GRPOSettings(clip_range=CLIP_RANGE))
    items = torch.arange(len(experience) * objective.settings.items_per_trajectory(len(experience.trajectories.path)))
    with torch.no_grad():
        return [objective.loss(policy, experience, part) for part in items.split(microbatch)]


def deviation(policy: Any, experience: Experience, microbatch: int = 64) -> float:
    return max(loss.maxima["ratio_max_deviation"].item() for loss in losses(policy, experience, microbatch))


@pytest.fixture
def trainer(tiny_trainer, tiny_config):
    return tiny_trainer(tiny_config())


_MEASURED: WeakKeyDictionary[Any, set[tuple[int, ...]]] = WeakKeyDictionary()


def measure_shapes(policy: Any, experience: Experience, microbatches: Sequence[int]) -> None:
    """Measure batch invariance in calls of these microbatches' shapes, since a run measures its own shapes alone.

    Once a policy, which is the same in many tests.
    """
    items = len(experience) * len(experience.trajectories.path)
    branches = 2 if experience.guidance_scale > 1 and not policy.embeds_guidance else 1
    shapes = {size for m in microbatches for size in (min(m, items), items % m) if size}
    rows = tuple(branches * size for size in sorted({3, *shapes}))  # rollouts here make calls of 3
    if rows not in (measured := _MEASURED.setdefault(policy, set())):
        policy.measure_batch_invariance(rows, rows)
        measured.add(rows)


def allowed(policy: Any, clip_range: float = CLIP_RANGE) -> float:
    """A run's own bound: a hundredth of the clip range, and rounding where this processor's kernels differ by shape."""
    return max(clip_range / 100, rounding_between(policy, GRPO(GRPOSettings(clip_range=clip_range))))


def seen(policy: Any, rollouts: Rollouts, microbatches: tuple[int, ...]) -> tuple[float, float]:
    """The largest deviation and the clipped items, over rollouts with and without guidance in microbatches of 3."""
    worst, clipped = 0.0, 0.0
    for guidance_scale in (1.0, 3.0):
        experience = rollouts(guidance_scale)
        assert len(experience) == 6 and experience.trajectories.path[0].log_prob_N.dtype == torch.float32
        measure_shapes(policy, experience, microbatches)
        for microbatch in microbatches:
            loss_parts = losses(policy, experience, microbatch)
            worst = max(worst, *(loss.maxima["ratio_max_deviation"].item() for loss in loss_parts))
            clipped += sum(loss.sums["clip_fraction"].item() for loss in loss_parts)
    return worst, clipped


@pytest.fixture
def guided(tiny_trainer, tiny_config, first_experience):
    """Rollouts of a policy, by guidance scale."""

    def of(policy: Any) -> Rollouts:
        def roll(guidance_scale: float) -> Experience:
            sampling = SamplingSettings(num_inference_steps=4, guidance_scale=guidance_scale, microbatch=3)
            return first_experience(tiny_trainer(tiny_config(sampling=sampling), policy))

        return roll

    return of


@pytest.mark.parametrize(("weights", "moved"), [("lora", 0.0), ("lora", 0.1), ("full", 0.1)])
def test_ratio_is_one_at_every_microbatch(tiny_policy, guided, weights, moved):
    policy = tiny_policy(weights, moved=moved)
    worst, clipped = seen(policy, guided(policy), microbatches=(1, 3, 64))
    assert worst <= allowed(policy)
    assert clipped == 0 or not policy.batch_invariant


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_ratio_is_one_in_low_precision(tiny_policy, guided, weights, dtype):
    policy = tiny_policy(weights, dtype, moved=0.1)
    # matrices of one row are vectors, for which there are other kernels: a call has two
    worst, clipped = seen(policy, guided(policy), microbatches=(1, 3, 64))
    assert worst <= allowed(policy)
    assert clipped == 0 or not policy.batch_invariant


@pytest.mark.parametrize(("dtype", "quantize"), [("float32", "int8"), ("bfloat16", "none")])
def test_ratio_is_one_for_a_dora(tiny_sd3, guided, move, dtype, quantize):
    settings: Any = {"dtype": dtype, "quantize": quantize, "lora_rank": 2, "lora_use_dora": True}
    policy = policy_from_pipeline(load_pipeline(tiny_sd3), ModelSettings(max_sequence_length=8, **settings))
    move(policy, 0.1)
    worst, clipped = seen(policy, guided(policy), microbatches=(1, 3, 64))
    assert worst <= allowed(policy)
    assert clipped == 0 or not policy.batch_invariant


# --- every family, sampler and storage --------------------------------------------------------------------------------

SDE, PRESERVING = ("flow_grpo", "dance"), ("ddim", "cps", "cps_reduced", "precise")
SAMPLERS = {
    "sd3": (*SDE, *PRESERVING),
    "flux": (*SDE, *PRESERVING),
    "kontext": ("flow_grpo",),
    "sd": PRESERVING,
    "sd_v": PRESERVING,
    "sdxl": PRESERVING,
    "wan": ("flow_grpo", "flow_grpo_wan"),
    "flux2_klein": ("flow_grpo",),
    "qwen_image": ("flow_grpo",),
}
DTYPES = ("float32", "bfloat16", "float16")
OF_EACH_KIND = ("sd3", "kontext", "flux2_klein", "wan", "sd")
"""One family of each kind; where the family decides little, the others are tried by `make test-slow`."""


def case(*values: Any, slow: bool) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow if slow else ())


def stored_cases() -> list[Any]:
    """The cases of families, samplers and storages; those that differ little are slow.

    Latents are rounded by the process, which knows samplers and no families. So each sampler is tried with each
    storage by one family, and each family by one sampler with the coarsest storage.
    """
    cases, met = [], set[str]()
    for family, samplers in SAMPLERS.items():
        for sampler in samplers:
            is_new = sampler not in met
            for dtype in DTYPES:
                of_family = sampler == samplers[0] and dtype == "bfloat16"
                cases.append(case(family, sampler, dtype, slow=not (is_new or of_family)))
            met.add(sampler)
    return cases


@pytest.fixture(scope="module")
def moved_policy(request, tiny_policy):
    """A family's policy with moved weights, made once: nothing here trains it."""
    made: dict[tuple[str, ...], Any] = {}

    def of(family: str, weights: str = "lora", network: str = "float32", quantize: str = "none") -> Any:
        key = family, weights, network, quantize
        if key not in made:
            folder = request.getfixturevalue(f"tiny_{family}")
            made[key] = tiny_policy(weights, network, moved=0.1, folder=folder, quantize=quantize)
        return made[key]

    return of


@pytest.fixture
def first(tiny_trainer, tiny_config, first_experience):
    """The objective and experience of a first guided iteration: 2 groups of 4, of which 3 live; 2 of 3 steps train."""

    def of(policy: Any, ratio: Any = "plain", plan: PlanSettings | None = None, **sampling: Any):
        settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "microbatch": 3, **sampling}
        settings["embedded_guidance"] = policy.embeds_guidance
        sections = {
            "sampling": SamplingSettings(**settings),
            "objective": ObjectiveSettings(grpo=GRPOSettings(ratio=ratio)),
        }
        trainer = tiny_trainer(tiny_config(**sections, **({"plan": plan} if plan else {})), policy)
        return trainer.learner.objective, first_experience(trainer)

    return of


def assert_on_policy(policy, objective, experience, microbatches=(1, 64)):
    """By the clip range that the objective was given for these latents, or a finer one that runs here have.

    In calls of other shapes than the rollout's 3: in equal ones every kernel is the same.
    """
    assert len(experience) == 6 and len(experience.trajectories.path) > 0
    measure_shapes(policy, experience, microbatches)
    for microbatch in microbatches:
        loss_parts = losses(policy, experience, microbatch, objective)
        worst = max(loss.maxima["ratio_max_deviation"].item() for loss in loss_parts)
        assert worst <= allowed(policy, min(objective.clip_range, CLIP_RANGE)), (microbatch, worst)
        assert not policy.batch_invariant or sum(loss.sums["clip_fraction"].item() for loss in loss_parts) == 0


@pytest.mark.parametrize(("family", "sampler", "latent_dtype"), stored_cases())
def test_ratio_is_one_for_every_family_sampler_and_storage(moved_policy, first, family, sampler, latent_dtype):
    policy = moved_policy(family)
    objective, experience = first(policy, sampler=sampler, latent_dtype=latent_dtype)
    stored = experience.trajectories.path[0].x_next_NCHW.dtype
    assert experience.process.sampler is load_sampler(sampler) and stored == getattr(torch, latent_dtype)
    assert_on_policy(policy, objective, experience)


@pytest.mark.parametrize("family", [case(f, slow=f not in OF_EACH_KIND) for f in SAMPLERS])
def test_ratio_is_one_with_full_weights(moved_policy, first, family):
    policy = moved_policy(family, "full")
    assert_on_policy(policy, *first(policy, latent_dtype="bfloat16"))


@pytest.mark.parametrize(
    ("family", "latent_dtype"),
    [case(f, dtype, slow=f not in ("sd3", "sd")) for f in SAMPLERS for dtype in DTYPES],
)
def test_guarded_ratio_is_one(moved_policy, first, family, latent_dtype):
    policy = moved_policy(family)
    objective, experience = first(policy, "guard", latent_dtype=latent_dtype)
    assert objective.clip_range == pytest.approx(2e-6 * 16 * 64 * 64 / math.prod(policy.latent_shape))
    assert_on_policy(policy, objective, experience)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [case(f, dtype, slow=f not in OF_EACH_KIND) for f in SAMPLERS for dtype in ("bfloat16", "float16")],
)
def test_ratio_is_one_in_low_precision_for_every_family(moved_policy, first, family, dtype):
    policy = moved_policy(family, network=dtype)
    for latent_dtype in ("float32", dtype):
        objective, experience = first(policy, latent_dtype=latent_dtype)
        assert_on_policy(policy, objective, experience, microbatches=(3, 64))


@pytest.mark.parametrize(
    ("family", "network"),
    [("sd3", "float32"), *(case(f, "bfloat16", slow=f not in ("sd3", "sd", "flux2_klein")) for f in SAMPLERS)],
)
def test_ratio_is_one_beside_frozen_weights_in_8_bits(moved_policy, first, family, network):
    policy = moved_policy(family, network=network, quantize="int8")
    assert sum(t.dtype == torch.int8 for _, t in policy.frozen()) > 5
    objective, experience = first(policy)
    assert_on_policy(policy, objective, experience, microbatches=(3, 64))


@pytest.mark.parametrize("latent_dtype", DTYPES)
@pytest.mark.parametrize("family", ["sd", "sd_v"])
def test_ratio_is_one_at_a_last_step_of_little_noise(moved_policy, first, family, latent_dtype):
    """The end of a grid that does not reach clean data: what is rounded is much of the little noise that is added."""
    policy = moved_policy(family)
    objective, experience = first(policy, train_last_step=True, latent_dtype=latent_dtype)
    assert [t.step for t in experience.trajectories.path] == [0, 1, 2] and 0 < experience.process.stds_T[2] < 0.03
    assert_on_policy(policy, objective, experience)


def test_latents_rounded_after_their_log_probs_would_be_seen(moved_policy, first):
    policy, plan = moved_policy("sd"), PlanSettings("custom", group_size=2)
    settings = {"num_inference_steps": 50, "train_last_step": True, "microbatch": 4}
    for latent_dtype, after, seen in (("bfloat16", False, False), ("float32", False, False), ("float32", True, True)):
        objective, experience = first(policy, plan=plan, latent_dtype=latent_dtype, **settings)
        last = experience.trajectories.path[-1]
        if after:
            last = replace(last, x_next_NCHW=last.x_next_NCHW.to(torch.bfloat16))
        alone = replace(experience, trajectories=replace(experience.trajectories, path=(last,)))
        worst = max(loss.maxima["ratio_max_deviation"].item() for loss in losses(policy, alone, 4, objective))
        assert last.step == 49 and (worst > 1e-4 if seen else worst <= CLIP_RANGE / 100)


# --- what is seen -----------------------------------------------------------------------------------------------------


def test_a_little_change_of_the_weights_is_seen(trainer, first_experience, move):
    experience = first_experience(trainer)
    check_ratio(deviation(trainer.policy, experience), CLIP_RANGE)
    move(trainer.policy, 0.02)
    with pytest.raises(SelfCheckError, match=r"the first update is off-policy: a ratio deviates by \d.* from 1"):
        check_ratio(deviation(trainer.policy, experience), CLIP_RANGE)


@pytest.mark.parametrize("field", ["x_NCHW", "x_next_NCHW", "log_prob_N"])
def test_a_little_change_of_what_was_stored_is_seen(trainer, first_experience, field):
    experience = first_experience(trainer)
    first, *rest = experience.trajectories.path
    changed = replace(first, **{field: getattr(first, field) + 1e-3})
    path = replace(experience.trajectories, path=(changed, *rest))
    assert deviation(trainer.policy, replace(experience, trajectories=path)) > CLIP_RANGE / 100


def test_a_deviation_that_is_no_number_is_refused():
    with pytest.raises(SelfCheckError, match="off-policy"):
        check_ratio(float("nan"), CLIP_RANGE)


def test_a_run_that_trains_another_policy_than_it_sampled_from_stops(
    tiny_trainer, tiny_config, tiny_policy, move, redness
):
    policy = tiny_policy()

    def tampering(images, prompts):
        move(policy, 0.02)
        return redness(images, prompts)

    with pytest.raises(SelfCheckError, match="sampling and training compute different predictions"):
        tiny_trainer(tiny_config(), policy, tampering).step()


def test_a_clip_range_finer_than_float32_allows_its_rounding_and_no_more():
    check_ratio(2e-7, clip_range=2e-6)
    with pytest.raises(SelfCheckError, match=r"where 1\.0e-06 is allowed"):
        check_ratio(1.5e-6, clip_range=2e-6)
    with pytest.raises(SelfCheckError, match=r"where 5\.0e-07 is allowed"):
        check_ratio(6e-7, clip_range=5e-7)


# --- where sampling and training round differently --------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2048, 65536])
def test_rounding_differs_from_another_prediction(dims):
    """A mean that is off by a share of the noise's std, in a direction of its own: the log-ratio over 300 draws."""
    generator = torch.Generator().manual_seed(0)
    z, way = (torch.randn(300, dims, dtype=torch.float64, generator=generator) for _ in range(2))
    for share, allowed in ((1 / 60, True), (0.04, True), (0.15, False)):
        log_ratio = (z.square() - (z - share * way).square()).mean(1) / 2
        worst = log_ratio.expm1().abs().max().item()
        assert (worst <= rounding_of_ratio(dims)) is allowed, (share, worst)


@pytest.mark.parametrize("updates", [1, 2])
def test_a_network_that_rounds_otherwise_where_it_trains_is_trained_and_a_wrong_one_is_not(
    tiny_policy, tiny_trainer, tiny_config, monkeypatch, updates
):
    def trainer_of(off: float) -> Any:
        policy = tiny_policy("lora", moved=0.1)
        forward = policy.network.forward

        def run(*inputs: Any) -> torch.Tensor:
            output = forward(*inputs)
            if not torch.is_grad_enabled():
                return output
            return output + off * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))

        monkeypatch.setattr(policy.network, "forward", run)
        return tiny_trainer(tiny_config(optim=OptimSettings(updates_per_rollout=updates, microbatch=3)), policy)

    trainer = trainer_of(0.01)
    assert not trainer.policy.batch_invariant  # as measured when it was built
    record = trainer.step().record
    assert CLIP_RANGE / 100 < record["update/on_policy_deviation"] < 0.02
    trainer = trainer_of(0.01)
    trainer.policy.batch_invariant = True
    with pytest.raises(SelfCheckError, match="off-policy"):
        trainer.step()
    with pytest.raises(SelfCheckError, match="off-policy"):
        trainer_of(0.5).step()
