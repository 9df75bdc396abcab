"""After a run the trained weights moved and the frozen ones did not; where that fails, the run says so and stops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from progrpo.config import GRPOSettings, ObjectiveSettings, OptimSettings
from progrpo.training import checks
from progrpo.training.checks import SelfCheckError


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors}


@pytest.mark.parametrize(
    ("weights", "quantize", "kl_beta"),
    [("lora", "none", 0.0), ("lora", "int8", 0.0), ("full", "none", 0.0), ("full", "none", 0.01)],
)
def test_trained_weights_move_and_frozen_ones_do_not(
    tiny_trainer, tiny_config, tiny_policy, weights, quantize, kl_beta
):
    model = replace(tiny_config().model, weights=weights)
    config = tiny_config(model=model, objective=ObjectiveSettings(grpo=GRPOSettings(kl_beta=kl_beta)))
    trainer = tiny_trainer(config, tiny_policy(weights, quantize=quantize))
    policy = trainer.policy
    start, frozen = copies(policy.trainable.items()), copies(policy.frozen())
    for _ in range(2):
        trainer.step()
    trainer.check_frozen()
    assert {n: torch.equal(t, frozen[n]) for n, t in policy.frozen()} == dict.fromkeys(frozen, True)
    moved = [name for name, p in policy.trainable.items() if not torch.equal(p, start[name])]
    assert len(moved) > len(start) // 2
    kept = weights == "lora" or kl_beta > 0  # a copy of all weights only where something asks for it
    assert ("reference" in policy.named_weights) == kept
    with policy.weights("reference" if kept else "current"):
        assert all(torch.equal(p, start[name]) for name, p in policy.trainable.items()) == kept


def test_a_frozen_weight_that_moves_is_named(tiny_trainer, tiny_config):
    trainer = tiny_trainer(tiny_config())
    trainer.check_frozen()
    name, tensor = next((n, t) for n, t in trainer.policy.frozen() if n.endswith("weight") or "base_layer" in n)
    with torch.no_grad():
        tensor.view(-1)[0] += 1e-6
    with pytest.raises(SelfCheckError, match=f"1 frozen weights moved during training, first {name}"):
        trainer.check_frozen()


@pytest.mark.parametrize(("weights", "lr"), [("full", 1e-15), ("lora", 1e-60)])
def test_a_learning_rate_too_small_to_move_anything_is_named(tiny_trainer, tiny_config, weights, lr):
    model = replace(tiny_config().model, weights=weights)
    trainer = tiny_trainer(tiny_config(model=model, optim=OptimSettings(lr=lr)))
    with pytest.raises(SelfCheckError, match=r"no trained weight moved in the first update: is optim\.lr too small"):
        trainer.step()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_updates_whose_gradient_is_not_finite_are_skipped_and_too_many_stop_the_run(
    tiny_trainer, tiny_config, tiny_policy, value
):
    policy = tiny_policy()
    first = next(iter(policy.trainable.values()))
    bad = [True]
    first.register_hook(lambda gradient: gradient + value if bad[0] else gradient)
    trainer = tiny_trainer(tiny_config(), policy)
    start = {name: p.detach().clone() for name, p in policy.trainable.items()}
    record = trainer.step().record
    assert record["update/skipped"] == 1 and "update/grad_norm" not in record and "update/loss" not in record
    assert all(torch.equal(p, start[name]) for name, p in policy.trainable.items())
    bad[0] = False
    record = trainer.step().record  # a first update that is taken, and so is checked
    assert record["update/skipped"] == 0 and record["update/grad_norm"] > 0
    assert any(not torch.equal(p, start[name]) for name, p in policy.trainable.items())
    bad[0] = True
    with pytest.raises(SelfCheckError, match=r"iteration 3: 2 of the last 3 updates were skipped.*lower optim\.lr"):
        trainer.step()


def test_rewards_that_are_all_missing_stop_the_run(tiny_trainer, tiny_config):
    trainer = tiny_trainer(tiny_config(), reward=lambda images, prompts: [None] * len(images))
    with pytest.raises(
        SelfCheckError, match=r"iteration 1: 14 of 14 scores of reward reward are missing.*no finite number"
    ):
        trainer.step()


def test_moved_weights_that_do_not_reach_the_network_are_seen(tiny_trainer, tiny_config, tiny_policy, first_experience):
    policy = tiny_policy(moved=0.1)
    experience = first_experience(tiny_trainer(tiny_config(), policy))
    checks.check_bound(policy, experience)
    policy.pipeline.transformer.disable_adapters()
    with pytest.raises(SelfCheckError, match="the adapter is not bound to it"):
        checks.check_bound(policy, experience)
