"""The sizes of a model's latents and pictures, and the checks of the sizes that a user asks for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """The sizes of one model.

    A row of a latent is `pixels_per_latent` rows of a picture. The denoiser takes `patch` rows and columns of a latent
    together. `default_size` is height and width in pixels, None where the model names none. A model of videos has
    `default_frames`, of which all after the first go `frames_per_latent` to one latent frame.
    """

    channels: int
    pixels_per_latent: int
    default_size: tuple[int, int] | None
    patch: int = 1
    longest_side: int | None = None
    default_frames: int | None = None
    frames_per_latent: int = 1

    def picture_size(self, resolution: int | tuple[int, int] | None) -> tuple[int, int]:
        """Height and width in pixels.

        ValueError, with the next that would do, for those that are no whole patches of latents.
        """
        if resolution is None:
            if self.default_size is None:
                raise ValueError("model.resolution: this model names no size of its own; give one, such as 512")
            sides: tuple[int, ...] = self.default_size
        else:
            sides = (resolution,) if isinstance(resolution, int) else resolution
            self._require_whole_patches(sides)
        if self.longest_side is not None and max(sides) > self.longest_side:
            raise ValueError(
                f"model.resolution: {max(sides)} is more than {self.longest_side} pixels a side, where this model's"
                " embedding of places ends; give less, or leave it empty for the model's own size"
            )
        return sides[0], sides[-1]

    def latent_shape(self, size: tuple[int, int], frames: int | None) -> tuple[int, ...]:
        """The shape of one latent: (C, H, W) of a picture of that size, (C, F, H, W) of a video.

        ValueError for frames that do not fit.
        """
        height, width = (side // self.pixels_per_latent for side in size)
        if self.default_frames is None:
            if frames is not None:
                raise ValueError("model.frames: this model makes pictures, not videos; leave it empty")
            return (self.channels, height, width)
        frames = self.default_frames if frames is None else frames
        together = self.frames_per_latent
        if rest := (frames - 1) % together:
            raise ValueError(
                f"model.frames: {frames} is not one more than a multiple of {together}; the nearest are {frames - rest}"
                f" and {frames - rest + together}"
            )
        return (self.channels, 1 + (frames - 1) // together, height, width)

    def _require_whole_patches(self, sides: tuple[int, ...]) -> None:
        multiple = self.pixels_per_latent * self.patch
        if all(side > 0 and side % multiple == 0 for side in sides):
            return
        smaller = [max(side // multiple, 1) * multiple for side in sides]
        larger = [max(-(-side // multiple), 1) * multiple for side in sides]
        near = dict.fromkeys(map(_in_pixels, (smaller, larger)))
        problem = "is not a multiple" if len(sides) == 1 else "(height and width) are not both multiples"
        raise ValueError(f"model.resolution: {_in_pixels(sides)} {problem} of {multiple}; {' or '.join(near)} would do")


def _in_pixels(sides: Iterable[int]) -> str:
    """The sides as `--model.resolution` takes them."""
    return " ".join(map(str, sides))
