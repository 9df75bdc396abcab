"""Levels of flow and diffusion models, on grids and between their points."""

import pytest
import torch

from progrpo.diffusion.levels import (
    Levels,
    between_diffusion_levels,
    between_flow_levels,
    diffusion_levels,
    flow_levels,
    over,
)
from tests.support.grids import sigma_grid

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion's
SIGNAL = (1 - BETAS).cumprod(0)
TIMESTEPS = torch.tensor([901, 601, 301, 1])


def equal(actual: Levels, expected: Levels) -> bool:
    return all(torch.equal(getattr(actual, name), getattr(expected, name)) for name in ("alpha", "sigma", "timestep"))


# --- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_train_timesteps", [1000, 250])
def test_flow_levels_by_hand(num_train_timesteps):
    levels = flow_levels(torch.tensor([1.0, 0.75, 0.25, 0.0], dtype=torch.float64), num_train_timesteps)
    assert levels.alpha.tolist() == [0, 0.25, 0.75, 1]
    assert levels.sigma.tolist() == [1, 0.75, 0.25, 0]
    assert levels.timestep.tolist() == [num_train_timesteps * share for share in (1, 0.75, 0.25, 0)]


def test_flow_levels_have_a_thousand_timesteps_by_default():
    assert flow_levels(torch.tensor(0.5)).timestep == 500


def test_diffusion_levels_are_the_training_noise_multiplied_out():
    levels, alpha = diffusion_levels(TIMESTEPS, SIGNAL), []
    for timestep in TIMESTEPS.tolist():
        signal = 1.0
        for beta in BETAS[: timestep + 1].tolist():
            signal *= 1 - beta
        alpha.append(signal**0.5)
    assert levels.alpha.tolist() == pytest.approx(alpha, rel=1e-12)
    assert (levels.alpha**2 + levels.sigma**2).tolist() == pytest.approx([1] * 4, rel=1e-12)
    assert (levels.sigma > 0).all() and len(levels) == 4
    assert levels.timestep.tolist() == [901, 601, 301, 1]
    assert {part.dtype for part in (levels.alpha, levels.sigma, levels.timestep)} == {torch.float64}


@pytest.mark.parametrize(("final", "alpha", "sigma"), [(1.0, 1.0, 0.0), (0.64, 0.8, 0.6)])
def test_a_final_level_is_one_more_at_the_end(final, alpha, sigma):
    levels = diffusion_levels(TIMESTEPS, SIGNAL, torch.tensor(final))
    assert len(levels) == 5 and equal(levels[:-1], diffusion_levels(TIMESTEPS, SIGNAL))
    last = levels[-1]
    assert (last.alpha.item(), last.sigma.item(), last.timestep.item()) == pytest.approx((alpha, sigma, 0), abs=1e-7)
    assert last.timestep == 0
    if final == 1:
        assert last.alpha == 1 and last.sigma == 0


def test_levels_of_timesteps_in_any_shape():
    rows, one = diffusion_levels(TIMESTEPS, SIGNAL), diffusion_levels(TIMESTEPS[2], SIGNAL)
    assert one.sigma.shape == one.timestep.shape == ()
    assert equal(one, rows[2])
    assert equal(diffusion_levels(TIMESTEPS.double(), SIGNAL), rows)  # a policy takes its timestep as a float


# --- between ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_train_timesteps", [1000, 250])
def test_grid_points_of_a_flow_model_come_back_bitwise(dtype, num_train_timesteps):
    grid = flow_levels(sigma_grid(10, 3.0).to(dtype), num_train_timesteps)
    places = torch.arange(11, dtype=torch.float64)
    levels = between_flow_levels(grid, places, num_train_timesteps)
    assert equal(levels, grid) and levels.sigma.dtype == dtype
    assert equal(between_flow_levels(grid, places.flip(0), num_train_timesteps), grid[torch.arange(10, -1, -1)])


