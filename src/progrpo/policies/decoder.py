"""Layers of an autoencoder that take less time on a CPU in low precision."""

from __future__ import annotations

from typing import TypeGuard

import torch
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn.utils import skip_init

_FEW_CHANNELS = 16  # of a group: from here on torch's kernel for normalising in low precision fills its vectors
_SMALL_MAP = 1024  # places: below, torch takes a kernel of its own for maps in channels-last order
_FEW_OUTPUTS = 4  # channels, of which four places together have no more than the 16 that a kernel computes at once


@torch.no_grad()
def optimize_for_cpu(autoencoder: nn.Module) -> None:
    """Replace layers by ones that compute the same, up to rounding, and are faster. In place.

    They are `ResnetBlock2D`, `Upsample2D` and the last convolution of a `Decoder`.

    No gradient can go through the new layers. Layers with more inputs or more to compute stay as they are.
    """
    for parent in list(autoencoder.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, ResnetBlock2D) and _plain(layer):
                setattr(parent, name, _Residual(layer))
            elif isinstance(layer, Upsample2D) and layer.norm is None and _threefold(layer.conv):
                setattr(parent, name, upsampled(layer.conv))
        if isinstance(parent, Decoder):
            _overwrite(parent.conv_act)
            doubled_twice = len(parent.up_blocks) > 2  # so that its rows are multiples of 4
            if doubled_twice and _threefold(parent.conv_out) and parent.conv_out.out_channels <= _FEW_OUTPUTS:
                parent.conv_out = Fours(parent.conv_out)


def upsampled(convolution: nn.Conv2d) -> nn.ConvTranspose2d:
    """The 3 x 3 convolution of a map that is doubled both ways, without that map: (B, I, H, W) to (B, O, 2H, 2W).

    Four places of the large map hold one of the small, so most products are computed twice. One transposed convolution
    of 4 x 4 with stride 2 has 4 products for a place instead of 9.
    """
    weight_OI33 = convolution.weight.detach().float()
    o, i = weight_OI33.shape[:2]
    spread_OI44 = weight_OI33.new_zeros(o, i, 4, 4)
    for down in range(2):
        for right in range(2):
            spread_OI44[:, :, down : down + 3, right : right + 3] += weight_OI33.flip(-2, -1)
    like = {"dtype": convolution.weight.dtype, "device": convolution.weight.device}
    layer = skip_init(nn.ConvTranspose2d, i, o, 4, stride=2, padding=1, bias=convolution.bias is not None, **like)
    layer.requires_grad_(False)
    layer.weight.copy_(spread_OI44.transpose(0, 1))
    if convolution.bias is not None and layer.bias is not None:
        layer.bias.copy_(convolution.bias)
    return layer


class Fours(nn.Module):
    """A 3 x 3 convolution to few channels that computes four places of a row at once, for rows that are multiples of 4.

    It is a convolution of 3 x 6 with stride 4 to four times the channels. That has twice the products, but kernels
    compute 16 channels in the time of 3. In channels-last order its numbers lie as the map's do, and nothing is moved.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        weight_OI33 = convolution.weight.detach()
        o, i = weight_OI33.shape[:2]
        spread_4OI36 = weight_OI33.new_zeros(4, o, i, 3, 6)
        for place in range(4):
            spread_4OI36[place, :, :, :, place : place + 3] = weight_OI33
        bias = convolution.bias is not None
        like = {"dtype": weight_OI33.dtype, "device": weight_OI33.device}
        self.convolution = skip_init(nn.Conv2d, i, 4 * o, (3, 6), stride=(1, 4), padding=1, bias=bias, **like)
        self.convolution.requires_grad_(False)
        self.convolution.weight.copy_(spread_4OI36.flatten(0, 1))
        if convolution.bias is not None and self.convolution.bias is not None:
            self.convolution.bias.copy_(convolution.bias.repeat(4))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        assert x_BCHW.shape[-1] % 4 == 0
        fours_BHWC = self.convolution(x_BCHW).movedim(1, -1)
        b, h, w, c = fours_BHWC.shape
        return fours_BHWC.reshape(b, h, 4 * w, c // 4).movedim(-1, 1)


class _Residual(nn.Module):
    """A `ResnetBlock2D` without a time input, which writes over its own intermediate maps."""

    def __init__(self, block: ResnetBlock2D) -> None:
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = block.norm1, block.conv1, block.norm2, block.conv2
        self.nonlinearity, self.conv_shortcut = block.nonlinearity, block.conv_shortcut
        _overwrite(self.nonlinearity)
        for norm in (self.norm1, self.norm2):
            norm.float()  # by which maps in low precision are normalised as well

    def forward(self, x_BCHW: Tensor, temb: None = None) -> Tensor:
        changed = self.conv1(self._activated(self.norm1, x_BCHW))
        changed = self.conv2(self._activated(self.norm2, changed))
        return changed.add_(x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW))

    def _activated(self, norm: nn.GroupNorm, x_BCHW: Tensor) -> Tensor:
        """Normalise and apply the nonlinearity, in float32 where torch's kernel for the dtype is slow at small maps."""
        if x_BCHW.shape[-2:].numel() >= _SMALL_MAP or norm.num_channels // norm.num_groups >= _FEW_CHANNELS:
            return self.nonlinearity(norm(x_BCHW))
        return self.nonlinearity(norm(x_BCHW.float())).to(x_BCHW.dtype)


def _overwrite(nonlinearity: nn.Module) -> None:
    """Have the nonlinearity write over its input where it can: nothing else reads the normalisation before it."""
    if isinstance(nonlinearity, nn.SiLU):
        nonlinearity.inplace = True


def _plain(block: ResnetBlock2D) -> bool:
    """Whether the block only normalises, convolves twice and adds."""
    return (
        block.time_emb_proj is None
        and block.time_embedding_norm != "scale_shift"
        and block.upsample is None
        and block.downsample is None
        and block.output_scale_factor == 1
    )


def _threefold(layer: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == (3, 3)
        and layer.stride == layer.dilation == (1, 1)
        and layer.padding == (1, 1)
        and layer.padding_mode == "zeros"
        and layer.groups == 1
    )
