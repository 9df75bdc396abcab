"""Files of prompts, and run folders."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from progrpo.config import (
    to_dict,
)
from progrpo.prompts.load import load_prompts
from progrpo.recipes import RECIPES
from tests.mutation.cases import DEEP, Case, damaged, mutate

ROWS: tuple[str, ...] = (
    '{"prompt": "a red cat", "n": 1}',
    '{"prompt": "two dogs"}',
    '{"text": "a"}',
    '{"prompt": 3}',
    '{"prompt": ""}',
    "[]",
    "3",
    '"a"',
    "null",
    '{"prompt": null}',
    '{"prompt": "\\ud800"}',
    '{"prompt": "\\u0000"}',
    "{}",
    '{"prompt": NaN}',
    "9" * 5000,
    *(
        f'{{"prompt": "a", "image": {image}}}'
        for image in ("null", "3", '""', '"none.png"', '"\\ud800"', '"\\u0000"', '"."')
    ),
    DEEP,
    '{"prompt": "a", "n": ' + "9" * 5000 + "}",
    "{'prompt': 'a'}",
    '{"prompt": ["a"]}',
    '{"a\\nb": 1}',
)


def prompts_case(rng: random.Random, work: Path) -> Case:
    lines = rng.random() < 0.5
    rows = [rng.choice(ROWS[:2] if rng.random() < 0.7 else ROWS) for _ in range(3)]
    content = ("a red cat\na green dog\n\nein grüner Würfel\n" if lines else "\n".join(rows)).encode()
    content = damaged(content, rng) if rng.random() < 0.6 else content
    file = work / f"prompts.{rng.choice(('txt', 'txt', 'jsonl', 'csv') if lines else ('jsonl',))}"

    def read() -> None:
        file.write_bytes(content)
        try:
            load_prompts(str(file))
        finally:
            file.unlink()

    return Case("prompts", f"{file.suffix} {content[:200]!r}", read, (str(file),))


def whole_run(folder: Path) -> None:
    """A finished run in miniature, without a model."""
    import numpy as np

    from progrpo.tracking.run_folder import RunFolder

    run, grey = RunFolder.create(folder), np.full((4, 8, 8, 3), 128, np.uint8)
    run.log_config(to_dict(RECIPES["smoke"]()))
    record: Any = {
        "prompt": "a cat",
        "kind": "one",
        "graded": 0.5,
        "strict": True,
        "judge": None,
        "held_out": {"jpeg": 0.5},
    }
    cost = {"nfe": 8, "decodes": 4, "reward_calls": 4, "trained_steps": 8}
    audit: Any = {
        "iteration": 0,
        "prompt": "a cat",
        "steps": [0, 1],
        "scores": [[0.1, 0.2, 0.3, None]] * 2,
        "final": [0.4, 0.1, 0.2, 0.3],
    }
    for when in ("before", "after"):
        run.write_evaluation(when, [record, record | {"kind": "two", "strict": False}], grey[:2])
    run.log(
        {
            "iteration": 0,
            "seconds": 1.0,
            "reward/mean": 0.5,
            "rollout/nfe": 8,
            "prompts/seen": 1,
            "prompts/share@one": 1.0,
        },
        0,
    )
    run.log(
        {
            "iteration": 1,
            "seconds": 1.0,
            "reward/mean": 0.6,
            "reward/mean@jpeg": 0.5,
            "preview/rank_correlation@1": 0.5,
            "preview/variance@1": 1.2,
        },
        1,
    )
    run.write_audit(
        {
            **audit,
            "stopped_at": [None, None, 1, 2],
            "kept_uniform": [0, 1],
            "kept_ovf": [2, 3],
            "keep": [2, 2],
            "variance": [1.0, 1.2],
            "variance_final": [1.5, 1.5],
        },
        grey.repeat(3, 0).reshape(4, 3, 8, 8, 3),
    )
    plan = {"path": [4, 3], "prune_steps": [1], "selector": "ovf", "num_inference_steps": 2}
    known: Any = {
        "rewards": {"weights": {"a": 1, "b": 2}, "selected_on": "sum", "asked": {"a": 3}, "missing": {"a": 1}},
        "plan": plan,
    }
    about: Any = {
        "status": "finished",
        "recipe": "smoke",
        "iterations": 2,
        "seed": 0,
        "wall_seconds": 3.0,
        "seconds_by_stage": {"sample": 1.0},
    }
    run.summary.write(
        {
            **known,
            **about,
            "cost": {"predicted": cost, "counted": cost, "audit": cost},
            "nfe_saved": 0.2,
            "versions": {"a": "1"},
        }
    )


def run_case(rng: random.Random, work: Path) -> Case:
    from progrpo.pages.report import write_report

    folder = work / "run"
    name = rng.choice(
        ("summary.json", "metrics.jsonl", "evaluation/before.json", "audit/0000.json", "config.json", "audit/0000.png")
    )
    act, seed = rng.random(), rng.random()

    def read() -> None:
        whole_run(folder)
        file, own = folder / name, random.Random(seed)
        if act < 0.1:
            file.unlink()
        elif act < 0.4 or file.suffix != ".json":
            file.write_bytes(damaged(file.read_bytes(), own))
        else:
            file.write_text(json.dumps(mutate(json.loads(file.read_text()), own)))
        try:
            write_report(folder)
        finally:
            shutil.rmtree(folder)

    return Case("run", f"{name} {act:.2f} {seed}", read, (str(folder), "audit"))
