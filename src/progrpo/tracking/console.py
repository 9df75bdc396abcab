"""The console output of a run: styled in a terminal, plain lines elsewhere (a log file, a notebook, CI)."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from progrpo.streams import tolerant
from progrpo.tracking.records import Metrics, MetricValue, Summary, before_and_after, metric
from progrpo.tracking.wording import MISSING, count, duration, number, percent, signed

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

_RECENT = 5  # iterations that the remaining time is estimated from
_KEPT, _KEPT_AT_MOST = "preview/variance@", "preview/variance_final@"


class Console:
    """A tracker that prints the progress of a run. Text that cannot be printed is dropped: the run folder has it.

    `history` has the records of a resumed run, oldest first. `enabled` is False in all processes but the main one.
    """

    def __init__(
        self,
        iterations: int,
        history: Sequence[Metrics] = (),
        enabled: bool = True,
        file: TextIO | None = None,
    ) -> None:
        self.enabled = enabled
        self._file = tolerant(file or sys.stdout)
        self.nfe_unpruned: int | None = None
        """The NFE of the iteration without pruning and shared calls, for the share that is saved."""
        self._progress = _Progress(iterations)
        self._rich = self._open_rich() if enabled and self._file.isatty() else None
        for record in history:
            self._progress.remember(record)

    def _open_rich(self) -> RichConsole:
        from rich.console import Console as RichConsole

        return RichConsole(file=self._file, highlight=False)

    def _print(self, text: str, style: str = "") -> None:
        if not self.enabled:
            return
        if self._rich is not None:
            self._rich.print(text, style=style, markup=False)
        else:
            print(text, file=self._file, flush=True)

    def say(self, message: str) -> None:
        """Print a line."""
        self._print(message)

    def warn(self, message: str) -> None:
        """Print a line that begins with `warning:`."""
        self._print(f"warning: {message}", style="yellow")

    # --- an iteration -------------------------------------------------------------------------------------------------

    def log(self, metrics: Mapping[str, MetricValue], step: int) -> None:
        """Print one line on iteration `step`."""
        self._progress.remember(metrics)
        fields = self._progress.fields(metrics, step, self.nfe_unpruned)
        if self._rich is None:
            self._print("  ".join(fields))
        else:
            self._print_styled(self._rich, fields)

    def log_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        """Print nothing: the run folder has the pictures."""

    def log_config(self, config: Mapping[str, object]) -> None:
        """Print nothing: the run folder has the configuration."""

    def close(self) -> None:
        """Do nothing: each line is printed at once."""

    def _print_styled(self, rich: RichConsole, fields: Sequence[str]) -> None:
        from rich.text import Text

        line = Text("  ").join(Text(field, style="bold" if i == 1 else "") for i, field in enumerate(fields))
        line.highlight_regex(r"^iteration +\d+/\d+|NFE|s/it|left|strict|(?<=  )(?:V|eval)(?= )", "dim")
        line.highlight_regex(r"\(\+\d+\.\d+\)", "green")
        line.highlight_regex(r"\(-\d+\.\d+\)", "red")
        rich.print(line)

    # --- the end ------------------------------------------------------------------------------------------------------

    def summary_table(self, summary: Summary, report_path: str | Path | None = None) -> None:
        """Print the figures before and after training, the cost, and the path of the report."""
        rows = _summary_rows(summary)
        if not self.enabled:
            return
        if self._rich is None:
            self._print_plain_table(rows)
        else:
            self._print_rich_table(self._rich, rows)
        self._print(_cost(summary))
        if report_path is not None:
            self._print(f"report: {report_path}")

    def _print_plain_table(self, rows: Sequence[tuple[str, str, str, str]]) -> None:
        table = [("", "before", "after", "change"), *rows]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        for label, *cells in table:
            padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            self._print("  ".join([label.ljust(widths[0]), *padded]))

    def _print_rich_table(self, rich: RichConsole, rows: Sequence[tuple[str, str, str, str]]) -> None:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        for name in ("before", "after", "change"):
            table.add_column(name, justify="right")
        for label, before, after, change in rows:
            table.add_row(label, before, f"[bold]{after}[/bold]", change)
        rich.print(table)


class _Progress:
    """The fields of an iteration's line, from its metrics and those of earlier iterations."""

    def __init__(self, iterations: int) -> None:
        self._iterations = iterations
        self._first_reward: float | None = None
        self._seconds: deque[float] = deque(maxlen=_RECENT)

    def remember(self, metrics: Mapping[str, MetricValue]) -> None:
        if self._first_reward is None:
            self._first_reward = metric(metrics, "reward/mean")
        seconds = metric(metrics, "seconds")
        if seconds is not None:
            self._seconds.append(seconds)

    def fields(self, metrics: Mapping[str, MetricValue], step: int, nfe_unpruned: int | None) -> list[str]:
        recorded = metric(metrics, "rollout/nfe") == 0
        sampled = [] if recorded else [self._reward(metrics), *_strict(metrics), _nfe(metrics, nfe_unpruned)]
        fields = [self._number(step), *sampled, *_pairs(metrics), *self._time(step)]
        return [*fields, *_previews(metrics), *_evaluation(metrics)]

    def _number(self, step: int) -> str:
        return f"iteration {step + 1:>{len(str(self._iterations))}}/{self._iterations}"

    def _reward(self, metrics: Mapping[str, MetricValue]) -> str:
        reward = metric(metrics, "reward/mean")
        if reward is None or self._first_reward is None:
            return f"reward {MISSING}"
        return f"reward {number(reward)} ({signed(reward - self._first_reward)})"

    def _time(self, step: int) -> list[str]:
        if not self._seconds:
            return []
        fields = [f"{self._seconds[-1]:.1f} s/it"]
        remaining = self._iterations - step - 1
        if remaining:
            left = remaining * sum(self._seconds) / len(self._seconds)
            fields.append(f"{duration(left)} left")
        return fields


