"""An update that goes back through the rollout's own graphs is the update that computes everything anew."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from progrpo.config import GRPOSettings, ObjectiveSettings, OptimSettings, PlanSettings, SamplingSettings
from progrpo.training.errors import SelfCheckError
from progrpo.training.update import Updater

TRAINED = 3  # of four steps
CASES = {
    "plain": {},
    "guard": {"grpo": {"ratio": "guard", "clip_range": 5e-4}},
    "kl": {"grpo": {"kl_beta": 0.3}},
    "kl-of-velocities-step-weights": {"grpo": {"kl_beta": 0.3, "kl_form": "velocity", "step_weights": "noise"}},
    "guidance": {"sampling": {"guidance_scale": 3.0}},
    "guidance-and-kl": {"sampling": {"guidance_scale": 3.0}, "grpo": {"kl_beta": 0.3}},
    "two-updates": {"optim": {"updates_per_rollout": 2}},
    "two-updates-kl": {"optim": {"updates_per_rollout": 2}, "grpo": {"kl_beta": 0.3}},
    "bfloat16-latents": {"sampling": {"latent_dtype": "bfloat16"}},
    "window": {"sampling": {"sde_window": "first", "sde_window_size": 2}},
}


@pytest.fixture
def build(tiny_trainer, tiny_config, tiny_policy, redness):
    """A trainer of moved weights, whose groups of 4 lose one after step 1, with and without reuse."""

    def of(
        reuse: bool, policy: Any = None, reward: Any = redness, plan: PlanSettings | None = None, **changes: Any
    ) -> Any:
        grpo = GRPOSettings(**{"clip_range": 3e-3, **changes.get("grpo", {})})
        base = tiny_config(
            sampling=SamplingSettings(**{"num_inference_steps": 4, "microbatch": 3, **changes.get("sampling", {})}),
            optim=OptimSettings(**{"lr": 1e-3, "microbatch": 4, "reuse_rollout": reuse, **changes.get("optim", {})}),
            objective=ObjectiveSettings(grpo=grpo),
        )
        config = base if plan is None else replace(base, plan=plan)
        return tiny_trainer(config, policy or tiny_policy(moved=0.1), reward)

    return of


def gradients(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Of each optimizer step from now on."""
    grads: list[dict[str, Tensor]] = []
    step = trainer.learner.updater.optimizer.step

    def noting() -> None:
        named = trainer.policy.trainable.items()
        grads.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})
        step()

    monkeypatch.setattr(trainer.learner.updater.optimizer, "step", noting)
    return grads


def flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([named[name].flatten() for name in sorted(named)])


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_gradients_and_weights_are_those_of_computing_anew(build, monkeypatch, changes):
    updates = changes.get("optim", {}).get("updates_per_rollout", 1)
    records, steps, weights = [], [], []
    for reuse in (False, True):
        trainer = build(reuse, **changes)
        grads = gradients(trainer, monkeypatch)
        records.append(trainer.step().record)
        steps.append(grads)
        weights.append(flat({name: p.detach() for name, p in trainer.policy.trainable.items()}))
    assert len(steps[0]) == len(steps[1]) == updates
    for anew, reused in zip(*steps, strict=True):
        assert anew.keys() == reused.keys()
        expected = flat(anew)
        assert expected.norm() > 0
        assert (flat(reused) - expected).norm() <= 2e-5 * expected.norm()
    # Adam's first step is lr times the gradient's sign: where a gradient is but rounding, so is the sign
    far = (weights[0] - weights[1]).abs() > 1e-6
    assert far.float().mean() < 0.01 and (weights[0] - weights[1]).abs().max() <= 2.1e-3 * updates
    for name in ("update/loss", "update/grad_norm", "update/kl", "update/clip_fraction"):
        if name in records[0]:
            assert records[1][name] == pytest.approx(records[0][name], rel=1e-3, abs=2e-6), name
    assert records[1]["rollout/trained_steps"] == records[0]["rollout/trained_steps"]


