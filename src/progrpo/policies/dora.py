"""DoRA: a LoRA with a trained length for each row of the weight that it changes (arXiv 2402.09353).

The weight W (O, I) becomes m (W + s B A) / |W + s B A|, with |.| the Euclidean length of a row and m (O,) trained. The
lengths are constants to the gradient, as in section 4.3 of the paper. At the start m = |W| and B = 0, so that the
factor m / |W| is 1 to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from progrpo.policies.quantized import wide_weight


def row_lengths(weight: Tensor) -> Tensor:
    """The Euclidean lengths (O,) of the rows of a weight (O, I), float32."""
    return torch.linalg.vector_norm(weight.float(), dim=1)


class Magnitude(nn.Module):
    """The trained lengths m of a layer's rows, in the place of peft's module, with the layer's change as output.

    Peft computes |W + s B A| in the dtype of the call, where it differs from m by rounding before any update, and from
    the integers of a weight in 8 bits. Here it is computed in float32, from the weight that they stand for.
    """

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(row_lengths(wide_weight(base_layer)))

    def forward(
        self, x: Tensor, *, lora_A: nn.Linear, lora_B: nn.Linear, scaling: float, base_layer: nn.Linear, **call: Tensor
    ) -> Tensor:
        """The addend to the base layer's output `base_result`, (..., O)."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            changed = wide_weight(base_layer) + scaling * (lora_B.weight.float() @ lora_A.weight.float())
            lengths = row_lengths(changed)
        result = call["base_result"]
        factor = self.weight / lengths
        unscaled = result if base_layer.bias is None else result - base_layer.bias
        return (factor - 1).to(result.dtype) * unscaled + (factor * scaling).to(result.dtype) * lora_B(lora_A(x))


def scaled_to(weight: Tensor, magnitude: Tensor) -> Tensor:
    """A weight (O, I) with its rows scaled to the lengths `magnitude` (O,)."""
    return weight * (magnitude / row_lengths(weight))[:, None]
