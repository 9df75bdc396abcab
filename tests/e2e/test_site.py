"""The documentation site: its navigation has every page once, and a built site is checked for links."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs/site"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("weights/*/README.md")]


def files(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["file"] for entry in entries]


def test_the_navigation_has_every_page_once() -> None:
    toc = yaml.safe_load((SITE / "toc.yml").read_text())
    listed = [toc["root"], *(file for part in toc["subtrees"] for file in files(part["entries"]))]
    references = [page.with_suffix("") for page in SITE.glob("*.rst")]
    pages = {page.relative_to(ROOT).as_posix() for page in [*references, *(page.with_suffix("") for page in PAGES)]}
    assert len(listed) == len(set(listed))
    assert set(listed) == pages


def checker() -> Any:
    spec = importlib.util.spec_from_file_location("site_check", SITE / "check.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_built_sites_dead_links_and_foreign_files_are_reported(tmp_path: Path) -> None:
    good = '<a href="b.html#there">b</a><img src="c.png"><a href="https://arxiv.org">out</a>'
    bad = '<a href="d.html">d</a><a href="#gone">e</a><script src="https://cdn.example/x.js"></script>'
    (tmp_path / "a.html").write_text(good + bad)
    (tmp_path / "b.html").write_text('<h1 id="there">b</h1>')
    (tmp_path / "c.png").write_bytes(b"")
    assert checker().faults(tmp_path) == [
        "a.html links to d.html",
        "a.html links to #gone",
        "a.html loads https://cdn.example/x.js",
    ]
