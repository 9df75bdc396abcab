import math

import numpy as np
import pytest
import torch

from progrpo.objectives.advantage import (
    GroupStatistics,
    advantages,
    batch_mean_std,
    group_statistics,
    moments,
    normalised_sum,
    posterior_means,
    with_negative_weight,
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


def over_ranks(*shares):
    """Mean and std as each of these ranks has them, which must agree."""

    def on_rank(values):
        seen: list[torch.Tensor] = []

        def add_up(own):
            centre = torch.zeros(()) if not seen else seen[0][1] / seen[0][0].clamp(min=1)
            seen.append(torch.stack([moments(share, centre) for share in shares]).sum(0))
            torch.testing.assert_close(own, moments(values, centre))
            return seen[-1]

        return torch.stack(batch_mean_std(values, add_up))

    first, *rest = (on_rank(share) for share in shares)
    assert all(torch.equal(first, other) for other in rest)
    return first.tolist()


def alone(rewards):
    return [t.item() for t in batch_mean_std(rewards, lambda own: own)]


def test_std_of_the_batch_over_ranks():
    rewards, group = ragged()
    std = alone(rewards)[1]
    assert std == pytest.approx(np.nanstd(rewards.numpy()), rel=1e-12)
    ours, _ = both(rewards, group, std=torch.tensor(std, dtype=torch.float64))
    statistics = group_statistics(rewards, group, 5)
    expected = ((rewards - statistics.mean_P[group]) / (std + 1e-4)).nan_to_num(0.0)
    torch.testing.assert_close(ours, expected.float())


@pytest.mark.parametrize("shift", [0.0, 1e8, -1e12])
@pytest.mark.parametrize("cuts", [(29,), (11, 18), (1, 0, 28), (10, 9, 5, 5)])
def test_mean_and_std_of_the_batch_do_not_know_how_many_ranks_there_are(shift, cuts):
    """Of rewards that every shift leaves exact: numpy's of what is not shifted is the truth."""
    rewards, _ = ragged()
    rewards = (rewards * 64).round() / 64
    mean, std = over_ranks(*(rewards + shift).split(cuts))
    assert std == pytest.approx(np.nanstd(rewards.numpy()), rel=1e-12)
    assert mean == pytest.approx(np.nanmean(rewards.numpy()) + shift, rel=1e-14)


def test_batch_std_of_close_rewards_and_of_none():
    rewards = 26 + 0.01 * torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert alone(rewards)[1] == pytest.approx(np.std(rewards.numpy()), rel=1e-12)
    assert alone(torch.tensor([NAN])) == [0.0, 0.0]
    assert alone(torch.full((7,), 0.1, dtype=torch.float64))[1] < 1e-16


# --- a number that is added to all rewards ----------------------------------------------------------------------------

SHIFTS = [1e3, -1e6, 1e8, 1e9, 1e12]


def exact(rewards):
    """In 64ths, to which every shift can be added without rounding."""
    return (rewards * 64).round() / 64


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_shift_changes_no_advantage(shift):
    rewards, group = ragged()
    rewards = exact(rewards)
    plain, shifted = (group_statistics(r, group, 5) for r in (rewards, rewards + shift))
    torch.testing.assert_close(shifted.std_P, plain.std_P, rtol=1e-14, atol=0)
    torch.testing.assert_close(shifted.mean_P - shift, plain.mean_P, rtol=0, atol=1e-15 * abs(shift) + 1e-14)
    assert shifted.informative_P.tolist() == plain.informative_P.tolist()
    # of a mean near 1e12 the last digit is 1e-4
    torch.testing.assert_close(both(rewards + shift, group)[0], both(rewards, group)[0], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_shift_changes_no_normalised_sum(shift):
    parts = exact(torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    group, weights = torch.arange(12) % 3, torch.tensor([1.0, 0.5])
    shifted = normalised_sum(parts + torch.tensor([shift, 0.0]), weights, group, 3)
    torch.testing.assert_close(shifted, normalised_sum(parts, weights, group, 3), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e9 + 0.1, -1e15 / 3])
def test_equal_rewards_are_flat_at_any_size_and_the_next_number_but_a_few_is_not(value):
    flat = torch.full((24,), value, dtype=torch.float64)
    group = torch.zeros(24, dtype=torch.long)
    assert group_statistics(flat, group, 1).std_P.item() == 0
    apart = flat.clone()
    apart[:12] += 64 * np.spacing(max(abs(value), 1.0))
    assert group_statistics(apart, group, 1).informative_P.all()
    assert both(apart, group, 1, eps=1e-300)[0].abs().tolist() == pytest.approx([1.0] * 24, rel=0.1)


def test_rewards_of_a_thousand_million_and_one_teach():
    ours, _ = both(torch.tensor([1e9 - 1, 1e9 + 1], dtype=torch.float64), torch.zeros(2, dtype=torch.long), 1)
    assert ours.tolist() == pytest.approx([-1, 1], rel=2e-4)


def test_statistics_are_plain_values():
    statistics = GroupStatistics(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([4]))
    ours, _ = advantages(torch.tensor([2.0]), torch.tensor([0]), statistics, eps=0.0)
    assert ours.tolist() == [2.0]


# --- several rewards --------------------------------------------------------------------------------------------------


def test_the_normalised_sum_is_gdpos_by_hand():
    parts = torch.tensor([[1.0, 100.0], [3.0, 300.0], [5.0, 200.0], [0.5, 7.0], [0.1, 7.0]], dtype=torch.float64)
    group, weights, eps = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2.0, -0.5]), 1e-3
    expected = np.zeros(5)
    for members in ([0, 1, 2], [3, 4]):
        for r, weight in enumerate((2.0, -0.5)):
            values = parts[members, r].numpy()
            if values.std() > 0:  # the second reward does not differ in the second group
                expected[members] += weight * (values - values.mean()) / (values.std() + eps)
    actual = normalised_sum(parts, weights, group, 2, eps)
    assert actual.dtype == torch.float64
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_the_normalised_sum_does_not_know_scales_and_shifts():
    parts = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    group, weights = torch.arange(12) % 3, torch.tensor([1.0, 0.5, 2.0])
    actual = normalised_sum(parts, weights, group, 3, 0.0)
    scaled = normalised_sum(
        parts * torch.tensor([1e-3, 1.0, 1e4]) + torch.tensor([26.0, 0.0, -3.0]), weights, group, 3, 0.0
    )
    torch.testing.assert_close(actual, scaled)


