"""trackio, by its own client: a local store, or a Space or server that its environment variables name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from progrpo.tracking.records import MetricValue
from progrpo.tracking.tracker import TrackedRun


class TrackioTracker:
    """A run of trackio. It is found again by its name, to which the run's id is added."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._image = trackio.Image
        self._run = trackio.init(project=run.project, name=f"{run.name}-{run.id}", resume="allow", embed=False)

    def log(self, metrics: Mapping[str, MetricValue], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def log_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        self._run.log({name: self._image(image_HWC) for name, image_HWC in images.items()}, step=step)

    def log_config(self, config: Mapping[str, object]) -> None:
        self._run.config.update(config)  # it is stored with the first metrics

    def close(self) -> None:
        self._run.finish()
