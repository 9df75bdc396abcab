"""Checkpoints of a run: they are saved, tidied, and found and compared again when a run is resumed."""

from __future__ import annotations

import errno
import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError

from progrpo import __version__
from progrpo.config import Config, RewardTerm, config_to_json, from_python, learning_rate, negative_weight, to_dict
from progrpo.durable import PREVIOUS, WRITING, DiskError, sync
from progrpo.messages import quoted
from progrpo.storage import disk_error, load_state, save_state
from progrpo.tracking.commands import restart_command, resume_command
from progrpo.tracking.console import Console
from progrpo.tracking.lock import Lock, only_writer
from progrpo.training.distributed import Ranks
from progrpo.training.state import SavedState, State
from progrpo.types import Prompt

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
_OPTIMIZER_PACKAGES = {"adamw_8bit": ("bitsandbytes",)}
_FOLDER = "checkpoints"
_NAME = "iteration_"
_MAY_DIFFER = (
    "iterations",
    "sampling.microbatch",
    "optim.microbatch",
    "tracking.to",
    "tracking.project",
    "tracking.name",
)
"""Settings that a run may change on its way: its length, how memory divides the work, and where it reports to."""
_FIXED = (
    "model.weights",
    "model.lora_rank",
    "model.lora_alpha",
    "model.lora_targets",
    "model.lora_rank_pattern",
    "model.lora_alpha_pattern",
    "model.lora_use_dora",
    "objective.name",
    "optim.name",
    "prompts.order",
    "sampling.num_inference_steps",
)
"""Settings without which a checkpoint's weights, averages and observations mean nothing, so that they cannot change."""
_OF_EVALUATIONS = (
    "model.resolution",
    "model.frames",
    "model.max_sequence_length",
    "model.step_ends",
    "model.decoding",
    "sampling.negative_prompt",
    "reward.terms",
    "reward.frames",
    "eval.rewards",
    "eval.best_by",
    "eval.num_inference_steps",
    "eval.guidance_scale",
    "eval.seed",
)
"""Settings without which an evaluation of the same prompts does not compare with earlier ones."""

_OF_AUDITS = (
    "reward.terms",
    "reward.frames",
    "reward.noise",
    "objective.advantage",
    "preview.decoder",
    "preview.tiny_decoder",
    "preview.ode_steps",
    "preview.latent_reward",
)
"""Settings of scores and previews, without which audits do not compare with earlier ones."""
_OF_PLANS = ("sampling.same_latent", "sampling.sde_window", "sampling.sde_window_size", "sampling.sde_window_end")
"""Settings beside `plan` that decide at which steps a group's members differ, and so can be compared."""


