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
import math
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np

from progrpo.durable import PREVIOUS, WRITING, append, new_folder, sync, whole_folder, write_file
from progrpo.messages import named
from progrpo.tracking.records import AuditRecord, EvaluationRecord, Metrics, MetricValue, Summary, iteration_of
from progrpo.types import FROM_PYTHON

_FILES = ("config.json", "costs.json", "metrics.jsonl", "summary.json", "trackers.json", "report.html")
_ENDS = f"({re.escape(WRITING)}|{re.escape(PREVIOUS)})?"
_WEIGHTS = {
    "lora": r"pytorch_lora_weights\.safetensors",
    **dict.fromkeys(("transformer", "unet"), r"config\.json|diffusion_pytorch_model[^/]*\.safetensors(\.index\.json)?"),
}
_IN_FOLDERS = {
    "checkpoints": rf"iteration_\d+{_ENDS}",
    "evaluation/before": r"\d+\.png",
    "evaluation/after": r"\d+\.png",
    "evaluation": r"(before|after)\.json",
    "audit": r"\d+\.(json|png)",
    "samples": r"\d+\.png",
    "tensorboard": r"events\.out\.tfevents\..*",
    **{folder + end: files for folder, files in _WEIGHTS.items() for end in ("", WRITING, PREVIOUS)},
}
"""Patterns of a run's files by folder, in which a user may keep others. Inner folders stand before outer ones."""
_REPLACE = "replace it with --overwrite (in Python overwrite=True), or give another folder as --out (out)"
_GAP_GREY = 236
_SIDE = 192  # pixels of a picture on an audit's sheet, as many as the report shows


def _plain(value: object) -> object:
    """The value in JSON's types: numpy arrays as lists, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _encode(value: object, indent: int | None = None) -> str:
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False) + "\n"


def _in_bytes(text: str) -> bytes:
    """The text in UTF-8. A lone surrogate, Python's sign for an undecodable byte, is escaped as in JSON."""
    return text.encode(errors="backslashreplace")


def _decode(data: bytes, path: Path) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); put it back as it was") from None


def tile(images_NHWC: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """The N pictures as one, row by row, with `gap` grey pixels between them."""
    n, height, width, channels = images_NHWC.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap), columns * (width + gap), channels), _GAP_GREY, np.uint8)
    for i, image in enumerate(images_NHWC):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[y : y + height, x : x + width] = image
    return sheet[: sheet.shape[0] - gap, : sheet.shape[1] - gap]


