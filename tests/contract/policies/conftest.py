"""The cases of `tests.support.policies` as fixtures: what every policy promises (`progrpo.policies.base.Policy`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.policies import (
    CASES,
    Case,
    load,
    untouched_pipeline,
)

from progrpo.policies.base import Policy


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def folder(case: Case, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(case.model)


@pytest.fixture
def policy(case: Case, folder: Path) -> Policy:
    return load(folder, case.weights)


@pytest.fixture
def pipeline(folder: Path) -> Any:
    """The untouched model, as a user of diffusers has it."""
    return untouched_pipeline(folder)
