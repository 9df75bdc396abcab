"""The training of a reward model from a pairs file."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from progrpo.messages import named
from progrpo.preferences.pairs import Pair, read_pairs
from progrpo.preferences.reward_model.evaluation import agreement_with, evaluate_pairs, features_of_pairs
from progrpo.preferences.reward_model.head import fit_ensemble
from progrpo.preferences.reward_model.load import chosen_backbone, load_backbone
from progrpo.preferences.reward_model.model import RewardModel, require_free, save_reward_model

_FEWEST = 10
"""The fewest pairs without ties that a head is fitted to."""


@dataclass(frozen=True)
class TrainingSettings:
    backbone: str = "auto"
    """`shapes`, a CLIP's folder or hub id, or `auto`: `shapes` where the pairs are of the shapes world."""
    lora_rank: int = 0
    members: int = 8
    held_out: float | Path = 0.2
    """The share of the prompts, or a pairs file, on which the reward model is measured."""
    seed: int = 0
    device: str = "auto"


def train_reward_model(
    source: Path, out: Path, settings: TrainingSettings, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Train a reward model on a pairs file, write its folder and return what was measured.

    All faults of the files are raised before anything is trained. With `held_out` 0 nothing is held out: the accuracy
    is that of cross-validation, which every result has.
    """
    require_free(out)
    started = time.monotonic()
    pairs, held_out = _split(read_pairs(source, decode=True), settings)
    _require_enough(pairs, source)
    name = chosen_backbone(settings.backbone, [*pairs, *held_out])
    backbone = load_backbone(name, settings.device)
    say(f"features of {len(pairs):,} pairs by {named(name)}")
    features, comparisons = features_of_pairs(backbone, pairs)
    say(f"fitting {settings.members} heads")
    fit = fit_ensemble(features, comparisons, settings.members, settings.seed)
    model = RewardModel(backbone, fit.ensemble)
    result = {
        "backbone": name,
        "pairs": len(pairs),
        "held_out": evaluate_pairs(model, held_out) if held_out else None,
        "cross_validated": agreement_with(fit.margin_M, comparisons, fit.ensemble.temperature),
        "penalties": [penalty if math.isfinite(penalty) else None for penalty in fit.penalty_J],
        "seconds": time.monotonic() - started,
    }
    facts = {
        "pairs": {"file": source.name, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()},
        "settings": {"members": settings.members, "held_out": str(settings.held_out), "seed": settings.seed},
        "measured": result,
    }
    save_reward_model(model, name, facts, out)
    return result


def _split(pairs: Sequence[Pair], settings: TrainingSettings) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on and those held out. Those of one prompt are on one side."""
    if isinstance(settings.held_out, Path):
        return list(pairs), read_pairs(settings.held_out, decode=True)
    texts = sorted({pair.prompt.text for pair in pairs})
    count = math.ceil(settings.held_out * len(texts))
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    held = {texts[i] for i in order[:count]}
    return [p for p in pairs if p.prompt.text not in held], [p for p in pairs if p.prompt.text in held]


def _require_enough(pairs: Sequence[Pair], source: Path) -> None:
    count = sum(pair.preference != 0.5 for pair in pairs)
    if count < _FEWEST:
        raise ValueError(
            f"{named(source)}: {count} pairs that are no ties are left to train on, and {_FEWEST} are needed;"
            " label more, or hold fewer out"
        )
