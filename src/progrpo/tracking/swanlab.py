"""SwanLab, by its own client. Its environment variables hold, such as SWANLAB_MODE=offline."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np

from progrpo.messages import raised
from progrpo.tracking.records import MetricValue
from progrpo.tracking.tracker import TrackedRun


class SwanLabTracker:
    """A run of SwanLab. A resumed run goes on under the same id."""

    def __init__(self, run: TrackedRun) -> None:
        import swanlab

        self._image = swanlab.Image
        self._run = swanlab.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            log_dir=str(run.folder / "swanlog"),
            settings=swanlab.Settings(terminal={"proxy_type": "none"}),  # it would replace the run's standard streams
        )

    def log(self, metrics: Mapping[str, MetricValue], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def log_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        self._run.log({name: self._image(image_HWC) for name, image_HWC in images.items()}, step=step)

    def log_config(self, config: Mapping[str, object]) -> None:
        self._run.config.update(dict(config))

    def close(self) -> None:
        error = sys.exception()  # the one that ends the run
        if error is None:
            self._run.finish()
        else:
            self._run.finish(state="crashed", error=raised(error))
