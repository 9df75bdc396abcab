import math

import pytest
import torch

from progrpo.diffusion.gaussian import log_prob
from progrpo.objectives.surrogate import clipped_surrogate, guarded_log_ratio, outside_clip

RATIOS = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5], dtype=torch.float64)
LOG_RATIOS = RATIOS.log()
ADVANTAGES = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0], dtype=torch.float64)


def test_loss_by_hand():
    # a gain stops at 1.2 * 2 and a loss of likelihood at 0.8 * 2; moves against the advantage count in full
    expected = torch.tensor([-2.0, -2.4, -1.0, 3.0, 1.6], dtype=torch.float64)
    torch.testing.assert_close(clipped_surrogate(LOG_RATIOS, ADVANTAGES, 0.2), expected)


def test_outside_clip_counts_both_sides():
    assert outside_clip(LOG_RATIOS, 0.2).tolist() == [False, True, True, True, True]
    assert not outside_clip(LOG_RATIOS, 0.6).any()
    assert not outside_clip(torch.zeros(5), 1e-5).any()


def test_gradient_is_zero_only_where_clipped_on_the_side_the_advantage_asks_for():
    new = LOG_RATIOS.clone().requires_grad_()
    clipped_surrogate(new, ADVANTAGES, 0.2).sum().backward()
    expected = torch.tensor([-2.0, 0.0, -1.0, 3.0, 0.0], dtype=torch.float64)  # -A r, or nothing
    torch.testing.assert_close(new.grad, expected)


def test_on_policy_gradient_is_reinforce():
    advantages = torch.tensor([-1.5, 0.0, 2.5], dtype=torch.float64)
    new = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    clipped_surrogate(new, advantages, 1e-4).sum().backward()
    torch.testing.assert_close(new.grad, -advantages, rtol=0, atol=0)


@pytest.mark.parametrize("advantage", [-1.3, 0.7])
@pytest.mark.parametrize("shift", [-0.4, -0.05, 0.05, 0.4])
def test_gradient_against_finite_differences(advantage, shift):
    a = torch.tensor([advantage], dtype=torch.float64)
    new = torch.tensor([shift], dtype=torch.float64, requires_grad=True)
    clipped_surrogate(new, a, 0.1).sum().backward()
    step = 1e-6
    with torch.no_grad():
        above, below = (clipped_surrogate(new + sign * step, a, 0.1) for sign in (1, -1))
    torch.testing.assert_close(new.grad, (above - below) / (2 * step), rtol=1e-8, atol=1e-8)


def test_loss_is_not_reduced_and_keeps_float64():
    loss = clipped_surrogate(LOG_RATIOS, ADVANTAGES, 0.2)
    assert loss.shape == (5,)
    assert loss.dtype == torch.float64
    assert math.isclose(loss.mean().item(), -0.16)


def test_the_guarded_log_ratio_is_the_noise_times_how_far_the_mean_moved():
    generator = torch.Generator().manual_seed(3)
    old_mean, z, moved = (torch.randn(5, 1, 2, 2, dtype=torch.float64, generator=generator) for _ in range(3))
    for std in (
        torch.tensor(0.3, dtype=torch.float64),
        torch.rand(5, 1, 1, 1, dtype=torch.float64, generator=generator),
    ):
        x_next, mean = old_mean + std * z, old_mean + 0.1 * moved
        log_ratio = log_prob(x_next, mean, std) - log_prob(x_next, old_mean, std)
        expected = (z * (mean - old_mean)).flatten(1).mean(1)
        torch.testing.assert_close(guarded_log_ratio(log_ratio, mean, old_mean, std), expected)
