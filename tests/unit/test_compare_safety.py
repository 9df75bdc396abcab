"""A comparison of strangers' run folders: no text of theirs becomes markup or script, and no file outside is read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from progrpo.pages.compare import compare, comparison_page, figures_of
from tests.support.run_folders import written_run
from tests.unit.test_report_safety import EVIL, KNOWN, Page

WORDS = (*EVIL, "\u202egnp.\u2066أحمر", "🧨‍🔥", "a\x00b", "\ud800")


def runs(folder: Path, word: str) -> list[Path]:
    """Two recipes: one finished run, and one that differs in a setting that is named by the word, and was stopped."""
    first, second = (written_run(folder / name, word) for name in ("one", "two"))
    first.summary.write({**first.summary.read(), "status": "finished"})
    for run, value in ((first, 1), (second, word)):
        run.log_config({**run.config.read(), f"{word}.x": value, "eval": {"every": 1}})
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().split("\n")[:-1]]
        records = [{**line, "eval/graded": 0.5 + i, "eval/kl": 0.1 * i} for i, line in enumerate(lines)]
        run.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in records))
    return [first.path, second.path]


def page_of(folders: list[Path]) -> Page:
    return Page(comparison_page(compare(folders)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(runs(tmp_path_factory.mktemp("plain"), "word"))


@pytest.mark.parametrize("word", WORDS)
def test_words_stay_words(tmp_path, plain, word):
    folders = runs(tmp_path, word)
    page = page_of(folders)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert re.fullmatch(r"[\w-]*", attributes.get("id", ""))
        assert attributes.keys() <= KNOWN[tag] | {"class", "id"} if tag in KNOWN else True
        for name in ("href", "src"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    for script in page.scripts[1:]:  # the first is Plotly itself
        for mark in ("\\u003cscript", "\\u003cimg", "\\u003csvg", "\\u003ca href", "\\u003cb\\u003e", "\\u003c!--"):
            assert mark not in script
        assert '");alert' not in script
    json.dumps(figures_of(compare(folders)), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("summary.json", ("processes",), "<b>"),
        ("summary.json", ("wall_seconds",), "<b>"),
        ("summary.json", ("device",), ["<b>"]),
        ("evaluation/after.json", (0, "graded"), "<b>"),
        ("evaluation/after.json", (0, "held_out"), 3),
        ("evaluation/after.json", (0, "prompt"), 3),
        ("config.json", ("reward",), "<b>"),
        ("config.json", ("eval",), ["<b>"]),
        ("config.json", ("seed",), {"<b>": 1}),
    ],
)
def test_values_of_another_kind_are_shown_as_words_or_refused_in_a_sentence(tmp_path, plain, name, place, value):
    folders = runs(tmp_path, "word")
    data = json.loads((folders[0] / name).read_text())
    part = data
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    (folders[0] / name).write_text(json.dumps(data))
    try:
        page = page_of(folders)
    except ValueError as refused:
        assert str(refused).isprintable() and len(str(refused)) < 1000
    else:
        assert not any(tag == "b" and "b" not in {t for t, _ in plain.elements} for tag, _ in page.elements)


@pytest.mark.parametrize("value", ["<a href=https://x>x</a>", [1], {"a": 1}, True])
def test_metrics_that_are_no_numbers_are_no_labels(tmp_path, value):
    folders = runs(tmp_path, "word")
    line = json.dumps({"iteration": 0, "seconds": 1.0, "eval/graded": value, "eval/kl": 0.1})
    (folders[0] / "metrics.jsonl").write_text(line + "\n")
    try:
        assert "https://x" not in comparison_page(compare(folders)).partition("</script></head>")[2]
    except ValueError as refused:
        assert "cannot be read as progrpo writes it" in str(refused)


def test_pictures_outside_of_the_folder_are_not_read(tmp_path):
    folders = runs(tmp_path, "word")
    file = folders[0] / "evaluation" / "after.json"
    shown = sum(tag == "img" for tag, _ in page_of(folders).elements)
    records = [{**record, "picture": "../two/evaluation/after/000.png"} for record in json.loads(file.read_text())]
    file.write_text(json.dumps(records))
    assert shown > sum(tag == "img" for tag, _ in page_of(folders).elements)
