import math

import pytest
import torch

from progrpo.objectives.surrogate import clipped_surrogate, outside_clip, ratio

OLD = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
RATIOS = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5], dtype=torch.float64)
NEW = OLD + RATIOS.log()
ADVANTAGES = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0], dtype=torch.float64)


def test_ratio_is_the_quotient_of_likelihoods():
    torch.testing.assert_close(ratio(NEW, OLD), RATIOS)
    assert ratio(OLD, OLD).eq(1).all()


def test_loss_by_hand():
    # a gain stops at 1.2 * 2 and a loss of likelihood at 0.8 * 2; moves against the advantage count in full
    expected = torch.tensor([-2.0, -2.4, -1.0, 3.0, 1.6], dtype=torch.float64)
    torch.testing.assert_close(clipped_surrogate(NEW, OLD, ADVANTAGES, 0.2), expected)


def test_outside_clip_counts_both_sides():
    assert outside_clip(NEW, OLD, 0.2).tolist() == [False, True, True, True, True]
    assert not outside_clip(NEW, OLD, 0.6).any()
    assert not outside_clip(OLD, OLD, 1e-5).any()


def test_gradient_is_zero_only_where_clipped_on_the_side_the_advantage_asks_for():
    new = NEW.clone().requires_grad_()
    clipped_surrogate(new, OLD, ADVANTAGES, 0.2).sum().backward()
    expected = torch.tensor([-2.0, 0.0, -1.0, 3.0, 0.0], dtype=torch.float64)  # -A r, or nothing
    torch.testing.assert_close(new.grad, expected)


def test_on_policy_gradient_is_reinforce():
    advantages = torch.tensor([-1.5, 0.0, 2.5], dtype=torch.float64)
    old = torch.tensor([-1.0, 0.3, -2.0], dtype=torch.float64)
    new = old.clone().requires_grad_()
    clipped_surrogate(new, old, advantages, 1e-4).sum().backward()
    torch.testing.assert_close(new.grad, -advantages, rtol=0, atol=0)


@pytest.mark.parametrize("advantage", [-1.3, 0.7])
@pytest.mark.parametrize("shift", [-0.4, -0.05, 0.05, 0.4])
def test_gradient_against_finite_differences(advantage, shift):
    old, a = torch.tensor([0.2], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    new = (old + shift).requires_grad_()
    clipped_surrogate(new, old, a, 0.1).sum().backward()
    step = 1e-6
    with torch.no_grad():
        above, below = (clipped_surrogate(new + sign * step, old, a, 0.1) for sign in (1, -1))
    torch.testing.assert_close(new.grad, (above - below) / (2 * step), rtol=1e-8, atol=1e-8)


def test_loss_is_not_reduced_and_keeps_float64():
    loss = clipped_surrogate(NEW, OLD, ADVANTAGES, 0.2)
    assert loss.shape == (5,)
    assert loss.dtype == torch.float64
    assert math.isclose(loss.mean().item(), -0.16)
