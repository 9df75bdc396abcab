"""Docstrings begin with a noun or a verb in the imperative, names say what they hold, and functions take six parameters
at most, by benchmarks/house.py."""

from __future__ import annotations

import ast
import importlib
import re
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


@pytest.mark.parametrize(
    "source",
    [
        "found = 1",
        "for told in (): ...",
        "told.x",
        "x.wanted = 1",
        "f(how=1)",
        "lambda *told: 1",
        "def found(): ...",
        "async def found(): ...",
        "class wanted: ...",
        "import x as found",
        "try: ...\nexcept ValueError as found: ...",
        "[how for how in x]",
    ],
)
def test_names_that_say_nothing_are_seen_wherever_they_stand(house: Any, source: str) -> None:
    assert list(house.private_words(ROOT / "src/a.py", ast.parse(source), ROOT))


def test_longer_names_and_texts_are_not_taken_for_them(house: Any) -> None:
    source = "founder = f(x, 'told', told_apart=1)  # wanted"
    assert not list(house.private_words(ROOT / "src/a.py", ast.parse(source), ROOT))


def test_every_name_says_what_it_holds(house: Any) -> None:
    texts = {file: file.read_text(encoding="utf-8") for file in house.scripts(ROOT)}
    word = re.compile(rf"\b({'|'.join(house.PRIVATE_WORDS)})\b")  # most files have none, and parsing takes seconds
    suspects = {file: ast.parse(text) for file, text in texts.items() if word.search(text)}
    assert [place for file, tree in suspects.items() for place in house.private_words(file, tree, ROOT)] == []


def test_no_function_takes_more_than_six_parameters(house: Any) -> None:
    every = (
        function
        for file in house.sources(ROOT)
        for function in house.functions(file, ast.parse(file.read_text(encoding="utf-8")), ROOT)
    )
    assert [function for function in every if function.parameters > house.MOST_PARAMETERS] == []
