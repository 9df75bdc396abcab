"""GRPO's loss on a policy of two weights, against loops over torch.distributions and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from progrpo.objectives.grpo import GRPO

ADVANTAGES = (1.5, -0.5, -1.0, 2.0, -2.0)
CLIP = 0.05
ITEMS = torch.arange(10)


def gaussian(policy, experience, transition, row, weights="current"):
    """The distribution of one transition's next latent, written out."""
    x = transition.x_NCHW[row]
    sigma, sigma_next = experience.sigmas_T1[transition.step], experience.sigmas_T1[transition.step + 1]
    c = experience.condition.tensors["c"][experience.trajectories.group_N[row]]
    with policy.weights(weights):
        v = policy.a * x + experience.guidance_scale * policy.b * c
    h, s = sigma - sigma_next, experience.rates_T[transition.step]
    x0, eps = x - sigma * v, x + (1 - sigma) * v
    mean = (1 - sigma_next) * x0 + sigma_next * eps - s**2 * h / 2 * eps / sigma  # ODE step plus drift towards the data
    return Normal(mean, s * h.sqrt())


def by_hand(policy, experience, kl_beta=0.0, of=lambda gaussian, reference, h: kl_divergence(gaussian, reference)):
    """Sum of the loss over all items, with the clipped items and the largest |ratio - 1|."""
    total, clipped, deviation = 0.0, 0, 0.0
    for t in experience.trajectories.path:
        for row, advantage in enumerate(experience.advantages_N.tolist()):
            now = gaussian(policy, experience, t, row)
            ratio = (now.log_prob(t.x_next_NCHW[row]).mean() - t.log_prob_N[row]).exp().item()
            total += max(-advantage * ratio, -advantage * min(max(ratio, 1 - CLIP), 1 + CLIP))
            h = experience.sigmas_T1[t.step] - experience.sigmas_T1[t.step + 1]
            total += kl_beta * of(now, gaussian(policy, experience, t, row, "reference"), h).mean().item()
            clipped += abs(ratio - 1) > CLIP
            deviation = max(deviation, abs(ratio - 1))
    return total, clipped, deviation


def gradients(policy, loss):
    return torch.autograd.grad(loss.total, [policy.a, policy.b])


@torch.no_grad()
def shift(policy, a=0.0, b=0.0):
    policy.a += a
    policy.b += b


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_loss_by_hand(linear_policy, linear_experience, guidance_scale):
    experience = linear_experience(linear_policy, ADVANTAGES, off=0.05, guidance_scale=guidance_scale)
    shift(linear_policy, a=0.05, b=0.02)
    loss = GRPO(CLIP).loss(linear_policy, experience, ITEMS)
    total, clipped, deviation = by_hand(linear_policy, experience)
    assert 0 < clipped < 10  # both branches are met
    assert loss.total.item() == pytest.approx(total, rel=1e-9)
    assert loss.sums["loss"].item() == pytest.approx(total, rel=1e-9)
    assert loss.sums["clip_fraction"].item() == clipped
    assert loss.maxima["ratio_max_deviation"].item() == pytest.approx(deviation, rel=1e-9)
    assert "kl" not in loss.sums


