"""The summary of a run: what it came to, from its trainer and its folder."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from progrpo.config import Config, plan_costs
from progrpo.rollout.plan import PlanCosts, preset
from progrpo.tracking.choices import Choice, choices
from progrpo.tracking.records import AuditRecord, MeasuredSummary, PlanSummary, RewardSummary, Summary
from progrpo.tracking.run_folder import RunFolder
from progrpo.tracking.statistics import spearman
from progrpo.training import checkpoints
from progrpo.training.evaluate import Evaluation
from progrpo.training.plan_judge import nfe_of_full_groups
from progrpo.training.trainer import Trainer


@dataclass(frozen=True)
class Progress:
    """The progress of a run, beside what its trainer knows."""

    status: str
    wall_seconds: float
    best_iterations: int | None
    warnings: list[str]


def summarize(trainer: Trainer, folder: RunFolder, progress: Progress) -> Summary:
    """The summary of a run up to now."""
    config, totals, iterations = trainer.config, trainer.totals, trainer.iteration
    plan = plan_costs(config, trainer.plan)
    none = preset("none", config.sampling.num_inference_steps)
    unpruned = totals.unpruned
    plain = nfe_of_full_groups(config, none.group_size) * iterations
    agreement: dict[int, float | None] = {}
    kept: dict[int, Choice] = {}
    with suppress(ValueError, LookupError, TypeError):  # of an audit's file that somebody changed: the report says so
        audits = folder.read_audits()
        agreement, kept = preview_agreement(audits), choices(audits)
    points = trainer.plan.active_points()
    group_size = trainer.plan.group_size
    at_points = {p.step: c for p in points if (c := kept.get(p.step)) and (c.members, c.keep) == (group_size, p.keep)}
    return {
        "recipe": config.recipe,
        "seed": config.seed,
        "iterations": iterations,
        "wall_seconds": progress.wall_seconds,
        "status": progress.status,
        **measured_means(folder),
        "best_iterations": progress.best_iterations,
        "nfe": totals.counted.nfe,
        "nfe_saved": 1 - totals.counted.nfe / unpruned if unpruned else None,
        "nfe_ratio_to_none": totals.counted.nfe / plain if plain else plan["nfe_ratio_to_none"],
        "preview_rank_correlation": {str(point.step): agreement.get(point.step) for point in points},
        "preview_rank_correlation_by_step": {str(step): value for step, value in agreement.items()},
        "preview_variance": {str(step): choice.variance for step, choice in at_points.items()},
        "preview_variance_by_step": {str(step): choice.variance for step, choice in kept.items()},
        "preview_variance_final_by_step": {str(step): choice.variance_final for step, choice in kept.items()},
        "cost": {
            "predicted": asdict(totals.predicted),
            "counted": asdict(totals.counted),
            "audit": asdict(totals.audited),
        },
        "plan": _plan_summary(trainer, plan),
        "rewards": _reward_summary(trainer),
        "missing_pictures": totals.lost,
        "warnings": progress.warnings,
        "seconds_by_stage": totals.seconds,
        "versions": checkpoints.versions(config),
        "device": device_name(trainer.ranks.device),
        "processes": trainer.ranks.world,
        "command": command_line(),
    }


def _plan_summary(trainer: Trainer, plan: PlanCosts) -> PlanSummary:
    return {
        "value": trainer.plan_monitor.plan_value,
        "path": plan["path"],
        "groups": plan["groups"],
        "prune_steps": plan["prune_steps"],
        "selector": trainer.config.plan.selector,
        "num_inference_steps": trainer.config.sampling.num_inference_steps,
    }


def _reward_summary(trainer: Trainer) -> RewardSummary:
    return {
        "weights": dict(trainer.reward.weights),
        "selected_on": selected_on(trainer.config),
        "asked": trainer.totals.asked,
        "missing": trainer.totals.missing,
        "last_error": trainer.totals.last_error,
    }


def introduction(trainer: Trainer, folder: RunFolder) -> str:
    """A line about what runs."""
    config = trainer.config
    if trainer.plan.recorded:
        return (
            f"{config.recipe}: {config.prompts.per_iteration} recorded pairs of {config.prompts.pairs} an iteration by"
            f" {config.objective.name}, no sampling; run folder {folder.path}"
        )
    plan = plan_costs(config, trainer.plan)
    path, prompts = (" -> ".join(map(str, numbers)) for numbers in (plan["path"], plan["groups"]))
    terms = config.reward.terms
    prunes = trainer.plan.survivors < trainer.plan.group_size
    chosen = f" by {config.plan.selector}" if prunes else ", not pruned"
    mixed = f", rewarded by {' + '.join(term.to_text() for term in terms)}" if len(terms) > 1 else ""
    on = f", pruned on the {selected_on(config)}" if mixed and prunes else ""
    return (
        f"{config.recipe}: groups of {path}{chosen}{mixed}{on},"
        f" {prompts} {'prompt' if prompts == '1' else 'prompts'} an iteration, {trainer.predicted().nfe:,} NFE each;"
        f" run folder {folder.path}"
    )


def selected_on(config: Config) -> str:
    """A name of the numbers that selectors compare."""
    if config.reward.noise:
        return "expected sum of rewards, whose noise is known"
    gdpo = config.objective.advantage == "gdpo"
    return "sum of rewards normalised in their group" if gdpo else "weighted sum of rewards"


def measured_means(folder: RunFolder) -> MeasuredSummary:
    """The means of the evaluations that the folder has."""
    before = Evaluation(folder.evaluations["before"].read(), np.empty(0))
    after = Evaluation(folder.evaluations["after"].read(), np.empty(0))
    return {
        "reward_before": before.mean("graded"),
        "reward_after": after.mean("graded"),
        "accuracy_before": before.mean("strict"),
        "accuracy_after": after.mean("strict"),
        "judge_before": before.mean("judge"),
        "judge_after": after.mean("judge"),
        "diversity_before": before.mean("diversity"),
        "diversity_after": after.mean("diversity"),
        "held_out_before": before.held_out(),
        "held_out_after": after.held_out(),
        "accuracy_by_kind_before": before.strict_by_kind(),
        "accuracy_by_kind_after": after.strict_by_kind(),
    }


def preview_agreement(audits: Sequence[AuditRecord]) -> dict[int, float | None]:
    """Spearman's correlation of previews and final rewards by step, the mean over audit groups that have variance."""
    by_step: dict[int, list[float]] = {}
    for audit in audits:
        for step, scores in zip(audit["steps"], audit.get("used", audit["scores"]), strict=True):
            value = spearman(scores, audit["final"])
            by_step.setdefault(step, []).extend([] if value is None else [value])
    return {step: float(np.mean(values)) if values else None for step, values in sorted(by_step.items())}


def device_name(device: torch.device) -> str:
    """The name of a device, for results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'' if threads == 1 else 's'}, {platform.machine()}"


def command_line() -> str:
    """The command that runs, as it was typed."""
    return " ".join([*(Path(program).name for program in sys.argv[:1]), *sys.argv[1:]])
