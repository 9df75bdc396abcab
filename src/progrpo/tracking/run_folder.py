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

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, cast

import numpy as np

from progrpo.durable import append
from progrpo.messages import named
from progrpo.tracking.files import Folder, encode, in_bytes
from progrpo.tracking.grids import reduced, tile
from progrpo.tracking.own_files import (
    delete,
    delete_unfinished,
    holds_only_weights,
    new_weights,
    numbered_files,
    own_files,
)
from progrpo.tracking.records import AuditRecord, EvaluationRecord, Metrics, MetricValue, Summary, iteration_of
from progrpo.types import FROM_PYTHON

_REPLACE = "replace it with --overwrite (in Python mode='overwrite'), or give another folder as --out (out)"


class RunFolder(Folder):
    """The files of one run, and its first tracker. Readers return {}, [] or None for a file that is not written yet.

    Writers require the folder: if it is deleted during the run, it is not created again without its contents.
    """

    def __init__(self, path: str | Path) -> None:
        """Refuse with ValueError an empty name, which would be the current folder, and a name that is not UTF-8."""
        if not str(path):
            raise ValueError("the run folder's name is empty; give one, or . for the current folder")
        if any("\ud800" <= c <= "\udfff" for c in str(path)):  # surrogates, which stand for bytes that are not UTF-8
            raise ValueError(f"the run folder's name {named(path)} is not UTF-8 text; give another")
        super().__init__(Path(path))

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
            raise ValueError(run._refusal([str(file) for file in existing]))
        delete(run.path, existing)
        run.path.mkdir(parents=True, exist_ok=True)
        return run

    def _refusal(self, existing: Sequence[str]) -> str:
        """The message that the folder holds a run, with what can be done about it."""
        if "config.json" not in existing:
            return f"{self.path} holds {existing[0]} of another run, whose config.json is gone; {_REPLACE}"
        saved = any(file.startswith("checkpoints") for file in existing)
        resume = f"resume it with {self.command('resume')}, " if saved else ""
        return f"{self.path} already holds a run (config.json); {resume}{_REPLACE}"

    def command(self, what: Literal["resume", "anew"]) -> str:
        """The command that resumes this run or starts it anew, or the call for a run of Python objects."""
        path = shlex.quote(str(self.path))
        if self.is_of_python():
            return f"progrpo.train(..., out={str(self.path)!r}, mode={'resume' if what == 'resume' else 'overwrite'!r})"
        return (
            f"progrpo train --resume {path}" if what == "resume" else f"progrpo train {path} --out {path} --overwrite"
        )

    def is_of_python(self) -> bool:
        """Whether the run's model was given to `progrpo.train`, so that no command can load it."""
        try:
            model = cast(dict[str, dict[str, object]], self.read_config())["model"]["path"]
        except (ValueError, LookupError, TypeError, OSError):  # config.json is missing or damaged
            return False
        return isinstance(model, str) and model.endswith(FROM_PYTHON)

    def log_config(self, config: Mapping[str, object]) -> None:
        self.write_json("config.json", config)

    def read_config(self) -> dict[str, object]:
        return cast(dict[str, object], self.read_json("config.json") or {})

    def write_summary(self, summary: Summary) -> None:
        self.write_json("summary.json", summary)

    def read_summary(self) -> Summary:
        return cast(Summary, self.read_json("summary.json") or {})

    def write_costs(self, costs: Mapping[str, float]) -> None:
        """Write the seconds per unit of work by which the run compares plans. They are written once."""
        self.write_json("costs.json", costs)

    def read_costs(self) -> dict[str, float] | None:
        return cast(dict[str, float] | None, self.read_json("costs.json"))

    def log(self, metrics: Mapping[str, MetricValue], step: int) -> None:
        """Append the record of iteration `step` to metrics.jsonl."""
        append(self.path / "metrics.jsonl", in_bytes(encode({"iteration": step, **metrics})))

    def read_metrics(self) -> list[Metrics]:
        """All records, without an unfinished last line. ValueError for another line that is no record."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        records: list[Metrics] = []
        for i, line in enumerate(lines):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # not JSON, or the line ends inside a character
                if i + 1 < len(lines):
                    raise ValueError(f"{path}: line {i + 1} is not JSON; delete that line") from None
                continue
            if not (isinstance(record, dict) and isinstance(record.get("iteration"), int)):
                raise ValueError(f"{path}: line {i + 1} is no record of an iteration; delete that line")
            records.append(record)
        return records

    def truncate(self, iteration: int) -> None:
        """Drop the records of `iteration` and later, which a resumed run makes again, and a killed writer's files."""
        delete_unfinished(self.path)
        kept = [record for record in self.read_metrics() if iteration_of(record) < iteration]
        self.write_text("metrics.jsonl", "".join(map(encode, kept)))
        for path in [*numbered_files(self.path, "audit"), *numbered_files(self.path, "samples")]:
            if int(path.stem) >= iteration:
                path.unlink()

    def weights(self, name: str) -> AbstractContextManager[Path]:
        """A folder of weights for the block to fill. It replaces the old one whole, but for a user's files in it."""
        return new_weights(self.path / name)

    def log_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        """Write pictures in folders of their names, such as samples/0004.png."""
        for name, image_HWC in images.items():
            self.save_picture(f"{name}/{step:04d}.png", image_HWC)

    def close(self) -> None:
        """Do nothing: each file is on the disk when its writer returns."""

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
        with_pictures = [{**record, "picture": name} for record, name in zip(records, names, strict=True)]
        self.write_json(f"evaluation/{when}.json", with_pictures)

    def read_evaluation(self, when: str) -> list[EvaluationRecord]:
        return cast(list[EvaluationRecord], self.read_json(f"evaluation/{when}.json") or [])

    def write_audit(self, audit: AuditRecord, pictures_GSHWC: np.ndarray) -> None:
        """Write an audit group and its sheet of pictures, uint8; S is T previews and the final picture."""
        group, columns = pictures_GSHWC.shape[:2]
        assert columns == len(audit["steps"]) + 1, f"{columns} pictures a member for {len(audit['steps'])} steps"
        name = f"audit/{audit['iteration']:04d}"
        sheet = tile(reduced(pictures_GSHWC.reshape(group * columns, *pictures_GSHWC.shape[2:])), columns, gap=0)
        strip = self.save_picture(f"{name}.png", sheet)  # before the record: whoever reads the record finds the sheet
        self.write_json(f"{name}.json", {**audit, "strip": strip})

    def read_audits(self) -> list[AuditRecord]:
        """All audits, oldest first."""
        paths = [path for path in numbered_files(self.path, "audit") if path.suffix == ".json"]
        audits = [self.read_json(f"audit/{path.name}") for path in sorted(paths, key=lambda path: int(path.stem))]
        # a run that is resumed at this moment may delete one
        return [cast(AuditRecord, audit) for audit in audits if audit is not None]
