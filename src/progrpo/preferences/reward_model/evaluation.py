"""How well a reward model predicts pairs: accuracy, calibration, and how far its members differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from progrpo.preferences.bradley_terry import accuracy, bradley_terry_loss, calibration, clustered_accuracy
from progrpo.preferences.pairs import Pair
from progrpo.preferences.reward_model.backbone import Backbone, Features
from progrpo.preferences.reward_model.head import Comparisons
from progrpo.preferences.reward_model.model import RewardModel
from progrpo.prompts.pictures import open_picture
from progrpo.types import Prompt

_AT_ONCE = 64


def evaluate_pairs(model: RewardModel, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Measure a reward model on pairs that it was not trained on."""
    features, comparisons = features_of_pairs(model.backbone, pairs)
    score_KN = model.ensemble.scores(features)
    result = agreement_with(comparisons.margins(score_KN.mean(0)), comparisons, model.ensemble.temperature)
    variance_N = score_KN.var(0) if len(score_KN) > 1 else None
    return result | {"variance": None if variance_N is None else float(variance_N.mean())}


def agreement_with(margin_M: Tensor, pairs: Comparisons, temperature: float) -> dict[str, Any]:
    """The accuracy of margins with its intervals, and the calibration of margins / temperature."""
    share = accuracy(margin_M, pairs.preference_M)
    by_prompt = clustered_accuracy(margin_M, pairs.preference_M, pairs.prompt_M)
    likely_M = margin_M / temperature
    calibrated = calibration(likely_M, pairs.preference_M)
    bins = zip(calibrated.confidence_B, calibrated.share_B, calibrated.count_B, strict=True)
    return {
        "pairs": len(pairs),
        "ties": len(pairs) - share.count,
        "prompts": len(pairs.prompt_M.unique()),
        "accuracy": share.value,
        "interval": [share.low, share.high],
        "interval_by_prompt": [by_prompt.low, by_prompt.high],
        "log_loss": float(bradley_terry_loss(likely_M, pairs.preference_M, pairs.strength_M)),
        "calibration_error": calibrated.error,
        "bins": [
            {"confidence": float(confidence), "share": float(share), "pairs": int(count)}
            for confidence, share, count in bins
            if count
        ],
    }


def features_of_pairs(backbone: Backbone, pairs: Sequence[Pair]) -> tuple[Features, Comparisons]:
    """The features of every picture with its prompt, once each, and the pairs as rows of these."""
    rows: dict[tuple[str, str], int] = {}
    shown: list[tuple[Any, Prompt]] = []

    def row_of(image: Any, prompt: Prompt) -> int:
        if (key := (str(image), prompt.text)) not in rows:
            rows[key] = len(rows)
            shown.append((image, prompt))
        return rows[key]

    first = [row_of(pair.image_a, pair.prompt) for pair in pairs]
    second = [row_of(pair.image_b, pair.prompt) for pair in pairs]
    number = {text: i for i, text in enumerate(dict.fromkeys(pair.prompt.text for pair in pairs))}
    parts = []
    for start in range(0, len(shown), _AT_ONCE):
        part = shown[start : start + _AT_ONCE]
        pictures = [np.asarray(open_picture(image, "a picture of the pairs")) for image, _ in part]
        parts.append(backbone.features(pictures, [prompt for _, prompt in part]))
    return Features.cat(parts), Comparisons(
        torch.tensor(first),
        torch.tensor(second),
        torch.tensor([pair.preference for pair in pairs], dtype=torch.float64),
        torch.tensor([pair.strength for pair in pairs], dtype=torch.float64),
        torch.tensor([number[pair.prompt.text] for pair in pairs]),
    )
