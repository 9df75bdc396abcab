"""Before any update the policy is the one that sampled, and the check that says so can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from progrpo.config import SamplingConfig
from progrpo.objectives.base import Experience, Loss
from progrpo.objectives.grpo import GRPO
from progrpo.training.checks import SelfCheckError, check_ratio

CLIP_RANGE = 3e-3
Rollouts = Callable[[float], Experience]


def losses(policy: Any, experience: Experience, microbatch: int) -> list[Loss]:
    objective = GRPO(CLIP_RANGE)
    items = torch.arange(len(experience) * objective.items_per_trajectory(experience))
    with torch.no_grad():
        return [objective.loss(policy, experience, part) for part in items.split(microbatch)]


def deviation(policy: Any, experience: Experience, microbatch: int = 64) -> float:
    return max(loss.maxima["ratio_max_deviation"].item() for loss in losses(policy, experience, microbatch))


@pytest.fixture
def trainer(tiny_trainer, tiny_config):
    return tiny_trainer(tiny_config())


def seen(policy: Any, rollouts: Rollouts, microbatches: tuple[int, ...]) -> tuple[float, float]:
    """The largest deviation and the clipped items, over rollouts with and without guidance in microbatches of 3."""
    worst, clipped = 0.0, 0.0
    for guidance_scale in (1.0, 3.0):
        experience = rollouts(guidance_scale)
        assert len(experience) == 6 and experience.trajectories.path[0].log_prob_N.dtype == torch.float32
        for microbatch in microbatches:
            found = losses(policy, experience, microbatch)
            worst = max(worst, *(loss.maxima["ratio_max_deviation"].item() for loss in found))
            clipped += sum(loss.sums["clip_fraction"].item() for loss in found)
    return worst, clipped


@pytest.fixture
def guided(tiny_trainer, tiny_config, first_experience):
    """Rollouts of a policy, by guidance scale."""

    def of(policy: Any) -> Rollouts:
        def roll(guidance_scale: float) -> Experience:
            sampling = SamplingConfig(num_inference_steps=4, guidance_scale=guidance_scale, microbatch=3)
            return first_experience(tiny_trainer(tiny_config(sampling=sampling), policy))

        return roll

    return of


@pytest.mark.parametrize(("weights", "moved"), [("lora", 0.0), ("lora", 0.1), ("full", 0.1)])
def test_ratio_is_one_at_every_microbatch(tiny_policy, guided, weights, moved):
    policy = tiny_policy(weights, moved=moved)
    worst, clipped = seen(policy, guided(policy), microbatches=(1, 3, 64))
    assert worst <= CLIP_RANGE / 100 and clipped == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_ratio_is_one_in_low_precision(tiny_policy, guided, weights, dtype):
    policy = tiny_policy(weights, dtype, moved=0.1)
    worst, clipped = seen(policy, guided(policy), microbatches=(3, 64))
    assert worst <= CLIP_RANGE / 100 and clipped == 0


def test_in_low_precision_a_microbatch_of_one_rounds_otherwise_but_within_the_clip_range(tiny_policy, guided):
    # its matrices are vectors, for which there are other kernels
    policy = tiny_policy("lora", torch.bfloat16, moved=0.1)
    worst, clipped = seen(policy, guided(policy), microbatches=(1,))
    assert worst <= CLIP_RANGE / 2 and clipped == 0


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

    with pytest.raises(SelfCheckError, match="sampling and training compute different velocities"):
        tiny_trainer(tiny_config(), policy, tampering).step()


def test_a_clip_range_finer_than_float32_allows_its_rounding_and_no_more():
    check_ratio(2e-7, clip_range=2e-6)
    with pytest.raises(SelfCheckError, match=r"where 1\.0e-06 is allowed"):
        check_ratio(1.5e-6, clip_range=2e-6)
    with pytest.raises(SelfCheckError, match=r"where 5\.0e-07 is allowed"):
        check_ratio(6e-7, clip_range=5e-7)
