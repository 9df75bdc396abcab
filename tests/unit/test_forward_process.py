"""Final latents noised anew: which times, whose noise, and that a batch does not show in either."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch

from progrpo.diffusion.levels import between_flow_levels, flow_levels
from progrpo.objectives.forward_process import Draws, NoisedLatents, evaluate_items
from progrpo.rollout.noise import INITIAL, NoiseKey

ADVANTAGES = (1.5, -0.5, -1.0, 2.0, -2.0)
GRID = torch.tensor([1.0, 0.95, 0.8, 0.5, 0.2, 0.0], dtype=torch.float64)
FIELDS = ("draw", "x0", "x", "target", "sigma", "advantages")


@pytest.fixture
def experience(linear_policy, linear_experience):
    return linear_experience(linear_policy, ADVANTAGES)


def everything(policy, experience, draws):
    return NoisedLatents.gather(policy, experience, torch.arange(len(experience) * draws.count), draws)


def numbers(actual):
    return {**vars(actual), "sigma": actual.levels.sigma}


def level_at(place, grid):
    """The noise level at a place between the grid's points, 0 being its start and its number of steps its end."""
    below = min(math.floor(place), len(grid) - 2)
    return grid[below] + (grid[below + 1] - grid[below]) * (place - below)


def times(draws, normal, draw, grid):
    """The noise levels of draws on a grid of sigmas."""
    return between_flow_levels(flow_levels(grid), draws.places(normal, draw, len(grid) - 1)).sigma


def normals(count=400):
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


# --- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "fraction"), [(1, 1.0), (4, 0.99), (6, 0.9), (3, 0.6), (2, 0.1)])
def test_times_by_hand(count, fraction):
    normal, draw = normals(), torch.arange(400) % count
    actual = times(Draws(count, fraction), normal, draw, GRID)
    grid, steps = GRID.tolist(), len(GRID) - 1
    for value, n, d in zip(actual.tolist(), normal.tolist(), draw.tolist(), strict=True):
        share = (1 + math.erf(n / math.sqrt(2))) / 2
        assert value == pytest.approx(level_at((d + share) / count * fraction * steps, grid), abs=1e-12)


@pytest.mark.parametrize(("count", "fraction"), [(1, 1.0), (4, 0.99), (6, 0.9), (3, 0.6)])
def test_each_draw_lies_in_its_own_part_of_the_trained_share(count, fraction):
    grid, steps = GRID.tolist(), len(GRID) - 1
    for d in range(count):
        actual = times(Draws(count, fraction), normals(), torch.full((400,), d), GRID)
        start, end = (level_at(k / count * fraction * steps, grid) for k in (d, d + 1))
        assert end - 1e-12 <= actual.min() and actual.max() <= start + 1e-12
        assert actual.max() - actual.min() > 0.9 * (start - end)  # all of the part is met


def test_times_are_uniform_in_steps_of_the_grid():
    """Half of them before the middle of the grid, whatever the noise level there."""
    actual = times(Draws(1, 1.0), normals(4000), torch.zeros(4000), GRID)
    shares = [(actual >= level_at(5 * share, GRID.tolist())).double().mean().item() for share in (0.25, 0.5, 0.75)]
    assert shares == pytest.approx([0.25, 0.5, 0.75], abs=0.03)