def test_who_lacks_one_reward_counts_in_none():
    parts = torch.tensor([[1.0, 1.0], [3.0, 2.0], [100.0, math.nan]], dtype=torch.float64)
    group, weights = torch.zeros(3, dtype=torch.int64), torch.tensor([1.0, 1.0])
    actual = normalised_sum(parts, weights, group, 1)
    assert actual[2].isnan()
    torch.testing.assert_close(actual[:2], normalised_sum(parts[:2], weights, group[:2], 1))


def test_batch_advantages_by_hand():
    values, group = torch.tensor([1.0, -1.0, 0.25, 0.25, math.nan, 9.0]), torch.tensor([0, 0, 1, 1, 0, 2])
    mean, std = torch.tensor(0.5), torch.tensor(2.0)
    around = group_statistics(values, group, 3).with_mean(mean)
    advantages_N, trained_N = advantages(values, group, around, std=std, eps=0.5, clip_max=0.5)
    # the second group does not differ and the third has one member: exactly 0, whatever the batch's mean
    assert advantages_N.tolist() == pytest.approx([0.2, -0.5, 0, 0, 0, 0]) and advantages_N.dtype == torch.float32
    assert trained_N.tolist() == [True, True, True, True, False, True]


@pytest.mark.parametrize(("quorum", "left"), [(0.0, [0, 1, 2]), (0.25, [0, 1]), (0.5, [0]), (0.75, [0]), (0.8, [])])
def test_groups_that_miss_the_quorum_are_left_out_whole(quorum, left):
    rewards = torch.tensor([1.0, 2.0, 3.0, math.nan, 1.0, math.nan, math.nan, math.nan] + [1.0] + [math.inf] * 9)
    group = torch.tensor([0] * 4 + [1] * 4 + [2] * 10)  # 3 of 4, 1 of 4 and 1 of 10 are there
    actual = with_quorum(rewards, group, 3, quorum)
    observed = rewards.isfinite()
    assert actual.isfinite().tolist() == [bool(o) and g in left for o, g in zip(observed, group.tolist(), strict=True)]
    assert torch.equal(actual[actual.isfinite()], rewards[actual.isfinite()])