def test_between_a_flow_models_grid_points_by_hand():
    grid = flow_levels(torch.tensor([1.0, 0.75, 0.5, 0.0], dtype=torch.float64))
    levels = between_flow_levels(grid, torch.tensor([0.5, 1.25, 1.75, 2.75, 0.0], dtype=torch.float64))
    assert levels.sigma.tolist() == [0.875, 0.6875, 0.5625, 0.125, 1.0]
    assert levels.alpha.tolist() == [0.125, 0.3125, 0.4375, 0.875, 0.0]
    assert levels.timestep.tolist() == [875, 687.5, 562.5, 125, 1000]


@pytest.mark.parametrize("final", [None, SIGNAL[0]], ids=["no final", "final"])
def test_grid_points_of_a_diffusion_model_come_back_bitwise(final):
    grid = diffusion_levels(TIMESTEPS, SIGNAL, final)
    places = torch.arange(len(grid), dtype=torch.float64)
    assert equal(between_diffusion_levels(grid, places, SIGNAL), grid)


def test_between_a_diffusion_models_grid_points_is_the_nearest_timestep():
    grid = diffusion_levels(TIMESTEPS, SIGNAL, torch.tensor(1.0))
    places = torch.tensor([0.5, 1.2, 2.501, 2.502, 3.4, 3.6, 4.0], dtype=torch.float64)
    timesteps = [751, 541, 151, 150, 1, 0, 0]  # 150.7, 150.4, 0.6 and 0.4 are rounded
    levels = between_diffusion_levels(grid, places, SIGNAL)
    assert levels.timestep.tolist() == timesteps
    assert equal(levels, diffusion_levels(torch.tensor(timesteps), SIGNAL))


@pytest.mark.parametrize("final", [None, SIGNAL[0], torch.tensor(1.0)], ids=["no final", "noisy final", "clean final"])
@pytest.mark.parametrize("timesteps", [TIMESTEPS, torch.tensor([999, 500, 0])], ids=["leading", "whole"])
def test_between_diffusion_levels_are_none_but_the_trained(timesteps, final):
    grid = diffusion_levels(timesteps, SIGNAL, final)
    places = torch.linspace(0, len(grid) - 1, 4001, dtype=torch.float64)
    levels = between_diffusion_levels(grid, places, SIGNAL)
    whole = levels.timestep.long()
    assert torch.equal(whole.double(), levels.timestep) and whole.min() >= 0 and whole.max() < 1000
    assert equal(levels, diffusion_levels(whole, SIGNAL))
    assert (levels.timestep.diff() <= 0).all()
    assert levels.timestep[0] == timesteps[0] and levels.timestep[-1] == grid.timestep[-1]
    assert len(levels.timestep.unique()) >= timesteps[0] - timesteps[-1]  # each of them is met


# --- handling ---------------------------------------------------------------------------------------------------------


def test_indexing_by_one_by_a_slice_and_by_rows():
    levels = flow_levels(torch.tensor([1.0, 0.8, 0.5, 0.0], dtype=torch.float64))
    assert len(levels) == 4
    one, part, rows = levels[1], levels[1:], levels[torch.tensor([2, 0, 2])]
    assert one.sigma.shape == () and one.sigma == 0.8 and one.timestep == 800 and one.alpha == 1 - one.sigma
    assert len(part) == 3 and part.timestep.tolist() == [800, 500, 0]
    assert rows.sigma.tolist() == [0.5, 1, 0.5] and rows.alpha.tolist() == [0.5, 0, 0.5]
    assert rows.timestep.tolist() == [500, 1000, 500]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_to_takes_all_three_along(dtype, device):
    levels = diffusion_levels(TIMESTEPS, SIGNAL).to(torch.empty(2, dtype=dtype, device=device))
    for part in (levels.alpha, levels.sigma, levels.timestep):
        assert part.dtype == dtype and part.device.type == device and part.shape == (4,)


def test_over_broadcasts_a_value_for_each_row_or_one_for_all():
    x = torch.ones(3, 2, 4, 5)
    rows = over(torch.tensor([1.0, 2.0, 3.0]), x)
    assert rows.shape == (3, 1, 1, 1)
    assert (rows * x)[:, 1, 2, 3].tolist() == [1, 2, 3]
    assert over(torch.tensor(2.0), x).shape == ()
