"""The heads of a reward model: the fit against brute force, what is recovered, and what cross-validation chooses."""

from dataclasses import replace

import pytest
import torch

from progrpo.preferences.bradley_terry import accuracy, bradley_terry_loss
from progrpo.preferences.reward_model.backbone import Features
from progrpo.preferences.reward_model.cross_validation import OFF
from progrpo.preferences.reward_model.fitting import FitSettings, fit_ensemble
from progrpo.preferences.reward_model.head import Comparisons, columns, fit_head

TRUTH = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)


def example(pairs, seed=0, flips=0.0, extra=0, prompts=50):
    """Pairs of random features that a linear truth orders, with blocks of 4 and `extra` features."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2 * pairs, 4 + extra, generator=generator, dtype=torch.float64)
    score_N = features[:, :4] @ TRUTH
    first, second = torch.arange(0, 2 * pairs, 2), torch.arange(1, 2 * pairs, 2)
    preference = (score_N[first] > score_N[second]).double()
    flipped = torch.rand(pairs, generator=generator) < flips
    preference = torch.where(flipped, 1 - preference, preference)
    comparisons = Comparisons(first, second, preference, torch.ones_like(preference), torch.arange(pairs) % prompts)
    blocks = (features[:, :4], features[:, 4:]) if extra else (features,)
    return Features(tuple(block.float() for block in blocks)), comparisons, score_N


def test_the_fit_is_the_minimum_that_gradient_descent_finds():
    features, pairs, _ = example(60)
    pairs = replace(pairs, strength_M=torch.linspace(0.5, 2, 60, dtype=torch.float64))
    x_ND = columns(features)
    difference_MD, penalty_D = x_ND[::2] - x_ND[1::2], torch.tensor([0.1, 0.1, 0.0, OFF], dtype=torch.float64)
    w_D = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for _ in range(3000):
        loss = bradley_terry_loss(difference_MD[:, :3] @ w_D[:3], pairs.preference_M, pairs.strength_M)
        (slope_D,) = torch.autograd.grad(loss + 0.05 * w_D[:2].square().sum(), w_D)
        with torch.no_grad():
            w_D -= 0.5 * slope_D
    assert torch.allclose(fit_head(difference_MD, pairs, penalty_D), w_D.detach(), atol=1e-4)


def test_a_linear_truth_is_recovered_and_scores_are_standardised():
    features, pairs, truth_N = example(400)
    ensemble = fit_ensemble(features, pairs, FitSettings()).ensemble
    score_N = ensemble.scores(features).mean(0)
    assert torch.corrcoef(torch.stack([score_N, truth_N]))[0, 1] > 0.99
    assert (float(score_N.mean()), float(score_N.std())) == (pytest.approx(0, abs=1e-9), pytest.approx(1))
    assert ensemble.scores(features).shape == (8, 800)
    assert ensemble.scores(features).var(0).mean() < 0.05


def test_members_differ_more_where_pairs_are_few():
    spread = [
        float(fit.ensemble.scores(features).var(0).mean())
        for features, pairs, _ in (example(40), example(1000))
        for fit in [fit_ensemble(features, pairs, FitSettings(flip_rate=0.0))]
    ]
    assert spread[0] > 2 * spread[1]


def test_a_single_member_is_the_fit_to_all_pairs():
    features, pairs, _ = example(80)
    fit = fit_ensemble(features, pairs, FitSettings(members=1, flip_rate=0.0))
    difference_MD = (columns(features)[::2] - columns(features)[1::2]) / fit.ensemble.std_D
    expected = fit_head(difference_MD, pairs, torch.full((4,), fit.choice.penalty_J[0], dtype=torch.float64))
    assert torch.allclose(fit.ensemble.weight_KD[0], expected, atol=1e-6)


def test_a_block_of_noise_stays_off_and_one_that_tells_is_used():
    features, pairs, _ = example(200, extra=100)
    assert fit_ensemble(features, pairs, FitSettings()).choice.penalty_J[1] == OFF
    swapped = Features(features.blocks[::-1])
    assert fit_ensemble(swapped, pairs, FitSettings()).choice.penalty_J[1] < OFF


def test_the_rate_of_flipped_labels_is_estimated_and_helps():
    features, pairs, _ = example(400, flips=0.2, seed=3)
    plain = fit_ensemble(features, pairs, FitSettings(flip_rate=0.0)).ensemble
    fit = fit_ensemble(features, pairs, FitSettings())
    assert fit.choice.flip_rate in (0.1, 0.2, 0.3)
    test, clean, _ = example(2000, seed=9)
    right = [accuracy(clean.margins(e.scores(test).mean(0)), clean.preference_M).value for e in (plain, fit.ensemble)]
    assert right[1] > right[0] > 0.85


def test_a_constant_feature_and_a_prior():
    features, pairs, truth_N = example(100)
    wide = Features((torch.cat([features.blocks[0][:, :1], torch.full((200, 1), 0.3)], 1),), truth_N.float())
    ensemble = fit_ensemble(wide, pairs, FitSettings(members=2)).ensemble
    assert ensemble.weight_KD.isfinite().all()
    score_N = ensemble.scores(wide).mean(0)
    assert score_N.isfinite().all()
    assert torch.corrcoef(torch.stack([score_N, truth_N]))[0, 1] > 0.95


def test_margins_of_cross_validation_are_honest():
    """Labels of chance: heads fit them, and cross-validation says that they predict nothing."""
    features, pairs, _ = example(100, extra=0)
    noise = (torch.rand(100, generator=torch.Generator().manual_seed(5)) < 0.5).double()
    fit = fit_ensemble(features, replace(pairs, preference_M=noise), FitSettings())
    assert accuracy(fit.margin_M, noise).value < 0.65
    assert fit.ensemble.temperature > 1


def test_few_prompts_are_resampled_by_pairs():
    features, pairs, _ = example(60, prompts=1)
    ensemble = fit_ensemble(features, pairs, FitSettings(members=3)).ensemble
    assert len(ensemble.weight_KD.unique(dim=0)) == 3


def test_only_judged_pairs_choose():
    features, pairs, _ = example(100)
    judged = torch.arange(100) < 40
    fit = fit_ensemble(features, pairs, FitSettings(members=2), judged)
    assert len(fit.margin_M) == len(fit.judged) == 40
