"""AWM's loss on a policy of two weights, against loops over items and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from progrpo.objectives.awm import AWM
from progrpo.objectives.forward_process import Draws, NoisedLatents
from progrpo.objectives.settings import AWMSettings
from progrpo.recipes import load_recipe
from tests.support.linear import numbers, shift

ADVANTAGES = (1.5, -0.5, -1.0, 2.0, -2.0)
DRAWS, FRACTION, CLIP = 3, 0.9, 0.15
ITEMS = torch.arange(5 * DRAWS)
WEIGHTINGS = {  # of an error e at the noise level t: minus the "log-probability"
    "uniform": lambda e, t: e,
    "t": lambda e, t: t * e,
    "t2": lambda e, t: t * t * e,
    "huber": lambda e, t: t * (math.sqrt(e + 1e-10) - 1e-5),
    "ghuber": lambda e, t: 4 * t * (math.sqrt(math.sqrt(e + 1e-10)) - 10**-2.5),
}


def awm(**settings):
    return AWM(
        AWMSettings(
            draws=DRAWS, time_fraction=FRACTION, **{"clip_range": CLIP, "kl_beta": 0.0, "average_beta": 0.0, **settings}
        )
    )


@pytest.fixture
def policy(linear_policy):
    """Its reference, its average and its current weights are three."""
    shift(linear_policy, a=-0.05, b=0.1)
    linear_policy.named_weights.snapshot("average")
    shift(linear_policy, a=0.1, b=-0.05)
    return linear_policy


@pytest.fixture
def experience(policy, linear_experience):
    return linear_experience(policy, ADVANTAGES)


def item(policy, experience, i):
    return NoisedLatents.gather(policy, experience, torch.tensor([i]), Draws(DRAWS, FRACTION))


def velocity(at, weights):
    return weights[0] * at.x + weights[1] * at.condition.tensors["c"]


def log_prob(at, weights, weighting):
    off = velocity(at, weights) - at.target
    return -WEIGHTINGS[weighting]((off**2).mean().item(), at.levels.sigma.item())


def by_hand(policy, experience, objective, old):
    """Sums over items, and the numbers of ratios outside the range and of those cut; `old` are the weights before."""
    sums = dict.fromkeys(("loss", "outside", "cut", "reference", "average"), 0.0)
    deviation = 0.0
    for i in range(len(experience) * DRAWS):
        at = item(policy, experience, i)
        advantage = experience.advantages_N[i % 5].item() * objective.settings.adv_scale
        now, then = (log_prob(at, w, objective.settings.weighting) for w in (numbers(policy), old))
        ratio = math.exp(now - then)
        bounded = min(max(ratio, 1 - objective.settings.clip_range), 1 + objective.settings.clip_range)
        sums["loss"] += max(-advantage * ratio, -advantage * bounded)
        sums["outside"] += bounded != ratio
        sums["cut"] += -advantage * bounded > -advantage * ratio
        deviation = max(deviation, abs(ratio - 1))
        for name, beta in (("reference", objective.settings.kl_beta), ("average", objective.settings.average_beta)):
            away = velocity(at, numbers(policy)) - velocity(at, numbers(policy, name))
            sums[name] += (away**2).mean().item()
            sums["loss"] += beta * (away**2).mean().item()
    return sums, deviation


def gradients(policy, loss):
    return torch.autograd.grad(loss.total, [policy.a, policy.b])


def moved(policy, experience, objective):
    """The experience as an objective of two updates leaves it, and a policy that has gone on since."""
    prepared, old = objective.prepare(policy, experience, 4, 2), numbers(policy)
    shift(policy, a=0.15, b=-0.1)
    return prepared, old


CASES = [
    {"weighting": "uniform"},
    {"weighting": "t"},
    {"weighting": "t2"},
    {"weighting": "huber", "clip_range": 0.05},
    {"weighting": "ghuber", "clip_range": 0.05},
    {"adv_scale": 0.2},
    {"kl_beta": 0.3},
    {"average_beta": 0.7},
    {"weighting": "t", "kl_beta": 0.3, "average_beta": 0.7},
]


@pytest.mark.parametrize("settings", CASES)
def test_loss_by_hand(policy, experience, settings):
    objective = awm(**settings)
    prepared, old = moved(policy, experience, objective)
    loss = objective.loss(policy, prepared, ITEMS)
    expected, deviation = by_hand(policy, experience, objective, old)
    assert 0 < expected["cut"] < expected["outside"] < len(ITEMS)  # all branches are met
    assert loss.total.item() == pytest.approx(expected["loss"], rel=1e-9)
    assert loss.sums["loss"].item() == pytest.approx(expected["loss"], rel=1e-9)
    assert loss.sums["clip_fraction"].item() == expected["outside"]
    assert loss.maxima["ratio_max_deviation"].item() == pytest.approx(deviation, rel=1e-9)
    penalties = {
        "kl": ("reference", objective.settings.kl_beta),
        "distance_to_average": ("average", objective.settings.average_beta),
    }
    for name, (weights, beta) in penalties.items():
        assert (name in loss.sums) == (beta > 0)
        assert beta == 0 or loss.sums[name].item() == pytest.approx(expected[weights], rel=1e-9)


@pytest.mark.parametrize("settings", CASES)
def test_gradient_against_finite_differences(policy, experience, settings):
    objective, step = awm(**settings), 1e-6
    prepared, _ = moved(policy, experience, objective)
    actual = gradients(policy, objective.loss(policy, prepared, ITEMS))
    for name, gradient in zip("ab", actual, strict=True):
        around = []
        for sign in (1, -1):
            shift(policy, **{name: sign * step})
            around.append(objective.loss(policy, prepared, ITEMS).total.item())
            shift(policy, **{name: -sign * step})
        assert gradient.item() == pytest.approx((around[0] - around[1]) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("settings", CASES)
def test_with_one_update_nothing_is_prepared_and_the_loss_is_that_of_two_before_the_first(policy, experience, settings):
    objective = awm(**settings)
    once, twice = (objective.prepare(policy, experience, 4, updates) for updates in (1, 2))
    assert once is experience and once.prepared_ND is None
    assert twice.prepared_ND is not None and twice.prepared_ND.shape == (5, DRAWS)
    one, two = (objective.loss(policy, e, ITEMS) for e in (once, twice))
    assert one.total.item() == pytest.approx(two.total.item(), rel=1e-12)
    torch.testing.assert_close(gradients(policy, one), gradients(policy, two))
    assert one.maxima["ratio_max_deviation"] == 0 and two.maxima["ratio_max_deviation"] < 1e-12
    assert one.sums["clip_fraction"] == two.sums["clip_fraction"] == 0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_old_log_probs_are_prepared(policy, experience, weighting):
    prepared = awm(weighting=weighting).prepare(policy, experience, 4, 2).prepared_ND
    for i in range(len(ITEMS)):
        expected = log_prob(item(policy, experience, i), numbers(policy), weighting)
        assert prepared[i % 5, i // 5].item() == pytest.approx(expected, rel=1e-12)


def test_on_policy_the_gradient_is_the_advantage_times_that_of_the_log_prob(policy, experience):
    """The same holds for the flow-matching loss: good samples are matched, bad ones unmatched."""
    actual = gradients(policy, awm(weighting="t").loss(policy, experience, ITEMS))
    at = NoisedLatents.gather(policy, experience, ITEMS, Draws(DRAWS, FRACTION))
    plain = (at.advantages * at.levels.sigma * at.error(at.predict(policy))).sum()
    torch.testing.assert_close(actual, torch.autograd.grad(plain, [policy.a, policy.b]))


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_step_nears_what_was_good(policy, linear_experience, advantage, updates):
    objective = AWM(AWMSettings(draws=1, time_fraction=FRACTION, clip_range=CLIP, kl_beta=0.0, average_beta=0.0))
    one = linear_experience(policy, [advantage] * 5).take(torch.tensor([2]))
    one = objective.prepare(policy, one, 4, updates)
    at = NoisedLatents.gather(policy, one, torch.tensor([0]), Draws(1, FRACTION))
    before = at.error(at.predict(policy)).item()
    da, db = gradients(policy, objective.loss(policy, one, torch.tensor([0])))
    shift(policy, a=-1e-3 * da.item(), b=-1e-3 * db.item())
    assert (before - at.error(at.predict(policy)).item()) * advantage > 1e-6


def test_penalties_and_their_gradients_are_zero_where_the_policy_has_not_moved(linear_policy, linear_experience):
    linear_policy.named_weights.snapshot("average")
    experience = linear_experience(linear_policy, ADVANTAGES)
    held = awm(kl_beta=1.0, average_beta=1.0).loss(linear_policy, experience, ITEMS)
    free = awm().loss(linear_policy, experience, ITEMS)
    assert held.sums["kl"] == 0 and held.sums["distance_to_average"] == 0
    assert held.total == free.total and gradients(linear_policy, held) == gradients(linear_policy, free)


@pytest.mark.parametrize(("penalty", "to"), [("kl_beta", "reference"), ("average_beta", "average")])
def test_a_penalty_leads_back_to_its_own_weights(policy, linear_experience, penalty, to):
    experience, objective = linear_experience(policy, [0.0] * 5), awm(**{penalty: 1.0})
    (a, b), home = numbers(policy), numbers(policy, to)
    da, db = gradients(policy, objective.loss(policy, experience, ITEMS))
    assert da.item() * (a - home[0]) + db.item() * (b - home[1]) > 0
    assert numbers(policy, to) == home


@pytest.mark.parametrize("settings", [{}, {"kl_beta": 0.5, "average_beta": 0.2}])
@pytest.mark.parametrize("updates", [1, 2])
def test_neither_the_cut_nor_the_order_of_items_matters(policy, experience, settings, updates):
    objective = awm(**settings)
    prepared = objective.prepare(policy, experience, 64, updates)
    torch.testing.assert_close(objective.prepare(policy, experience, 2, updates).prepared_ND, prepared.prepared_ND)
    shift(policy, a=0.15, b=-0.1)
    whole = objective.loss(policy, prepared, ITEMS)
    shuffled = ITEMS[torch.randperm(15, generator=torch.Generator().manual_seed(2))]
    expected = list(gradients(policy, whole))
    for cut in (ITEMS.split(1), ITEMS.split(4), [shuffled], shuffled.split(4)):
        parts = [objective.loss(policy, prepared, items) for items in cut]
        for name, value in whole.sums.items():
            assert sum(p.sums[name].item() for p in parts) == pytest.approx(value.item(), rel=1e-9), name
        deviation = max(p.maxima["ratio_max_deviation"].item() for p in parts)
        assert deviation == pytest.approx(whole.maxima["ratio_max_deviation"].item(), rel=1e-9)
        actual = [sum(g) for g in zip(*(gradients(policy, p) for p in parts), strict=True)]
        torch.testing.assert_close(actual, expected)


def test_old_log_probs_stay_with_their_trajectories(policy, experience):
    objective = awm()
    prepared, _ = moved(policy, experience, objective)
    some = prepared.take(torch.tensor([4, 1]))
    for n, row in enumerate((4, 1)):
        for d in range(DRAWS):
            there = objective.loss(policy, prepared, torch.tensor([d * 5 + row])).total.item()
            assert objective.loss(policy, some, torch.tensor([d * 2 + n])).total.item() == pytest.approx(there)


def test_what_it_asks_for(experience):
    objective = awm()
    assert (
        objective.settings.items_per_trajectory(len(experience.trajectories.path)) == DRAWS
        and objective.settings.stores == "latents"
    )
    assert objective.settings.rollout_weights == "current" and set(objective.settings.averages) == {"average"}
    assert [objective.settings.averages["average"].decay(n) for n in (1, 100, 2000)] == pytest.approx([3e-4, 0.03, 0.3])


def test_the_authors_settings_differ_from_flow_factorys():
    """Both public configurations for SD3.5 differ in the clip of advantages, their divisor and the average's decay."""
    authors, flow_factory = load_recipe("sd35m-awm").objective.awm, AWMSettings()
    averages = [c.averages["average"] for c in (authors, flow_factory)]
    assert [[a.decay(n) for n in (1, 100, 250, 400, 2000)] for a in averages] == [
        pytest.approx([0.001, 0.1, 0.25, 0.3, 0.3]),
        pytest.approx([0.0003, 0.03, 0.075, 0.12, 0.3]),
    ]
    largest = [c.adv_clip_max * c.adv_scale for c in (authors, flow_factory)]
    assert largest == [1.0, 1.0] and (authors.adv_clip_max, flow_factory.adv_clip_max) == (5.0, 1.0)
    assert (authors.weighting, authors.huber_power, authors.clip_range) == ("ghuber", 0.25, 1.0)
    assert (authors.draws, authors.time_fraction, authors.kl_beta, authors.average_beta) == (6, 0.9, 1e-4, 1.0)
