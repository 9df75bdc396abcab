"""What a run says while it goes: rich in a terminal, plain lines elsewhere (a log file, a notebook, CI)."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from progrpo.streams import tolerant
from progrpo.tracking.wording import MISSING, count, duration, number, percent, signed

_RECENT = 5
_PREVIEW = "preview/rank_correlation@"


class Console:
    """Prints the progress of one run. What cannot be printed is dropped: the records are in the run folder.

    `nfe_unpruned`: the NFE that an iteration would take if no trajectory were pruned, for the share saved.
    `history`: the records of a resumed run, oldest first. `enabled`: False on all processes but the main one.
    """

    def __init__(
        self,
        iterations: int,
        nfe_unpruned: int | None = None,
        history: Sequence[Mapping[str, Any]] = (),
        enabled: bool = True,
        file: TextIO | None = None,
    ) -> None:
        self.iterations = iterations
        self.nfe_unpruned = nfe_unpruned
        self.enabled = enabled
        self._file = tolerant(file or sys.stdout)
        self._first_reward: float | None = None
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._rich = self._open_rich() if enabled and self._file.isatty() else None
        for record in history:
            self._remember(record)

    def _open_rich(self) -> Any:
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
        self._print(message)

    def warn(self, message: str) -> None:
        self._print(f"warning: {message}", style="yellow")

    # --- an iteration -------------------------------------------------------------------------------------------------

    def iteration(self, record: Mapping[str, Any]) -> None:
        """One line about an iteration, from its record in metrics.jsonl."""
        self._remember(record)
        parts = [self._place(record), self._reward(record), f"strict {percent(record.get('reward/strict')):>7}"]
        parts += [self._nfe(record), *self._time(record), *self._previews(record), *self._evaluation(record)]
        if self._rich is None:
            self._print("  ".join(parts))
        else:
            self._print_styled(parts)

    def _print_styled(self, parts: Sequence[str]) -> None:
        from rich.text import Text

        assert self._rich is not None
        line = Text("  ").join(Text(part, style="bold" if i == 1 else "") for i, part in enumerate(parts))
        line.highlight_regex(r"^iteration +\d+/\d+|NFE|s/it|left|strict|preview|(?<=  )eval", "dim")
        line.highlight_regex(r"\(\+\d+\.\d+\)", "green")
        line.highlight_regex(r"\(-\d+\.\d+\)", "red")
        self._rich.print(line)

    def _remember(self, record: Mapping[str, Any]) -> None:
        if self._first_reward is None:
            self._first_reward = record.get("reward/mean")
        if record.get("seconds") is not None:
            self._seconds.append(record["seconds"])

    def _place(self, record: Mapping[str, Any]) -> str:
        done = record["iteration"] + 1
        return f"iteration {done:>{len(str(self.iterations))}}/{self.iterations}"

    def _reward(self, record: Mapping[str, Any]) -> str:
        reward = record.get("reward/mean")
        if reward is None or self._first_reward is None:
            return f"reward {MISSING}"
        return f"reward {number(reward)} ({signed(reward - self._first_reward)})"

    def _nfe(self, record: Mapping[str, Any]) -> str:
        nfe = record.get("rollout/nfe")
        if nfe is None or not self.nfe_unpruned:
            return f"{count(nfe)} NFE"
        return f"{count(nfe)} NFE ({percent(1 - nfe / self.nfe_unpruned, 0)} saved)"

    def _time(self, record: Mapping[str, Any]) -> list[str]:
        if not self._seconds:
            return []
        remaining = self.iterations - record["iteration"] - 1
        left = remaining * sum(self._seconds) / len(self._seconds)
        parts = [f"{self._seconds[-1]:.1f} s/it"]
        return [*parts, f"{duration(left)} left"] if remaining else parts

    def _previews(self, record: Mapping[str, Any]) -> list[str]:
        found = {
            int(k.removeprefix(_PREVIEW)): v for k, v in record.items() if k.startswith(_PREVIEW) and v is not None
        }
        words = [f"{number(found[step], 2)}@{step}" for step in sorted(found)]
        return ["preview " + " ".join(words)] if words else []

    def _evaluation(self, record: Mapping[str, Any]) -> list[str]:
        strict = record.get("eval/strict")
        return [] if strict is None else [f"eval strict {percent(strict)}"]

    # --- the end ------------------------------------------------------------------------------------------------------

    def summary_table(self, summary: Mapping[str, Any], report_path: str | Path | None = None) -> None:
        """Before and after, what was spent, and where the report is."""
        rows = _summary_rows(summary)
        if not self.enabled:
            return
        if self._rich is None:
            self._print_plain_table(rows)
        else:
            self._print_rich_table(rows)
        self._print(_spent(summary))
        if report_path is not None:
            self._print(f"report: {report_path}")

    def _print_plain_table(self, rows: Sequence[tuple[str, str, str, str]]) -> None:
        table = [("", "before", "after", "change"), *rows]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        for label, *cells in table:
            padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            self._print("  ".join([label.ljust(widths[0]), *padded]))

    def _print_rich_table(self, rows: Sequence[tuple[str, str, str, str]]) -> None:
        from rich import box
        from rich.table import Table

        assert self._rich is not None
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        for name in ("before", "after", "change"):
            table.add_column(name, justify="right")
        for label, before, after, change in rows:
            table.add_row(label, before, f"[bold]{after}[/bold]", change)
        self._rich.print(table)


def _summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(label, before, after, change) of what was evaluated; the judge only where there is one."""
    rows = []
    names = (
        ("reward", "reward", False),
        ("strict accuracy", "accuracy", True),
        ("judge", "judge", True),
        ("diversity", "diversity", False),
    )
    for label, key, share in names:
        before, after = summary.get(f"{key}_before"), summary.get(f"{key}_after")
        if key in ("judge", "diversity") and before is None and after is None:
            continue
        write = percent if share else number
        rows.append((label, write(before), write(after), _change(before, after, share)))
    then, now = summary.get("held_out_before") or {}, summary.get("held_out_after") or {}
    for name in dict.fromkeys([*then, *now]):
        before, after = then.get(name), now.get(name)
        rows.append((f"held out: {name}", number(before), number(after), _change(before, after, False)))
    return rows


def _change(before: float | None, after: float | None, share: bool) -> str:
    if before is None or after is None:
        return MISSING
    return f"{100 * (after - before):+.1f} points" if share else signed(after - before)


def _spent(summary: Mapping[str, Any]) -> str:
    parts = [f"{count(summary.get('nfe'))} NFE"]
    if summary.get("nfe_saved") is not None:
        parts.append(f"{percent(summary['nfe_saved'], 0)} saved by pruning")
    if summary.get("nfe_ratio_to_none") is not None:
        parts.append(f"{summary['nfe_ratio_to_none']:.2f} x plain GRPO's")
    missing = summary.get("rewards", {}).get("missing", {})
    if any(missing.values()):
        asked = summary["rewards"]["asked"]
        lost = ", ".join(f"{count(n)} of {count(asked[name])} of {name}" for name, n in missing.items() if n)
        parts.append(f"missing scores: {lost} (last error: {summary['rewards']['last_error'] or 'none was given'})")
    return ", ".join([*parts, duration(summary.get("wall_seconds"))])
