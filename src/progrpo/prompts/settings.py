"""The settings of prompts: the part `prompts` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from progrpo.settings import Rule, between, setting

COLUMN_NAME = Rule(bool, "the name of a field")


@dataclass(frozen=True)
class PromptSettings:
    source: str = "shapes"
    """`shapes` (the built-in world, its train split); a file: .txt (a prompt a line), .jsonl (an object a line), .json (a list of texts or
    objects), .csv (a line of names, then rows) or .parquet; or `dataset:NAME` or `dataset:NAME:CONFIG`: a dataset of the `datasets` library, on the
    hub or saved in a folder, and one of its configurations. For a model that edits the column `image` is the picture to change; in a file its
    path, from the file's folder."""
    column: str = setting("prompt", COLUMN_NAME)
    """The field of a row that holds its text; the others reach rewards by their names. Also of rows that Python gives."""
    per_iteration: int = setting(12, between(1, 100_000))
    order: Literal["turn", "signal"] = "turn"
    """`turn`: kinds in turn, each prompt once before any comes again. `signal`: drawn in proportion to how far the rewards of a
    prompt's groups (and of its kind's) differ, so that sampling goes where there is something to learn."""
    split_groups: bool = False
    """With several processes: each samples some members of every group, instead of some groups whole. Survivors are moved to where
    there are fewer after each prune. For groups that take one process too long."""