def _small(images_NHWC: np.ndarray) -> np.ndarray:
    """The pictures, reduced by a whole number to at most 192 pixels per side: viewers fail on larger sheets."""
    from PIL import Image

    factor = -(-max(images_NHWC.shape[1:3]) // _SIDE)
    if factor == 1:
        return images_NHWC
    return np.stack([np.asarray(Image.fromarray(image).reduce(factor)) for image in images_NHWC])


class RunFolder:
    """The files of one run, and its first tracker. Readers return {}, [] or None for a file that is not written yet.

    Writers require the folder: if it is deleted during the run, it is not created again without its contents.
    """

    def __init__(self, path: str | Path) -> None:
        """Refuse with ValueError an empty name, which would be the current folder, and a name that is not UTF-8."""
        if not str(path):
            raise ValueError("the run folder's name is empty; give one, or . for the current folder")
        if any("\ud800" <= c <= "\udfff" for c in str(path)):  # surrogates, which stand for bytes that are not UTF-8
            raise ValueError(f"the run folder's name {named(path)} is not UTF-8 text; give another")
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path, overwrite: bool = False) -> RunFolder:
        """Create a folder for a new run.

        ValueError if it holds a run or parts of one, unless `overwrite` allows their deletion, and if it holds weights
        without a run, which belong to somebody else.
        """
        run = cls(path)
        existing = [str(file.relative_to(run.path)) for file in run._own_files()]
        if existing and all(Path(file).parent.name in _WEIGHTS for file in existing):
            raise ValueError(f"{path} holds {existing[0]} but no run; a run would replace it: give another folder")
        if existing and not overwrite:
            raise ValueError(run._refusal(existing))
        run._delete(existing)
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
            return f"progrpo.train(..., out={str(self.path)!r}, {'resume' if what == 'resume' else 'overwrite'}=True)"
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

    def _own_files(self) -> Iterator[Path]:
        """The files that a run wrote, without those of a user: checkpoints first, config.json last."""
        for folder, names in _IN_FOLDERS.items():
            children = sorted((self.path / folder).iterdir()) if (self.path / folder).is_dir() else []
            yield from (path for path in children if re.fullmatch(names, path.name))
        for name in reversed(_FILES):
            if (self.path / name).exists():
                yield self.path / name

    def _delete(self, files: Sequence[str]) -> None:
        """Delete these files, and the folders that this leaves empty.

        Checkpoints go first and config.json last: if this is interrupted, the rest can be neither resumed nor mistaken
        for an empty folder.
        """
        if not files:
            return
        self._delete_unfinished()
        for path in map(self.path.joinpath, files):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            sync(path.parent)
        for folder in map(self.path.joinpath, _IN_FOLDERS):
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()

    def _delete_unfinished(self) -> None:
        """Delete the unfinished files of a killed writer. Checkpoints and weights delete their own."""
        for folder, names in [(".", "|".join(map(re.escape, _FILES))), *_IN_FOLDERS.items()]:
            for path in (self.path / folder).glob(f"*{WRITING}"):
                if re.fullmatch(rf"({names})\.\d+{re.escape(WRITING)}", path.name) and path.is_file():
                    path.unlink()

    def _write(self, relative: str, write: Callable[[BinaryIO], object]) -> Path:
        path = self.path / relative
        for folder in reversed(Path(relative).parents[:-1]):
            if not (self.path / folder).is_dir():
                (self.path / folder).mkdir()
                sync((self.path / folder).parent)
        write_file(path, write)
        return path

    # --- texts and records --------------------------------------------------------------------------------------------

    def write_text(self, relative: str, text: str) -> Path:
        return self._write(relative, lambda file: file.write(_in_bytes(text)))

    def write_json(self, relative: str, value: object) -> Path:
        return self.write_text(relative, _encode(value, indent=1))

    def read_json(self, relative: str) -> object:
        """The value that the file holds, or None if it does not exist. ValueError if it is not JSON."""
        path = self.path / relative
        try:
            return _decode(path.read_bytes(), path)
        except FileNotFoundError:
            return None

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
        append(self.path / "metrics.jsonl", _in_bytes(_encode({"iteration": step, **metrics})))

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
        self._delete_unfinished()
        kept = [record for record in self.read_metrics() if iteration_of(record) < iteration]
        self.write_text("metrics.jsonl", "".join(map(_encode, kept)))
        for path in [*self._numbered("audit"), *self._numbered("samples")]:
            if int(path.stem) >= iteration:
                path.unlink()

    def _numbered(self, folder: str) -> list[Path]:
        """The files of a folder that are named by their iteration."""
        files = (self.path / folder).glob("*.*")
        return [path for path in files if re.fullmatch(_IN_FOLDERS[folder], path.name)]

    @contextmanager
    def weights(self, name: str) -> Iterator[Path]:
        """A folder of weights for the block to fill. It replaces the old one whole, but for a user's files in it."""
        with new_folder(self.path / name) as folder:
            yield folder
            old = whole_folder(self.path / name)

            def weights_of_run(parent: str, names: list[str]) -> list[str]:
                return [n for n in names if Path(parent) == old and re.fullmatch(_WEIGHTS[name], n)]

            if old.is_dir():
                shutil.copytree(old, folder, symlinks=True, ignore=weights_of_run, dirs_exist_ok=True)

    # --- pictures -----------------------------------------------------------------------------------------------------

    def save_picture(self, relative: str, image_HWC: np.ndarray) -> str:
        """Write a uint8 (H, W, 3) array as PNG. The relative path is returned, for a record to name it."""
        from PIL import Image

        assert image_HWC.dtype == np.uint8, f"a picture is uint8, not {image_HWC.dtype}"
        picture = Image.fromarray(image_HWC)
        self._write(relative, lambda file: picture.save(file, format="PNG"))
        return relative

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
        sheet = tile(_small(pictures_GSHWC.reshape(group * columns, *pictures_GSHWC.shape[2:])), columns, gap=0)
        strip = self.save_picture(f"{name}.png", sheet)  # before the record: whoever reads the record finds the sheet
        self.write_json(f"{name}.json", {**audit, "strip": strip})

    def read_audits(self) -> list[AuditRecord]:
        """All audits, oldest first."""
        paths = [path for path in self._numbered("audit") if path.suffix == ".json"]
        audits = [self.read_json(f"audit/{path.name}") for path in sorted(paths, key=lambda path: int(path.stem))]
        # a run that is resumed at this moment may delete one
        return [cast(AuditRecord, audit) for audit in audits if audit is not None]
