"""Objectives without trajectories on diffusion models that predict noise or v, against loops over items, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from progrpo.objectives.awm import AWM
from progrpo.objectives.dgpo import DGPO
from progrpo.objectives.elbo import ELBO
from progrpo.objectives.forward_process import Draws, NoisedLatents
from progrpo.objectives.nft import NFT
from progrpo.objectives.settings import AWMSettings, DGPOSettings, ELBOSettings, NFTSettings

ADVANTAGES = (1.5, -0.5, -1.0, 2.0, -2.0)
FORMS = ("epsilon", "v_prediction")
DRAWS, FRACTION = 3, 0.9
ITEMS = torch.arange(5 * DRAWS)
GROUPS = ((0, 1, 2), (3, 4))
GRID = (9, 5, 2, 0)
START, BEFORE, NOW = (0.3, -0.2), (0.25, -0.1), (0.45, 0.05)  # the reference's, an average's and the current weights


@torch.no_grad()
def become(policy, weights):
    policy.a.fill_(weights[0])
    policy.b.fill_(weights[1])


@pytest.fixture(params=FORMS)
def policy(request, linear_diffusion_policy):
    """Its reference, its old, its average and its current weights are three."""
    policy = linear_diffusion_policy(request.param)
    become(policy, BEFORE)
    for name in ("old", "average"):
        policy.named_weights.snapshot(name)
    become(policy, NOW)
    return policy


@pytest.fixture
def experience_of(policy, linear_experience):
    process = policy.process("ddim", 1.0)
    return lambda advantages: linear_experience(policy, advantages, process=process)


@pytest.fixture
def experience(experience_of):
    return experience_of(ADVANTAGES)


@dataclass
class Item:
    """One draw of one trajectory, written out."""

    form: str
    timestep: int
    alpha: float
    sigma: float
    x0: Tensor
    eps: Tensor
    c: float
    advantage: float

    @property
    def x(self):
        return self.alpha * self.x0 + self.sigma * self.eps

    @property
    def truth(self):
        return self.eps if self.form == "epsilon" else self.alpha * self.eps - self.sigma * self.x0

    def output(self, weights):
        return weights[0] * self.x + weights[1] * self.c + self.timestep / 100

    def denoised(self, output):
        if self.form == "epsilon":
            return (self.x - self.sigma * output) / self.alpha
        return self.alpha * self.x - self.sigma * output

    @property
    def velocity_weight(self):
        whole = self.alpha + self.sigma
        return (whole / self.alpha) ** 2 if self.form == "epsilon" else whole**2

    def error(self, weights):
        return ((self.output(weights) - self.truth) ** 2).mean().item()

    def apart(self, weights, others):
        return ((self.output(weights) - self.output(others)) ** 2).mean().item()


def items(policy, experience, shared=False):
    """Times are drawn at even steps below -1 and noise at the odd ones below those."""
    actual, trajectories = [], experience.trajectories
    for i in range(5 * DRAWS):
        d, n = divmod(i, 5)
        whose = trajectories.slot_N[n : n + 1], torch.tensor([-1]) if shared else trajectories.member_N[n : n + 1]
        share = (1 + math.erf(experience.noise.draw(*whose, -2 - 2 * d, ()).item() / math.sqrt(2))) / 2
        place = (d + share) / DRAWS * FRACTION * 3
        below = int(place)
        timestep = round(GRID[below] + (GRID[below + 1] - GRID[below]) * (place - below))
        signal = policy.signal[timestep].item()
        actual.append(
            Item(
                form=policy.prediction,
                timestep=timestep,
                alpha=math.sqrt(signal),
                sigma=math.sqrt(1 - signal),
                x0=trajectories.x_NCHW[n],
                eps=experience.noise.draw(*whose, -3 - 2 * d, (1, 2, 2))[0].double(),
                c=experience.condition.tensors["c"][trajectories.group_N[n]].item(),
                advantage=experience.advantages_N[n].item(),
            )
        )
    return actual


def gradients(policy, loss):
    return [g.item() for g in torch.autograd.grad(loss.total, [policy.a, policy.b])]


def test_three_levels_at_least_are_met(policy, experience):
    assert len({item.timestep for item in items(policy, experience)}) >= 4


@pytest.mark.parametrize("shared", [False, True])
def test_items_by_hand(policy, experience, shared):
    at = NoisedLatents.gather(policy, experience, ITEMS, Draws(DRAWS, FRACTION, shared))
    output = at.predict(policy)
    for i, item in enumerate(items(policy, experience, shared)):
        assert at.levels.timestep[i] == item.timestep and at.advantages[i] == item.advantage
        assert (at.levels.alpha[i], at.levels.sigma[i]) == pytest.approx((item.alpha, item.sigma), rel=1e-14)
        for actual, expected in (
            (at.x0[i], item.x0),
            (at.x[i], item.x),
            (at.target[i], item.truth),
            (output[i], item.output(NOW)),
            (at.denoised(output)[i], item.denoised(item.output(NOW))),
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        assert at.error(output)[i].item() == pytest.approx(item.error(NOW), rel=1e-12)
    torch.testing.assert_close(at.denoised(at.target), at.x0)  # the truth points to the data


# --- each objective ---------------------------------------------------------------------------------------------------


def nft_by_hand(policy, experience, beta, current=NOW):
    """Errors of x0 are divided by their own size at the policy's weights, which is constant in the gradient."""
    total = kl = 0.0
    for item in items(policy, experience):
        errors = []
        for way in (beta, -beta):
            moved, fixed = (
                item.denoised(way * item.output(weights) + (1 - way) * item.output(BEFORE)) - item.x0
                for weights in (current, NOW)
            )
            errors.append((moved**2).mean().item() / fixed.abs().mean().item())
        r = (item.advantage / 5 + 1) / 2
        total += 5 * (r * errors[0] + (1 - r) * errors[1]) / beta
        kl += item.apart(current, START)
    return total + 0.3 * kl, kl


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_nft_by_hand(policy, experience, beta):
    loss = NFT(NFTSettings(draws=DRAWS, time_fraction=FRACTION, beta=beta, kl_beta=0.3)).loss(policy, experience, ITEMS)
    total, kl = nft_by_hand(policy, experience, beta)
    assert loss.total.item() == pytest.approx(total, rel=1e-9) and loss.sums["kl"].item() == pytest.approx(kl, rel=1e-9)
    for k, gradient in enumerate(gradients(policy, loss)):
        up, down = (
            nft_by_hand(policy, experience, beta, tuple(w + s * 1e-6 * (j == k) for j, w in enumerate(NOW)))[0]
            for s in (1, -1)
        )
        assert gradient == pytest.approx((up - down) / 2e-6, rel=1e-5)


