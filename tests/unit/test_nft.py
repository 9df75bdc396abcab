"""DiffusionNFT's loss on a policy of two weights, against loops over items and finite differences."""

from __future__ import annotations

import pytest
import torch

from progrpo.objectives.forward_process import Draws, NoisedLatents
from progrpo.objectives.nft import NFT
from progrpo.objectives.settings import NFTSettings
from tests.support.linear import numbers, shift

ADVANTAGES = (1.5, -0.5, -1.0, 2.0, -7.0)  # the last is beyond what the clip allows
DRAWS, FRACTION, CLIP = 3, 0.9, 5.0
ITEMS = torch.arange(5 * DRAWS)


def nft(**settings):
    return NFT(NFTSettings(draws=DRAWS, time_fraction=FRACTION, **{"adv_clip_max": CLIP, "kl_beta": 0.0, **settings}))


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


def by_hand(policy, experience, beta, kl_beta, current):
    """Sums of the loss, of the KL term and of the distance to old at the weights `current`. Errors are divided by what
    the policy's own weights make of them, which is what the gradient holds constant."""
    loss = kl = distance = 0.0
    for i in range(len(experience) * DRAWS):
        at = item(policy, experience, i)
        c, x, x0, sigma = at.condition.tensors["c"], at.x, at.x0, at.levels.sigma
        v, fixed, old, ref = (
            a * x + b * c for a, b in (current, numbers(policy), numbers(policy, "old"), numbers(policy, "reference"))
        )

        def error(way, v, fixed, old=old, x=x, x0=x0, sigma=sigma):
            v, fixed = ((1 - way) * old + way * velocity for velocity in (v, fixed))
            return ((x - sigma * v - x0) ** 2).mean() / (x - sigma * fixed - x0).abs().mean()

        r = (min(max(experience.advantages_N[i % 5].item() / CLIP, -1), 1) + 1) / 2
        loss += CLIP * (r * error(beta, v, fixed) + (1 - r) * error(-beta, v, fixed)).item() / beta
        kl += ((v - ref) ** 2).mean().item()
        distance += ((v - old) ** 2).mean().item()
    return loss + kl_beta * kl, kl, distance


def gradients(policy, loss):
    return torch.autograd.grad(loss.total, [policy.a, policy.b])


@pytest.mark.parametrize(("beta", "kl_beta"), [(1.0, 0.0), (0.5, 0.0), (0.1, 0.3), (1.0, 0.3)])
def test_loss_by_hand(policy, experience, beta, kl_beta):
    loss = nft(beta=beta, kl_beta=kl_beta).loss(policy, experience, ITEMS)
    total, kl, distance = by_hand(policy, experience, beta, kl_beta, numbers(policy))
    assert loss.total.item() == pytest.approx(total, rel=1e-9)
    assert loss.sums["loss"].item() == pytest.approx(total, rel=1e-9)
    assert loss.sums["distance_to_old"].item() == pytest.approx(distance, rel=1e-9)
    assert loss.sums["kl"].item() == pytest.approx(kl, rel=1e-9) if kl_beta else "kl" not in loss.sums
    assert not loss.maxima


