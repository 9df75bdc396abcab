"""The gradient noise scale: its two estimates over every draw of prompts there is, and its running averages."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from progrpo.config import OptimSettings
from progrpo.objectives.dgpo import DGPO
from progrpo.objectives.grpo import GRPO
from progrpo.objectives.settings import DGPOSettings, GRPOSettings
from progrpo.training.distributed import Ranks
from progrpo.training.loss_scale import LossScale
from progrpo.training.noise_scale import GradientMoments, NoiseScale, gradient_moments
from progrpo.training.update import Updater, half_of_each

PROMPTS = ((0, 1), (1, 2), (3, 4), (0, 2))
"""The trajectories of the prompts that are drawn from; the last prompt's have no advantage."""


class Still(torch.optim.SGD):
    """Descent that goes nowhere, and counts its steps."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1


@pytest.fixture
def drawn(linear_policy, linear_experience):
    """The experience of prompts by their places in PROMPTS, each a group and a slot of its own."""
    whole = linear_experience(linear_policy, [1.5, -0.5, -1.0, 2.0, -2.0])

    def of(prompts, first_slot=0):
        rows = torch.tensor([row for prompt in prompts for row in PROMPTS[prompt]])
        group_N = torch.arange(len(prompts)).repeat_interleave(2)
        experience = whole.take(rows)
        advantages_N = experience.advantages_N * torch.tensor([p != 3 for p in prompts])[group_N]
        return replace(
            experience,
            trajectories=replace(experience.trajectories, group_N=group_N, slot_N=group_N + first_slot),
            condition=whole.condition.take(whole.trajectories.group_N[rows[::2]]),
            advantages_N=advantages_N,
        )

    return of


@pytest.fixture
def updated(linear_policy):
    """The tally of an update, and the updater."""

    def of(experience, scale=None, objective=None, halves_members=False, **optim):
        still = Still(linear_policy.trainable.values())
        objective = objective or GRPO(GRPOSettings(clip_range=0.1))
        updater = Updater(linear_policy, objective, still, OptimSettings(**optim), Ranks(), scale)
        if halves_members:
            updater.noise_scale.load_state_dict({"signal": 1.0, "noise": 8.0, "updates": 25})
        return updater.update(experience).tally.over(Ranks()), updater

    return of


@pytest.fixture
def gradient_of(linear_policy, drawn):
    """The gradient of a prompt alone."""

    def of(prompt):
        experience = drawn([prompt])
        loss = GRPO(GRPOSettings(clip_range=0.1)).loss(linear_policy, experience, torch.arange(4)).total / 4
        return torch.stack(torch.autograd.grad(loss, [linear_policy.a, linear_policy.b]))

    return of


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_both_estimates_are_unbiased(drawn, updated, gradient_of, count, scaled):
    """Their means over all draws with replacement are exact, also where halves are uneven or a prompt has no variance.

    Gradients are clipped and may be scaled, and of neither can they know.
    """
    gradients = torch.stack([gradient_of(prompt) for prompt in range(len(PROMPTS))])
    mean = gradients.mean(0)
    estimates = []
    for prompts in product(range(len(PROMPTS)), repeat=count):
        scale = LossScale(scaled)
        seen, _ = updated(drawn(prompts), scale, max_grad_norm=1e-3, microbatch=3)
        taught = set(prompts) != {3}
        assert ("update/gradient_signal" in seen) == taught
        estimates.append([seen["update/gradient_signal"], seen["update/gradient_noise"]] if taught else [0.0, 0.0])
    signal, noise = torch.tensor(estimates, dtype=torch.float64).mean(0).tolist()
    assert signal == pytest.approx(mean.square().sum().item(), rel=1e-9)
    assert noise == pytest.approx((gradients - mean).square().sum().item() / len(PROMPTS), rel=1e-9)


def test_equal_prompts_have_no_noise(drawn, updated, gradient_of):
    seen, updater = updated(drawn([1, 1]))
    assert seen["update/gradient_noise"] == updater.noise_scale.prompts == 0
    assert seen["update/gradient_signal"] == pytest.approx(gradient_of(1).square().sum().item())


def test_halves_are_neighbouring_slots(drawn, updated, gradient_of):
    """Kinds of prompts may take turns."""
    a, b = (sum(gradient_of(prompt) for prompt in half) / 2 for half in ((0, 1), (2, 1)))
    seen, _ = updated(drawn([0, 1, 2, 1], first_slot=7))
    assert seen["update/gradient_signal"] == pytest.approx((a @ b).item())
    assert seen["update/gradient_noise"] == pytest.approx((a - b).square().sum().item())


def test_each_of_several_updates_is_noted(drawn, updated):
    """The first halves the prompts, and the second the members."""
    seen, updater = updated(drawn([0, 1, 2]), updates_per_rollout=2)
    state = updater.noise_scale.state_dict()
    assert seen["update/gradient_noise"] == pytest.approx(state["noise"] / 0.05)
    assert seen["update/gradient_member_noise"] == state["members"]
    assert state["updates"] == updater.optimizer.steps == 2


def test_the_second_and_every_eighth_update_halve_the_members():
    noise_scale, halves = NoiseScale(), []
    for _ in range(24):
        halves.append(noise_scale.halves_members)
        if halves[-1]:
            noise_scale.add_members(2.0)
        else:
            noise_scale.add(GradientMoments(1.0, 5.0))
        assert (noise_scale.own_direction is None) == (len(halves) < 20)
    assert [number for number, half in enumerate(halves) if half] == [1, 9, 17]
    assert noise_scale.own_direction == pytest.approx(1.5)  # however young the averages are


def test_halves_of_members_tell_their_noise(drawn, updated, gradient_of, linear_policy):
    """It is P |h - h'|^2 of the halves' parts of the mean over P prompts: here a member each."""
    experience = drawn([0, 1], first_slot=4)
    seen, updater = updated(experience, halves_members=True)
    items, parts = torch.arange(4), []
    for row in range(4):
        loss = GRPO(GRPOSettings(clip_range=0.1)).loss(linear_policy, experience.take(torch.tensor([row])), items[:2])
        parts.append(torch.stack(torch.autograd.grad(loss.total / 8, [linear_policy.a, linear_policy.b])))
    # of advantages 1.5, -0.5 in slot 4 the lower is in the first half, of -0.5, -1 in slot 5 the higher
    difference = parts[1] - parts[0] + parts[2] - parts[3]
    assert seen["update/gradient_member_noise"] == pytest.approx(2 * difference.square().sum().item())
    assert not {"update/gradient_signal", "update/gradient_noise"} & seen.keys()
    noise = seen["update/gradient_member_noise"]
    assert updater.noise_scale.own_direction == pytest.approx(max(0.0, 8 / noise - 1))
    assert updater.noise_scale.prompts == 8
    assert seen["update/grad_norm"] == pytest.approx((gradient_of(0) + gradient_of(1)).norm().item() / 2)


def test_halves_of_a_group_are_alike():
    """By advantage + - - + in an even slot and - + + - in an odd one, whatever the order of rows."""
    slot_N, member_N = torch.tensor([6, 9, 6, 6, 6, 9, 9, 9]), torch.tensor([0, 0, 1, 2, 3, 1, 2, 3])
    advantages_N = torch.tensor([3.0, -1.0, -3.0, 1.0, -1.0, 1.0, 3.0, -3.0])
    is_first_N = half_of_each(advantages_N, slot_N, member_N)
    assert is_first_N.tolist() == [True, True, True, False, False, True, False, False]
    for slot in (6, 9):
        own = slot_N == slot
        assert advantages_N[own & is_first_N].sum() == advantages_N[own & ~is_first_N].sum() == 0
    mixed = torch.tensor([5, 2, 7, 0, 6, 1, 4, 3])
    advantages_N = advantages_N.sign()  # of equal ones the lower member comes first
    is_first_N = half_of_each(advantages_N, slot_N, member_N)
    assert half_of_each(advantages_N[mixed], slot_N[mixed], member_N[mixed]).tolist() == is_first_N[mixed].tolist()


@pytest.mark.parametrize("objective", [None, DGPO(DGPOSettings(draws=2, dpo_beta=3.0, kl_beta=0.1))])
def test_the_step_is_the_same_with_halves_of_members(linear_policy, drawn, updated, objective):
    """Also of a loss whose weights belong to whole groups."""
    for name in ("reference", "average"):
        linear_policy.named_weights.snapshot(name)
    with torch.no_grad():
        linear_policy.a.add_(0.2)
    seen, whole = (updated(drawn([0, 1, 2]), objective=objective, halves_members=on)[0] for on in (True, False))
    assert ("update/gradient_member_noise" in seen) and ("update/gradient_member_noise" not in whole)
    for name in ("update/grad_norm", "update/loss"):
        assert seen[name] == pytest.approx(whole[name], rel=1e-9)


def test_under_another_plan_the_noise_of_own_directions_stays():
    """Members have noise 4 and own directions 2. At half the signal of members their noise is 8, and all noise 10."""
    noise_scale = NoiseScale()
    noise_scale.load_state_dict({"signal": 1.0, "noise": 6.0, "updates": 25})
    assert noise_scale.own_direction is None
    noise_scale.add_members(4.0)
    assert noise_scale.own_direction == pytest.approx(2 / 4)
    noise_scale.change_signal(0.5)
    assert noise_scale.own_direction == pytest.approx(2 / 8) and noise_scale.prompts == pytest.approx(10)
    resumed = NoiseScale()
    resumed.load_state_dict(noise_scale.state_dict())
    for one in (noise_scale, resumed):
        one.add_members(9.0)
    assert resumed.own_direction == noise_scale.own_direction


@pytest.mark.parametrize("factor", [0.5, 2.0, 100.0])
@pytest.mark.parametrize("members", [2.0, 10.0, 20.0])
def test_under_another_plan_members_have_the_noise_of_their_signal(members, factor):
    """Also where their noise was measured above all noise (10), and where hardly any of it is left."""
    noise_scale = NoiseScale()
    noise_scale.add(GradientMoments(1.0, 10.0))
    noise_scale.add_members(members)
    noise_scale.change_signal(factor)
    assert noise_scale.state_dict()["members"] == pytest.approx(members / factor)
    own = max(0.0, 10 - members)
    assert noise_scale.prompts == pytest.approx(own + (10 - own) / factor)


@pytest.mark.parametrize(
    ("prompts", "optim"), [([0], {}), ([0, 1], {"noise_scale": False}), ([0, 1], {"reuse_rollout": True}), ([3, 3], {})]
)
def test_where_it_is_not_measured_nothing_is_seen_or_noted(drawn, updated, prompts, optim):
    seen, updater = updated(drawn(prompts), **optim)
    assert not [name for name in seen if name.startswith("update/gradient_")]
    assert updater.noise_scale.state_dict() == NoiseScale().state_dict()


def test_the_step_is_the_same_with_it_and_without(drawn, updated):
    seen, without = (updated(drawn([0, 1, 2]), noise_scale=on)[0] for on in (True, False))
    assert seen["update/grad_norm"] == pytest.approx(without["update/grad_norm"], rel=1e-12)


def test_under_a_plan_of_half_the_signal_it_takes_twice_the_prompts():
    """Of a prompt's gradient whose noise is k V times less: |g|^2 stays and its covariance is doubled."""
    noise_scale, expected = NoiseScale(), NoiseScale()
    for _ in range(3):
        noise_scale.add(GradientMoments(1.0, 5.0))
        expected.add(GradientMoments(1.0, 10.0))
    noise_scale.change_signal(0.5)
    assert noise_scale.prompts == expected.prompts == pytest.approx(10)


