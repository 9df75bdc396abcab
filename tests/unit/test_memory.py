"""When memory runs out, half the microbatch is tried, and what comes out is the same."""

from __future__ import annotations

import gc
import os
import platform
import resource
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from progrpo.config import AWMSettings, DGPOSettings, NFTSettings, ObjectiveSettings, OptimSettings, SamplingSettings
from progrpo.training.errors import SelfCheckError
from progrpo.training.memory import halved, is_out_of_memory

ONLY_SO_MANY = 3


@pytest.fixture(scope="module", autouse=True)
def earlier_objects():
    """Where memory runs out garbage is collected: what other tests left is not gone through each time."""
    gc.collect()
    gc.freeze()


def limited(policy: Any, monkeypatch: pytest.MonkeyPatch, most: int, training_alone: bool = False) -> list[int]:
    """A network that has memory for `most` rows; the rows of each call that it had memory for."""
    predict, rows = policy.predict, []

    def predict_within(x: torch.Tensor, *args: Any) -> torch.Tensor:
        if len(x) > most and (torch.is_grad_enabled() or not training_alone):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        rows.append(len(x))
        return predict(x, *args)

    monkeypatch.setattr(policy, "predict", predict_within)
    return rows


OBJECTIVES = {
    "grpo": ObjectiveSettings(),
    "nft": ObjectiveSettings(name="nft", nft=NFTSettings(draws=2)),
    "awm": ObjectiveSettings(name="awm", awm=AWMSettings(draws=2)),
    "dgpo": ObjectiveSettings(name="dgpo", dgpo=DGPOSettings(draws=2)),
}


@pytest.mark.parametrize(
    ("objective", "updates"), [("grpo", 2), ("nft", 1), pytest.param("awm", 1, marks=pytest.mark.slow), ("dgpo", 2)]
)
def test_a_run_that_runs_out_of_memory_learns_what_it_would_have(
    tiny_trainer, tiny_config, tiny_policy, monkeypatch, objective, updates
):
    config = tiny_config(
        objective=OBJECTIVES[objective],
        sampling=SamplingSettings(num_inference_steps=4, microbatch=8),
        optim=OptimSettings(microbatch=16, updates_per_rollout=updates),
    )
    plain = tiny_trainer(config, tiny_policy(moved=0.1))
    before = {name: p.detach().clone() for name, p in plain.policy.trainable.items()}
    expected = [plain.step().record for _ in range(2)]

    policy = tiny_policy(moved=0.1)
    rows = limited(policy, monkeypatch, ONLY_SO_MANY)
    trainer = tiny_trainer(config, policy)
    records = [trainer.step().record for _ in range(2)]
    assert max(rows) <= ONLY_SO_MANY
    assert trainer.config.sampling.microbatch == 2 and trainer.config.optim.microbatch in (
        2,
        4,
    )  # items come in equal parts
    assert config.sampling.microbatch == 8  # of the configuration that it was given
    for ours, theirs in zip(records, expected, strict=True):
        for name in ("reward/mean", "rollout/nfe", "rollout/decodes", "rollout/trained_steps", "update/grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    moved = torch.cat([(p - before[name]).flatten() for name, p in policy.trainable.items()])
    reference = torch.cat([(p - before[name]).flatten() for name, p in plain.policy.trainable.items()])
    assert (moved - reference).norm() <= 0.02 * reference.norm()  # Adam magnifies rounding where gradients are near 0


def test_only_what_has_too_little_memory_is_halved(tiny_trainer, tiny_config, tiny_policy, monkeypatch):
    policy = tiny_policy()
    limited(policy, monkeypatch, 5, training_alone=True)
    trainer = tiny_trainer(tiny_config(sampling=SamplingSettings(num_inference_steps=4, microbatch=8)), policy)
    trainer.step()
    assert (trainer.config.sampling.microbatch, trainer.config.optim.microbatch) == (8, 8)  # from 64: halves of 9 items


def test_an_audit_runs_within_memory_too(tiny_trainer, tiny_config, tiny_policy, monkeypatch):
    policy = tiny_policy()
    config = tiny_config(sampling=SamplingSettings(num_inference_steps=4, microbatch=8))
    trainer = tiny_trainer(replace(config, audit=replace(config.audit, every=1)), policy)
    limited(policy, monkeypatch, ONLY_SO_MANY)
    record = trainer.step().record
    assert record["audit/nfe"] == 4 * 4 and trainer.totals.audited.nfe == 16


def test_where_one_row_is_too_much_the_run_stops_in_a_sentence(tiny_trainer, tiny_config, tiny_policy, monkeypatch):
    policy = tiny_policy()
    limited(policy, monkeypatch, 0)
    with pytest.raises(SelfCheckError, match=r"out of memory at sampling\.microbatch 1; use a smaller model"):
        tiny_trainer(tiny_config(), policy).step()
    with pytest.raises(SelfCheckError, match=r"at optim\.microbatch 1"):
        halved(1, "optim.microbatch")


def test_reused_graphs_cannot_be_used_twice(tiny_trainer, tiny_config, tiny_policy, monkeypatch):
    policy = tiny_policy()
    trainer = tiny_trainer(tiny_config(optim=OptimSettings(reuse_rollout=True)), policy)
    backward = torch.Tensor.backward

    def fails(tensor, *args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", fails)
    with pytest.raises(SelfCheckError, match=r"leave out optim\.reuse_rollout"):
        trainer.step()
    monkeypatch.setattr(torch.Tensor, "backward", backward)


def test_what_running_out_of_memory_is():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    message = (
        "[enforce fail at alloc_cpu.cpp:124] err == 0."
        " DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    )
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert [halved(n, "x") for n in (2, 3, 64)] == [1, 1, 32]


def test_other_errors_are_raised(tiny_trainer, tiny_config, tiny_policy, monkeypatch):
    policy = tiny_policy()

    def breaks(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(policy, "predict", breaks)
    with pytest.raises(RuntimeError, match="mat1"):
        tiny_trainer(tiny_config(), policy).step()


FAULTS = """
import resource, sys
import torch
from progrpo.training.memory import keep_freed_memory
keep_freed_memory()
torch.ones(2**22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    torch.ones(2**22)  # 16 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory by these settings")
@pytest.mark.parametrize(
    "variables, kept", [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "100000", "MALLOC_MMAP_THRESHOLD_": "100000"}, False)]
)
def test_freed_memory_is_kept_unless_the_user_has_said_otherwise(variables, kept):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**environment, **variables}, capture_output=True, text=True, check=True
    )
    pages_of_all = 50 * 2**24 / resource.getpagesize()
    assert (int(run.stdout) < pages_of_all / 4) is kept