def ratio_terms(log_ratio, advantage, clip_range):
    ratio = math.exp(log_ratio)
    bounded = min(max(ratio, 1 - clip_range), 1 + clip_range)
    return max(-advantage * ratio, -advantage * bounded), bounded != ratio


@pytest.mark.parametrize("weighting", ["uniform", "t", "t2", "huber", "ghuber"])
def test_awm_by_hand(policy, experience, weighting):
    """The time that weighs an error is the share of noise sigma, not the timestep."""
    objective = AWM(
        AWMSettings(
            draws=DRAWS,
            time_fraction=FRACTION,
            weighting=weighting,
            clip_range=0.05,
            adv_scale=0.5,
            kl_beta=0.3,
            average_beta=0.7,
        )
    )
    prepared = objective.prepare(policy, experience, 4, 2)
    become(policy, later := (0.6, -0.1))
    loss, total, clipped = objective.loss(policy, prepared, ITEMS), 0.0, 0
    for item in items(policy, experience):
        power = {"huber": 0.5, "ghuber": 0.25}.get(weighting, 1.0)
        weight = {"uniform": 1.0, "t2": item.sigma**2, "ghuber": item.sigma * 4}.get(weighting, item.sigma)
        before, now = ((item.error(w) + 1e-10) ** power for w in (NOW, later))
        term, outside = ratio_terms(weight * (before - now), 0.5 * item.advantage, 0.05)
        total += term + 0.3 * item.apart(later, START) + 0.7 * item.apart(later, BEFORE)
        clipped += outside
    assert 0 < clipped < len(ITEMS) and loss.sums["clip_fraction"] == clipped
    assert loss.total.item() == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("weighting", ["adaptive", "simple", "path_kl"])
