"""Rearrangements are read from what comes of probes, and applied."""

from __future__ import annotations

import pytest
import torch

from progrpo.policies.learnt.rearranged import in_order, inverse, probes, read


@pytest.mark.parametrize("size", [1, 16, 300, 5000])
def test_an_order_with_scales_and_offsets_is_read(size):
    generator = torch.Generator().manual_seed(size)
    place = torch.randperm(size, generator=generator)
    factor = torch.rand(size, generator=generator).double() + 0.5
    offset = torch.randn(size, generator=generator).double()
    order = read(probes(size), probes(size).double()[:, place] * factor + offset)
    assert order is not None and torch.equal(order.place_M, place) and order.is_permutation(size)
    torch.testing.assert_close(order.factor_M, factor)
    torch.testing.assert_close(order.offset_M, offset)


def test_numbers_of_others_have_no_place_and_parts_are_no_permutation():
    beside = torch.full((len(probes(20)), 3), 7.0)
    order = read(probes(20), torch.cat([-probes(20)[:, 5:], beside], 1))
    assert order is not None and order.place_M.tolist() == [*range(5, 20), -1, -1, -1]
    assert set(order.factor_M[order.touched_M].tolist()) == {-1.0} and not order.is_permutation(20)


def test_an_order_is_read_in_bfloat16():
    place = torch.randperm(4096, generator=torch.Generator().manual_seed(0))
    order = read(probes(4096), (probes(4096)[:, place].bfloat16() * 0.3611 + 0.1159).bfloat16())
    assert order is not None and torch.equal(order.place_M, place)


@pytest.mark.parametrize("change", [torch.square, lambda x: x.cumsum(1), lambda x: x + x.roll(1, 1)])
def test_what_is_no_rearrangement_is_not_read_as_one(change):
    assert read(probes(40), change(probes(40))) is None


def test_an_order_is_applied_and_undone():
    x = torch.randn(2, 30)
    place = torch.randperm(30)
    assert torch.equal(in_order(in_order(x, place), inverse(place)), x)
    first = in_order(x, torch.arange(7))
    assert torch.equal(first, x[:, :7]) and first.data_ptr() == x.data_ptr()  # a view
