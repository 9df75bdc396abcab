"""The evaluation of a model, or of what a run has trained, by a command."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NotRequired, cast

import torch

from progrpo.checks import check
from progrpo.config import Config, OptimSettings, RewardTerm, SamplingSettings, from_python
from progrpo.messages import named
from progrpo.prompts.load import has_splits
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
from progrpo.training.trained_model import ModelChoice, negative_prompt_for, ode_by, warn_of_cuts, with_given


@dataclass(frozen=True)
class EvaluationPrompts:
    """The prompts of an evaluation. None is the run's own, or the default without a run."""

    source: str | None = None
    split: str = "test"
    count: int = 512
    column: str | None = None


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
    model: ModelChoice,
    prompts: EvaluationPrompts,
    rewards: Sequence[str],
    given: Mapping[str, float | None],
    negative_prompt: str | None = None,
) -> ModelFigures | None:
    """The figures of a model, in the main process alone. Several processes share the prompts out.

    Without `rewards` the run's own are taken, or the default without a run. `given` are the settings of evaluations
    (`EvalSettings`) to take in place of the run's own. A run folder may be a stranger's: a reward of its own that is
    code, asks a server or writes scores is used only if `rewards` name it.
    """
    config = model.config
    _require_names(model, config, prompts.source, rewards)
    config = with_rewards(model, config, rewards, "eval")
    settings = with_given(config.eval, given)
    negative_prompt = negative_prompt_for(config, negative_prompt, settings.guidance_scale)
    config = _evaluated_settings(replace(config, eval=settings), negative_prompt)
    check(config)
    source = prompts.source or config.eval.prompts
    if prompts.split != "test" and not has_splits(source):
        raise ValueError(f"--split: the prompt file {named(source)} has no splits; leave it out")
    chosen = eval_prompts(source, prompts.split, prompts.count, prompts.column or config.eval.column)
    reward = load_mixture(config.reward.terms, config.reward.frames)
    held_out = load_mixture(config.eval.rewards, config.reward.frames) if config.eval.rewards else None
    mixtures = [reward] if held_out is None else [reward, held_out]
    with ExitStack() as ending, explain_lost_process(lambda: "give the command again"):
        ending.callback(close_all, mixtures, Console(0, file=sys.stderr).warn)
        for mixture in mixtures:
            mixture.check(chosen)
        ranks = Ranks()
        require_same_prompts(ranks, "evaluation", digest(chosen), chosen[0])
        policy = model.load(ranks, negative_prompt)
        if policy.edits:
            check_sources(chosen)
        warn_of_cuts(policy, chosen, ranks)
        sampler = Sampler(policy, reward, ode_by(policy, settings))
        measures = Measures(judge_for(source), held_out, DIVERSE_PROMPTS)
        result = evaluate(sampler, chosen, settings.seed, ranks, measures)
        failures = [ranks.gather([mixture.failures()]) for mixture in mixtures]
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


def _require_names(model: ModelChoice, config: Config, source: str | None, rewards: Sequence[str]) -> None:
    """ValueError, with the command to give, where a run of `progrpo.train` has objects that only Python knows."""
    objects = from_python(config)
    run = model.lora or model.target
    unnamed_model = model.lora is None and "model.path" in objects
    missing = ["--prompts FILE"] * (not source and "eval.prompts" in objects)
    missing += [_reward_option(config.reward.terms)] * (not rewards and "reward.terms" in objects)
    if not (unnamed_model or missing):
        return
    words = _words(replace(model, target="MODEL", lora=Path(run)) if unnamed_model else model)
    raise ValueError(
        f"{named(run)} is a run of progrpo.train, which was given objects where a name is needed here: progrpo eval"
        f" {' '.join([words, *missing])}"
    )


def with_rewards(model: ModelChoice, config: Config, rewards: Sequence[str], command: str) -> Config:
    """The configuration with the rewards that are named, or with its own where none is.

    ValueError, with the command to give, for a harmful one that is not named: a run folder may be a stranger's.
    """
    held_out = config.eval.rewards
    if rewards:
        harmless = tuple(term for term in held_out if not is_harmful(term))
        terms = tuple(map(RewardTerm.from_text, rewards))
        return replace(config, reward=replace(config.reward, terms=terms), eval=replace(config.eval, rewards=harmless))
    whole = f"progrpo {command} {_words(model)}"
    own = f"{whole} {_reward_option(config.reward.terms)}"
    for term in (*config.reward.terms, *held_out):
        if is_harmful(term):
            answer = f"if you trust that, name it: {own}"
            if not any(map(is_harmful, config.reward.terms)):
                answer = f"leave it out, {own}, or measure by it if you trust it, {whole} {_reward_option([term])}"
            raise ValueError(
                f"{named(model.target)} is measured by {named(term.to_text())}, which runs code of yours, asks a"
                f" server or writes scores: {answer}"
            )
    return config


def _words(model: ModelChoice) -> str:
    """The words of a command that name this model."""
    lora = [] if model.lora is None else ["--lora", str(model.lora)]
    revision = [f"--{name}={value}" for name in ("revision", "variant") if (value := getattr(model, name))]
    return shlex.join([model.target, *lora, *revision])


def _reward_option(terms: Sequence[RewardTerm]) -> str:
    """The option that names these rewards; NAME for an object in Python that no name loads."""
    return " ".join(["--reward", *("NAME" if _is_nameless(term) else shlex.quote(term.to_text()) for term in terms)])


def _is_nameless(term: RewardTerm) -> bool:
    """Whether a reward was an object of a script, or was made inside a function."""
    module, _, attribute = term.name.partition(":")
    return term.from_python and (module == "__main__" or "_locals_" in attribute or "_lambda_" in attribute)


def is_harmful(term: RewardTerm) -> bool:
    """Whether a reward does more than load published weights and look at pictures."""
    return ":" in term.name or bool(term.url or term.cache)
