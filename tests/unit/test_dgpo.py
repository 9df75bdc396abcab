"""DGPO's loss on a policy of two weights, against loops over items and finite differences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from progrpo.objectives.dgpo import DGPO
from progrpo.objectives.forward_process import Draws, NoisedLatents
from progrpo.objectives.settings import DGPOSettings
from progrpo.training.update import Packing
from tests.support.linear import numbers, shift

ADVANTAGES = (1.5, -0.5, -1.0, 2.0, -2.0)
DRAWS, FRACTION, CLIP, BETA = 3, 0.6, 0.06, 4.0
ITEMS = torch.arange(5 * DRAWS)
GROUPS = ((0, 1, 2), (3, 4))


def dgpo(**settings):
    return DGPO(
        DGPOSettings(
            draws=DRAWS, time_fraction=FRACTION, **{"dpo_beta": BETA, "clip_range": CLIP, "kl_beta": 0.0, **settings}
        )
    )


@pytest.fixture
def policy(linear_policy):
    """Its reference, its average and its current weights are three."""
    shift(linear_policy, a=-0.15, b=0.1)
    linear_policy.named_weights.snapshot("average")
    shift(linear_policy, a=0.04, b=-0.02)
    return linear_policy


@pytest.fixture
def experience(policy, linear_experience):
    return linear_experience(policy, ADVANTAGES)


def item(policy, experience, i):
    return NoisedLatents.gather(policy, experience, torch.tensor([i]), Draws(DRAWS, FRACTION, shared=True))


def velocity(at, weights):
    return weights[0] * at.x + weights[1] * at.condition.tensors["c"]


def error(at, weights):
    return ((velocity(at, weights) - at.target) ** 2).mean().item()


def group_weights(policy, experience):
    """The weight of each trajectory and draw, by loops over groups."""
    weights = torch.empty(5, DRAWS, dtype=torch.float64)
    for d in range(DRAWS):
        for members in GROUPS:
            total = 0.0
            for n in members:
                at = item(policy, experience, d * 5 + n)
                gain = error(at, numbers(policy)) - error(at, numbers(policy, "reference"))
                total += experience.advantages_N[n].item() * BETA * gain / len(members)
            weights[list(members), d] = 1 / (1 + math.exp(-total))
    return weights


def by_hand(policy, experience, weights, kl_beta):
    """Sums of loss and KL over items; how many errors left the range, and how many are cut."""
    total = kl = 0.0
    outside = cut = 0
    for i in range(len(ITEMS)):
        at, (d, n) = item(policy, experience, i), divmod(i, 5)
        now, average = error(at, numbers(policy)), error(at, numbers(policy, "average"))
        bounded = min(max(now, average - CLIP), average + CLIP)
        weight = weights[n, d].item() * experience.advantages_N[n].item()
        total += max(weight * now, weight * bounded)
        outside += bounded != now
        cut += weight * bounded > weight * now
        kl += ((velocity(at, numbers(policy)) - velocity(at, numbers(policy, "reference"))) ** 2).mean().item()
    return total + kl_beta * kl, kl, outside, cut


def gradients(policy, loss):
    return torch.autograd.grad(loss.total, [policy.a, policy.b])


def moved(policy, experience, objective):
    """The experience as it is before the first update, and a policy that has gone on since."""
    prepared = objective.prepare(policy, experience, 4, 2)
    shift(policy, a=0.1, b=-0.15)
    return prepared


def test_weights_by_hand(policy, experience):
    actual = dgpo().prepare(policy, experience, 4, 2).prepared_ND
    expected = group_weights(policy, experience)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)
    assert actual.min() > 0.05 and actual.max() < 0.95 and actual.std() > 0.02  # not saturated, and not all the same
    for members in GROUPS:
        assert (actual[list(members)] == actual[members[0]]).all()


def test_a_group_that_is_undecided_has_weight_one_half(linear_policy, linear_experience):
    """At the reference itself nothing is preferred yet; in a group without advantages nothing ever is."""
    experience = linear_experience(linear_policy, ADVANTAGES)
    assert dgpo().prepare(linear_policy, experience, 4, 2).prepared_ND.eq(0.5).all()
    shift(linear_policy, a=0.3)
    weights = dgpo().prepare(linear_policy, linear_experience(linear_policy, [0.0] * 3 + [2.0, -2.0]), 4, 2).prepared_ND
    assert weights[:3].eq(0.5).all() and not weights[3:].eq(0.5).any()


def test_the_weight_is_above_one_half_where_the_policy_left_what_is_good(policy, experience):
    """Less than the reference's error on good members and more on bad ones lets the group rest."""
    for n, sign in ((0, 1.0), (0, -1.0)):
        one = experience.take(torch.tensor([n]))
        one = replace(one, advantages_N=torch.tensor([sign], dtype=torch.float64))
        actual = dgpo().prepare(policy, one, 4, 2).prepared_ND[0]
        for d in range(DRAWS):
            at = item(policy, one, d)
            worse = error(at, numbers(policy)) > error(at, numbers(policy, "reference"))
            assert (actual[d] > 0.5) == (worse == (sign > 0))


