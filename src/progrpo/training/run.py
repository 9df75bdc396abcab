"""A run from its first evaluation to its report: from a recipe, from a stopped run, or from a library call."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from progrpo.config import (
    Config,
    ModelSettings,
    OptimSettings,
    RewardTerm,
    SamplingSettings,
    check,
    from_python,
    microbatch,
    to_dict,
    trained_items,
)
from progrpo.messages import quoted
from progrpo.policies.base import Policy
from progrpo.prompts.load import prompts_of, unread
from progrpo.prompts.order import ORDERS, PromptOrder
from progrpo.prompts.pictures import check_sources
from progrpo.prompts.texts import shared
from progrpo.recipes import load_recipe
from progrpo.registry import refuse_within_import
from progrpo.rewards.base import Judge, Refusal
from progrpo.rewards.function import adapted, qualified_name
from progrpo.rewards.load import load_reward
from progrpo.rewards.mixture import Component, RewardMixture, close_all
from progrpo.rollout.denoise import Sampling
from progrpo.rollout.meter import Meter
from progrpo.rollout.plan import UnitCosts, preset
from progrpo.rollout.plan import path as plan_path
from progrpo.rollout.plan import summary as plan_summary
from progrpo.streams import tolerant_streams
from progrpo.tracking.console import Console
from progrpo.tracking.lock import Lock
from progrpo.tracking.report import write_report
from progrpo.tracking.run_folder import RunFolder
from progrpo.tracking.statistics import spearman
from progrpo.training import checkpoints
from progrpo.training.build import (
    component_from,
    eval_prompts,
    judge_for,
    located,
    policy_context,
    policy_from,
    ranking_of,
    scorer_from,
    settled,
    train_order,
    with_lora_of_run,
)
from progrpo.training.distributed import Ranks, lost_in_words
from progrpo.training.equal_inputs import require_same_model, require_same_prompts, require_same_settings
from progrpo.training.errors import Interrupted, MissingScoresError
from progrpo.training.evaluate import DIVERSE_PROMPTS, STATISTICS, Evaluation, evaluate, kl_to_reference, ode
from progrpo.training.measure import measured
from progrpo.training.plan_judge import prompt_cost
from progrpo.training.stopping import Stop
from progrpo.training.torch_state import usual_torch
from progrpo.training.trainer import Iteration, Trainer
from progrpo.training.watch import HackingWatch
from progrpo.types import FROM_PYTHON, Prompt

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Rewarding = Callable[..., Any] | str | RewardTerm | Any
"""What a library call may be given as a reward: see `train`."""


_NO_CHECKPOINT = "there is no checkpoint yet"


def _how_to_go_on(run: Path) -> str:
    last = checkpoints.saved(run)
    return f"go on from {last[-1].name} with {RunFolder(run).command('resume')}" if last else _NO_CHECKPOINT


@contextmanager
def _mendable(run: Path) -> Iterator[None]:
    """What a reward says to end the run, with the command that goes on once that is mended, if there is a checkpoint."""
    try:
        yield
    except (MissingScoresError, Refusal) as error:
        if not (last := checkpoints.saved(run)):
            raise
        kind = MissingScoresError if isinstance(error, MissingScoresError) else Refusal
        command = RunFolder(run).command("resume")
        raise kind(f"{error}; mend that, and go on from {last[-1].name} with: {command}") from error


@usual_torch()
def train_run(config: Config, out: Path, overwrite: bool = False) -> RunFolder:
    """Train a configuration into a new run folder; DiskError if the disk refuses what is written there."""
    check(config)
    if objects := from_python(config):
        options = ", ".join(f"--{name}" for name in objects)
        raise ValueError(
            f"{', '.join(objects)}: a run of progrpo.train had these as objects, which no name loads; give {options}, or call"
            " progrpo.train again"
        )
    with lost_in_words(lambda: _NO_CHECKPOINT):
        ranks = Ranks()
        require_same_settings(ranks, config)
        config = settled(located(config), ranks)
        out = ranks.gather([out])[0]  # where it was chosen by what is free, another process may have chosen later
        run = Run(_named_parts(config, ranks), RunFolder(out), ranks)
    return _begun(run, overwrite)


@usual_torch()
def resume_run(folder: Path, iterations: int | None = None, accept_changes: bool = False) -> RunFolder:
    """Go on from the newest whole checkpoint, exactly as the run would have gone; DiskError if the disk refuses.

    With other `iterations`, as a run of so many would have gone, unless its learning rate depends on their number (`optim.decay`).

    ValueError if the configuration, the prompts or the model were changed since, unless that is accepted.
    """
    config, run = load_recipe(str(folder)), RunFolder(folder)
    if run.is_of_python():
        raise ValueError(
            f"{folder} is a run of progrpo.train, whose pipeline, prompts and rewards only Python has: go on with"
            f" {run.command('resume')}, with these given again"
        )
    if iterations is not None:
        config = replace(config, iterations=iterations)
        check(config)
    with lost_in_words(lambda: _how_to_go_on(folder)):
        ranks = Ranks()
        require_same_settings(ranks, config)
        config = settled(config, ranks)
        return _resumed(config, lambda: _named_parts(config, ranks), run, ranks, accept_changes)


@usual_torch()
def train(
    pipeline: DiffusionPipeline,
    prompts: Iterable[str | Prompt | Mapping[str, Any]],
    reward: Rewarding | Sequence[Rewarding | tuple[Rewarding, float]],
    *,
    config: Config | None = None,
    out: str | Path = "runs/custom",
    eval_prompts: Iterable[str | Prompt | Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    accept_changes: bool = False,
) -> RunFolder:
    """Fine-tune a diffusers pipeline towards a reward, as a library.

    `prompts` are texts, `Prompt`s, or rows with a field `prompt` (or `config.prompts.column`) and columns beside it, in an order of their own: a
    list, a `datasets.Dataset`, a table of pandas, polars or pyarrow, or the `pathlib.Path` of a prompt file.
    `reward(images, prompts, **columns)` gives a float, or None where it failed, for each PIL picture: a function, also an async
    one, or an object with it as `score`. Of a model of videos it sees some frames, or with `video = True` whole ones. It may be a built-in reward's name, a `progrpo.config.RewardTerm`, or a list of any of
    these, which are summed with the weights of pairs (reward, weight). Before and after are measured on `eval_prompts`,
    or else on the training prompts. `config.model.path`, `revision` and `variant`, `config.prompts.source` and `config.reward.terms` are not read. The
    LoRA is in `out`/lora, in diffusers' format. The pipeline is taken over: its denoiser is changed and its text encoders leave it, so load it
    again for pictures or another run.

    With `resume`, and the pipeline as it was before the run, the prompts and the rewards given again, the run in `out` goes on from its newest
    whole checkpoint, exactly as it would have gone; without a `config` by its own, and with more `iterations` as a longer run. What was
    changed since is refused, unless `accept_changes`.

    ValueError, one sentence, for a mistake that is to be mended. Returns the run folder; its `read_summary()` has the figures.
    """
    refuse_within_import()
    if overwrite and resume:
        raise ValueError("overwrite and resume exclude each other: replace the run in out, or go on with it")
    if config is not None:
        check(config)
    with lost_in_words(lambda: _NO_CHECKPOINT):
        ranks = Ranks()
        require_same_settings(ranks, config, resume=resume, accept_changes=accept_changes)
        folder = RunFolder(ranks.gather([out])[0])
        own = ranks.from_main(lambda: _own_config(folder, accept_changes)) if resume else None
        config = settled(_given_config(config, own, pipeline), ranks)
        told = prompts_of(prompts, "prompts", config.prompts.column)
        watched = told if eval_prompts is None else prompts_of(eval_prompts, "eval_prompts", config.eval.column)
        terms, scorer = _mixed(reward, config)  # before the pipeline is taken over: a mistake here costs no loading
        config = replace(config, reward=replace(config.reward, terms=terms))
        check(config)

        def parts() -> Parts:
            test = [watched[i % len(watched)] for i in range(config.eval.pictures)]
            return Parts(
                config,
                scorer,
                ORDERS[config.prompts.order]({"": told}, config.seed),
                HeldOut(test, test, None, _held_out_rewards(config)),
                lambda: _taken_over(pipeline, config, ranks),
            )

        if resume:
            return _resumed(config, parts, folder, ranks, accept_changes)
        run = Run(parts(), folder, ranks)
    return _begun(run, overwrite)


def _taken_over(pipeline: DiffusionPipeline, config: Config, ranks: Ranks) -> Policy:
    from progrpo.policies.load import policy_from_pipeline

    return policy_from_pipeline(pipeline, with_lora_of_run(config.model), policy_context(config, ranks))


def _given_config(config: Config | None, own: Config | None, pipeline: DiffusionPipeline) -> Config:
    """The configuration of a library call, which says what Python gave; of a run that goes on with what `own` has measured."""
    config = located(config or own or Config())
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
    ends = own.model.step_ends if config.model.step_ends == ModelSettings().step_ends else config.model.step_ends
    return replace(
        config,
        model=replace(config.model, dtype=dtype, step_ends=ends),
        sampling=replace(config.sampling, microbatch=_smaller(config.sampling, own.sampling)),
        optim=replace(config.optim, microbatch=_smaller(config.optim, own.optim)),
    )


def _smaller(given: SamplingSettings | OptimSettings, own: SamplingSettings | OptimSettings) -> int | None:
    """The smaller of a microbatch that is asked for and one that was measured, or halved where memory ran out."""
    sizes = [part.microbatch for part in (given, own) if part.microbatch is not None]
    return min(sizes, default=None)


def _own_config(folder: RunFolder, accept: bool) -> Config:
    """The configuration of a library run to go on with; ValueError for no run, and for one of the command line."""
    if not (folder.path / "config.json").is_file():
        raise ValueError(
            f"resume: {folder.path} holds no run (no config.json); give its folder as out, or leave resume out"
        )
    if not (folder.is_of_python() or accept):
        raise ValueError(
            f"resume: {folder.path} is a run of the command line; go on with {folder.command('resume')} (or, where an older progrpo.train"
            " left it, with accept_changes=True)"
        )
    return load_recipe(str(folder.path))


def _begun(run: Run, overwrite: bool) -> RunFolder:
    with (
        lost_in_words(lambda: _how_to_go_on(run.folder.path)),
        checkpoints.writing_to(run.folder.path, run.ranks) as lock,
    ):
        run.create(overwrite)
        return run.train(lock)


def _resumed(config: Config, parts: Callable[[], Parts], folder: RunFolder, ranks: Ranks, accept: bool) -> RunFolder:
    path, warn = folder.path, Console(config.iterations, enabled=ranks.is_main).warn
    with lost_in_words(lambda: _how_to_go_on(path)), checkpoints.writing_to(path, ranks) as lock:
        state = checkpoints.newest(path, ranks, warn)
        checkpoints.check_unchanged(path, state, config, accept)
        checkpoints.check_versions(state, config, warn)
        checkpoints.check_length(state, config, warn)
        if state["iteration"] > config.iterations:
            raise ValueError(
                f"{path} is at iteration {state['iteration']}, past {config.iterations} iterations; give more"
            )
        made = parts()
        changed = checkpoints.check_prompts(path, state, made.prompts, config, accept)
        run = Run(made, folder, ranks)
        checkpoints.check_weights(path, state, run.policy.fingerprints, config, accept)

        def go_back() -> None:
            folder.write_config(to_dict(config))
            folder.truncate(state["iteration"])

        ranks.from_main(go_back)
        return run.train(lock, state, changed)


def _mixed(
    wanted: Rewarding | Sequence[Rewarding | tuple[Rewarding, float]], config: Config
) -> tuple[tuple[RewardTerm, ...], RewardMixture]:
    """The rewards of a library call as a configuration would name them, and as one."""
    terms: list[RewardTerm] = []
    components: list[Component] = []
    for item in wanted if isinstance(wanted, list | tuple) else [wanted]:
        if isinstance(item, tuple) and len(item) != 2:
            raise ValueError(f"a reward with a weight must be a pair (reward, weight), not {quoted(item)}")
        reward, weight = item if isinstance(item, tuple) else (item, None)
        if isinstance(reward, str):
            reward = RewardTerm.from_text(reward)
        if isinstance(reward, RewardTerm):
            term = replace(reward, from_python=False, weight=reward.weight if weight is None else weight)
            made = load_reward(term)
        else:
            name, taken = qualified_name(reward), {other.name for other in terms}
            name = next(n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in taken)  # two lambdas
            term, made = RewardTerm(name, 1.0 if weight is None else weight, from_python=True), adapted(reward)
        terms.append(term)
        components.append(component_from(term, made, config.reward.frames))
    return tuple(terms), RewardMixture(components, ranking_of(config.objective, terms))


def _held_out_rewards(config: Config) -> RewardMixture | None:
    return scorer_from(config.eval.rewards, config.reward.frames) if config.eval.rewards else None


def _named_parts(config: Config, ranks: Ranks) -> Parts:
    """What a configuration names."""
    source, pictures, column = config.eval.prompts, config.eval.pictures, config.eval.column
    test, validation = (eval_prompts(source, split, pictures, column) for split in ("test", "validation"))
    return Parts(
        config,
        scorer_from(config.reward.terms, config.reward.frames, ranking_of(config.objective, config.reward.terms)),
        train_order(config.prompts, config.seed),
        HeldOut(test, validation, judge_for(source), _held_out_rewards(config)),
        lambda: policy_from(config.model, policy_context(config, ranks)),
    )


@dataclass(frozen=True)
class HeldOut:
    """What a run is measured on: test prompts for before and after, validation prompts on the way, a second judge, and rewards
    that it is not trained on."""

    test: Sequence[Prompt]
    validation: Sequence[Prompt]
    judge: Judge | None
    rewards: RewardMixture | None = None


@dataclass(frozen=True)
class Parts:
    """What a run is made of. Its model is loaded last, since most mistakes are seen without it."""

    config: Config
    reward: RewardMixture
    order: PromptOrder
    held_out: HeldOut
    load: Callable[[], Policy]

    @cached_property
    def prompts(self) -> dict[str, str]:
        """Digests, by what the prompts are for."""
        evaluation = chain(self.held_out.test, self.held_out.validation)
        return {"training": checkpoints.digest(self.order.whole), "evaluation": checkpoints.digest(evaluation)}

    @cached_property
    def met(self) -> list[Prompt]:
        """Every prompt that the run may meet, once."""
        ahead = self.order.ahead(0, self.config.iterations, self.config.prompts.per_iteration)
        return list({id(p): p for p in chain(self.held_out.test, self.held_out.validation, ahead)}.values())

    def check(self, ranks: Ranks) -> None:
        """ValueError for rewards that lack something, which is often known without a picture, and for prompts that differ by process."""
        firsts = {"training": next(iter(self.order.whole)), "evaluation": self.held_out.test[0]}
        for name, digest in self.prompts.items():
            require_same_prompts(ranks, name, digest, firsts[name])
        self.reward.check(self.met)
        if self.held_out.rewards is not None:
            self.held_out.rewards.check([*self.held_out.test, *self.held_out.validation])


@dataclass(frozen=True)
class Best:
    """The evaluation on validation prompts with the highest mean of a reward so far; its weights are kept under `NAME`."""

    NAME: ClassVar[str] = "best"
    iterations: int
    reward: float


def _unsaid(sentence: str) -> None:
    """For a warning beside a refusal, which is the sentence to be read."""


class Run:
    """Evaluates, trains, saves and reports. Only the main process writes."""

    def __init__(self, parts: Parts, folder: RunFolder, ranks: Ranks) -> None:
        """ValueError for what cannot work, before a folder is made or an old run replaced."""
        self.reward, self.held_out = parts.reward, parts.held_out
        with ExitStack() as refused:
            refused.callback(close_all, (self.reward, self.held_out.rewards), _unsaid)
            parts.check(ranks)
            self.policy = parts.load()
            require_same_model(ranks, self.policy)
            refused.pop_all()
        if self.policy.edits:
            check_sources(parts.met)
        self.config = measured(parts.config, self.policy, parts.order.prompts_for(0, 1)[0], ranks)
        self.folder, self.ranks, self.prompts, self._met = folder, ranks, parts.prompts, parts.met
        self.trainer = Trainer(self.config, self.policy, self.reward, parts.order, ranks)
        self.best: Best | None = None
        self._plan_value: float | None = None
        self._path = plan_path(self.trainer.plan)
        self._hacking, self._hacked = HackingWatch(self.config.watch.max_kl), False
        self._warnings: list[str] = []
        self._lock: Lock | None = None

    def _of_overlap(self) -> str | None:
        """A warning of evaluation prompts that are trained on while others are not; where all are, that was asked for."""
        held_out = list(dict.fromkeys(p.text for p in (*self.held_out.test, *self.held_out.validation)))
        trained = [] if self.policy.edits else shared(held_out, (p.text for p in self.trainer.order.whole))
        if not 0 < len(trained) < len(held_out):
            return None
        return (
            f"{len(trained)} of {len(held_out)} evaluation prompts are trained on as well (letters, quotes and spaces in any form),"
            f" so evaluations are not of held-out prompts alone; the first is {quoted(trained[0])}"
        )

    def create(self, overwrite: bool) -> None:
        """Make the run folder, once every part of the run could be built; ValueError if it holds a run already."""
        self.ranks.from_main(lambda: RunFolder.create(self.folder.path, overwrite).write_config(to_dict(self.config)))

    def train(
        self, lock: Lock | None, state: Mapping[str, Any] | None = None, changed: Sequence[str] = ()
    ) -> RunFolder:
        """To the end; from a checkpoint's `state`, whose prompts for what `changed` names were others. The main process has the `lock`."""
        start, self._lock = time.perf_counter(), lock
        if state is not None:
            self._take_up(state, changed)
            start -= state["wall_seconds"]
        console = Console(
            self.config.iterations,
            nfe_unpruned=self._nfe_unpruned(1),
            history=self.folder.read_metrics(),
            enabled=self.ranks.is_main,
        )
        if "evaluation" in changed:
            self._warn(
                "the evaluation prompts were changed during the run: before and after are of different prompts, so what lies"
                " between them is not what training did",
                console,
            )
        cuts = self.policy.truncation([p.text for p in self._met]).in_words()
        for said in filter(None, (self.policy.ignored, cuts, unread(self._met), self._of_overlap())):
            self._warn(said, console)
        if not self.config.model.keep_text_encoders:
            self._encode_all()
        path = self.folder.path
        # to its last word: a launcher that sees one process die sends the others SIGTERM while they are about to say what happened
        with Stop(self.ranks) as stop, tolerant_streams():
            try:
                with lost_in_words(lambda: _how_to_go_on(path)), _mendable(path):
                    self._train(console, start, stop, fresh=state is None)
            except BaseException as why:
                with suppress(Exception):  # such as that of a full disk, which must not hide why
                    self._write_summary(start, f"stopped: {str(why) or type(why).__name__}")
                raise
            finally:
                close_all((self.reward, self.held_out.rewards), console.warn)
            self._write_summary(start, "finished")
            if self.ranks.is_main:
                self._conclude(console)
        self.ranks.leave()
        return self.folder

    def _conclude(self, console: Console) -> None:
        """All is saved: what is still to be said about it takes nothing from that."""
        report = None
        with self._aside("writing report.html", console):
            report = write_report(self.folder.path)
        with self._aside("reading summary.json", console):
            console.summary_table(self.folder.read_summary(), report)

    @contextmanager
    def _aside(self, what: str, console: Console) -> Iterator[None]:
        """Run the block, which only informs: where it fails, a warning says so, and the run goes on."""
        try:
            yield
        except Exception as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            said = " ".join(f"{type(error).__name__}: {reason}".split())
            self._warn(f"{what} failed ({said}); the run is not affected", console)

    def _take_up(self, state: Mapping[str, Any], changed: Sequence[str]) -> None:
        if "training" in changed:  # what was observed is of other prompts
            state = {**state, "order": self.trainer.order.state_dict()}
        self.trainer.load_state_dict(state)
        self.best = None if state["best"] is None else Best(**state["best"])
        self._plan_value, self._path = state["plan_value"], plan_path(self.trainer.plan)
        if "evaluation" not in changed:  # else there is nothing to compare with yet
            self._hacking.load_state_dict(state["hacking"])
        self._hacked, self._warnings = state["hacked"], list(state["warnings"])
        if self.ranks.is_main and (costs := self.folder.read_costs()) is not None:
            self.trainer.judge.recorded = UnitCosts(**costs)

    def _warn(self, sentence: str, console: Console) -> None:
        """Once, in the console, and kept for the summary and the report."""
        if sentence not in self._warnings:
            self._warnings.append(sentence)
            console.warn(sentence)

    def _warn_of_lost_pictures(self, console: Console) -> None:
        if fault := self.trainer.totals.fault:
            self._warn(f"pictures are missing, which are not scored nor trained on: {fault}", console)

    def _train(self, console: Console, start: float, stop: Stop, fresh: bool) -> None:
        console.say(self._what_runs())
        if self.ranks.zero is not None and self.ranks.zero.stage:
            console.say(self.ranks.zero.in_words(self.ranks.world))
        if fresh:
            console.say(f"evaluating the model as it is, on {len(self.held_out.test)} pictures")
            self._evaluate("before", "reference", console)
            self._warn_of_lost_pictures(console)
        self._write_summary(start, "running")
        while self.trainer.iteration < self.config.iterations and not self._hacked:
            self._stop_if_asked(stop, start)
            done = self._step(start)
            self._keep_microbatches(console)
            if self.config.eval.every and self.trainer.iteration % self.config.eval.every == 0:
                done.record.update(self._validate(done.record, console))
            self._warn_of_lost_pictures(console)
            if self.ranks.is_main:
                self._keep(done, console)
            if self._due(self.config.checkpoint.every) or self._hacked:
                self._checkpoint(time.perf_counter() - start)
            with self._aside("writing summary.json", console):
                self._write_summary(start, "running")
        self._stop_if_asked(stop, start)
        self.trainer.check_frozen()
        which = f", as it was after iteration {self.best.iterations}" if self.best else ""
        console.say(f"evaluating the trained model{which} on {len(self.held_out.test)} pictures")
        weights = Best.NAME if self.best else self.trainer.evaluated_weights
        self._evaluate("after", weights, console)
        self._warn_of_lost_pictures(console)
        name = "lora" if self.config.model.weights == "lora" else self.policy.denoiser_name
        whole = self.folder.weights(name)  # a run that is killed here leaves no half of it
        with whole if self.ranks.is_main else nullcontext() as folder:
            self.policy.save(folder, weights)

    def _step(self, start: float) -> Iteration:
        """The next iteration. Where a reward ends the run before anything of it was learnt, what was trained until then is saved."""
        before = self.trainer.totals.state_dict()
        try:
            done = self.trainer.step()
            self._require_lock()
            return done
        except (MissingScoresError, Refusal) as error:
            together = isinstance(error, MissingScoresError) or self.ranks.world == 1  # all save; one alone may refuse
            if self.trainer.iteration and self.trainer.untouched and together:
                self._checkpoint(time.perf_counter() - start, before)
            raise

    def _keep_microbatches(self, console: Console) -> None:
        """Those that memory was found not to be enough for were halved; a resumed run begins with what fits."""
        if self.trainer.config is self.config:
            return
        self.config = self.trainer.config
        if self.ranks.is_main:
            self.folder.write_config(to_dict(self.config))
            sizes = f"sampling.microbatch {microbatch(self.config.sampling)}, optim.microbatch {microbatch(self.config.optim)}"
            console.warn(f"out of memory: going on with {sizes}")

    def _stop_if_asked(self, stop: Stop, start: float) -> None:
        """Between two iterations: where a signal came, save and end."""
        if (signal := stop.asked()) is None:
            return
        self._checkpoint(time.perf_counter() - start)
        raise Interrupted(
            f"{signal.name} after {self.trainer.iteration} of {self.config.iterations} iterations; all is saved, go on with:"
            f" {self.folder.command('resume')}",
            signal,
        )

    def _encode_all(self) -> None:
        """Every prompt that this process will meet is encoded once, and the text encoders leave memory."""
        done, wanted = self.trainer.iteration, self.config
        ahead = self.trainer.order.ahead(done, wanted.iterations, wanted.prompts.per_iteration)
        watched = self.held_out.validation if self.config.eval.every else ()
        prompts = {id(prompt): prompt for prompt in chain(ahead, self.held_out.test, watched)}
        # one by one: the policy keeps the rows on the CPU, the device never holds them all
        for prompt in prompts.values():
            self.policy.encode([prompt])
        self.policy.release_text_encoders()

    def _due(self, every: int) -> bool:
        done = self.trainer.iteration
        return done == self.config.iterations or (every > 0 and done % every == 0)

    def _keep(self, done: Iteration, console: Console) -> None:
        judge = self.trainer.judge
        if judge.units is not None and judge.recorded is None:  # before the record: no decision without its grounds
            self.folder.write_costs(asdict(judge.units))
            judge.recorded = judge.units
        self.folder.append_metrics(done.record)
        console.iteration(done.record)
        self._say_of_plan(done.record, console)
        if done.audit is not None:
            with self._aside("writing an audit", console):
                self.folder.write_audit(done.audit.record(done.record["iteration"]), done.audit.pictures_GSHWC)
        if self._due(self.config.checkpoint.every):
            with self._aside("writing samples", console):
                self.folder.save_samples(done.record["iteration"], done.rollout.pictures.images_NHWC[:32].numpy())

    def _say_of_plan(self, record: Mapping[str, Any], console: Console) -> None:
        """Once when the plan turns out not to pay, and whenever another one takes over."""
        value, path = record.get("plan/value"), record.get("plan/path")
        if value is None or path is None:
            return
        if self.config.plan.adaptive and path != self._path:
            points = ", ".join(f"{p.keep} after step {p.step}" for p in self.trainer.plan.active_points())
            console.say(f"plan: groups of {' -> '.join(map(str, path))} from here on ({points or 'no prune point'})")
        elif value < 1 and (self._plan_value is None or self._plan_value >= 1):
            console.warn(
                f"the plan {' -> '.join(map(str, path))} is expected to bring {value:.2f} x the learning signal a second of plain"
                " GRPO (plan.preset none); prune where previews rank better, preview cheaper, or set plan.adaptive"
            )
        self._plan_value, self._path = value, path

    def _evaluate(self, when: str, weights: str, console: Console) -> None:
        """On the test prompts, for the summary."""
        result = self._measure(self.held_out.test, weights, console, diverse=DIVERSE_PROMPTS)
        self._require_lock()
        if self.ranks.is_main:
            self.folder.write_evaluation(when, result.records, result.pictures_NHWC)

    def _validate(self, record: Mapping[str, Any], console: Console) -> dict[str, float | None]:
        """On the validation prompts after the iteration of that record, for the curves."""
        result = self._measure(self.held_out.validation, self.trainer.evaluated_weights, console)
        by = self.config.eval.best_by
        reward = result.held_out()[by] if by else result.mean("graded")
        if self.config.eval.keep_best and reward is not None and (self.best is None or reward > self.best.reward):
            self.best = Best(self.trainer.iteration, reward)
            self.policy.named_weights.snapshot(Best.NAME, self.trainer.evaluated_weights)
        kl = kl_to_reference(
            self.policy,
            self.trainer.evaluated_weights,
            self.held_out.validation,
            self._ode,
            self.config.eval.seed,
        )
        self._watch_for_hacking(result, kl, record.get("rollout/diversity"), console)
        own = {f"eval/{name}": result.mean(name) for name in ("graded", "strict", "judge", *STATISTICS)}
        own |= {} if kl is None else {"eval/kl": kl}
        return own | {f"eval/held_out@{name}": value for name, value in result.held_out().items()}

    @property
    def _ode(self) -> Sampling:
        """How evaluations sample."""
        wanted, size = self.config.eval, microbatch(self.trainer.config.sampling)
        return ode(self.policy, wanted.num_inference_steps, wanted.guidance_scale, size)

    def _watch_for_hacking(
        self, result: Evaluation, kl: float | None, diversity: float | None, console: Console
    ) -> None:
        """The main process compares, and all end together where that is asked for. `diversity` is the last iteration's."""
        if self.config.watch.hacking == "off":
            return
        if self.ranks.is_main:
            witnesses = {"the judge's share": result.column("judge")} | {
                f"the held-out {name}": [r["held_out"][name] for r in result.records] for name in result.held_out()
            }
            recent = [*(r.get("rollout/diversity") for r in self.folder.read_metrics()[-4:]), diversity]
            statistics = {name: result.column(name) for name in STATISTICS} | {"diversity within groups": recent}
            found = self._hacking.look(result.column("graded"), witnesses, statistics, kl)
            for sentence in found:
                self._warn(f"the model may be learning to please the reward alone: {sentence}", console)
        ended = self.config.watch.hacking == "stop" and self._hacking.alarms >= 2
        self._hacked = self.ranks.gather([ended])[0]
        if self._hacked:
            console.say("training ends here: the same was seen at two evaluations in a row (watch.hacking stop)")

    def _measure(self, prompts: Sequence[Prompt], weights: str, console: Console, diverse: int = 0) -> Evaluation:
        def sample(meter: Meter) -> Evaluation:
            return evaluate(
                self.policy,
                self.reward,
                self.held_out.judge,
                prompts,
                self._ode,
                self.config.eval.seed,
                self.ranks,
                diverse=diverse,
                held_out=self.held_out.rewards,
            )

        with self.policy.weights(weights):
            result = self.trainer.within_memory(sample, Meter())
        self.trainer.check_failures(f"evaluation after {self.trainer.iteration} iterations")
        if self.held_out.rewards is not None:  # they report: that one is down must not stop what is trained
            for failed in self.ranks.gather([self.held_out.rewards.failures()]):
                if any(failed.missing.values()):
                    lost = ", ".join(
                        f"{count} of {failed.asked[name]} of {name}" for name, count in failed.missing.items() if count
                    )
                    console.warn(
                        f"held-out rewards: {lost} are missing; last error: {failed.last_error or 'none was given'}"
                    )
        return result

    def _checkpoint(self, wall_seconds: float, totals: Mapping[str, Any] | None = None) -> None:
        """As after the last iteration. `totals` take the place of those that the next one has begun to count in."""
        self._require_lock()
        start = time.perf_counter()
        best = None if self.best is None else asdict(self.best)
        state = {
            **self.trainer.state_dict(),
            "best": best,
            "plan_value": self._plan_value,
            "wall_seconds": wall_seconds,
        }
        state |= {"hacking": self._hacking.state_dict(), "hacked": self._hacked, "warnings": self._warnings}
        state |= {
            "prompts": self.prompts,
            "weights": dict(self.policy.fingerprints),
            "totals": totals or state["totals"],
        }
        if self.ranks.is_main:
            checkpoints.save(self.folder.path, state, self.config)
        self.trainer.totals.add_seconds({"checkpoint": time.perf_counter() - start})

    # --- the summary --------------------------------------------------------------------------------------------------

    def _what_runs(self) -> str:
        plan, config = self._plan_costs(), self.config
        path = " -> ".join(map(str, plan["path"]))
        terms = config.reward.terms
        mixed = f", rewarded by {' + '.join(term.to_text() for term in terms)}, pruned on the {self._selected_on()}"
        return (
            f"{config.recipe}: groups of {path} by {config.plan.selector}{mixed if len(terms) > 1 else ''}, {config.prompts.per_iteration} prompts an"
            f" iteration, {self.trainer.predicted().nfe:,} NFE each; run folder {self.folder.path}"
        )

    def _selected_on(self) -> str:
        gdpo = self.config.objective.advantage == "gdpo"
        return "sum of rewards normalised in their group" if gdpo else "weighted sum of rewards"

    def _plan_costs(self) -> dict[str, Any]:
        sampling = self.config.sampling
        return plan_summary(
            self.trainer.plan,
            sampling.num_inference_steps,
            trained_items(self.config),
            sampling.in_pairs,
            self.config.preview.ode_steps,
        )

    def _nfe_unpruned(self, iterations: int) -> int:
        """NFE if no trajectory of the expanded groups were pruned."""
        sampling = self.trainer.sampling
        per_call = sampling.nfe_per_call * sampling.num_inference_steps
        return self.trainer.plan.group_size * per_call * self.config.prompts.per_iteration * iterations

    def _require_lock(self) -> None:
        """Before something is written: LockLostError where another run has taken the folder over, which took this one for dead."""

        def check() -> None:
            if self._lock is not None:
                self._lock.check()

        self.ranks.from_main(check)

    def _write_summary(self, start: float, status: str) -> None:
        if not self.ranks.is_main or (self._lock is not None and self._lock.lost_to is not None):
            return
        config, totals, done = self.config, self.trainer.totals, self.trainer.iteration
        costs = self._plan_costs()
        agreement: dict[int, float | None] = {}
        with suppress(
            ValueError, LookupError, TypeError
        ):  # of an audit's file that somebody changed: the report says so
            agreement = _agreement(self.folder.read_audits())
        unpruned, none = self._nfe_unpruned(done), preset("none", config.sampling.num_inference_steps)
        plain = prompt_cost(config, none).nfe * config.prompts.per_iteration * done
        self.folder.write_summary(
            {
                "recipe": config.recipe,
                "seed": config.seed,
                "iterations": done,
                "wall_seconds": time.perf_counter() - start,
                "status": status,
                **self._before_after(),
                "best_iterations": None if self.best is None else self.best.iterations,
                "nfe": totals.counted.nfe,
                "nfe_saved": 1 - totals.counted.nfe / unpruned if unpruned else None,
                "nfe_ratio_to_none": totals.counted.nfe / plain if plain else costs["nfe_ratio_to_none"],
                "preview_rank_correlation": {
                    str(p.step): agreement.get(p.step) for p in self.trainer.plan.active_points()
                },
                "preview_rank_correlation_by_step": {str(step): value for step, value in agreement.items()},
                "cost": {
                    "predicted": asdict(totals.predicted),
                    "counted": asdict(totals.counted),
                    "audit": asdict(totals.audited),
                },
                "plan": {
                    "value": self._plan_value,
                    "path": costs["path"],
                    "prune_steps": costs["prune_steps"],
                    "selector": config.plan.selector,
                    "num_inference_steps": config.sampling.num_inference_steps,
                },
                "rewards": {
                    "weights": dict(self.reward.weights),
                    "selected_on": self._selected_on(),
                    "asked": totals.asked,
                    "missing": totals.missing,
                    "last_error": totals.last_error,
                },
                "missing_pictures": totals.lost,
                "warnings": self._warnings,
                "seconds_by_stage": totals.seconds,
                "versions": checkpoints.versions(config),
                "device": _device(self.ranks.device),
                "command": " ".join([*(Path(program).name for program in sys.argv[:1]), *sys.argv[1:]]),
            }
        )

    def _before_after(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for when in ("before", "after"):
            found = Evaluation(self.folder.read_evaluation(when), np.empty(0))
            out[f"reward_{when}"] = found.mean("graded")
            out[f"accuracy_{when}"] = found.mean("strict")
            out[f"judge_{when}"] = found.mean("judge")
            out[f"diversity_{when}"] = found.mean("diversity")
            out[f"held_out_{when}"] = found.held_out()
            out[f"accuracy_by_kind_{when}"] = found.strict_by_kind()
        return out


def _agreement(audits: Sequence[Mapping[str, Any]]) -> dict[int, float | None]:
    """Spearman of the previews in use and final rewards by step, mean over the audit groups that have variance."""
    by_step: dict[int, list[float]] = {}
    for record in audits:
        for step, scores in zip(record["steps"], record.get("used", record["scores"]), strict=True):
            value = spearman(scores, record["final"])
            by_step.setdefault(step, []).extend([] if value is None else [value])
    return {step: float(np.mean(values)) if values else None for step, values in sorted(by_step.items())}


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}"