def test_negative_advantages_have_a_weight_of_their_own():
    weighed = with_negative_weight(torch.tensor([-2.0, 0.0, 3.0]), 0.25)
    assert weighed.tolist() == [-0.5, 0.0, 3.0]
    assert torch.equal(with_negative_weight(weighed, 1.0), weighed)


def test_posterior_means_are_the_normal_rule_by_hand():
    """Ragged groups, mixed up; the variance without noise is that of the moments, whatever the groups' means are."""
    rewards, group = ragged()
    noise = torch.linspace(0.0, 0.1, 29, dtype=torch.float64)
    noise[torch.where(group == 3)[0][0]] = NAN
    there = rewards.isfinite() & noise.isfinite()
    squares, of_noise, freedom = 0.0, 0.0, 0
    for g in range(5):
        own, variance = rewards[there & (group == g)].numpy(), noise[there & (group == g)].numpy()
        squares += ((own - own.mean()) ** 2).sum()
        of_noise += variance.sum() * (1 - 1 / len(own))
        freedom += len(own) - 1
    signal = (squares - of_noise) / freedom
    expected = np.full(29, NAN)
    for i in torch.where(there)[0].tolist():
        mates = (there & (group == group[i])).numpy()
        weights = 1 / (signal + noise.numpy()[mates])
        mean = (weights * rewards.numpy()[mates]).sum() / weights.sum()
        expected[i] = mean + signal / (signal + float(noise[i])) * (float(rewards[i]) - mean)
    assert signal > 0.01
    np.testing.assert_allclose(posterior_means(rewards, noise, group, 5), expected, rtol=1e-9)
    np.testing.assert_allclose(posterior_means(rewards + 1e6, noise, group, 5), expected + 1e6, atol=1e-7)


def test_posterior_means_miss_the_rewards_by_what_they_should():
    """Their squared error is s^2 v / (s^2 + v) for the variances s^2 without noise and v of the noise."""
    generator = torch.Generator().manual_seed(0)
    groups, size, noise = 2000, 24, torch.tensor([0.04, 1.96], dtype=torch.float64)
    group = torch.arange(groups).repeat_interleave(size)
    variance = noise[torch.randint(2, group.shape, generator=generator)]
    exact, error = torch.randn(2, len(group), generator=generator, dtype=torch.float64)
    observed = exact + variance.sqrt() * error
    squares = (posterior_means(observed, variance, group, groups) - exact).square()
    for one in noise:
        best = one / (1 + one)
        # a group's mean is known from two dozen members, not exactly
        assert best * 0.95 < squares[variance == one].mean() < best * 1.1


def test_equal_noise_changes_no_order_and_noise_alone_neither():
    rewards, group = torch.randn(48, dtype=torch.float64), torch.arange(2).repeat_interleave(24)
    for variance in (0.0, 0.5, 100.0):
        means = posterior_means(rewards, torch.full_like(rewards, variance), group, 2)
        for g in range(2):
            assert torch.equal(means[group == g].argsort(), rewards[group == g].argsort())
