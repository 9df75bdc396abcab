"""Steps that keep the marginals, against diffusers' DDIM, the published closed forms and conditioning of Gaussians."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler

from progrpo.diffusion.ddim import cps_std, ddim_std, precise_std, preserving_mean, reduced_log_prob
from progrpo.diffusion.flow import flow_grpo_rate, sde_mean_std
from progrpo.diffusion.gaussian import log_prob
from progrpo.diffusion.levels import Levels, diffusion_levels, flow_levels
from progrpo.diffusion.prediction import PREDICTIONS
from tests.support.grids import sigma_grid

OF_DIFFUSION = ["epsilon", "v_prediction", "sample"]


def scheduler_of(prediction="epsilon", steps=10, **kwargs) -> DDIMScheduler:
    """Stable Diffusion's scheduler; diffusers makes its noise in float32, here it goes on in float64."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    settings |= {"set_alpha_to_one": False, "steps_offset": 1, "prediction_type": prediction}
    scheduler = DDIMScheduler(**settings | kwargs)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(steps)
    return scheduler


def levels_of(scheduler: DDIMScheduler) -> Levels:
    return diffusion_levels(scheduler.timesteps, scheduler.alphas_cumprod, scheduler.final_alpha_cumprod)


FLOW = flow_levels(sigma_grid(10, 3.0).double())
DIFFUSION = levels_of(scheduler_of())
GRIDS = pytest.mark.parametrize("levels", [FLOW, DIFFUSION], ids=["flow", "diffusion"])


