"""The page of an experiment from its JSON: ours beside the paper's numbers, with a picture. Standard library only."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from progrpo.repro.experiments import EXPERIMENTS, Experiment, kind_of

Runs = Sequence[Mapping[str, Any]]
_COLOURS = ("#1e6ec8", "#dc7814", "#1e8c50", "#965aaa", "#80868f", "#c83c32")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 720, 300, 56, 16, 40


def page(name: str, data: Mapping[str, Any]) -> str:
    """The page in Markdown. Runs of arms that are missing are said to be."""
    experiment, runs = EXPERIMENTS[name], data["runs"]
    missing = [arm for arm in experiment.arms if not runs_of(runs, arm)]
    parts = [
        f"# {experiment.title}",
        f"The paper (Pro-GRPO, arXiv 2512.15347) shows: {experiment.claim}",
        f"```bash\nprogrpo repro {name}   # goes on where it was stopped; finished runs of other tables are not run"
        " again\n```",
        "## Ours",
        *_ours(experiment, runs),
        _about(runs),
    ]
    if (verdict := _verdict(experiment, runs)) is not None:
        parts.append(verdict)
    if missing:
        parts.append(f"Not run yet: {', '.join(missing)}.")
    if any(run["curves"].get(experiment.curve) for run in runs):
        parts.append(f"![Reward on validation prompts over iterations, by arm](../images/repro_{name}.svg)")
    if experiment.printed:
        parts += ["## The paper's", _printed(experiment)]
    parts += ["## What can be compared", "\n".join(f"- {sentence}" for sentence in experiment.limits)]
    return "\n\n".join(wrapped(part) for part in parts) + "\n"


def runs_of(runs: Runs, arm: str) -> list[Mapping[str, Any]]:
    """The runs of an arm."""
    return [run for run in runs if run["arm"] == arm]


# --- tables -----------------------------------------------------------------------------------------------------------

Column = Callable[[Mapping[str, Any]], float | None]


def summary_figure(name: str) -> Column:
    """A figure of the summary, such as `reward_after`."""
    return lambda run: run["summary"].get(name)


_REWARD = summary_figure("reward_after")


def held_out_figure(reward: str, when: str) -> Column:
    """A held-out reward, before or after training."""
    return lambda run: (run["summary"].get(f"held_out_{when}") or {}).get(reward)


def _kind(kind: str, when: str) -> Column:
    return lambda run: run["by_kind"][when].get(kind)


def _columns(runs: Runs, when: str) -> dict[str, Column]:
    """The figures of an evaluation, by heading."""
    rewards = dict.fromkeys(name for run in runs for name in run["summary"].get(f"held_out_{when}") or {})
    columns = {"reward": summary_figure(f"reward_{when}")}
    columns |= {name: held_out_figure(name, when) for name in rewards}
    return columns | {"judge": summary_figure(f"judge_{when}"), "diversity": summary_figure(f"diversity_{when}")}


def _ours(experiment: Experiment, runs: Runs) -> list[str]:
    """The tables of what was measured: rewards, costs, and for some experiments verdicts by kind of prompt."""
    tables = [_evaluations(experiment, runs, _columns), _costs(experiment, runs)]
    if experiment.by_kind:
        tables += ["Strict verdicts by kind of prompt:", _evaluations(experiment, runs, _kinds, digits=2)]
    return tables


def _kinds(runs: Runs, when: str) -> dict[str, Column]:
    """The verdicts of an evaluation by kind of prompt."""
    return {kind: _kind(kind, when) for kind in dict.fromkeys(kind for run in runs for kind in run["by_kind"][when])}


def _evaluations(
    experiment: Experiment, runs: Runs, columns: Callable[[Runs, str], dict[str, Column]], digits: int = 3
) -> str:
    """A row of each kind of arms' base before training, and one of each arm after it."""
    after, rows, kind = columns(runs, "after"), [], ""
    for arm in experiment.arms:
        own = runs_of(runs, arm)
        if not own:
            continue
        if kind_of(arm) != kind:
            kind = kind_of(arm)
            alike = [run for run in runs if kind_of(run["arm"]) == kind]
            base = [figure_of(alike, column, digits) for column in columns(runs, "before").values()]
            rows.append([f"the base ({kind})", *base])
        rows.append([arm, *(figure_of(own, column, digits) for column in after.values())])
    return table(["arm", *after], rows)


def _rival(experiment: Experiment, arm: str) -> str:
    """The first arm of the same kind, with which an arm is compared."""
    return next(other for other in experiment.arms if kind_of(other) == kind_of(arm))


def _costs(experiment: Experiment, runs: Runs) -> str:
    rows = []
    for arm in experiment.arms:
        own, rival = runs_of(runs, arm), _rival(experiment, arm)
        if own:
            seconds, nfe = mean(run["seconds"] for run in own), mean(run["summary"]["nfe"] for run in own)
            values = [] if arm == rival else differences(own, runs_of(runs, rival), _REWARD)
            rows.append([arm, str(len(own)), f"{seconds:,.0f}", f"{nfe:,.0f}", _in_words(values)])
    return table(["arm", "seeds", "seconds", "NFE", "reward over the first of its kind"], rows)


def differences(runs: Runs, others: Runs, column: Column) -> list[float]:
    """The differences to the runs of another arm with the same seeds."""
    by_seed = {run["seed"]: column(run) for run in others}
    pairs = [(column(run), by_seed.get(run["seed"])) for run in runs]
    return [own - other for own, other in pairs if own is not None and other is not None]


