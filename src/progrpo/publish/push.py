"""A run as a repository of the Hugging Face hub: its weights, a model card, its configuration and pictures."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from progrpo.durable import write_text
from progrpo.messages import named
from progrpo.pages.page import read_picture
from progrpo.pages.run_data import RunData, inside, read_run_data, readable
from progrpo.policies.lora_files import second_loras
from progrpo.publish.base import Base, find_base
from progrpo.publish.card import Contents, Example, model_card
from progrpo.publish.hub import hub_errors
from progrpo.tracking.files import encode
from progrpo.tracking.grids import tile
from progrpo.tracking.own_files import weights_files

_EXAMPLES = 6
_SIDE = 512  # pixels of the longest side of an example


def write_repository(
    run: Path, repo: str, out: Path, base_model: str | None = None, licence: str | None = None
) -> None:
    """Write into the folder `out` what the repository `repo` will hold.

    ValueError if the run has no weights yet, if `out` holds something, and for a base or licence that is not known.
    """
    from huggingface_hub.utils import validate_repo_id

    with hub_errors(f"{named(repo)} is no name of a repository", ""):
        validate_repo_id(repo)
    data = read_run_data(run)
    files = weights_files(data.path)
    if not files:
        raise ValueError(f"{named(run)} has saved no trained weights yet; they are written when the run ends")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{named(out)} is not empty; give another folder")
    with readable(f"{named(run)}, what a model card says of it,"):
        base = find_base(data, base_model, licence)
    out.mkdir(parents=True, exist_ok=True)
    weights = files[0].parent.name
    second = second_loras(data.path / weights)
    for file in files:
        _copy(data.path, file, out / (file.name if weights == "lora" else file))
    examples, grid = _write_pictures(data, out)
    with readable(f"{named(run)}, what a model card says of it,"):
        write_text(out / "README.md", model_card(data, repo, base, Contents(weights, second, examples, grid)))
        write_text(out / "config.json", encode(_public(data.config, base), indent=1))
        if base.id is None:  # by which `progrpo sample` knows a run
            write_text(out / "summary.json", encode({"iterations": data.iterations, "status": "finished"}, indent=1))


def push(folder: Path, repo: str, private: bool) -> str:
    """Send a folder to a repository, which is created if needed; its address. ValueError if the hub refuses."""
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors(f"{named(repo)} was not pushed", "write the folder with --dry-run FOLDER"):
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A model trained with progrpo")
    return str(address)


def push_run(run: Path, repo: str, private: bool, base_model: str | None, licence: str | None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_repository(run, repo, Path(folder), base_model, licence)
        return push(Path(folder), repo, private)


def _copy(run: Path, file: Path, out: Path) -> None:
    if not inside(run, run / file):
        raise ValueError(f"{named(run / file)} is a link out of the run folder; put the file itself there")
    out.parent.mkdir(exist_ok=True)
    shutil.copyfile(run / file, out)


def _write_pictures(data: RunData, out: Path) -> tuple[list[Example], str | None]:
    """The first test prompts with their pictures after training, and a grid of both sides. Without pairs, none."""
    pairs = [
        (after["prompt"], [read_picture(data.path, str(side.get("picture"))) for side in (before, after)])
        for before, after in zip(data.before, data.after, strict=False)
        if data.paired and before.get("picture") and after.get("picture")
    ][:_EXAMPLES]
    shown = [(prompt, before, after) for prompt, (before, after) in pairs if before is not None and after is not None]
    if not shown:
        return [], None
    (out / "images").mkdir()
    size = _reduced_size(shown[0][1].size)
    rows = [
        [picture.resize(size) if picture.size != size else picture for picture in row]
        for row in zip(*((before, after) for _, before, after in shown), strict=True)
    ]
    examples = []
    for i, ((prompt, _, _), picture) in enumerate(zip(shown, rows[1], strict=True)):
        examples.append(Example(str(prompt), f"images/{i:02d}.png"))
        picture.save(out / examples[-1].file)
    grid = tile(np.stack([np.asarray(picture) for row in rows for picture in row]), len(shown))
    Image.fromarray(grid).save(out / "images/before_after.png")
    return examples, "images/before_after.png"


def _reduced_size(size: tuple[int, int]) -> tuple[int, int]:
    scale = min(1.0, _SIDE / max(size))
    return round(size[0] * scale), round(size[1] * scale)


def _public(config: Mapping[str, object], base: Base) -> Mapping[str, object]:
    """The configuration with the base's id, and with files by their names: paths are of nobody's concern."""
    shortened = json.loads(json.dumps(config), object_hook=lambda part: {k: _shortened(v) for k, v in part.items()})
    shortened["model"] = {**shortened["model"], "path": base.name, "single_file": ""}  # the base is the file's model
    return shortened


def _shortened(value: object) -> object:
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value
