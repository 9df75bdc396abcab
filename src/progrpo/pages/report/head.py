"""The head of the report: the run and its result in one sentence and six figures."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan

import numpy as np

from progrpo.pages.page import escape
from progrpo.pages.run_data import RunData, accuracy, total
from progrpo.tracking.choices import choices, share_of_steps
from progrpo.tracking.records import before_and_after, metric
from progrpo.tracking.statistics import Mean
from progrpo.tracking.wording import MISSING, count, duration, number, percent

_LINKS = {
    "evaluation": "Before and after",
    "curves": "Curves",
    "audits": "Inside a group",
    "agreement": "Preview agreement",
    "kept": "What is kept",
    "plan": "Does the plan pay?",
    "cost": "Cost",
    "settings": "Settings",
}


def write(data: RunData) -> str:
    status = escape(data.status.split(":")[0])
    device = f"<span>{escape(data.summary['device'])}</span>" if data.summary.get("device") else ""
    links = "".join(
        f'<a href="#{anchor}">{title}</a>' for anchor, title in _LINKS.items() if anchor != "plan" or data.is_judged
    )
    return (
        f'<header><div class="eyebrow"><span>progrpo run report</span><span class="status {status}">{status}</span>'
        f"{device}</div><h1>{escape(data.recipe)}</h1>"
        f'<p class="verdict">{verdict(data)}</p><div class="tiles">{_tiles(data)}</div><nav>{links}</nav></header>\n'
    )


# --- the sentence -----------------------------------------------------------------------------------------------------


def verdict(data: RunData) -> str:
    """The sentence on the run, the change of strict accuracy, and the network evaluations saved."""
    seed = data.summary.get("seed", data.config.get("seed"))
    saved = data.summary.get("nfe_saved")
    fewer = f", with {percent(saved, 0)} fewer network evaluations than its full groups take" if saved else ""
    return f"{_training(data)} (seed {escape(seed)}): {_result(data)}{fewer}."


def _training(data: RunData) -> str:
    model = escape(data.setting("model", "path") or "The model")
    # of the planned iterations: the summary counts those that are done
    done = f"{len(data.metrics)} of {escape(data.config.get('iterations', '?'))} iterations"
    if data.status == "finished":
        seconds = duration(data.summary.get("wall_seconds"))
        return f"{model} was trained for {escape(data.iterations)} iterations in {seconds}"
    if data.status == "running":
        return f"{model} is being trained; {done} are done{_so_far(data)}"
    if data.status == "killed":
        return f"{model} was trained for {done}{_so_far(data)}, until its process or machine stopped"
    return f"{model} was trained for {done}{_so_far(data)} and {escape(data.status)}"


def _so_far(data: RunData) -> str:
    return f" in {duration(data.wall_seconds)}" if data.wall_seconds else ""


def _result(data: RunData) -> str:
    before, after = accuracy(data.before), accuracy(data.after)
    if before is None:
        return _result_by_reward(data)
    tested = f"(± a standard error) on {before.count} test prompts"
    if after is None:
        return f"strict accuracy was {_share(before)} {tested} before; after is not measured yet"
    return f"strict accuracy {_moved(data)} from {_share(before)} to {_share(after)} {tested}"


def _result_by_reward(data: RunData) -> str:
    """The result for a reward that gives no strict verdicts, such as a user's own."""
    before, after = before_and_after(data.summary, "reward")
    if before is None:
        return "it has not been evaluated yet"
    if after is None:
        return f"the mean reward was {number(before)} on {len(data.before)} prompts before; after is not measured yet"
    return f"the mean reward went from {number(before)} to {number(after)} on {len(data.after)} prompts"


def _moved(data: RunData) -> str:
    """The verb for the change of accuracy, which must exceed two standard errors to count as one."""
    change = data.accuracy_change()
    if change is None:
        return "went"
    if change.value == 0 or not abs(change.value) > 2 * change.error:  # the error of a single pair is not known
        return "did not measurably change, going"
    return "rose" if change.value > 0 else "fell"


