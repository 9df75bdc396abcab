"""The ELBO policy gradient on a policy of two weights, against loops over items, finite differences and the bound."""

from __future__ import annotations

import math

import pytest
import torch

from progrpo.diffusion.levels import Levels
from progrpo.diffusion.prediction import PREDICTIONS
from progrpo.objectives.awm import AWM
from progrpo.objectives.elbo import ELBO
from progrpo.objectives.forward_process import Draws, NoisedLatents
from progrpo.objectives.settings import AWMSettings, ELBOSettings
from progrpo.types import Condition
from tests.support.linear import numbers, shift

ADVANTAGES = (1.5, -0.5, -1.0, 2.0, -2.0)
DRAWS, FRACTION = 3, 0.9
ITEMS = torch.arange(5 * DRAWS)
WEIGHTINGS = {  # of a velocity's error `off` at the noise level t; `fixed` is what the gradient holds constant
    "adaptive": lambda off, fixed, t: (t * off).square().mean() / (t * fixed).abs().mean(),
    "simple": lambda off, fixed, t: off.square().mean(),
    "path_kl": lambda off, fixed, t: (1 - t) / (t + 1e-3) * off.square().mean(),
}
CASES = [(weighting, kl_beta) for weighting in WEIGHTINGS for kl_beta in (0.0, 0.3)]


def elbo(**settings):
    return ELBO(ELBOSettings(draws=DRAWS, time_fraction=FRACTION, **{"kl_beta": 0.0, **settings}))


@pytest.fixture
def policy(linear_policy):
    """Its reference, its old and its current weights are three."""
    shift(linear_policy, a=-0.05, b=0.1)
    linear_policy.named_weights.snapshot("old")
    shift(linear_policy, a=0.2, b=0.15)
    return linear_policy


@pytest.fixture
def experience(policy, linear_experience):
    return linear_experience(policy, ADVANTAGES)


def item(policy, experience, i):
    return NoisedLatents.gather(policy, experience, torch.tensor([i]), Draws(DRAWS, FRACTION))


def by_hand(policy, experience, weighting, kl_beta, current):
    """Sums of the loss, the KL term and the distance to old, and the farthest ratio, at the weights `current`.

    Ratios and the sizes of errors are those of the policy's own weights, which is what the gradient holds constant.
    """
    loss = kl = distance = farthest = 0.0
    for i in range(len(experience) * DRAWS):
        at = item(policy, experience, i)
        c, t = at.condition.tensors["c"], at.levels.sigma.item()
        v, fixed, old, ref = (
            a * at.x + b * c
            for a, b in (current, numbers(policy), numbers(policy, "old"), numbers(policy, "reference"))
        )
        log_prob, held, before = (
            -WEIGHTINGS[weighting](moved - at.target, size - at.target, t).item()
            for moved, size in ((v, fixed), (fixed, fixed), (old, old))
        )
        ratio = math.exp(held - before)
        farthest = max(farthest, abs(ratio - 1))
        loss -= ratio * experience.advantages_N[i % 5].item() * log_prob
        kl += (v - ref).square().mean().item()
        distance += (v - old).square().mean().item()
    return loss + kl_beta * kl, kl, distance, farthest


def gradients(policy, loss):
    return torch.autograd.grad(loss.total, [policy.a, policy.b])


@pytest.mark.parametrize(("weighting", "kl_beta"), CASES)
def test_loss_by_hand(policy, experience, weighting, kl_beta):
    loss = elbo(weighting=weighting, kl_beta=kl_beta).loss(policy, experience, ITEMS)
    total, kl, distance, farthest = by_hand(policy, experience, weighting, kl_beta, numbers(policy))
    assert loss.total.item() == pytest.approx(total, rel=1e-9)
    assert loss.sums["loss"].item() == pytest.approx(total, rel=1e-9)
    assert loss.sums["distance_to_old"].item() == pytest.approx(distance, rel=1e-9)
    assert loss.sums["kl"].item() == pytest.approx(kl, rel=1e-9) if kl_beta else "kl" not in loss.sums
    assert loss.maxima["ratio_to_old"].item() == pytest.approx(farthest, rel=1e-9) and farthest > 0.05


