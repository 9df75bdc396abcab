import math

import numpy as np
import pytest
import torch

from progrpo.objectives.advantage import (
    GroupStatistics,
    advantages,
    batch_std_from_moments,
    group_statistics,
    moments,
    normalised_sum,
    with_quorum,
)

NAN = math.nan


def ragged(seed=0):
    """Rewards of five groups of unequal size whose members are mixed up, some missing."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.tensor([0] * 7 + [1] * 2 + [2] * 5 + [3] * 12 + [4] * 3)[torch.randperm(29, generator=generator)]
    rewards = torch.randn(29, generator=generator, dtype=torch.float64) * 0.3 + 5 * group
    rewards[torch.randperm(29, generator=generator)[:3]] = NAN
    return rewards, group


def both(rewards, group, num_groups=5, **options):
    return advantages(rewards, group, group_statistics(rewards, group, num_groups), **options)


def test_statistics_against_numpy():
    rewards, group = ragged()
    statistics = group_statistics(rewards, group, 5)
    for p in range(5):
        members = rewards[group == p].numpy()
        assert statistics.mean_P[p].item() == pytest.approx(np.nanmean(members), rel=1e-14)
        assert statistics.std_P[p].item() == pytest.approx(np.nanstd(members), rel=1e-12)
        assert statistics.count_P[p].item() == np.count_nonzero(~np.isnan(members))


def test_statistics_of_float32_rewards_are_float64():
    rewards = torch.tensor([26.0, 26.01, 25.99], dtype=torch.float32)
    statistics = group_statistics(rewards, torch.zeros(3, dtype=torch.long), 1)
    assert statistics.std_P.dtype == torch.float64
    assert statistics.std_P.item() == pytest.approx(np.std(rewards.double().numpy()), rel=1e-12)


def test_a_group_without_rewards_has_no_statistics():
    statistics = group_statistics(torch.tensor([1.0, 2.0, NAN]), torch.tensor([0, 0, 2]), 3)
    assert statistics.count_P.tolist() == [2, 0, 0]
    assert statistics.mean_P.isnan().tolist() == [False, True, True]
    assert statistics.informative_P.tolist() == [True, False, False]


def test_advantages_against_numpy():
    rewards, group = ragged()
    ours, trained = both(rewards, group)
    for i, reward in enumerate(rewards.tolist()):
        members = rewards[group == group[i]].numpy()
        expected = 0.0 if math.isnan(reward) else (reward - np.nanmean(members)) / (np.nanstd(members) + 1e-4)
        assert ours[i].item() == pytest.approx(np.clip(expected, -5, 5), rel=1e-6, abs=1e-6)
    assert ours.dtype == torch.float32
    assert torch.equal(trained, ~rewards.isnan())


def test_shift_changes_nothing():
    rewards, group = ragged()
    torch.testing.assert_close(both(rewards + 100, group)[0], both(rewards, group)[0])


def test_scale_changes_nothing_without_eps():
    rewards, group = ragged()
    torch.testing.assert_close(both(rewards * 1e3, group, eps=0.0)[0], both(rewards, group, eps=0.0)[0])
    torch.testing.assert_close(both(rewards * -2, group, eps=0.0)[0], -both(rewards, group, eps=0.0)[0])


def test_order_and_the_other_groups_change_nothing():
    rewards, group = ragged()
    ours, _ = both(rewards, group)
    order = torch.randperm(29, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(both(rewards[order], group[order])[0], ours[order])
    alone = group == 3
    torch.testing.assert_close(both(rewards[alone], group[alone])[0], ours[alone])


def test_clip():
    rewards = torch.tensor([0.0] * 99 + [1.0], dtype=torch.float64)
    group = torch.zeros(100, dtype=torch.long)
    assert both(rewards, group, 1)[0].max() == 5
    assert both(rewards, group, 1, clip_max=2.0)[0].max() == 2
    assert both(-rewards, group, 1, clip_max=2.0)[0].min() == -2


@pytest.mark.parametrize("value", [0.0, 0.1, 26.1, 1e6 / 3, -1e-3])
def test_a_group_without_variance_gives_exactly_zero(value):
    rewards = torch.tensor([value] * 11 + [1.0, 2.0], dtype=torch.float64)
    group = torch.tensor([0] * 11 + [1] * 2)
    ours, trained = both(rewards, group, 2, eps=0.0)
    assert ours[:11].eq(0).all()
    assert ours[11:].tolist() == pytest.approx([-1, 1])
    assert trained.all()
    assert group_statistics(rewards, group, 2).informative_P.tolist() == [False, True]


def test_a_small_true_spread_is_not_rounded_away():
    rewards = torch.tensor([26.0, 26.0 + 1e-5], dtype=torch.float64)
    ours, _ = both(rewards, torch.zeros(2, dtype=torch.long), 1, eps=0.0)
    assert ours.tolist() == pytest.approx([-1, 1])


def test_one_observed_reward_gives_zero():
    ours, trained = both(torch.tensor([3.0, NAN]), torch.tensor([0, 0]), 1)
    assert ours.tolist() == [0, 0]
    assert trained.tolist() == [True, False]


def test_infinite_rewards_are_missing():
    ours, trained = both(torch.tensor([1.0, 2.0, math.inf, -math.inf]), torch.tensor([0, 0, 0, 0]), 1, eps=0.0)
    assert ours.tolist() == pytest.approx([-1, 1, 0, 0])
    assert trained.tolist() == [True, True, False, False]


def test_statistics_of_the_full_group_for_some_of_its_members():
    full = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    group = torch.zeros(5, dtype=torch.long)
    kept = torch.tensor([0, 4])
    ours, _ = advantages(full[kept], group[kept], group_statistics(full, group, 1), eps=0.0)
    expected = (full[kept] - full.mean()) / full.std(correction=0)
    torch.testing.assert_close(ours, expected.float())


def test_std_of_the_batch_over_ranks():
    rewards, group = ragged()
    total = moments(rewards[:11]) + moments(rewards[11:])
    std = batch_std_from_moments(*total)
    assert std.item() == pytest.approx(np.nanstd(rewards.numpy()), rel=1e-12)
    ours, _ = both(rewards, group, std=std)
    statistics = group_statistics(rewards, group, 5)
    expected = ((rewards - statistics.mean_P[group]) / (std + 1e-4)).nan_to_num(0.0)
    torch.testing.assert_close(ours, expected.float())


def test_batch_std_of_close_rewards_and_of_none():
    rewards = 26 + 0.01 * torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert batch_std_from_moments(*moments(rewards)).item() == pytest.approx(np.std(rewards.numpy()), rel=1e-8)
    assert batch_std_from_moments(*moments(torch.tensor([NAN]))) == 0
    assert batch_std_from_moments(*moments(torch.full((7,), 0.1, dtype=torch.float64))).item() < 1e-7


def test_statistics_are_plain_values():
    statistics = GroupStatistics(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([4]))
    ours, _ = advantages(torch.tensor([2.0]), torch.tensor([0]), statistics, eps=0.0)
    assert ours.tolist() == [2.0]


# --- several rewards ----------------------------------------------------------------------------------------------------


def test_the_normalised_sum_is_gdpos_by_hand():
    parts = torch.tensor([[1.0, 100.0], [3.0, 300.0], [5.0, 200.0], [0.5, 7.0], [0.1, 7.0]], dtype=torch.float64)
    group, weights, eps = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2.0, -0.5]), 1e-3
    expected = np.zeros(5)
    for members in ([0, 1, 2], [3, 4]):
        for r, weight in enumerate((2.0, -0.5)):
            values = parts[members, r].numpy()
            if values.std() > 0:  # the second reward does not differ in the second group
                expected[members] += weight * (values - values.mean()) / (values.std() + eps)
    found = normalised_sum(parts, weights, group, 2, eps)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_normalised_sum_does_not_know_scales_and_shifts():
    parts = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    group, weights = torch.arange(12) % 3, torch.tensor([1.0, 0.5, 2.0])
    found = normalised_sum(parts, weights, group, 3, 0.0)
    scaled = normalised_sum(
        parts * torch.tensor([1e-3, 1.0, 1e4]) + torch.tensor([26.0, 0.0, -3.0]), weights, group, 3, 0.0
    )
    torch.testing.assert_close(found, scaled)


def test_who_lacks_one_reward_counts_in_none():
    parts = torch.tensor([[1.0, 1.0], [3.0, 2.0], [100.0, math.nan]], dtype=torch.float64)
    group, weights = torch.zeros(3, dtype=torch.int64), torch.tensor([1.0, 1.0])
    found = normalised_sum(parts, weights, group, 1)
    assert found[2].isnan()
    torch.testing.assert_close(found[:2], normalised_sum(parts[:2], weights, group[:2], 1))


def test_batch_advantages_by_hand():
    values, group = torch.tensor([1.0, -1.0, 0.25, 0.25, math.nan, 9.0]), torch.tensor([0, 0, 1, 1, 0, 2])
    mean, std = torch.tensor(0.5), torch.tensor(2.0)
    around = group_statistics(values, group, 3).around(mean)
    advantages_N, trained_N = advantages(values, group, around, std=std, eps=0.5, clip_max=0.5)
    # the second group does not differ and the third has one member: exactly 0, whatever the batch's mean
    assert advantages_N.tolist() == pytest.approx([0.2, -0.5, 0, 0, 0, 0]) and advantages_N.dtype == torch.float32
    assert trained_N.tolist() == [True, True, True, True, False, True]


@pytest.mark.parametrize(("quorum", "left"), [(0.0, [0, 1, 2]), (0.25, [0, 1]), (0.5, [0]), (0.75, [0]), (0.8, [])])
def test_groups_that_miss_the_quorum_are_left_out_whole(quorum, left):
    rewards = torch.tensor([1.0, 2.0, 3.0, math.nan, 1.0, math.nan, math.nan, math.nan] + [1.0] + [math.inf] * 9)
    group = torch.tensor([0] * 4 + [1] * 4 + [2] * 10)  # 3 of 4, 1 of 4 and 1 of 10 are there
    found = with_quorum(rewards, group, 3, quorum)
    observed = rewards.isfinite()
    assert found.isfinite().tolist() == [bool(o) and g in left for o, g in zip(observed, group.tolist(), strict=True)]
    assert torch.equal(found[found.isfinite()], rewards[found.isfinite()])
