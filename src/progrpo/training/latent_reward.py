"""Latent rewards of a model: the one that a run's previews rank by, and what a new head learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from progrpo.config import PreviewSettings
from progrpo.messages import quoted, raised
from progrpo.policies.base import Policy
from progrpo.preferences.reward_model.latent import LatentBackbone, load_latent_head
from progrpo.registry import is_users_own, load_named
from progrpo.rollout.sampler import LatentReward
from progrpo.training.distributed import Ranks
from progrpo.training.trained_model import ModelChoice
from progrpo.types import Prompt


@dataclass(frozen=True)
class OwnLatentReward:
    """A user's function of latents (N, C, H, W) and their texts, which gives a number each.

    The latents are x0 projections in the model's own scale, on its device.
    """

    name: str
    function: Callable[[Tensor, Sequence[str]], object]

    @torch.no_grad()
    def score(self, x0_NCHW: Tensor, prompts_N: Sequence[Prompt]) -> Tensor:
        """Score x0 projections, float64 (N,) on the CPU. ValueError where the function raises, or gives no numbers."""
        subject = f"preview.latent_reward {quoted(self.name)}"
        if not len(x0_NCHW):  # a process all of whose groups were stopped; a function may not take nothing
            return torch.empty(0, dtype=torch.float64)
        try:
            answer = self.function(x0_NCHW, [prompt.text for prompt in prompts_N])
            score_N = torch.as_tensor(answer, dtype=torch.float64).detach().cpu()
        except Exception as error:  # a user's code may raise anything
            raise ValueError(f"{subject}: {raised(error)}") from error
        if score_N.shape != (len(x0_NCHW),):
            given = f"it gave the shape {tuple(score_N.shape)} for {len(x0_NCHW)} latents"
            raise ValueError(f"{subject}: {given}; return one number each")
        return score_N


def latent_reward(preview: PreviewSettings, policy: Policy) -> LatentReward | None:
    """The latent reward that ranks previews: a head, or a user's own; None without one.

    ValueError for a head of another model, and for a name of nothing.
    """
    name = preview.latent_reward
    if not name:
        return None
    if is_users_own(name) and not Path(name).exists():
        value = load_named(name, {}, "preview.latent_reward", "function")
        try:
            made = value() if isinstance(value, type) else value
        except Exception as error:
            raise ValueError(f"preview.latent_reward {quoted(name)}: {raised(error)}") from error
        function = getattr(made, "score", made)
        if not callable(function):
            raise ValueError(
                f"preview.latent_reward {quoted(name)} must be a function of latents and texts, not {quoted(made)}"
            )
        return OwnLatentReward(name, function)
    try:
        return load_latent_head(Path(name).expanduser(), policy.encode_pictures)
    except ValueError as error:
        raise ValueError(f"preview.latent_reward: {error}") from error


def latent_backbone(model: str) -> LatentBackbone:
    """The latents of a model, by its name, folder or hub id, or of the model of a run."""
    return LatentBackbone(model, ModelChoice(model).load(Ranks()).encode_pictures)