@pytest.mark.parametrize(("weighting", "kl_beta"), CASES)
def test_gradient_against_finite_differences(policy, experience, weighting, kl_beta):
    actual = gradients(policy, elbo(weighting=weighting, kl_beta=kl_beta).loss(policy, experience, ITEMS))
    (a, b), step = numbers(policy), 1e-6
    for gradient, da, db in zip(actual, (step, 0), (0, step), strict=True):
        up, down = (by_hand(policy, experience, weighting, kl_beta, (a + s * da, b + s * db))[0] for s in (1, -1))
        assert gradient.item() == pytest.approx((up - down) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_at_the_old_weights_it_is_reinforce(policy, linear_experience, weighting):
    """The gradient is minus the advantage times that of the log-likelihood, whatever the advantage's size."""
    policy.named_weights.snapshot("old")

    def gradient(advantage):
        one = linear_experience(policy, [advantage] * 5).take(torch.tensor([1]))
        loss = elbo(weighting=weighting).loss(policy, one, torch.arange(DRAWS))
        assert loss.maxima["ratio_to_old"] < 1e-12 and loss.sums["distance_to_old"] == 0
        return torch.stack(gradients(policy, loss))

    unit = gradient(1.0)
    assert unit.norm() > 1e-3
    for advantage in (2.5, -1.0, -40.0, 0.0):
        torch.testing.assert_close(gradient(advantage), advantage * unit, rtol=1e-9, atol=1e-12)


def test_no_ratio_is_clipped(policy, experience):
    """On either side of 1 and for either sign of the advantage, the gradient is the ratio's times REINFORCE's."""
    met = set()
    for i in range(len(ITEMS)):
        at = item(policy, experience, i)
        v = at.predict(policy)
        log_prob, before = -at.error(v), -at.error(at.predict_with(policy, "old"))
        ratio = (log_prob - before).exp().item()
        met.add((ratio > 1, at.advantages.item() > 0))
        expected = torch.autograd.grad(-ratio * at.advantages * log_prob, [policy.a, policy.b])
        actual = gradients(policy, elbo(weighting="simple").loss(policy, experience, torch.tensor([i])))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert len(met) == 4 and elbo().clip_range is None


def test_on_policy_the_simple_weighting_is_awm_without_its_penalty(policy, linear_experience):
    policy.named_weights.snapshot("old")
    experience = linear_experience(policy, ADVANTAGES)
    awm = AWM(AWMSettings(draws=DRAWS, time_fraction=FRACTION, kl_beta=0.0, average_beta=0.0))
    ours, theirs = (o.loss(policy, experience, ITEMS) for o in (elbo(weighting="simple"), awm))
    torch.testing.assert_close(gradients(policy, ours), gradients(policy, theirs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", PREDICTIONS)
def test_the_path_weight_is_that_of_the_bound(form):
    """For data of N(0, 1) and its own best network the bound is tight, so that differences are those of log N(0, 1).

    The level t is uniform in the bound. The error is a square in eps, so two values of eps have its expectation.
    """
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    size = 1 if form == "flow" else (t.square() + (1 - t).square()).sqrt()
    levels, prediction = Levels((1 - t) / size, t / size, t), PREDICTIONS[form]
    known = Condition({"c": t})

    def log_prob(data):
        values = []
        for noise in (-1.0, 1.0):
            x0, eps = torch.full((len(t), 1), data, dtype=torch.float64), torch.full((len(t), 1), noise).double()
            x = prediction.mix(x0, eps, levels)
            along = x / (levels.alpha.square() + levels.sigma.square())[:, None]
            output = prediction.target(levels.alpha[:, None] * along, levels.sigma[:, None] * along, levels)
            target = prediction.target(x0, eps, levels)
            noised = NoisedLatents(t, t, x0, x, target, levels, prediction, t, known, 1.0)
            values.append(elbo(weighting="path_kl")._log_prob(noised, output).mean().item())
        return sum(values) / 2

    normal = torch.distributions.Normal(0.0, 1.0)
    for data in (0.5, 1.0, -2.0):
        expected = (normal.log_prob(torch.tensor(data)) - normal.log_prob(torch.tensor(0.0))).item()
        assert log_prob(data) - log_prob(0.0) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_step_nears_what_was_good(policy, linear_experience, weighting, advantage):
    objective = ELBO(ELBOSettings(draws=1, time_fraction=FRACTION, kl_beta=0.0, weighting=weighting))
    one = linear_experience(policy, [advantage] * 5).take(torch.tensor([2]))
    at = NoisedLatents.gather(policy, one, torch.tensor([0]), Draws(1, FRACTION))
    before = at.error(at.predict(policy)).item()
    da, db = gradients(policy, objective.loss(policy, one, torch.tensor([0])))
    shift(policy, a=-1e-3 * da.item(), b=-1e-3 * db.item())
    assert (before - at.error(at.predict(policy)).item()) * advantage > 1e-6


def test_kl_and_its_gradient_are_zero_at_the_reference(linear_policy, linear_experience):
    linear_policy.named_weights.snapshot("old")
    experience = linear_experience(linear_policy, ADVANTAGES)
    with_kl, without = (elbo(kl_beta=beta).loss(linear_policy, experience, ITEMS) for beta in (1.0, 0.0))
    assert with_kl.sums["kl"] == 0 and with_kl.total == without.total
    assert gradients(linear_policy, with_kl) == gradients(linear_policy, without)


def test_no_gradient_reaches_the_old_or_the_reference_weights(policy, experience):
    before = [numbers(policy, name) for name in ("old", "reference")]
    elbo(kl_beta=0.3).loss(policy, experience, ITEMS).total.backward()
    assert policy.a.grad is not None and policy.a.grad != 0
    assert [numbers(policy, name) for name in ("old", "reference")] == before


def test_several_updates_compare_with_the_weights_that_sampled(policy, experience):
    """Nothing is prepared: `old` stays where it was until the updates of the rollout are done."""
    assert all(elbo().prepare(policy, experience, 4, updates) is experience for updates in (1, 2))
    shift(policy, a=0.1)
    loss = elbo().loss(policy, experience, ITEMS)
    assert loss.total.item() == pytest.approx(
        by_hand(policy, experience, "adaptive", 0.0, numbers(policy))[0], rel=1e-9
    )


def test_what_it_asks_for():
    settings = ELBOSettings()
    assert settings.stores == "latents" and not settings.trains_transitions and not settings.whole_groups
    assert settings.rollout_weights == "old" and settings.items_per_trajectory(10) == 4
    assert [settings.averages["old"].decay(n) for n in (1, 100, 2000)] == pytest.approx([1e-3, 0.1, 0.5])
    assert (settings.extra_forwards, ELBOSettings(kl_beta=0.0).extra_forwards) == (2, 1)
