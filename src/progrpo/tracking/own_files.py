"""The files that a run writes into its folder, told from a user's own by their names, and their deletion."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from progrpo.durable import PREVIOUS, WRITING, new_folder, sync, whole_folder

_FILES = ("config.json", "costs.json", "metrics.jsonl", "summary.json", "trackers.json", "report.html")
_ENDS = f"({re.escape(WRITING)}|{re.escape(PREVIOUS)})?"
_WEIGHTS = {
    "lora": r"pytorch_lora_weights(_\w+)?\.safetensors",
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


def own_files(folder: Path) -> Iterator[Path]:
    """The files that a run wrote into its folder, as paths relative to it: checkpoints first, config.json last."""
    for name, pattern in _IN_FOLDERS.items():
        children = sorted((folder / name).iterdir()) if (folder / name).is_dir() else []
        yield from (path.relative_to(folder) for path in children if re.fullmatch(pattern, path.name))
    yield from (Path(name) for name in reversed(_FILES) if (folder / name).exists())


def weights_folders(folder: Path) -> list[Path]:
    """The folders of the trained weights that a run has saved."""
    return [folder / name for name in _WEIGHTS if (folder / name).is_dir()]


def weights_files(folder: Path) -> list[Path]:
    """The files of the trained weights that a run has saved, as paths relative to its folder."""
    return [file for file in own_files(folder) if file.parent.name in _WEIGHTS]


def holds_only_weights(files: Sequence[Path]) -> bool:
    """Whether a run's files are weights without the rest of the run."""
    return bool(files) and all(file.parent.name in _WEIGHTS for file in files)


def delete(folder: Path, files: Sequence[Path]) -> None:
    """Delete these files of `own_files`, and the folders that this leaves empty.

    Checkpoints go first and config.json last: if this is interrupted, the rest can be neither resumed nor mistaken
    for an empty folder.
    """
    if not files:
        return
    delete_unfinished(folder)
    for path in map(folder.joinpath, files):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        sync(path.parent)
    for path in map(folder.joinpath, _IN_FOLDERS):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()


def delete_unfinished(folder: Path) -> None:
    """Delete the unfinished files of a killed writer. Checkpoints and weights delete their own."""
    for name, pattern in [(".", "|".join(map(re.escape, _FILES))), *_IN_FOLDERS.items()]:
        for path in (folder / name).glob(f"*{WRITING}"):
            if re.fullmatch(rf"({pattern})\.\d+{re.escape(WRITING)}", path.name) and path.is_file():
                path.unlink()


def numbered_files(folder: Path, name: str) -> list[Path]:
    """The files that are named by their iteration, in an inner folder such as audit."""
    return [path for path in (folder / name).glob("*.*") if re.fullmatch(_IN_FOLDERS[name], path.name)]


@contextmanager
def new_weights(path: Path) -> Iterator[Path]:
    """A folder of weights for the block to fill. It replaces the old one whole, but for a user's files in it."""
    with new_folder(path) as folder:
        yield folder
        old = whole_folder(path)

        def weights_of_run(parent: str, names: list[str]) -> list[str]:
            return [n for n in names if Path(parent) == old and re.fullmatch(_WEIGHTS[path.name], n)]

        if old.is_dir():
            shutil.copytree(old, folder, symlinks=True, ignore=weights_of_run, dirs_exist_ok=True)