def test_members_without_an_advantage_count_in_the_group(policy, linear_experience):
    whole = linear_experience(policy, [1.5, 0.0, -1.0, 2.0, -2.0])
    full = dgpo().prepare(policy, whole, 4, 2).prepared_ND
    torch.testing.assert_close(full, group_weights(policy, whole), rtol=1e-9, atol=0)
    fewer = dgpo().prepare(policy, whole.take(torch.tensor([0, 2, 3, 4])), 4, 2).prepared_ND
    logit_full, logit_fewer = full.logit(), fewer.logit()
    torch.testing.assert_close(logit_fewer[0], logit_full[0] * 3 / 2)  # of two, not of three
    torch.testing.assert_close(fewer[2:], full[3:])


@pytest.mark.parametrize("kl_beta", [0.0, 0.3])
def test_loss_by_hand(policy, experience, kl_beta):
    objective = dgpo(kl_beta=kl_beta)
    weights = group_weights(policy, experience)
    prepared = moved(policy, experience, objective)
    loss = objective.loss(policy, prepared, ITEMS)
    total, kl, outside, cut = by_hand(policy, experience, weights, kl_beta)
    assert 0 < cut < outside < len(ITEMS)  # all branches are met
    assert loss.total.item() == pytest.approx(total, rel=1e-9)
    assert loss.sums["loss"].item() == pytest.approx(total, rel=1e-9)
    assert loss.sums["clip_fraction"].item() == outside
    assert loss.sums["kl"].item() == pytest.approx(kl, rel=1e-9) if kl_beta else "kl" not in loss.sums
    assert not loss.maxima


@pytest.mark.parametrize("kl_beta", [0.0, 0.3])
def test_gradient_against_finite_differences_at_constant_weights(policy, experience, kl_beta):
    objective, step = dgpo(kl_beta=kl_beta), 1e-6
    prepared = moved(policy, experience, objective)
    actual = gradients(policy, objective.loss(policy, prepared, ITEMS))
    for name, gradient in zip("ab", actual, strict=True):
        around = []
        for sign in (1, -1):
            shift(policy, **{name: sign * step})
            around.append(objective.loss(policy, prepared, ITEMS).total.item())
            shift(policy, **{name: -sign * step})
        assert gradient.item() == pytest.approx((around[0] - around[1]) / (2 * step), rel=1e-5)


def test_the_weight_is_constant_in_the_gradient_and_over_the_updates(policy, experience):
    prepared = dgpo().prepare(policy, experience, 4, 2)
    assert not prepared.prepared_ND.requires_grad
    before = prepared.prepared_ND.clone()
    moved(policy, experience, dgpo())
    dgpo().loss(policy, prepared, ITEMS).total.backward()
    assert torch.equal(prepared.prepared_ND, before)


@pytest.mark.parametrize(("side", "advantage", "flows"), [(1, 1, True), (1, -1, False), (-1, 1, False), (-1, -1, True)])
def test_beyond_the_range_only_the_way_back_has_a_gradient(policy, linear_experience, side, advantage, flows):
    """An error above the average's by more than the range may fall and not rise; one below it the reverse."""
    one = linear_experience(policy, [float(advantage)] * 5).take(torch.tensor([2]))
    objective = DGPO(DGPOSettings(draws=1, time_fraction=FRACTION, dpo_beta=BETA, clip_range=1e-3, kl_beta=0.0))
    prepared = objective.prepare(policy, one, 4, 1)
    policy.named_weights.snapshot("average")
    at = NoisedLatents.gather(policy, one, torch.tensor([0]), Draws(1, FRACTION, shared=True))
    da, db = torch.autograd.grad(at.error(at.predict(policy)).sum(), [policy.a, policy.b])
    length = side * 0.05 / math.hypot(da, db)
    shift(policy, a=length * da.item(), b=length * db.item())
    moves = at.error(at.predict(policy)).item() - at.error(at.predict_with(policy, "average")).item()
    assert moves * side > 2e-3
    actual = gradients(policy, objective.loss(policy, prepared, torch.tensor([0])))
    assert any(g != 0 for g in actual) == flows


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_step_nears_what_was_good(policy, linear_experience, advantage):
    objective = DGPO(DGPOSettings(draws=1, time_fraction=FRACTION, dpo_beta=BETA, kl_beta=0.0))
    policy.named_weights.snapshot("average")
    one = linear_experience(policy, [advantage] * 5).take(torch.tensor([2]))
    one = objective.prepare(policy, one, 4, 1)
    at = NoisedLatents.gather(policy, one, torch.tensor([0]), Draws(1, FRACTION, shared=True))
    before = at.error(at.predict(policy)).item()
    da, db = gradients(policy, objective.loss(policy, one, torch.tensor([0])))
    shift(policy, a=-1e-3 * da.item(), b=-1e-3 * db.item())
    assert (before - at.error(at.predict(policy)).item()) * advantage > 1e-6


