"""Before any update the policy is the one that sampled, and the check that says so can fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from progrpo.config import SamplingConfig
from progrpo.objectives.base import Experience, Loss
from progrpo.objectives.grpo import GRPO
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.rollout import rollout
from progrpo.training.checks import SelfCheckError, check_ratio
from progrpo.training.distributed import Ranks
from progrpo.training.update import learn_from

CLIP_RANGE = 3e-3


def rolled_out(trainer: Any) -> Experience:
    """What the trainer's first iteration would learn from."""
    prompts = trainer.order.prompts_for(0, 2)
    parts = trainer.plan, trainer.sampling, trainer.select
    rolled = rollout(trainer.policy, trainer.reward, prompts, torch.arange(2), *parts, NoiseKey(0, 0), Meter())
    return learn_from(rolled, trainer.sampling, trainer.config.objective, Ranks())[0]


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


@pytest.mark.parametrize("moved", [0.0, 0.1], ids=["fresh", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_ratio_is_one_at_every_microbatch_with_and_without_guidance(
    tiny_trainer, tiny_config, tiny_policy, weights, dtype, moved
):
    policy = tiny_policy(weights, dtype, moved)
    for guidance_scale in (1.0, 3.0):
        sampling = SamplingConfig(num_inference_steps=4, guidance_scale=guidance_scale, microbatch=3)
        experience = rolled_out(tiny_trainer(tiny_config(sampling=sampling), policy))
        assert len(experience) == 6 and experience.trajectories.path[0].log_prob_N.dtype == torch.float32
        for microbatch in (1, 3, 64):
            assert deviation(policy, experience, microbatch) <= CLIP_RANGE / 100
            clipped = [loss.sums["clip_fraction"].item() for loss in losses(policy, experience, microbatch)]
            assert sum(clipped) == 0


def test_a_little_change_of_the_weights_is_seen(trainer, move):
    experience = rolled_out(trainer)
    check_ratio(deviation(trainer.policy, experience), CLIP_RANGE)
    move(trainer.policy, 0.02)
    with pytest.raises(SelfCheckError, match=r"the first update is off-policy: a ratio deviates by \d.* from 1"):
        check_ratio(deviation(trainer.policy, experience), CLIP_RANGE)


@pytest.mark.parametrize("field", ["x_NCHW", "x_next_NCHW", "log_prob_N"])
def test_a_little_change_of_what_was_stored_is_seen(trainer, field):
    experience = rolled_out(trainer)
    first, *rest = experience.trajectories.path
    changed = replace(first, **{field: getattr(first, field) + 1e-3})
    path = replace(experience.trajectories, path=(changed, *rest))
    assert deviation(trainer.policy, replace(experience, trajectories=path)) > CLIP_RANGE / 100


def test_a_deviation_that_is_no_number_is_refused():
    with pytest.raises(SelfCheckError, match="off-policy"):
        check_ratio(float("nan"), CLIP_RANGE)


def test_a_run_that_trains_another_policy_than_it_sampled_from_stops(tiny_trainer, tiny_config, tiny_policy, move, redness):
    policy = tiny_policy()

    def tampering(images, prompts):
        move(policy, 0.02)
        return redness(images, prompts)

    with pytest.raises(SelfCheckError, match="sampling and training compute different velocities"):
        tiny_trainer(tiny_config(), policy, tampering).step()
