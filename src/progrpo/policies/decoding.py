"""Decoding: latents become pictures, by the model's autoencoder, whole or in parts, or by a tiny one for previews."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny, ModelMixin
from torch import Tensor

from progrpo.messages import named
from progrpo.policies.base import PolicyContext
from progrpo.policies.family import ModelFamily
from progrpo.policies.finite import is_finite
from progrpo.policies.geometry import Geometry
from progrpo.policies.hub import reason_of
from progrpo.policies.networks import load_network
from progrpo.types import Pictures
from progrpo.zoo import WEIGHTS

BUILT_IN_DECODER = "shapes-tiny"
_LARGEST_TILE = 512  # pixels
_TILE_MULTIPLE = 4  # latents


class PictureDecoder:
    """An autoencoder's decoder, from the model's latents to bytes.

    `unscale` gives latents as the autoencoder takes them. `name` and `latents_fault` stand in the reason of a missing
    picture.
    """

    def __init__(
        self, autoencoder: ModelMixin, unscale: Callable[[Tensor], Tensor], name: str, latents_fault: str
    ) -> None:
        self.autoencoder = autoencoder
        self._unscale = unscale
        self._name = name
        self._latents_fault = latents_fault

    @torch.no_grad()
    def decode(self, x0_BCHW: Tensor) -> Pictures:
        """Pictures on the CPU; one that has a number that is not finite is missing."""
        latents_BCHW = self._unscale(x0_BCHW)
        dtype = next(self.autoencoder.parameters()).dtype  # diffusers looks for it in every layer
        pictures_BCHW = self.autoencoder.decode(latents_BCHW.to(dtype), return_dict=False)[0].float()
        if pictures_BCHW.ndim > x0_BCHW.ndim:  # a picture as a video of one frame
            pictures_BCHW = pictures_BCHW[:, :, 0]
        there_B = _finite_rows(pictures_BCHW)
        fault = ""
        if not there_B.all():
            pictures_BCHW[~there_B] = 0.0  # a cast of NaN is whatever the processor makes of it
            finite_latents = _finite_rows(latents_BCHW)[~there_B].all()
            fault = fault_of(self._name, dtype) if finite_latents else self._latents_fault
        bytes_BCHW = pictures_BCHW.mul_(0.5).add_(0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
        return Pictures(bytes_BCHW.movedim(1, -1).contiguous().cpu(), there_B.cpu(), fault)


def fault_of(component: str, dtype: torch.dtype) -> str:
    """The reason of a missing picture, with the likely mend."""
    if dtype == torch.float16:
        return (
            f"the {component} gave no finite numbers; in float16 they end at 65,504: take model.dtype bfloat16 or"
            " float32"
        )
    kept = str(dtype).removeprefix("torch.")
    return (
        f"the {component} gave no finite numbers (in {kept}); look at what was loaded and at what was trained"
        " (optim.lr)"
    )


def slice_decoding(family: ModelFamily, geometry: Geometry) -> None:
    """Have the autoencoder decode one picture at a time, or one tile, where memory asks for it."""
    vae, decoding = family.pipeline.vae, family.settings.decoding
    try:
        if decoding != "whole" or geometry.default_frames is not None:  # a video takes a batch of pictures' memory
            vae.enable_slicing()
        if decoding == "tiled":
            vae.enable_tiling()
    except NotImplementedError:
        raise ValueError(
            f"model.decoding: the {type(vae).__name__} of this model cannot decode {decoding}; take whole"
        ) from None


def tile_decoding(family: ModelFamily, geometry: Geometry) -> None:
    """Have tiles of a size that the model's pictures are cut by, for an autoencoder of pictures."""
    vae, decoding = family.pipeline.vae, family.settings.decoding
    if decoding == "tiled" and isinstance(vae, AutoencoderKL | AutoencoderKLFlux2):
        side = tile_side(min(family.latent_shape[-2:]), geometry.pixels_per_latent)
        vae.tile_latent_min_size, vae.tile_sample_min_size = side, side * geometry.pixels_per_latent


def tile_side(shorter: int, pixels_per_latent: int) -> int:
    """The side of a tile in latents: half of a picture's shorter side, 512 pixels at most.

    An autoencoder's own tile is as large as the pictures that it was trained on, 1024 pixels for SD 3 and FLUX, so that
    it never decodes such pictures in tiles. Tiles overlap by a quarter of their side, which is a whole number here.
    """
    return max(_TILE_MULTIPLE, min(shorter // 2, _LARGEST_TILE // pixels_per_latent) // _TILE_MULTIPLE * _TILE_MULTIPLE)


def load_tiny_decoder(vae: ModelMixin, channels: int, context: PolicyContext) -> AutoencoderTiny:
    """The decoder of previews, in the autoencoder's dtype. ValueError for one that decodes latents of another kind."""
    name = context.decoder_for_previews
    try:
        place: str | Path = WEIGHTS / name if name == BUILT_IN_DECODER else name
        tiny: AutoencoderTiny = load_network(AutoencoderTiny, place, dtype=vae.dtype)
        if not all(map(is_finite, tiny.parameters())):
            raise ValueError("its weights are not all finite")
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds: of JSON, of safetensors, of a class that gets another's settings
        raise ValueError(f"preview.tiny_decoder: cannot load {named(name)}: {reason_of(error, name)}") from error
    if tiny.config.latent_channels != channels:
        raise ValueError(
            f"preview.tiny_decoder: {name} decodes latents of {tiny.config.latent_channels} channels, and this"
            f" model's have {channels}; take the one that was made for its autoencoder"
        )
    tiny.requires_grad_(False).eval()
    return tiny.to(context.device, memory_format=torch.channels_last)


def unscale_tiny(tiny: AutoencoderTiny) -> Callable[[Tensor], Tensor]:
    """The function from a model's latents to those that a tiny decoder takes."""
    return lambda x0_BCHW: x0_BCHW / tiny.config.scaling_factor + tiny.config.shift_factor


def _finite_rows(values_BCHW: Tensor) -> Tensor:
    return values_BCHW.isfinite().flatten(1).all(1)