def _share(mean: Mean) -> str:
    return f"{100 * mean.value:.1f} ± {100 * mean.error:.1f} %"


# --- the figures ------------------------------------------------------------------------------------------------------


def _tiles(data: RunData) -> str:
    return "".join(
        (
            _tile("Strict accuracy", _from_to(data, "accuracy", percent), _change(data)),
            _tile("Reward", _from_to(data, "reward", number), "mean over the test prompts"),
            _tile("Judge", _from_to(data, "judge", percent), "share passed by a judge never trained on"),
            _network_evaluations(data),
            _choice(data),
            _time(data),
        )
    )


def _tile(label: str, value: str, detail: str) -> str:
    return f'<div class="tile"><span>{label}</span><strong>{value}</strong><span>{detail}</span></div>'


def _from_to(data: RunData, name: str, write: Callable[[float | None], str]) -> str:
    before, after = before_and_after(data.summary, name)
    return MISSING if before is None and after is None else f"{write(before)} <em>→</em> {write(after)}"


def _change(data: RunData) -> str:
    change = data.accuracy_change()
    if change is None:
        return "the reward gives no verdicts" if data.after else "not evaluated after training yet"
    error = "" if isnan(change.error) else f" ± {100 * change.error:.1f}"
    return f"{100 * change.value:+.1f}{error} points, picture by picture"


def _network_evaluations(data: RunData) -> str:
    saved, ratio = data.summary.get("nfe_saved"), data.summary.get("nfe_ratio_to_none")
    nfe = (data.summary.get("nfe") or 0) + total(data.since_summary, "rollout/nfe") or None
    details = [] if not saved else [f"{percent(saved, 0)} fewer than full groups"]
    details += [] if not ratio else [f"{ratio:.2f} × plain GRPO’s"]
    if data.pairs:
        return _tile("Network evaluations", MISSING, "recorded pairs, nothing is sampled")
    return _tile("Network evaluations", count(nfe), ", ".join(details) or "NFE of the training samples")


_V = "Variance of the choice, V"


def _choice(data: RunData) -> str:
    """V of the plan's choice, or what V a choice of half would have where the plan keeps all."""
    kept = choices(data.audits)
    if not kept:
        return _tile(_V, MISSING, _not_measured(data))
    path, points = data.path_of_plan, [step for step in data.prune_steps if step in kept]
    by_finals = len(path) > 1 and not points
    shown = points or [share_of_steps(list(kept), 0.5)]
    of_each = [kept[step] for step in shown]
    values = " <em>·</em> ".join(
        number(choice.variance_final, 2)
        if by_finals
        else f"{number(choice.variance, 2)} <em>of</em> {number(choice.variance_final, 2)}"
        for choice in of_each
    )
    keeps = " and ".join(f"{choice.keep} of {choice.members}" for choice in of_each)
    when = "final rewards" if by_finals else f"previews of step {' and '.join(map(str, shown))}"
    is_of_plan = bool(path) and all(choice.members == path[0] and choice.keep in path[1:] for choice in of_each)
    verb = "keep" if is_of_plan else "would keep"  # the last decision may have changed the plan
    return _tile(_V, values, f"the rewards’ variance that {keeps} by {when} {verb}; 1 is a random choice")


def _not_measured(data: RunData) -> str:
    if data.pairs:
        return "recorded pairs, none is chosen from"
    if data.setting("audit", "every") == 0:
        return "audits are off"
    return "no audit has measured it" if data.audits else "not measured yet"


def _time(data: RunData) -> str:
    seconds = [value for record in data.metrics if (value := metric(record, "seconds")) is not None]
    detail = f"{np.mean(seconds):.1f} s per iteration" if seconds else "no iteration yet"
    detail += ", all attempts and evaluations counted" if data.wall_seconds else ""
    return _tile("Wall time", duration(data.wall_seconds), detail)
