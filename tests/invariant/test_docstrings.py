"""Docstrings of the sources begin with a noun or a verb in the imperative, by the rules of benchmarks/house.py."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("house")


@pytest.mark.parametrize("text", ["What a run gave.", "How long it took.", "Of one prompt.", "Computes the loss."])
def test_other_beginnings_lack_a_subject(house: Any, text: str) -> None:
    assert house.lacks_subject(text)


@pytest.mark.parametrize("text", ["The loss.", "Whether a run ended.", "Compute the loss.", "However long."])
def test_nouns_and_imperatives_lack_nothing(house: Any, text: str) -> None:
    assert not house.lacks_subject(text)


def test_no_docstring_of_the_sources_lacks_its_subject(house: Any) -> None:
    places = (
        f"{place} {text[:60]}"
        for file in house.sources(ROOT)
        for place, text in house.docstrings(file, ast.parse(file.read_text(encoding="utf-8")), ROOT)
        if house.lacks_subject(text)
    )
    assert list(places) == []
