"""The four things that a network may predict say the same of x, x0 and the noise."""

import pytest
import torch

from progrpo.diffusion.levels import Levels, diffusion_levels, flow_levels
from progrpo.diffusion.prediction import PREDICTIONS

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
SIGNAL = (1 - BETAS).cumprod(0)
FLOW = flow_levels(torch.tensor([0.9, 0.5, 0.2, 0.05], dtype=torch.float64))
DIFFUSION = diffusion_levels(torch.tensor([990, 500, 100, 3]), SIGNAL)
OF_DIFFUSION = ["epsilon", "v_prediction", "sample"]
LEVELS = {"flow": FLOW} | dict.fromkeys(OF_DIFFUSION, DIFFUSION)
ROWS, ONE = slice(0, 3), 1


def draws(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(3, 2, 4, 5, generator=generator, dtype=dtype) for _ in range(2))


def wide(value):
    return value.reshape(-1, 1, 1, 1)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(params=[ROWS, ONE], ids=["a level each", "one for all"])
def where(request):
    return request.param


def test_the_names_are_diffusers_own():
    assert set(PREDICTIONS) == {"flow", *OF_DIFFUSION}


@pytest.mark.parametrize("name", LEVELS)
def test_mix_is_the_sum_of_data_and_noise(name, where):
    (x0, eps), at = draws(), LEVELS[name][where]
    close(PREDICTIONS[name].mix(x0, eps, at), wide(at.alpha) * x0 + wide(at.sigma) * eps)


def test_targets_by_hand():
    (x0, eps), alpha, sigma = draws(), wide(DIFFUSION.alpha[:3]), wide(DIFFUSION.sigma[:3])
    close(PREDICTIONS["flow"].target(x0, eps, FLOW[:3]), eps - x0)
    assert torch.equal(PREDICTIONS["epsilon"].target(x0, eps, DIFFUSION[:3]), eps)
    close(PREDICTIONS["v_prediction"].target(x0, eps, DIFFUSION[:3]), alpha * eps - sigma * x0)
    assert torch.equal(PREDICTIONS["sample"].target(x0, eps, DIFFUSION[:3]), x0)


@pytest.mark.parametrize(("name", "part"), [("flow", "sigma"), ("v_prediction", "angle")])
def test_velocities_are_the_derivative_of_the_mix(name, part):
    """Of a flow model's by its sigma, of a v_prediction's by the angle whose cosine is alpha."""
    x0, eps = draws()
    at = LEVELS[name][ONE]
    place = at.sigma if part == "sigma" else at.sigma.asin()

    def mix(place):
        alpha, sigma = (1 - place, place) if part == "sigma" else (place.cos(), place.sin())
        return PREDICTIONS[name].mix(x0, eps, Levels(alpha, sigma, at.timestep))

    _, derivative = torch.autograd.functional.jvp(mix, place, torch.ones_like(place))
    close(PREDICTIONS[name].target(x0, eps, at), derivative)


@pytest.mark.parametrize("name", LEVELS)
def test_the_target_gives_data_and_noise_back(name, where):
    (x0, eps), at, prediction = draws(), LEVELS[name][where], PREDICTIONS[name]
    x, target = prediction.mix(x0, eps, at), prediction.target(x0, eps, at)
    close(prediction.x0(x, target, at), x0)
    close(prediction.eps(x, target, at), eps)


@pytest.mark.parametrize("name", LEVELS)
def test_whatever_the_output_its_data_and_noise_make_up_x(name, where):
    (x, output), at, prediction = draws(), LEVELS[name][where], PREDICTIONS[name]
    x0, eps = prediction.x0(x, output, at), prediction.eps(x, output, at)
    close(prediction.mix(x0, eps, at), x)
    close(prediction.target(x0, eps, at), output)


@pytest.mark.parametrize("name", LEVELS)
def test_a_step_with_the_target_keeps_data_and_noise(name, where):
    (x0, eps), levels, prediction = draws(), LEVELS[name], PREDICTIONS[name]
    at = levels[where]
    for after in (levels[-1], levels[1:] if where == ROWS else levels[2]):
        x_next = prediction.step(prediction.mix(x0, eps, at), prediction.target(x0, eps, at), at, after)
        close(x_next, prediction.mix(x0, eps, after))


