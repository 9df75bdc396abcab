"""The toy world: pictures that hold numbers, rewards in closed form, and a model that is trained as any other."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch

from progrpo.config import (
    AuditSettings,
    Config,
    ModelSettings,
    ObjectiveSettings,
    OptimSettings,
    PlanSettings,
    PromptSettings,
    SamplingSettings,
)
from progrpo.prompts.order import make_order
from progrpo.rewards.mixture import Component, RewardMixture
from progrpo.rewards.settings import RewardTerm
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import ode
from progrpo.training.distributed import Ranks
from progrpo.training.evaluate import evaluate
from progrpo.training.trainer import Trainer
from progrpo.zoo.toy import world
from progrpo.zoo.toy.policy import ToyNetwork, ToyPolicy, pretrained
from progrpo.zoo.toy.rewards import SHAPES, ToyReward, nearness


@pytest.fixture(scope="module")
def network() -> ToyNetwork:
    return pretrained(seed=0)


def test_a_picture_holds_its_latent_to_a_millionth() -> None:
    x_ND = 3 * torch.randn(100, world.DIMS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_ND[0, 0], x_ND[0, 1] = -9.0, 9.0  # beyond what a pixel holds
    back = world.from_pictures(world.to_pictures(x_ND).numpy())
    torch.testing.assert_close(back, x_ND.clamp(-8, 8), rtol=0, atol=1e-6)


def test_a_prompt_keeps_its_code_whatever_is_asked_beside_it() -> None:
    assert torch.equal(world.codes([5, 7, 5]), world.codes([5, 7, 5])[[2, 1, 0]])
    assert not torch.equal(world.codes([5]), world.codes([7]))


def test_nearness_falls_with_the_distance_to_the_target() -> None:
    code_PD = world.codes(range(4))
    target = world.targets(code_PD)
    away = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)[:, None] * torch.ones(4, world.DIMS)
    z_N = nearness(target + away, code_PD)
    torch.testing.assert_close(z_N.diff(), torch.tensor([-0.5, -0.5, -1.0], dtype=torch.float64) / 0.14)


@pytest.mark.parametrize("shape", SHAPES)
def test_rewards_rise_with_nearness_and_score_a_picture_alike_every_time(shape: str) -> None:
    z_N = torch.linspace(-4, 4, 50, dtype=torch.float64)
    assert bool((SHAPES[shape](z_N).diff() >= 0).all())
    prompts = world.prompts(8)
    pictures = world.to_pictures(world.targets(world.codes(range(8))) + 0.3).numpy()
    reward = ToyReward(shape)
    assert reward.score(pictures, prompts) == reward.score(pictures[::-1].copy(), prompts[::-1])[::-1]


def test_noise_has_the_variance_of_the_signal_and_is_not_seen_by_the_judge() -> None:
    prompts = world.prompts(500)
    generator = torch.Generator().manual_seed(0)
    pictures = world.to_pictures(world.data(world.codes(range(500)), generator)).numpy()
    seen, smooth, judge = (
        np.array([score.value for score in reward.score(pictures, prompts)])
        for reward in (ToyReward("noisy"), ToyReward("smooth"), ToyReward("noisy", seen=False))
    )
    np.testing.assert_array_equal(judge, smooth)
    assert abs(np.std(seen - smooth) - 1) < 0.1


@pytest.mark.parametrize("objective", ["grpo", "dgpo"])
def test_the_model_learns_from_the_trainer_that_pictures_have(objective: str, network: ToyNetwork) -> None:
    config = Config(
        iterations=30,
        model=ModelSettings(dtype="float32"),
        prompts=PromptSettings(per_iteration=4),
        sampling=SamplingSettings(num_inference_steps=6, microbatch=256),
        plan=PlanSettings(preset="custom", group_size=24, prune=((4, 12),)),
        objective=ObjectiveSettings(name=objective),
        optim=OptimSettings(lr=3e-3, microbatch=512),
        audit=AuditSettings(every=0),
    )
    policy = ToyPolicy(deepcopy(network))
    mixture = RewardMixture([Component(RewardTerm("toy"), ToyReward("smooth"))])
    ranks = Ranks()
    trainer = Trainer(config, policy, mixture, make_order("turn", {"": tuple(world.prompts(64))}, 0), ranks)

    def quality() -> float:
        sampler = Sampler(policy, mixture, ode(policy, 6, 1.0, 256))
        graded = evaluate(sampler, world.prompts(64, first=10_000), 0, ranks).mean("graded")
        assert graded is not None
        return graded

    before = quality()
    for _ in range(30):
        trainer.step()
    assert quality() > before + 0.2  # in stds of the untrained model's own pictures


def test_the_model_is_the_seeds_and_float64_computes_the_same(network: ToyNetwork) -> None:
    again = pretrained(seed=0)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    x = torch.randn(5, *ToyPolicy.latent_shape, generator=torch.Generator().manual_seed(1))
    single, double = ToyPolicy(deepcopy(network)), ToyPolicy(again, torch.float64)
    condition = single.encode(world.prompts(5))
    a = single.predict(x, torch.tensor(300.0), condition)
    b = double.predict(x.double(), torch.tensor(300.0), double.encode(world.prompts(5)))
    assert b.dtype == torch.float64
    torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)
