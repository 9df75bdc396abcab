"""A learned reward model and its folder: reward_model.json, and its numbers in safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load, save
from torch import Tensor

from progrpo.durable import new_folder, whole_folder
from progrpo.messages import named
from progrpo.preferences.reward_model.backbone import Backbone
from progrpo.preferences.reward_model.head import Ensemble
from progrpo.preferences.reward_model.load import load_backbone
from progrpo.types import Prompt

DESCRIPTION, HEAD, LORA = "reward_model.json", "head.safetensors", "lora.safetensors"
_FORMAT = 1
_TENSORS = ("weight_KD", "mean_D", "std_D", "scale")


@dataclass(frozen=True)
class RewardModel:
    """A backbone and its heads."""

    backbone: Backbone
    ensemble: Ensemble

    def scores(self, pictures: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> Tensor:
        """Compute the members' scores (K, N) of uint8 pictures (H, W, 3), in float64.

        A picture's score is their mean, and its uncertainty their variance.
        """
        return self.ensemble.scores(self.backbone.features(pictures, prompts))


@dataclass(frozen=True)
class Description:
    """The contents of reward_model.json."""

    backbone: str
    """`shapes`, a folder or a hub id; `latent` for a latent reward head."""
    members: int
    temperature: float
    flip_rate: float
    lora: bool
    """Whether the backbone has a LoRA."""
    sha256: Mapping[str, str]
    """The checksums of the files beside it."""
    facts: Mapping[str, Any]
    """Facts on its training and its quality."""


def save_reward_model(model: RewardModel, backbone: str, facts: Mapping[str, Any], folder: Path) -> None:
    """Write the folder, whole or not at all. A reward model that is there is replaced.

    ValueError where the folder holds something else, or cannot be written.
    """
    require_free(folder)
    ensemble, lora = model.ensemble, model.backbone.lora()
    files = {HEAD: save({name: getattr(ensemble, name).contiguous() for name in _TENSORS})}
    if lora:
        files[LORA] = save(dict(lora))
    data = {
        "format": _FORMAT,
        "backbone": backbone,
        "members": len(ensemble.weight_KD),
        "temperature": ensemble.temperature,
        "flip_rate": ensemble.flip_rate,
        "lora": bool(lora),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "facts": facts,
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as new:
            for name, content in files.items():
                (new / name).write_bytes(content)
            (new / DESCRIPTION).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the reward model cannot be written to {named(folder)}: {error.strerror}") from error


def require_free(folder: Path) -> None:
    """Raise ValueError where a folder holds anything but a reward model."""
    if folder.exists() and not (folder / DESCRIPTION).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{named(folder)} is there and holds no reward model; name another folder")


def read_description(folder: Path) -> Description:
    """Read reward_model.json. ValueError for a folder that holds no reward model of this format."""
    file = whole_folder(folder) / DESCRIPTION
    if not file.is_file():
        raise ValueError(
            f"{named(folder)} is no reward model (it holds no {DESCRIPTION}); `progrpo reward-model train` makes one"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise ValueError(f"it has format {data['format']}, and this version reads {_FORMAT}")
        return Description(
            str(data["backbone"]),
            int(data["members"]),
            float(data["temperature"]),
            float(data["flip_rate"]),
            bool(data["lora"]),
            {str(name): str(digest) for name, digest in data["sha256"].items()},
            dict(data["facts"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(folder, DESCRIPTION, f"{type(error).__name__}: {error}") from error


def load_reward_model(folder: Path, device: str = "auto", dtype: str = "auto") -> RewardModel:
    """Load a folder that `save_reward_model` wrote, bit for bit. ValueError where it is damaged or of another kind."""
    description = read_description(folder)
    ensemble = load_ensemble(folder, description)
    backbone = load_backbone(description.backbone, device, dtype)
    if description.lora:
        backbone.load_lora(_tensors(folder, LORA, description))
    return RewardModel(backbone, ensemble)


def load_ensemble(folder: Path, description: Description) -> Ensemble:
    """Load the heads of a folder. ValueError where they are damaged."""
    head = _tensors(folder, HEAD, description)
    if head.keys() != {*_TENSORS}:
        raise _damaged(folder, HEAD, f"it has {', '.join(sorted(head))}")
    return Ensemble(**head, temperature=description.temperature, flip_rate=description.flip_rate)


def _tensors(folder: Path, name: str, description: Description) -> dict[str, Tensor]:
    try:
        content = (whole_folder(folder) / name).read_bytes()
    except OSError as error:
        raise _damaged(folder, name, str(error.strerror)) from error
    if hashlib.sha256(content).hexdigest() != description.sha256.get(name):
        raise _damaged(folder, name, "its checksum is another one")
    return load(content)


def _damaged(folder: Path, name: str, reason: str) -> ValueError:
    return ValueError(f"the reward model {named(folder)} is damaged, at its {name}: {named(reason)}; train it anew")
