"""The model of a run with any of its weights: before training, at a checkpoint or at the end, and in between."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from progrpo.messages import named
from progrpo.policies.base import Policy, PolicyContext
from progrpo.policies.dora import row_lengths
from progrpo.policies.lora_files import MAGNITUDE
from progrpo.storage import load_state
from progrpo.training import checkpoints
from progrpo.training.build import has_saved_weights, policy_from
from progrpo.training.distributed import Ranks
from progrpo.training.learner import CURRENT, EMA
from progrpo.training.trained_model import ModelChoice

RESULT = "result"
"""The name of the weights that a run saved at its end."""


class TunedModel:
    """A policy whose weights are the base's, changed as a run has changed them, by a chosen strength.

    A LoRA is scaled as its readers scale it. Weights that were trained in full are interpolated.
    """

    def __init__(self, run: Path) -> None:
        """ValueError for a run that has saved no weights, and for a model that edits pictures."""
        self._checkpoints = {f"iteration {checkpoints.iteration_of(path)}": path for path in checkpoints.saved(run)}
        finished = has_saved_weights(run)
        self.names = [*([RESULT] if finished else []), *reversed(self._checkpoints)]
        """The names of the run's weights, the newest first."""
        if not self.names:
            raise ValueError(f"{named(run)} has saved no weights yet; they come with its first checkpoint")
        choice, ranks = ModelChoice(str(run)), Ranks()
        config, context = choice.config, PolicyContext(device=ranks.device)
        self.policy: Policy = choice.load(ranks) if finished else policy_from(config.model, context)
        if self.policy.edits:
            raise ValueError(f"{named(run)} trained a model that edits pictures; the studio gives a model a text alone")
        self._average = EMA if config.optim.ema_decay > 0 else CURRENT
        self._result = _copied(self.policy)
        if config.model.weights == "full":
            self._base = _copied(policy_from(config.model, context)) if finished else self._result
        else:
            self._base = _without_lora(self.policy)
        self._read = (RESULT, self._result)
        self._shown: tuple[str, float] | None = None

    @torch.no_grad()
    def show(self, name: str, strength: float) -> Policy:
        """The policy with the weights `name`: at strength 0 the base's, at 1 as they were trained.

        ValueError for a checkpoint that is damaged, or gone since the studio began.
        """
        if self._shown == (name, strength):
            return self.policy
        tuned = self._weights(name)
        self._shown = None
        for key, parameter in self.policy.trainable.items():
            # the first matrices of a LoRA are trained too, and only the product is scaled
            base = tuned[key] if ".lora_A." in key else self._base[key]
            parameter.copy_(base.lerp(tuned[key].to(base), strength))
        self._shown = (name, strength)
        return self.policy

    def _weights(self, name: str) -> dict[str, Tensor]:
        """The trained weights of a name; those of the last checkpoint that was asked for stay in memory."""
        if name == RESULT:
            return self._result
        if self._read[0] != name:
            weights = load_state(self._checkpoints[name])["policy"]
            self._read = (name, weights[self._average])
        return self._read[1]


def _without_lora(policy: Policy) -> dict[str, Tensor]:
    """The weights with which a LoRA adds nothing: no second matrices, and the lengths of a DoRA's rows in the base."""
    frozen, base = dict(policy.frozen()), _copied(policy)
    for name, tensor in base.items():
        if ".lora_B." in name:
            tensor.zero_()
        layer, magnitude, _ = name.partition(MAGNITUDE)
        if magnitude:
            tensor.copy_(row_lengths(frozen[f"{layer}.base_layer.weight"]))
    return base


def _copied(policy: Policy) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.trainable.items()}
