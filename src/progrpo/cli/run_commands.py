"""Commands around runs: train, resume, plan and recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from progrpo.checks import check
from progrpo.cli.command import Command, ConfigFields, check_range, first_free, require_run
from progrpo.cli.output import columns, format_result, show
from progrpo.config import Config, config_to_json, plan_costs, resolve_plan
from progrpo.recipes import RECIPES, describe, load_recipe
from progrpo.registry import choices_of
from progrpo.rollout.settings import PLAN_NAMES
from progrpo.training.gpus import GPUS

if TYPE_CHECKING:
    PlanName = str
    GPUName = str
else:
    PlanName = choices_of(("recipe", *PLAN_NAMES))
    GPUName = Literal[tuple(GPUS)]


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train a recipe, a config file or a run folder's config; `train --resume RUN` continues a stopped run."""

    out: Path | None = None
    """The run folder. Without it: runs/RECIPE, or runs/RECIPE-2 and so on where that is taken."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace a run that is already there."""
    config: ConfigFields

    def run(self) -> None:
        check(self.config)
        from progrpo.training.entry import train_run

        default = Path("runs") / self.config.recipe
        out = self.out or (default if self.overwrite else first_free(default))
        train_run(self.config, out, self.overwrite)


@dataclass(frozen=True)
class Resume(Command):
    """Continue a stopped run, exactly as it would have continued."""

    goes_on: ClassVar = True
    resume: Path
    """The run folder."""
    iterations: int | None = None
    """The number of iterations in all. Without it: as many as the run was started for."""
    accept_changes: FlagCreatePairsOff[bool] = False
    """Continue although config.json or the prompts were changed since the checkpoint."""

    def run(self) -> None:
        require_run(self.resume)
        from progrpo.training.entry import resume_run

        resume_run(self.resume, self.iterations, self.accept_changes)


@dataclass(frozen=True)
class Recipes(Command):
    """List the shipped recipes, or print one of them as JSON."""

    name: Annotated[Positional[str | None], arg(metavar="[RECIPE]")] = None
    """The recipe to print."""

    def run(self) -> None:
        if self.name is None:
            show(columns({name: describe(name) for name in RECIPES}))
        else:
            show(config_to_json(load_recipe(self.name)).rstrip())


@dataclass(frozen=True, kw_only=True)
class Plan(Command):
    """Print a plan's costs: network calls, decodes and rewards; with --gpu memory and time. It needs no weights."""

    plan: PlanName = "recipe"
    """The recipe's own plan, or another in its place, as --plan.preset.
    `custom` is the plan of --plan.group-size, --plan.prune and --plan.final-keep."""
    num_inference_steps: int | None = None
    """The number of sampling steps, as --sampling.num-inference-steps."""
    guidance_scale: float | None = None
    """The guidance scale, as --sampling.guidance-scale."""
    gpu: GPUName | None = None
    """Estimate operations, memory by what holds it, and time, on such a card."""
    share_of_peak: float = 0.35
    """The share of the card's peak that a network call is assumed to reach."""
    processes: int = 1
    """The number of processes, one per card."""
    json: FlagCreatePairsOff[bool] = False
    """Print JSON."""
    config: ConfigFields

    def run(self) -> None:
        config = self._with_options()
        check(config)
        check_range(0.01, 1, share_of_peak=self.share_of_peak)
        check_range(1, 100_000, processes=self.processes)
        costs = plan_costs(config, resolve_plan(config))
        plan = "recorded pairs" if config.prompts.pairs else config.plan.preset
        result: dict[str, object] = {"recipe": config.recipe, "plan": plan, **costs}
        if self.gpu is not None:
            from progrpo.training.estimate import estimate

            result |= estimate(config, self.gpu, self.share_of_peak, self.processes)
        show(format_result(result, self.json))

    def _with_options(self) -> Config:
        """The configuration with the options that stand for fields of it."""
        sampling = self.config.sampling
        if self.num_inference_steps is not None:
            sampling = replace(sampling, num_inference_steps=self.num_inference_steps)
        if self.guidance_scale is not None:
            sampling = replace(sampling, guidance_scale=self.guidance_scale)
        plan = self.config.plan if self.plan == "recipe" else replace(self.config.plan, preset=self.plan)
        return replace(self.config, sampling=sampling, plan=plan)
