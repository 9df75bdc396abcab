"""Runs with a user's own selector, plan and sampler, each named as `module:name`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from progrpo.cli import main
from progrpo.tracking.run_folder import RunFolder

OWN = """
from dataclasses import replace
from progrpo.diffusion import samplers
from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.rollout.prune import top_bottom

CALLS = []

def ends(scores_PG, keep, present_PG, seeds_P):
    CALLS.append(keep)
    return top_bottom(scores_PG, keep, present_PG, seeds_P)

def late(num_inference_steps):
    return Plan(6, (PrunePoint(num_inference_steps - 2, 4),))

FIXED = Plan(5, (PrunePoint(1, 3),))
BARE = Plan(16, ((3, 8),))

RECORDED = Plan(2, recorded=True)
TEXT = Plan("16")
HALVES = Plan(16.5)
WORDS = Plan(16, (PrunePoint("3", 8),))

def of_nothing():
    return FIXED

GENTLE = replace(samplers.DANCE, noise_level=0.2)

def indices(scores_PG, keep, present_PG, seeds_P):
    return scores_PG.topk(keep).indices
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_parts.py").write_text(OWN)
    return folder


@pytest.fixture
def run(own, monkeypatch):
    """The command line in the folder of the user's module."""
    monkeypatch.chdir(own)
    monkeypatch.syspath_prepend(str(own))
    return lambda *words: main([str(word) for word in words])


def trained(out: Path) -> Any:
    return RunFolder(out).summary.read()


def test_a_run_with_a_users_selector_plan_and_sampler(run, on_a_tiny_model, tmp_path):
    out = tmp_path / "run"
    names = ["--plan.selector", "own_parts:ends", "--plan.preset", "own_parts:late"]
    names += ["--sampling.sampler", "own_parts:GENTLE"]
    assert run("train", "smoke", "--iterations", 1, "--out", out, *names, *on_a_tiny_model) == 0
    summary = trained(out)
    assert summary["plan"]["path"] == [6, 4] and summary["plan"]["prune_steps"] == [4]
    assert summary["plan"]["selector"] == "own_parts:ends" and 4 in sys.modules["own_parts"].CALLS
    assert summary["cost"]["predicted"] == summary["cost"]["counted"]
    config = json.loads((out / "config.json").read_text())
    assert config["sampling"]["sampler"] == "own_parts:GENTLE" and config["plan"]["preset"] == "own_parts:late"
    assert run("train", "--resume", out, "--iterations", 2) == 0
    assert trained(out)["iterations"] == 2


def test_an_evaluation_of_a_run_imports_none_of_its_code(run, on_a_tiny_model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    names = ["--plan.selector", "own_parts:ends", "--plan.preset", "own_parts:FIXED"]
    names += ["--sampling.sampler", "own_parts:GENTLE"]
    assert run("train", "smoke", "--iterations", 1, "--out", out, *names, *on_a_tiny_model) == 0
    monkeypatch.delitem(sys.modules, "own_parts")
    assert run("eval", out, "--pictures", 2) == 0
    assert "own_parts" not in sys.modules


def test_a_plan_of_ones_own_goes_with_no_field_of_a_custom_plan(run, capsys):
    assert run("plan", "smoke", "--plan.preset", "own_parts:late", "--plan.group-size", 24) == 2
    assert "are read only when plan.preset is custom, not own_parts:late" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "name", "said"),
    [
        ("--plan.selector", "own_parts:end", "plan.selector 'own_parts:end': the module 'own_parts' has no"),
        ("--plan.selector", "own_parts:FIXED", "plan.selector: own_parts:FIXED must be a function, not"),
        (
            "--plan.preset",
            "own_parts:GENTLE",
            "plan.preset: own_parts:GENTLE must be a progrpo.rollout.plan.Plan, or a",
        ),
        ("--plan.preset", "own_parts:TEXT", "plan.preset: own_parts:TEXT must have whole numbers, not '16'"),
        ("--plan.preset", "own_parts:HALVES", "must have whole numbers, not 16.5"),
        ("--plan.preset", "own_parts:WORDS", "must have whole numbers, not '3'"),
        ("--plan.preset", "own_parts:RECORDED", "must not be recorded, since its groups are sampled; prompts.pairs"),
        ("--plan.preset", "own_parts:BARE", "or a function of num_inference_steps that returns one, with a tuple of"),
        (
            "--plan.preset",
            "own_parts:of_nothing",
            "own_parts:of_nothing(6): TypeError: of_nothing() takes 0",
        ),
        ("--sampling.sampler", "own_parts:late", "must be a progrpo.diffusion.samplers.StochasticStep, not"),
        ("--sampling.sampler", "no_such_module:x", "there is no module 'no_such_module'"),
    ],
)
def test_a_name_of_something_else_is_refused_in_a_sentence(run, capsys, option, name, said):
    assert run("plan", "smoke", option, name) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_a_selector_that_returns_something_else_ends_the_run_in_a_sentence(run, on_a_tiny_model, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", "smoke", "--out", out, "--plan.selector", "own_parts:indices", *on_a_tiny_model) == 2
    assert "plan.selector must return a progrpo.rollout.prune.Selection, not Tensor" in capsys.readouterr().err