def versions(config: Config) -> dict[str, str]:
    """The versions that a run's figures depend on, the package of its optimizer among them."""
    packages = (*_PACKAGES, *_OPTIMIZER_PACKAGES.get(config.optim.name, ()))
    return {"python": platform.python_version(), "progrpo": __version__} | {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a missing optimizer is refused when it is built
        return "not installed"


def save(run: Path, state: State, config: Config) -> None:
    """Write the checkpoint of `state["iteration"]`, then delete the oldest ones. OSError if the disk refuses."""
    folder = run / _FOLDER
    folder.mkdir(exist_ok=True)  # without its parents: a run folder that vanished is not made anew
    sync(run)
    whole = {**state, "config": to_dict(config), "versions": versions(config)}
    save_state(folder / f"{_NAME}{state['iteration']:06d}", whole)
    _tidy(run, state["iteration"], config.checkpoint.keep)


def saved(run: Path) -> list[Path]:
    """The checkpoints of a run by their names, oldest first; damaged ones are among them."""
    there = {path.with_name(path.name.removesuffix(PREVIOUS)) for path in (run / _FOLDER).glob(f"{_NAME}*")}
    return sorted((path for path in there if iteration_of(path) >= 0), key=iteration_of)


def iteration_of(path: Path) -> int:
    """The number of iterations that a checkpoint comes after; -1 for a name that is no checkpoint's."""
    number = path.name.removeprefix(_NAME)
    return int(number) if number.isascii() and number.isdigit() else -1


def _tidy(run: Path, iteration: int, keep: int) -> None:
    """Delete all but the last `keep` checkpoints up to this iteration, later ones, and the remains of killed writers.

    Later ones are damaged, since the run was resumed from before them. What cannot be deleted now is tried again next
    time.
    """
    checkpoints = saved(run)
    kept = [path for path in checkpoints if iteration_of(path) <= iteration][-keep:]
    unfinished = [path for end in (WRITING, PREVIOUS) for path in (run / _FOLDER).glob(f"{_NAME}*{end}")]
    for path in [*checkpoints, *unfinished]:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def newest(run: Path, ranks: Ranks, warn: Callable[[str], None]) -> SavedState:
    """The newest whole checkpoint, as the main process finds it. A damaged one is passed over with a warning.

    ValueError if there is none, or if it lacks what a run needs.
    """
    read: dict[Path, dict[str, Any]] = {}

    def find() -> Path:
        path, read[path] = _newest(run, warn)
        return path

    path = ranks.from_main(find)
    state = read.get(path) or load_state(path)
    lacking = [name for name in ("iteration", "config", "versions") if name not in state]
    if lacking:
        raise ValueError(f"{path} has no {lacking[0]}: it is of another version of progrpo; go on with that one")
    return cast(SavedState, _renamed(state, path, warn))


def _renamed(state: dict[str, Any], path: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """The state with the names of today in place of an older progrpo's."""
    if "pays" not in state:
        return state
    warn(
        f"{path.name} is of an older progrpo, which wrote the plan's value as plan/pays into metrics.jsonl;"
        " from here on it is plan/value"
    )
    return {("plan_value" if name == "pays" else name): value for name, value in state.items()}


def _newest(run: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    anew = f"start it anew with {restart_command(run)}"
    damaged: list[str] = []
    for path in reversed(saved(run)):
        try:
            state = load_state(path)
        except (ValueError, OSError) as error:
            damaged.append(str(error))
        else:
            for error_message in damaged:
                warn(f"checkpoint passed over: {error_message}; going on from {path.name}")
            return path, state
    if damaged:
        raise ValueError(f"{run} holds no whole checkpoint ({'; '.join(damaged)}); {anew}")
    raise ValueError(f"{run} holds no checkpoint yet; {anew}")


def check_unchanged(run: Path, saved_config: State, config: Config, accept: bool) -> None:
    """ValueError, with every differing field and both values, for another configuration than the checkpoint's.

    Where changes are accepted, only a field that cannot change is refused.
    """
    differing = {
        name: f"{name} was {quoted(was)} and is {quoted(now)}"
        for name, (was, now) in _differing(saved_config, config).items()
        if name not in _MAY_DIFFER
    }
    fixed = [difference for name, difference in differing.items() if name in _FIXED]
    if fixed or (differing and not accept):
        mend = (
            "put that back, since a checkpoint is of no use to a run with another, or start a new run"
            if fixed
            else f"put it back, or give {_accept(config)} to go on with it"
        )
        where = f"the configuration of {run}" if from_python(config) else run / "config.json"
        raise ValueError(f"{where} was changed since the checkpoint: {', '.join(fixed or differing.values())}; {mend}")


def evaluates_alike(saved_config: State, config: Config) -> bool:
    """Whether evaluations of the same prompts by both configurations compare."""
    return _differing(saved_config, config).keys().isdisjoint(_OF_EVALUATIONS)


def audits_alike(saved_config: State, config: Config) -> bool:
    """Whether previews and rewards of audits by both configurations compare."""
    return _differing(saved_config, config).keys().isdisjoint(_OF_AUDITS)


def plans_alike(saved_config: State, config: Config) -> bool:
    """Whether both configurations begin with the same plan, at steps at which members differ alike."""
    return not any(name.startswith("plan.") or name in _OF_PLANS for name in _differing(saved_config, config))


def _differing(saved_config: State, config: Config) -> dict[str, tuple[object, object]]:
    """The fields that differ, each with both values. A field that a checkpoint is too old to have is none."""
    was, now = flat(saved_config), flat(json.loads(config_to_json(config)))
    return {name: (was[name], value) for name, value in now.items() if name in was and was[name] != value}


def _accept(config: Config) -> str:
    """The option by which changes are accepted, on the command line or in the library."""
    return "mode='resume_changed'" if from_python(config) else "--accept-changes"


def digest(prompts: Iterable[Prompt]) -> str:
    """A digest of prompts: their texts and columns, in order. An object that is no plain value counts by its type."""
    sha256 = hashlib.sha256()
    for prompt in prompts:
        sha256.update(f"{prompt.text!r} {_canonical(prompt.columns)}\n".encode())
    return sha256.hexdigest()


def _canonical(value: object) -> str:
    """A text that is the same for equal values."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{_canonical(name)}: {_canonical(v)}' for name, v in value.items()))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_canonical, value))}]"
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, int):
        return hex(value)  # in decimals one may be too long for Python
    return repr(value) if value is None or isinstance(value, str | float) else type(value).__qualname__


def check_prompts(run: Path, was: Mapping[str, str], now: Mapping[str, str], config: Config, accept: bool) -> list[str]:
    """The kinds of prompts, training or evaluation, that are others than before. ValueError unless that is accepted.

    `was` and `now` are digests. A checkpoint from before there were digests has none, which is no change.
    """
    changed = _changed(was, now)
    if changed and not accept:
        sources = {"training": config.prompts.source, "evaluation": config.eval.prompts}
        which = " and ".join(f"{name} prompts ({sources[name]})" for name in changed)
        raise ValueError(
            f"the {which} of {run} are not those that it had until the checkpoint; put them back, or give"
            f" {_accept(config)} to go on with these"
        )
    return changed


def check_weights(run: Path, was: Mapping[str, str], now: Mapping[str, str], config: Config, accept: bool) -> bool:
    """Whether the model is the one that the run began with. ValueError, with its parts, unless another is accepted.

    `was` and `now` are fingerprints. A checkpoint from before there were fingerprints has none, which is no change.
    """
    changed = _changed(was, now)
    if changed and not accept:
        raise ValueError(
            f"the weights of {', '.join(changed)} ({config.model.path}) are not those that {run} began with; load the"
            f" model as it was then, or give {_accept(config)} to go on with this one"
        )
    return not changed


def _changed(was: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [name for name in now if name in was and was[name] != now[name]]


def check_versions(was: Mapping[str, str], config: Config, warn: Callable[[str], None]) -> None:
    """Warn of a checkpoint of other versions: the run goes on, but may not come to the same figures."""
    differing = [
        f"{name} {was.get(name, 'unknown')} -> {now}" for name, now in versions(config).items() if was.get(name) != now
    ]
    if differing:
        warn(
            f"the checkpoint is of other versions, so figures may differ from a straight run's: {', '.join(differing)}"
        )


def check_length(state: State, config: Config, warn: Callable[[str], None]) -> None:
    """Warn of another length of a run whose learning rate or weight of negative advantages depends on it."""
    was = replace(config, iterations=state["config"]["iterations"])
    done: int = state["iteration"]
    if config.iterations in (was.iterations, done):
        return
    jumps: list[tuple[str, Callable[[Config, int], float]]] = []
    if config.optim.decay:
        falls = f"the learning rate falls towards the run's end (optim.decay {config.optim.decay:g})"
        jumps.append((falls, learning_rate))
    weight = config.objective.loss.final_negative_weight
    if weight is not None and weight != config.objective.loss.negative_weight:
        changes = f"the weight of negative advantages changes up to the run's end (final_negative_weight {weight:g})"
        jumps.append((changes, negative_weight))
    for what, value_at in jumps:
        until, now = value_at(was, max(0, done - 1)), value_at(config, done)
        warn(
            f"{what}, which was after {was.iterations} and is after {config.iterations} iterations: it goes on with"
            f" {now:.3g} after {until:.3g}, so the run is not what one of {config.iterations} iterations from the start"
            " would be"
        )


def flat(tree: State, prefix: str = "") -> dict[str, object]:
    """The fields of nested settings, by their dotted names."""
    out: dict[str, object] = {}
    for name, value in tree.items():
        # of rewards: a field that a checkpoint is too old to have is at its default
        if isinstance(value, list):
            value = [{**asdict(RewardTerm("")), **v} if isinstance(v, Mapping) else v for v in value]
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return out


# --- the run's folder, while it writes --------------------------------------------------------------------------------


@contextmanager
def writing_to(run: Path, ranks: Ranks) -> Iterator[Lock | None]:
    """Run the block as the only one that writes to the run folder. DiskError, one sentence, if the disk refuses.

    The main process gets the folder's lock, the others None.
    """
    say = Console(0, enabled=ranks.is_main).say
    held = list[Lock]()
    with ExitStack() as locked:
        ranks.from_main(lambda: held.append(locked.enter_context(only_writer(run, say))))
        try:
            yield next(iter(held), None)
        except (OSError, SafetensorError) as error:
            first = _first(error, run)
            if not _is_of_disk(first, run):
                raise
            raise DiskError(
                f"{first.filename or run} cannot be written: {first.strerror}; {_mend(first, run)}"
            ) from error


def _first(error: OSError | SafetensorError, run: Path) -> OSError:
    """The first error of a chain: a full disk also refuses the summary that would report it."""
    while isinstance(error.__context__, OSError):
        error = error.__context__
    return disk_error(error, run) if isinstance(error, SafetensorError) else error


def _is_of_disk(error: OSError, run: Path) -> bool:
    """Whether an error is about the run's files, and not about a reward's server or a user's file."""
    own = isinstance(error.filename, str | Path) and Path(error.filename).is_relative_to(run)
    return own or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _mend(error: OSError, run: Path) -> str:
    if not run.is_dir():
        return "the run folder is gone, and its checkpoints with it; start the run anew"
    first = {errno.ENOSPC: "make space", errno.EDQUOT: "make space"}.get(error.errno or 0, "mend that")
    last = saved(run)
    if not last:
        return f"there is no checkpoint yet: {first}, then start anew with {restart_command(run)}"
    return f"the last good checkpoint is {last[-1].name}: {first}, then go on with {resume_command(run)}"
