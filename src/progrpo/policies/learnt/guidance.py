"""Forms in which a pipeline combines the two outputs of classifier-free guidance, recognised by known outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def plain(combined: Tensor, conditional: Tensor) -> Tensor:
    """The combination as it is."""
    return combined


def of_conditional_length(combined: Tensor, conditional: Tensor) -> Tensor:
    """The combination with the conditional output's length along the last dimension."""
    return combined * (conditional.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


def of_conditional_length_at_most(combined: Tensor, conditional: Tensor) -> Tensor:
    """The combination, no longer than the conditional output of the row."""
    dims = tuple(range(1, combined.ndim))
    lengths = [torch.linalg.vector_norm(t, dim=dims, keepdim=True) for t in (conditional, combined)]
    return combined * (lengths[0] / lengths[1]).clamp(max=1.0)


RESCALES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    plain,
    of_conditional_length,
    of_conditional_length_at_most,
)


@dataclass(frozen=True)
class Guidance:
    """The form of a pipeline's guidance.

    Its guidance scale is ours minus `offset`, where ours is the w of o_u + w (o_c - o_u): a pipeline may count from 0.
    """

    offset: int
    rescale: Callable[[Tensor, Tensor], Tensor]

    def combine(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Combine two outputs, (B, ...) in the pipeline's order."""
        return self.rescale(unconditional + scale * (conditional - unconditional), conditional)


@dataclass(frozen=True)
class Combined:
    """Two outputs, and what a pipeline made of them at its guidance scale."""

    unconditional: Tensor
    conditional: Tensor
    scale: float
    result: Tensor


def guidance_of(examples: Sequence[Combined]) -> Guidance | None:
    """The form that gives all of these results; None where none does."""
    for offset in (0, 1):
        for rescale in RESCALES:
            form = Guidance(offset, rescale)
            if all(_gives(form, example) for example in examples):
                return form
    return None


def _gives(form: Guidance, example: Combined) -> bool:
    unconditional, conditional, result = example.unconditional.float(), example.conditional.float(), example.result
    combined = form.combine(unconditional, conditional, example.scale + form.offset)
    tolerance = 1e-4 if example.conditional.dtype == result.dtype == torch.float32 else 2e-2
    return bool((combined - result.float()).abs().max() <= tolerance * combined.abs().max())
