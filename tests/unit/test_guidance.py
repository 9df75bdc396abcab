"""The form of a pipeline's guidance is found from what it makes of known outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from progrpo.policies.learnt.guidance import RESCALES, Combined, Guidance, guidance_of

SCALES = (3.5, 7.0)


def outputs(scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(int(scale))
    unconditional, conditional = (torch.randn(1, 4, 6, 5, generator=generator) for _ in range(2))
    return unconditional, conditional


def examples(form) -> list[Combined]:
    return [Combined(*outputs(scale), scale, form(*outputs(scale), scale)) for scale in SCALES]


@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("offset", [0, 1])
def test_each_form_is_found(offset, rescale):
    form = guidance_of(examples(lambda u, c, w: rescale(c + (w - 1 + offset) * (c - u), c)))
    assert form == Guidance(offset, rescale)
    u, c = outputs(2.0)
    torch.testing.assert_close(form.combine(u, c, 1.0), c)  # a scale of 1 is none, whatever the pipeline counts from


@pytest.mark.parametrize(
    "form",
    [lambda u, c, w: u + w**2 * (c - u), lambda u, c, w: 0.7 * (u + w * (c - u)), lambda u, c, w: torch.maximum(u, c)],
)
def test_another_form_is_not_taken_for_one_of_them(form):
    assert guidance_of(examples(form)) is None
