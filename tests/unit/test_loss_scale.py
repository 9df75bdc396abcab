"""Gradients through float16: what they are without a scale, with one, and where one overflows."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from progrpo.config import ModelSettings, ObjectiveSettings, OptimSettings
from progrpo.objectives.grpo import GRPO
from progrpo.objectives.settings import GRPOSettings
from progrpo.training.distributed import Ranks
from progrpo.training.loss_scale import LossScale
from progrpo.training.update import Updater

FEW = 1e-5  # of an advantage: as small a share of the loss as an item has in a batch of a hundred thousand


class Noting(torch.optim.SGD):
    """Plain descent that keeps the gradients of its last step."""

    def step(self, closure=None):
        self.seen = torch.cat([p.grad.flatten().clone() for p in self.param_groups[0]["params"] if p.grad is not None])
        super().step(closure)


@pytest.fixture(scope="module")
def gradient(tiny_policy, tiny_trainer, tiny_sd, tiny_config, first_experience):
    """The gradient of a first update, and what was seen, in a dtype and with a scale."""

    def of(dtype, scale, objective, weights="lora"):
        config = tiny_config(
            model=ModelSettings(dtype=dtype, weights=weights), objective=ObjectiveSettings(name=objective, adv_eps=1e-4)
        )
        policy = tiny_policy(weights, dtype, moved=0.02, folder=tiny_sd)
        trainer = tiny_trainer(config, policy)
        experience = first_experience(trainer)
        experience = replace(experience, advantages_N=experience.advantages_N * FEW)
        noting = Noting(policy.trainable.values(), lr=0.0)
        settings = OptimSettings(max_grad_norm=1e9)
        updated = Updater(policy, trainer.learner.objective, noting, settings, Ranks(), scale).update(experience)
        return noting.seen, updated.tally.over(Ranks())

    return cache(of)  # without a scale it is asked for several times


def off(approximate, true):
    """The share of a vector that is error."""
    return ((approximate - true).norm() / true.norm()).item()


@pytest.mark.parametrize(
    "objective", ["grpo", "dgpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nft", "awm", "elbo"))]
)
def test_a_float16_gradient_is_float32s_but_for_rounding(gradient, objective):
    true, _ = gradient("float32", None, objective)
    scaled, seen = gradient("float16", LossScale(True), objective)
    plain, _ = gradient("float16", None, objective)
    allowed = 64 * torch.finfo(torch.float16).eps
    assert off(scaled, true) < allowed < off(plain, true)
    assert seen["update/loss_scale"] == 2**16 and seen["update/grad_norm"] == pytest.approx(true.norm().item(), rel=0.1)


def test_so_is_that_of_all_weights(gradient):
    true, _ = gradient("float32", None, "grpo", "full")
    scaled, _ = gradient("float16", LossScale(True), "grpo", "full")
    assert off(scaled, true) < 64 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_bit_of_another_dtypes_gradient_changes(gradient, dtype):
    plain, seen = gradient(dtype, None, "grpo")
    off, same = gradient(dtype, LossScale(False), "grpo")
    assert torch.equal(plain, off) and same == seen and "update/loss_scale" not in seen


def test_an_overflow_is_computed_again_at_half_the_scale(gradient):
    scale = LossScale(True)
    scale.value = 2.0**60
    scaled, seen = gradient("float16", scale, "grpo")
    true, _ = gradient("float32", None, "grpo")
    assert off(scaled, true) < 64 * torch.finfo(torch.float16).eps
    assert seen["update/skipped"] == 0 and seen["update/rescaled"] > 0
    assert seen["update/loss_scale"] == scale.value == 2 ** (60 - seen["update/rescaled"])


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gradient_that_is_not_finite_at_any_scale_is_skipped(linear_policy, linear_experience, scaled):
    experience = linear_experience(linear_policy, [1.5, -0.5, -1.0, 2.0, -2.0])
    linear_policy.a.register_hook(lambda gradient: gradient * torch.inf)
    scale, before = LossScale(scaled), linear_policy.a.item()
    descent = torch.optim.SGD(linear_policy.trainable.values(), lr=1.0)
    objective = GRPO(GRPOSettings(clip_range=0.1))
    updater = Updater(linear_policy, objective, descent, OptimSettings(), Ranks(), scale)
    seen = updater.update(experience).tally.over(Ranks())
    assert seen["update/skipped"] == 1 and linear_policy.a.item() == before and scale.value == 1
    assert seen.get("update/rescaled") == (16 if scaled else None)


def test_the_scale_doubles_after_fifty_updates_and_begins_to_count_anew():
    scale = LossScale(True)
    for _ in range(49):
        scale.count()
    taken_up = LossScale(True)
    taken_up.load_state_dict(scale.state_dict())
    assert taken_up.value == 2**16
    for one in (scale, taken_up):
        one.count()
        assert one.value == 2**17
        assert one.lower() and one.value == 2**16
    off = LossScale(False)
    off.load_state_dict(scale.state_dict())
    for _ in range(50):
        off.count()
    assert off.value == 1 and not off.lower() and off.state_dict() == {}
    scale.load_state_dict(off.state_dict())  # as of a run that began before losses were scaled
    assert scale.value == 2**16


def test_a_trainers_scale_is_of_its_dtype_and_in_its_state(tiny_policy, tiny_trainer, tiny_sd, tiny_config):
    def build(dtype):
        policy = tiny_policy(dtype=dtype, folder=tiny_sd)
        return tiny_trainer(tiny_config(model=ModelSettings(dtype=dtype)), policy)

    trainer, taken_up = build("float16"), build("float16")
    trainer.learner.updater.loss_scale.lower()
    state = trainer.state_dict()
    taken_up.load_state_dict(state)
    assert taken_up.learner.updater.loss_scale.state_dict() == {"value": 2.0**15, "clean": 0}
    taken_up.load_state_dict(
        {name: value for name, value in state.items() if name != "loss_scale"}
    )  # an old checkpoint
    assert not build("bfloat16").learner.updater.loss_scale.enabled
