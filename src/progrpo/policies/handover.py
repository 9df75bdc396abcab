"""A pipeline that its owner hands over: what was done to it for speed or memory is undone, or refused in a sentence."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn
from torch._dynamo import OptimizedModule


def take_over(pipeline: DiffusionPipeline, denoiser_name: str) -> None:
    """Undo `torch.compile`, accelerate's offloading, caches between steps and `torch.inference_mode`. In place.

    Names of weights are then the model's own, weights are where they can be read, and gradients can go through them.
    ValueError for what cannot be undone: fused projections, which a LoRA would be beside, and quantised weights.
    """
    for name, part in list(pipeline.components.items()):
        if isinstance(part, OptimizedModule):
            setattr(pipeline, name, part._orig_mod)
    pipeline.remove_all_hooks()
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    for part in parts:
        if isinstance(part, CacheMixin) and part.is_cache_enabled:
            part.disable_cache()
        for module in list(part.modules()):
            _not_compiled(module)
        _out_of_inference_mode(part)
    _require_separate(getattr(pipeline, denoiser_name), denoiser_name)


def _not_compiled(module: nn.Module) -> None:
    module._compiled_call_impl = None  # as `module.compile()` leaves it
    for name, child in list(module.named_children()):
        if isinstance(child, OptimizedModule):
            setattr(module, name, child._orig_mod)


def _out_of_inference_mode(part: nn.Module) -> None:
    """Tensors made in inference mode can never be part of a graph. Tied ones stay tied."""
    copies: dict[Tensor, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for module in part.modules():
            for kept in (module._parameters, module._buffers):
                for name, tensor in kept.items():
                    if tensor is not None and tensor.is_inference():
                        if tensor not in copies:
                            copies[tensor] = _like(tensor, tensor.clone())
                        cast(dict[str, Any], kept)[name] = copies[tensor]


def _like(tensor: Tensor, copied: Tensor) -> Tensor:
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def _require_separate(denoiser: nn.Module, name: str) -> None:
    if any(getattr(module, "fused_projections", False) for module in denoiser.modules()):
        raise ValueError(
            f"the pipeline's {name} has fused projections, which a LoRA cannot adapt: load it again without"
            " fuse_qkv_projections()"
        )
    if getattr(denoiser, "is_quantized", False):
        raise ValueError(
            f"the pipeline's {name} is quantised: load it without quantization_config; model.quantize int8 keeps its"
            " frozen weights in 8 bits"
        )
