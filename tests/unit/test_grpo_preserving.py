"""GRPO on DDIM's and CPS's steps of a diffusion model of two weights, against loops over torch.distributions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from progrpo.objectives.grpo import GRPO
from progrpo.objectives.settings import GRPOSettings
from tests.support.grids import SAMPLERS

ADVANTAGES = (1.5, -0.5, -1.0, 2.0, -2.0)
CLIP = 0.05
ITEMS = torch.arange(15)
LEVELS = {"ddim": 0.9, "cps": 0.6, "cps_reduced": 0.6, "precise": 1.3}
TIMESTEPS, SIGNALS = (
    (9, 5, 2, 0),
    (0.08, 0.58, 0.9, 0.99),
)  # told, and alpha^2: the grid's last level is not in the table


def sampler_name(experience):
    """The name of the sampler that the trajectories are of."""
    return next(name for name in LEVELS if SAMPLERS[name] is experience.process.sampler)


def noise_std(sampler, step):
    a, after = SIGNALS[step : step + 2]
    if sampler == "ddim":
        return LEVELS[sampler] * math.sqrt((1 - after) / (1 - a)) * math.sqrt(1 - a / after)
    if sampler == "precise":
        return math.sqrt(1 - after) * math.sqrt(1 - (a * (1 - after) / (after * (1 - a))) ** (LEVELS[sampler] ** 2 / 2))
    return math.sqrt(1 - after) * math.sin(LEVELS[sampler] * math.pi / 2)


def output(policy, experience, transition, row, weights="current"):
    c = experience.condition.tensors["c"][experience.trajectories.group_N[row]]
    with policy.weights(weights):
        velocity = policy.a * transition.x_NCHW[row] + experience.guidance_scale * policy.b * c
    return velocity + TIMESTEPS[transition.step] / 100


def gaussian(policy, experience, transition, row, weights="current"):
    """The distribution of one transition's next latent, written out."""
    x, said = transition.x_NCHW[row], output(policy, experience, transition, row, weights)
    a, after = SIGNALS[transition.step : transition.step + 2]
    if policy.prediction == "epsilon":
        eps, x0 = said, (x - math.sqrt(1 - a) * said) / math.sqrt(a)
    else:
        eps, x0 = (math.sqrt(a) * said + math.sqrt(1 - a) * x), math.sqrt(a) * x - math.sqrt(1 - a) * said
    std = noise_std(sampler_name(experience), transition.step)
    return Normal(math.sqrt(after) * x0 + math.sqrt(1 - after - std**2) * eps, std)


def log_prob(sampler, distribution, x_next):
    if sampler == "cps_reduced":
        return -((x_next - distribution.mean) ** 2).mean()
    return distribution.log_prob(x_next).mean()


def terms(policy, experience):
    """Of each item: the clipped loss, whether it left the range, and |ratio - 1|."""
    for t in experience.trajectories.path:
        for row, advantage in enumerate(experience.advantages_N.tolist()):
            now = log_prob(sampler_name(experience), gaussian(policy, experience, t, row), t.x_next_NCHW[row])
            ratio = (now - t.log_prob_N[row]).exp().item()
            bounded = min(max(ratio, 1 - CLIP), 1 + CLIP)
            yield max(-advantage * ratio, -advantage * bounded), bounded != ratio, abs(ratio - 1)


def distance(policy, experience, form):
    """Sum of a distance to the reference over all items."""
    total = 0.0
    for t in experience.trajectories.path:
        for row in range(5):
            now, ref = (gaussian(policy, experience, t, row, weights) for weights in ("current", "reference"))
            said, was = (output(policy, experience, t, row, weights) for weights in ("current", "reference"))
            forms = {
                "exact": kl_divergence(now, ref),
                "latent": (now.mean - ref.mean) ** 2,
                "velocity": (said - was) ** 2,
            }
            total += forms[form].mean().item()
    return total


def gradients(policy, loss):
    return torch.autograd.grad(loss.total, [policy.a, policy.b])


@torch.no_grad()
def shift(policy, a=0.0, b=0.0):
    policy.a += a
    policy.b += b


@pytest.fixture(params=["epsilon", "v_prediction"])
def policy(request, linear_diffusion_policy):
    return linear_diffusion_policy(request.param)


@pytest.fixture(params=LEVELS)
def experience_of(request, policy, linear_transitions):
    """Transitions of all three steps: the last too has noise."""
    process = policy.process(request.param, LEVELS[request.param])
    return lambda advantages=ADVANTAGES, **more: linear_transitions(
        policy, advantages, process=process, steps=(0, 1, 2), **more
    )


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_loss_by_hand(policy, experience_of, guidance_scale):
    experience = experience_of(off=0.05, guidance_scale=guidance_scale)
    shift(policy, a=0.01, b=0.005)
    loss, expected = (
        GRPO(GRPOSettings(clip_range=CLIP)).loss(policy, experience, ITEMS),
        list(terms(policy, experience)),
    )
    assert 0 < sum(outside for _, outside, _ in expected) < 15  # both branches are met
    assert loss.total.item() == pytest.approx(sum(term for term, _, _ in expected), rel=1e-9)
    assert loss.sums["clip_fraction"].item() == sum(outside for _, outside, _ in expected)
    assert loss.maxima["ratio_max_deviation"].item() == pytest.approx(max(off for *_, off in expected), rel=1e-9)


def test_on_policy_the_ratio_is_one(policy, experience_of):
    loss = GRPO(GRPOSettings(clip_range=CLIP)).loss(policy, experience_of(), ITEMS)
    assert loss.total.item() == pytest.approx(-3 * sum(ADVANTAGES), abs=1e-12)
    assert loss.maxima["ratio_max_deviation"].item() < 1e-12 and loss.sums["clip_fraction"] == 0