@pytest.mark.parametrize(("beta", "kl_beta"), [(1.0, 0.0), (0.5, 0.0), (0.1, 0.3), (1.0, 0.3)])
def test_gradient_against_finite_differences(policy, experience, beta, kl_beta):
    actual = gradients(policy, nft(beta=beta, kl_beta=kl_beta).loss(policy, experience, ITEMS))
    (a, b), step = numbers(policy), 1e-6
    for gradient, da, db in zip(actual, (step, 0), (0, step), strict=True):
        up, down = (by_hand(policy, experience, beta, kl_beta, (a + s * da, b + s * db))[0] for s in (1, -1))
        assert gradient.item() == pytest.approx((up - down) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_guidance_that_sampled_is_not_trained(policy, linear_experience, guidance_scale):
    experience = linear_experience(policy, ADVANTAGES, guidance_scale=guidance_scale)
    total = by_hand(policy, experience, 1.0, 0.0, numbers(policy))[0]
    assert nft().loss(policy, experience, ITEMS).total.item() == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize(("advantage", "r"), [(0.0, 0.5), (CLIP, 1.0), (2 * CLIP, 1.0), (-CLIP, 0.0), (1.0, 0.6)])
def test_optimality_is_a_share_of_the_clip(policy, linear_experience, advantage, r):
    """All of L+ at the clip and above, all of L- at its minus and below, and in proportion between."""

    def total(a):
        return nft(beta=0.5).loss(policy, linear_experience(policy, [a] * 5), ITEMS).total.item()

    assert total(advantage) == pytest.approx(r * total(CLIP) + (1 - r) * total(-CLIP), rel=1e-9)


def test_with_beta_one_the_positive_policy_is_the_current_one_and_the_negative_its_mirror_image(policy, experience):
    one = experience.take(torch.tensor([3]))
    at = NoisedLatents.gather(policy, one, torch.tensor([0]), Draws(DRAWS, FRACTION))
    v, old = at.predict(policy).detach(), at.predict_with(policy, "old")
    for advantage, velocity in ((CLIP, v), (-CLIP, 2 * old - v)):
        off = at.x - at.levels.sigma * velocity - at.x0
        one.advantages_N[0] = advantage
        expected = CLIP * off.square().mean() / off.abs().mean()
        assert nft().loss(policy, one, torch.tensor([0])).total.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_at_the_old_weights_the_gradient_is_proportional_to_the_advantage(policy, linear_experience, beta):
    policy.named_weights.snapshot("old")

    def gradient(advantage):
        one = linear_experience(policy, [advantage] * 5).take(torch.tensor([1]))
        return torch.stack(gradients(policy, nft(beta=beta).loss(policy, one, torch.arange(DRAWS))))

    unit = gradient(1.0)
    assert unit.norm() > 1e-3
    for advantage in (2.5, -1.0, -4.0, 0.0):
        torch.testing.assert_close(gradient(advantage), advantage * unit, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_step_nears_what_was_good(policy, linear_experience, advantage):
    policy.named_weights.snapshot("old")
    objective = NFT(NFTSettings(draws=1, time_fraction=FRACTION, adv_clip_max=CLIP, kl_beta=0.0))
    one = linear_experience(policy, [advantage] * 5).take(torch.tensor([2]))
    at = NoisedLatents.gather(policy, one, torch.tensor([0]), Draws(1, FRACTION))
    before = at.error(at.predict(policy)).item()
    da, db = gradients(policy, objective.loss(policy, one, torch.tensor([0])))
    shift(policy, a=-1e-3 * da.item(), b=-1e-3 * db.item())
    assert (before - at.error(at.predict(policy)).item()) * advantage > 1e-6


def test_kl_and_its_gradient_are_zero_at_the_reference(linear_policy, linear_experience):
    linear_policy.named_weights.snapshot("old")
    experience = linear_experience(linear_policy, ADVANTAGES)
    with_kl, without = (nft(kl_beta=beta).loss(linear_policy, experience, ITEMS) for beta in (1.0, 0.0))
    assert with_kl.sums["kl"] == 0 and with_kl.sums["distance_to_old"] == 0
    assert with_kl.total == without.total
    assert gradients(linear_policy, with_kl) == gradients(linear_policy, without)


def test_no_gradient_reaches_the_old_or_the_reference_weights(policy, experience):
    before = [numbers(policy, name) for name in ("old", "reference")]
    nft(kl_beta=0.3).loss(policy, experience, ITEMS).total.backward()
    assert policy.a.grad is not None and policy.a.grad != 0
    assert [numbers(policy, name) for name in ("old", "reference")] == before


def test_a_final_latent_that_is_met_exactly_gives_no_infinite_loss(policy, linear_experience):
    """Where v is the truth its error is divided by a small number, not by zero."""
    experience = linear_experience(policy, ADVANTAGES)
    at = item(policy, experience, 0)
    v = at.target.clone().requires_grad_()
    error = at.normalised_error(v)
    error.sum().backward()
    assert error.item() == pytest.approx(0, abs=1e-20) and v.grad is not None and v.grad.isfinite().all()


def test_what_it_asks_for(policy, experience):
    objective = nft()
    assert (
        objective.settings.items_per_trajectory(len(experience.trajectories.path)) == DRAWS
        and objective.settings.stores == "latents"
    )
    assert objective.settings.rollout_weights == "old" and set(objective.settings.averages) == {"old"}
    assert objective.prepare(policy, experience, 4, 2) is experience
    assert [objective.settings.averages["old"].decay(n) for n in (1, 100, 500, 900)] == [0.001, 0.1, 0.5, 0.5]