def test_elbo_by_hand(policy, experience, weighting):
    """A noise level is that of the flow model with as much noise for its data, and so is a velocity's error."""
    settings = ELBOSettings(draws=DRAWS, time_fraction=FRACTION, weighting=weighting, kl_beta=0.3)
    loss, total, farthest = ELBO(settings).loss(policy, experience, ITEMS), 0.0, 0.0
    for item in items(policy, experience):
        t = item.sigma / (item.alpha + item.sigma)
        log_probs = []
        for weights in (NOW, BEFORE):
            off = item.denoised(item.output(weights)) - item.x0
            scale = {"adaptive": t**2 / off.abs().mean().item(), "simple": 1.0, "path_kl": (1 - t) / (t + 1e-3)}
            log_probs.append(-scale[weighting] * (off / t).square().mean().item())
        ratio = math.exp(log_probs[0] - log_probs[1])
        farthest = max(farthest, abs(ratio - 1))
        total += 0.3 * item.apart(NOW, START) - ratio * item.advantage * log_probs[0]
    assert loss.total.item() == pytest.approx(total, rel=1e-9)
    assert loss.maxima["ratio_to_old"].item() == pytest.approx(farthest, rel=1e-9)


def test_dgpo_by_hand(policy, experience):
    objective = DGPO(DGPOSettings(draws=DRAWS, time_fraction=FRACTION, dpo_beta=4.0, clip_range=0.1, kl_beta=0.3))
    prepared = objective.prepare(policy, experience, 4, 2)
    all_items, weights = items(policy, experience, shared=True), torch.empty(5, DRAWS, dtype=torch.float64)
    for d in range(DRAWS):
        for members in GROUPS:
            gains = [
                4.0 * i.velocity_weight * (i.error(NOW) - i.error(START)) * i.advantage
                for i in (all_items[d * 5 + n] for n in members)
            ]
            weights[list(members), d] = 1 / (1 + math.exp(-sum(gains) / len(members)))
    torch.testing.assert_close(prepared.prepared_ND, weights, rtol=1e-9, atol=0)
    assert weights.std() > 0.02
    become(policy, later := (0.5, 0.0))
    loss, total, clipped = objective.loss(policy, prepared, ITEMS), 0.0, 0
    for i, item in enumerate(all_items):
        now, average, weight = item.error(later), item.error(BEFORE), weights[i % 5, i // 5].item() * item.advantage
        reach = 0.1 / item.velocity_weight
        bounded = min(max(now, average - reach), average + reach)
        total += max(weight * now, weight * bounded) + 0.3 * item.apart(later, START)
        clipped += bounded != now
    assert 0 < clipped < len(ITEMS) and loss.sums["clip_fraction"] == clipped
    assert loss.total.item() == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(
    "objective",
    [
        NFT(NFTSettings(draws=DRAWS, time_fraction=FRACTION, kl_beta=0.0)),
        NFT(NFTSettings(draws=DRAWS, time_fraction=FRACTION, beta=0.4, kl_beta=0.0)),
        AWM(AWMSettings(draws=DRAWS, time_fraction=FRACTION, weighting="t", kl_beta=0.0, average_beta=0.0)),
        DGPO(DGPOSettings(draws=DRAWS, time_fraction=FRACTION, dpo_beta=4.0, kl_beta=0.0)),
        ELBO(ELBOSettings(draws=DRAWS, time_fraction=FRACTION, kl_beta=0.0)),
        ELBO(ELBOSettings(draws=DRAWS, time_fraction=FRACTION, weighting="path_kl", kl_beta=0.0)),
    ],
)
def test_a_step_nears_what_was_good(policy, experience_of, objective, advantage):
    """The noised latents of a good picture are predicted better after it, those of a bad one worse."""
    for name in ("old", "average"):
        policy.named_weights.snapshot(name)
    for d in range(DRAWS):
        become(policy, NOW)
        one = experience_of([advantage] * 5).take(torch.tensor([2]))
        one = objective.prepare(policy, one, 4, 1)
        item = items(policy, experience_of([advantage] * 5), shared=isinstance(objective, DGPO))[d * 5 + 2]
        da, db = gradients(policy, objective.loss(policy, one, torch.tensor([d])))
        after = (NOW[0] - 1e-3 * da, NOW[1] - 1e-3 * db)
        assert (item.error(NOW) - item.error(after)) * advantage > 1e-7
