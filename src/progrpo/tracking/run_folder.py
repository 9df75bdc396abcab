"""The run folder: every file that a run leaves, written whole or not at all, so that a run can be read while it writes.

config.json               the full configuration; a run can be repeated from it
metrics.jsonl             one object an iteration, flat `stage/name` keys (docs/metrics.md)
summary.json              what the run came to
evaluation/before.json    a record a picture (and after.json); the first pictures as evaluation/before/000.png
audit/0005.json, .png     an audit group: scores at every step, and a sheet of its previews (rows: members)
samples/0000.png          a grid of pictures an evaluation
checkpoints/  lora/  report.html
trackers.json             what other trackers know the run by (tracking/tracker.py); tensorboard/ has TensorBoard's files
run.lock                  while a run writes here (tracking/lock.py)
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
from typing import Any, BinaryIO, Literal

import numpy as np

from progrpo.durable import PREVIOUS, WRITING, append, new_folder, sync, whole_folder, write_file
from progrpo.messages import named
from progrpo.tracking.records import AuditRecord
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
"""What a run writes in folders, whose names a user's own may have; an inner folder before the one that it lies in."""
_OTHERWISE = "replace it with --overwrite (in Python overwrite=True), or give another folder as --out (out)"
_GAP_GREY = 236
_SIDE = 192  # pixels of a picture on an audit's sheet, as many as the report shows


