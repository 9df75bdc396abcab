"""The published questions of judges, as texts beside this file; README.md says where each is from."""

from __future__ import annotations

from pathlib import Path


def question_text(name: str) -> str:
    """The text of a question as it was published."""
    return (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n")
