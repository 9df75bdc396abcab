"""The settings of where a run reports to, beside its folder and the console."""

from __future__ import annotations

from dataclasses import dataclass

from progrpo.registry import one_of
from progrpo.settings import Rule, matches, setting

TRACKERS = {
    "tensorboard": "progrpo.tracking.tensorboard:TensorBoardTracker",
    "wandb": "progrpo.tracking.wandb:WandbTracker",
    "trackio": "progrpo.tracking.trackio:TrackioTracker",
    "swanlab": "progrpo.tracking.swanlab:SwanLabTracker",
}
"""The built-in trackers. Each is named as its package and as the extra that installs it."""

_TRACKER = one_of(TRACKERS, "Class")
_NAME = r"\w[\w.-]{0,99}"
_NAME_TEXT = "a name of letters, digits, dots and dashes, 100 at most"


def _are_trackers(names: tuple[str, ...]) -> bool:
    return len(set(names)) == len(names) and all(_TRACKER.holds(name) for name in names)


@dataclass(frozen=True)
class TrackingSettings:
    """The trackers of a run. The run folder is written in any case (docs/tracking.md)."""

    to: tuple[str, ...] = setting((), Rule(_are_trackers, f"different names, each {_TRACKER.text}"))
    """Trackers that get the metrics, the configuration and sample pictures: tensorboard, wandb, trackio, swanlab (each
    an extra of that name), or `module:Class` of your own."""
    project: str = setting("progrpo", matches(_NAME, _NAME_TEXT))
    """The project of Weights & Biases, trackio and SwanLab that the run belongs to."""
    name: str = setting("", matches(f"({_NAME})?", f"{_NAME_TEXT}, or empty for the run folder's name"))
    """The run's name there; empty: the run folder's name."""
