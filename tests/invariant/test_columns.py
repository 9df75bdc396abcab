"""Lines of pages end at 120 columns; ruff holds those of code."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(page for folder in ("docs", "src") for page in (ROOT / folder).rglob("*.md"))


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("*.md")), *PAGES], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_a_pages_lines_end_at_120_columns(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [f"line {i}: {line[:60]} ..." for i, line in enumerate(lines, 1) if len(line) > 120]
