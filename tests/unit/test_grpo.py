"""GRPO's loss on a policy of two weights, against loops over torch.distributions and finite differences."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from progrpo.objectives.grpo import GRPO
from progrpo.objectives.settings import GRPOSettings

ADVANTAGES = (1.5, -0.5, -1.0, 2.0, -2.0)
CLIP = 0.05
ITEMS = torch.arange(10)


def diffusion_rate(experience, step):
    """Flow-GRPO's; at the first step the grid's second sigma stands in below."""
    grid = experience.process.levels_T1.sigma
    return 0.7 * (grid[step] / (1 - grid[max(step, 1)])).sqrt()


def gaussian(policy, experience, transition, row, weights="current"):
    """The distribution of one transition's next latent, written out."""
    x = transition.x_NCHW[row]
    sigma, sigma_next = experience.process.levels_T1.sigma[transition.step : transition.step + 2]
    c = experience.condition.tensors["c"][experience.trajectories.group_N[row]]
    with policy.weights(weights):
        v = policy.a * x + experience.guidance_scale * policy.b * c
    h, s = sigma - sigma_next, diffusion_rate(experience, transition.step)
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
            h = experience.process.levels_T1.sigma[t.step] - experience.process.levels_T1.sigma[t.step + 1]
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
def test_loss_by_hand(linear_policy, linear_transitions, guidance_scale):
    experience = linear_transitions(linear_policy, ADVANTAGES, off=0.05, guidance_scale=guidance_scale)
    shift(linear_policy, a=0.05, b=0.02)
    loss = GRPO(GRPOSettings(clip_range=CLIP)).loss(linear_policy, experience, ITEMS)
    total, clipped, deviation = by_hand(linear_policy, experience)
    assert 0 < clipped < 10  # both branches are met
    assert loss.total.item() == pytest.approx(total, rel=1e-9)
    assert loss.sums["loss"].item() == pytest.approx(total, rel=1e-9)
    assert loss.sums["clip_fraction"].item() == clipped
    assert loss.maxima["ratio_max_deviation"].item() == pytest.approx(deviation, rel=1e-9)
    assert "kl" not in loss.sums


