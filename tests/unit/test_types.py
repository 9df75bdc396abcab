"""Rows of batches: taken, moved and put one after another, with what belongs to all rows and what two fields share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from progrpo.types import Condition, Pictures, Rows, Trajectories, Transition


@dataclass(frozen=True)
class Part(Rows):
    values_N: Tensor
    name: str = field(default="", metadata=Rows.FOR_ALL)


@dataclass(frozen=True)
class Batch(Rows):
    x_N: Tensor
    parts: tuple[Part, ...]
    named: dict[str, Tensor]
    maybe_N: Tensor | None = None
    number: int = field(default=0, metadata=Rows.FOR_ALL)
    places_N: Tensor | None = field(default=None, metadata=Rows.ON_CPU)


def batch(*values: float, maybe: bool = True) -> Batch:
    x = torch.tensor(values)
    return Batch(x, (Part(x * 2, "twice"), Part(x * 3)), {"tens": x * 10}, x + 1 if maybe else None, 7, x.long())


def same(one: Batch, other: Batch) -> bool:
    tensors = (
        [one.x_N, one.maybe_N, one.places_N, *one.named.values(), *(p.values_N for p in one.parts)],
        [other.x_N, other.maybe_N, other.places_N, *other.named.values(), *(p.values_N for p in other.parts)],
    )
    equal = all(torch.equal(a, b) if a is not None and b is not None else a is b for a, b in zip(*tensors, strict=True))
    return equal and one.number == other.number and [p.name for p in one.parts] == [p.name for p in other.parts]


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), torch.tensor([], dtype=torch.int64), slice(1, 3)])
def test_rows_are_taken_of_every_field(rows):
    values = [1.0, 2.0, 3.0, 4.0]
    chosen = values[rows] if isinstance(rows, slice) else [values[i] for i in rows.tolist()]
    assert same(batch(*values).take(rows), batch(*chosen))


@pytest.mark.parametrize("maybe", [True, False])
def test_parts_go_one_after_another(maybe):
    parts = [batch(1.0, 2.0, maybe=maybe), batch(3.0, maybe=maybe), batch(4.0, 5.0, maybe=maybe)]
    assert same(Batch.cat(parts), batch(1.0, 2.0, 3.0, 4.0, 5.0, maybe=maybe))


def test_what_a_part_lacks_is_of_the_others():
    maybe = Batch.cat([batch(1.0, maybe=False), batch(2.0)]).maybe_N
    assert maybe is not None and maybe.tolist() == [3.0]


def test_some_fields_stay_on_the_cpu():
    moved = batch(1.0, 2.0).to("meta")
    assert moved.places_N is not None and moved.places_N.device.type == "cpu" and moved.number == 7
    assert moved.maybe_N is not None
    assert {t.device.type for t in (moved.x_N, moved.maybe_N, moved.named["tens"], moved.parts[0].values_N)} == {"meta"}


def test_a_shared_tensor_stays_one():
    x = torch.arange(4.0)
    shared = Batch(x, (Part(x), Part(torch.arange(4.0))), {"same": x})
    taken = shared.take(torch.tensor([3, 1]))
    assert taken.parts[0].values_N is taken.x_N is taken.named["same"] and taken.parts[1].values_N is not taken.x_N
    whole = Batch.cat([shared, shared])
    assert whole.parts[0].values_N is whole.x_N


def trajectories(count: int = 4) -> Trajectories:
    rows = torch.arange(count)
    xs = [torch.randn(count, 1, 2, 2) for _ in range(3)]
    path = tuple(Transition(i, xs[i], xs[i + 1], torch.zeros(count)) for i in range(2))
    return Trajectories(rows * 0, rows * 0, rows, xs[2], path=path, latent_features=(xs[0].half(),))


@pytest.mark.parametrize("changed", [lambda t: t.take(torch.tensor([2, 0])), lambda t: Trajectories.cat([t, t])])
def test_a_latent_between_two_transitions_stays_one(changed):
    done = changed(trajectories())
    assert done.path[0].x_next_NCHW is done.path[1].x_NCHW and done.path[1].x_next_NCHW is done.x_NCHW


def test_all_rows_are_the_trajectories_themselves():
    whole = trajectories()
    assert whole.take(torch.arange(4)) is whole is whole.take(slice(4))
    assert len(whole.take(slice(2))) == 2 and len(whole.take(torch.tensor([1, 0, 2, 3]))) == 4


def test_only_latents_move():
    moved = trajectories().to("meta")
    assert {t.device.type for t in (moved.group_N, moved.slot_N, moved.member_N, *moved.latent_features)} == {"cpu"}
    assert {t.device.type for t in (moved.x_NCHW, moved.path[1].log_prob_N)} == {"meta"}


def test_the_last_fault_of_pictures_is_theirs():
    good = Pictures(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), torch.ones(1, dtype=torch.bool))
    parts = [good, replace(good, fault="first"), replace(good, fault="last"), good]
    assert Pictures.cat(parts).fault == "last" and Pictures.cat([good, good]).fault == ""


def test_a_condition_is_taken_by_name():
    taken = Condition({"a": torch.arange(3), "b": torch.eye(3)}).take(torch.tensor([2, 2]))
    assert taken.tensors["a"].tolist() == [2, 2] and torch.equal(taken.tensors["b"], torch.eye(3)[[2, 2]])
