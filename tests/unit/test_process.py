"""Steps of a whole grid: against diffusers, and on data x0 ~ N(m, c^2) whose best prediction and flow are known."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.distributions import Normal

from progrpo.diffusion.levels import Levels, diffusion_levels, flow_levels
from progrpo.diffusion.prediction import PREDICTIONS
from progrpo.diffusion.process import Process
from tests.support.grids import SAMPLERS, sigma_grid

M, C = 0.8, 0.5  # mean and std of the data
OF_DIFFUSION = ["epsilon", "v_prediction", "sample"]
SDE, PRESERVING = ["flow_grpo", "dance", "flow_grpo_wan"], ["ddim", "cps", "cps_reduced", "precise"]
ALL = [("flow", sampler) for sampler in SAMPLERS] + [(name, sampler) for name in OF_DIFFUSION for sampler in PRESERVING]


def scheduler_of(prediction: str, **kwargs) -> DDIMScheduler:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    settings |= {"set_alpha_to_one": False, "steps_offset": 1, "prediction_type": prediction}
    scheduler = DDIMScheduler(**settings | kwargs)
    scheduler.set_timesteps(10)
    return scheduler


def levels_of(scheduler: DDIMScheduler, dtype=torch.float32) -> Levels:
    """diffusers makes the noise in float32; in float64 it goes on from there."""
    return diffusion_levels(scheduler.timesteps, scheduler.alphas_cumprod.to(dtype), scheduler.final_alpha_cumprod)


def draws(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(3, 2, 4, 5, generator=generator, dtype=dtype) for _ in range(2))


def process_of(name: str, sampler: str, noise_levels=(0.7,) * 10, dtype=torch.float64) -> Process:
    levels = flow_levels(sigma_grid(10, 3.0).to(dtype)) if name == "flow" else levels_of(scheduler_of(name), dtype)
    return Process(name, SAMPLERS[sampler], levels, noise_levels)


# --- without noise ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_flows_deterministic_step_is_euler_bitwise(sampler, dtype):
    (x, v), process = draws(dtype), process_of("flow", sampler, dtype=dtype)
    for step, (sigma, sigma_next) in enumerate(pairwise(process.levels_T1.sigma)):
        assert torch.equal(process.deterministic(step, x, v), x + (sigma_next - sigma) * v)


def test_a_flows_deterministic_path_is_diffusers_bitwise():
    scheduler, process = FlowMatchEulerDiscreteScheduler(shift=3.0), process_of("flow", "cps", dtype=torch.float32)
    scheduler.set_timesteps(10)
    ours = theirs = next(draws(torch.float32))
    for step, timestep in enumerate(scheduler.timesteps):
        assert process.timestep(step, ours) == timestep
        ours = process.deterministic(step, ours, torch.sin(ours))
        theirs = scheduler.step(torch.sin(theirs), timestep, theirs, return_dict=False)[0]
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("name", OF_DIFFUSION)
def test_a_diffusion_models_deterministic_path_is_diffusers_bitwise(name, clean):
    scheduler = scheduler_of(name, set_alpha_to_one=clean)
    process = Process(name, SAMPLERS["ddim"], levels_of(scheduler), (0.0,) * 10)
    ours = theirs = next(draws(torch.float32))
    for step, timestep in enumerate(scheduler.timesteps):
        assert process.timestep(step, ours) == timestep
        ours = process.deterministic(step, ours, torch.sin(ours))
        theirs = scheduler.step(torch.sin(theirs), timestep, theirs).prev_sample
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", OF_DIFFUSION)
def test_x0_is_diffusers_own(name):
    scheduler, (x, output) = scheduler_of(name), draws()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    process = process_of(name, "ddim")
    for step, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(output, timestep, x).pred_original_sample
        torch.testing.assert_close(process.x0(step, x, output), theirs, rtol=1e-12, atol=1e-12)


def test_x0_of_a_flow_by_hand():
    (x, v), process = draws(), process_of("flow", "flow_grpo")
    for step in range(10):
        torch.testing.assert_close(process.x0(step, x, v), x - process.levels_T1.sigma[step] * v)


@pytest.mark.parametrize(("name", "sampler"), ALL)
def test_noise_level_zero_is_the_deterministic_step(name, sampler):
    (x, output), process = draws(), process_of(name, sampler, (0.0,) * 10)
    for step in range(10):
        mean, std = process.mean_std(step, x, output)
        exact = process.deterministic(step, x, output)
        assert std == 0
        torch.testing.assert_close(mean, exact, rtol=1e-12, atol=1e-12)
        if sampler in SDE:
            assert torch.equal(mean, exact)


# --- with noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sampler"), ALL)
def test_scales_are_the_samplers_at_each_steps_noise_level(name, sampler):
    noise_levels = (0.7, 0.0, 0.3, 0.3, 0.0, 0.7, 1.0, 0.0, 0.3, 0.7)
    process = process_of(name, sampler, noise_levels)
    scales = process.scales_T
    assert scales.shape == (10,) and process.num_steps == 10
    for step, noise_level in enumerate(noise_levels):
        assert scales[step] == SAMPLERS[sampler].scale(process.levels_T1, noise_level)[step]
        at_the_data = process.levels_T1.sigma[step + 1] == 0 and sampler not in SDE
        assert (scales[step] == 0) == (noise_level == 0 or at_the_data)
    assert process_of(name, sampler, (0.0,) * 10).scales_T.tolist() == [0] * 10


@pytest.mark.parametrize(("name", "sampler"), ALL)
def test_stds_are_those_of_the_steps(name, sampler):
    (x, output), process = draws(), process_of(name, sampler, (0.7, 0.0) * 5)
    stds = torch.stack([process.mean_std(step, x, output)[1] for step in range(10)])
    torch.testing.assert_close(process.stds_T, stds, rtol=1e-12, atol=0)
    if sampler in SDE:
        h = process.levels_T1.sigma[:-1] - process.levels_T1.sigma[1:]
        torch.testing.assert_close(process.stds_T, process.scales_T * h**0.5, rtol=1e-12, atol=0)
    else:
        assert torch.equal(process.stds_T, process.scales_T)


def test_lengths_are_shares_of_the_timesteps():
    flow = process_of("flow", "flow_grpo")
    torch.testing.assert_close(flow.lengths_T, -flow.levels_T1.sigma.diff(), rtol=1e-12, atol=1e-12)
    diffusion = process_of("epsilon", "ddim")
    assert diffusion.lengths_T.tolist() == pytest.approx([100 / 901] * 9 + [1 / 901], rel=1e-12)
    for process in (flow, diffusion):
        assert process.lengths_T.sum().item() == pytest.approx(1, abs=1e-12)
    part = Process("epsilon", SAMPLERS["ddim"], diffusion.levels_T1[2:6], (0.0,) * 3)
    assert part.lengths_T.tolist() == pytest.approx([100 / 701] * 3, rel=1e-12)


@pytest.mark.parametrize("sampler", ["flow_grpo", "dance", "ddim", "cps"])
def test_log_prob_is_the_mean_density_of_torch_distributions(sampler):
    (x, output), process = draws(), process_of("flow", sampler)
    for step in (1, 5, torch.tensor([1, 5, 8])):
        mean, std = process.mean_std(step, x, output)
        x_next = mean + std * x.flip(0)
        expected = Normal(mean, std).log_prob(x_next).mean((1, 2, 3))
        torch.testing.assert_close(process.log_prob(x_next, mean, std), expected, rtol=1e-12, atol=1e-12)


def test_the_reduced_log_ratio_is_the_gaussians_times_twice_the_variance():
    (x, output), reduced, density = draws(), process_of("flow", "cps_reduced"), process_of("flow", "cps")
    steps = torch.tensor([1, 5, 8])
    mean, std = reduced.mean_std(steps, x, output)
    old, std_old = density.mean_std(steps, x, output + 0.1)
    assert torch.equal(std, std_old)
    x_next = mean + std * x.flip(0)
    ratios = [of.log_prob(x_next, mean, std) - of.log_prob(x_next, old, std) for of in (reduced, density)]
    torch.testing.assert_close(ratios[0], 2 * std.flatten() ** 2 * ratios[1], rtol=1e-9, atol=1e-12)


# --- rows, dtypes, refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "sampler"), ALL)
def test_a_step_for_each_row_is_bitwise_that_row_alone(name, sampler, dtype):
    (x, output), process = draws(dtype), process_of(name, sampler, (0.7, 0.4) * 5, dtype)
    steps = torch.tensor([8, 0, 3])
    mean, std = process.mean_std(steps, x, output)
    assert std.shape == (3, 1, 1, 1)
    log_prob = process.log_prob(output, mean, std)
    for row, step in enumerate(steps.tolist()):
        part = x[row : row + 1], output[row : row + 1]
        alone, its = process.mean_std(step, *part)
        assert its.shape == ()
        assert torch.equal(mean[row], alone[0]) and std[row].item() == its
        assert torch.equal(log_prob[row], process.log_prob(part[1], alone, its)[0])
        assert torch.equal(process.timestep(steps, x)[row], process.timestep(step, x))
        for call in (process.x0, process.deterministic):
            assert torch.equal(call(steps, x, output)[row], call(step, *part)[0])


@pytest.mark.parametrize(("name", "sampler"), ALL)
def test_a_step_for_all_or_the_same_for_each_row_agree_bitwise(name, sampler):
    (x, output), process = draws(torch.float32), process_of(name, sampler, dtype=torch.float32)
    for step in range(9):
        rows = torch.full((3,), step)
        for one, each in zip(process.mean_std(step, x, output), process.mean_std(rows, x, output), strict=True):
            assert torch.equal(one.expand_as(each), each)
        for call in (process.x0, process.deterministic):
            assert torch.equal(call(step, x, output), call(rows, x, output))
        assert torch.equal(process.timestep(step, x).expand(3), process.timestep(rows, x))


@pytest.mark.parametrize("of_levels", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "sampler"), ALL)
def test_steps_are_computed_in_the_dtype_of_x(name, sampler, dtype, of_levels):
    (x, output), process = draws(dtype), process_of(name, sampler, dtype=of_levels)
    for step in (4, torch.tensor([4, 4, 4])):
        values = [*process.mean_std(step, x, output), process.deterministic(step, x, output)]
        values += [process.x0(step, x, output), process.timestep(step, x)]
        assert {value.dtype for value in values} == {dtype}


@pytest.mark.parametrize("sampler", SDE)
@pytest.mark.parametrize("name", OF_DIFFUSION)
def test_an_sde_of_flow_models_is_refused_on_a_diffusion_model(name, sampler):
    with pytest.raises(AssertionError, match="flow"):
        process_of(name, sampler)


@pytest.mark.parametrize("count", [9, 11])
def test_a_noise_level_for_each_step(count):
    with pytest.raises(AssertionError):
        process_of("flow", "cps", (0.7,) * count)


def test_a_changed_process_has_scales_of_its_own():
    process = process_of("flow", "dance", (0.7,) * 10)
    assert process.scales_T.tolist() == [0.7] * 10
    assert dataclasses.replace(process, noise_levels=(0.3,) * 10).scales_T.tolist() == [0.3] * 10


# --- whole paths ------------------------------------------------------------------------------------------------------


def flow_grid(steps: int, start: float = 1.0) -> Levels:
    return flow_levels(torch.linspace(start, 0, steps + 1, dtype=torch.float64))


def diffusion_grid(steps: int) -> Levels:
    """Evenly spaced angles, alpha being their cosine: from nearly pure noise to the data."""
    angle = torch.linspace(1.5, 0, steps + 1, dtype=torch.float64)
    return Levels(angle.cos(), angle.sin(), angle)


def marginal(at: Levels) -> tuple[Tensor, Tensor]:
    """Mean and variance of x."""
    return at.alpha * M, (at.alpha * C) ** 2 + at.sigma**2


def best_output(name: str, x: Tensor, at: Levels) -> Tensor:
    """E[target | x]: all targets are linear in x0 and eps, which are Gaussian given x."""
    mean, variance = marginal(at)
    x0 = M + at.alpha * C**2 / variance * (x - mean)
    eps = at.sigma / variance * (x - mean)
    return PREDICTIONS[name].target(x0, eps, at)


def path_error(name: str, levels: Levels) -> float:
    process = Process(name, SAMPLERS["ddim"], levels, (0.0,) * (len(levels) - 1))
    x = start = torch.tensor([[-1.3], [0.2], [2.0]], dtype=torch.float64)
    for step in range(process.num_steps):
        x = process.deterministic(step, x, best_output(name, x, levels[step]))
    mean, variance = marginal(levels[0])
    exact = M + C * (start - mean) / variance.sqrt()  # the flow keeps the number of standard deviations from the mean
    return (x - exact).abs().max().item()


@pytest.mark.parametrize("name", ["flow", *OF_DIFFUSION])
def test_deterministic_paths_converge_to_the_flow_with_order_one(name):
    grid = flow_grid if name == "flow" else diffusion_grid
    errors = [path_error(name, grid(steps)) for steps in (100, 200, 400)]
    assert errors[0] < 0.04
    for coarse, fine in pairwise(errors):
        assert 1.9 < coarse / fine < 2.1


def data_error(name: str, sampler: str, noise_level: float, levels: Levels) -> tuple[float, float]:
    """The error of mean and variance at the data: both are carried exactly, as a step is affine in x."""
    process = Process(name, SAMPLERS[sampler], levels, (noise_level,) * (len(levels) - 1))
    mean, variance = marginal(levels[0])
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for step in range(process.num_steps):
        images, std = process.mean_std(step, points, best_output(name, points, levels[step]))
        offset, slope = images[0, 0], images[1, 0] - images[0, 0]
        mean, variance = slope * mean + offset, slope**2 * variance + std**2
    return abs(mean.item() - M), abs(variance.item() - C**2)


@pytest.mark.parametrize(
    ("name", "sampler", "noise_level", "start"),
    [
        # at sigma 1 its rate is infinite, and what stands in for it leaves an error that is forgotten slowly
        ("flow", "flow_grpo", 0.7, 0.95),
        ("flow", "flow_grpo", 1.0, 0.95),
        ("flow", "dance", 0.3, 1.0),
        ("flow", "dance", 1.0, 1.0),
        ("flow", "ddim", 1.0, 1.0),
        ("epsilon", "ddim", 1.0, None),
        ("v_prediction", "ddim", 0.5, None),
        ("flow", "precise", 1.0, 1.0),
        ("epsilon", "precise", 1.5, None),
    ],
)
def test_stochastic_paths_end_at_the_data_with_order_one(name, sampler, noise_level, start):
    """Their mean and variance are the data's but for an error of the order of a step's length."""
    grids = [diffusion_grid(steps) if start is None else flow_grid(steps, start) for steps in (100, 200, 400)]
    errors = [data_error(name, sampler, noise_level, grid) for grid in grids]
    assert max(errors[0]) < 0.04
    for coarse, fine in pairwise(variance for _, variance in errors):
        assert 1.85 < coarse / fine < 2.15
    for coarse, fine in pairwise(mean for mean, _ in errors):
        assert fine < 1e-12 or 1.85 < coarse / fine < 2.15
