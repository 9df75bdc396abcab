"""The page beside TRL follows from its JSON, and a missing environment is explained."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("frameworks")


def test_the_committed_tables_are_what_the_json_gives(study):
    results = ROOT / "docs/results/frameworks.json"
    tables = study.tables(json.loads(results.read_text()))
    assert f"<!-- tables:begin -->\n{tables}\n<!-- tables:end -->" in results.with_suffix(".md").read_text()


def test_both_frameworks_are_given_the_same_work(study):
    ours, theirs = (study.work_of(arm, seed=1, iterations=2) for arm in study.COMPARED)
    assert {name for name in vars(ours) if vars(ours)[name] != vars(theirs)[name]} == {"last_step"}


def test_ratios_are_of_the_same_seed(study):
    def run(seconds: float) -> dict[str, object]:
        stages = {"pictures": seconds, "update": seconds, "iteration": seconds, "reward": 1.0}
        first = {**stages, "iteration": 99.0}  # not counted
        versions = {"torch": "2"}
        return {"iterations": [first, stages], "peak_mb": 100, "around": 1.0, "versions": versions}

    runs = {seed: {arm: run(float(f)) for arm in study.ARMS} for seed, f in (("0", 1), ("1", 4))}
    runs["0"]["TRL"], runs["1"]["TRL"] = run(2.0), run(2.0)
    assert "| iteration, s | 2.5 | 2 | 1.25 (0.50 to 2.00) |" in study.tables({"work": {"iterations": 2}, "runs": runs})


def test_a_python_without_trl_is_refused_with_the_commands_that_make_one(study, monkeypatch, capsys):
    for option in ([], ["--peer-python", "/no/such/python"]):
        monkeypatch.setattr(sys, "argv", ["frameworks.py", *option])
        with pytest.raises(SystemExit, match="2"):
            study.main()
        assert "pip install trl==0.23.1" in capsys.readouterr().err
