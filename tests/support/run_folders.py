"""Run folders of made-up records, for what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from progrpo.tracking.run_folder import RunFolder


def written_run(folder: Path, word: str, members: int = 4) -> RunFolder:
    """A finished run that says `word` wherever a run can say something."""
    run, grey = RunFolder.create(folder), np.full((members, 8, 8, 3), 128, np.uint8)
    run.log_config({"recipe": word, "seed": word, "iterations": word, "model": {"path": word, word: word}, word: word})
    rising = [i / 10 for i in range(1, members + 1)]
    record: Any = {"prompt": word, "kind": word, "graded": 0.5, "strict": True, "judge": None, "held_out": {word: 0.5}}
    other: Any = {**record, "kind": word + "2", "strict": False}
    for when in ("before", "after"):
        run.write_evaluation(when, [record, other], grey[:2])
    for i in range(2):
        own = {
            f"reward/mean@{word}": 0.5,
            f"eval/held_out@{word}": 0.5,
            f"prompts/share@{word}": 1.0,
            f"time/{word}": 1.0,
        }
        run.log({"iteration": i, "seconds": 1.0, "reward/mean": 0.5, "rollout/nfe": 8, "prompts/seen": 1, **own}, i)
        audit: Any = {"iteration": i, "prompt": word, "steps": [0, 1], "scores": [[*rising[1:], None]] * 2}
        audit |= {
            "final": [rising[-1] + 0.1, *rising[:-1]],
            "stopped_at": [None, None, *([1] * (members - 3)), 2],
            "kept_uniform": [0, 1],
            "kept_ovf": [2, 3],
            "keep": [2, 2],
            "variance": [1.0, 1.2],
            "variance_final": [1.5, 1.5],
        }
        run.write_audit(audit, grey.repeat(3, 0).reshape(members, 3, 8, 8, 3))
    cost = {"nfe": 8, "decodes": 4, "reward_calls": 4, "trained_steps": 8}
    summary: Any = {
        "status": f"{word}: {word}",
        "recipe": word,
        "device": word,
        "seed": word,
        "iterations": word,
        "wall_seconds": 3.0,
        "command": word,
        "versions": {word: word},
        "seconds_by_stage": {word: 1.0},
        "preview_rank_correlation": {word: 0.5},
        "held_out_before": {word: 0.5},
        "held_out_after": {word: 0.5},
        "rewards": {
            "weights": {word: 1, "b": 2},
            "selected_on": word,
            "asked": {word: 3},
            "missing": {word: 1},
            "last_error": word,
        },
        "plan": {"path": [members, members - 1], "prune_steps": [1], "selector": word, "num_inference_steps": 2},
        "cost": {"predicted": cost, "counted": cost, "audit": cost},
    }
    run.summary.write(summary)
    return run
