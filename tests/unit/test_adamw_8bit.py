"""The optimizer with averages in 8 bits. Without its package, which `make lean-test` installs, the refusal alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from progrpo.config import ModelSettings, OptimSettings
from progrpo.storage import load_state, save_state
from progrpo.training.optimizer import optimizer_from

WANTED = OptimSettings("adamw_8bit", lr=1e-2, warmup=3, betas=(0.8, 0.9))


def test_without_its_package_it_is_refused_with_the_command(monkeypatch):
    monkeypatch.setattr("progrpo.training.optimizer.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes, .*: pip install 'progrpo\[lean\]'"):
        optimizer_from(WANTED, [])
    assert type(optimizer_from(OptimSettings(), [torch.nn.Parameter(torch.ones(1))])) is torch.optim.AdamW


def test_it_is_adamw_up_to_the_rounding_of_averages_in_a_quarter_of_the_memory():
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(20, 64, 128, generator=generator)
    moved, held = {}, {}
    for name in ("adamw", "adamw_8bit"):
        weights = torch.nn.Parameter(torch.zeros(64, 128))
        optimizer = optimizer_from(OptimSettings(name), [weights])
        for gradient in gradients:
            weights.grad = gradient.clone()
            optimizer.step()
        moved[name] = weights.detach()
        sizes = [t.nbytes for t in optimizer.state[weights].values() if torch.is_tensor(t) and t.numel() > 1]
        held[name] = sum(sizes)
    off = (moved["adamw_8bit"] - moved["adamw"]).norm() / moved["adamw"].norm()
    assert 0 < off < 0.1
    tables = 2 * 256 * 4  # what 8 bits stand for, once for each of the two averages
    assert held["adamw_8bit"] - tables == held["adamw"] / 4 * (1 + 4 / 256)


def test_a_resumed_run_is_a_straight_one_bit_for_bit(tiny_trainer, tiny_config, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = tiny_config(model=ModelSettings(weights="full", max_sequence_length=8), optim=WANTED)
    straight, stopped = tiny_trainer(config), tiny_trainer(config)
    for trainer in (straight, stopped):
        trainer.step()
    save_state(tmp_path / "state", stopped.state_dict())
    resumed = tiny_trainer(config)
    resumed.load_state_dict(load_state(tmp_path / "state"))
    for trainer in (straight, resumed):
        trainer.step()
    one, other = (flat(trainer.learner.updater.optimizer.state_dict()["state"]) for trainer in (straight, resumed))
    assert any(t.dtype == torch.uint8 for t in one if torch.is_tensor(t))
    assert equal(one, other)
    assert equal(list(straight.policy.trainable.values()), list(resumed.policy.trainable.values()))


def flat(node: Any) -> list[Any]:
    return [leaf for key in node for leaf in flat(node[key])] if isinstance(node, dict) else [node]


def equal(one: list[Any], other: list[Any]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in pairs)