@pytest.mark.parametrize(("kl_beta", "guidance_scale"), [(0.0, 1.0), (0.3, 1.0), (0.3, 3.0)])
def test_gradient_against_finite_differences(linear_policy, linear_transitions, kl_beta, guidance_scale):
    experience = linear_transitions(linear_policy, ADVANTAGES, off=0.05, guidance_scale=guidance_scale)
    shift(linear_policy, a=0.05, b=0.02)
    grpo, step = GRPO(GRPOSettings(clip_range=CLIP, kl_beta=kl_beta)), 1e-6
    actual = gradients(linear_policy, grpo.loss(linear_policy, experience, ITEMS))
    for name, gradient in zip("ab", actual, strict=True):
        around = []
        for sign in (1, -1):
            shift(linear_policy, **{name: sign * step})
            around.append(grpo.loss(linear_policy, experience, ITEMS).total.item())
            shift(linear_policy, **{name: -sign * step})
        assert gradient.item() == pytest.approx((around[0] - around[1]) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_step_makes_what_was_good_likelier(linear_policy, linear_transitions, advantage):
    experience = linear_transitions(linear_policy, [advantage] + [0.0] * 4)
    before = [t.log_prob_N[0] for t in experience.trajectories.path]
    loss = GRPO(GRPOSettings(clip_range=CLIP)).loss(linear_policy, experience, ITEMS)
    da, db = gradients(linear_policy, loss)
    shift(linear_policy, a=-1e-3 * da.item(), b=-1e-3 * db.item())
    path = experience.trajectories.path
    after = [gaussian(linear_policy, experience, t, 0).log_prob(t.x_next_NCHW[0]).mean() for t in path]
    change = sum(now.item() - then.item() for now, then in zip(after, before, strict=True))
    assert change * advantage > 1e-6


def test_on_policy_nothing_is_clipped_and_the_loss_is_minus_the_advantages(linear_policy, linear_transitions):
    loss = GRPO(GRPOSettings(clip_range=CLIP)).loss(linear_policy, linear_transitions(linear_policy, ADVANTAGES), ITEMS)
    assert loss.total.item() == pytest.approx(-2 * sum(ADVANTAGES), abs=1e-12)
    assert loss.maxima["ratio_max_deviation"].item() < 1e-12 and loss.sums["clip_fraction"] == 0


def test_kl_and_its_gradient_are_zero_at_the_reference(linear_policy, linear_transitions):
    loss = GRPO(GRPOSettings(clip_range=CLIP, kl_beta=1.0)).loss(
        linear_policy, linear_transitions(linear_policy, [0.0] * 5), ITEMS
    )
    assert loss.total == 0 and loss.sums["kl"] == 0
    assert all(gradient == 0 for gradient in gradients(linear_policy, loss))


def test_exact_kl_is_that_of_the_two_gaussians(linear_policy, linear_transitions):
    experience = linear_transitions(linear_policy, ADVANTAGES)
    shift(linear_policy, a=0.03, b=-0.05)
    loss = GRPO(GRPOSettings(clip_range=CLIP, kl_beta=0.7)).loss(linear_policy, experience, ITEMS)
    assert loss.total.item() == pytest.approx(by_hand(linear_policy, experience, 0.7)[0], rel=1e-9)
    assert loss.sums["kl"] > 0


def test_flow_grpos_kl_leaves_out_the_step_length(linear_policy, linear_transitions):
    experience = linear_transitions(linear_policy, ADVANTAGES)
    shift(linear_policy, a=0.03, b=-0.05)
    loss = GRPO(GRPOSettings(clip_range=CLIP, kl_beta=0.7, kl_form="flow_grpo")).loss(linear_policy, experience, ITEMS)
    expected, _, _ = by_hand(linear_policy, experience, 0.7, lambda p, q, h: kl_divergence(p, q) * h)
    assert loss.total.item() == pytest.approx(expected, rel=1e-9)


def test_kl_reaches_the_current_weights_and_not_the_reference(linear_policy, linear_transitions):
    experience = linear_transitions(linear_policy, [0.0] * 5)
    shift(linear_policy, a=0.1)
    da, _ = gradients(
        linear_policy, GRPO(GRPOSettings(clip_range=CLIP, kl_beta=1.0)).loss(linear_policy, experience, ITEMS)
    )
    assert da > 0  # downhill is back to the reference
    assert linear_policy.named_weights.state_dict()["reference"]["a"] == 0.3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kl_beta": 0.5},
        {"ratio": "guard", "step_weights": "inverse_h", "kl_beta": 0.5, "kl_form": "latent"},
        {"step_weights": "noise", "kl_beta": 0.5, "kl_form": "velocity"},
    ],
)
def test_neither_the_cut_nor_the_order_of_items_matters(linear_policy, linear_transitions, settings):
    experience = linear_transitions(linear_policy, ADVANTAGES, off=0.05)
    shift(linear_policy, a=0.05, b=0.02)
    grpo = GRPO(GRPOSettings(clip_range=CLIP, **settings))
    whole = grpo.loss(linear_policy, experience, ITEMS)
    shuffled = ITEMS[torch.randperm(10, generator=torch.Generator().manual_seed(2))]
    for cut in (ITEMS.split(1), ITEMS.split(3), [shuffled], shuffled.split(4)):
        parts = [grpo.loss(linear_policy, experience, items) for items in cut]
        for name, value in whole.sums.items():
            assert sum(p.sums[name].item() for p in parts) == pytest.approx(value.item(), rel=1e-9), name
        deviation = max(p.maxima["ratio_max_deviation"].item() for p in parts)
        assert deviation == pytest.approx(whole.maxima["ratio_max_deviation"].item(), rel=1e-9)
        actual = [sum(g) for g in zip(*(gradients(linear_policy, p) for p in parts), strict=True)]
        torch.testing.assert_close(actual, list(gradients(linear_policy, grpo.loss(linear_policy, experience, ITEMS))))


def test_an_item_is_a_transition_of_a_trajectory(linear_policy, linear_transitions):
    experience = linear_transitions(linear_policy, ADVANTAGES, off=0.05)
    assert (
        GRPO(GRPOSettings(clip_range=CLIP)).settings.items_per_trajectory(len(experience.trajectories.path)) == 2
        and GRPO(GRPOSettings(clip_range=CLIP)).settings.stores == "transitions"
    )
    alone = experience.take(torch.tensor([3]))
    for transition in (0, 1):
        item = GRPO(GRPOSettings(clip_range=CLIP)).loss(linear_policy, experience, torch.tensor([transition * 5 + 3]))
        assert (
            item.total
            == GRPO(GRPOSettings(clip_range=CLIP)).loss(linear_policy, alone, torch.tensor([transition])).total
        )


