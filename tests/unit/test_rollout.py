"""Groups in rows and back, survivors of ragged groups, and what a rollout records."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from progrpo.rewards.base import Score
from progrpo.rollout.denoise import Sampling, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import INITIAL, NoiseKey
from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.rollout.prune import SELECTORS
from progrpo.rollout.rollout import rollout, score, survivors, to_groups
from progrpo.types import Prompt, Trajectories

NAN = float("nan")


def living(*groups):
    """Trajectories of these groups, whose latents say which row they are."""
    group = torch.tensor(groups)
    rows = torch.arange(len(group))
    return Trajectories(group, group, rows, rows.float().reshape(-1, 1, 1, 1))


def test_to_groups_of_even_groups():
    row, present = to_groups(torch.tensor([0, 0, 1, 1]), 2)
    assert row.tolist() == [[0, 1], [2, 3]] and present.all()


def test_to_groups_of_ragged_and_absent_groups():
    row, present = to_groups(torch.tensor([0, 0, 0, 2]), 4)
    assert present.tolist() == [[True] * 3, [False] * 3, [True, False, False], [False] * 3]
    assert row[present].tolist() == [0, 1, 2, 3]


def test_survivors_of_even_groups_are_prompt_major_and_ascending():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.4, 0.6, 0.3], dtype=torch.float64)
    rows = survivors(living(0, 0, 0, 1, 1, 1), scores, 2, SELECTORS["ovf"], torch.zeros(2, dtype=torch.int64), 2)
    assert rows.tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("selector", SELECTORS)
def test_survivors_of_ragged_groups_are_never_more_than_there_are(selector):
    batch = living(0, 0, 0, 0, 2, 2, 3)
    scores = torch.tensor([0.1, 0.9, 0.5, 0.4, 0.2, 0.8, 0.7], dtype=torch.float64)
    rows = survivors(batch, scores, 3, SELECTORS[selector], torch.zeros(4, dtype=torch.int64), 4)
    assert torch.bincount(batch.group_N[rows], minlength=4).tolist() == [3, 0, 2, 1]
    assert rows.tolist() == sorted(set(rows.tolist()))


@pytest.mark.parametrize("selector", SELECTORS)
def test_survivors_have_scores_where_enough_have(selector):
    batch = living(0, 0, 0, 0, 1, 1, 1)
    scores = torch.tensor([NAN, 0.9, NAN, 0.4, NAN, NAN, 0.7], dtype=torch.float64)
    rows = survivors(batch, scores, 2, SELECTORS[selector], torch.zeros(2, dtype=torch.int64), 2)
    assert rows.tolist() == [1, 3, 4, 6]


def test_expanding_gives_every_member_noise_of_its_own(tiny_policy):
    policy, key = tiny_policy(), NoiseKey(seed=5, iteration=2)
    batch = expand(policy, torch.tensor([4, 9]), 3, key)
    assert batch.group_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.slot_N.tolist() == [4, 4, 4, 9, 9, 9] and batch.member_N.tolist() == [0, 1, 2] * 2
    assert batch.x_NCHW.shape == (6, *policy.latent_shape) and batch.x_NCHW.dtype == torch.float32
    assert torch.equal(batch.x_NCHW[4], key.draw(torch.tensor([9]), torch.tensor([1]), INITIAL, policy.latent_shape)[0])
    assert len(batch.x_NCHW.flatten(1).unique(dim=0)) == 6


@dataclass
class Verdicts:
    """Scores, in order: a reward with strict verdicts and gaps."""

    scores: list[Score]

    def score(self, pictures_NHWC, prompts):
        assert pictures_NHWC.dtype == np.uint8 and len(pictures_NHWC) == len(prompts)
        return self.scores


def test_scores_are_numbers_verdicts_and_gaps(tiny_policy):
    policy, meter = tiny_policy(), Meter()
    batch = living(0, 0, 1)
    found = [Score(0.5, True), Score(None), Score(float("inf"), False)]
    x0 = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    images, values, passed = score(policy, Verdicts(found), [Prompt("a"), Prompt("b")], batch, x0, 2, meter)
    assert images.shape == (3, 16, 16, 3) and images.dtype == torch.uint8
    np.testing.assert_array_equal(values, [0.5, NAN, NAN])
    np.testing.assert_array_equal(passed, [1.0, NAN, 0.0])
    assert values.dtype == torch.float64
    assert (meter.cost.decodes, meter.cost.reward_calls, meter.cost.nfe) == (3, 3, 0)


def test_a_reward_of_another_length_is_refused(tiny_policy):
    policy = tiny_policy()
    with pytest.raises(AssertionError, match="returned 1 scores for 2 pictures"):
        score(
            policy,
            Verdicts([Score(1.0)]),
            [Prompt("a")],
            living(0, 0),
            torch.zeros(2, *policy.latent_shape),
            2,
            Meter(),
        )


def test_a_rollout_records_what_it_did(tiny_trainer, tiny_config, prompts):
    trainer, meter = tiny_trainer(tiny_config()), Meter()
    sampling = trainer.sampling
    plan, asked = Plan(4, (PrunePoint(0, 4), PrunePoint(1, 3)), final_keep=2), [Prompt(p) for p in prompts[:2]]
    parts = plan, sampling, SELECTORS["ovf"], NoiseKey(0, 0), meter
    rolled = rollout(trainer.policy, trainer.reward, asked, torch.tensor([0, 1]), *parts)
    assert rolled.prompts == tuple(asked) and rolled.group_N.tolist() == [0, 0, 1, 1]
    assert len(rolled.images_NHWC) == len(rolled.rewards_N) == 4
    assert rolled.finalist_group_F.tolist() == [0] * 3 + [1] * 3 and rolled.passed_N.isnan().all()
    assert set(rolled.rewards_N.tolist()) <= set(rolled.finalist_rewards_F.tolist())
    (only,) = rolled.previews  # the point that keeps everyone previews nothing
    assert only.step == 1 and only.scores_N.shape == (8,)
    assert [t.step for t in rolled.trajectories.path] == [0, 1, 2]
    assert rolled.trajectories.v_NCHW is None
    one = plan.predict(4, 0, guidance=False)
    assert meter.cost == one + one
    assert set(meter.seconds) == {"sample", "preview", "reward"}


def test_a_step_without_noise_cannot_be_stored():
    with pytest.raises(AssertionError, match="an ODE step has no log-prob"):
        Sampling(torch.tensor([1.0, 0.5, 0.0]), (0.7, 0.0), frozenset({1}))
