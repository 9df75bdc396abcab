"""The tuning of a CLIP by a LoRA, together with a head, on pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from progrpo.preferences.bradley_terry import bradley_terry_loss
from progrpo.preferences.pairs import Pair
from progrpo.preferences.reward_model.clip import ClipBackbone
from progrpo.preferences.reward_model.cross_validation import fold_of_pairs
from progrpo.preferences.reward_model.evaluation import comparisons_of, features_of_pairs, opened
from progrpo.preferences.reward_model.fitting import Fit, FitSettings, fit_ensemble
from progrpo.preferences.reward_model.head import columns


@dataclass(frozen=True)
class TuningSettings:
    rank: int
    epochs: int = 4
    pairs_at_once: int = 8
    lr: float = 1e-4
    head_lr: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Tuned:
    """The pairs that judged the epochs of tuning, and their losses."""

    judged_M: Tensor
    """Which pairs the tuning did not see (bool): a fifth of the prompts, by which the epoch was chosen."""
    losses: tuple[float, ...]
    """The loss of these pairs before the first epoch and after each."""


def tune(backbone: ClipBackbone, pairs: Sequence[Pair], settings: TuningSettings, say: Callable[[str], None]) -> Tuned:
    """Tune the backbone, and leave it as it was after the epoch whose loss on unseen pairs is least.

    The head starts from the one that fits the frozen features. It is not kept: heads are fitted anew to what comes out.
    """
    judged_M = fold_of_pairs(comparisons_of(pairs), settings.seed) == 0
    seen = [pair for pair, judged in zip(pairs, judged_M.tolist(), strict=True) if not judged]
    unseen = [pair for pair, judged in zip(pairs, judged_M.tolist(), strict=True) if judged]
    fit = fit_ensemble(*features_of_pairs(backbone, seen), FitSettings(members=1, seed=settings.seed))
    weight_D = fit.ensemble.weight_KD[0].clone().requires_grad_()
    parameters = backbone.add_lora(settings.rank, settings.seed)
    groups = [{"params": parameters, "lr": settings.lr}, {"params": [weight_D], "lr": settings.head_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    generator = torch.Generator().manual_seed(settings.seed)
    losses = [_loss_of(backbone, unseen, fit, weight_D)]
    best = _copied(backbone.lora())
    for epoch in range(settings.epochs):
        for rows in torch.randperm(len(seen), generator=generator).split(settings.pairs_at_once):
            loss = tuning_loss(backbone, [seen[row] for row in rows], fit, weight_D)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(_loss_of(backbone, unseen, fit, weight_D))
        say(f"epoch {epoch + 1}/{settings.epochs}: loss {losses[-1]:.4f} on unseen prompts, {losses[0]:.4f} before")
        if losses[-1] == min(losses):
            best = _copied(backbone.lora())
    backbone.load_lora(best)
    return Tuned(judged_M, tuple(losses))


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def tuning_loss(backbone: ClipBackbone, pairs: Sequence[Pair], fit: Fit, weight_D: Tensor) -> Tensor:
    """The loss of the tuned features under a head, without its penalty."""
    pictures = opened([image for pair in pairs for image in (pair.image_a, pair.image_b)])
    features = backbone.attached(pictures, [pair.prompt for pair in pairs for _ in range(2)])
    z_ND = (columns(features) - fit.ensemble.mean_D) / fit.ensemble.std_D
    score_N = z_ND @ weight_D
    comparisons, rate = comparisons_of(pairs), fit.ensemble.flip_rate
    return bradley_terry_loss(score_N[::2] - score_N[1::2], comparisons.preference_M, comparisons.strength_M, rate)


@torch.no_grad()
def _loss_of(backbone: ClipBackbone, pairs: Sequence[Pair], fit: Fit, weight_D: Tensor, at_once: int = 8) -> float:
    parts = [pairs[i : i + at_once] for i in range(0, len(pairs), at_once)]
    weights = [sum(pair.strength for pair in part) for part in parts]
    losses = [float(tuning_loss(backbone, part, fit, weight_D)) for part in parts]
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