@pytest.mark.parametrize(("kl_beta", "guidance_scale"), [(0.0, 1.0), (0.3, 1.0), (0.3, 3.0)])
def test_gradient_against_finite_differences(linear_policy, linear_experience, kl_beta, guidance_scale):
    experience = linear_experience(linear_policy, ADVANTAGES, off=0.05, guidance_scale=guidance_scale)
    shift(linear_policy, a=0.05, b=0.02)
    grpo, step = GRPO(CLIP, kl_beta=kl_beta), 1e-6
    found = gradients(linear_policy, grpo.loss(linear_policy, experience, ITEMS))
    for name, gradient in zip("ab", found, strict=True):
        around = []
        for sign in (1, -1):
            shift(linear_policy, **{name: sign * step})
            around.append(grpo.loss(linear_policy, experience, ITEMS).total.item())
            shift(linear_policy, **{name: -sign * step})
        assert gradient.item() == pytest.approx((around[0] - around[1]) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_step_makes_what_was_good_likelier(linear_policy, linear_experience, advantage):
    experience = linear_experience(linear_policy, [advantage] + [0.0] * 4)
    before = [t.log_prob_N[0] for t in experience.trajectories.path]
    loss = GRPO(CLIP).loss(linear_policy, experience, ITEMS)
    da, db = gradients(linear_policy, loss)
    shift(linear_policy, a=-1e-3 * da.item(), b=-1e-3 * db.item())
    path = experience.trajectories.path
    after = [gaussian(linear_policy, experience, t, 0).log_prob(t.x_next_NCHW[0]).mean() for t in path]
    change = sum(now.item() - then.item() for now, then in zip(after, before, strict=True))
    assert change * advantage > 1e-6


def test_on_policy_nothing_is_clipped_and_the_loss_is_minus_the_advantages(linear_policy, linear_experience):
    loss = GRPO(CLIP).loss(linear_policy, linear_experience(linear_policy, ADVANTAGES), ITEMS)
    assert loss.total.item() == pytest.approx(-2 * sum(ADVANTAGES), abs=1e-12)
    assert loss.maxima["ratio_max_deviation"].item() < 1e-12 and loss.sums["clip_fraction"] == 0


def test_kl_and_its_gradient_are_zero_at_the_reference(linear_policy, linear_experience):
    loss = GRPO(CLIP, kl_beta=1.0).loss(linear_policy, linear_experience(linear_policy, [0.0] * 5), ITEMS)
    assert loss.total == 0 and loss.sums["kl"] == 0
    assert all(gradient == 0 for gradient in gradients(linear_policy, loss))


def test_exact_kl_is_that_of_the_two_gaussians(linear_policy, linear_experience):
    experience = linear_experience(linear_policy, ADVANTAGES)
    shift(linear_policy, a=0.03, b=-0.05)
    loss = GRPO(CLIP, kl_beta=0.7).loss(linear_policy, experience, ITEMS)
    assert loss.total.item() == pytest.approx(by_hand(linear_policy, experience, 0.7)[0], rel=1e-9)
    assert loss.sums["kl"] > 0


def test_flow_grpos_kl_leaves_out_the_step_length(linear_policy, linear_experience):
    experience = linear_experience(linear_policy, ADVANTAGES)
    shift(linear_policy, a=0.03, b=-0.05)
    loss = GRPO(CLIP, kl_beta=0.7, kl_form="flow_grpo").loss(linear_policy, experience, ITEMS)
    expected, _, _ = by_hand(linear_policy, experience, 0.7, lambda p, q, h: kl_divergence(p, q) * h)
    assert loss.total.item() == pytest.approx(expected, rel=1e-9)


def test_kl_reaches_the_current_weights_and_not_the_reference(linear_policy, linear_experience):
    experience = linear_experience(linear_policy, [0.0] * 5)
    shift(linear_policy, a=0.1)
    da, _ = gradients(linear_policy, GRPO(CLIP, kl_beta=1.0).loss(linear_policy, experience, ITEMS))
    assert da > 0  # downhill is back to the reference
    assert linear_policy.named_weights.state_dict()["reference"]["a"] == 0.3


@pytest.mark.parametrize("kl_beta", [0.0, 0.5])
def test_neither_the_cut_nor_the_order_of_items_matters(linear_policy, linear_experience, kl_beta):
    experience = linear_experience(linear_policy, ADVANTAGES, off=0.05)
    shift(linear_policy, a=0.05, b=0.02)
    grpo = GRPO(CLIP, kl_beta=kl_beta)
    whole = grpo.loss(linear_policy, experience, ITEMS)
    shuffled = ITEMS[torch.randperm(10, generator=torch.Generator().manual_seed(2))]
    for cut in (ITEMS.split(1), ITEMS.split(3), [shuffled], shuffled.split(4)):
        parts = [grpo.loss(linear_policy, experience, items) for items in cut]
        for name, value in whole.sums.items():
            assert sum(p.sums[name].item() for p in parts) == pytest.approx(value.item(), rel=1e-9), name
        deviation = max(p.maxima["ratio_max_deviation"].item() for p in parts)
        assert deviation == pytest.approx(whole.maxima["ratio_max_deviation"].item(), rel=1e-9)
        found = [sum(g) for g in zip(*(gradients(linear_policy, p) for p in parts), strict=True)]
        torch.testing.assert_close(found, list(gradients(linear_policy, grpo.loss(linear_policy, experience, ITEMS))))


def test_an_item_is_a_transition_of_a_trajectory(linear_policy, linear_experience):
    experience = linear_experience(linear_policy, ADVANTAGES, off=0.05)
    assert GRPO(CLIP).items_per_trajectory(experience) == 2 and GRPO(CLIP).needs == "transitions"
    alone = experience.take(torch.tensor([3]))
    for transition in (0, 1):
        item = GRPO(CLIP).loss(linear_policy, experience, torch.tensor([transition * 5 + 3]))
        assert item.total == GRPO(CLIP).loss(linear_policy, alone, torch.tensor([transition])).total
