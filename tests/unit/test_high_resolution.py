"""The page of high resolution follows from its JSON."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_committed_tables_are_what_the_json_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    study = importlib.import_module("high_resolution")
    results = ROOT / "docs/results/high_resolution.json"
    tables = study.tables(json.loads(results.read_text()))
    assert f"<!-- tables:begin -->\n{tables}\n<!-- tables:end -->" in results.with_suffix(".md").read_text()