# --- variants ---------------------------------------------------------------------------------------------------------


def step_numbers(experience):
    """Length, diffusion rate and std of the path's two steps."""
    grid, rates = experience.process.levels_T1.sigma.tolist(), [diffusion_rate(experience, k).item() for k in (0, 1)]
    return [(grid[k] - grid[k + 1], rates[k], rates[k] * (grid[k] - grid[k + 1]) ** 0.5) for k in (0, 1)]


def variant(**settings):
    return GRPO(GRPOSettings(**{"clip_range": CLIP, **settings}))


def test_guard_needs_means_and_plain_does_not():
    assert variant(ratio="guard").settings.stores == "means" and variant(ratio="plain").settings.stores == "transitions"


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_guarded_loss_by_hand(linear_policy, linear_transitions, guidance_scale):
    experience = linear_transitions(linear_policy, ADVANTAGES, off=0.5, guidance_scale=guidance_scale)
    shift(linear_policy, a=0.2, b=0.1)
    loss = variant(ratio="guard").loss(linear_policy, experience, ITEMS)
    total, clipped, cut, deviation = 0.0, 0, 0, 0.0
    for t in experience.trajectories.path:
        for row, advantage in enumerate(ADVANTAGES):
            now = gaussian(linear_policy, experience, t, row)
            moved = ((now.mean - t.mean_NCHW[row]) ** 2).mean() / (2 * now.stddev.mean() ** 2)
            log_ratio = now.log_prob(t.x_next_NCHW[row]).mean() - t.log_prob_N[row]
            ratio = (now.stddev.mean() * (log_ratio + moved)).exp().item()
            bounded = min(max(ratio, 1 - CLIP), 1 + CLIP)
            total += max(-advantage * ratio, -advantage * bounded)
            clipped += bounded != ratio
            cut += -advantage * bounded > -advantage * ratio
            deviation = max(deviation, abs(ratio - 1))
    assert 0 < cut < clipped < 10  # all branches are met
    assert loss.total.item() == pytest.approx(total, rel=1e-9)
    assert loss.sums["clip_fraction"].item() == clipped
    assert loss.maxima["ratio_max_deviation"].item() == pytest.approx(deviation, rel=1e-9)


