"""Commands around preferences: pairs check, pairs convert and label."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from progrpo.cli.command import Command, check_range
from progrpo.cli.output import show


@dataclass(frozen=True, kw_only=True)
class PairsCheck(Command):
    """Check a pairs file: every fault with its line, or what the file holds."""

    pairs: Annotated[Positional[Path], arg(metavar="PAIRS")]
    """The pairs file: .jsonl, .json, .csv or .parquet (docs/preferences.md)."""
    prompts: str | None = None
    """`shapes`, a prompt file or dataset:NAME. A pair with another prompt is a fault."""
    column: str = "prompt"
    """The field of rows of `--prompts` that holds the text."""

    def run(self) -> None:
        from progrpo.preferences.agreement import agreement, counts
        from progrpo.preferences.pairs import read_pairs
        from progrpo.prompts.load import load_prompts

        known = None
        if self.prompts is not None:
            by_kind = load_prompts(self.prompts, column=self.column)
            known = {prompt.text for prompts in by_kind.values() for prompt in prompts}
        pairs = read_pairs(self.pairs, known, decode=True)
        of_annotators = agreement(pairs)
        lines = [f"{name:<12}{count:,}" for name, count in counts(pairs).items()]
        lines.append(f"{'agreement':<12}{of_annotators or 'no pair was compared by two annotators'}")
        show("\n".join(lines))


@dataclass(frozen=True, kw_only=True)
class Label(Command):
    """Compare pictures on a local page; each vote is a line of a pairs file."""

    folder: Annotated[Positional[Path], arg(metavar="RUN|FOLDER")]
    """A run folder (before and after), a folder of `progrpo sample`, one with a pairs.jsonl, or that of the reward
    `votes`. The votes are in its votes.jsonl."""
    annotator: str = ""
    """Your name, which stands beside your votes. It can be changed on the page."""
    count: int | None = None
    """The most pairs to ask about, spread over the prompts. Without it: all."""
    host: str = "127.0.0.1"
    """The address to listen at. All who can reach it can see the pictures and vote."""
    port: int = 8200
    """The port; 0 is any free one."""

    def run(self) -> None:
        check_range(1, 10**6, count=self.count)
        check_range(0, 65_535, port=self.port)
        from progrpo.preferences.label import serve

        serve(self.folder, self.annotator, self.count, self.host, self.port)
