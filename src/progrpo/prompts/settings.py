"""The settings of prompts: the section `prompts` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from progrpo.registry import choices_of, one_of
from progrpo.settings import Rule, between, setting

ORDERS: dict[str, str] = {
    "turn": "progrpo.prompts.order:InTurn",
    "signal": "progrpo.prompts.order:BySignal",
}
"""The built-in orders of prompts by name: classes like `prompts.order.PromptOrder`."""
if TYPE_CHECKING:
    OrderName = str
else:
    OrderName = choices_of(ORDERS)

COLUMN_NAME = Rule(bool, "the name of a field")


@dataclass(frozen=True)
class PromptSettings:
    """The settings of training prompts."""

    source: str = "shapes"
    """The training prompts: `shapes` or `words` (the train split of a built-in world), a file, or a dataset.
    Files: .txt (one prompt per line), .jsonl (one object per line), .json (a list of texts or objects),
    .csv or .tsv (a line of names, then rows) or .parquet.
    Datasets: `dataset:NAME` or `dataset:NAME:CONFIG`, read by the `datasets` library from the hub or a saved
    folder.
    For a model that edits pictures, the column `image` is the picture to change.
    In a file it is a path relative to the file's folder."""
    pairs: str = ""
    """A pairs file (docs/preferences.md), whose pictures are learnt from: offline preference optimisation.
    Empty: pictures are sampled.
    With pairs no group is sampled in training, so that `plan`, `preview` and `audit` are not read, and the reward
    measures evaluations alone. `source` is not read either."""
    column: str = setting("prompt", COLUMN_NAME)
    """The field of a row that holds its text. Rewards receive the other fields by name.
    This also holds for rows that are given in Python."""
    per_iteration: int = setting(12, between(1, 100_000))
    """The number of prompts in each iteration, with one group for each. With `pairs`: the number of pairs."""
    order: OrderName = setting("turn", one_of(ORDERS, "Class"))  # noqa: RUF009 (a field)
    """The order of prompts.
    `turn`: kinds take turns, and each prompt comes once before any prompt comes again.
    `signal`: a prompt is drawn in proportion to how far the rewards in its groups (and in groups of its kind)
    differ.
    More samples then go to prompts from which there is something to learn.
    `module:Class`: an order of your own, a class like `progrpo.prompts.order.PromptOrder`."""
    split_groups: bool = False
    """With several processes, let each process sample some members of every group, not whole groups.
    After each prune, survivors move to processes that have fewer.
    This is for groups that take one process too long."""
