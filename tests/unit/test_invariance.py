"""Batch invariance, on networks of which it is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from progrpo.policies.invariance import ROUNDING, is_batch_invariant

ROWS = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
SAMPLED, TRAINED = (1, 64), (3, 64)


def rounding_by_shape(share: float, calls: list[tuple[list[int], bool]] | None = None):
    """Output that calls of more than three rows change by a share of its largest number."""

    def output(rows: Tensor) -> Tensor:
        if calls is not None:
            calls.append((rows[[0, -1]].tolist(), torch.is_grad_enabled()))
        return ROWS[rows] + (share * ROWS.abs().max() if len(rows) > 3 else 0)

    return output


def test_sizes_are_called_as_they_are_sampled_and_trained_with_the_first_rows_and_the_last():
    calls: list[tuple[list[int], bool]] = []
    assert is_batch_invariant(rounding_by_shape(0, calls), (1, 64, 1), (3, 64))
    sampled = [([0, 63], False), ([0, 0], False), ([63, 63], False)]
    assert calls == [*sampled, ([0, 2], True), ([61, 63], True), ([0, 63], True)]


@pytest.mark.parametrize(("share", "invariant"), [(ROUNDING / 2, True), (2 * ROUNDING, False), (2**-11, False)])
def test_a_few_steps_of_float32_are_allowed_and_a_step_of_float16_is_not(share, invariant):
    assert is_batch_invariant(rounding_by_shape(share), SAMPLED, TRAINED) is invariant


def test_a_network_that_rounds_otherwise_with_gradients_is_not_invariant():
    def output(rows: Tensor) -> Tensor:
        return ROWS[rows] * (1 + 1e-3 * torch.is_grad_enabled())

    assert not is_batch_invariant(output, SAMPLED, TRAINED)


@pytest.mark.parametrize("place", [0, 2])
def test_a_network_that_rounds_by_a_rows_place_in_the_call_is_not_invariant(place):
    """As kernels do at the edges of their blocks: the first row of every call may be equal, and another is not."""

    def output(rows: Tensor) -> Tensor:
        changed = torch.zeros(len(rows), 1).index_fill(0, torch.tensor([min(place, len(rows) - 1)]), 1e-3)
        return ROWS[rows] + changed

    assert not is_batch_invariant(output, SAMPLED, TRAINED)


def test_output_that_is_not_finite_is_not_taken_for_invariant():
    assert not is_batch_invariant(lambda rows: ROWS[rows] * torch.nan, SAMPLED, TRAINED)


def test_what_is_known_not_to_be_invariant_is_not_measured(tiny_policy, monkeypatch):
    policy = tiny_policy()

    def never(*inputs: object) -> Tensor:
        raise AssertionError("measured")

    monkeypatch.setattr(policy.network, "output", never)
    policy.batch_invariant = False
    assert policy.measure_batch_invariance(SAMPLED, TRAINED) is False


@pytest.mark.parametrize("family", ["sd3", "flux", "kontext", "sd", "sdxl", "wan", "flux2_klein", "qwen_image"])
def test_every_family_is_measured_without_a_prompt(request, tiny_policy, family):
    policy = tiny_policy(folder=request.getfixturevalue(f"tiny_{family}"))
    assert policy.batch_invariant is True  # presumed, for float32 on a CPU
    measured = policy.measure_batch_invariance(SAMPLED, TRAINED)
    assert measured is policy.batch_invariant
    assert all(p.grad is None for p in policy.trainable.values())
