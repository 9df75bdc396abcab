"""The evaluation of a model, or of what a run has trained, by a command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NotRequired, cast

import torch

from progrpo.config import Config, OptimSettings, RewardTerm, SamplingSettings, check, from_python
from progrpo.messages import named
from progrpo.prompts.pictures import check_sources
from progrpo.rewards.mixture import close_all, load_mixture
from progrpo.rollout.sampler import Sampler
from progrpo.tracking.console import Console
from progrpo.training.build import eval_prompts, judge_for
from progrpo.training.checkpoints import digest
from progrpo.training.checks import check_failures, fault_of
from progrpo.training.distributed import Ranks, explain_lost_process
from progrpo.training.equal_inputs import require_same_prompts
from progrpo.training.evaluate import DIVERSE_PROMPTS, Figures, Measures, evaluate
from progrpo.training.trained_model import ModelChoice, SamplingOptions, ode_by, warn_of_cuts


@dataclass(frozen=True)
class EvaluationOptions:
    """The prompts and rewards of an evaluation. None, or no reward, is the run's own, or the default without a run."""

    prompts: str | None = None
    column: str | None = None
    rewards: Sequence[str] = ()
    split: str = "test"
    pictures: int = 512


class ModelFigures(Figures):
    """The figures of an evaluation, with the settings that it was made by."""

    target: str
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: NotRequired[str]
    seed: int
    missing_pictures: NotRequired[int]
    fault: NotRequired[str]


@torch.no_grad()
def evaluate_model(
    model: ModelChoice, options: EvaluationOptions, sampling_options: SamplingOptions
) -> ModelFigures | None:
    """The figures of a model. Several processes share the prompts out, and the main one alone returns the figures.

    A run folder may be a stranger's: a reward of its own that is code, asks a server or writes scores is used only if
    the options name it.
    """
    config = model.config
    _require_names(model, config, options)
    config = _with_rewards(model, config, options.rewards)
    settings = sampling_options.settings(config.eval)
    negative_prompt = sampling_options.negative_prompt_for(config, settings.guidance_scale)
    config = _evaluated_settings(replace(config, eval=settings), negative_prompt)
    check(config)
    source = options.prompts or config.eval.prompts
    prompts = eval_prompts(source, options.split, options.pictures, options.column or config.eval.column)
    reward = load_mixture(config.reward.terms, config.reward.frames)
    held_out = load_mixture(config.eval.rewards, config.reward.frames) if config.eval.rewards else None
    rewards = [reward] if held_out is None else [reward, held_out]
    with ExitStack() as ending, explain_lost_process(lambda: "give the command again"):
        ending.callback(close_all, rewards, Console(0, file=sys.stderr).warn)
        for mixture in rewards:
            mixture.check(prompts)
        ranks = Ranks()
        require_same_prompts(ranks, "evaluation", digest(prompts), prompts[0])
        policy = model.load(ranks, negative_prompt)
        if policy.edits:
            check_sources(prompts)
        warn_of_cuts(policy, prompts, ranks)
        sampler = Sampler(policy, reward, ode_by(policy, settings))
        measures = Measures(judge_for(source), held_out, DIVERSE_PROMPTS)
        result = evaluate(sampler, prompts, settings.seed, ranks, measures)
        failures = [ranks.gather([mixture.failures()]) for mixture in rewards]
        for of_mixture in failures:
            check_failures(of_mixture, config.reward.max_missing, "the evaluation")
        ranks.wait_for_all()
    if not ranks.is_main:
        return None
    lost = sum(failed.lost for failed in failures[0])
    figures = {
        "target": model.target,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        **({"negative_prompt": negative_prompt} if negative_prompt else {}),
        "seed": settings.seed,
        **result.figures(),
        **({"missing_pictures": lost, "fault": fault_of(failures[0])} if lost else {}),
    }
    return cast(ModelFigures, figures)


def _evaluated_settings(config: Config, negative_prompt: str) -> Config:
    """The configuration with nothing but the settings that an evaluation reads: the rest may name a stranger's code."""
    sampling = SamplingSettings(
        guidance_scale=config.sampling.guidance_scale,
        embedded_guidance=config.sampling.embedded_guidance,
        negative_prompt=negative_prompt,
        microbatch=config.sampling.microbatch,
    )
    optim = OptimSettings(microbatch=config.optim.microbatch)
    return Config(model=config.model, sampling=sampling, reward=config.reward, optim=optim, eval=config.eval)


def _require_names(model: ModelChoice, config: Config, options: EvaluationOptions) -> None:
    """ValueError, with the command to give, where a run of `progrpo.train` has objects that only Python knows."""
    objects, run = from_python(config), model.lora or model.target
    unnamed_model = model.lora is None and "model.path" in objects
    missing = ["--prompts FILE"] * (not options.prompts and "eval.prompts" in objects)
    missing += ["--reward NAME"] * (not options.rewards and "reward.terms" in objects)
    if not (unnamed_model or missing):
        return
    lora = [f"--lora {run}"] if unnamed_model or model.lora else []
    command = " ".join(["MODEL" if unnamed_model else model.target, *lora, *missing])
    raise ValueError(
        f"{named(run)} is a run of progrpo.train, which was given objects where a name is needed here: progrpo eval"
        f" {command}"
    )


def _with_rewards(model: ModelChoice, config: Config, rewards: Sequence[str]) -> Config:
    """The configuration with the rewards that are named. ValueError for a harmful one that is not named."""
    held_out = config.eval.rewards
    if rewards:
        harmless = tuple(term for term in held_out if not _is_harmful(term))
        terms = tuple(map(RewardTerm.from_text, rewards))
        return replace(config, reward=replace(config.reward, terms=terms), eval=replace(config.eval, rewards=harmless))
    for term in (*config.reward.terms, *held_out):
        if _is_harmful(term):
            raise ValueError(
                f"{named(model.target)} is measured by {named(term.to_text())}, which runs code of yours, asks a"
                " server or writes scores: if you trust that, give --reward with it; else another reward"
            )
    return config


def _is_harmful(term: RewardTerm) -> bool:
    """Whether a reward does more than load published weights and look at pictures."""
    return ":" in term.name or bool(term.url or term.cache)
