"""Every row goes into one microbatch, in order, whatever the numbers are."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from progrpo.packing import balanced_batches, balanced_size, fixed_size_batches, padded, whole_block_batches

SIZES = [(1, 1), (1, 8), (7, 1), (7, 2), (7, 3), (8, 4), (9, 4), (10, 64), (25, 8)]


@pytest.mark.parametrize(("count", "size"), SIZES)
def test_microbatches_of_one_shape_hold_every_row_once_and_in_order(count, size):
    parts = fixed_size_batches(count, size)
    assert torch.cat(parts)[:count].tolist() == list(range(count))
    assert len(parts) == -(-count // size)  # no more network calls than there must be


@pytest.mark.parametrize(("count", "size"), SIZES)
def test_microbatches_of_one_shape_are_all_full(count, size):
    assert {len(part) for part in fixed_size_batches(count, size)} == {size}


def test_the_last_microbatch_is_filled_by_copies_of_the_last_row():
    assert [part.tolist() for part in fixed_size_batches(5, 4)] == [[0, 1, 2, 3], [4, 4, 4, 4]]
    assert [part.tolist() for part in fixed_size_batches(2, 5)] == [[0, 1, 1, 1, 1]]


@pytest.mark.parametrize(("count", "size"), SIZES)
def test_evenly_shared_out_rows_take_no_more_calls_and_fill_up_less_than_one_row_a_call(count, size):
    shape = balanced_size(count, size)
    calls = len(fixed_size_batches(count, size))
    assert shape <= size and len(fixed_size_batches(count, shape)) == calls
    assert 0 <= calls * shape - count < calls
    assert balanced_size(0, size) == size


@pytest.mark.parametrize(("count", "size"), SIZES)
def test_equal_parts_hold_every_row_once_and_in_order(count, size):
    assert torch.cat(balanced_batches(count, size)).tolist() == list(range(count))


@pytest.mark.parametrize(("count", "size"), SIZES)
def test_equal_parts_are_few_and_differ_by_at_most_one(count, size):
    lengths = [len(part) for part in balanced_batches(count, size)]
    assert len(lengths) == -(-count // size)
    assert max(lengths) <= size and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("pack", [fixed_size_batches, balanced_batches])
def test_no_rows_are_no_microbatches(pack):
    assert pack(0, 8) == []


@pytest.mark.parametrize("pack", [fixed_size_batches, balanced_batches])
def test_rows_are_indices(pack):
    assert all(part.dtype == torch.int64 for part in pack(7, 3))


@pytest.mark.parametrize(("lengths", "size"), [([3, 2, 4, 1, 1], 5), ([4] * 5, 4), ([2] * 7, 6), ([1, 5, 1, 5], 5)])
def test_whole_blocks_are_never_parted_and_fill_microbatches_as_far_as_they_go(lengths, size):
    parts = whole_block_batches(lengths, size)
    assert torch.cat(parts).tolist() == list(range(sum(lengths)))
    assert all(len(part) <= size for part in parts)
    whose = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    of_parts = [set(whose[part].tolist()) for part in parts]
    assert sum(map(len, of_parts)) == len(lengths)  # a block that was parted would be in two
    for part, after in pairwise(of_parts):
        assert sum(lengths[block] for block in part) + lengths[min(after)] > size  # the next one had no room


def test_blocks_of_nothing_are_no_rows():
    assert whole_block_batches([], 4) == []
    assert [part.tolist() for part in whole_block_batches([0, 2, 0, 2], 2)] == [[0, 1], [2, 3]]


def test_rows_are_filled_up_with_copies_of_the_last():
    assert padded(torch.tensor([3, 7]), 5).tolist() == [3, 7, 7, 7, 7]
    assert padded(torch.tensor([3, 7]), 2).tolist() == [3, 7]