def _nfe(metrics: Mapping[str, MetricValue], nfe_unpruned: int | None) -> str:
    nfe = metric(metrics, "rollout/nfe")
    if nfe is None or not nfe_unpruned:
        return f"{count(nfe)} NFE"
    return f"{count(nfe)} NFE ({percent(1 - nfe / nfe_unpruned, 0)} saved)"


def _strict(metrics: Mapping[str, MetricValue]) -> list[str]:
    """The strict accuracy of a reward that has verdicts."""
    strict = metric(metrics, "reward/strict")
    return [] if strict is None else [f"strict {percent(strict):>7}"]


def _pairs(metrics: Mapping[str, MetricValue]) -> list[str]:
    loss, accuracy = (metric(metrics, f"update/dpo_{name}") for name in ("loss", "accuracy"))
    return [] if loss is None else [f"DPO loss {number(loss)}, accuracy {percent(accuracy)}"]


def _previews(metrics: Mapping[str, MetricValue]) -> list[str]:
    """V of the choice at each prune step, and V of the choice by final rewards."""
    fields = []
    for step in sorted(int(name.removeprefix(_KEPT)) for name in metrics if name.startswith(_KEPT)):
        kept, at_most = (metric(metrics, f"{name}{step}") for name in (_KEPT, _KEPT_AT_MOST))
        if kept is not None and at_most is not None:
            fields.append(f"{number(kept, 2)} of {number(at_most, 2)}@{step}")
    return ["V " + ", ".join(fields)] if fields else []


def _evaluation(metrics: Mapping[str, MetricValue]) -> list[str]:
    strict = metric(metrics, "eval/strict")
    return [] if strict is None else [f"eval strict {percent(strict)}"]


def _summary_rows(summary: Summary) -> list[tuple[str, str, str, str]]:
    """(label, before, after, change) of the reward, and of all else that was measured."""
    rows = []
    figures = (
        ("reward", "reward", False),
        ("strict accuracy", "accuracy", True),
        ("judge", "judge", True),
        ("diversity", "diversity", False),
    )
    for label, name, is_share in figures:
        before, after = before_and_after(summary, name)
        if name != "reward" and before is None and after is None:
            continue
        write = percent if is_share else number
        rows.append((label, write(before), write(after), _change(before, after, is_share)))
    held_out_before, held_out_after = summary.get("held_out_before") or {}, summary.get("held_out_after") or {}
    for name in dict.fromkeys([*held_out_before, *held_out_after]):
        before, after = held_out_before.get(name), held_out_after.get(name)
        rows.append((f"held out: {name}", number(before), number(after), _change(before, after, False)))
    return rows


def _change(before: float | None, after: float | None, is_share: bool) -> str:
    if before is None or after is None:
        return MISSING
    return f"{100 * (after - before):+.1f} points" if is_share else signed(after - before)


def _cost(summary: Summary) -> str:
    """The NFE, by how much they are below those of full groups, missing scores, and the time."""
    fields = [f"{count(summary.get('nfe'))} NFE"]
    saved, ratio = summary.get("nfe_saved"), summary.get("nfe_ratio_to_none")
    if saved:
        fields.append(f"{percent(saved, 0)} fewer than full groups")
    if ratio:  # 0 where recorded pairs are learnt from
        fields.append(f"{ratio:.2f} x plain GRPO's")
    rewards = summary.get("rewards")
    missing = {name: n for name, n in rewards.get("missing", {}).items() if n} if rewards else {}
    if rewards and missing:
        lost = ", ".join(f"{count(n)} of {count(rewards['asked'][name])} of {name}" for name, n in missing.items())
        fields.append(f"missing scores: {lost} (last error: {rewards['last_error'] or 'none was given'})")
    return ", ".join([*fields, duration(summary.get("wall_seconds"))])
