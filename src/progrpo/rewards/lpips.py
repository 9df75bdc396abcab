"""LPIPS (arXiv 1801.03924): a perceptual distance of pictures, and the similarity of an edit to its source by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from progrpo.rewards.hub import downloaded_file, place, read_pickle
from progrpo.rewards.settings import RewardTerm
from progrpo.rewards.similarity import SourceSimilarity

ALEXNET = (
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
)
WEIGHTS = (
    "https://github.com/richzhang/PerceptualSimilarity/raw/c33f89e9f46522a584cf41d8880eb0afa982708b/"
    "lpips/weights/v0.1/alex.pth",
    "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in -1..1
_EPS = 1e-10


class LPIPS(nn.Module):
    """LPIPS 0.1 with AlexNet as a map of pictures to vectors, whose squared distances are LPIPS.

    d(x, y) = sum over five layers of the mean over places of sum_c w_c (u_c(x) - u_c(y))^2, where u is a layer's
    output after its ReLU, of length 1 at each place, and w >= 0 are learnt. A layer's part of the vector is therefore
    sqrt(w / places) u.
    """

    def __init__(self, widths: Sequence[int] = (64, 192, 384, 256, 256)) -> None:
        """`widths` are the channels of the five layers; the default is AlexNet's."""
        super().__init__()
        first, second, third, fourth, fifth = widths
        self.features = nn.Sequential(  # with the places of torchvision's AlexNet, by which its weights are named
            *(nn.Conv2d(3, first, kernel_size=11, stride=4, padding=2), nn.ReLU()),
            *(nn.MaxPool2d(3, stride=2), nn.Conv2d(first, second, kernel_size=5, padding=2), nn.ReLU()),
            *(nn.MaxPool2d(3, stride=2), nn.Conv2d(second, third, kernel_size=3, padding=1), nn.ReLU()),
            *(nn.Conv2d(third, fourth, kernel_size=3, padding=1), nn.ReLU()),
            *(nn.Conv2d(fourth, fifth, kernel_size=3, padding=1), nn.ReLU()),
        )
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(width)) for width in widths])

    @classmethod
    def load(cls, reward: str, device: str = "auto") -> LPIPS:
        """Load the published weights of both parts, in float32.

        Both are pickles: their checksums are tested, and they are read as tensors alone.
        """
        alexnet = read_pickle(reward, downloaded_file(reward, ALEXNET[0]), ALEXNET[1])
        weights = read_pickle(reward, downloaded_file(reward, WEIGHTS[0]), WEIGHTS[1])
        return place(convert_lpips(alexnet, weights), RewardTerm(reward, device=device, dtype="float32"))

    @torch.no_grad()
    def vectors(self, pictures_NHWC: np.ndarray) -> Tensor:
        """The vectors (N, D) of pictures (uint8)."""
        device, dtype = self.weights[0].device, self.weights[0].dtype
        pictures_NCHW = torch.tensor(np.ascontiguousarray(pictures_NHWC), device=device).permute(0, 3, 1, 2)
        pixels_NCHW = pictures_NCHW.to(dtype) / 127.5 - 1
        shift, scale = (pixels_NCHW.new_tensor(values)[:, None, None] for values in (_SHIFT, _SCALE))
        x_NCHW = (pixels_NCHW - shift) / scale
        parts: list[Tensor] = []
        for module in self.features:
            x_NCHW = module(x_NCHW)
            if isinstance(module, nn.ReLU):
                unit_NCHW = x_NCHW / (x_NCHW.norm(dim=1, keepdim=True) + _EPS)
                share_C11 = (self.weights[len(parts)] / unit_NCHW[0, 0].numel())[:, None, None]
                parts.append((share_C11.sqrt() * unit_NCHW).flatten(1))
        return torch.cat(parts, dim=1)


def convert_lpips(alexnet: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> LPIPS:
    """Build the network of torchvision's AlexNet and the weights of the published linear layers."""
    state = {name: weight for name, weight in alexnet.items() if name.startswith("features.")}
    layers = [weights[f"lin{layer}.model.1.weight"].flatten() for layer in range(5)]
    network = LPIPS([len(layer) for layer in layers])
    network.load_state_dict(state | {f"weights.{n}": layer for n, layer in enumerate(layers)})
    return network


class LPIPSSimilarity(SourceSimilarity):
    """1 - LPIPS of the picture and its source, by AlexNet: 1 for equal pictures, mostly 0.2 to 1."""

    name = "lpips_similarity"
    parameters = 2_470_848

    def __init__(self, network: LPIPS, batch_size: int = 16) -> None:
        super().__init__(batch_size)
        self._network = network.eval().requires_grad_(False)

    @classmethod
    def from_hub(cls, term: RewardTerm) -> Self:
        """Load the published weights. The network computes in float32, since the lengths of its outputs are small."""
        return cls(LPIPS.load(cls.name, term.device), term.network_batch_size)

    def _similarities(
        self, pictures_BHWC: np.ndarray, sources_SHWC: np.ndarray, source_B: Sequence[int]
    ) -> list[float]:
        x_BD, y_SD = self._network.vectors(pictures_BHWC), self._network.vectors(sources_SHWC)
        similarities_B: Tensor = 1 - (x_BD - y_SD[list(source_B)]).square().sum(1)
        return similarities_B.tolist()