def test_it_is_settled_after_twenty_updates_also_across_a_resume():
    noise_scale = NoiseScale()
    for _ in range(19):
        noise_scale.add(GradientMoments(1.0, 5.0))
    assert noise_scale.prompts == pytest.approx(5) and noise_scale.settled is None
    resumed = NoiseScale()
    resumed.load_state_dict(noise_scale.state_dict())
    resumed.add(GradientMoments(1.0, 5.0))
    assert resumed.settled == resumed.prompts == pytest.approx(5)
    older = NoiseScale()
    older.load_state_dict({"signal": 1.0, "noise": 5.0})
    assert older.prompts == 5 and older.settled is None


def test_a_gradient_that_is_not_finite_is_not_noted(linear_policy, drawn, updated):
    linear_policy.a.register_hook(lambda gradient: gradient * torch.inf)
    seen, updater = updated(drawn([0, 1]))
    assert seen["update/skipped"] == 1 and "update/gradient_noise" not in seen
    assert updater.noise_scale.prompts is None


def test_a_missing_gradient_is_zero():
    a, b = torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    zeros = [torch.zeros_like(a), torch.zeros_like(b)]
    expected = gradient_moments([a, zeros[1]], [zeros[0], b], (1, 2))
    assert gradient_moments([a, None], [None, b], (1, 2)) == expected
    assert expected.signal == 0 and expected.noise == pytest.approx((9 * 5 + 9 / 4 * 9) / 1.5)
    assert gradient_moments([None], [None], (1, 1)) == GradientMoments(0.0, 0.0)


def test_the_scale_is_the_ratio_of_averages_and_not_an_average_of_ratios():
    scale = NoiseScale()
    assert scale.prompts is None
    scale.add(GradientMoments(2.0, 8.0))
    assert scale.prompts == pytest.approx(4.0)  # however young the averages are
    scale.add(GradientMoments(-1.0, 10.0))
    assert scale.prompts == pytest.approx((0.95 * 8 + 10) / (0.95 * 2 - 1))
    taken_up = NoiseScale()
    taken_up.load_state_dict(scale.state_dict())
    for one in (scale, taken_up):
        one.add(GradientMoments(0.5, 3.0))
    assert taken_up.prompts == scale.prompts is not None
    scale.add(GradientMoments(-9.0, 1.0))
    assert scale.prompts is None
    scale.load_state_dict({})  # of a checkpoint from before it was measured
    assert scale.state_dict() == NoiseScale().state_dict()
