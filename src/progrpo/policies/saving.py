"""Saving: the weights that are trained, their named copies, and their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from progrpo.policies.family import ModelFamily
from progrpo.policies.lora import save_lora
from progrpo.policies.lora_files import lora_file
from progrpo.policies.sharded import all_gathered
from progrpo.policies.weights import NamedWeights


class TrainedWeights:
    """The trainable weights of a family's denoiser; `shared` says whether they are shared out among processes."""

    def __init__(self, family: ModelFamily, shared: bool) -> None:
        self._family = family
        self._shared = shared
        self.trainable: Mapping[str, nn.Parameter] = {
            name: p for name, p in family.denoiser.named_parameters() if p.requires_grad
        }
        self.named = NamedWeights(self.trainable)

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """The denoiser's tensors that training must not move, with their names."""
        denoiser = self._family.denoiser
        yield from ((name, p.detach()) for name, p in denoiser.named_parameters() if not p.requires_grad)
        yield from denoiser.named_buffers()

    def save(self, folder: Path | None, weights: str = "current") -> None:
        """Write a LoRA for the pipeline's `load_lora_weights(folder)`, or a denoiser for its class to load.

        A second denoiser's LoRA is a file beside it, for `load_into_transformer_2=True`.
        """
        with self.named.swapped(weights):
            if self._family.settings.weights == "full":
                self._save_denoiser(folder)
            elif folder is not None:
                first = self._family.denoiser_name
                for name, denoiser in self._family.denoisers.items():
                    save_lora(denoiser, first, folder / lora_file(name == first, name))

    def _save_denoiser(self, folder: Path | None) -> None:
        denoiser = self._family.denoiser
        if self._shared:
            weights = all_gathered(denoiser.state_dict(), keep=folder is not None)
            with torch.device("meta"):
                # fully_shard put a class of its own in front
                kind = cast(type[ModelMixin], type(denoiser).__bases__[-1])
                denoiser = kind.from_config(denoiser.config)
            if folder is not None:
                denoiser.load_state_dict(weights, assign=True)
        if folder is not None:
            denoiser.save_pretrained(folder)