@pytest.mark.parametrize("name", LEVELS)
def test_a_step_to_the_data_is_x0(name):
    (x, output), at, prediction = draws(), LEVELS[name][ROWS], PREDICTIONS[name]
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    close(prediction.step(x, output, at, Levels(one, zero, zero)), prediction.x0(x, output, at))


@pytest.mark.parametrize("name", ["flow", "v_prediction", "sample"])
def test_pure_noise_has_data_too_but_for_a_prediction_of_noise(name):
    """Where alpha is 0, x is the noise, and what the network says is the data up to its sign."""
    x, output = draws()
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    pure = Levels(zero, one, 1000 * one)
    x0, eps = PREDICTIONS[name].x0(x, output, pure), PREDICTIONS[name].eps(x, output, pure)
    close(eps, x)
    close(x0, {"flow": x - output, "v_prediction": -output, "sample": output}[name])


def test_predictions_of_a_diffusion_model_take_equal_steps(where):
    """Of any data and noise that make up x, not only of those it was made from."""
    (x, x0), at, after = draws(), DIFFUSION[where], DIFFUSION[3]
    eps = (x - wide(at.alpha) * x0) / wide(at.sigma)
    steps = [PREDICTIONS[name].step(x, PREDICTIONS[name].target(x0, eps, at), at, after) for name in OF_DIFFUSION]
    expected = after.alpha * x0 + after.sigma * eps
    for x_next in steps:
        close(x_next, expected)


@pytest.mark.parametrize("name", OF_DIFFUSION)
def test_a_diffusion_model_is_a_flow_model_in_other_coordinates(name):
    """The noise in x / (alpha + sigma) has the share sigma / (alpha + sigma): DDIM's step is the flow's Euler step."""
    (x, output), prediction = draws(), PREDICTIONS[name]
    for at, after in ((DIFFUSION[:3], DIFFUSION[1:]), (DIFFUSION[0], DIFFUSION[3])):
        x0, eps = prediction.x0(x, output, at), prediction.eps(x, output, at)
        whole, whole_after = at.alpha + at.sigma, after.alpha + after.sigma
        share, share_after = flow_levels(at.sigma / whole), flow_levels(after.sigma / whole_after)
        x_next = prediction.step(x, output, at, after)
        flowed = PREDICTIONS["flow"].step(x / wide(whole), eps - x0, share, share_after)
        close(x_next / wide(whole_after), flowed)
        close(PREDICTIONS["flow"].x0(x / wide(whole), eps - x0, share), x0)


@pytest.mark.parametrize("name", LEVELS)
def test_an_error_of_the_output_is_the_velocitys_by_its_weight(name, where):
    (x, output), prediction, at = draws(), PREDICTIONS[name], LEVELS[name][where]
    other = output + 0.1 * x.flip(0)
    v, w = (prediction.eps(x, o, at) - prediction.x0(x, o, at) for o in (output, other))
    close((v - w) ** 2, wide(prediction.velocity_weight(at)) * (output - other) ** 2)


@pytest.mark.parametrize("name", LEVELS)
def test_a_level_for_each_row_is_bitwise_the_same_as_one_for_all(name):
    (x, output), at, after = draws(torch.float32), LEVELS[name][1], LEVELS[name][2]
    at, after = (levels.to(x) for levels in (at, after))
    rows, rows_after = (
        Levels(*(value.expand(3) for value in (levels.alpha, levels.sigma, levels.timestep))) for levels in (at, after)
    )
    prediction = PREDICTIONS[name]
    assert torch.equal(prediction.step(x, output, at, after), prediction.step(x, output, rows, rows_after))
    for read in (prediction.x0, prediction.eps, prediction.target):
        assert torch.equal(read(x, output, at), read(x, output, rows))
        assert read(x, output, at).dtype == torch.float32
    torch.testing.assert_close(prediction.mix(x, output, at), prediction.mix(x, output, rows))


@pytest.mark.parametrize("name", LEVELS)
def test_gradients_of_a_step(name):
    (x, output), levels = draws(), LEVELS[name]
    output = output[:1, :1].requires_grad_()
    step = PREDICTIONS[name].step
    assert torch.autograd.gradcheck(lambda out: step(x[:1, :1], out, levels[0], levels[1]), (output,))
