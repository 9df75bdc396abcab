"""The trackers of a run: the protocol, what each is opened with, and how a failing tracker leaves the run alone."""

from __future__ import annotations

import importlib.util
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np

from progrpo.messages import raised
from progrpo.registry import load_named
from progrpo.tracking.files import JsonFile
from progrpo.tracking.records import MetricValue
from progrpo.tracking.run_folder import RunFolder
from progrpo.tracking.settings import TRACKERS, TrackingSettings

_STATE = "trackers.json"
_REWINDING = ("tensorboard",)
"""Trackers that drop what was logged after the checkpoint when a run is resumed."""


class Tracker(Protocol):
    """A place that a run reports to. `step` is the zero-based iteration, as in metrics.jsonl."""

    def log(self, metrics: Mapping[str, MetricValue], step: int) -> None:
        """Record metrics by their `stage/name`."""

    def log_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        """Record pictures by name, each uint8 (H, W, 3)."""

    def log_config(self, config: Mapping[str, object]) -> None:
        """Record the run's configuration, nested as in config.json: when a run begins and when it is resumed."""

    def close(self) -> None:
        """Write out what is pending. Nothing is logged after it."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker is opened for. All but `resumed_at` stays the same when the run is resumed."""

    folder: Path
    project: str
    name: str
    id: str
    """Eight hexadecimal digits, drawn when the run began."""
    resumed_at: int | None = None
    """The first iteration that a resumed run logs again; None for a new run."""


class Trackers:
    """The trackers by name as one tracker that never fails: the first error of each is a warning."""

    def __init__(self, trackers: Mapping[str, Tracker], warn: Callable[[str], None]) -> None:
        self._trackers = dict(trackers)
        self._warn = warn
        self._failed: set[str] = set()

    def log(self, metrics: Mapping[str, MetricValue], step: int) -> None:
        """Only finite numbers are passed on, without `iteration`, which is the step."""
        numbers = {name: value for name, value in metrics.items() if name != "iteration" and _is_number(value)}
        for name, tracker in self._trackers.items():
            with self._tolerated(name):
                tracker.log(numbers, step)

    def log_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        for name, tracker in self._trackers.items():
            with self._tolerated(name):
                tracker.log_images(images, step)

    def log_config(self, config: Mapping[str, object]) -> None:
        for name, tracker in self._trackers.items():
            with self._tolerated(name):
                tracker.log_config(config)

    def close(self) -> None:
        for name, tracker in self._trackers.items():
            with self._tolerated(name):
                tracker.close()

    @contextmanager
    def _tolerated(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                self._warn(
                    f"the tracker {name} failed ({raised(error)}); the run goes on, and its folder has what is missing"
                    " there"
                )


class OncePerStep:
    """A tracker that gets no metric and no picture twice for one step, also when a run is resumed.

    `logged` is the last step by name. `save` keeps it before anything is logged.
    """

    def __init__(self, tracker: Tracker, logged: dict[str, int], save: Callable[[], None]) -> None:
        self._tracker = tracker
        self._logged = logged
        self._save = save

    def log(self, metrics: Mapping[str, MetricValue], step: int) -> None:
        if new := self._unlogged(metrics, step):
            self._tracker.log({name: metrics[name] for name in new}, step)

    def log_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        if new := self._unlogged(images, step):
            self._tracker.log_images({name: images[name] for name in new}, step)

    def log_config(self, config: Mapping[str, object]) -> None:
        self._tracker.log_config(config)

    def close(self) -> None:
        self._tracker.close()

    def _unlogged(self, values: Mapping[str, object], step: int) -> list[str]:
        new = [name for name in values if self._logged.get(name, -1) < step]
        if new:
            self._logged.update(dict.fromkeys(new, step))
            self._save()
        return new


class _State(TypedDict):
    """The contents of trackers.json: what a resumed run is known by, and the last step by tracker and name."""

    id: str
    project: str
    name: str
    logged: dict[str, dict[str, int]]


def require_installed(settings: TrackingSettings) -> None:
    """ValueError, with the command that installs it, for a tracker that is missing."""
    for name in settings.to:
        if name not in TRACKERS:
            load_named(name, TRACKERS, "tracking.to", "Class")
        elif not _is_installed(name):
            raise ValueError(f"tracking.to {name} needs {name}, which is not installed: pip install 'progrpo[{name}]'")


def _is_installed(package: str) -> bool:
    """Whether a package can be imported. A plain folder of its name, as wandb leaves one, is no package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def open_trackers(
    settings: TrackingSettings, folder: RunFolder, resumed_at: int | None, warn: Callable[[str], None]
) -> Trackers:
    """The trackers of a run, opened. A resumed run goes on under its id, project and name.

    ValueError for a tracker that cannot be opened; the others are closed then.
    """
    if not settings.to:
        return Trackers({}, warn)
    file: JsonFile[_State | None] = JsonFile(folder, _STATE, lambda: None)
    saved = None if resumed_at is None else file.read()
    state: _State = saved or {
        "id": secrets.token_hex(4),
        "project": settings.project,
        "name": settings.name or folder.path.resolve().name,
        "logged": {},
    }

    def save() -> None:
        file.write(state)

    save()
    run = TrackedRun(folder.path, state["project"], state["name"], state["id"], resumed_at)
    opened: dict[str, Tracker] = {}
    with ExitStack() as failed:
        failed.callback(lambda: Trackers(opened, warn).close())
        for name in settings.to:
            tracker = _open(name, run)
            logged = state["logged"].setdefault(name, {})
            opened[name] = tracker if name in _REWINDING else OncePerStep(tracker, logged, save)
        failed.pop_all()
    return Trackers(opened, warn)


def _open(name: str, run: TrackedRun) -> Tracker:
    make = load_named(name, TRACKERS, "tracking.to", "Class")
    try:
        tracker: Tracker = make(run)
    except Exception as error:
        raise ValueError(
            f"tracking.to {name} cannot be opened ({raised(error)}); mend that, choose the tracker's offline mode"
            " (docs/tracking.md), or leave it out"
        ) from error
    return tracker


def _is_number(value: MetricValue) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
