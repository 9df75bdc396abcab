"""Commands that make pages of runs: report, compare and board."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from progrpo.cli.command import Command, check_range, require_run
from progrpo.cli.output import show


@dataclass(frozen=True)
class Report(Command):
    """Write the report.html of a run again."""

    folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run folder."""

    def run(self) -> None:
        require_run(self.folder)
        from progrpo.pages.report import write_report

        print(write_report(self.folder))


@dataclass(frozen=True)
class Compare(Command):
    """Compare runs on one page: curves over time and cost, seeds, settings that differ, pictures of the same noise."""

    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN RUN ...")]
    """The run folders. Runs that differ in the seed alone are shown as one recipe, by mean and spread."""
    out: Path = Path("compare.html")
    """The page to write."""
    json: FlagCreatePairsOff[bool] = False
    """Print the same figures as JSON, and write no page."""

    def run(self) -> None:
        for folder in self.folders:
            require_run(folder)
        if self.out.suffix != ".html":
            raise ValueError(f"--out must be the name of a page, such as compare.html, not {self.out}")
        from progrpo.pages.compare import compare, figures_of, write_comparison

        comparison = compare(self.folders)
        if self.json:
            show(json.dumps(figures_of(comparison), indent=2, allow_nan=False))
        else:
            print(write_comparison(comparison, self.out))


@dataclass(frozen=True)
class Board(Command):
    """Show the runs of a folder in the browser as they go on, with their reports and comparisons."""

    folder: Annotated[Positional[Path], arg(metavar="[RUNS_DIR]")] = Path("runs")
    """The folder that holds run folders, also in folders of its own."""
    host: str = "127.0.0.1"
    """The address to listen at. All who can reach it can read the runs."""
    port: int = 8100
    """The port; 0 is any free one."""

    def run(self) -> None:
        check_range(0, 65_535, port=self.port)
        from progrpo.pages.board import serve

        serve(self.folder, self.host, self.port)
