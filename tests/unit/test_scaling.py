"""The figures of benchmarks/scaling.py, by hand, and runs of it and benchmarks/iteration.py with random weights."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from progrpo.config import OptimSettings, PlanSettings, PromptSettings, SamplingSettings, prompt_cost
from progrpo.recipes import load_recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("scaling")


@pytest.fixture
def config():
    """12 prompts, 8 members of which 4 are left after 3 of 5 steps, guided; all that is stochastic is trained."""
    return replace(
        load_recipe("smoke"),
        prompts=PromptSettings(per_iteration=12),
        sampling=SamplingSettings(num_inference_steps=5, guidance_scale=2.0, microbatch=4),
        plan=PlanSettings(preset="custom", group_size=8, prune=((2, 4),)),
        optim=OptimSettings(microbatch=4),
    )


CALL, TRAIN, PICTURE = 0.5, 2.0, 0.25


def reckoned(scaling, config, processes, split, net=None):
    model = scaling.Model(lambda rows: CALL * rows, lambda rows: TRAIN * rows, PICTURE, trained=100, latent=64)
    silent = scaling.Network(per_node=8, inside=1e30, between=1e30, latency=0.0)
    messages = scaling.Messages(sums=3, gathers=2, fixed=1000, per_row=10, unpickling=0.0)
    return scaling.seconds(config, processes, split, model, messages, net or silent)


def test_one_process_takes_what_the_plan_counts(scaling, config):
    cost = prompt_cost(config, scaling.resolve_plan(config)) * 12
    seconds = reckoned(scaling, config, 1, split=False)
    assert seconds["sample"] == pytest.approx(CALL * cost.nfe)
    assert seconds["pictures"] == pytest.approx(PICTURE * cost.decodes)
    assert seconds["update"] == pytest.approx(TRAIN * cost.trained_steps)
    assert seconds["gradients"] == seconds["objects"] == seconds["survivors that move"] == 0


@pytest.mark.parametrize(("processes", "prompts"), [(2, 6), (5, 3), (12, 1)])
def test_whole_prompts_are_dealt_and_the_fullest_counts(scaling, config, processes, prompts):
    alone, seconds = (reckoned(scaling, config, count, split=False) for count in (1, processes))
    for part in ("sample", "pictures", "update"):
        assert seconds[part] == pytest.approx(alone[part] * prompts / 12)


def test_members_are_dealt_where_groups_are_split(scaling, config):
    seconds = reckoned(scaling, config, 32, split=True)
    # of 96 members each has 3, of 48 that are left 2; their calls are pairs
    assert seconds["sample"] == pytest.approx(CALL * 2 * (3 * 3 + 2 * 2))
    assert seconds["pictures"] == pytest.approx(PICTURE * (3 + 2))


def test_gradients_go_round_in_machines_and_between_them(scaling, config):
    net = scaling.Network(per_node=8, inside=100.0, between=10.0, latency=1e-3)
    assert net.sum(1e9, 1) == net.gather(1e9, 1) == 0
    assert net.sum(1e9, 8) == pytest.approx(2 / 100 + 2 * 3 * 1e-3)
    assert net.sum(1e9, 16) == pytest.approx(2 / 100 + 2 / 10 + 2 * 4 * 1e-3)
    assert net.gather(1e6, 16) == pytest.approx(16e6 / 10e9 + 2 * 2 * 4 * 1e-3)
    quiet = reckoned(scaling, config, 16, split=True)
    seconds = reckoned(scaling, config, 16, split=True, net=net)
    assert quiet["gradients"] == pytest.approx(0, abs=1e-12)
    assert seconds["gradients"] == pytest.approx(2 * net.sum(400, 16) + 3 * net.sum(8, 16))
    assert seconds["survivors that move"] > 0


def test_between_the_rows_that_were_timed_it_goes_straight(scaling, monkeypatch):
    monkeypatch.setattr(scaling, "timed", lambda work: work())
    at = scaling.by_rows(lambda rows: float(rows * rows), 6)  # timed at 1, 2, 4, 6
    assert [at(n) for n in (1, 2, 3, 4, 5, 6)] == [1, 4, 10, 16, 26, 36]
    assert scaling.by_rows(lambda rows: 7.0, 1)(1) == 7


def ran(*command: str) -> dict:
    done = subprocess.run([sys.executable, *command, "--json"], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["shapes-flow", "shapes-diffusion"])
def test_iterations_of_an_architecture_with_random_weights(model):
    few = ["--plans", "flash", "--iterations", "1", "--prompts", "1", "--microbatch", "24", "--train-microbatch", "24"]
    results = ran("iteration.py", "--random-weights", "--models", model, "--resolution", "32", "64", *few)
    figures = results["plans"][model]["flash"]
    assert figures["counts_agree"]
    assert figures["update"] > 0.1 * figures["sample"], "no group had a variance: nothing was trained"
    assert 0 < figures["sampling, of a matmul"] < 1.5 and 0 < figures["update, of a matmul"] < 1.5


@pytest.mark.slow
def test_scaling_by_what_was_measured():
    results = ran("scaling.py", "--recipes", "smoke", "--plans", "recipe", "--measure", "--processes", "1", "2", "8")
    by_world = results["results"]["smoke"]["recipe"]
    assert by_world["1"]["efficiency"] == 1 and by_world["1"]["objects"] == 0
    assert by_world["8"]["groups split"] and by_world["2"]["sample"] < by_world["1"]["sample"]
    assert all(torch.isfinite(torch.tensor(r["seconds"])) for r in by_world.values())
