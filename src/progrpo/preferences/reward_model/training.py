"""The training of a reward model from a pairs file."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from progrpo.messages import named
from progrpo.preferences.pairs import Pair, read_pairs
from progrpo.preferences.reward_model.backbone import Backbone
from progrpo.preferences.reward_model.evaluation import (
    agreement_with,
    comparisons_of,
    evaluate_pairs,
    features_of_pairs,
)
from progrpo.preferences.reward_model.fitting import FitSettings, fit_ensemble
from progrpo.preferences.reward_model.latent import LatentBackbone
from progrpo.preferences.reward_model.load import LATENT, SHAPES, chosen_backbone, load_backbone
from progrpo.preferences.reward_model.model import RewardModel, require_free, save_reward_model

if TYPE_CHECKING:
    from progrpo.preferences.reward_model.tuning import Tuned

_FEWEST = 10
"""The fewest pairs without ties that a head is fitted to."""


@dataclass(frozen=True)
class TrainingSettings:
    backbone: str = "auto"
    """`shapes`, a CLIP's folder or hub id, or `auto`: `shapes` where the pairs are of the shapes world."""
    lora_rank: int = 0
    members: int = 8
    label_noise: float | None = None
    """The share of labels that are swapped; None: as cross-validation says."""
    held_out: float | Path = 0.2
    """The share of the prompts, or a pairs file, on which the reward model is measured."""
    seed: int = 0
    device: str = "auto"


def train_reward_model(
    source: Path,
    out: Path,
    settings: TrainingSettings,
    say: Callable[[str], None] = lambda line: None,
    load_latent: Callable[[], LatentBackbone] | None = None,
) -> dict[str, Any]:
    """Train a reward model on a pairs file, write its folder and return what was measured.

    All faults of the files are raised before anything is trained. With `held_out` 0 nothing is held out: the accuracy
    is that of cross-validation, which every result has. With `load_latent` it is a latent reward head, whose backbone
    this loads once the pairs are known to be good.
    """
    require_free(out)
    started = time.monotonic()
    pairs, held_out = _split(read_pairs(source, decode=True), settings)
    _require_enough(pairs, source)
    latent = None if load_latent is None else load_latent()
    name, backbone = _backbone(settings, [*pairs, *held_out]) if latent is None else (LATENT, latent)
    tuned = _tune(backbone, pairs, settings, say) if settings.lora_rank else None
    say(f"features of {len(pairs):,} pairs by {named(name)}")
    features, comparisons = features_of_pairs(backbone, pairs)
    say(f"fitting {settings.members} heads")
    judged_M = None if tuned is None else tuned.judged_M
    fit = fit_ensemble(
        features, comparisons, FitSettings(settings.members, settings.label_noise, settings.seed), judged_M
    )
    model = RewardModel(backbone, fit.ensemble)
    result = {
        "backbone": name,
        "pairs": len(pairs),
        "held_out": evaluate_pairs(model, held_out) if held_out else None,
        "tuning_losses": None if tuned is None else tuned.losses,
        "cross_validated": agreement_with(fit.margin_M, fit.judged, fit.ensemble),
        "label_noise": fit.ensemble.flip_rate,
        "penalties": [penalty if math.isfinite(penalty) else None for penalty in fit.choice.penalty_J],
        "seconds": time.monotonic() - started,
    }
    facts: dict[str, Any] = {
        "pairs": {"file": source.name, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()},
        "settings": {
            "lora_rank": settings.lora_rank,
            "members": settings.members,
            "held_out": str(settings.held_out),
            "seed": settings.seed,
        },
        "measured": result,
    }
    if latent is not None:
        facts["latent"] = latent.facts()
    save_reward_model(model, name, facts, out)
    return result


def _backbone(settings: TrainingSettings, pairs: Sequence[Pair]) -> tuple[str, Backbone]:
    """The backbone of pictures, with its name."""
    name = chosen_backbone(settings.backbone, pairs)
    if name == SHAPES and settings.lora_rank:
        raise ValueError("a LoRA tunes a CLIP, and the backbone is shapes; leave --lora-rank out, or name a CLIP")
    # a LoRA is trained in float32: its small updates would vanish in less
    return name, load_backbone(name, settings.device, "float32" if settings.lora_rank else "auto")


def _tune(backbone: Backbone, pairs: Sequence[Pair], settings: TrainingSettings, say: Callable[[str], None]) -> Tuned:
    from progrpo.preferences.reward_model.clip import ClipBackbone
    from progrpo.preferences.reward_model.tuning import TuningSettings, tune

    assert isinstance(backbone, ClipBackbone)
    tuned = tune(backbone, pairs, TuningSettings(settings.lora_rank, seed=settings.seed), say)
    if tuned.losses[0] == min(tuned.losses):
        say("the LoRA did not help on unseen prompts, and changes nothing; give more pairs, or leave it out")
    return tuned


def _split(pairs: Sequence[Pair], settings: TrainingSettings) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on and those held out. Those of one prompt are on one side, unless prompts are few."""
    if isinstance(settings.held_out, Path):
        return list(pairs), read_pairs(settings.held_out, decode=True)
    group_M = comparisons_of(pairs).clusters()
    count = int(group_M.max()) + 1
    order_C = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed))
    held = (order_C < math.ceil(settings.held_out * count))[group_M].tolist()
    return [p for p, out in zip(pairs, held, strict=True) if not out], list(compress(pairs, held))


def _require_enough(pairs: Sequence[Pair], source: Path) -> None:
    count = sum(pair.preference != 0.5 for pair in pairs)
    if count < _FEWEST:
        raise ValueError(
            f"{named(source)}: {count} pairs that are no ties are left to train on, and {_FEWEST} are needed;"
            " label more, or hold fewer out"
        )