def _in_words(values: Sequence[float]) -> str:
    """The mean with its sign, and the standard deviation."""
    if not values:
        return ""
    return f"{mean(values):+.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _verdict(experiment: Experiment, runs: Runs) -> str | None:
    """The arms that end ahead of the first of their kind, behind it, and neither, and runs that unlearnt.

    None without arms of several seeds.
    """
    groups: dict[str, list[str]] = {"ahead": [], "behind": [], "neither": []}
    for arm in experiment.arms:
        rival = _rival(experiment, arm)
        values = differences(runs_of(runs, arm), runs_of(runs, rival), _REWARD)
        if arm != rival and len(values) > 1:
            far = abs(mean(values)) > 2 * stdev(values) / len(values) ** 0.5
            groups["neither" if not far else "ahead" if mean(values) > 0 else "behind"].append(arm)
    if not any(groups.values()):
        return None
    listed = "; ".join(f"{name}: {', '.join(arms) or 'none'}" for name, arms in groups.items())
    fallen = [
        f"{run['arm']} (seed {run['seed']})"
        for run in runs
        if (_REWARD(run) or 0.0) < (summary_figure("reward_before")(run) or 0.0)
    ]
    return (
        "Reward against the first arm of the same kind, by more than two standard errors of the seeds' differences:"
        f" {listed}. Runs that ended below their base: {', '.join(fallen) or 'none'}."
    )


def figure_of(runs: Runs, column: Column, digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    values = [value for run in runs if (value := column(run)) is not None]
    if not values:
        return ""
    shown = len(values) > 1 and round(stdev(values), digits) > 0
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if shown else "")


def _printed(experiment: Experiment) -> str:
    columns = list(dict.fromkeys(name for row in experiment.printed.values() for name in row))
    rows = [[arm, *(row.get(name, "") for name in columns)] for arm, row in experiment.printed.items()]
    return table(["arm", *columns], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _about(runs: Runs) -> str:
    """The source of the figures in a sentence."""
    if not runs:
        return "No run has come to its end yet."
    devices = sorted({f"{run['summary'].get('device')}" for run in runs})
    torch = sorted({run["summary"].get("versions", {}).get("torch", "?") for run in runs})
    iterations = sorted({run["summary"]["iterations"] for run in runs})
    return (
        f"Mean and standard deviation over seeds, on test prompts, after {_listed(iterations)} iterations. The last"
        " column has differences between runs of one seed. Seconds are"
        f" of sampling, previews, rewards and updates ({_listed(devices)}; torch {_listed(torch)}); other work on the"
        " machine may have slowed some runs, so compare NFE too."
    )


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def wrapped(part: str) -> str:
    """The part with its lines cut at 120 columns; tables and code stay as they are."""
    if part.startswith(("|", "```", "#", "!")):
        return part
    lines: list[str] = []
    for paragraph in part.split("\n"):
        indent, line = ("  " if paragraph.startswith("- ") else ""), ""
        for word in paragraph.split():
            if line and len(line) + 1 + len(word) > 120:
                lines.append(line)
                line = indent + word
            else:
                line = f"{line} {word}" if line else word
        lines.append(line)
    return "\n".join(lines)


# --- the picture ------------------------------------------------------------------------------------------------------


Curve = Sequence[tuple[float, float]]


def picture(name: str, data: Mapping[str, Any]) -> str | None:
    """The metric of the experiment over iterations as SVG: the mean over seeds of each arm. None without a run."""
    experiment = EXPERIMENTS[name]
    curves = {arm: [_mean_curve(runs_of(data["runs"], arm), experiment.curve)] for arm in experiment.arms}
    return chart(curves, "iterations")


def chart(curves: Mapping[str, Sequence[Curve]], x_label: str) -> str | None:
    """Curves by arm as SVG, those of an arm in one colour. None where no curve has a point."""
    shown = {arm: [curve for curve in own if curve] for arm, own in curves.items()}
    shown = {arm: own for arm, own in shown.items() if own}
    points = [point for own in shown.values() for curve in own for point in curve]
    if not points:
        return None
    right = max(x for x, _ in points) or 1.0
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = (high - low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (_WIDTH - _LEFT - 190) * x / right,
            _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (y - low) / span),
        )

    parts = [_text(_LEFT - 6, place(0, value)[1] + 4, f"{value:.2f}", "end") for value in (low, high)]
    parts += [_text(place(x, low)[0], _HEIGHT - _BOTTOM + 18, f"{x:.4g}", "middle") for x in (right / 2, right)]
    parts.append(_text(place(right / 2, low)[0], _HEIGHT - 6, x_label, "middle"))
    for i, (arm, own) in enumerate(shown.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        for curve in own:
            places = [place(*point) for point in curve]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            # a line of one point is not drawn
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        parts.append(_text(_WIDTH - 180, _TOP + 14 + 20 * i, arm, "start", colour))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif"'
        f' font-size="12"><rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#282c34") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{html.escape(text)}</text>'


def _mean_curve(runs: Runs, name: str) -> list[tuple[float, float]]:
    """The mean over runs where all of them have a value."""
    by_run = [{x: y for x, y in run["curves"].get(name, [])} for run in runs]
    common = sorted(set.intersection(*(set(curve) for curve in by_run))) if by_run else []
    return [(x, mean(curve[x] for curve in by_run)) for x in common]
