"""Recipes of published models on tiny models of their classes: their settings, with smaller numbers, train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import progrpo
from progrpo.config import EvalSettings, PlanSettings
from progrpo.recipes import load_recipe
from tests.support.pipelines import flux2_klein, wan22
from tests.support.recorded_pipelines import build
from tests.support.runs import prompts_of, redness


def learnt(name: str) -> Any:
    """A pipeline without a family, with each network in the recipes' dtype, as a run loads it."""
    return build(name).to(torch.bfloat16)


RECIPES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "z-image-pickscore": (lambda: learnt("z-image"), {"max_sequence_length": 64}),
    "qwen-image-edit": (lambda: learnt("qwen-image-edit-plus"), {}),
    "flux2-klein-pickscore": (flux2_klein, {"max_sequence_length": 32}),
    "sana-pickscore": (lambda: learnt("sana"), {"resolution": 32, "max_sequence_length": 12}),
    "wan22-pickscore": (wan22, {"max_sequence_length": 16}),
}
QUICK = ("z-image-pickscore", "qwen-image-edit")


@pytest.mark.parametrize("recipe", [r if r in QUICK else pytest.param(r, marks=pytest.mark.slow) for r in RECIPES])
def test_a_recipe_trains_a_tiny_model_of_its_class(recipe: str, tmp_path: Path) -> None:
    make, smaller = RECIPES[recipe]
    config = load_recipe(recipe)
    config = replace(
        config,
        iterations=1,
        model=replace(config.model, **{"resolution": 16, "lora_rank": 2, **smaller}),
        prompts=replace(config.prompts, per_iteration=1),
        plan=PlanSettings("custom", group_size=4, prune=((1, 3),)),
        eval=EvalSettings(pictures=2, num_inference_steps=2, guidance_scale=config.eval.guidance_scale),
    )
    run = progrpo.train(make(), prompts_of("red cat", "blue dog"), redness, config=config, out=tmp_path / "run")
    summary = run.summary.read()
    assert summary["status"] == "finished" and not any(summary["rewards"]["missing"].values())
    counted, predicted = summary["cost"]["counted"], summary["cost"]["predicted"]
    assert counted == predicted and counted["trained_steps"] > 0
