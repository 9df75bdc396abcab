"""Steps against published closed forms, and against data x0 ~ N(m, c^2), whose velocity and flow are known exactly."""

from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from progrpo.diffusion.flow import eps_from_velocity, flow_grpo_rate, ode_step, sde_mean_std, x0_from_velocity
from tests.support.grids import sigma_grid

M, C = 0.8, 0.5  # mean and std of the data


def marginal(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of x at sigma."""
    return (1 - sigma) * M, ((1 - sigma) * C) ** 2 + sigma**2


def velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """E[eps - x0 | x]."""
    mean, variance = marginal(sigma)
    return (sigma - (1 - sigma) * C**2) / variance * (x - mean) - M


def draws(dtype=torch.float64, batch=3):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 2, 4, 5)
    return (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))


def pair(sigma, sigma_next, dtype=torch.float64):
    return torch.tensor(sigma, dtype=dtype), torch.tensor(sigma_next, dtype=dtype)


def test_x0_and_eps_invert_the_interpolation():
    x0, eps = draws()
    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    wide = sigma.view(3, 1, 1, 1)
    x, v = (1 - wide) * x0 + wide * eps, eps - x0
    torch.testing.assert_close(x0_from_velocity(x, v, sigma), x0)
    torch.testing.assert_close(eps_from_velocity(x, v, sigma), eps)


def test_step_to_zero_lands_on_x0():
    x, v = draws()
    sigma, zero = pair(0.3, 0.0)
    torch.testing.assert_close(ode_step(x, v, sigma, zero), x0_from_velocity(x, v, sigma))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rate_zero_is_the_ode_step_bitwise(dtype):
    x, v = draws(dtype)
    sigmas = sigma_grid(10, 3.0).to(dtype)
    for sigma, sigma_next in pairwise(sigmas):
        mean, std = sde_mean_std(x, v, sigma, sigma_next, torch.zeros((), dtype=dtype))
        assert torch.equal(mean, ode_step(x, v, sigma, sigma_next))
        assert std == 0


def test_noise_level_zero_is_diffusers_sampler_bitwise():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    sigmas = sigma_grid(10, 3.0)
    x, _ = draws(torch.float32)
    ours, theirs = x, x
    for step, timestep in enumerate(scheduler.timesteps):
        rate = flow_grpo_rate(sigmas[step], 0.0, sigmas[1])
        ours, _ = sde_mean_std(ours, torch.sin(ours), sigmas[step], sigmas[step + 1], rate)
        theirs = scheduler.step(torch.sin(theirs), timestep, theirs, return_dict=False)[0]
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.96), (0.79, 0.7), (0.28, 0.0089), (0.0089, 0.0)])
def test_kernel_is_flow_grpos_closed_form(sigma, sigma_next):
    x, v = draws()
    sigma, sigma_next = pair(sigma, sigma_next)
    s = flow_grpo_rate(sigma, 0.7, torch.tensor(0.96, dtype=torch.float64))
    h = sigma - sigma_next
    published = x * (1 - s**2 / (2 * sigma) * h) - v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * h
    mean, std = sde_mean_std(x, v, sigma, sigma_next, s)
    torch.testing.assert_close(mean, published, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(std, s * h.sqrt())


@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.96), (0.79, 0.7), (0.28, 0.0)])
def test_kernel_with_constant_rate_is_dancegrpos_closed_form(sigma, sigma_next):
    x, v = draws()
    sigma, sigma_next = pair(sigma, sigma_next)
    eta, h = torch.tensor(0.3, dtype=torch.float64), sigma - sigma_next
    score = -(x - (1 - sigma) * (x - sigma * v)) / sigma**2
    mean, std = sde_mean_std(x, v, sigma, sigma_next, eta)
    torch.testing.assert_close(mean, x - h * v + 0.5 * eta**2 * h * score, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(std, eta * h.sqrt())


def test_flow_grpo_rate_on_sd3s_grid():
    sigmas = sigma_grid(10, 3.0)
    rate = flow_grpo_rate(sigmas[:-1], 0.7, sigmas[1])
    std = rate * (sigmas[:-1] - sigmas[1:]).sqrt()
    known_rate = torch.tensor([3.51, 3.43, 2.27, 1.72, 1.36, 1.09, 0.861, 0.652, 0.434, 0.066])
    known_std = torch.tensor([0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.0063])
    torch.testing.assert_close(rate, known_rate, rtol=5e-3, atol=5e-4)
    torch.testing.assert_close(std, known_std, rtol=3e-3, atol=5e-4)


@pytest.mark.parametrize("shift", [1.0, 1.18, 1.32, 3.0])
def test_first_std_is_the_noise_level_though_rounding_puts_the_grid_off_one(shift):
    sigmas = sigma_grid(10, shift)
    std = flow_grpo_rate(sigmas[0], 0.7, sigmas[1]) * (sigmas[0] - sigmas[1]).sqrt()
    assert std.item() == pytest.approx(0.7, rel=1e-5)


def test_a_sigma_for_each_row_is_bitwise_the_same_as_one_for_all():
    x, v = draws(torch.float32)
    sigma, sigma_next, rate = (torch.tensor(value) for value in (0.7, 0.6, 1.1))
    one, std_one = sde_mean_std(x, v, sigma, sigma_next, rate)
    rows, std_rows = sde_mean_std(x, v, sigma.expand(3), sigma_next.expand(3), rate.expand(3))
    assert torch.equal(one, rows)
    assert std_one.shape == ()
    assert std_rows.shape == (3, 1, 1, 1)
    assert torch.equal(std_rows, std_one.expand(3, 1, 1, 1))


def euler_error(steps: int) -> float:
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    x = start = torch.tensor([[-1.3], [0.2], [2.0]], dtype=torch.float64)
    for sigma, sigma_next in pairwise(sigmas):
        x = ode_step(x, velocity(x, sigma), sigma, sigma_next)
    exact = M + C * start  # the flow keeps the number of standard deviations from the mean
    return (x - exact).abs().max().item()


def test_euler_converges_with_order_one():
    errors = [euler_error(steps) for steps in (200, 400, 800)]
    assert errors[0] < 0.02
    for coarse, fine in pairwise(errors):
        assert 1.9 < coarse / fine < 2.1


def marginal_error(rate_of, steps: int) -> float:
    """The error of mean and variance of x at the end: both are carried exactly, as the kernel is affine in x."""
    sigmas = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)
    mean, variance = marginal(sigmas[0])
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for sigma, sigma_next in pairwise(sigmas):
        images, std = sde_mean_std(points, velocity(points, sigma), sigma, sigma_next, rate_of(sigma))
        offset, slope = images[0, 0], images[1, 0] - images[0, 0]
        mean, variance = slope * mean + offset, slope**2 * variance + std**2
    exact_mean, exact_variance = marginal(sigmas[-1])
    return max((mean - exact_mean).abs().item(), (variance - exact_variance).abs().item())


@pytest.mark.parametrize(
    "rate_of",
    [
        lambda sigma: torch.zeros_like(sigma),
        lambda sigma: torch.full_like(sigma, 0.3),
        lambda sigma: torch.full_like(sigma, 1.0),
        lambda sigma: flow_grpo_rate(sigma, 0.7, sigma),
    ],
    ids=["ode", "dance 0.3", "dance 1", "flow_grpo 0.7"],
)
def test_every_rate_keeps_the_marginals_to_order_h(rate_of):
    errors = [marginal_error(rate_of, steps) for steps in (200, 400, 800)]
    assert errors[0] < 0.02
    for coarse, fine in pairwise(errors):
        assert 1.8 < coarse / fine < 2.2


def test_gradients_of_the_mean():
    x, v = draws(batch=1)
    sigma, sigma_next = pair(0.6, 0.5)
    rate = torch.tensor(1.2, dtype=torch.float64)
    v = v.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: sde_mean_std(x, v, sigma, sigma_next, rate)[0], (v,))
