"""The probe against a ridge regression that is written out, and when it is believed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from progrpo.rollout.probe import Probe
from progrpo.storage import load_state, save_state
from progrpo.tracking.statistics import spearman

STEPS, WIDTH, GROUP = 2, 5, 6
NAN = float("nan")


def drawn(groups: int, width: int = WIDTH, seed: int = 0):
    """Features of each step, rewards that they tell something of, and groups; each group has a level of its own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    group = torch.arange(groups).repeat_interleave(GROUP)
    spread = torch.linspace(0.1, 30, width, dtype=torch.float64)  # layers differ in size by orders
    level = 5 * draw(groups, width)[group]
    features = [spread * (draw(len(group), width) + level) for _ in range(STEPS)]
    truth = draw(width) / spread
    rewards = features[0] @ truth + 3 * draw(groups)[group] + 0.5 * draw(len(group))
    return features, rewards, group


def by_hand(features, rewards, group) -> np.ndarray:
    """Weights by numpy: each group less its mean, features in units of their spread, a ridge of their squares."""
    x, y = features.double().numpy().copy(), rewards.double().numpy().copy()
    there = np.isfinite(y)
    x, y, g = x[there], y[there], group.numpy()[there]
    for one in np.unique(g):
        x[g == one] -= x[g == one].mean(0)
        y[g == one] -= y[g == one].mean()
    size = np.sqrt((x**2).sum(0))
    scaled = x / size
    # (X'X + I) w = X'y as the least squares of rows below one another, so that no normal equations are solved twice
    stacked = np.concatenate([scaled, np.eye(len(size))])
    wanted = np.concatenate([y, np.zeros(len(size))])
    return np.linalg.lstsq(stacked, wanted, rcond=None)[0] / size


def learnt(*parts) -> Probe:
    probe = Probe(STEPS)
    for features, rewards, group in parts:
        probe.learn(features, rewards, group)
    return probe


def test_scores_are_those_of_a_ridge_regression_at_every_step():
    features, rewards, group = drawn(8)
    probe, fresh = learnt((features, rewards, group)), drawn(2, seed=1)[0]
    for step in range(STEPS):
        expected = fresh[step].numpy() @ by_hand(features[step], rewards, group)
        np.testing.assert_allclose(probe.score(step, fresh[step]), expected, rtol=1e-9)
    assert not torch.allclose(probe.score(0, fresh[0]), probe.score(1, fresh[0]))


def test_learning_in_two_goes_is_learning_in_one():
    features, rewards, group = drawn(8)
    cut = 3 * GROUP
    first = [f[:cut] for f in features], rewards[:cut], group[:cut]
    second = [f[cut:] for f in features], rewards[cut:], group[cut:] - 3  # each iteration numbers its own groups
    fresh = drawn(2, seed=1)[0][0]
    once = learnt((features, rewards, group)).score(0, fresh)
    torch.testing.assert_close(learnt(first, second).score(0, fresh), once, rtol=1e-9, atol=0)
    torch.testing.assert_close(learnt(second, first).score(0, fresh), once, rtol=1e-9, atol=0)


def test_what_it_has_said_does_not_outlive_what_it_learns():
    probe, fresh = learnt(drawn(4)), drawn(2, seed=1)[0][0]
    before = probe.score(0, fresh)
    more = drawn(4, seed=2)
    probe.learn(*more)
    after = probe.score(0, fresh)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, learnt(drawn(4), more).score(0, fresh))


def test_a_missing_reward_leaves_its_row_out_of_the_groups_mean():
    features, rewards, group = drawn(6)
    there = torch.ones(len(rewards), dtype=torch.bool)
    there[[0, 7, 8, 20]] = False
    there[group == 4] = False  # a group without any
    gone = rewards.where(there, NAN)
    fresh = drawn(2, seed=1)[0][0]
    left = learnt(([f[there] for f in features], rewards[there], group[there]))
    torch.testing.assert_close(learnt((features, gone, group)).score(0, fresh), left.score(0, fresh))
    expected = fresh.numpy() @ by_hand(features[0], gone, group)
    np.testing.assert_allclose(left.score(0, fresh), expected, rtol=1e-9)


def test_rewards_that_are_all_missing_teach_nothing():
    features, rewards, group = drawn(2)
    probe = learnt((features, torch.full_like(rewards, NAN), group))
    assert not probe.knows
    probe.learn(features, rewards, group)
    assert probe.knows
    torch.testing.assert_close(probe.score(0, features[0]), learnt((features, rewards, group)).score(0, features[0]))


def test_a_feature_that_never_differs_is_no_trouble():
    features, rewards, group = drawn(6)
    constant = [torch.cat([f, torch.ones(len(f), 1, dtype=torch.float64)], dim=1) for f in features]
    scores = learnt((constant, rewards, group)).score(0, constant[0])
    torch.testing.assert_close(scores, learnt((features, rewards, group)).score(0, features[0]))