@pytest.mark.parametrize("kl_form", ["exact", "latent", "velocity"])
def test_distances_to_the_reference_by_hand(policy, experience_of, kl_form):
    experience, objective = experience_of([0.0] * 5), GRPO(GRPOSettings(clip_range=CLIP, kl_beta=0.7, kl_form=kl_form))
    assert objective.loss(policy, experience, ITEMS).sums["kl"] == 0
    shift(policy, a=0.03, b=-0.05)
    loss, expected = objective.loss(policy, experience, ITEMS), distance(policy, experience, kl_form)
    assert loss.sums["kl"].item() == pytest.approx(expected, rel=1e-9) and expected > 0
    assert loss.total.item() == pytest.approx(0.7 * expected, rel=1e-9)


@pytest.mark.parametrize("step_weights", ["equal", "noise", "inverse_h"])
def test_step_weights_by_hand(policy, experience_of, step_weights):
    """A step is as long as the timesteps that it passes."""
    experience = experience_of(off=0.05)
    shift(policy, a=0.01, b=0.005)
    raw = {
        "equal": [1.0] * 3,
        "noise": [noise_std(sampler_name(experience), step) for step in range(3)],
        "inverse_h": [1 / (TIMESTEPS[step] - TIMESTEPS[step + 1]) for step in range(3)],
    }[step_weights]
    objective = GRPO(GRPOSettings(clip_range=CLIP, step_weights=step_weights))
    for item, (term, _, _) in enumerate(terms(policy, experience)):
        weight = 3 * raw[item // 5] / sum(raw)
        actual = objective.loss(policy, experience, torch.tensor([item])).total.item()
        assert actual == pytest.approx(weight * term, rel=1e-9)


@pytest.mark.parametrize("sampler", ["ddim", "cps", "precise"])
def test_guarded_ratio_by_hand(policy, linear_transitions, sampler):
    """The noise that was drawn times the move of the mean, whatever the step's std."""
    process = policy.process(sampler, LEVELS[sampler])
    experience = linear_transitions(policy, [-1.0] * 5, process=process, steps=(0, 1, 2))
    shift(policy, a=0.02, b=0.01)
    objective = GRPO(GRPOSettings(clip_range=10.0, ratio="guard"))
    for item in ITEMS.tolist():
        t, row = experience.trajectories.path[item // 5], item % 5
        now = gaussian(policy, experience, t, row)
        z = (t.x_next_NCHW[row] - t.mean_NCHW[row]) / now.stddev
        expected = (z * (now.mean - t.mean_NCHW[row])).mean().exp().item()
        assert objective.loss(policy, experience, torch.tensor([item])).total.item() == pytest.approx(
            expected, rel=1e-9
        )


@pytest.mark.parametrize("settings", [{}, {"kl_beta": 0.3, "step_weights": "noise"}])
def test_gradient_against_finite_differences(policy, experience_of, settings):
    experience, objective, step = experience_of(off=0.05), GRPO(GRPOSettings(clip_range=CLIP, **settings)), 1e-6
    shift(policy, a=0.01, b=0.005)
    for name, gradient in zip("ab", gradients(policy, objective.loss(policy, experience, ITEMS)), strict=True):
        around = []
        for sign in (1, -1):
            shift(policy, **{name: sign * step})
            around.append(objective.loss(policy, experience, ITEMS).total.item())
            shift(policy, **{name: -sign * step})
        assert gradient.item() == pytest.approx((around[0] - around[1]) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_step_makes_what_was_good_likelier(policy, experience_of, advantage):
    experience = experience_of([advantage] + [0.0] * 4)
    da, db = gradients(policy, GRPO(GRPOSettings(clip_range=CLIP)).loss(policy, experience, ITEMS))
    length = 1e-3 / math.hypot(da, db)
    shift(policy, a=-length * da.item(), b=-length * db.item())
    change = sum(
        (
            log_prob(sampler_name(experience), gaussian(policy, experience, t, 0), t.x_next_NCHW[0]) - t.log_prob_N[0]
        ).item()
        for t in experience.trajectories.path
    )
    assert change * advantage > 1e-6


def test_items_of_any_steps_go_together(policy, experience_of):
    experience = experience_of(off=0.05)
    shift(policy, a=0.01, b=0.005)
    objective = GRPO(GRPOSettings(clip_range=CLIP, step_weights="inverse_h", kl_beta=0.3))
    whole = objective.loss(policy, experience, ITEMS).total.item()
    shuffled = ITEMS[torch.randperm(15, generator=torch.Generator().manual_seed(2))]
    for cut in (ITEMS.split(1), shuffled.split(4)):
        total = sum(objective.loss(policy, experience, items).total.item() for items in cut)
        assert total == pytest.approx(whole, rel=1e-9)


def test_latents_stored_in_low_precision_are_stepped_in_full(policy, experience_of):
    """Stored latents are exact in their dtype: no other rounding enters."""
    experience = experience_of()
    path = [replace(t, x_NCHW=t.x_NCHW.half(), x_next_NCHW=t.x_next_NCHW.half()) for t in experience.trajectories.path]
    stored, exact = (
        replace(experience, trajectories=replace(experience.trajectories, path=tuple(rows)))
        for rows in (path, [replace(t, x_NCHW=t.x_NCHW.double(), x_next_NCHW=t.x_next_NCHW.double()) for t in path])
    )
    totals = [GRPO(GRPOSettings(clip_range=CLIP)).loss(policy, actual, ITEMS).total for actual in (stored, exact)]
    assert torch.equal(*totals) and totals[0].dtype == torch.float64