def counted(policy: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Rows of each network call from now on, and whether it kept a graph."""
    calls, predict = [], policy.predict

    def watched(x: Tensor, *args: Any) -> Tensor:
        calls.append((len(x), torch.is_grad_enabled()))
        return predict(x, *args)

    monkeypatch.setattr(policy, "predict", watched)
    return calls


@pytest.mark.parametrize("kl_beta", [0.0, 0.3])
@pytest.mark.parametrize("microbatch", [4, 64])
def test_trained_items_need_no_forward_pass_of_their_own(build, monkeypatch, microbatch, kl_beta):
    rows: dict[bool, list[tuple[int, bool]]] = {}
    for reuse in (False, True):
        trainer = build(reuse, grpo={"kl_beta": kl_beta}, optim={"microbatch": microbatch})
        calls, before = counted(trainer.policy, monkeypatch), trainer.learner.learn

        def watched(*args: Any, before: Any = before, calls: Any = calls, reuse: bool = reuse) -> Any:
            calls.clear()
            done = before(*args)
            rows[reuse] = list(calls)
            return done

        monkeypatch.setattr(trainer.learner, "learn", watched)
        trainer.step()
    items = 2 * 3 * TRAINED  # prompts, survivors, steps
    own_checks = 2  # of one row each, that weights reach the network
    assert sum(n for n, graph in rows[False] if graph) == items
    assert not any(graph for _, graph in rows[True])
    checked = min(microbatch, items)
    references = (items if kl_beta else 0) + (checked if kl_beta else 0)
    assert sum(n for n, _ in rows[True]) == checked + references + own_checks
    assert sum(n for n, _ in rows[False]) == items + (items if kl_beta else 0) + own_checks


def test_a_second_update_is_computed_anew(build, monkeypatch):
    trainer = build(True, optim={"updates_per_rollout": 2, "microbatch": 64})
    calls, done = counted(trainer.policy, monkeypatch), []
    before = trainer.learner.learn

    def watched(*args: Any) -> Any:
        calls.clear()
        result = before(*args)
        done.extend(calls)
        return result

    monkeypatch.setattr(trainer.learner, "learn", watched)
    record = trainer.step().record
    shares = [n for n, graph in done if graph]
    assert shares == [3 * TRAINED]  # the other half of six trajectories
    assert record["rollout/trained_steps"] == 6 * TRAINED
    # its ratios are of weights that moved
    assert record["update/ratio_max_deviation"] > record["update/on_policy_deviation"]


# --- the check --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [CASES["guard"], CASES["guidance-and-kl"]], ids=["guard", "guidance-and-kl"])
def test_the_deviation_is_measured_and_allowed(build, changes):
    assert build(True, **changes).step().record["update/on_policy_deviation"] <= 5e-6


@pytest.mark.parametrize("microbatch", [2, 64])
def test_weights_that_changed_after_sampling_are_found(build, tiny_policy, move, redness, microbatch):
    policy = tiny_policy(moved=0.1)

    def tampering(images, prompts):
        move(policy, 0.02)
        return redness(images, prompts)

    trainer = build(True, policy, tampering, optim={"microbatch": microbatch})
    with pytest.raises((SelfCheckError, RuntimeError), match=r"off-policy|modified by an inplace operation"):
        trainer.step()


def test_weights_that_were_swapped_after_sampling_are_found(build, tiny_policy, redness):
    """Without a trace for autograd, which would find a change in place by itself."""
    policy = tiny_policy(moved=0.1)

    def tampering(images, prompts):
        for p in policy.trainable.values():
            p.data = p.data * 1.2
        return redness(images, prompts)

    with pytest.raises(SelfCheckError, match="the first update is off-policy"):
        build(True, policy, tampering).step()


@pytest.mark.parametrize("field", ["x_NCHW", "x_next_NCHW", "log_prob_N"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_change_of_what_any_step_stored_is_found(build, monkeypatch, field, place):
    trainer = build(True)
    before = trainer.collector.rollout

    def tampered(*args: Any) -> Any:
        rolled = before(*args)
        path = list(rolled.trajectories.path)
        path[place] = replace(path[place], **{field: getattr(path[place], field) + 0.1})
        return replace(rolled, trajectories=replace(rolled.trajectories, path=tuple(path)))

    monkeypatch.setattr(trainer.collector, "rollout", tampered)
    with pytest.raises(SelfCheckError, match="off-policy"):
        trainer.step()


# --- graphs -----------------------------------------------------------------------------------------------------------


class Held:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("updates", [1, 2])
def test_graphs_are_gone_after_the_update(build, updates):
    alive: weakref.WeakSet[Held] = weakref.WeakSet()
    most = 0

    def pack(tensor: Tensor) -> Held:
        nonlocal most
        held = Held(tensor.detach())  # else an output that its own node keeps would keep the node
        alive.add(held)
        most = max(most, len(alive))
        return held

    trainer = build(True, optim={"updates_per_rollout": updates})
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        done = trainer.step()
    gc.collect()
    assert most > 100 and len(alive) == 0
    assert done.rollout.trajectories.attached_NCHW is None


def test_without_reuse_sampling_keeps_no_graph(build):
    done = build(False).step()
    assert all(t.attached_NCHW is None and not t.x_next_NCHW.requires_grad for t in done.rollout.trajectories.path)


def test_latents_and_log_probs_are_no_part_of_a_graph(build):
    path = build(True).step().rollout.trajectories.path
    assert all(not getattr(t, name).requires_grad for t in path for name in ("x_NCHW", "x_next_NCHW", "log_prob_N"))


def test_a_rollout_is_the_same_with_and_without(build):
    """The samples do not depend on whether their graphs are kept."""
    reused, anew = (build(reuse).step().rollout for reuse in (True, False))
    assert torch.equal(reused.trajectories.x_NCHW, anew.trajectories.x_NCHW)
    assert torch.equal(reused.survivors.value_N, anew.survivors.value_N)
    for one, other in zip(reused.trajectories.path, anew.trajectories.path, strict=True):
        assert torch.equal(one.x_next_NCHW, other.x_next_NCHW) and torch.equal(one.log_prob_N, other.log_prob_N)


# --- who teaches nothing ----------------------------------------------------------------------------------------------


def test_if_nobody_teaches_nothing_moves(build):
    trainer = build(True, reward=lambda images, prompts: [0.5] * len(images))
    before = {name: p.detach().clone() for name, p in trainer.policy.trainable.items()}
    record = trainer.step().record
    assert record["update/grad_norm"] == 0 and record["rollout/trained_steps"] == 0
    assert all(torch.equal(p, before[name]) for name, p in trainer.policy.trainable.items())


def test_a_group_that_teaches_nothing_is_left_out_of_the_graphs_too(build, redness, prompts, monkeypatch):
    def flat_for_one(images, texts):
        return [0.5 if p == prompts[0] else r for p, r in zip(texts, redness(images, texts), strict=True)]

    steps = []
    for reuse in (False, True):
        trainer = build(reuse, reward=flat_for_one)
        grads = gradients(trainer, monkeypatch)
        assert trainer.step().record["rollout/trained_steps"] == 3 * TRAINED
        steps.append(flat(grads[0]))
    assert (steps[1] - steps[0]).norm() <= 2e-5 * steps[0].norm()


def test_missing_rewards_and_final_selection_are_no_trouble(build, redness, monkeypatch):
    def missing(images, texts):
        return [None if i == 1 else r for i, r in enumerate(redness(images, texts))]

    steps = []
    for reuse in (False, True):
        trainer = build(reuse, reward=missing, plan=PlanSettings("custom", group_size=4, final_keep=3))
        grads = gradients(trainer, monkeypatch)
        trainer.step()
        steps.append(flat(grads[0]))
    assert (steps[1] - steps[0]).norm() <= 2e-5 * steps[0].norm()


def test_an_update_takes_the_experience_as_often_as_it_is_detached(build, first_experience):
    trainer = build(True)
    experience = first_experience(trainer)
    assert experience.attached and not experience.detached().attached
    still = torch.optim.SGD(trainer.policy.trainable.values(), lr=0.0)
    updater = Updater(trainer.policy, trainer.learner.objective, still, trainer.config.optim, trainer.ranks)
    for taken in (experience, experience.detached(), experience.detached()):
        updated = updater.update(taken)
        assert updated.items == 6 * TRAINED and updated.tally.maxima["update/on_policy_deviation"] < 3e-5
