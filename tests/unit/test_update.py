"""From rewards to advantages and from advantages to a step, by hand on a policy of two weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from progrpo.config import ObjectiveSettings, OptimSettings
from progrpo.diffusion.levels import flow_levels
from progrpo.diffusion.process import Process
from progrpo.objectives.grpo import GRPO
from progrpo.objectives.settings import GRPOSettings
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.sampling import Sampling
from progrpo.training.distributed import Ranks
from progrpo.training.experience import AdvantageEstimator
from progrpo.training.update import Updater, update_of_each
from progrpo.types import Condition, GroupScores, Pictures, Preview, Prompt, Rollout, Trajectories
from tests.support.grids import SAMPLERS

NAN = float("nan")
EPS = 1e-4
SAMPLING = Sampling(
    Process("flow", SAMPLERS["flow_grpo"], flow_levels(torch.tensor([1.0, 0.8, 0.5, 0.0])), (0.7, 0.7, 0.7))
)


def scored(rewards, groups, passed=None, parts=None):
    reward = torch.tensor(rewards, dtype=torch.float64)
    return GroupScores(
        value_N=reward,
        ranking_N=reward,
        passed_N=torch.tensor(passed or [NAN] * len(reward), dtype=torch.float64),
        rewards_NR=reward[:, None] if parts is None else torch.tensor(parts, dtype=torch.float64),
        group_N=torch.tensor(groups),
    )


def rolled(rewards, groups, finalists=None, finalist_groups=None, previews=(), passed=None, parts=None):
    """A rollout of these rewards; the finalists are the survivors if not said otherwise."""
    group = torch.tensor(groups)
    rows = torch.arange(len(group))
    survivors = scored(rewards, groups, passed, parts)
    return Rollout(
        prompts=tuple(Prompt(str(g)) for g in range(max(groups) + 1)),
        condition=Condition({}),
        trajectories=Trajectories(group, group, rows, rows.float().reshape(-1, 1, 1, 1)),
        pictures=Pictures(
            torch.zeros(len(group), 2, 2, 3, dtype=torch.uint8), torch.ones(len(group), dtype=torch.bool)
        ),
        survivors=survivors,
        finalists=survivors if finalists is None else scored(finalists, finalist_groups),
        previews=previews,
    )


def learnt(rollout, adv_clip_max=5.0, weights=None, quorum=0.0, **objective):
    settings, weights = ObjectiveSettings(adv_eps=EPS, **objective), weights or {"reward": 1.0}
    estimator = AdvantageEstimator(settings, adv_clip_max, weights, Ranks(), quorum)
    experience, tally = estimator.experience(rollout, SAMPLING, NoiseKey(0, 0))
    return experience, tally.over(Ranks())


# --- advantages -------------------------------------------------------------------------------------------------------


def test_advantages_are_of_the_group():
    experience, seen = learnt(rolled([1.0, 3.0, 10.0, 10.5], [0, 0, 1, 1]))
    expected = [-1 / (1 + EPS), 1 / (1 + EPS), -0.25 / (0.25 + EPS), 0.25 / (0.25 + EPS)]
    np.testing.assert_allclose(experience.advantages_N, expected, rtol=1e-6)
    assert seen["reward/mean"] == 6.125 and seen["reward/std"] == (1 + 0.25) / 2
    assert seen["reward/missing"] == seen["advantage/zero_variance_groups"] == 0
    assert "reward/strict" not in seen  # a mean of nothing


def test_a_missing_reward_leaves_and_the_rest_is_its_group():
    experience, seen = learnt(rolled([1.0, NAN, 3.0, 7.0, NAN], [0, 0, 0, 1, 1], passed=[1, NAN, 0, 1, NAN]))
    assert experience.trajectories.member_N.tolist() == [0, 2, 3]
    np.testing.assert_allclose(experience.advantages_N, [-1 / (1 + EPS), 1 / (1 + EPS), 0], rtol=1e-6)
    assert seen["reward/missing"] == 2 and seen["reward/strict"] == pytest.approx(2 / 3)
    assert seen["advantage/zero_variance_groups"] == 1  # one reward has no variance


def test_groups_without_variance_are_counted_and_stay():
    experience, seen = learnt(rolled([2.0, 2.0, 1.0, 3.0], [0, 0, 1, 1]))
    assert seen["advantage/zero_variance_groups"] == 1 and len(experience) == 4
    assert experience.advantages_N[:2].tolist() == [0, 0]


def test_the_std_can_be_the_batchs():
    rewards = [1.0, 3.0, 10.0, 10.5]
    experience, _ = learnt(rolled(rewards, [0, 0, 1, 1]), advantage="batch")
    std = np.std(rewards)
    np.testing.assert_allclose(experience.advantages_N, np.array([-1, 1, -0.25, 0.25]) / (std + EPS), rtol=1e-6)


def test_the_baseline_can_be_the_full_group_under_a_final_selection():
    finalists = [0.0, 4.0, 1.0, 3.0]
    rollout = rolled([0.0, 4.0], [0, 0], finalists, [0] * 4)
    own, seen = learnt(rollout)
    full, _ = learnt(rollout, baseline="group")
    np.testing.assert_allclose(own.advantages_N, np.array([-2, 2]) / (2 + EPS), rtol=1e-6)
    np.testing.assert_allclose(full.advantages_N, np.array([-2, 2]) / (np.std(finalists) + EPS), rtol=1e-6)
    assert seen["reward/std"] == 2 and seen["reward/group_std_full"] == pytest.approx(np.std(finalists))


def test_the_batchs_std_is_over_the_members_of_the_baseline_in_groups_that_teach():
    finalists, groups = [0.0, 4.0, 1.0, 3.0, 5.0, 9.0, 8.0, NAN, 70.0], [0] * 4 + [1] * 3 + [2] * 2
    rollout = rolled([0.0, 4.0, 5.0, 9.0, NAN], [0, 0, 1, 1, 2], finalists, groups)
    for baseline, members in (("survivors", [[0.0, 4.0], [5.0, 9.0]]), ("group", [finalists[:4], finalists[4:7]])):
        experience, _ = learnt(rollout, advantage="batch", baseline=baseline, quorum=0.5)
        means, std = np.repeat([np.mean(own) for own in members], 2), np.std(np.concatenate(members))
        expected = (np.array([0.0, 4.0, 5.0, 9.0]) - means) / (std + EPS)
        np.testing.assert_allclose(experience.advantages_N, expected, rtol=1e-6)


def test_a_group_differs_where_the_members_of_its_baseline_do():
    """Ten of 24 pass, and the six that are kept pass all: against the full group they teach."""
    finalists, groups = [1.0] * 10 + [0.0] * 14, [0] * 24
    rollout = rolled([1.0] * 6, [0] * 6, finalists, groups)
    assert learnt(rollout)[1]["advantage/zero_variance_groups"] == 1
    experience, seen = learnt(rollout, baseline="group")
    expected = (1 - np.mean(finalists)) / (np.std(finalists) + EPS)
    np.testing.assert_allclose(experience.advantages_N, [expected] * 6, rtol=1e-6)
    assert seen["advantage/zero_variance_groups"] == 0


@pytest.mark.parametrize("baseline", ["survivors", "group"])
def test_a_group_that_misses_the_quorum_teaches_nothing_by_any_baseline(baseline):
    rollout = rolled([1.0, NAN, 2.0, 3.0], [0, 0, 1, 1], [1.0, NAN, 0.0, 2.0, 3.0], [0, 0, 0, 1, 1])
    experience, seen = learnt(rollout, baseline=baseline, quorum=0.8)
    assert experience.trajectories.group_N.tolist() == [1, 1]
    assert seen["advantage/zero_variance_groups"] == seen["reward/skipped_groups"] == 1


def test_the_full_groups_std_is_not_known_after_pruning_in_flight():
    pruned = Preview(1, torch.tensor([0]), torch.tensor([0]), torch.tensor([0.5]))
    assert "reward/group_std_full" not in learnt(rolled([1.0, 3.0], [0, 0], previews=(pruned,)))[1]


def test_advantages_are_clipped():
    rewards = [0.0] * 99 + [1.0]
    experience, _ = learnt(rolled(rewards, [0] * 100), adv_clip_max=5.0)
    assert experience.advantages_N.max() == 5.0


@pytest.mark.parametrize("shift", [1e8, -1e9])
@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"advantage": "batch"},
        {"advantage": "gdpo"},
        {"baseline": "group"},
        {"advantage": "batch", "baseline": "group"},
    ],
)
def test_a_number_added_to_all_rewards_changes_no_advantage_of_any_kind(objective, shift):
    """Rewards are in eighths, which the shift leaves exact."""
    finalists = np.random.default_rng(0).integers(-16, 17, 24) / 8
    groups, chosen = [0] * 12 + [1] * 12, [*range(6), *range(12, 20)]
    parts = np.stack([finalists[chosen], np.linspace(0, 1, 14)], axis=1)
    weights = {"one": 1.0, "other": 0.0}

    def advantages(added):
        survivors, group = (finalists + added)[chosen].tolist(), [groups[i] for i in chosen]
        rollout = rolled(
            survivors, group, (finalists + added).tolist(), groups, parts=np.add(parts, [added, 0.0]).tolist()
        )
        experience, seen = learnt(rollout, weights=weights, **objective)
        return experience.advantages_N, seen["reward/std"]

    (shifted, shifted_std), (plain, std) = advantages(shift), advantages(0.0)
    torch.testing.assert_close(shifted, plain, rtol=1e-6, atol=1e-6)
    assert plain.abs().max() > 0.5 and shifted_std == pytest.approx(std, rel=1e-12)


def test_the_grid_goes_along():
    experience, _ = learnt(rolled([1.0, 3.0], [0, 0]))
    assert experience.process is SAMPLING.process


# --- update -----------------------------------------------------------------------------------------------------------


def gradient_of(policy, experience, items):
    loss = GRPO(GRPOSettings(clip_range=0.1)).loss(policy, experience, items).total
    return torch.stack(torch.autograd.grad(loss, [policy.a, policy.b]))


def stepped(policy, experience, **optim):
    """Move by plain gradient descent at rate 1; the way taken, what was seen, and items trained."""
    start = torch.stack([policy.a.detach().clone(), policy.b.detach().clone()])
    descent = torch.optim.SGD(policy.trainable.values(), lr=1.0)
    config = OptimSettings(max_grad_norm=1e9, **optim) if "max_grad_norm" not in optim else OptimSettings(**optim)
    updated = Updater(policy, GRPO(GRPOSettings(clip_range=0.1)), descent, config, Ranks()).update(experience)
    return torch.stack([policy.a.detach(), policy.b.detach()]) - start, updated.tally.over(Ranks()), updated.items


@pytest.mark.parametrize("microbatch", [1, 3, 64])
def test_a_step_follows_the_mean_over_items(linear_policy, linear_experience, microbatch):
    experience = linear_experience(linear_policy, [1.5, -0.5, -1.0, 2.0, -2.0])
    expected = gradient_of(linear_policy, experience, torch.arange(10)) / 10
    moved, seen, items = stepped(linear_policy, experience, microbatch=microbatch)
    torch.testing.assert_close(moved, -expected)
    assert items == 10 and seen["update/clip_fraction"] == 0
    assert seen["update/grad_norm"] == pytest.approx(expected.norm().item())
    assert seen["update/loss"] == pytest.approx(0, abs=1e-9) and seen["update/ratio_max_deviation"] < 1e-9
    assert linear_policy.a.grad is None


def test_groups_that_teach_nothing_are_not_computed_but_count_in_the_mean(linear_policy, linear_experience):
    experience = linear_experience(linear_policy, [0.0, 0.0, 0.0, 2.0, -2.0])
    expected = gradient_of(linear_policy, experience, torch.arange(10)) / 10
    moved, _, items = stepped(linear_policy, experience)
    torch.testing.assert_close(moved, -expected)
    assert items == 4


def test_if_nobody_teaches_nothing_moves_not_even_by_momentum(linear_policy, linear_experience):
    taught, nothing = (linear_experience(linear_policy, a) for a in ([1.5, -0.5, -1.0, 2.0, -2.0], [0.0] * 5))
    adam = torch.optim.AdamW(linear_policy.trainable.values(), lr=0.1)
    updater = Updater(linear_policy, GRPO(GRPOSettings(clip_range=0.1)), adam, OptimSettings(), Ranks())
    updater.update(taught)
    before = linear_policy.a.item()
    updated = updater.update(nothing)
    assert (
        linear_policy.a.item() == before
        and updated.items == 0
        and updated.tally.over(Ranks()) == {"update/grad_norm": 0.0, "update/skipped": 0.0}
    )


def test_the_gradient_is_clipped_and_its_norm_before_is_reported(linear_policy, linear_experience):
    experience = linear_experience(linear_policy, [1.5, -0.5, -1.0, 2.0, -2.0])
    norm = (gradient_of(linear_policy, experience, torch.arange(10)) / 10).norm().item()
    moved, seen, _ = stepped(linear_policy, experience, max_grad_norm=norm / 4)
    assert moved.norm().item() == pytest.approx(norm / 4, rel=1e-4)
    assert seen["update/grad_norm"] == pytest.approx(norm)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_deal_every_group_evenly(parts):
    sizes = [7, 4, 1, 6]
    slot = torch.tensor([0, 3, 4, 9]).repeat_interleave(torch.tensor(sizes))
    dealt = update_of_each(slot, torch.arange(len(slot)), parts)
    for own, size in zip(slot.unique(), sizes, strict=True):
        counts = torch.bincount(dealt[slot == own], minlength=parts)
        assert counts.sum() == size and counts.max() - counts.min() <= 1


def test_what_is_left_over_of_groups_falls_to_every_update_in_turn():
    slot = torch.arange(6).repeat_interleave(3)
    assert torch.bincount(update_of_each(slot, torch.arange(18), 2)).tolist() == [9, 9]


def test_parts_belong_to_the_slot_and_not_to_the_company():
    slot, member = torch.tensor([2, 2, 2, 5, 5]), torch.tensor([0, 3, 4, 1, 2])
    together = update_of_each(slot, member, 2)
    assert torch.equal(together[3:], update_of_each(slot[3:], member[3:], 2))


def test_parts_are_alike_however_processes_share_a_group():
    slot, member = torch.tensor([1, 1, 1, 1, 2, 2]), torch.tensor([0, 2, 5, 7, 3, 4])
    whole = update_of_each(slot, member, 2)
    assert whole.tolist() == [1, 0, 1, 0, 0, 1]
    shares = torch.tensor([0, 2, 4, 1, 3, 5])  # every other member, as two processes have them
    assert torch.equal(update_of_each(slot[shares], member[shares], 2), whole[shares])


def test_every_trajectory_serves_one_of_several_updates(linear_policy, linear_experience):
    experience = linear_experience(linear_policy, [1.5, -0.5, -1.0, 2.0, -2.0])
    living = experience.trajectories
    parts = update_of_each(living.slot_N, living.member_N, 2)
    first = (parts == 0).nonzero().flatten()
    size = 2 * len(first)
    once = gradient_of(linear_policy, experience.take(first), torch.arange(size)) / size
    with torch.no_grad():
        linear_policy.a -= once[0]
        linear_policy.b -= once[1]
    rest = (
        GRPO(GRPOSettings(clip_range=0.1))
        .prepare(linear_policy, experience, 64, 2)
        .take((parts == 1).nonzero().flatten())
    )
    twice = gradient_of(linear_policy, rest, torch.arange(10 - size)) / (10 - size)
    with torch.no_grad():
        linear_policy.a += once[0]
        linear_policy.b += once[1]
    moved, seen, items = stepped(linear_policy, experience, updates_per_rollout=2)
    torch.testing.assert_close(moved, -(once + twice))
    assert items == 10
    assert seen["update/grad_norm"] == pytest.approx((once.norm() + twice.norm()).item() / 2)
    assert seen["update/ratio_max_deviation"] > 0  # the second update is off-policy