def _plain(value: Any) -> Any:
    """`value` in JSON's types: numpy unpacked, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _encode(value: Any, indent: int | None = None) -> str:
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False) + "\n"


def _in_bytes(text: str) -> bytes:
    """UTF-8. Half of a character, as Python reads bytes of a file's name that are no text, is written as JSON's escape of it."""
    return text.encode(errors="backslashreplace")


def _decode(data: bytes, path: Path) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); put it back as it was") from None


def tile(images_NHWC: np.ndarray, columns: int, scale: int = 1, gap: int = 2) -> np.ndarray:
    """N pictures as one, row by row, `gap` grey pixels between them, each enlarged `scale` times without blur."""
    images_NHWC = images_NHWC.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, channels = images_NHWC.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap), columns * (width + gap), channels), _GAP_GREY, np.uint8)
    for i, image in enumerate(images_NHWC):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[y : y + height, x : x + width] = image
    return sheet[: sheet.shape[0] - gap, : sheet.shape[1] - gap]


def _small(images_NHWC: np.ndarray) -> np.ndarray:
    """Reduced by a whole number to at most 192 pixels a side: a sheet of hundreds of large pictures could not be opened."""
    from PIL import Image

    factor = -(-max(images_NHWC.shape[1:3]) // _SIDE)
    if factor == 1:
        return images_NHWC
    return np.stack([np.asarray(Image.fromarray(image).reduce(factor)) for image in images_NHWC])


class RunFolder:
    """Writes and reads the files of one run. Readers give what is there: {}, [] or None for what is not written yet.

    Writers need the folder: one that vanishes while a run writes is not made anew, without what was in it.
    """

    def __init__(self, path: str | Path) -> None:
        """ValueError for an empty name, which would be the current folder, and for one that no file of a run could say."""
        if not str(path):
            raise ValueError("the run folder's name is empty; give one, or . for the current folder")
        if any("\ud800" <= c <= "\udfff" for c in str(path)):  # bytes that are no UTF-8, as Python has them
            raise ValueError(f"the run folder's name {named(path)} is no text in UTF-8; give another")
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path, overwrite: bool = False) -> RunFolder:
        """A folder for a new run.

        ValueError if it holds one already, or what is left of one, unless that may be deleted; and for weights beside no run, which are
        somebody else's.
        """
        run = cls(path)
        left = [str(file.relative_to(run.path)) for file in run._own()]
        if left and all(Path(file).parent.name in _WEIGHTS for file in left):
            raise ValueError(f"{path} holds {left[0]} but no run; a run would replace it: give another folder")
        saved = any(file.startswith("checkpoints") for file in left)
        resumed = f"resume it with {run.command('resume')}, " if saved else ""
        if left and not overwrite:
            raise ValueError(
                f"{path} already holds a run (config.json); {resumed}{_OTHERWISE}"
                if "config.json" in left
                else f"{path} holds {left[0]} of another run, whose config.json is gone; {_OTHERWISE}"
            )
        run._delete(left)
        run.path.mkdir(parents=True, exist_ok=True)
        return run

    def command(self, what: Literal["resume", "anew"]) -> str:
        """How the run that lies here goes on from its last checkpoint, or begins anew: a command, or a call where only Python has its parts."""
        path = shlex.quote(str(self.path))
        if self.is_of_python():
            return f"progrpo.train(..., out={str(self.path)!r}, {'resume' if what == 'resume' else 'overwrite'}=True)"
        return (
            f"progrpo train --resume {path}" if what == "resume" else f"progrpo train {path} --out {path} --overwrite"
        )

    def is_of_python(self) -> bool:
        """Whether the run's model was given to `progrpo.train`, so that no command can load it."""
        try:
            model = self.read_config()["model"]["path"]
        except (ValueError, LookupError, TypeError, OSError):  # there is none, or it is damaged
            return False
        return isinstance(model, str) and model.endswith(FROM_PYTHON)

    def _own(self) -> Iterator[Path]:
        """What a run wrote, and nothing that a user put beside it: checkpoints first and config.json last."""
        for folder, names in _IN_FOLDERS.items():
            there = sorted((self.path / folder).iterdir()) if (self.path / folder).is_dir() else []
            yield from (path for path in there if re.fullmatch(names, path.name))
        yield from (path for name in reversed(_FILES) if (path := self.path / name).exists())

    def _delete(self, own: Sequence[str]) -> None:
        """Delete these, and a folder only when that leaves it empty.

        If this is cut off, the rest is a run to be overwritten, which neither goes on from half of its files nor lets a new one
        begin among them.
        """
        if not own:
            return
        self._delete_unfinished()
        for path in map(self.path.joinpath, own):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            sync(path.parent)
        for folder in map(self.path.joinpath, _IN_FOLDERS):
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()

    def _delete_unfinished(self) -> None:
        """What a killed writer has left of single files. Checkpoints and weights see to their own."""
        for folder, names in [(".", "|".join(map(re.escape, _FILES))), *_IN_FOLDERS.items()]:
            for path in (self.path / folder).glob(f"*{WRITING}"):
                if re.fullmatch(rf"({names})\.\d+{re.escape(WRITING)}", path.name) and path.is_file():
                    path.unlink()

    def _write(self, relative: str, write: Callable[[BinaryIO], Any]) -> Path:
        path = self.path / relative
        for folder in reversed(Path(relative).parents[:-1]):
            if not (self.path / folder).is_dir():
                (self.path / folder).mkdir()
                sync((self.path / folder).parent)
        write_file(path, write)
        return path

    # --- numbers and words --------------------------------------------------------------------------------------------

    def write_text(self, relative: str, text: str) -> Path:
        return self._write(relative, lambda file: file.write(_in_bytes(text)))

    def write_json(self, relative: str, value: Any) -> Path:
        return self.write_text(relative, _encode(value, indent=1))

    def read_json(self, relative: str) -> Any:
        """What the file holds, or None if it is not there; ValueError if that is not JSON."""
        path = self.path / relative
        try:
            return _decode(path.read_bytes(), path)
        except FileNotFoundError:
            return None

    def write_config(self, config: Mapping[str, Any]) -> None:
        self.write_json("config.json", config)

    def read_config(self) -> dict[str, Any]:
        return self.read_json("config.json") or {}

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self.write_json("summary.json", summary)

    def read_summary(self) -> dict[str, Any]:
        return self.read_json("summary.json") or {}

    def write_costs(self, costs: Mapping[str, Any]) -> None:
        """Seconds by unit, as the run judges plans by them; once."""
        self.write_json("costs.json", costs)

    def read_costs(self) -> dict[str, Any] | None:
        costs: dict[str, Any] | None = self.read_json("costs.json")
        return costs

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        append(self.path / "metrics.jsonl", _in_bytes(_encode(record)))

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records, without a last line that is still being written; ValueError for a line elsewhere that is none."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        records = []
        for i, line in enumerate(lines):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # of JSON, or a character cut in two
                if i + 1 < len(lines):
                    raise ValueError(f"{path}: line {i + 1} is not JSON; delete that line") from None
                continue
            if not (isinstance(record, dict) and isinstance(record.get("iteration"), int)):
                raise ValueError(f"{path}: line {i + 1} is no record of an iteration; delete that line")
            records.append(record)
        return records

    def truncate(self, iteration: int) -> None:
        """Drop what is recorded of `iteration` and later, which a resumed run does anew, and what a killed writer has left."""
        self._delete_unfinished()
        kept = [record for record in self.read_metrics() if record["iteration"] < iteration]
        self.write_text("metrics.jsonl", "".join(map(_encode, kept)))
        for path in [*self._numbered("audit"), *self._numbered("samples")]:
            if int(path.stem) >= iteration:
                path.unlink()

    def _numbered(self, folder: str) -> list[Path]:
        """The files of a folder that are named by their iteration."""
        there = (self.path / folder).glob("*.*")
        return [path for path in there if re.fullmatch(_IN_FOLDERS[folder], path.name)]

    @contextmanager
    def weights(self, name: str) -> Iterator[Path]:
        """A folder of weights for the block to fill: it takes its place whole, and keeps what a user put into the one before."""
        with new_folder(self.path / name) as folder:
            yield folder
            before = whole_folder(self.path / name)

            def own(at: str, names: list[str]) -> list[str]:
                return [n for n in names if Path(at) == before and re.fullmatch(_WEIGHTS[name], n)]

            if before.is_dir():
                shutil.copytree(before, folder, symlinks=True, ignore=own, dirs_exist_ok=True)

    # --- pictures -----------------------------------------------------------------------------------------------------

    def save_picture(self, relative: str, image_HWC: np.ndarray) -> str:
        """Write a uint8 (H, W, 3) array as PNG; the relative path again, for a record to name it."""
        from PIL import Image

        assert image_HWC.dtype == np.uint8, f"a picture is uint8, not {image_HWC.dtype}"
        picture = Image.fromarray(image_HWC)
        self._write(relative, lambda file: picture.save(file, format="PNG"))
        return relative

    def save_grid(self, relative: str, images_NHWC: np.ndarray, columns: int, scale: int = 1) -> str:
        return self.save_picture(relative, tile(images_NHWC, columns, scale))

    def save_samples(self, iteration: int, images_NHWC: np.ndarray, columns: int = 8, scale: int = 1) -> str:
        return self.save_grid(f"samples/{iteration:04d}.png", images_NHWC, columns, scale)

    def write_evaluation(
        self, when: str, records: Sequence[Mapping[str, Any]], images_NHWC: np.ndarray, pictures: int = 36
    ) -> None:
        """Write evaluation/{when}.json, `when` being before or after.

        A record holds prompt, kind, graded, strict and judge (or None); images_NHWC, uint8, starts with the pictures of
        the first records and may be shorter than them; the first `pictures` are saved and named in their records.
        """
        names = [
            self.save_picture(f"evaluation/{when}/{i:03d}.png", image) for i, image in enumerate(images_NHWC[:pictures])
        ]
        named = [{**r, "picture": names[i] if i < len(names) else None} for i, r in enumerate(records)]
        self.write_json(f"evaluation/{when}.json", named)

    def read_evaluation(self, when: str) -> list[dict[str, Any]]:
        return self.read_json(f"evaluation/{when}.json") or []

    def write_audit(self, audit: Mapping[str, Any], pictures_GSHWC: np.ndarray) -> None:
        """Write an audit group: `pictures_GSHWC` is uint8, S = its T previews and the final picture.

        `audit` holds iteration, prompt, steps (T), scores (T lists of G, None or NaN = missing), final (G), stopped_at
        (G: the step after whose network call the plan's selector lets the member go, T for those dropped on final
        rewards, None for survivors), kept_uniform and kept_ovf (the members that a uniform draw and OVF keep when they
        know the final rewards).
        """
        group, columns = pictures_GSHWC.shape[:2]
        assert columns == len(audit["steps"]) + 1, f"{columns} pictures a member for {len(audit['steps'])} steps"
        name = f"audit/{audit['iteration']:04d}"
        sheet = tile(_small(pictures_GSHWC.reshape(group * columns, *pictures_GSHWC.shape[2:])), columns, gap=0)
        strip = self.save_picture(f"{name}.png", sheet)  # before the record: whoever reads the record finds the sheet
        self.write_json(f"{name}.json", {**audit, "strip": strip})

    def read_audits(self) -> list[AuditRecord]:
        """All audits, oldest first."""
        paths = [path for path in self._numbered("audit") if path.suffix == ".json"]
        found = [self.read_json(f"audit/{path.name}") for path in sorted(paths, key=lambda path: int(path.stem))]
        return [audit for audit in found if audit is not None]  # one may go at this moment, when the run is resumed
