"""A survivor does not know that others were pruned, nor with whom it was sampled; keeping everyone is plain GRPO."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from progrpo.config import PlanSettings, SamplingSettings
from progrpo.rewards.frames import FrameAverageReward
from progrpo.rewards.function import FunctionReward
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.rollout.rollout import last_scores, rollout
from progrpo.rollout.sampler import Sampler
from progrpo.training.build import sampling_from
from progrpo.types import Rollout
from tests.support.rewards import mixture_of_one

GROUP = 6
FULL = Plan(GROUP)
PRUNED = Plan(GROUP, (PrunePoint(0, 5), PrunePoint(1, 3)))
TOLERANCE = 1e-5  # between microbatches of different sizes: matrix kernels differ by shape


@pytest.fixture(scope="module")
def policy(family_at_length, tiny_policy):
    return tiny_policy(moved=0.1, folder=family_at_length)


@pytest.fixture(scope="module")
def draw(policy, tiny_config, prompts, prompts_of, redness):
    """A rollout of some of the prompts in slots of choice. The same is asked for in many tests, and drawn once."""

    @cache
    def run(
        plan: Plan, slots=(0, 1), microbatch=1, guidance_scale=1.0, reward=redness, which=(0, 1), **more
    ) -> Rollout:
        guided = {"guidance_scale": guidance_scale, "embedded_guidance": policy.embeds_guidance}
        settings = SamplingSettings(num_inference_steps=3, microbatch=microbatch, **guided, **more)
        sampling = sampling_from(tiny_config(sampling=settings), policy, "transitions", 0)
        chosen, slot_P = prompts_of(*(prompts[i] for i in which)), torch.tensor(slots)
        sampler = Sampler(policy, mixture_of_one(FrameAverageReward(FunctionReward(reward), 2)), sampling, plan)
        return rollout(sampler, chosen, slot_P, NoiseKey(3, 1), Meter())

    return run


def rows_of(rolled: Rollout, others: Rollout) -> torch.Tensor:
    """The rows of `others` that hold the members of `rolled`."""
    living = others.trajectories
    place = {who: i for i, who in enumerate(zip(living.slot_N.tolist(), living.member_N.tolist(), strict=True))}
    living = rolled.trajectories
    return torch.tensor([place[who] for who in zip(living.slot_N.tolist(), living.member_N.tolist(), strict=True)])


def seen(rolled: Rollout, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything that a trajectory is, of the rows named."""
    living = rolled.trajectories.take(rows)
    parts = {
        "x": living.x_NCHW,
        "pictures": rolled.pictures.images_NHWC[rows],
        "rewards": rolled.survivors.value_N[rows],
    }
    for t in living.path:
        parts |= {f"x {t.step}": t.x_NCHW, f"x_next {t.step}": t.x_next_NCHW, f"log_prob {t.step}": t.log_prob_N}
    return parts


def pairs(rolled: Rollout, others: Rollout) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    mine = seen(rolled, torch.arange(len(rolled.trajectories)))
    theirs = seen(others, rows_of(rolled, others))
    return {name: (mine[name], theirs[name]) for name in mine}


def assert_bitwise(rolled: Rollout, others: Rollout) -> None:
    for name, (a, b) in pairs(rolled, others).items():
        assert torch.equal(a, b), name


@pytest.mark.parametrize("guided", [{}, {"guidance_scale": 3.0}], ids=["plain", "guided"])
def test_survivors_are_bitwise_what_they_are_without_pruning(draw, guided):
    pruned, full = (draw(plan, **guided) for plan in (PRUNED, FULL))
    assert len(pruned.trajectories) == 6 and len(full.trajectories) == 2 * GROUP
    assert len(pruned.trajectories.path) == 2  # all steps but the last
    assert_bitwise(pruned, full)


@pytest.mark.parametrize("latent_dtype", ["float32", "bfloat16"])
def test_survivors_that_began_as_one_are_bitwise_what_they_are_without_pruning(draw, latent_dtype):
    pruned, full = (draw(plan, same_latent=True, latent_dtype=latent_dtype) for plan in (PRUNED, FULL))
    assert len(pruned.trajectories.path[0].x_NCHW.flatten(1).unique(dim=0)) == 2  # groups
    assert_bitwise(pruned, full)


def test_survivors_of_final_rewards_are_bitwise_what_they_are_without_pruning(draw):
    selected, full = draw(Plan(GROUP, final_keep=3)), draw(FULL)
    assert torch.equal(selected.finalists.value_N, full.survivors.value_N)
    assert_bitwise(selected, full)


