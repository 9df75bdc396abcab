"""Runs by accelerate's launcher with DeepSpeed, on the CPU over gloo; `make deepspeed-test` brings its package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from progrpo.cli import main
from progrpo.config import OptimSettings
from progrpo.storage import load_state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="make deepspeed-test brings DeepSpeed"),
]

SMOKE = ("smoke", "--checkpoint.every", "1", "--eval.pictures", "2", "--prompts.per-iteration", "3")
FULL = ("--model.weights", "full", "--optim.ema-decay", "0.5", "--optim.updates-per-rollout", "2")

STEPS = '''
"""AdamW with its state in parts beside AdamW itself, by large gradients.

DeepSpeed must not clip what is clipped already.
"""
import torch
from torch.optim import AdamW

from progrpo.training.distributed import Ranks
from progrpo.training.zero import PartitionedAdamW, Zero

ranks, how = Ranks(), {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
for zero in (Zero(1), Zero(2, offload=True)):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((5, 3), (7,), (2, 2))] for _ in range(2))
    parted, whole = PartitionedAdamW(ours, zero, **how), AdamW(theirs, **how)
    for lr in (1e-2, 2e-2, 1e-3):
        for own, other in zip(ours, theirs):
            own.grad = torch.randn(own.shape, generator=generator) * 100
            other.grad = own.grad.clone()
        parted.param_groups[0]["lr"] = whole.param_groups[0]["lr"] = lr
        parted.step()
        whole.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    if ranks.is_main:
        torch.testing.assert_close(parted.state_dict(), whole.state_dict(), rtol=1e-5, atol=1e-6)
    else:
        assert parted.state_dict()["state"] == {}
    assert all(state["exp_avg"].numel() == 14 for state in parted._parts.state.values())  # of 26, in even parts
ranks.wait_for_all()
'''


def launch(world: int, tmp_path: Path, *args: str, **of_deepspeed: Any) -> str:
    """The output of the command. With three prompts two processes make different numbers of backward passes."""
    (file := tmp_path / "accelerate.yaml").write_text(
        yaml.safe_dump({"distributed_type": "DEEPSPEED", "num_machines": 1, "deepspeed_config": of_deepspeed})
    )
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(file),
        "--main_process_port",
        "0",
    ]
    command += ["--num_processes", str(world), "--module", "progrpo", "train", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def state_of(run: Path) -> dict[str, Any]:
    return load_state(sorted((run / "checkpoints").glob("iteration_*[0-9]"))[-1])


def trained(run: Path) -> dict[str, torch.Tensor]:
    lora = run / "lora" / "pytorch_lora_weights.safetensors"
    return load_file(lora if lora.exists() else run / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def assert_same(assert_trained_alike) -> Callable[[Path, Path], None]:
    """Assert equal weights, and optimizer states: AdamW's steps alone would hide a wrong scale of gradients."""

    def check(run: Path, other: Path) -> None:
        # a LoRA's second matrix is saved alpha / rank times, which is 2
        assert_trained_alike(trained(run), trained(other), 2 * OptimSettings().lr, steps=4)
        mine, theirs = (state_of(folder)["optimizer"] for folder in (run, other))
        assert mine["param_groups"] == theirs["param_groups"] and mine["state"].keys() == theirs["state"].keys()
        for name in ("step", "exp_avg", "exp_avg_sq"):
            one, two = (torch.cat([s[name].flatten() for s in o["state"].values()]) for o in (mine, theirs))
            assert one.norm() > 0 and (one - two).norm() <= 1e-3 * two.norm(), name

    return check


def test_steps_are_adamws_and_each_process_has_half_of_the_state(tmp_path):
    (script := tmp_path / "steps.py").write_text(STEPS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)  # it builds first
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module", params=[(), FULL], ids=["lora", "full"])
def straight(request, tmp_path_factory) -> tuple[tuple[str, ...], Path]:
    """Three iterations in one process, without DeepSpeed."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main(["train", *SMOKE, *request.param, "--iterations", "3", "--out", str(out)]) == 0
    return request.param, out


def test_two_train_what_one_does(straight, tmp_path, assert_same):
    options, alone = straight
    said = launch(2, tmp_path, *SMOKE, *options, "--iterations", "3", "--out", str(tmp_path / "run"), zero_stage=2)
    assert "the optimizer's state is shared out among 2 processes; gradients stay whole" in said
    assert_same(tmp_path / "run", alone)


def test_one_and_two_and_three_take_turns(straight, tmp_path, assert_same):
    """One without DeepSpeed, two with the state on the CPU, three: checkpoints are whole, whoever writes them."""
    options, alone = straight
    run = str(tmp_path / "run")
    assert main(["train", *SMOKE, *options, "--iterations", "1", "--out", run]) == 0
    offload = {"zero_stage": 1, "offload_optimizer_device": "cpu"}
    assert "2 processes on the CPU" in launch(2, tmp_path, "--resume", run, "--iterations", "2", **offload)
    launch(3, tmp_path, "--resume", run, "--iterations", "3", zero_stage=1)
    assert_same(tmp_path / "run", alone)


def test_what_two_leave_one_goes_on_with(straight, tmp_path, assert_same):
    options, alone = straight
    run = str(tmp_path / "run")
    launch(2, tmp_path, *SMOKE, *options, "--iterations", "2", "--out", run, zero_stage=1)
    assert main(["train", "--resume", run, "--iterations", "3"]) == 0
    assert_same(tmp_path / "run", alone)
