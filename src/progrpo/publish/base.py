"""The model that a run began with, as the hub knows it: its id, its licence and its task."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from progrpo.messages import named
from progrpo.pages.run_data import RunData
from progrpo.publish.hub import hub_errors
from progrpo.types import FROM_PYTHON
from progrpo.zoo import WEIGHTS

_IN_CACHE = re.compile(r"models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/")
_OF_LICENCE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Base:
    """A base model. `id` is None for a built-in one, which the hub does not have."""

    name: str
    id: str | None
    licence: Mapping[str, str]
    """`license` and, for one that the hub has no name for, `license_name` and `license_link`."""
    task: str
    """The hub's pipeline tag, such as text-to-image."""


def find_base(data: RunData, base_model: str | None, licence: str | None) -> Base:
    """The base of a run. An id or a licence that is given comes before what can be found.

    ValueError, with the option to give, for an id or a licence that cannot be known.
    """
    path = str(data.setting("model", "path"))
    built_in = re.fullmatch(r"[\w-]+", path) is not None and (WEIGHTS / path).is_dir()
    folder = WEIGHTS / path if built_in else Path(path)
    name = base_model or (path if built_in or not folder.is_absolute() else _id_in_cache(folder))
    if base_model is None and data.setting("model", "single_file"):
        raise ValueError(
            f"the run trained {named(str(data.setting('model', 'single_file')))}, which the hub does not know by that"
            " name; give the id of the model there with --base-model"
        )
    if name is None or name.endswith(FROM_PYTHON):
        raise ValueError(
            f"the run trained {named(path)}, which the hub does not know by that name; give its id there with"
            " --base-model, such as stabilityai/stable-diffusion-3.5-medium"
        )
    facts = _facts(folder, name, ask_hub=licence is None and not built_in)
    known = {"license": licence} if licence else {key: str(facts[key]) for key in _OF_LICENCE if facts.get(key)}
    if "license" not in known:
        raise ValueError(
            f"the licence of {named(name)} is not known (its card names none); give it with --license, such as"
            " apache-2.0"
        )
    return Base(name, None if built_in else name, known, str(facts.get("pipeline_tag") or _task(data, folder)))


def _id_in_cache(folder: Path) -> str | None:
    """The hub's id of a folder in its cache."""
    match = _IN_CACHE.search(f"{folder}/")
    return f"{match['owner']}/{match['name']}" if match else None


def _facts(folder: Path, name: str, ask_hub: bool) -> Mapping[str, object]:
    """The front matter of the base's card: that of its folder, else that of the hub."""
    from huggingface_hub import HfApi, ModelCard

    card = folder / "README.md"
    if card.is_file():
        try:
            return dict(ModelCard.load(card, ignore_metadata_errors=True).data.to_dict())
        except ValueError:  # its front matter is no YAML: as if there were none
            return {}
    if folder.is_dir() or not ask_hub:
        return {}
    with hub_errors(f"the licence of {named(name)} cannot be asked for", "give it with --license"):
        data = HfApi().model_info(name).card_data
    return {} if data is None else dict(data.to_dict())


def _task(data: RunData, folder: Path) -> str:
    """The task by the pipeline's class where its folder is here, and else by the run's settings."""
    index = folder / "model_index.json"
    kind = str(json.loads(index.read_bytes()).get("_class_name")) if index.is_file() else str(folder.name)
    if data.setting("model", "frames") or kind.startswith("Wan"):
        return "text-to-video"
    return "image-to-image" if re.search("kontext|edit|img2img", kind, re.IGNORECASE) else "text-to-image"
