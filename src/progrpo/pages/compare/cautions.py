"""Sentences on what a comparison does not show: what differs beside the recipes, and what is not there yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from progrpo.pages.compare.recipes import Recipe, differences, measures_that_differ, seed_of
from progrpo.pages.run_data import RunData


def cautions(recipes: Sequence[Recipe]) -> list[str]:
    """The sentences, as texts."""
    runs = [run for recipe in recipes for run in recipe.runs]
    return [*_of_recipes(recipes), *_of_seeds(recipes), *_of_machines(runs), *_of_endings(runs)]


def _of_recipes(recipes: Sequence[Recipe]) -> Iterator[str]:
    unlike = differences(recipes)
    if "model.path" in unlike:
        models = _listed(dict.fromkeys(unlike["model.path"]))
        yield f"The models differ ({models}): equal rewards are not equal gains, and equal noise is not equal pictures."
    if names := measures_that_differ(recipes):
        yield (
            f"The recipes are not measured alike ({_listed(names)} differ): their rewards are on scales of their own,"
            " and no time to equal reward is given."
        )


def _of_seeds(recipes: Sequence[Recipe]) -> Iterator[str]:
    for recipe in recipes:
        seeds = [str(seed) for seed in recipe.seeds]
        twice = [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]
        if twice:
            yield f"{recipe.label} has seed {_listed(twice)} more than once: its spread is not that of seeds."


def _of_machines(runs: Sequence[RunData]) -> Iterator[str]:
    devices = dict.fromkeys(str(run.summary["device"]) for run in runs if run.summary.get("device"))
    if len(devices) > 1:
        yield f"The runs were made on different devices ({_listed(devices)}): seconds are not those of one machine."
    unrecorded = [run.path.name for run in runs if run.summary and run.summary.get("processes") is None]
    if unrecorded:
        yield f"{_listed(unrecorded)} did not record how many processes ran; hours count one."


def _of_endings(runs: Sequence[RunData]) -> Iterator[str]:
    for run in runs:
        if run.status != "finished":
            done = f"{len(run.metrics)} of {run.config.get('iterations', '?')} iterations"
            yield f"{run.path.name} (seed {seed_of(run)}) is {run.status.partition(':')[0]}: {done} are shown."


def _listed(names: Sequence[str] | dict[str, None]) -> str:
    """The first of the names, and how many more there are."""
    shown = list(names)[:4]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more
