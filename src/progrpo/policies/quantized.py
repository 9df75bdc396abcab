"""Frozen linear layers whose weights are 8-bit integers, for training a LoRA beside them.

A row of a weight has 127 steps to either side of 0, which its largest number scales (symmetric, round to nearest). It
is converted to the dtype of the call each time, and again in the backward pass: no graph holds a wide copy, and a call
computes the same with and without a gradient, so that ratios begin at 1.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

_IN_A_BLOCK = re.compile(r"\.\d+\.")


def quantize_blocks(network: nn.Module) -> None:
    """Quantise the linear layers of the numbered blocks, in place. The few outside need their precision."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and _IN_A_BLOCK.search(name):
            network.set_submodule(name, Int8Linear(module))


class Int8Linear(nn.Linear):
    """A linear layer with its weight as int8 (O, I) and a float32 `scale` (O, 1): their product, up to half a scale."""

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type  # what autocast would do, but before the weight is widened to a dtype that is too wide
        casts = kind != "meta" and torch.is_autocast_enabled(kind)  # the meta device has none
        dtype = torch.get_autocast_dtype(kind) if casts else input.dtype
        output: Tensor = _Product.apply(input.to(dtype), self.weight, self.scale, self.bias)
        return output


def wide_weight(linear: nn.Linear) -> Tensor:
    """The weight (O, I) of a linear layer in float32, whatever it is stored in."""
    weight = linear.weight.detach()
    return _widened(weight, linear.scale, torch.float32) if isinstance(linear, Int8Linear) else weight.float()


class _Product(torch.autograd.Function):
    """The function x (..., I) to x W^T + b (..., O), with a gradient for x alone."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _widened(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        return gradient @ _widened(weight, scale, gradient.dtype), None, None, None


def _widened(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).mul_(scale.to(dtype))
