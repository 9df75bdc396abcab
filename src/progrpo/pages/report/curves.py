"""The curves of the metrics over iterations, seconds or NFE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from progrpo.pages import charts
from progrpo.pages.charts import ACCENT, AMBER, GREY, ROSE, TEAL, VIOLET, Curve
from progrpo.pages.page import anchor_of, chart, escape, note, section
from progrpo.pages.run_data import RunData
from progrpo.tracking.records import Metrics, metric

_SHARE = "prompts/share@"
_NOISE_SCALE, _PER_ITERATION = "update/noise_scale", "prompts/per_iteration"
_REWARD, _HELD_OUT = "reward/mean@", "eval/held_out@"


@dataclass(frozen=True)
class _Card:
    title: str
    about: str
    curves: Sequence[Curve]
    y: Mapping[str, object] = field(default_factory=dict)


_SAMPLING = (
    _Card(
        "Reward",
        "mean over finished members",
        (Curve("reward/mean", "training samples"), Curve("eval/graded", "evaluation", TEAL, True)),
    ),
    _Card(
        "Strict accuracy",
        "share that passes every check",
        (
            Curve("reward/strict", "training samples"),
            Curve("eval/strict", "evaluation", TEAL, True),
            Curve("eval/judge", "evaluation, judge", AMBER, True),
        ),
        {"tickformat": ".0%"},
    ),
    _Card(
        "Spread within a group",
        "standard deviation of final rewards, mean over groups",
        (Curve("reward/group_std_full", "full group", GREY), Curve("reward/std", "survivors")),
    ),
    _Card(
        "Distance to the reference",
        "mean square distance of velocities, in evaluations",
        (Curve("eval/kl", "distance", TEAL, True),),
        {"rangemode": "tozero"},
    ),
)
_UPDATE = (
    _Card(
        "Clip fraction",
        "share of clipped terms",
        (Curve("update/clip_fraction", "clipped"),),
        {"tickformat": ".1%", "rangemode": "nonnegative"},
    ),
    _Card("KL", "from the reference model", (Curve("update/kl", "KL"),), {"exponentformat": "power"}),
    _Card("Gradient norm", "before clipping", (Curve("update/grad_norm", "norm"),)),
)


_PREFERENCES = (
    _Card("DPO loss", "mean over pairs; ln 2 where nothing is decided", (Curve("update/dpo_loss", "loss"),)),
    _Card(
        "Preference accuracy",
        "share of pairs and draws whose winner the policy favours more than the reference does",
        (Curve("update/dpo_accuracy", "accuracy"),),
        {"tickformat": ".0%"},
    ),
)


def write(data: RunData) -> str:
    if not data.metrics:
        return section("curves", "Curves", "", note("No iteration is finished yet."))
    signal = [_signal(data.metrics)] if "prompts/seen" in data.metrics[-1] else []
    sampled = () if data.pairs else _SAMPLING
    preferences = _PREFERENCES if "update/dpo_loss" in data.metrics[-1] else ()
    cards = (*sampled, *preferences, _noise_scale(data.metrics), *signal, *_rewards(data.metrics))
    sampling = _grid(_with_prompts(data), cards, "grid", 230)
    update = _grid(data.metrics, (_deviation(data.metrics), *_UPDATE), "grid four", 170)
    lead = f"One point per iteration, from training samples unless stated otherwise.{_thinning(data.metrics)}"
    return section("curves", "Curves", lead, _axes() + sampling + update)


def _thinning(metrics: Sequence[Metrics]) -> str:
    if not charts.is_thinned(metrics):
        return ""
    return (
        f" Of a curve over more than {2 * charts.BUCKETS:,} iterations, each of {charts.BUCKETS} stretches is drawn by"
        " its lowest and its highest value, so no extreme is lost; <code>metrics.jsonl</code> has all."
    )


def _axes() -> str:
    """Buttons for the horizontal axis of all curves."""
    buttons = "".join(
        f'<button data-axis="{axis}" data-title="{title}" aria-pressed="{"true" if axis == "iteration" else "false"}">'
        f"{label}</button>"
        for (axis, title), label in zip(charts.AXES.items(), ("Iteration", "Seconds", "NFE"), strict=True)
    )
    return f'<div class="controls"><span>Horizontal axis</span>{buttons}</div>'


def _with_prompts(data: RunData) -> list[Metrics]:
    """The records, with the number of prompts that go on, where it is a number that a log axis can show."""
    count = data.setting("plan", "keep_groups") or data.setting("prompts", "per_iteration")
    drawn: Metrics = {_PER_ITERATION: count} if isinstance(count, int) and count > 0 else {}
    return [{**record, **drawn} for record in data.metrics]


def _noise_scale(metrics: Sequence[Metrics]) -> _Card:
    """The noise scale with the prompts of an iteration, which alone would say nothing."""
    measured = any(metric(record, _NOISE_SCALE) is not None for record in metrics)
    lines = (Curve(_NOISE_SCALE, "noise scale"), Curve(_PER_ITERATION, "prompts per iteration", GREY))
    about = (
        "in prompts, log scale: an iteration below it is ruled by noise, so that selection can pay; above it smaller"
        " iterations do better"
    )
    # plotly's own labels of a log axis leave out the power of ten between two of them
    ticks = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]
    axis = {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,}" for tick in ticks]}
    return _Card("Gradient noise scale", about, lines if measured else (), axis)


def _signal(metrics: Sequence[Metrics]) -> _Card:
    """The share of each kind of prompt, where prompts are drawn by their learning signal."""
    kinds = sorted({key.partition("@")[2] for record in metrics for key in record if key.startswith(_SHARE)})
    colours = (ACCENT, TEAL, AMBER, GREY, VIOLET, ROSE)
    lines = [Curve(f"{_SHARE}{kind}", escape(kind), colours[i % len(colours)]) for i, kind in enumerate(kinds)]
    about = "share of the next prompts by kind, from the spread of its rewards"
    return _Card("Prompts by kind", about, lines, {"tickformat": ".0%", "rangemode": "tozero"})


def _rewards(metrics: Sequence[Metrics]) -> list[_Card]:
    """The cards of several rewards, one each since their scales differ, and of held-out rewards."""
    names = dict.fromkeys(key for record in metrics for key in record if key.startswith((_REWARD, _HELD_OUT)))
    cards = []
    for key in names:
        name, held_out = escape(key.partition("@")[2]), key.startswith(_HELD_OUT)
        about = "held out, never trained on, from evaluations" if held_out else "mean over survivors, before its weight"
        cards.append(_Card(f"Reward {name}", about, (Curve(key, name, TEAL if held_out else ACCENT, held_out),)))
    return cards


def _deviation(metrics: Sequence[Metrics]) -> _Card:
    name = "update/ratio_max_deviation"
    logarithmic = any((metric(record, name) or 0) > 0 for record in metrics)  # such an axis cannot show zeros alone
    y: dict[str, object] = (
        {"type": "log", "tickformat": ".0e", "dtick": "D2"} if logarithmic else {"rangemode": "nonnegative"}
    )
    about = "largest |ratio − 1|" + (", log scale" if logarithmic else "")
    return _Card("Ratio deviation", about, (Curve(name, "deviation"),), y)


def _grid(metrics: Sequence[Metrics], cards: Sequence[_Card], classes: str, height: int) -> str:
    drawn = [(card, charts.curves(metrics, card.curves, card.y, height)) for card in cards]
    html = "".join(
        chart(figure, f"curve-{anchor_of(card.title)}-{i}", card.title, card.about)
        for i, (card, figure) in enumerate(drawn)
        if figure is not None
    )
    absent = [card.title for card, figure in drawn if figure is None]
    return f'<div class="{classes}">{html}</div>' + (note(f"Not recorded: {', '.join(absent)}.") if absent else "")
