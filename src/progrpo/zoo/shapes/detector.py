"""The second opinion on pictures of the shapes world: a small convolutional detector, trained on drawn pictures.

It shares no code with the verifier's measuring. It reports beside the verifier and never trains a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from progrpo.types import Prompt
from progrpo.zoo.networks import to_tensor
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.verifier import satisfies

_GRID, _STRIDE = 16, 4
_COLOURS = tuple(world.COLOURS)
_SHAPES = (*world.SHAPES, "other")
_FOUND = 0.5


class ShapeDetector(nn.Module):
    """A detector of objects on a 16x16 grid: centre, offset within its cell, colour, shape (`other` if malformed)."""

    def __init__(self, width: int = 48):
        super().__init__()

        def block(i: int, o: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

        # the last cells see 47 pixels: any object whole
        self.body = nn.Sequential(block(3, 24, 2), block(24, width, 2), *[block(width, width) for _ in range(5)])
        self.head = nn.Conv2d(width, 3 + len(_COLOURS) + len(_SHAPES), 1)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute logits (N, 16, 16) of a centre, offsets (N, 2, 16, 16) in cells, logits of colour and of shape."""
        out = self.head(self.body(x_NCHW))
        return out[:, 0], out[:, 1:3], out[:, 3 : 3 + len(_COLOURS)], out[:, 3 + len(_COLOURS) :]

    @torch.no_grad()
    def find(self, pictures_NHWC: np.ndarray) -> list[list[tuple[str, str, float, float]]]:
        """Find every object of each uint8 picture, as (colour, shape, x, y)."""
        self.eval()
        centre, offset, colour, shape = self(to_tensor(pictures_NHWC))
        chance = centre.sigmoid()
        peak = (chance == nn.functional.max_pool2d(chance[:, None], 3, 1, 1)[:, 0]) & (chance > _FOUND)
        out: list[list[tuple[str, str, float, float]]] = [[] for _ in pictures_NHWC]
        for n, row, column in peak.nonzero().tolist():
            dx, dy = offset[n, :, row, column].tolist()
            names = (_COLOURS[colour[n, :, row, column].argmax()], _SHAPES[shape[n, :, row, column].argmax()])
            out[n].append((*names, (column + 0.5 + dx) * _STRIDE, (row + 0.5 + dy) * _STRIDE))
        return out

    def passes(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[bool]:
        """Whether each picture holds exactly the objects that its prompt lists, according to the network."""
        return [satisfies(objects, p) for objects, p in zip(self.find(pictures_NHWC), prompts, strict=True)]


def _targets(scenes: Sequence[world.Scene], malformed: Sequence[Sequence[bool]]) -> list[Tensor]:
    centre = torch.zeros(len(scenes), _GRID, _GRID)
    offset = torch.zeros(len(scenes), 2, _GRID, _GRID)
    colour = torch.full((len(scenes), _GRID, _GRID), -1)
    shape = torch.full((len(scenes), _GRID, _GRID), -1)
    for n, scene in enumerate(scenes):
        for s, bad in zip(scene.shapes, malformed[n], strict=True):
            column, row = int(s.x / _STRIDE), int(s.y / _STRIDE)
            centre[n, row, column] = 1
            offset[n, :, row, column] = torch.tensor([s.x / _STRIDE - column - 0.5, s.y / _STRIDE - row - 0.5])
            colour[n, row, column] = _COLOURS.index(s.colour)
            shape[n, row, column] = len(_SHAPES) - 1 if bad else _SHAPES.index(s.shape)
    return [centre, offset, colour, shape]


def _spoil(picture: np.ndarray, s: world.Shape, ground: np.ndarray, rng: np.random.Generator) -> None:
    """Turn the only object of a picture into something that is no shape: bitten, hollow or half another."""
    y, x = np.mgrid[: world.SIZE, : world.SIZE] + 0.5
    reach = s.size * world.EXTENT[s.shape]
    dx, dy = (x - s.x) / reach, (y - s.y) / reach
    kind = rng.integers(3)
    if kind == 0:
        angle = rng.uniform(0, 2 * np.pi)
        picture[(np.cos(angle) * dx + np.sin(angle) * dy > rng.uniform(0.1, 0.4))] = ground
        return
    other = str(rng.choice([k for k in world.SHAPES if k != s.shape]))
    if kind == 1:
        picture[world.SHAPES[s.shape](dx / 0.6, dy / 0.6)] = ground
    else:
        half = dx * rng.choice([-1, 1]) > 0
        picture[half] = ground  # else a square that becomes half a circle would stay a square
        picture[half & world.SHAPES[other](dx, dy)] = np.asarray(world.COLOURS[s.colour]) * 255


def detector_loss(detector: ShapeDetector, batch: int, seed: int) -> Tensor:
    """The detection loss on newly drawn pictures of the train split. Some objects are spoilt, all pictures are
    noisy.
    """
    rng = np.random.default_rng([seed, 3])
    scenes = [world.scene_for(p, rng) for p in world.sample_prompts("train", batch, seed)]
    pictures = np.stack([world.draw(s) for s in scenes])
    malformed = []
    for n, scene in enumerate(scenes):
        bad = [len(scene.shapes) == 1 and rng.random() < 0.3 for _ in scene.shapes]
        if any(bad):
            _spoil(pictures[n], scene.shapes[0], np.asarray(scene.ground) * 255, rng)
        malformed.append(bad)
    x = to_tensor(pictures)
    noise = torch.Generator().manual_seed(seed)
    blurred = nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = torch.lerp(x, blurred, torch.rand(batch, 1, 1, 1, generator=noise))
    x = x + 0.08 * torch.rand(batch, 1, 1, 1, generator=noise) * torch.randn(x.shape, generator=noise)
    centre, offset, colour, shape = detector(x)
    true_centre, true_offset, true_colour, true_shape = _targets(scenes, malformed)
    objects = true_centre.sum()
    weight = torch.where(true_centre > 0, 1.0, 0.2)
    centre_loss = nn.functional.binary_cross_entropy_with_logits(centre, true_centre, weight, reduction="sum")
    offset_loss = ((offset - true_offset).square().sum(1) * true_centre).sum()
    class_loss = nn.functional.cross_entropy(colour, true_colour, ignore_index=-1, reduction="sum")
    class_loss = class_loss + nn.functional.cross_entropy(shape, true_shape, ignore_index=-1, reduction="sum")
    return (centre_loss + offset_loss + class_loss) / objects


def save_detector(detector: ShapeDetector, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(detector.state_dict()), folder / "model.safetensors")


def load_detector(folder: Path) -> ShapeDetector:
    detector = ShapeDetector()
    detector.load_state_dict(load_file(folder / "model.safetensors"))
    return detector.eval()
