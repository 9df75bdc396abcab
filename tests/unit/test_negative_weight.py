"""The weight of negative advantages changes evenly from the first iteration of a run to its last."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import pytest
import torch

from progrpo.config import (
    AuditSettings,
    Config,
    ModelSettings,
    ObjectiveSettings,
    PlanSettings,
    PromptSettings,
    SamplingSettings,
)
from progrpo.objectives.base import Experience, Noise
from progrpo.objectives.settings import GRPOSettings
from progrpo.prompts.order import make_order
from progrpo.rewards.mixture import Component, RewardMixture
from progrpo.rewards.settings import RewardTerm
from progrpo.rollout.sampling import Sampling
from progrpo.training.distributed import Ranks, Tally
from progrpo.training.experience import AdvantageEstimator
from progrpo.training.trainer import Trainer
from progrpo.types import Rollout
from progrpo.zoo.toy import world
from progrpo.zoo.toy.policy import ToyNetwork, ToyPolicy
from progrpo.zoo.toy.rewards import ToyReward


@dataclass(frozen=True)
class Watched(AdvantageEstimator):
    """The estimator of a run, which notes by how much the advantages on each side of the mean are multiplied."""

    seen: list[tuple[float, float]] = field(default_factory=list)

    def experience(
        self, rollout: Rollout, sampling: Sampling, noise: Noise, negative_weight: float = 1.0
    ) -> tuple[Experience, Tally]:
        experience, tally = super().experience(rollout, sampling, noise, negative_weight)
        whole_N = super().experience(rollout, sampling, noise)[0].advantages_N
        below, above = (
            float(experience.advantages_N[rows_N].sum() / whole_N[rows_N].sum())
            for rows_N in (whole_N < 0, whole_N > 0)
        )
        self.seen.append((below, above))
        return experience, tally


@pytest.mark.parametrize(
    ("first", "last", "iterations", "expected"),
    [
        (1.0, 0.25, 3, [1.0, 0.625, 0.25]),
        (0.5, 1.0, 3, [0.5, 0.75, 1.0]),
        (1.0, 0.25, 1, [1.0]),
        (0.5, None, 2, [0.5] * 2),
    ],
)
def test_the_weight_of_every_iteration_of_a_run(
    first: float, last: float | None, iterations: int, expected: list[float]
) -> None:
    torch.manual_seed(0)
    weights = GRPOSettings(negative_weight=first, final_negative_weight=last)
    config = Config(
        iterations=iterations,
        model=ModelSettings(dtype="float32"),
        prompts=PromptSettings(per_iteration=2),
        sampling=SamplingSettings(num_inference_steps=3),
        plan=PlanSettings(preset="custom", group_size=4),
        objective=replace(ObjectiveSettings(name="grpo"), grpo=weights),
        audit=AuditSettings(every=0),
    )
    reward = RewardMixture([Component(RewardTerm("toy"), ToyReward("smooth"))])
    order = make_order("turn", {"": tuple(world.prompts(8))}, 0)
    trainer = Trainer(config, ToyPolicy(ToyNetwork()), reward, order, Ranks())
    own = trainer.learner.estimator
    watched = Watched(**{each.name: getattr(own, each.name) for each in fields(AdvantageEstimator)})
    trainer.learner.estimator = watched
    for _ in range(iterations):
        trainer.step()
    assert [below for below, _ in watched.seen] == pytest.approx(expected)
    assert [above for _, above in watched.seen] == pytest.approx([1.0] * iterations)
