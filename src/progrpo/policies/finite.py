"""Whether a model's weights are finite: nothing that is made with one that is not would be."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn


def is_finite(weight: Tensor) -> bool:
    """Whether no number is NaN or infinite, by the two ends, which take no memory."""
    return all(end.isfinite().item() for end in weight.detach().aminmax()) if weight.numel() else True


def require_finite(pipeline: DiffusionPipeline, denoiser_name: str) -> None:
    """ValueError that names the first weight that is not finite in every number."""
    for name, component in pipeline.components.items():
        if not isinstance(component, nn.Module):
            continue
        scales = component.named_buffers() if name.startswith(denoiser_name) else ()
        for path, weight in (*component.named_parameters(), *scales):
            if weight.is_floating_point() and not weight.is_meta and not is_finite(weight):
                or_dtype = ", or another model.dtype if it is finite there" if weight.dtype == torch.float16 else ""
                raise ValueError(
                    f"model.path: the {name}'s {path} has numbers that are not finite, as of a damaged file or a"
                    f" training that diverged; give another{or_dtype}"
                )
