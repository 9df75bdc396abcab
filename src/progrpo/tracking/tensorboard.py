"""TensorBoard: event files in the run folder, by torch's own writer."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from progrpo.tracking.records import MetricValue
from progrpo.tracking.tracker import TrackedRun


class TensorBoardTracker:
    """A writer of event files. A resumed run purges the steps that it logs again."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.resumed_at)

    def log(self, metrics: Mapping[str, MetricValue], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        for name, image_HWC in images.items():
            self._writer.add_image(name, image_HWC, step, dataformats="HWC")
        self._writer.flush()

    def log_config(self, config: Mapping[str, object]) -> None:
        lines = json.dumps(config, indent=2).splitlines()
        self._writer.add_text("config", "\n".join(f"    {line}" for line in lines))  # Markdown shows it as code

    def close(self) -> None:
        self._writer.close()
