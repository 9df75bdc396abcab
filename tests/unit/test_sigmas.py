import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from progrpo.diffusion.sigmas import sigma_grid


@pytest.mark.parametrize("num_train_timesteps", [1000, 250])
@pytest.mark.parametrize("shift", [0.3, 1.0, 1.15, 1.18, 1.32, 2.0, 3.0, 3.7, 12.0])
def test_bit_equal_to_diffusers(shift, num_train_timesteps):
    for steps in [1, 2, 3, 4, 5, 7, 10, 14, 20, 25, 28, 40, 50, 99, 333]:
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_train_timesteps, shift=shift)
        scheduler.set_timesteps(steps)
        assert torch.equal(sigma_grid(steps, shift, num_train_timesteps), scheduler.sigmas), steps


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.18, 1.32, 3.0])
def test_descends_from_one_to_zero(shift):
    grid = sigma_grid(10, shift)
    assert grid.shape == (11,)
    assert grid.dtype == torch.float32
    assert (grid.diff() < 0).all()
    assert abs(grid[0] - 1) < 1e-6
    assert grid[-1] == 0


def test_smallest_sigma_is_shifted_twice():
    single = 3 * 0.001 / (1 + 2 * 0.001)
    assert sigma_grid(10, 3.0)[-2].item() == pytest.approx(3 * single / (1 + 2 * single), rel=1e-6)


@pytest.mark.parametrize(
    ("steps", "shift", "name"), [(0, 1.0, "num_inference_steps"), (4, 0.0, "shift"), (4, -1.0, "shift")]
)
def test_names_the_wrong_field(steps, shift, name):
    with pytest.raises(ValueError, match=name):
        sigma_grid(steps, shift)
