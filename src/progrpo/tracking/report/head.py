"""The head of the report: what ran and what came of it, in one sentence and six figures."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan

import numpy as np

from progrpo.tracking.report.page import escape
from progrpo.tracking.report.run import Run, accuracy
from progrpo.tracking.statistics import Mean
from progrpo.tracking.wording import MISSING, count, duration, number, percent

_LINKS = {
    "evaluation": "Before and after",
    "curves": "Curves",
    "audits": "Inside a group",
    "agreement": "Preview agreement",
    "kept": "What is kept",
    "cost": "Cost",
    "settings": "Settings",
}


def write(run: Run) -> str:
    status = escape(run.status.split(":")[0])
    device = f"<span>{escape(run.summary['device'])}</span>" if run.summary.get("device") else ""
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in _LINKS.items())
    return (
        f'<header><div class="eyebrow"><span>progrpo run report</span><span class="status {status}">{status}</span>'
        f"{device}</div><h1>{escape(run.recipe)}</h1>"
        f'<p class="verdict">{verdict(run)}</p><div class="tiles">{_tiles(run)}</div><nav>{links}</nav></header>\n'
    )


# --- the sentence -----------------------------------------------------------------------------------------------------


def verdict(run: Run) -> str:
    """What ran, how strict accuracy moved, and what pruning saved."""
    seed = run.summary.get("seed", run.config.get("seed"))
    saved = run.summary.get("nfe_saved")
    pruning = f", while pruning saved {percent(saved, 0)} of its groups’ network evaluations" if saved else ""
    return f"{_what_ran(run)} (seed {escape(seed)}): {_what_came(run)}{pruning}."


def _what_ran(run: Run) -> str:
    model = escape(run.config.get("model", {}).get("path", "The model"))
    # of those that were wanted: a summary counts those that were done
    done = f"{len(run.metrics)} of {escape(run.config.get('iterations', '?'))} iterations"
    if run.status == "finished":
        return f"{model} was trained for {escape(run.iterations)} iterations in {duration(run.summary.get('wall_seconds'))}"
    if run.status == "running":
        return f"{model} is being trained, {done} are done{_so_far(run)}"
    if run.status == "killed":
        return f"{model} was trained for {done}{_so_far(run)}, until its process or its machine was gone"
    return f"{model} was trained for {done}{_so_far(run)} and {escape(run.status)}"


def _so_far(run: Run) -> str:
    return f" in {duration(run.wall_seconds)}" if run.wall_seconds else ""


def _what_came(run: Run) -> str:
    before, after = accuracy(run.before), accuracy(run.after)
    if before is None:
        return _reward_came(run)
    if after is None:
        return f"strict accuracy was {_share(before)} on {before.count} test prompts before; after is not measured yet"
    return f"strict accuracy {_moved(run)} from {_share(before)} to {_share(after)} on {after.count} test prompts"


def _reward_came(run: Run) -> str:
    """In place of strict accuracy: a reward of one's own may give no verdicts."""
    before, after = (run.summary.get(f"reward_{when}") for when in ("before", "after"))
    if before is None:
        return "it has not been evaluated yet"
    if after is None:
        return f"the mean reward was {number(before)} on {len(run.before)} prompts before; after is not measured yet"
    return f"the mean reward went from {number(before)} to {number(after)} on {len(run.after)} prompts"


def _moved(run: Run) -> str:
    """A difference within two standard errors is not called one."""
    change = run.accuracy_change()
    if change is None:
        return "went"
    if change.value == 0 or not abs(change.value) > 2 * change.error:  # of one pair the error is not known
        return "did not measurably change, going"
    return "rose" if change.value > 0 else "fell"


def _share(mean: Mean) -> str:
    return f"{100 * mean.value:.1f} ± {100 * mean.error:.1f} %"


# --- the figures ------------------------------------------------------------------------------------------------------


def _tiles(run: Run) -> str:
    return "".join(
        (
            _tile("Strict accuracy", _from_to(run, "accuracy", percent), _change(run)),
            _tile("Reward", _from_to(run, "reward", number), "mean over the test prompts"),
            _tile("Judge", _from_to(run, "judge", percent), "share passed by a judge never trained on"),
            _network_evaluations(run),
            _previews(run),
            _time(run),
        )
    )


def _tile(label: str, value: str, detail: str) -> str:
    return f'<div class="tile"><span>{label}</span><strong>{value}</strong><span>{detail}</span></div>'


def _from_to(run: Run, key: str, word: Callable[[float | None], str]) -> str:
    before, after = (run.summary.get(f"{key}_{when}") for when in ("before", "after"))
    return MISSING if before is None and after is None else f"{word(before)} <em>→</em> {word(after)}"


def _change(run: Run) -> str:
    change = run.accuracy_change()
    if change is None:
        return "the reward gives no verdicts" if run.after else "not evaluated after training yet"
    error = "" if isnan(change.error) else f" ± {100 * change.error:.1f}"
    return f"{100 * change.value:+.1f}{error} points, picture by picture"


def _network_evaluations(run: Run) -> str:
    saved, ratio = run.summary.get("nfe_saved"), run.summary.get("nfe_ratio_to_none")
    nfe = (run.summary.get("nfe") or 0) + sum(r.get("rollout/nfe") or 0 for r in run.since_summary) or None
    details = [] if saved is None else [f"{percent(saved, 0)} saved by pruning"]
    details += [] if ratio is None else [f"{ratio:.2f} × plain GRPO’s"]
    return _tile("Network evaluations", count(nfe), ", ".join(details) or "NFE of the training samples")


def _previews(run: Run) -> str:
    found = run.summary.get("preview_rank_correlation") or {}
    if not found:
        return _tile(
            "Preview agreement", MISSING, "not measured yet" if run.prune_steps else "nothing is pruned on previews"
        )
    values = " <em>·</em> ".join(number(value, 2) for value in found.values())
    steps = " and ".join(map(escape, found))
    return _tile("Preview agreement", values, f"rank correlation with finals, step {steps}")


def _time(run: Run) -> str:
    each = [record["seconds"] for record in run.metrics if record.get("seconds") is not None]
    until = "" if run.status == "finished" or not each else ", until the last one"
    return _tile(
        "Wall time",
        duration(run.wall_seconds),
        f"{np.mean(each):.1f} s an iteration{until}" if each else "no iteration yet",
    )
