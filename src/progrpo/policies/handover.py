"""The handover of a pipeline: what its owner did to it for speed or memory is undone or refused."""

from __future__ import annotations

from typing import cast

import torch
from diffusers import DiffusionPipeline
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from progrpo.policies.experts import parts_of


def take_over(pipeline: DiffusionPipeline, denoiser_name: str) -> None:
    """Undo `torch.compile`, accelerate's offloading, caches between steps and `torch.inference_mode`. In place.

    Weights then have the model's own names, can be read, and can have gradients. ValueError for what cannot be undone:
    fused projections and quantised weights.
    """
    for name, component in list(pipeline.components.items()):
        if isinstance(component, OptimizedModule):
            setattr(pipeline, name, component._orig_mod)
    pipeline.remove_all_hooks()
    for network in pipeline.components.values():
        if not isinstance(network, nn.Module):
            continue
        if isinstance(network, CacheMixin) and network.is_cache_enabled:
            network.disable_cache()
        for module in list(network.modules()):
            _undo_compile(module)
        _leave_inference_mode(network)
    for name, denoiser in parts_of(pipeline, denoiser_name).items():
        _require_separate(denoiser, name)


def _undo_compile(module: nn.Module) -> None:
    module._compiled_call_impl = None  # as `module.compile()` leaves it
    for name, child in list(module.named_children()):
        if isinstance(child, OptimizedModule):
            setattr(module, name, child._orig_mod)


def _leave_inference_mode(network: nn.Module) -> None:
    """Copy tensors that were made in inference mode, which can never be in a graph. Tied ones stay tied."""
    copies: dict[Tensor, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for module in network.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_inference():
                        if tensor not in copies:
                            copies[tensor] = _like(tensor, tensor.clone())
                        cast(dict[str, Tensor], tensors)[name] = copies[tensor]


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
