"""Latent reward heads of a model: the one that a run's previews rank by, and what a new one learns from."""

from __future__ import annotations

from pathlib import Path

from progrpo.config import PreviewSettings
from progrpo.policies.base import Policy
from progrpo.preferences.reward_model.latent import LatentBackbone, LatentHead, load_latent_head
from progrpo.training.distributed import Ranks
from progrpo.training.trained_model import ModelChoice


def latent_head(preview: PreviewSettings, policy: Policy) -> LatentHead | None:
    """The latent reward head that ranks previews; None without one. ValueError for one of another model."""
    if not preview.latent_reward:
        return None
    try:
        return load_latent_head(Path(preview.latent_reward).expanduser(), policy.encode_pictures)
    except ValueError as error:
        raise ValueError(f"preview.latent_reward: {error}") from error


def latent_backbone(model: str) -> LatentBackbone:
    """The latents of a model, by its name, folder or hub id, or of the model of a run."""
    return LatentBackbone(model, ModelChoice(model).load(Ranks()).encode_pictures)
