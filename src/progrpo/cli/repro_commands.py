"""The command that reproduces the paper's figures and tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import FlagCreatePairsOff, Positional

from progrpo.cli.command import Command, check_range
from progrpo.cli.output import show
from progrpo.durable import write_text


@dataclass(frozen=True, kw_only=True)
class Repro(Command):
    """Do the paper's experiment, and write a page with ours beside its numbers."""

    what: Positional[Literal["fig1", "fig2", "fig5", "table1", "table2", "table3", "table4", "table5", "table6"]]
    """The figure or table. `table4` is computed from plans, `fig1` samples, the others train."""
    scale: Literal["reduced", "paper"] = "reduced"
    """`reduced`: the built-in models on a CPU. `paper`: the paper's models, rewards and plans, on GPUs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The seeds of every run."""
    minutes: float = 1e6
    """The time after which no other run begins; the same command goes on."""
    runs: Path = Path("runs/repro")
    """The folder of the runs, which tables share."""
    out: Path = Path("docs")
    """The folder in which results/NAME.json, results/NAME.md and images/repro_NAME.svg are written."""
    page: FlagCreatePairsOff[bool] = False
    """Write the page from results/NAME.json again, and run nothing."""
    json: FlagCreatePairsOff[bool] = False
    """For table4: print JSON."""

    def run(self) -> None:
        check_range(0, 1e9, minutes=self.minutes)
        if self.json and self.what != "table4":
            raise ValueError(f"--json goes with table4; {self.what} writes results/{self.what}.json")
        if self.what == "table4":
            from progrpo.repro.table4 import in_words, table4

            table = table4()
            show(json.dumps(table, indent=2) if self.json else in_words(table))
        elif self.what == "table3" and self.scale == "paper":
            raise ValueError(
                "table3 at the scale of the paper is GenEval on the runs of table1: progrpo eval RUN --suite geneval"
            )
        else:
            self._results()

    def _results(self) -> None:
        """Do what is missing, and write results and page."""
        results = self.out / "results" / f"{self.what}.json"
        if not self.page:
            data = self._measured()
            results.parent.mkdir(parents=True, exist_ok=True)
            write_text(results, json.dumps(data) + "\n")
        elif not results.is_file():
            raise ValueError(f"--page: there is no {results}; leave --page out")
        page, picture = rendered(self.what, json.loads(results.read_text(encoding="utf-8")))
        write_text(results.with_suffix(".md"), page)
        if picture is not None:
            image = self.out / "images" / f"repro_{self.what}.svg"
            image.parent.mkdir(parents=True, exist_ok=True)
            write_text(image, picture)
        print(results.with_suffix(".md"))

    def _measured(self) -> dict[str, object]:
        if self.what == "fig1":
            from progrpo.repro.fig1 import measure

            return measure(self.scale, self.seeds)
        from progrpo.repro.campaign import Campaign, as_json

        campaign = Campaign(self.runs, self.scale, self.seeds)
        missing = campaign.train(self.what, self.minutes)
        if missing:
            print(f"{missing} runs are still missing: the same command goes on")
        return as_json(self.what, campaign)


def rendered(what: str, data: dict[str, object]) -> tuple[str, str | None]:
    """The page and the picture of a result."""
    if what == "fig1":
        from progrpo.repro import fig1

        return fig1.page(data), fig1.picture(data)
    from progrpo.repro.page import page, picture

    return page(what, data), picture(what, data)
