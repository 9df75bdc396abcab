"""Runs of several processes by torchrun, as on a cluster: one dies, the number changes, weights are shared out."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from progrpo.cli import main
from progrpo.config import OptimSettings
from progrpo.zoo import WEIGHTS

pytestmark = pytest.mark.slow

SMOKE = ("smoke", "--checkpoint.every", "1", "--eval.pictures", "2", "--prompts.per-iteration", "3")
FULL = ("--model.weights", "full", "--model.shard", "--optim.ema-decay", "0.5")


def launch(world: int, *args: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        return subprocess.Popen([*command, "-m", "progrpo", "train", *args], env=env, stdout=file, stderr=file)


DENOISER = Path("transformer") / "diffusion_pytorch_model.safetensors"


def trained(run: Path) -> dict[str, torch.Tensor]:
    lora = run / "lora" / "pytorch_lora_weights.safetensors"
    return load_file(lora if lora.exists() else run / DENOISER)


@pytest.fixture(scope="module")
def assert_same(assert_trained_alike) -> Callable[[Path, Path], None]:
    """Assert that two runs of four iterations end alike, up to the rounding of other microbatches."""

    def check(run: Path, other: Path) -> None:
        expected = trained(other)
        # a LoRA's second matrix is saved alpha / rank times, which is 2
        assert_trained_alike(trained(run), expected, 2 * OptimSettings().lr, steps=4)
        before = load_file(WEIGHTS / "shapes-flow" / DENOISER)  # a LoRA's B begins at 0
        moved = [(w - before.get(name, 0)).abs().max() for name, w in expected.items() if "lora_A" not in name]
        assert max(moved) > 1e-3

    return check


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Four iterations in one process."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main(["train", *SMOKE, "--iterations", "4", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def straight_full(tmp_path_factory) -> Path:
    """The same with all weights."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main(["train", *SMOKE, *FULL, "--iterations", "4", "--out", str(out)]) == 0
    return out


def test_two_that_share_weights_leave_what_one_goes_on_with(straight, tmp_path, assert_same):
    run, log = tmp_path / "run", tmp_path / "log"
    assert launch(2, *SMOKE, "--model.shard", "--iterations", "2", "--out", str(run), log=log).wait(90) == 0, (
        log.read_text()
    )
    assert main(["train", "--resume", str(run), "--iterations", "4"]) == 0
    assert_same(run, straight)


def test_what_one_began_three_finish(straight, tmp_path, assert_same):
    run, log = tmp_path / "run", tmp_path / "log"
    assert main(["train", *SMOKE, "--iterations", "2", "--out", str(run)]) == 0
    assert launch(3, "--resume", str(run), "--iterations", "4", log=log).wait(90) == 0, log.read_text()
    assert_same(run, straight)


def test_shared_weights_that_are_trained_go_from_one_to_two_to_three(straight_full, tmp_path, assert_same):
    """In the end as a denoiser that diffusers reads; in one process they are whole."""
    run, log = tmp_path / "run", tmp_path / "log"
    assert main(["train", *SMOKE, *FULL, "--iterations", "1", "--out", str(run)]) == 0
    assert launch(2, "--resume", str(run), "--iterations", "2", log=log).wait(90) == 0, log.read_text()
    assert launch(3, "--resume", str(run), "--iterations", "4", log=log).wait(120) == 0, log.read_text()
    assert_same(run, straight_full)
    SD3Transformer2DModel.from_pretrained(run / "transformer")


def test_two_go_on_as_two_would_have_gone_to_the_bit(tmp_path):
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    shared = (*SMOKE, *FULL)
    assert launch(2, *shared, "--iterations", "3", "--out", str(whole), log=log).wait(90) == 0, log.read_text()
    assert launch(2, *shared, "--iterations", "2", "--out", str(parts), log=log).wait(90) == 0, log.read_text()
    assert launch(2, "--resume", str(parts), "--iterations", "3", log=log).wait(90) == 0, log.read_text()
    ours, expected = trained(parts), trained(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in ours.items())


@pytest.mark.parametrize(("victim", "options"), [(0, ()), (1, ()), (1, ("--model.shard",))])
def test_a_process_that_dies_ends_all_and_the_run_goes_on(straight, tmp_path, victim, options, assert_same):
    run, log = tmp_path / "run", tmp_path / "log"
    launched = launch(2, *SMOKE, *options, "--iterations", "500", "--out", str(run), log=log)
    while launched.poll() is None and len(list((run / "checkpoints").glob("iteration_*[0-9]"))) < 2:
        time.sleep(0.05)
    workers = {
        int(worker.environ()["RANK"]): worker
        for worker in psutil.Process(launched.pid).children(recursive=True)
        if "RANK" in worker.environ()
    }
    workers[victim].send_signal(signal.SIGKILL)
    start = time.perf_counter()
    assert launched.wait(60) == 1 and time.perf_counter() - start < 45
    assert all(not worker.is_running() for worker in workers.values())
    said = log.read_text()
    assert "progrpo: stopped: another process of this run was lost (" in said
    assert f"with progrpo train --resume {run}" in said
    if victim:  # the one that writes lived on
        assert json.loads((run / "summary.json").read_text())["status"].startswith("stopped: another process")
    done = len((run / "metrics.jsonl").read_text().splitlines())
    target = max(4, done)
    assert main(["train", "--resume", str(run), "--iterations", str(target)]) == 0
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    if target == 4:
        assert_same(run, straight)


@pytest.mark.parametrize("survivor", [0, 1])
@pytest.mark.parametrize("dies_in", ["Ranks", "inputs_from"])
def test_a_process_that_dies_before_the_first_iteration_is_said_in_the_same_sentence(tmp_path, survivor, dies_in):
    """Without a launcher that ends the others itself, as where it is on another machine."""
    out, log = tmp_path / "run", tmp_path / "log"
    command = ["train", *SMOKE, "--out", str(out)]
    dies = f"""
import os, signal
from progrpo.cli import main
from progrpo.training import entry
begun = entry.{dies_in}
def die(*inputs):
    if not inputs:
        begun()  # until the other process is there as well
    os.kill(os.getpid(), signal.SIGKILL)
entry.{dies_in} = die
main({command!r})
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    env = {**os.environ, **place, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        lost = subprocess.Popen([sys.executable, "-c", dies], env={**env, "RANK": str(1 - survivor)})
        lives = subprocess.Popen(
            [sys.executable, "-m", "progrpo", *command], env={**env, "RANK": str(survivor)}, stdout=file, stderr=file
        )
    assert lost.wait(60) == -signal.SIGKILL
    assert lives.wait(60) == 1
    said = log.read_text()
    assert "progrpo: stopped: another process of this run was lost (" in said
    assert said.rstrip().endswith("there is no checkpoint yet") and "Traceback" not in said
    assert not out.exists() or survivor == 0


def test_what_is_refused_ends_all(tmp_path):
    log = tmp_path / "log"
    assert launch(4, *SMOKE, "--out", str(tmp_path / "run"), log=log).wait(120) != 0
    assert "prompts.per_iteration is 3, fewer than the 4 processes" in log.read_text()
    assert not (tmp_path / "run").exists()