def test_times_fall_with_the_draw_and_with_the_number_drawn():
    draws = Draws(4, 0.9)
    normal = normals().sort().values
    for d in range(4):
        actual = times(draws, normal, torch.full((400,), d), GRID)
        assert (actual.diff() <= 0).all()
    apart = times(draws, torch.randn(4, 100).sort(descending=True).values.flatten(), torch.arange(400) // 100, GRID)
    assert (apart.reshape(4, 100).min(1).values[:-1] >= apart.reshape(4, 100).max(1).values[1:]).all()


@pytest.mark.parametrize("fraction", [0.2, 0.6, 1.0])
def test_the_farthest_numbers_stay_on_the_grid(fraction):
    far = torch.tensor([-40.0, -8.0, 0.0, 8.0, 40.0])
    for count in (1, 4):
        draws = Draws(count, fraction)
        assert times(draws, far[:1], torch.tensor([0]), GRID).item() == 1
        last = times(draws, far, torch.full((5,), count - 1), GRID)
        assert last.isfinite().all() and last[-1].item() == pytest.approx(level_at(5 * fraction, GRID.tolist()))


def test_times_follow_the_grid():
    """Another shift of the grid is another distribution of times, at the same places."""
    shifted = 3 * GRID / (1 + 2 * GRID)
    normal, draw = normals(), torch.arange(400) % 3
    on_grid = torch.linspace(0, 5, 6, dtype=torch.float64)
    places = times(Draws(3, 0.9), normal, draw, on_grid)
    for grid in (GRID, shifted):
        expected = [level_at(place, grid.tolist()) for place in places.tolist()]
        assert times(Draws(3, 0.9), normal, draw, grid).tolist() == pytest.approx(expected)


# --- noised latents ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_items_by_hand(linear_policy, experience, shared):
    draws = Draws(3, 0.9, shared)
    actual, trajectories = everything(linear_policy, experience, draws), experience.trajectories
    assert actual.draw.tolist() == [0] * 5 + [1] * 5 + [2] * 5 and actual.rows.tolist() == [*range(5)] * 3
    for i in range(15):
        d, n = divmod(i, 5)
        x0, eps = trajectories.x_NCHW[n], actual.target[i] + trajectories.x_NCHW[n]
        torch.testing.assert_close(actual.x[i], (1 - actual.levels.sigma[i]) * x0 + actual.levels.sigma[i] * eps)
        assert torch.equal(actual.x0[i], x0) and actual.advantages[i] == ADVANTAGES[n]
        assert actual.condition.tensors["c"][i] == experience.condition.tensors["c"][trajectories.group_N[n]]
        start, end = (level_at(k / 3 * 0.9 * 3, experience.process.levels_T1.sigma.tolist()) for k in (d, d + 1))
        assert end <= actual.levels.sigma[i] <= start
    assert {t.dtype for t in (actual.x, actual.target, actual.levels.sigma)} == {torch.float64}


def test_noise_is_standard_normal(linear_policy, experience):
    draws = Draws(500, 1.0)
    actual = everything(linear_policy, experience, draws)
    eps = actual.target + actual.x0
    assert eps.mean().item() == pytest.approx(0, abs=0.03) and eps.std().item() == pytest.approx(1, abs=0.03)


def test_every_item_has_its_own_noise_and_time(linear_policy, experience):
    actual = everything(linear_policy, experience, Draws(3, 0.9))
    eps = (actual.target + actual.x0).flatten(1)
    assert len(eps.round(decimals=6).unique(dim=0)) == len(actual.levels.sigma.unique()) == 15


def test_a_group_shares_noise_and_times_where_it_should(linear_policy, experience):
    actual = everything(linear_policy, experience, Draws(3, 0.9, shared=True))
    eps, sigma = (actual.target + actual.x0).flatten(1).round(decimals=6), actual.levels.sigma
    group = experience.trajectories.group_N
    for d in range(3):
        own = actual.draw == d
        for p in (0, 1):
            assert len(eps[own][group == p].unique(dim=0)) == len(sigma[own][group == p].unique()) == 1
    assert len(eps.unique(dim=0)) == len(sigma.unique()) == 2 * 3  # no two groups, no two draws


@pytest.mark.parametrize("shared", [False, True])
def test_neither_the_batch_nor_the_order_shows(linear_policy, experience, shared):
    draws = Draws(3, 0.9, shared)
    whole, items = everything(linear_policy, experience, draws), torch.arange(15)
    shuffled = items[torch.randperm(15, generator=torch.Generator().manual_seed(2))]
    for cut in (items.split(1), items.split(4), shuffled.split(1), shuffled.split(4), [shuffled]):
        for part in cut:
            actual, place = NoisedLatents.gather(linear_policy, experience, part, draws), part.sort().values
            assert torch.equal(actual.rows, whole.rows[place])
            assert all(torch.equal(numbers(actual)[name], numbers(whole)[name][place]) for name in FIELDS)
            assert torch.equal(actual.condition.tensors["c"], whole.condition.tensors["c"][place])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rows", [[0], [3], [4, 0], [1, 2, 4]])
def test_a_trajectory_does_not_know_who_else_is_there(linear_policy, experience, shared, rows):
    draws = Draws(3, 0.9, shared)
    whole, some = everything(linear_policy, experience, draws), experience.take(torch.tensor(rows))
    actual = everything(linear_policy, some, draws)
    place = torch.tensor([d * 5 + row for d in range(3) for row in rows])
    for name in FIELDS:
        assert torch.equal(numbers(actual)[name], numbers(whole)[name][place]), name
    assert torch.equal(actual.condition.tensors["c"], whole.condition.tensors["c"][place])


@pytest.mark.parametrize("shared", [False, True])
def test_draws_are_new_in_every_iteration_and_the_more_draws_have_the_same_noise(linear_policy, experience, shared):
    draws = Draws(2, 0.9, shared)
    first = everything(linear_policy, experience, draws)
    again = everything(linear_policy, experience, draws)
    assert torch.equal(first.x, again.x)
    later = everything(linear_policy, replace(experience, noise=NoiseKey(3, 2)), draws)
    assert not (first.target == later.target).any() and not (first.levels.sigma == later.levels.sigma).any()
    more = everything(linear_policy, experience, replace(draws, count=4))
    assert torch.equal(more.target[:10], first.target)


@dataclass
class Watched:
    """A noise key that writes down what it was asked."""

    key: NoiseKey
    asked: list = field(default_factory=list)

    def draw(self, slot_N, member_N, step, shape):
        self.asked += [(slot, member, step) for slot, member in zip(slot_N.tolist(), member_N.tolist(), strict=True)]
        return self.key.draw(slot_N, member_N, step, shape)


@pytest.mark.parametrize("shared", [False, True])
def test_noise_is_none_that_sampling_drew_and_never_the_same_twice(linear_policy, experience, shared):
    draws, watched = Draws(4, 0.9, shared), Watched(experience.noise)
    actual = everything(linear_policy, replace(experience, noise=watched), draws)
    assert max(step for _, _, step in watched.asked) < INITIAL
    assert len(watched.asked) == 2 * 20 and len(set(watched.asked)) == 2 * 4 * (2 if shared else 5)
    eps, trajectories = actual.target + actual.x0, experience.trajectories
    for step in range(-1, 12):
        for member in (-1, *trajectories.member_N.unique().tolist()):
            drawn = experience.noise.draw(trajectories.slot_N, torch.full((5,), member), step, (1, 2, 2))
            assert not any(torch.isclose(e, one.double()).any() for e in eps for one in drawn)


# --- velocities and notes ---------------------------------------------------------------------------------------------


def test_errors_and_predictions_by_hand(linear_policy, linear_experience):
    experience = linear_experience(linear_policy, ADVANTAGES, guidance_scale=3.0)  # for sampling, not for training
    linear_policy.named_weights.snapshot("old")
    with torch.no_grad():
        linear_policy.a += 0.2
        linear_policy.b -= 0.1
    actual = everything(linear_policy, experience, Draws(3, 0.9))
    v, v_old = actual.predict(linear_policy), actual.predict_with(linear_policy, "old")
    assert v.requires_grad and not v_old.requires_grad
    for i in range(15):
        c = experience.condition.tensors["c"][experience.trajectories.group_N[actual.rows[i]]]
        torch.testing.assert_close(v[i], 0.5 * actual.x[i] - 0.3 * c)
        torch.testing.assert_close(v_old[i], 0.3 * actual.x[i] - 0.2 * c)
        squares = [(a - b) ** 2 for a, b in zip(v[i].flatten(), actual.target[i].flatten(), strict=True)]
        assert actual.error(v)[i].item() == pytest.approx(sum(squares).item() / 4)
    assert actual.error(actual.target).eq(0).all()
    assert linear_policy.a.item() == pytest.approx(0.5)


def test_embedded_guidance_is_that_of_sampling(linear_policy, linear_experience):
    experience = linear_experience(linear_policy, ADVANTAGES, guidance_scale=3.0)
    linear_policy.embeds_guidance = True
    actual = everything(linear_policy, experience, Draws(3, 0.9))
    c = actual.condition.tensors["c"].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(actual.predict(linear_policy), 0.3 * actual.x - 0.2 * 3 * c)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("microbatch", [1, 4, 64])
def test_notes_are_those_of_each_item_alone(linear_policy, experience, shared, microbatch):
    draws = Draws(3, 0.9, shared)

    def evaluate(at):
        return at.error(at.predict(linear_policy)) * at.levels.sigma + at.advantages

    actual = evaluate_items(linear_policy, experience, draws, microbatch, evaluate)
    assert actual.shape == (5, 3) and actual.dtype == torch.float64 and not actual.requires_grad
    for n in range(5):
        for d in range(3):
            one = NoisedLatents.gather(linear_policy, experience, torch.tensor([d * 5 + n]), draws)
            assert actual[n, d].item() == pytest.approx(evaluate(one).item(), rel=1e-12)


def test_of_nobody_there_is_nothing_to_note(linear_policy, experience):
    nobody = experience.take(torch.empty(0, dtype=torch.long))
    assert evaluate_items(linear_policy, nobody, Draws(3, 0.9), 4, lambda at: at.levels.sigma).shape == (0, 3)
