"""The Bradley-Terry model: the loss against closed forms, intervals against the literature, calibration by hand."""

import math

import pytest
import torch

from progrpo.preferences.bradley_terry import (
    accuracy,
    bradley_terry_loss,
    calibration,
    clustered_accuracy,
    label_probability,
    loss_slopes,
    pair_losses,
    temperature,
)

MARGINS = torch.tensor([2.0, -1.0, 0.5, 0.0], dtype=torch.float64)
PREFERENCES = torch.tensor([1.0, 1.0, 0.0, 0.5], dtype=torch.float64)
STRENGTHS = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_the_loss_is_the_weighted_cross_entropy(rate):
    total = 0.0
    for margin, preference, strength in zip(*(t.tolist() for t in (MARGINS, PREFERENCES, STRENGTHS)), strict=True):
        p = (1 - rate) * sigmoid(margin) + rate * sigmoid(-margin)
        total -= strength * (preference * math.log(p) + (1 - preference) * math.log(1 - p))
    assert float(bradley_terry_loss(MARGINS, PREFERENCES, STRENGTHS, rate)) == pytest.approx(total / 4.5)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_slopes_are_those_of_autograd(rate):
    margins = MARGINS.clone().requires_grad_()
    pair_losses(margins, PREFERENCES, rate).sum().backward()
    assert margins.grad is not None
    assert torch.allclose(loss_slopes(MARGINS, PREFERENCES, rate), margins.grad)


def test_a_tie_wants_equal_scores_and_great_margins_stay_finite():
    half = torch.tensor([0.5], dtype=torch.float64)
    losses = [float(pair_losses(torch.tensor([m], dtype=torch.float64), half)) for m in (-1.0, 0.0, 1.0)]
    assert losses[1] == pytest.approx(math.log(2))
    assert losses[0] == pytest.approx(losses[2])
    assert losses[0] > losses[1]
    far = torch.tensor([-1000.0], dtype=torch.float64)
    assert float(pair_losses(far, torch.ones(1, dtype=torch.float64))) == pytest.approx(1000.0)
    assert float(pair_losses(far, torch.ones(1, dtype=torch.float64), 0.1)) == pytest.approx(-math.log(0.1))


def test_a_flipped_label_is_never_sure():
    assert label_probability(torch.tensor([-1e3, 0.0, 1e3]), 0.2).tolist() == pytest.approx([0.2, 0.5, 0.8])


def test_accuracy_leaves_ties_out_and_has_wilsons_interval():
    margins = torch.tensor([1.0] * 9 + [-1.0] + [5.0] * 3)
    preferences = torch.tensor([1.0] * 10 + [0.5] * 3)
    share = accuracy(margins, preferences)
    assert (share.count, share.value) == (10, pytest.approx(0.9))
    assert (share.low, share.high) == (pytest.approx(0.5958, abs=1e-4), pytest.approx(0.9821, abs=1e-4))
    assert accuracy(torch.zeros(2), torch.tensor([1.0, 0.0])).value == 0.5
    nothing = accuracy(margins[-3:], preferences[-3:])
    assert nothing.count == 0
    assert math.isnan(nothing.value)


def test_an_interval_by_prompts_is_wider_where_pairs_of_a_prompt_agree():
    prompts = torch.arange(40).repeat_interleave(10)
    right = (torch.arange(40) % 4 > 0).double().repeat_interleave(10)
    margins, preferences = right * 2 - 1, torch.ones(400)
    single, clustered = accuracy(margins, preferences), clustered_accuracy(margins, preferences, prompts)
    assert clustered.value == single.value == 0.75
    assert clustered.high - clustered.low > 2 * (single.high - single.low)
    spread = 1.96 * math.sqrt(0.75 * 0.25 / 40)
    assert clustered.low == pytest.approx(0.75 - spread, abs=0.03)
    one = clustered_accuracy(margins, preferences, torch.zeros(400, dtype=torch.int64))
    assert one.value == 0.75
    assert math.isnan(one.low)


def test_calibration_by_hand():
    probabilities = torch.tensor([0.92, 0.95, 0.08, 0.55])
    preferences = torch.tensor([1.0, 0.0, 0.0, 0.5])
    result = calibration(probabilities, preferences, bins=5)
    assert result.count_B.tolist() == [1, 0, 0, 0, 3]
    assert result.share_B[-1] == pytest.approx(2 / 3)
    assert result.confidence_B[-1] == pytest.approx((0.92 + 0.95 + 0.92) / 3)
    assert result.error == pytest.approx((abs(0.55 - 0.5) + abs(2.79 - 2)) / 4)


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_temperature_finds_the_one_that_labels_were_drawn_with(rate):
    generator = torch.Generator().manual_seed(0)
    margins = 3 * torch.randn(50_000, generator=generator, dtype=torch.float64)
    chances = label_probability(margins / 2.5, rate)
    labels = (torch.rand(50_000, generator=generator, dtype=torch.float64) < chances).double()
    assert temperature(margins, labels, torch.ones_like(labels), rate) == pytest.approx(2.5, rel=0.1)