def test_it_ranks_groups_that_it_has_not_seen():
    features, rewards, group = drawn(40)
    held_out = group >= 30
    probe = learnt(([f[~held_out] for f in features], rewards[~held_out], group[~held_out]))
    told, blind = [], []
    for one in range(30, 40):
        rows = group == one
        found = [spearman(probe.score(s, features[s][rows]).numpy(), rewards[rows].numpy()) for s in range(STEPS)]
        told.append(found[0] or 0.0)
        blind.append(found[1] or 0.0)
    assert np.mean(told) > 0.8
    assert abs(np.mean(blind)) < 0.4  # the second step's features know nothing of the reward


@pytest.mark.parametrize("width", [513, 700])
def test_wide_features_are_narrowed_and_still_rank(width):
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(12).repeat_interleave(GROUP)
    features = torch.randn(len(group), width, generator=generator)
    rewards = features[:, :3].sum(1).double()
    probe = learnt(([features] * STEPS, rewards, group))
    scores = probe.score(0, features)
    assert scores.shape == rewards.shape and scores.dtype == torch.float64
    seen = [spearman(scores[group == g].numpy(), rewards[group == g].numpy()) or 0.0 for g in range(12)]
    assert np.mean(seen) > 0.9
    square = probe.state_dict()["square"]
    assert square.shape == (STEPS, 512, 512)  # what is kept grows with the square of the width
    again = learnt(([features] * STEPS, rewards, group))
    assert torch.equal(again.score(0, features), scores)  # mapped by the same matrix in every run


# --- when it is believed ----------------------------------------------------------------------------------------------


def watched(*agreements) -> Probe:
    probe = learnt(drawn(2))
    for agreement in agreements:
        probe.watch(agreement)
    return probe


def test_it_is_trusted_after_three_audits_and_not_before():
    assert not watched().trusted(0, 0.5)
    assert not watched((0.9, 0.9), (0.9, 0.9)).trusted(0, 0.5)
    assert watched((0.9, 0.9), (0.9, 0.9), (0.9, 0.9)).trusted(0, 0.5)


def test_it_is_trusted_at_the_threshold_and_not_below_and_each_step_for_itself():
    probe = watched((0.5, 0.25), (0.25, 0.25), (0.75, 0.25))
    assert probe.agreement(0) == 0.5 and probe.agreement(1) == 0.25
    assert probe.trusted(0, 0.5) and not probe.trusted(0, 0.501)
    assert not probe.trusted(1, 0.5) and probe.trusted(1, 0.25)


def test_audits_without_an_agreement_are_not_counted():
    probe = watched((0.75, None), (None, None), (0.75, 0.75))
    assert probe.agreement(0) is None and not probe.trusted(0, -1)
    probe.watch((0.75, 0.75))
    assert probe.agreement(0) == 0.75 and probe.agreement(1) is None


def test_trust_is_lost_when_the_agreement_falls():
    probe = watched(*[(0.9, 0.9)] * 20)
    assert probe.trusted(0, 0.5)
    falls = 0
    while probe.trusted(0, 0.5):
        probe.watch((0.0, 0.9))
        falls += 1
    assert 1 < falls <= 6  # old audits are forgotten
    assert probe.trusted(1, 0.5)


def test_who_has_learnt_nothing_is_not_trusted():
    probe = Probe(STEPS)
    for _ in range(3):
        probe.watch((1.0, 1.0))
    assert probe.agreement(0) == 1 and not probe.trusted(0, 0.5)
    with pytest.raises(AssertionError, match="learn first"):
        probe.score(0, torch.zeros(1, WIDTH))


# --- resume -----------------------------------------------------------------------------------------------------------


def test_a_probe_comes_back_from_disk_as_it_was(tmp_path):
    probe, fresh = watched((0.1, None), (0.7, 0.3), (0.8, 0.4)), drawn(2, seed=1)[0]
    save_state(tmp_path / "state", probe.state_dict())
    other = learnt(drawn(3, seed=5))
    other.score(0, fresh[0])  # whose weights must not stay
    other.load_state_dict(load_state(tmp_path / "state"))
    for step in range(STEPS):
        assert torch.equal(other.score(step, fresh[step]), probe.score(step, fresh[step]))
        assert other.agreement(step) == probe.agreement(step)
    for one in (probe, other):
        one.learn(*drawn(2, seed=3))
        one.watch((0.9, 0.9))
    assert torch.equal(other.score(0, fresh[0]), probe.score(0, fresh[0]))
    assert other.agreement(1) == probe.agreement(1) is not None


def test_a_probe_that_knows_nothing_comes_back_so(tmp_path):
    save_state(tmp_path / "state", Probe(STEPS).state_dict())
    other = learnt(drawn(2))
    other.load_state_dict(load_state(tmp_path / "state"))
    assert not other.knows and other.agreement(0) is None
    features, rewards, group = drawn(3)
    other.learn(features, rewards, group)
    assert torch.equal(other.score(0, features[0]), learnt((features, rewards, group)).score(0, features[0]))