@pytest.mark.parametrize("keep", [3, GROUP])
def test_survivors_are_bitwise_what_they_are_where_no_group_is_stopped(draw, keep):
    points = (PrunePoint(0, keep), PrunePoint(1, 2))
    each, some = draw(Plan(GROUP, points)), draw(Plan(GROUP, points, keep_groups=1))
    scores_PG = some.previews[0].scores_N.reshape(2, GROUP)
    widest = int(scores_PG.var(1).argmax())
    assert some.group_N.tolist() == [widest] * 2 and some.previews[1].group_N.tolist() == [widest] * keep
    assert some.trajectories.member_N.tolist() == each.trajectories.member_N[each.group_N == widest].tolist()
    assert_bitwise(some, each)
    scores, groups = last_scores(some)
    own, others = groups == widest, scores_PG[1 - widest]
    assert torch.equal(scores[own], some.finalists.value_N) and torch.equal(scores[~own], others)


@pytest.mark.parametrize("microbatch", [3, 64])
def test_survivors_hardly_depend_on_the_microbatch(draw, microbatch):
    for name, (a, b) in pairs(draw(PRUNED, microbatch=microbatch), draw(FULL)).items():
        grey = name in ("pictures", "rewards")
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=1.0 if grey else TOLERANCE, msg=name)


def test_prompts_can_be_spread_over_calls(draw):
    together = draw(PRUNED)
    alone = [draw(PRUNED, slots=(i,), which=(i,)) for i in (0, 1)]
    for rolled in alone:
        assert_bitwise(rolled, together)
    assert sum(len(rolled.trajectories) for rolled in alone) == len(together.trajectories)


def test_noise_belongs_to_the_slot_and_the_member(draw):
    here, there = draw(FULL, slots=(0,), which=(0,)), draw(FULL, slots=(1,), which=(0,))
    starts = torch.cat([rolled.trajectories.path[0].x_NCHW for rolled in (here, there)])
    assert len(starts.flatten(1).unique(dim=0)) == 2 * GROUP


def test_previews_are_of_those_who_live_at_their_step(draw):
    rolled = draw(PRUNED)
    first, second = rolled.previews
    assert (first.step, len(first.scores_N), len(second.scores_N)) == (0, 12, 10)
    living = [
        set(zip(rows.group_N.tolist(), rows.member_N.tolist(), strict=True))
        for rows in (first, second, rolled.trajectories)
    ]
    assert living[0] > living[1] > living[2]


# --- keep == G --------------------------------------------------------------------------------------------------------


def test_keeping_everyone_is_plain_grpo_bit_for_bit(tiny_trainer, tiny_config):
    keeps_all = PlanSettings("custom", group_size=4, prune=((0, 4), (2, 4)), final_keep=4)
    trainers = [tiny_trainer(tiny_config(plan=plan)) for plan in (PlanSettings("custom", group_size=4), keeps_all)]
    for _ in range(2):
        records = [untimed(trainer.step().record) for trainer in trainers]
        assert records[0] == records[1]
    states = [trainer.state_dict()["policy"]["current"] for trainer in trainers]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "seconds" and not name.startswith("time/")}


# --- missing rewards --------------------------------------------------------------------------------------------------


def failing(redness, call: int, members: set[int], group: int):
    """`redness`, but in its call of that number the members named, of groups of that size, get no score."""
    calls = iter(range(1000))

    def reward(images, prompts):
        scores = redness(images, prompts)
        fails = members if next(calls) == call else set()
        return [None if i % group in fails else score for i, score in enumerate(scores)]

    return reward


def test_a_missing_preview_is_never_preferred(draw, redness):
    plan = Plan(GROUP, (PrunePoint(1, 3),))
    rolled = draw(plan, reward=failing(redness, 0, {1, 2, 5}, GROUP))
    assert rolled.trajectories.member_N.tolist() == [0, 3, 4] * 2
    assert rolled.survivors.value_N.isfinite().all()


def test_members_without_a_preview_fill_up_where_scores_are_too_few(draw, redness):
    plan = Plan(GROUP, (PrunePoint(1, 3),))
    rolled = draw(plan, reward=failing(redness, 0, {0, 1, 2, 5}, GROUP))
    assert rolled.trajectories.member_N.tolist() == [0, 3, 4] * 2


def test_a_missing_final_reward_is_never_preferred(draw, redness):
    rolled = draw(Plan(GROUP, final_keep=4), reward=failing(redness, 0, {0, 4}, GROUP))
    assert rolled.trajectories.member_N.tolist() == [1, 2, 3, 5] * 2


def test_a_group_trains_on_the_members_that_have_a_reward(tiny_trainer, tiny_config, redness):
    config = tiny_config()
    trainer = tiny_trainer(config, reward=failing(redness, 1, {1}, 3))
    record = trainer.step().record
    assert record["reward/missing"] == 2 and np.isfinite(record["reward/mean"])
    assert trainer.totals.counted.trained_steps == 2 * 2 * 3  # prompts, members left of three, steps
    assert not math.isclose(record["update/grad_norm"], 0.0)
