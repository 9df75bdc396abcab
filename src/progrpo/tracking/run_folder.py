"""The run folder with every file that a run leaves.

Each file is written whole or not at all, so a run can be read while it writes.

config.json               the full configuration; a run can be repeated from it
metrics.jsonl             one object per iteration, flat `stage/name` keys (docs/metrics.md)
summary.json              the results of the run
costs.json                seconds per unit of work, by which the run compares plans
evaluation/before.json    one record per picture (and after.json); the first pictures are evaluation/before/000.png, ...
audit/0005.json, .png     an audit group: scores at every step, and a sheet of its previews (rows: members)
samples/0000.png          a grid of pictures per checkpoint
checkpoints/  lora/  report.html
trackers.json             the id and name that other trackers know the run by (tracking/tracker.py)
tensorboard/              TensorBoard's event files
run.lock                  there while a run writes here (tracking/lock.py)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from progrpo.messages import named
from progrpo.tracking.commands import resume_command
from progrpo.tracking.files import Folder, JsonFile
from progrpo.tracking.grids import audit_sheet
from progrpo.tracking.metrics_file import MetricsFile
from progrpo.tracking.own_files import delete, delete_unfinished, holds_only_weights, numbered_files, own_files
from progrpo.tracking.records import AuditRecord, EvaluationRecord, MetricValue, Summary

_REPLACE = "replace it with --overwrite (in Python mode='overwrite'), or give another folder as --out (out)"


class RunFolder(Folder):
    """The files of one run, and its first tracker.

    Writers require the folder: if it is deleted during the run, it is not created again without its contents.
    """

    def __init__(self, path: str | Path) -> None:
        """Refuse with ValueError what is no path, an empty name, which is the current folder, and one not in UTF-8."""
        if not isinstance(path, str | os.PathLike):
            raise ValueError(f"the run folder must be a str or a Path, not {type(path).__name__}")
        if not str(path):
            raise ValueError("the run folder's name is empty; give one, or . for the current folder")
        if any("\ud800" <= c <= "\udfff" for c in str(path)):  # surrogates, which stand for bytes that are not UTF-8
            raise ValueError(f"the run folder's name {named(path)} is not UTF-8 text; give another")
        super().__init__(Path(path))
        self.config: JsonFile[Mapping[str, object]] = JsonFile(self, "config.json", dict)
        self.metrics = MetricsFile(self)
        self.summary: JsonFile[Summary] = JsonFile(self, "summary.json", Summary)
        self.costs: JsonFile[Mapping[str, float] | None] = JsonFile(self, "costs.json", lambda: None)
        """The seconds per unit of work by which the run compares plans. They are written once."""
        self.evaluations: Mapping[str, JsonFile[list[EvaluationRecord]]] = {
            when: JsonFile(self, f"evaluation/{when}.json", list) for when in ("before", "after")
        }

    @classmethod
    def create(cls, path: str | Path, overwrite: bool = False) -> RunFolder:
        """Create a folder for a new run.

        ValueError if it holds a run or parts of one, unless `overwrite` allows their deletion, and if it holds weights
        without a run, which belong to somebody else.
        """
        run = cls(path)
        existing = list(own_files(run.path))
        if holds_only_weights(existing):
            raise ValueError(f"{path} holds {existing[0]} but no run; a run would replace it: give another folder")
        if existing and not overwrite:
            raise ValueError(_refusal(run.path, [str(file) for file in existing]))
        delete(run.path, existing)
        run.path.mkdir(parents=True, exist_ok=True)
        return run

    def log_config(self, config: Mapping[str, object]) -> None:
        self.config.write(config)

    def log(self, metrics: Mapping[str, MetricValue], step: int) -> None:
        """Append the record of iteration `step` to metrics.jsonl."""
        self.metrics.append(metrics, step)

    def log_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        """Write pictures in folders of their names, such as samples/0004.png."""
        for name, image_HWC in images.items():
            self.save_picture(f"{name}/{step:04d}.png", image_HWC)

    def close(self) -> None:
        """Do nothing: each file is on the disk when its writer returns."""

    def truncate(self, iteration: int) -> None:
        """Drop the records of `iteration` and later, which a resumed run makes again, and a killed writer's files."""
        delete_unfinished(self.path)
        self.metrics.truncate(iteration)
        for path in [*numbered_files(self.path, "audit"), *numbered_files(self.path, "samples")]:
            if int(path.stem) >= iteration:
                path.unlink()

    def write_evaluation(
        self, when: str, records: Sequence[EvaluationRecord], images_NHWC: np.ndarray, pictures: int = 36
    ) -> None:
        """Write evaluation/{when}.json (before or after) and its first `pictures`, which their records then name.

        `images_NHWC`, uint8, has the pictures of the first records, and may be shorter than the records.
        """
        names: list[str | None] = [
            self.save_picture(f"evaluation/{when}/{i:03d}.png", image) for i, image in enumerate(images_NHWC[:pictures])
        ]
        names += [None] * (len(records) - len(names))
        self.evaluations[when].write([{**record, "picture": name} for record, name in zip(records, names, strict=True)])

    def write_audit(self, audit: AuditRecord, pictures_GSHWC: np.ndarray) -> None:
        """Write an audit group and its sheet of pictures, uint8; S is T previews and the final picture."""
        columns = pictures_GSHWC.shape[1]
        assert columns == len(audit["steps"]) + 1, f"{columns} pictures a member for {len(audit['steps'])} steps"
        name = f"audit/{audit['iteration']:04d}"
        # before the record: whoever reads the record finds the sheet
        strip = self.save_picture(f"{name}.png", audit_sheet(pictures_GSHWC))
        self._audit(f"{name}.json").write({**audit, "strip": strip})

    def read_audits(self) -> list[AuditRecord]:
        """All audits, oldest first."""
        paths = [path for path in numbered_files(self.path, "audit") if path.suffix == ".json"]
        audits = [self._audit(f"audit/{path.name}").read() for path in sorted(paths, key=lambda path: int(path.stem))]
        # a run that is resumed at this moment may delete one
        return [audit for audit in audits if audit is not None]

    def _audit(self, name: str) -> JsonFile[AuditRecord | None]:
        return JsonFile(self, name, lambda: None)


def _refusal(run: Path, existing: Sequence[str]) -> str:
    """The message that a folder holds a run, with what can be done about it."""
    if "config.json" not in existing:
        return f"{run} holds {existing[0]} of another run, whose config.json is gone; {_REPLACE}"
    saved = any(file.startswith("checkpoints") for file in existing)
    resume = f"resume it with {resume_command(run)}, " if saved else ""
    return f"{run} already holds a run (config.json); {resume}{_REPLACE}"
