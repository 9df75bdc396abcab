"""All kinds of cases: who makes them, and how many of them are tried."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.mutation.cases import Case
from tests.mutation.command_lines import arguments_case
from tests.mutation.configurations import config_file_case, python_case, recipe_case, settings_file_case
from tests.mutation.folders import prompts_case, run_case
from tests.mutation.library import library_case

SHARES = {
    "recipe": 0.41,
    "python": 0.2,
    "arguments": 0.2,
    "prompts": 0.06,
    "config file": 0.04,
    "settings file": 0.03,
    "library": 0.03,
    "run": 0.03,
}


MAKERS: dict[str, Callable[[random.Random, Path], Case]] = {
    "recipe": recipe_case,
    "python": python_case,
    "arguments": arguments_case,
    "prompts": prompts_case,
    "config file": config_file_case,
    "settings file": settings_file_case,
    "library": library_case,
    "run": run_case,
}


def random_cases(seed: int, count: int, work: Path, shares: dict[str, float]) -> Iterator[Case]:
    for kind, share in shares.items():
        for i in range(round(count * share)):
            yield MAKERS[kind](random.Random(f"{seed} {kind} {i}"), work)
