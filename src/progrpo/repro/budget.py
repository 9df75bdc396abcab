"""Runs with equal hours of training: their lengths by prediction before they begin, and by measurement on the way."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from progrpo.config import Config, resolve_plan
from progrpo.recipes import load_recipe
from progrpo.repro.campaign import STAGES, finished, train_or_resume
from progrpo.tracking.records import metric
from progrpo.tracking.run_folder import RunFolder
from progrpo.training.entry import resume_run
from progrpo.training.estimate import flops_by_stage, sizes_for
from progrpo.training.gpus import GPU

BEGINNING = 5
"""The iterations by whose seconds the length of a run is reckoned; an `auto` plan is chosen after the third."""


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of a run on a card: seconds of an iteration, iterations, and GPU-hours."""

    seconds: float
    iterations: int
    training_hours: float
    other_hours: float
    """The GPU-hours of evaluations and audits."""


def predict(config: Config, hours: float, card: GPU, share: float) -> Prediction:
    """The prediction for so many GPU-hours of training, by the operations of the model's own code.

    `share` is the share of the card's peak that calls reach. Rewards and the loading of the model are not counted.
    """
    plan, model = resolve_plan(config), sizes_for(config)
    speed = card.peak * 1e12 * share
    seconds = sum(flops_by_stage(config, plan, model).values()) / speed
    iterations = max(BEGINNING, int(3600 * hours / seconds))
    # before, after the beginning, at the end, and on the way
    evaluations = 3 + (iterations // config.eval.every if config.eval.every else 0)
    pair = 2 if config.eval.guidance_scale > 1 and not config.sampling.embedded_guidance else 1
    picture = config.eval.num_inference_steps * pair * model.call_flops + model.decode_flops
    steps = config.sampling.num_inference_steps
    own_pair = 2 if config.sampling.in_pairs else 1
    # an audit samples one group more, unless the plan finishes and trains on all members
    sampled = 0 if plan.survivors == plan.group_size else steps * own_pair * model.call_flops + model.decode_flops
    audit = plan.group_size * (sampled + steps * model.decode_flops)
    audits = -(-iterations // config.audit.every) if config.audit.every else 0
    other = (evaluations * config.eval.pictures * picture + audits * audit) / speed
    return Prediction(seconds, iterations, iterations * seconds / 3600, other / 3600)


def training_seconds(path: Path) -> list[float]:
    """The seconds of sampling, previews, rewards and updates of each iteration of a run.

    Audits count where the plan follows them, and elsewhere they only report.
    """
    stages = (*STAGES, "audit") if load_recipe(str(path)).plan.follows_audits else STAGES
    records = RunFolder(path).metrics.read()
    return [sum(metric(record, f"time/{stage}") or 0.0 for stage in stages) for record in records]


def train_for(config: Config, path: Path, seconds: float) -> None:
    """Train a configuration until no other iteration fits into so many seconds of training.

    A run that was begun goes on. ValueError if its learning rate depends on its length, which is not known before.
    """
    if config.optim.decay:
        raise ValueError(f"optim.decay must be 0, not {config.optim.decay:g}: a run of so many seconds has no length")
    if not finished(path):
        train_or_resume(config, path)
    while more := _further_iterations(training_seconds(path), seconds):
        resume_run(path, iterations=len(training_seconds(path)) + more)


def _further_iterations(spent: list[float], seconds: float) -> int:
    """The iterations that still fit, at the mean of the later half's seconds."""
    later = spent[len(spent) // 2 :]
    return max(0, int((seconds - sum(spent)) / (sum(later) / len(later))))


def processes() -> int:
    """The number of processes, a GPU each, that a launcher such as torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