def draws(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(3, 2, 4, 5, generator=generator, dtype=dtype) for _ in range(2))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- DDIM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        *((name, {"set_alpha_to_one": clean}) for name in OF_DIFFUSION for clean in (False, True)),
        # from pure noise on, of which a prediction of noise says nothing
        *((name, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}) for name in OF_DIFFUSION[1:]),
    ],
)
def test_step_is_diffusers_own(name, eta, kwargs):
    scheduler = scheduler_of(name, **kwargs)
    levels, prediction, (x, output) = levels_of(scheduler), PREDICTIONS[name], draws()
    for step, timestep in enumerate(scheduler.timesteps):
        at, after = levels[step], levels[step + 1]
        std = ddim_std(at, after, eta)
        mean = preserving_mean(prediction.x0(x, output, at), prediction.eps(x, output, at), after, std)
        theirs, ones = (
            scheduler.step(output, timestep, x, eta, variance_noise=noise).prev_sample
            for noise in (torch.zeros_like(x), torch.ones_like(x))
        )
        close(mean, theirs)
        torch.testing.assert_close(ones - theirs, std.expand_as(x), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_std_is_the_published_closed_form(eta):
    signal = DIFFUSION.alpha.square()
    a, a_next = signal[:-1], signal[1:]
    published = eta * ((1 - a_next) / (1 - a)).sqrt() * (1 - a / a_next).sqrt()
    close(ddim_std(DIFFUSION[:-1], DIFFUSION[1:], eta), published)


@GRIDS
def test_eta_one_is_the_posterior_of_the_forward_process(levels):
    """x = (alpha / alpha') x' + noise, so (x', x) is Gaussian given x0, and x' given x too by its covariances."""
    x0, eps = draws()
    for at, after in pairwise(levels):
        x = at.alpha * x0 + at.sigma * eps
        covariance = at.alpha / after.alpha * after.sigma**2  # of x' with x
        mean = after.alpha * x0 + covariance / at.sigma**2 * (x - at.alpha * x0)
        variance = after.sigma**2 - covariance**2 / at.sigma**2
        std = ddim_std(at, after, 1.0)
        close(std**2, variance)
        if at.alpha == 0:  # rounding under the root of a difference
            torch.testing.assert_close(preserving_mean(x0, eps, after, std), mean, rtol=1e-7, atol=1e-7)
        else:
            close(preserving_mean(x0, eps, after, std), mean)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_diffusion_model_in_a_flows_coordinates_has_the_flows_std(eta):
    whole = DIFFUSION.alpha + DIFFUSION.sigma
    shares = flow_levels(DIFFUSION.sigma / whole)
    close(ddim_std(DIFFUSION[:-1], DIFFUSION[1:], eta) / whole[1:], ddim_std(shares[:-1], shares[1:], eta))
    close(cps_std(DIFFUSION, eta) / whole, cps_std(shares, eta))


def test_a_last_step_to_the_data_has_no_noise():
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    end = Levels(one, zero, zero)
    for at in (FLOW[-2], DIFFUSION[-2]):
        assert ddim_std(at, end, 1.0) == 0
        assert cps_std(end, 0.8) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_that_goes_nowhere_has_no_noise(dtype):
    """Rounding may put the variance of such a step below 0, which is no reason for a std that is no number."""
    signal = scheduler_of().alphas_cumprod.to(dtype)
    for levels in (
        diffusion_levels(torch.arange(1000), signal),
        flow_levels(torch.linspace(0.001, 0.999, 999, dtype=dtype)),
    ):
        std = ddim_std(levels, levels, 1.0)
        assert (std == 0).all()


# --- Precise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.5])
@pytest.mark.parametrize(("sigma", "sigma_next"), [(0.98, 0.9), (0.8, 0.6), (0.5, 0.2)])
def test_a_step_of_precise_is_the_sde_of_flow_grpo_with_x0_held(sigma, sigma_next, noise_level):
    """Many small Euler-Maruyama steps end in the same Gaussian: each maps its mean and variance on, in closed form."""
    x0, x = (torch.tensor([[value]], dtype=torch.float64) for value in (0.7, -1.1))
    mean, variance, sigmas = x, 0 * x, torch.linspace(sigma, sigma_next, 2_001, dtype=torch.float64)
    for here, there in pairwise(sigmas):
        rate = flow_grpo_rate(here, noise_level, here)
        both = torch.cat([mean, mean + 1])
        (moved, beside), std = sde_mean_std(both, (both - x0) / here, here, there, rate)
        mean, variance = moved[None], (beside - moved) ** 2 * variance + std**2
    at, after = (flow_levels(torch.tensor(value, dtype=torch.float64)) for value in (sigma, sigma_next))
    std = precise_std(at, after, noise_level)
    preserved = preserving_mean(x0, (x - at.alpha * x0) / at.sigma, after, std)
    torch.testing.assert_close(preserved, mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(std, variance.sqrt().squeeze(), rtol=1e-3, atol=0)
    assert std > 0.05


@GRIDS
def test_precise_at_the_root_of_two_is_ddim_at_eta_one(levels):
    close(precise_std(levels[:-1], levels[1:], math.sqrt(2)), ddim_std(levels[:-1], levels[1:], 1.0))


@GRIDS
@pytest.mark.parametrize("noise_level", [0.4, 1.0, 1.5])
def test_two_steps_of_precise_with_the_same_x0_are_one(levels, noise_level):
    """An exact solution does not know where it was stopped: correlations with the old noise multiply."""

    def kept(at, after):
        old = torch.ones(1, 1, dtype=torch.float64)
        return preserving_mean(0 * old, old, after, precise_std(at, after, noise_level))

    for step in range(1, 8):
        first, second, last = levels[step], levels[step + 1], levels[step + 2]
        whole = kept(first, last) / last.sigma
        close(kept(first, second) / second.sigma * kept(second, last) / last.sigma, whole)
        change = (last.alpha / last.sigma).log() - (first.alpha / first.sigma).log()
        close(whole.squeeze(), (-(noise_level**2) / 2 * change).exp())


def test_precise_from_pure_noise_renews_all_noise():
    """A grid of float32 may begin a rounding error beyond it."""
    for sigma in (1.0, 1.0000001):
        at, after = flow_levels(torch.tensor(sigma)), flow_levels(torch.tensor(0.9))
        for noise_level in (0.1, 1.5):
            assert precise_std(at, after, noise_level) == after.sigma
        assert precise_std(at, after, 0.0) == 0


@GRIDS
def test_precise_adds_no_noise_at_the_data_and_more_at_a_higher_level(levels):
    clean = Levels(levels.alpha[0] * 0 + 1, levels.sigma[0] * 0, levels.timestep[0] * 0)
    assert precise_std(levels[5], clean, 1.5) == 0
    stds = torch.stack([precise_std(levels[1:9], levels[2:10], a) for a in (0.0, 0.1, 0.7, 1.5, 4.0)])
    assert (stds[0] == 0).all() and (stds.diff(dim=0) > 0).all()


# --- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.8, 1.0])
def test_cps_std_is_the_sine_of_its_angle(noise_level):
    for levels in (FLOW, DIFFUSION):
        std = [sigma * math.sin(noise_level * math.pi / 2) for sigma in levels.sigma.tolist()]
        assert cps_std(levels, noise_level).tolist() == pytest.approx(std, rel=1e-12, abs=0)


@GRIDS
@pytest.mark.parametrize("noise_level", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_there_is_never_more_fresh_noise_than_noise(levels, noise_level):
    for coarse in (levels, levels[::3]):
        at, after = coarse[:-1], coarse[1:]
        stds = ddim_std(at, after, noise_level), cps_std(after, noise_level), precise_std(at, after, 3 * noise_level)
        for std in stds:
            assert (std >= 0).all() and (std <= after.sigma * (1 + 1e-15)).all()


@GRIDS
def test_old_and_fresh_noise_make_up_the_levels(levels):
    """The mean is alpha' x0 + c eps, and c^2 + std^2 = sigma'^2."""
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for at, after in pairwise(levels):
        for std in (ddim_std(at, after, 0.7), cps_std(after, 0.7), 0 * after.sigma, after.sigma):
            assert preserving_mean(one, zero, after, std) == after.alpha
            old = preserving_mean(zero, one, after, std)
            assert old >= 0
            close((old**2 + std**2).squeeze(), after.sigma**2)


def test_all_noise_may_be_fresh():
    """A std that rounding puts above sigma' leaves no old noise."""
    x0, eps = draws(torch.float32)
    after = DIFFUSION[4].to(x0)
    for std in (after.sigma, torch.nextafter(after.sigma, torch.tensor(2.0))):
        assert torch.equal(preserving_mean(x0, eps, after, std), after.alpha * x0)


def test_a_std_for_each_row_is_bitwise_the_same_as_one_for_all():
    x0, eps = draws(torch.float32)
    after, std = DIFFUSION[4].to(x0), torch.tensor(0.3)
    rows = Levels(*(value.expand(3) for value in (after.alpha, after.sigma, after.timestep)))
    one = preserving_mean(x0, eps, after, std)
    assert one.dtype == torch.float32
    assert torch.equal(one, preserving_mean(x0, eps, rows, std.expand(3)))
    each = preserving_mean(x0, eps, DIFFUSION[3:6].to(x0), torch.tensor([0.1, 0.2, 0.3]))
    for row, value in enumerate((0.1, 0.2, 0.3)):
        alone = preserving_mean(x0[row : row + 1], eps[row : row + 1], DIFFUSION[3 + row].to(x0), torch.tensor(value))
        assert torch.equal(each[row], alone[0])


# --- CPS's stand-in for a density -------------------------------------------------------------------------------------


def test_reduced_log_prob_by_hand():
    x, mean = draws()
    for row, reduced in enumerate(reduced_log_prob(x, mean, torch.tensor(0.3)).tolist()):
        squares = [(a - b) ** 2 for a, b in zip(x[row].flatten().tolist(), mean[row].flatten().tolist(), strict=True)]
        assert reduced == pytest.approx(-sum(squares) / 40, rel=1e-12)


def test_its_log_ratio_is_the_gaussians_times_twice_the_variance():
    x, mean = draws()
    old = mean + 0.01 * x.flip(0)
    for std in (torch.tensor(0.37).double(), torch.tensor([0.006, 0.3, 2.0]).double().view(3, 1, 1, 1)):
        ratio = log_prob(x, mean, std) - log_prob(x, old, std)
        reduced = reduced_log_prob(x, mean, std) - reduced_log_prob(x, old, std)
        torch.testing.assert_close(reduced, 2 * std.flatten() ** 2 * ratio, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype):
    x, mean = (300 * value.to(dtype) for value in draws())  # squared distances overflow float16
    reduced = reduced_log_prob(x, mean, torch.tensor(0.1, dtype=dtype))
    assert reduced.dtype == torch.float32
    torch.testing.assert_close(reduced, reduced_log_prob(x.float(), mean.float(), torch.tensor(0.1)))
