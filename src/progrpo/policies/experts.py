"""Denoisers by noise level: two networks of which each takes the timesteps that it was trained on (Wan 2.2).

To the rest of the house they are one module with all of their parameters. Invariant: a row's output is that of the
network whose timestep it is, whatever rows stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake


class Experts(nn.Module):
    """Two networks as one: the first takes timesteps from `boundary` on, the second those below."""

    def __init__(self, parts: Mapping[str, ModelMixin], boundary: float) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self._high, self._low = parts
        self.boundary = boundary

    @property
    def config(self) -> Any:
        """The configuration of the first network; the other has the same inputs and outputs."""
        return self.get_submodule(self._high).config

    def forward(self, timestep: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        """The output of each row's own network, for inputs whose tensors all have a row for each timestep."""
        high, low = self.get_submodule(self._high), self.get_submodule(self._low)
        if is_fake(timestep):  # a call that is measured without numbers; both networks are of one size
            return high(timestep=timestep, **inputs)
        is_high_B = timestep >= self.boundary
        if is_high_B.all():
            return high(timestep=timestep, **inputs)
        if not is_high_B.any():
            return low(timestep=timestep, **inputs)
        places = [is_high_B.nonzero()[:, 0], (~is_high_B).nonzero()[:, 0]]
        outputs = [
            part(timestep=timestep[rows], **{name: _rows(value, rows) for name, value in inputs.items()})
            for part, rows in zip((high, low), places, strict=True)
        ]
        order = torch.cat(places).argsort()
        return tuple(torch.cat(both)[order] for both in zip(*outputs, strict=True))


def _rows(value: Any, rows: Tensor) -> Any:
    return value[rows] if isinstance(value, Tensor) else value


def parts_of(pipeline: DiffusionPipeline, denoiser_name: str) -> dict[str, ModelMixin]:
    """The networks that denoise, by the names of the pipeline's components: one, or two by noise level."""
    names = (denoiser_name, f"{denoiser_name}_2")
    return {name: part for name in names if (part := getattr(pipeline, name, None)) is not None}


def denoiser_of(pipeline: DiffusionPipeline, denoiser_name: str) -> ModelMixin | Experts:
    """The network that denoises, or both as one. ValueError where nothing says which of two is called."""
    parts = parts_of(pipeline, denoiser_name)
    if len(parts) == 1:
        return next(iter(parts.values()))
    boundary = pipeline.config.get("boundary_ratio")
    if boundary is None:
        raise ValueError(
            f"model.path: the pipeline has {' and '.join(parts)}, and no boundary_ratio that says which is called; set"
            " it in model_index.json, or take the second out"
        )
    return Experts(parts, boundary * pipeline.scheduler.config.num_train_timesteps)
