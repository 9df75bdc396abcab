"""The library call: fine-tune a diffusers pipeline towards a reward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from progrpo.checks import check
from progrpo.config import Config, ModelSettings, OptimSettings, RewardTerm, SamplingSettings
from progrpo.messages import quoted
from progrpo.policies.base import Policy
from progrpo.prompts.load import splits_from_python
from progrpo.prompts.order import make_order
from progrpo.recipes import load_recipe
from progrpo.registry import refuse_within_import
from progrpo.rewards.function import adapted, qualified_name
from progrpo.rewards.load import load_reward
from progrpo.rewards.mixture import Component, RewardMixture, closed_where_refused, component_from
from progrpo.tracking.commands import is_of_python, resume_command
from progrpo.tracking.run_folder import RunFolder
from progrpo.training.absolute_paths import with_absolute_paths
from progrpo.training.build import (
    as_many,
    policy_context,
    ranking_from,
    resolve_dtype,
    with_lora_of_run,
)
from progrpo.training.distributed import Ranks, explain_lost_process
from progrpo.training.entry import resume as resume_in
from progrpo.training.entry import start
from progrpo.training.equal_inputs import require_same_settings
from progrpo.training.inputs import HeldOut, RunInputs, held_out_rewards
from progrpo.training.loop import NO_CHECKPOINT
from progrpo.training.run import Run
from progrpo.training.torch_state import default_torch_state
from progrpo.types import FROM_PYTHON, Prompt

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

RewardLike = Callable[..., Any] | str | RewardTerm | Any
"""A reward of a library call: see `train`."""
Prompts = Iterable[str | Prompt | Mapping[str, Any]] | Path
Mode = Literal["new", "overwrite", "resume", "resume_changed"]
"""The treatment of a run that `out` holds already: see `train`."""


@default_torch_state()
def train(
    pipeline: DiffusionPipeline,
    prompts: Prompts | Mapping[str, Prompts],
    reward: RewardLike | Sequence[RewardLike | tuple[RewardLike, float]],
    *,
    config: Config | None = None,
    out: str | Path = "runs/custom",
    mode: Mode = "new",
) -> RunFolder:
    """Fine-tune a diffusers pipeline towards a reward. The LoRA is in `out`/lora, in diffusers' format.

    `prompts` are texts, `Prompt`s, or rows with a field `prompt` (or `config.prompts.column`) and columns beside it: a
    list, a `datasets.Dataset`, a table of pandas, polars or pyarrow, or the `pathlib.Path` of a prompt file. Their
    order is the run's. A mapping such as a `datasets.DatasetDict` gives them by split: `train`, and `test`, on which
    before and after are measured, and `validation` for evaluations on the way (`config.eval.every`). Without `test`
    these are the training prompts, and without `validation` the test prompts.

    `reward(images, prompts, **columns)` returns a float for each PIL picture, or None where it failed: a function, also
    an async one, or an object with it as `score`. From a model of videos it gets some frames, or with `video = True`
    whole videos. It may be a built-in reward's name, a `progrpo.config.RewardTerm`, or a list of any of these, which
    are summed with the weights of pairs (reward, weight).

    `config.model.path`, `revision` and `variant`, `config.prompts.source`, `config.eval.prompts` and
    `config.reward.terms` are not read. The pipeline is taken over: its denoiser is changed and its text encoders leave
    it, so load it again for pictures or another run.

    `mode` says what to do with `out`. `new` refuses a folder that holds a run, and `overwrite` replaces that run.
    `resume`, with the pipeline as it was before the run, the prompts and the rewards given again, goes on with it from
    its newest whole checkpoint, exactly as it would have gone: without a `config` by its own, and with more
    `iterations` as a longer run. It refuses what was changed since; `resume_changed` goes on with the changes.

    ValueError, one sentence, for a mistake that the caller can mend. Returns the run folder, whose `summary.read()` has
    the figures.
    """
    refuse_within_import()
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, not {quoted(mode)}")
    resumes, accept_changes = mode in ("resume", "resume_changed"), mode == "resume_changed"
    if config is not None:
        check(config)
        _refuse_what_the_call_gives(config)
    with explain_lost_process(lambda: NO_CHECKPOINT):
        ranks = Ranks()
        require_same_settings(ranks, config, mode=mode)
        folder = RunFolder(ranks.gather([out])[0])
        own = ranks.from_main(lambda: _own_config(folder.path, accept_changes)) if resumes else None
        config = resolve_dtype(_complete(config, own, pipeline), ranks)
        splits = splits_from_python(prompts, config.prompts.column, config.eval.column)
        terms, mixture = _mixture(reward, config)  # before the pipeline is taken over: a mistake here costs no loading
        config = replace(config, reward=replace(config.reward, terms=terms))

        def make_inputs() -> RunInputs:
            test, validation = (as_many(split, config.eval.pictures) for split in (splits.test, splits.validation))
            return RunInputs(
                config,
                mixture,
                make_order(config.prompts.order, {"": splits.train}, config.seed),
                HeldOut(test, validation, None, held_out_rewards(config)),
                lambda: _take_over(pipeline, config, ranks),
            )

        with closed_where_refused([mixture]):
            check(config)
            if resumes:
                return resume_in(folder, config, make_inputs, ranks, accept_changes)
            run = Run(make_inputs(), folder, ranks)
    return start(run, overwrite=mode == "overwrite")


def _refuse_what_the_call_gives(config: Config) -> None:
    """ValueError for weights or prompts of a configuration in whose place the call takes its own."""
    if config.model.single_file:
        raise ValueError(
            "config.model.single_file must be empty for progrpo.train: load the pipeline from the file, with"
            " from_single_file"
        )
    if config.prompts.pairs:
        raise ValueError(
            "config.prompts.pairs must be empty for progrpo.train, which samples for its prompts; learn from recorded"
            " pairs with `progrpo train --prompts.pairs`"
        )


def _take_over(pipeline: DiffusionPipeline, config: Config, ranks: Ranks) -> Policy:
    """The pipeline as a policy."""
    from progrpo.policies.load import policy_from_pipeline

    return policy_from_pipeline(pipeline, with_lora_of_run(config.model), policy_context(config, ranks))


def _complete(config: Config | None, own: Config | None, pipeline: DiffusionPipeline) -> Config:
    """The configuration of a library call, with labels for what Python gave.

    A run that goes on keeps what `own`, its configuration until now, has measured.
    """
    config = with_absolute_paths(config or own or Config())
    config = replace(
        config,
        model=replace(config.model, path=f"a {type(pipeline).__name__} {FROM_PYTHON}"),
        prompts=replace(config.prompts, source=f"prompts {FROM_PYTHON}"),
        eval=replace(config.eval, prompts=f"prompts {FROM_PYTHON}"),
    )
    if own is None:
        return config
    dtype = own.model.dtype if config.model.dtype == "auto" else config.model.dtype
    # a run from before this setting was called without it, and has its other value
    step_ends = own.model.step_ends if config.model.step_ends == ModelSettings().step_ends else config.model.step_ends
    return replace(
        config,
        model=replace(config.model, dtype=dtype, step_ends=step_ends),
        sampling=replace(config.sampling, microbatch=_smaller(config.sampling, own.sampling)),
        optim=replace(config.optim, microbatch=_smaller(config.optim, own.optim)),
    )


def _smaller(given: SamplingSettings | OptimSettings, own: SamplingSettings | OptimSettings) -> int | None:
    """The smaller of a microbatch that is asked for and one that was measured, or halved where memory ran out."""
    sizes = [settings.microbatch for settings in (given, own) if settings.microbatch is not None]
    return min(sizes, default=None)


def _own_config(folder: Path, accept_changes: bool) -> Config:
    """The configuration of a library run to go on with. ValueError for no run, and for one of the command line."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no run to resume (no config.json); give its folder as out, or leave mode out")
    if not (is_of_python(folder) or accept_changes):
        raise ValueError(
            f"{folder} is a run of the command line; go on with {resume_command(folder)} (or, where an"
            " older progrpo.train left it, with mode='resume_changed')"
        )
    return load_recipe(str(folder))


