"""Tables of results whose benchmarks print them follow from their JSON."""

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


def test_the_table_of_stale_sampling_is_what_its_json_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    study = importlib.import_module("stale_sampling")
    results = ROOT / "docs/results/stale_sampling.json"
    assert study.page_table(json.loads(results.read_text())) in results.with_suffix(".md").read_text()
