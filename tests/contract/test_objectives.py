"""The promises of every objective: its items, the weights that it asks for, its costs, and that it can be resumed."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from progrpo.config import ObjectiveSettings, OptimSettings, SamplingSettings, from_dict, trained_items
from progrpo.objectives.base import Objective
from progrpo.objectives.settings import OBJECTIVES, load_objective
from progrpo.training.distributed import Ranks
from progrpo.training.update import Updater
from tests.support.states import same_state

ADVANTAGES = (1.5, -0.5, -1.0, 2.0, -2.0)


def configured(name: str, **settings: Any) -> ObjectiveSettings:
    return from_dict({"objective": {"name": name, name: settings}}).objective


CONFIGS = {
    **{name: configured(name) for name in OBJECTIVES},
    "grpo": configured("grpo", clip_range=3e-3),
    "grpo-guard": configured("grpo", clip_range=3e-3, ratio="guard"),
}
LATENT = [name for name, objective_settings in CONFIGS.items() if objective_settings.loss.stores == "latents"]


@pytest.fixture(params=CONFIGS)
def objective_settings(request) -> ObjectiveSettings:
    return CONFIGS[request.param]


@pytest.fixture
def objective(objective_settings) -> Objective:
    return load_objective(objective_settings.name)(objective_settings.loss)


@pytest.fixture
def policy(linear_policy, objective):
    """The linear policy with the weights that the objective asks for; all of its sets of weights differ."""
    for far, name in enumerate(objective.settings.averages):
        shift(linear_policy, 0.02 * (far + 1))
        linear_policy.named_weights.snapshot(name)
    shift(linear_policy, 0.01)
    return linear_policy


@torch.no_grad()
def shift(policy, far):
    policy.a += far
    policy.b -= far


def gradient(policy, loss):
    return torch.stack(torch.autograd.grad(loss.total, [policy.a, policy.b]))


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors}


def all_items(objective, experience):
    return torch.arange(len(experience) * objective.settings.items_per_trajectory(len(experience.trajectories.path)))


# --- on a policy of two weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 2])
def test_losses_are_finite_and_their_gradient_reaches_the_policy(policy, objective, linear_experience, updates):
    experience = objective.prepare(policy, linear_experience(policy, ADVANTAGES), 4, updates)
    loss = objective.loss(policy, experience, all_items(objective, experience))
    assert loss.total.shape == () and loss.total.isfinite()
    assert all(value.isfinite() and not value.requires_grad for value in (loss.sums | loss.maxima).values())
    assert loss.sums["loss"].item() == pytest.approx(loss.total.item())
    actual = gradient(policy, loss)
    assert actual.isfinite().all() and actual.norm() > 1e-6


def test_a_loss_is_a_sum_over_items(policy, objective, linear_experience):
    experience = objective.prepare(policy, linear_experience(policy, ADVANTAGES), 4, 2)
    shift(policy, 0.02)
    items = all_items(objective, experience)
    whole = objective.loss(policy, experience, items)
    losses = [objective.loss(policy, experience, part) for part in items.flip(0).split(3)]
    assert sum(p.total.item() for p in losses) == pytest.approx(whole.total.item(), rel=1e-9)
    assert sum(p.sums["loss"].item() for p in losses) == pytest.approx(whole.sums["loss"].item(), rel=1e-9)
    torch.testing.assert_close(sum(gradient(policy, p) for p in losses), gradient(policy, whole))


def test_item_i_is_of_trajectory_i_modulo_their_number(policy, objective, linear_experience):
    """A share of the trajectories has the same losses, item by item."""
    experience = objective.prepare(policy, linear_experience(policy, ADVANTAGES), 4, 2)
    shift(policy, 0.02)
    rows = torch.tensor([4, 1, 3])
    some = experience.take(rows)
    for d in range(objective.settings.items_per_trajectory(len(experience.trajectories.path))):
        for n, row in enumerate(rows.tolist()):
            there = objective.loss(policy, experience, torch.tensor([d * 5 + row])).total.item()
            here = objective.loss(policy, some, torch.tensor([d * 3 + n])).total.item()
            assert here == pytest.approx(there, rel=1e-9)


def test_nothing_is_random_and_nothing_is_left_behind(policy, objective, linear_experience):
    experience, before = linear_experience(policy, ADVANTAGES), copy.deepcopy(policy.named_weights.state_dict())
    state = torch.get_rng_state()
    losses = []
    for _ in range(2):
        prepared = objective.prepare(policy, experience, 4, 2)
        losses.append(objective.loss(policy, prepared, all_items(objective, prepared)).total.item())
    assert losses[0] == losses[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert same_state(policy.named_weights.state_dict(), before)


@pytest.mark.parametrize("updates", [1, 2])
def test_trajectories_without_an_advantage_count_and_are_not_computed(policy, objective, linear_experience, updates):
    """The step is that of the informative trajectories, divided by the number of all."""
    experience = linear_experience(policy, [1.5, 0.0, -1.0, 0.0, 0.0])
    start, ranks = policy.a.item(), Ranks()
    config = OptimSettings(updates_per_rollout=updates, max_grad_norm=1e9, microbatch=4)
    descent = torch.optim.SGD(policy.trainable.values(), lr=1e-3)
    per = objective.settings.items_per_trajectory(len(experience.trajectories.path))
    prepared = objective.prepare(policy, experience, 4, updates)
    telling = prepared.take(torch.tensor([0, 2]))
    expected = gradient(policy, objective.loss(policy, telling, all_items(objective, telling)))[0] / (5 * per)
    updated = Updater(policy, objective, descent, config, ranks).update(experience)
    assert updated.items == 2 * per
    if updates == 1:
        assert policy.a.item() - start == pytest.approx(-1e-3 * expected.item(), rel=1e-6)


def test_a_rollout_without_any_advantage_moves_nothing(policy, objective, linear_experience):
    before = copies(policy.trainable.items())
    optimizer = torch.optim.AdamW(policy.trainable.values(), lr=0.1, weight_decay=0.1)
    updater = Updater(policy, objective, optimizer, OptimSettings(), Ranks())
    updated = updater.update(linear_experience(policy, [0.0] * 5))
    assert updated.items == 0 and "update/loss" not in updated.tally.sums
    assert same_state(copies(policy.trainable.items()), before)


def test_of_nobody_there_is_nothing_to_learn(policy, objective, linear_experience):
    nobody = linear_experience(policy, ADVANTAGES).take(torch.empty(0, dtype=torch.long))
    optimizer = torch.optim.AdamW(policy.trainable.values(), lr=0.1)
    updater = Updater(policy, objective, optimizer, OptimSettings(updates_per_rollout=2), Ranks())
    assert updater.update(nobody).items == 0


# --- on a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def build(tiny_trainer, tiny_config, objective_settings):
    """A trainer of the objective, with sections of the configuration replaced."""
    return lambda reward=None, **sections: tiny_trainer(
        tiny_config(objective=objective_settings, **sections), **({"reward": reward} if reward else {})
    )


def sampled(trainer):
    return trainer.step().rollout.trajectories.x_NCHW


def test_a_first_rollout_is_learnt_from(build, first_experience):
    trainer = build()
    policy, objective = trainer.policy, trainer.learner.objective
    assert {"reference", *objective.settings.averages} <= set(policy.named_weights.names)
    assert objective.settings.rollout_weights in policy.named_weights
    experience = first_experience(trainer)
    assert objective.settings.items_per_trajectory(len(experience.trajectories.path)) == trained_items(trainer.config)
    for updates in (1, 2):
        prepared = objective.prepare(policy, experience, 4, updates)
        loss = objective.loss(policy, prepared, all_items(objective, prepared)[:10])
        assert loss.total.isfinite()
        actual = torch.autograd.grad(loss.total, list(policy.trainable.values()), allow_unused=True)
        assert all(g is not None and g.isfinite().all() for g in actual)
        assert sum(g.square().sum() for g in actual if g is not None) > 0


def test_what_is_stored_is_what_is_asked_for(build, first_experience):
    trainer = build()
    path = first_experience(trainer).trajectories.path
    stochastic = [level > 0 for level in trainer.sampler.sampling.process.noise_levels]
    if trainer.learner.objective.settings.stores == "latents":
        assert path == () and not any(stochastic)
    else:
        assert [t.step for t in path] == [0, 1, 2] and all(stochastic)
        assert all((t.mean_NCHW is not None) == (trainer.learner.objective.settings.stores == "means") for t in path)


def test_stochastic_rollouts_are_stored_only_for_transitions(build, first_experience):
    trainer = build(sampling=SamplingSettings(num_inference_steps=4, sde_window="all"))
    assert all(level > 0 for level in trainer.sampler.sampling.process.noise_levels)
    path = first_experience(trainer).trajectories.path
    assert len(path) == (0 if trainer.learner.objective.settings.stores == "latents" else 3)


def test_an_iteration_moves_the_trained_weights_and_keeps_the_frozen_ones(build):
    trainer = build()
    policy = trainer.policy
    start, frozen = copies(policy.trainable.items()), copies(policy.frozen())
    records = [trainer.step().record for _ in range(2)]
    trainer.check_frozen()
    assert same_state(copies(policy.frozen()), frozen)
    moved = [name for name, p in policy.trainable.items() if not torch.equal(p, start[name])]
    assert len(moved) > len(start) // 2
    with policy.weights("reference"):
        assert same_state(copies(policy.trainable.items()), start)
    assert all(torch.isfinite(torch.tensor(record["update/loss"])) for record in records)


def test_averages_follow_at_their_own_pace(build):
    trainer = build()
    policy, expected = trainer.policy, {}
    for name in trainer.learner.objective.settings.averages:
        expected[name] = copies(policy.trainable.items())
    for n in (1, 2, 3):
        trainer.step()
        for name, average in trainer.learner.objective.settings.averages.items():
            decay = average.decay(n)
            for key, p in policy.trainable.items():
                expected[name][key] = decay * expected[name][key] + (1 - decay) * p.detach()
    for name, tensors in expected.items():
        with policy.weights(name):
            for key, p in policy.trainable.items():
                torch.testing.assert_close(p.detach(), tensors[key], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("guidance_scale", [pytest.param(1.0, marks=pytest.mark.slow), 3.0])
def test_what_is_counted_is_predicted_and_what_the_network_did(build, redness, guidance_scale):
    def partly(images, prompts):
        """Nothing can be learnt from red cats."""
        return [0.5 if prompt == "red cat" else r for prompt, r in zip(prompts, redness(images, prompts), strict=True)]

    trainer = build(partly, sampling=SamplingSettings(num_inference_steps=4, guidance_scale=guidance_scale))
    trained, teaching = [], 0
    trainer.policy.pipeline.transformer.register_forward_hook(
        lambda module, args, kwargs, out: trained.append(len(out[0])) if torch.is_grad_enabled() else None,
        with_kwargs=True,
    )
    for _ in range(3):
        record = trainer.step().record
        teaching += 2 - record["advantage/zero_variance_groups"]
    counted, predicted = trainer.totals.counted, trainer.predicted() * 3
    assert 0 < teaching < 6
    upper = predicted.trained_steps * teaching // 6
    assert counted == replace(predicted, trained_steps=counted.trained_steps)
    assert upper == teaching * 3 * trained_items(trainer.config)
    assert 0 < counted.trained_steps < upper if trains_chosen_alone(trainer) else counted.trained_steps == upper
    pair = (
        2 if guidance_scale > 1 and trainer.learner.objective.settings.stores != "latents" else 1
    )  # final latents: one call an item
    assert sum(trained) == counted.trained_steps * pair


def test_the_weights_that_sample_are_the_ones_it_names(build, move):
    """Other weights, moved, change no rollout; its own, moved, change it."""
    trainer = build()
    expected, names = sampled(trainer), [n for n in trainer.policy.named_weights.names if n != "current"]
    for name in {*names, trainer.learner.objective.settings.rollout_weights, "current"}:
        again = build()
        with again.policy.weights(name):
            move(again.policy, 0.3)
        assert torch.equal(sampled(again), expected) == (name != trainer.learner.objective.settings.rollout_weights), (
            name
        )


# --- stop and resume --------------------------------------------------------------------------------------------------


def assert_a_resumed_run_is_a_straight_one(trainer, fresh, stop):
    for _ in range(stop):
        trainer.step()
    state = copy.deepcopy(trainer.state_dict())
    straight = trainer.step()
    fresh.load_state_dict(state)
    resumed = fresh.step()
    assert torch.equal(resumed.rollout.trajectories.x_NCHW, straight.rollout.trajectories.x_NCHW)
    for part in ("iteration", "policy", "optimizer"):
        assert same_state(fresh.state_dict()[part], trainer.state_dict()[part]), part
    assert fresh.totals.counted == trainer.totals.counted
    ours, theirs = (
        {k: v for k, v in done.record.items() if k != "seconds" and not k.startswith("time/")}
        for done in (resumed, straight)
    )
    assert ours == theirs


def test_stop_and_resume_is_a_straight_run(build):
    sections = {"optim": OptimSettings(updates_per_rollout=2, ema_decay=0.5)}
    assert_a_resumed_run_is_a_straight_one(build(**sections), build(**sections), stop=2)


WINDOWS = [
    *(("grpo", kind) for kind in ("all", "first", "sliding", "random")),
    ("nft", "none"),
    *(pytest.param(name, "random", marks=pytest.mark.slow) for name in CONFIGS if name != "grpo"),
    *(pytest.param(name, "none", marks=pytest.mark.slow) for name in LATENT if name != "nft"),
]
"""Every window with one objective: windows follow from the iteration. The other objectives are slow tests."""


@pytest.mark.parametrize(("name", "kind"), WINDOWS)
def test_a_resumed_window_lies_where_it_would_have(tiny_trainer, tiny_config, name, kind):
    sampling = SamplingSettings(num_inference_steps=4, sde_window=kind, sde_window_size=1, sde_window_interval=1)
    config = tiny_config(objective=CONFIGS[name], sampling=sampling)
    trainer, fresh = tiny_trainer(config), tiny_trainer(config)
    assert_a_resumed_run_is_a_straight_one(trainer, fresh, stop=2)
    counted, predicted = trainer.totals.counted, trainer.predicted() * 3
    if trains_chosen_alone(trainer):
        assert 0 < counted.trained_steps < predicted.trained_steps
        predicted = replace(predicted, trained_steps=counted.trained_steps)
    assert counted == predicted


def trains_chosen_alone(trainer):
    """Whether members below their group's mean are left out, whose number no plan knows."""
    return trainer.learner.objective.settings.negative_weight == 0