def _mixture(
    given: RewardLike | Sequence[RewardLike | tuple[RewardLike, float]], config: Config
) -> tuple[tuple[RewardTerm, ...], RewardMixture]:
    """The rewards of a library call as a configuration would name them, and as one."""
    terms: list[RewardTerm] = []
    components: list[Component] = []
    for item in given if isinstance(given, list | tuple) else [given]:
        if isinstance(item, tuple) and len(item) != 2:
            raise ValueError(f"a reward with a weight must be a pair (reward, weight), not {quoted(item)}")
        reward, weight = item if isinstance(item, tuple) else (item, None)
        if isinstance(reward, str):
            reward = RewardTerm.from_text(reward)
        if isinstance(reward, RewardTerm):
            term = replace(reward, from_python=False, weight=reward.weight if weight is None else weight)
            made = load_reward(term)
        else:
            name = _free_name(qualified_name(reward), terms)
            term = RewardTerm(name, 1.0 if weight is None else weight, from_python=True)
            made = adapted(reward)
        terms.append(term)
        components.append(component_from(term, made, config.reward.frames))
    ranking = ranking_from(config.objective, replace(config.reward, terms=tuple(terms)))
    return tuple(terms), RewardMixture(components, ranking)


def _free_name(name: str, terms: Sequence[RewardTerm]) -> str:
    """The name, numbered where a term has it: two lambdas have the same."""
    taken = {term.name for term in terms}
    return next(n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in taken)
