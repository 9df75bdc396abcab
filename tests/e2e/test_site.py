"""The documentation site: its navigation has every page once, and a built site is checked for links."""

from __future__ import annotations

import importlib.util
from pathlib import Path, PurePath
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs/site"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("weights/*/README.md")]


def files(entries: list[dict[str, str]], pages: set[str]) -> list[str]:
    """The pages of a part of the navigation; a glob stands for those that the part does not name."""
    named = [entry["file"] for entry in entries if "file" in entry]
    globs = [entry["glob"] for entry in entries if "glob" in entry]
    return named + [page for page in pages if page not in named and any(PurePath(page).match(glob) for glob in globs)]


def test_the_navigation_has_every_page_once() -> None:
    toc = yaml.safe_load((SITE / "toc.yml").read_text())
    pages = {page.relative_to(ROOT).with_suffix("").as_posix() for page in [*SITE.glob("*.rst"), *PAGES]}
    listed = [toc["root"], *(file for part in toc["subtrees"] for file in files(part["entries"], pages))]
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