def test_a_guarded_log_ratio_is_the_drawn_noise_times_the_move_of_the_mean(linear_policy, linear_transitions):
    experience = linear_transitions(linear_policy, [-1.0] * 5)
    shift(linear_policy, a=0.02, b=0.01)
    wide = variant(ratio="guard", clip_range=10.0)
    for item in range(10):
        t, row = experience.trajectories.path[item // 5], item % 5
        now = gaussian(linear_policy, experience, t, row)
        z = (t.x_next_NCHW[row] - t.mean_NCHW[row]) / now.stddev
        expected = (z * (now.mean - t.mean_NCHW[row])).mean().exp()
        actual = wide.loss(linear_policy, experience, torch.tensor([item])).total
        assert actual.item() == pytest.approx(expected.item(), rel=1e-9)


def test_on_policy_a_guarded_ratio_is_one(linear_policy, linear_transitions):
    loss = variant(ratio="guard").loss(linear_policy, linear_transitions(linear_policy, ADVANTAGES), ITEMS)
    assert loss.total.item() == pytest.approx(-2 * sum(ADVANTAGES), abs=1e-12)
    assert loss.maxima["ratio_max_deviation"].item() < 1e-12 and loss.sums["clip_fraction"] == 0


def test_on_policy_a_guarded_gradient_is_the_plain_one_times_the_std_of_the_step(linear_policy, linear_transitions):
    experience = linear_transitions(linear_policy, ADVANTAGES)
    for step, (_, _, std) in enumerate(step_numbers(experience)):
        items = torch.arange(5) + 5 * step
        plain, guarded = (
            torch.stack(gradients(linear_policy, variant(ratio=ratio).loss(linear_policy, experience, items)))
            for ratio in ("plain", "guard")
        )
        assert plain.norm() > 1e-3
        torch.testing.assert_close(guarded, std * plain)


@pytest.mark.parametrize("ratio", ["plain", "guard"])
@pytest.mark.parametrize("step_weights", ["equal", "noise", "inverse_h"])
def test_step_weights_by_hand(linear_policy, linear_transitions, ratio, step_weights):
    experience = linear_transitions(linear_policy, ADVANTAGES, off=0.05)
    shift(linear_policy, a=0.05, b=0.02)
    raw = {
        "equal": [1.0, 1.0],
        "noise": [std for _, _, std in step_numbers(experience)],
        "inverse_h": [1 / h for h, _, _ in step_numbers(experience)],
    }[step_weights]
    weights = [2 * w / sum(raw) for w in raw]
    assert sum(weights) / 2 == pytest.approx(1)
    for item in range(10):
        one = torch.tensor([item])
        plain = variant(ratio=ratio).loss(linear_policy, experience, one)
        weighed = variant(ratio=ratio, step_weights=step_weights).loss(linear_policy, experience, one)
        assert weighed.total.item() == pytest.approx(weights[item // 5] * plain.total.item(), rel=1e-9)
        assert weighed.sums["clip_fraction"] == plain.sums["clip_fraction"]
        if step_weights == "equal":
            assert weighed.total == plain.total


def test_step_weights_leave_the_kl_term_alone(linear_policy, linear_transitions):
    experience = linear_transitions(linear_policy, [0.0] * 5)
    shift(linear_policy, a=0.05, b=0.02)
    totals = [
        variant(step_weights=weights, kl_beta=0.7).loss(linear_policy, experience, ITEMS).total.item()
        for weights in ("equal", "noise", "inverse_h")
    ]
    assert totals[0] > 0 and totals == pytest.approx([totals[0]] * 3, rel=1e-12)


def test_weights_of_a_single_trained_step_are_one(linear_policy, linear_transitions):
    experience = linear_transitions(linear_policy, ADVANTAGES, off=0.05)
    for transition in experience.trajectories.path:
        alone = replace(experience, trajectories=replace(experience.trajectories, path=(transition,)))
        totals = [
            variant(step_weights=weights).loss(linear_policy, alone, torch.arange(5)).total.item()
            for weights in ("equal", "noise", "inverse_h")
        ]
        assert totals == pytest.approx([totals[0]] * 3, rel=1e-12)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("kl_form", ["latent", "velocity"])
def test_plain_distances_by_hand(linear_policy, linear_transitions, kl_form, guidance_scale):
    experience = linear_transitions(linear_policy, [0.0] * 5, guidance_scale=guidance_scale)
    shift(linear_policy, a=0.03, b=-0.05)
    loss = variant(kl_beta=0.7, kl_form=kl_form).loss(linear_policy, experience, ITEMS)
    expected = 0.0
    for t in experience.trajectories.path:
        for row in range(5):
            now, ref = (gaussian(linear_policy, experience, t, row, w).mean for w in ("current", "reference"))
            c = experience.condition.tensors["c"][experience.trajectories.group_N[row]]
            apart = 0.03 * t.x_NCHW[row] - 0.05 * guidance_scale * c  # of the velocities
            expected += ((now - ref if kl_form == "latent" else apart) ** 2).mean().item()
    assert loss.sums["kl"].item() == pytest.approx(expected, rel=1e-9)
    assert loss.total.item() == pytest.approx(0.7 * expected, rel=1e-9)


@pytest.mark.parametrize("kl_form", ["exact", "flow_grpo", "latent", "velocity"])
def test_every_form_of_kl_is_zero_at_the_reference(linear_policy, linear_transitions, kl_form):
    experience = linear_transitions(linear_policy, [0.0] * 5)
    loss = variant(kl_beta=1.0, kl_form=kl_form).loss(linear_policy, experience, ITEMS)
    assert loss.total == 0 and loss.sums["kl"] == 0
    assert all(gradient == 0 for gradient in gradients(linear_policy, loss))


@pytest.mark.parametrize(
    ("ratio", "step_weights", "kl_form"),
    list(
        itertools.product(
            ("plain", "guard"), ("equal", "noise", "inverse_h"), ("exact", "flow_grpo", "latent", "velocity")
        )
    ),
)
def test_gradients_of_all_variants_against_finite_differences(
    linear_policy, linear_transitions, ratio, step_weights, kl_form
):
    experience = linear_transitions(linear_policy, ADVANTAGES, off=0.05)
    shift(linear_policy, a=0.2, b=0.1)
    grpo, step = variant(ratio=ratio, step_weights=step_weights, kl_beta=0.3, kl_form=kl_form), 1e-6
    loss = grpo.loss(linear_policy, experience, ITEMS)
    assert 0 < loss.sums["clip_fraction"] < 10
    for name, gradient in zip("ab", gradients(linear_policy, loss), strict=True):
        around = []
        for sign in (1, -1):
            shift(linear_policy, **{name: sign * step})
            around.append(grpo.loss(linear_policy, experience, ITEMS).total.item())
            shift(linear_policy, **{name: -sign * step})
        assert gradient.item() == pytest.approx((around[0] - around[1]) / (2 * step), rel=1e-5)


# --- whose log-probs are the old ones ---------------------------------------------------------------------------------


def rounded(experience):
    """As sampled by a network that rounds otherwise: log-probs are off by a half and more, means by a tenth."""
    path = tuple(
        replace(t, log_prob_N=t.log_prob_N + 0.5 + 0.1 * t.step, mean_NCHW=t.mean_NCHW + 0.1)
        for t in experience.trajectories.path
    )
    return replace(experience, trajectories=replace(experience.trajectories, path=path))


def old(experience) -> torch.Tensor:
    assert experience.prepared_ND is not None
    return experience.prepared_ND


@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_with_one_update_rounding_between_sampling_and_training_changes_no_gradient(
    linear_policy, linear_experience, ratio
):
    exact, objective = linear_experience(linear_policy, ADVANTAGES), variant(ratio=ratio)
    actual = []
    for experience in (exact, rounded(exact)):
        loss = objective.loss(linear_policy, objective.prepare(linear_policy, experience, 3, 1), ITEMS)
        assert loss.sums["clip_fraction"] == 0
        actual.append(gradients(linear_policy, loss))
    torch.testing.assert_close(actual[0], actual[1], rtol=1e-12, atol=0)
    assert loss.maxima["ratio_max_deviation"] > 0.1  # which is reported all the same


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("microbatch", [1, 3, 4, 64])
@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_before_several_updates_a_network_that_rounds_otherwise_is_asked_itself(
    linear_policy, linear_experience, ratio, microbatch, compiled
):
    exact, objective = linear_experience(linear_policy, ADVANTAGES), variant(ratio=ratio)
    sampled = rounded(exact)
    stored = torch.stack([t.log_prob_N for t in sampled.trajectories.path], dim=1)
    assert torch.equal(old(objective.prepare(linear_policy, sampled, microbatch, 2)), stored)
    expected = objective.prepare(linear_policy, exact, microbatch, 2)
    linear_policy.batch_invariant, linear_policy.compiled = False, compiled
    asked = objective.prepare(linear_policy, sampled, microbatch, 2)
    torch.testing.assert_close(old(asked), old(expected), rtol=1e-12, atol=0)
    for actual, reference in zip(asked.trajectories.path, expected.trajectories.path, strict=True):
        torch.testing.assert_close(actual.mean_NCHW, reference.mean_NCHW, rtol=1e-12, atol=1e-15)
    assert not old(asked).requires_grad
    now = objective.loss(linear_policy, asked, ITEMS)
    assert now.sums["clip_fraction"] == 0 and now.total.item() == pytest.approx(-2 * sum(ADVANTAGES))
    assert now.maxima["ratio_max_deviation"] > 0.1
    shift(linear_policy, a=0.02, b=0.01)  # as the first update does; both halves of the rows then
    rows = torch.tensor([0, 3])
    parts = (objective.loss(linear_policy, e.take(rows), torch.arange(4)).total for e in (asked, expected))
    assert next(parts).item() == pytest.approx(next(parts).item(), rel=1e-9)


def test_a_process_without_trajectories_asks_nothing(linear_policy, linear_experience):
    linear_policy.batch_invariant = False
    nothing = linear_experience(linear_policy, ADVANTAGES).take(torch.arange(0))
    assert old(GRPO(GRPOSettings(clip_range=CLIP)).prepare(linear_policy, nothing, 3, 2)).shape == (0, 2)