def test_kl_and_its_gradient_are_zero_at_the_reference(linear_policy, linear_experience):
    linear_policy.named_weights.snapshot("average")
    experience = dgpo().prepare(linear_policy, linear_experience(linear_policy, ADVANTAGES), 4, 1)
    with_kl, without = (dgpo(kl_beta=beta).loss(linear_policy, experience, ITEMS) for beta in (1.0, 0.0))
    assert with_kl.sums["kl"] == 0 and with_kl.sums["clip_fraction"] == 0
    assert with_kl.total == without.total
    assert gradients(linear_policy, with_kl) == gradients(linear_policy, without)


def test_no_gradient_reaches_the_average_or_the_reference(policy, experience):
    prepared = moved(policy, experience, dgpo(kl_beta=0.3))
    before = [numbers(policy, name) for name in ("average", "reference")]
    dgpo(kl_beta=0.3).loss(policy, prepared, ITEMS).total.backward()
    assert policy.a.grad is not None and policy.a.grad != 0
    assert [numbers(policy, name) for name in ("average", "reference")] == before


def test_groups_are_weighed_alike_whatever_the_microbatch(policy, experience):
    objective = dgpo()
    prepared = objective.prepare(policy, experience, 64, 2)
    for microbatch in (1, 4):
        again = objective.prepare(policy, experience, microbatch, 2).prepared_ND
        torch.testing.assert_close(again, prepared.prepared_ND, rtol=1e-9, atol=0)


def test_a_share_of_the_trajectories_keeps_the_weights_of_the_whole_group(policy, experience):
    objective = dgpo()
    prepared = moved(policy, experience, objective)
    some = prepared.take(torch.tensor([4, 1]))
    for n, row in enumerate((4, 1)):
        for d in range(DRAWS):
            there = objective.loss(policy, prepared, torch.tensor([d * 5 + row])).total.item()
            assert objective.loss(policy, some, torch.tensor([d * 2 + n])).total.item() == pytest.approx(there)


def test_without_trajectories_nothing_is_prepared(policy, experience):
    nobody = experience.take(torch.empty(0, dtype=torch.long))
    assert dgpo().prepare(policy, nobody, 4, 2).prepared_ND.shape == (0, DRAWS)


def test_what_it_asks_for(policy, experience):
    objective = dgpo()
    assert (
        objective.settings.items_per_trajectory(len(experience.trajectories.path)) == DRAWS
        and objective.settings.stores == "latents"
    )
    assert objective.settings.rollout_weights == "current" and set(objective.settings.averages) == {"average"}
    with pytest.raises(AssertionError, match="prepare"):
        objective.loss(policy, experience, ITEMS)


@pytest.mark.parametrize("kl_beta", [0.0, 0.3])
@pytest.mark.parametrize("one_shape", [False, True])
def test_a_single_update_computes_the_weights_within_its_loss(policy, linear_experience, kl_beta, one_shape):
    """The same loss and gradient as with weights that were prepared before, item by item, with a pass less of each."""
    objective = dgpo(kl_beta=kl_beta)
    experience = linear_experience(policy, [1.5, 0.0, -1.0, 2.0, -2.0])
    prepared = objective.prepare(policy, experience, 64, 2)
    whole = objective.prepare(policy, experience, 64, 1)
    assert whole.prepared_ND is None and whole.group_size_N.tolist() == [3, 3, 3, 2, 2]
    telling = torch.tensor([0, 2, 3, 4])  # the update leaves out members without an advantage; they count in the size
    prepared, whole = prepared.take(telling), whole.take(telling)
    for microbatch in (2, 3, 4, 64):
        for part in Packing(microbatch, one_shape).batches(whole, DRAWS):
            actual = objective.loss(policy, whole, part).first(len(part.unique()))
            expected = objective.loss(policy, prepared, part.unique())
            torch.testing.assert_close(actual.loss_B, expected.loss_B, rtol=1e-9, atol=0)
            ours, theirs = (torch.autograd.grad(x.total, [policy.a, policy.b]) for x in (actual, expected))
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


def test_groups_that_do_not_fit_into_a_microbatch_are_weighed_before(policy, experience):
    assert dgpo().prepare(policy, experience, 2, 1).prepared_ND is not None
    assert dgpo().prepare(policy, experience, 3, 1).prepared_ND is None
