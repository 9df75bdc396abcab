"""Weights & Biases, by its own client. Its environment variables hold, such as WANDB_MODE=offline and WANDB_ENTITY."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np

from progrpo.tracking.records import MetricValue
from progrpo.tracking.tracker import TrackedRun


class WandbTracker:
    """A run of Weights & Biases. A resumed run goes on under the same id."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            reinit="create_new",  # a run that the caller has open is left alone
            settings=wandb.Settings(console="off"),  # it would replace the run's standard streams
        )
        # its own step only counts calls and cannot go back, which a resumed run does
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def log(self, metrics: Mapping[str, MetricValue], step: int) -> None:
        self._run.log({**metrics, "iteration": step})

    def log_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        pictures = {name: self._image(image_HWC) for name, image_HWC in images.items()}
        self._run.log({**pictures, "iteration": step})

    def log_config(self, config: Mapping[str, object]) -> None:
        self._run.config.update(dict(config), allow_val_change=True)  # a resumed run may have more iterations

    def close(self) -> None:
        failed = sys.exception() is not None  # the one that ends the run
        self._run.finish(exit_code=int(failed))