def test_a_window_is_what_is_sampled_and_trained(tiny_trainer, tiny_config):
    sampling = SamplingSettings(num_inference_steps=4, sde_window="sliding", sde_window_size=1, sde_window_interval=1)
    trainer = tiny_trainer(tiny_config(objective=CONFIGS["grpo-guard"], sampling=sampling))
    for start in (0, 1, 2, 0):
        assert [level > 0 for level in trainer.sampler.sampling.process.noise_levels] == [
            step == start for step in range(4)
        ]
        assert [t.step for t in trainer.step().rollout.trajectories.path] == [start]


@pytest.mark.parametrize("kl_beta", [0.0, 0.5])
@pytest.mark.parametrize("name", CONFIGS)
def test_neither_the_cut_nor_the_order_of_items_matters(linear_policy, linear_experience, name, kl_beta):
    section = CONFIGS[name].name
    settings = {**asdict(getattr(CONFIGS[name], section)), "kl_beta": kl_beta}
    objective = load_objective(section)(configured(section, **settings).loss)
    experience = linear_experience(linear_policy, ADVANTAGES, off=0.05)
    shift(linear_policy, 0.05)
    for average in objective.settings.averages:
        linear_policy.named_weights.snapshot(average)
    prepared = objective.prepare(linear_policy, experience, 64, 2)
    shift(linear_policy, 0.1)
    items = all_items(objective, prepared)
    whole = objective.loss(linear_policy, prepared, items)
    expected = gradient(linear_policy, whole)
    shuffled = items[torch.randperm(len(items), generator=torch.Generator().manual_seed(2))]
    for cut in (items.split(1), items.split(4), [shuffled], shuffled.split(4)):
        losses = [objective.loss(linear_policy, prepared, part) for part in cut]
        for key, value in whole.sums.items():
            assert sum(part.sums[key].item() for part in losses) == pytest.approx(value.item(), rel=1e-9), key
        for key, value in whole.maxima.items():
            assert max(part.maxima[key].item() for part in losses) == pytest.approx(value.item(), rel=1e-9), key
        torch.testing.assert_close(sum(gradient(linear_policy, part) for part in losses), expected)
