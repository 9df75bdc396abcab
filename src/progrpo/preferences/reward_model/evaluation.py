"""The quality of a reward model's predictions of pairs: accuracy, calibration, and the spread of its members."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from progrpo.preferences.bradley_terry import (
    accuracy,
    bradley_terry_loss,
    calibration,
    clustered_accuracy,
    label_probability,
)
from progrpo.preferences.pairs import Pair
from progrpo.preferences.reward_model.backbone import Backbone, Features
from progrpo.preferences.reward_model.head import Comparisons, Ensemble
from progrpo.preferences.reward_model.model import RewardModel
from progrpo.prompts.pictures import open_picture
from progrpo.types import Prompt

_AT_ONCE = 64


def evaluate_pairs(model: RewardModel, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Measure a reward model on pairs that it was not trained on."""
    features, comparisons = features_of_pairs(model.backbone, pairs)
    score_KN = model.ensemble.scores(features)
    result = agreement_with(comparisons.margins(score_KN.mean(0)), comparisons, model.ensemble)
    variance_N = score_KN.var(0) if len(score_KN) > 1 else None
    return result | {"variance": None if variance_N is None else float(variance_N.mean())}


def agreement_with(margin_M: Tensor, pairs: Comparisons, ensemble: Ensemble) -> dict[str, Any]:
    """The accuracy of margins with its intervals, and the calibration of what the ensemble predicts of the labels."""
    share = accuracy(margin_M, pairs.preference_M)
    by_prompt = clustered_accuracy(margin_M, pairs.preference_M, pairs.prompt_M)
    log_odds_M, rate = margin_M / ensemble.temperature, ensemble.flip_rate
    calibrated = calibration(label_probability(log_odds_M, rate), pairs.preference_M)
    bins = zip(calibrated.confidence_B, calibrated.share_B, calibrated.count_B, strict=True)
    return {
        "pairs": len(pairs),
        "ties": len(pairs) - share.count,
        "prompts": len(pairs.prompt_M.unique()),
        "accuracy": share.value,
        "interval": [share.low, share.high],
        "interval_by_prompt": [by_prompt.low, by_prompt.high],
        "log_loss": float(bradley_terry_loss(log_odds_M, pairs.preference_M, pairs.strength_M, rate)),
        "calibration_error": calibrated.error,
        "bins": [
            {"confidence": float(confidence), "share": float(share), "pairs": int(count)}
            for confidence, share, count in bins
            if count
        ],
    }


def features_of_pairs(backbone: Backbone, pairs: Sequence[Pair]) -> tuple[Features, Comparisons]:
    """The features of every picture with its prompt, once each, and the pairs as rows of these."""
    shown = _shown(pairs)
    parts = []
    for start in range(0, len(shown), _AT_ONCE):
        part = shown[start : start + _AT_ONCE]
        parts.append(backbone.features(opened([image for image, _ in part]), [prompt for _, prompt in part]))
    return Features.cat(parts), comparisons_of(pairs)


def comparisons_of(pairs: Sequence[Pair]) -> Comparisons:
    """The pairs as rows of their pictures, each with its prompt once, in order of appearance."""
    row = {(image, prompt.text): i for i, (image, prompt) in enumerate(_shown(pairs))}
    number = {text: i for i, text in enumerate(dict.fromkeys(pair.prompt.text for pair in pairs))}
    return Comparisons(
        torch.tensor([row[pair.image_a, pair.prompt.text] for pair in pairs]),
        torch.tensor([row[pair.image_b, pair.prompt.text] for pair in pairs]),
        torch.tensor([pair.preference for pair in pairs], dtype=torch.float64),
        torch.tensor([pair.strength for pair in pairs], dtype=torch.float64),
        torch.tensor([number[pair.prompt.text] for pair in pairs]),
    )


def opened(images: Sequence[Path]) -> list[np.ndarray]:
    """The pictures of files, uint8 (H, W, 3). ValueError where one cannot be read."""
    return [np.asarray(open_picture(image, "a picture of the pairs")) for image in images]


def _shown(pairs: Sequence[Pair]) -> list[tuple[Path, Prompt]]:
    shown = {(image, p.prompt.text): (image, p.prompt) for p in pairs for image in (p.image_a, p.image_b)}
    return list(shown.values())
