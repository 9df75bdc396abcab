"""A report of a stranger's run folder: no text of it becomes markup or script, and only files inside it are read."""

from __future__ import annotations

import ast
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import progrpo
from progrpo.pages.report import write_report
from tests.support.run_folders import written_run

EVIL = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    '<a href="javascript:alert(1)">x</a>',
    '\\");alert(1)//',
    "\u2028alert(1)\u2029",
    "</style><script>alert(1)</script>",
    "<!-- <script>",
    "%{fullData.name}<b>alert(1)</b>",
)


class Page(HTMLParser):
    """The elements of a page, and what stands in its scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self._inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag == "script"

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "script"

    def handle_data(self, data):
        if self._inside:
            self.scripts.append(data)


def page_of(run):
    return Page(write_report(run.path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return page_of(written_run(tmp_path_factory.mktemp("plain") / "run", "word"))


@pytest.mark.parametrize("word", EVIL)
@pytest.mark.parametrize("finished", [False, True])
def test_words_stay_words(tmp_path, plain, word, finished):
    run = written_run(tmp_path / "run", word)
    if finished:
        run.summary.write({**run.summary.read(), "status": "finished"})
    page = page_of(run)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert len(page.scripts) == len(plain.scripts)
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert re.fullmatch(r"[\w-]*", attributes.get("id", ""))  # scripts and styles name them too
        assert attributes.keys() <= KNOWN[tag] | {"class", "id"} if tag in KNOWN else True
        for name in ("href", "src"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    for script in page.scripts[1:]:  # the first is Plotly itself
        for mark in ("\\u003cscript", "\\u003cimg", "\\u003csvg", "\\u003ca href", "\\u003cb\\u003e", "\\u003c!--"):
            assert mark not in script  # Plotly reads some HTML in its labels
        assert '");alert' not in script


KNOWN = {"img": {"src", "alt"}, "a": {"href"}, "script": {"type"}, "style": set(), "title": set()}


@pytest.mark.parametrize("kind", ["up", "absolute", "link", "linked folder"])
def test_pictures_outside_of_the_folder_are_not_read(tmp_path, kind):
    run = written_run(tmp_path / "run", "word")
    secret = tmp_path / "secret.png"
    Image.fromarray(np.full((8, 8, 3), [255, 0, 0], np.uint8)).save(secret)
    shown = sum(tag == "img" for tag, _ in page_of(run).elements)
    name = {"up": "../secret.png", "absolute": str(secret), "link": "link.png", "linked folder": "far/secret.png"}[kind]
    if kind == "link":
        (run.path / name).symlink_to(secret)
    if kind == "linked folder":
        (run.path / "far").symlink_to(tmp_path)
    for when in ("before", "after"):
        run.evaluations[when].write([{**record, "picture": name} for record in run.evaluations[when].read()])
    audits = run.read_audits()
    for audit in audits:
        run.write_text(f"audit/{audit['iteration']:04d}.json", json.dumps({**audit, "strip": name}))
    page = page_of(run)
    assert shown == 4 and not any(tag == "img" for tag, _ in page.elements)
    assert "are missing" in (run.path / "report.html").read_text()


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "evaluation/before.json", "audit/0000.json"])
def test_records_that_are_links_out_of_the_folder_are_refused(tmp_path, name):
    run = written_run(tmp_path / "run", "word")
    file = run.path / name
    os.rename(file, tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match=r"is a link out of the run folder; put the file itself there$"):
        write_report(run.path)


def test_only_a_png_is_opened_as_a_picture(tmp_path):
    run = written_run(tmp_path / "run", "word")
    for name in ("before", "after"):
        Image.new("RGB", (8, 8)).save(run.path / f"evaluation/{name}/000.png", format="BMP")  # not what its name says
        (run.path / f"evaluation/{name}/001.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert not any(tag == "img" for tag, _ in page_of(run).elements)


def test_a_picture_that_would_fill_the_memory_is_not_opened(tmp_path, monkeypatch):
    run = written_run(tmp_path / "run", "word")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8 * 8 // 2 - 1)  # twice as many are an error
    assert not any(tag == "img" for tag, _ in page_of(run).elements)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("summary.json", ("plan", "path"), "<b>"),
        ("summary.json", ("plan", "path"), ["<b>", 3]),
        ("summary.json", ("plan", "num_inference_steps"), 10**12),
        ("summary.json", ("cost", "counted", "nfe"), "<b>"),
        ("summary.json", ("wall_seconds",), "<b>"),
        ("summary.json", ("rewards",), ["<b>"]),
        ("audit/0000.json", ("steps",), ["<b>", 1]),
        ("audit/0000.json", ("iteration",), "<b>"),
        ("audit/0000.json", ("stopped_at",), ["<b>", None, 1, 2]),
        ("audit/0000.json", ("kept_ovf",), [99]),
        ("audit/0000.json", ("variance",), ["<b>", 1.0]),
        ("audit/0000.json", ("variance_final",), 3),
        ("evaluation/before.json", (0,), 3),
        ("evaluation/before.json", (0, "strict"), ["<b>"]),
        ("config.json", (), ["<b>"]),
    ],
)
def test_values_of_another_kind_are_refused_in_a_sentence(tmp_path, name, place, value):
    run = written_run(tmp_path / "run", "word")
    data = json.loads((run.path / name).read_text())
    part = data
    for key in place[:-1]:
        part = part[key]
    if place:
        part[place[-1]] = value
    (run.path / name).write_text(json.dumps(data if place else value))
    with pytest.raises(ValueError) as refused:
        write_report(run.path)
    assert str(run.path) in str(refused.value) or "audit" in str(refused.value)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 1000
    assert not (run.path / "report.html").exists()


def test_metrics_that_are_texts_are_refused(tmp_path):
    run = written_run(tmp_path / "run", "word")
    for key in ("iteration", "reward/mean", "preview/rank_correlation@<b>"):
        run.write_text(
            "metrics.jsonl", json.dumps({"iteration": 0, "reward/mean": 0.5, key: "<a href=https://x>x</a>"}) + "\n"
        )
        with pytest.raises(ValueError, match=r"curves|audits|no record of an iteration"):
            write_report(run.path)


# --- the package itself -----------------------------------------------------------------------------------------------

FILES = sorted(Path(progrpo.__file__).parent.rglob("*.py"))


def calls(file):
    """The names that a file calls, with their keywords: (`torch.load`, {`weights_only`: `True`})."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


def test_no_text_is_evaluated_and_nothing_is_unpickled():
    seen = 0
    for file in FILES:
        for name, keywords in calls(file):
            assert name not in ("eval", "exec", "compile", "__import__", "os.system"), (file, name)
            unpickles = name.partition(".")[0] in ("pickle", "dill", "marshal", "shelve") and name != "pickle.dumps"
            assert not unpickles, (file, name)
            for switch in ("shell", "allow_pickle", "trust_remote_code"):
                assert keywords.get(switch, "False") == "False", (file, name)
            if name == "torch.load":
                seen += 1
                assert keywords["weights_only"] == "True", file
    assert seen  # there are pickles, of published rewards
