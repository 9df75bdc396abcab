"""The cases of `tests.support.policies` as fixtures: what every policy promises (`progrpo.policies.base.Policy`)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from progrpo.policies.base import Policy
from tests.support.copies import Copies
from tests.support.policies import CASES, Case, load, untouched_pipeline

_LIKE_ANOTHER = ("sd-v-lora", "flux-schnell-lora")
"""Cases that differ from another one in little; `make test-slow` has them."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, id=name, marks=pytest.mark.slow if name in _LIKE_ANOTHER else ())
        for name, case in CASES.items()
    ],
)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def folder(case: Case, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(case.model)


@cache
def _loaded(folder: Path, weights: str) -> Copies[Policy]:
    """The policy of a folder, which is read once: a copy takes a part of the time."""
    return Copies(load(folder, weights))


@cache
def _untouched(folder: Path) -> Copies[Any]:
    return Copies(untouched_pipeline(folder))


@pytest.fixture(scope="module")
def policy(case: Case, folder: Path) -> Iterator[Policy]:
    """A policy for the tests of a file that change nothing in it."""
    policy = _loaded(folder, case.weights).new()
    before = {name: weight.detach().clone() for name, weight in (*policy.trainable.items(), *policy.frozen())}
    yield policy
    for name, weight in (*policy.trainable.items(), *policy.frozen()):
        assert torch.equal(weight, before[name]), f"a test changed {name}: it needs `own_policy`"


@pytest.fixture
def own_policy(case: Case, folder: Path) -> Policy:
    """A policy for one test, which may train it, move its weights or release its text encoders."""
    return _loaded(folder, case.weights).new()


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    """The untouched model, as a user of diffusers has it, for the tests of a file that change nothing in it."""
    return _untouched(folder).new()
