"""The step of each sampler on known data and noise, and the amount of noise that it adds."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from progrpo.diffusion.levels import diffusion_levels, flow_levels
from progrpo.diffusion.prediction import PREDICTIONS
from tests.support.grids import SAMPLERS, sigma_grid

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
FLOW = flow_levels(sigma_grid(10, 3.0).double())
DIFFUSION = diffusion_levels(torch.arange(901, 0, -100), (1 - BETAS).cumprod(0), torch.tensor(1.0))
LEVELS = {"flow": FLOW} | dict.fromkeys(("epsilon", "v_prediction", "sample"), DIFFUSION)
SDE, PRESERVING = ["flow_grpo", "dance", "flow_grpo_wan"], ["ddim", "cps", "cps_reduced", "precise"]
KEEPS_MARGINALS = [(name, sampler) for name in LEVELS for sampler in PRESERVING]
ALL = [("flow", sampler) for sampler in SDE] + KEEPS_MARGINALS


def draws():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(3, 2, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))


def step_with(name: str, sampler: str, noise_level: float, step: int, x0: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """The Gaussian of x_next where the network knows x0 and eps."""
    levels, prediction = LEVELS[name], PREDICTIONS[name]
    at, scale = levels[step], SAMPLERS[sampler].scale(levels, noise_level)[step]
    x, target = prediction.mix(x0, eps, at), prediction.target(x0, eps, at)
    return SAMPLERS[sampler].mean_std(prediction, x, target, at, levels[step + 1], scale)


def test_the_names():
    assert set(SAMPLERS) == {*SDE, *PRESERVING}
    assert {name for name, sampler in SAMPLERS.items() if sampler.flow_only} == set(SDE)


# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_level", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("name", "sampler"), KEEPS_MARGINALS)
def test_a_step_keeps_the_marginals(name, sampler, noise_level):
    """Given x0, x_next is N(alpha' x0, sigma'^2): its mean is alpha' x0 + c eps, with c^2 + std^2 = sigma'^2."""
    points = torch.tensor([[1.0], [-2.0], [0.0]], dtype=torch.float64)
    for step in range(10):
        after = LEVELS[name][step + 1]
        mean, std = step_with(name, sampler, noise_level, step, points, torch.zeros_like(points))
        torch.testing.assert_close(mean, after.alpha * points, rtol=1e-12, atol=1e-12)
        with_noise, same = step_with(name, sampler, noise_level, step, points, torch.ones_like(points))
        old = with_noise - mean
        assert std == same and (old > -1e-12).all()
        torch.testing.assert_close(old**2 + std**2, (after.sigma**2).expand_as(old), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("name", "sampler", "noise_level"), [(*pair, a) for pair in KEEPS_MARGINALS for a in (0.6, 1)])
def test_a_step_keeps_the_marginals_of_many_draws(name, sampler, noise_level):
    generator, count, x0 = torch.Generator().manual_seed(3), 100_000, 1.5
    eps, z = (torch.randn(1, count, generator=generator, dtype=torch.float64) for _ in range(2))
    mean, std = step_with(name, sampler, noise_level, 4, torch.full_like(eps, x0), eps)
    x_next, after = mean + std * z, LEVELS[name][5]
    assert std > 0.1 * after.sigma
    assert x_next.mean().item() == pytest.approx(after.alpha.item() * x0, abs=4 * after.sigma.item() / count**0.5)
    assert x_next.var().item() == pytest.approx(after.sigma.item() ** 2, rel=4 * (2 / count) ** 0.5)


@pytest.mark.parametrize("sampler", SDE)
def test_a_step_of_the_sde_is_the_flows_with_a_pull_to_less_noise(sampler):
    (x0, eps), prediction = draws(), PREDICTIONS["flow"]
    for step, rate in enumerate(SAMPLERS[sampler].scale(FLOW, 0.7)):
        at, after = FLOW[step], FLOW[step + 1]
        h = at.sigma - after.sigma
        mean, std = step_with("flow", sampler, 0.7, step, x0, eps)
        pull = rate**2 * h / 2 * -eps / at.sigma
        torch.testing.assert_close(mean, prediction.mix(x0, eps, after) + pull, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(std, rate * h**0.5, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "sampler"), ALL)
def test_scale_zero_is_the_deterministic_step(name, sampler):
    (x, output), levels, prediction = draws(), LEVELS[name], PREDICTIONS[name]
    zero = torch.zeros((), dtype=torch.float64)
    for step in range(10):
        at, after = levels[step], levels[step + 1]
        mean, std = SAMPLERS[sampler].mean_std(prediction, x, output, at, after, zero)
        exact = prediction.step(x, output, at, after)
        assert std == 0
        torch.testing.assert_close(mean, exact, rtol=1e-12, atol=1e-12)
        if sampler in SDE:
            assert torch.equal(mean, exact)


@pytest.mark.parametrize(("name", "sampler"), ALL)
def test_a_std_of_one_for_all_or_of_each_row_broadcasts_over_x(name, sampler):
    (x, output), levels, prediction = draws(), LEVELS[name], PREDICTIONS[name]
    scale, of = SAMPLERS[sampler].scale(levels, 0.5), SAMPLERS[sampler].mean_std
    steps = torch.tensor([5, 1, 7])
    mean, std = of(prediction, x, output, levels[steps], levels[steps + 1], scale[steps])
    assert mean.shape == x.shape and std.shape == (3, 1, 1, 1)
    for row, step in enumerate(steps.tolist()):
        part = slice(row, row + 1)
        alone, its = of(prediction, x[part], output[part], levels[step], levels[step + 1], scale[step])
        assert its.shape == ()
        assert torch.equal(mean[part], alone) and std[row].item() == its


# --- how much noise ---------------------------------------------------------------------------------------------------


def test_scales_by_hand():
    """Each of a step from sigma s to t: two diffusion rates and two stds."""
    sigma = FLOW.sigma.tolist()
    expected: dict[str, list[float]] = {"flow_grpo": [], "dance": [], "flow_grpo_wan": [], "ddim": [], "cps": []}
    expected["precise"] = []
    for step in range(10):
        s, t = sigma[step], sigma[step + 1]
        expected["flow_grpo"].append(0.6 * math.sqrt(s / (1 - (sigma[1] if step == 0 else s))))
        expected["dance"].append(0.6)
        expected["flow_grpo_wan"].append(0.6 * sigma[1] * s)
        expected["ddim"].append(0.6 * t / s * math.sqrt(s**2 - ((1 - s) * t / (1 - t)) ** 2))
        expected["cps"].append(t * math.sin(0.3 * math.pi))
        expected["precise"].append(t * math.sqrt(1 - ((1 - s) * t / ((1 - t) * s)) ** 0.36))
    expected["cps_reduced"] = expected["cps"]
    for name, sampler in SAMPLERS.items():
        std = sampler.scale(FLOW, 0.6)
        assert std.shape == (10,) and std.dtype == torch.float64
        assert std.tolist() == pytest.approx(expected[name], rel=1e-12), name


@pytest.mark.parametrize("sampler", PRESERVING)
@pytest.mark.parametrize("levels", [FLOW, DIFFUSION], ids=["flow", "diffusion"])
@pytest.mark.parametrize("noise_level", [0.1, 0.8, 1.0])
def test_fresh_noise_is_at_most_the_levels_and_none_at_the_data(sampler, levels, noise_level):
    std = SAMPLERS[sampler].scale(levels, noise_level)
    assert (std[:-1] > 0).all() and std[-1] == 0
    assert (std <= levels.sigma[1:] * (1 + 1e-15)).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_float32_grids_keep_their_dtype(sampler):
    levels = flow_levels(sigma_grid(10, 1.18))  # whose first sigma is 1e-7 off 1
    std, exact = (SAMPLERS[sampler].scale(grid, 0.7) for grid in (levels, levels.to(torch.ones(1).double())))
    assert std.dtype == torch.float32 and std.isfinite().all()
    torch.testing.assert_close(std.double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sampler", PRESERVING)
def test_noise_does_not_know_a_diffusion_models_coordinates(sampler):
    """Dividing x by alpha + sigma makes it a flow model's, and its step that model's step of the same noise level."""
    (x, output), prediction, whole = draws(), PREDICTIONS["v_prediction"], DIFFUSION.alpha + DIFFUSION.sigma
    shares, of = flow_levels(DIFFUSION.sigma / whole), SAMPLERS[sampler]
    scale, scale_of_flow = of.scale(DIFFUSION, 0.7), of.scale(shares, 0.7)
    for step in range(10):
        at, after = DIFFUSION[step], DIFFUSION[step + 1]
        mean, std = of.mean_std(prediction, x, output, at, after, scale[step])
        v = prediction.eps(x, output, at) - prediction.x0(x, output, at)
        pair = shares[step], shares[step + 1]
        flowed, std_of_flow = of.mean_std(PREDICTIONS["flow"], x / whole[step], v, *pair, scale_of_flow[step])
        torch.testing.assert_close(mean / whole[step + 1], flowed, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(std / whole[step + 1], std_of_flow, rtol=1e-11, atol=1e-12)


# --- densities and clip ranges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [torch.tensor(0.37).double(), torch.tensor([0.006, 0.3, 2.0]).double()])
def test_log_probs_are_mean_densities_but_for_the_reduced_one(std):
    x, mean = draws()
    std, old = std.reshape(-1, 1, 1, 1) if std.ndim else std, mean + 0.01
    density, density_old = (Normal(center, std).log_prob(x).mean((1, 2, 3)) for center in (mean, old))
    for name in ("flow_grpo", "dance", "ddim", "cps", "precise"):
        torch.testing.assert_close(SAMPLERS[name].log_prob(x, mean, std), density, rtol=1e-12, atol=1e-12)
    reduced = SAMPLERS["cps_reduced"].log_prob
    ratio = reduced(x, mean, std) - reduced(x, old, std)
    torch.testing.assert_close(ratio, 2 * std.flatten() ** 2 * (density - density_old), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("sampler", "shape", "clip_range"),
    [
        ("flow_grpo", (16, 64, 64), 1e-4),
        ("flow_grpo", (8, 16, 16), 3.2e-3),
        ("dance", (16, 64, 64), 1e-4),
        ("flow_grpo_wan", (16, 9, 30, 52), 1e-3),
        ("ddim", (4, 64, 64), 1e-4),
        ("ddim", (8, 16, 16), 1e-4 * (4 * 64 * 64) / 2048),
        ("cps", (16, 64, 64), 1e-5),
        ("cps_reduced", (16, 128, 128), 2.5e-6),
        ("precise", (16, 64, 64), 1e-4),
    ],
)
def test_clip_range_goes_with_the_size_of_the_latent(sampler, shape, clip_range):
    assert SAMPLERS[sampler].clip_range_for(math.prod(shape)) == pytest.approx(clip_range, rel=1e-12)


def test_published_noise_levels():
    published = {"flow_grpo": 0.7, "dance": 0.3, "flow_grpo_wan": 1.0, "ddim": 1.0, "cps": 0.8, "cps_reduced": 0.8}
    published["precise"] = 1.5
    assert {name: sampler.noise_level for name, sampler in SAMPLERS.items()} == published


def test_equal_changes_of_the_whole_latent_are_clipped_alike():
    """Of latents of 8 and of 32 dims whose log-probs sum up to the same."""
    std, sampler = torch.tensor(0.5), SAMPLERS["flow_grpo"]
    small, large = torch.zeros(1, 8), torch.zeros(1, 32)
    small[0, 0] = large[0, 0] = 0.4
    shares = []
    for x in (small, large):
        change = sampler.log_prob(x, torch.zeros_like(x), std) - sampler.log_prob(torch.zeros_like(x), x * 0, std)
        shares.append(change.item() / sampler.clip_range_for(x.numel()))
    assert shares[0] == pytest.approx(shares[1], rel=1e-5)
