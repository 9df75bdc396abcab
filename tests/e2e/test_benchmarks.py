"""Benchmarks whose figures nobody asks for every day still run, as small as they can be: twice one was found broken by then."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL: dict[str, list[str]] = {
    "attention": ["--models", "shapes-flow", "--rows", "2", "--rounds", "1"],
    "cpu": ["--rows", "2", "--pictures", "1", "--rounds", "1"],
    "iteration": ["--models", "shapes-flow", "--plans", "window", "--prompts", "1", "--iterations", "1"],
    "preview": [
        "--models",
        "shapes-flow",
        "--groups",
        "2",
        "--group-size",
        "4",
        "--seeds",
        "0",
        "--probe-groups",
        "2",
        "--num-inference-steps",
        "3",
    ],
    "selection": ["--repeats", "1"],
    "verifier": ["--repeats", "1"],
    "waves": ["--plans", "none", "--delay-ms", "1", "--waves", "1", "2", "--iterations", "1"],
}


def numbers(node: Any) -> list[float]:
    if isinstance(node, (dict, list)):
        return [n for child in (node.values() if isinstance(node, dict) else node) for n in numbers(child)]
    return [float(node)] if isinstance(node, (int, float)) else []


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_runs_and_prints_one_json_object(name):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *SMALL[name], "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict) and len(numbers(found)) > 3


@pytest.mark.slow
def test_a_search_runs_and_may_try_all_of_its_trials(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    search = importlib.import_module("search")
    for changes in search.TRIALS.values():
        search.config_of(changes, seed=0)
    found = search.run(search.config_of(search.TRIALS["quickstart adaptive"], seed=0), 0.1, 1.0, pictures=2)
    assert [point["iterations"] for point in found] == [0, 1] and found[0]["prune"] == [[4, 12]]
