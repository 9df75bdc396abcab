"""The entry points of a run by its configuration: train it, or resume it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from progrpo.checks import check
from progrpo.config import Config, from_python, to_dict
from progrpo.recipes import load_recipe
from progrpo.rewards.mixture import closed_where_refused
from progrpo.tracking.commands import is_of_python, resume_command
from progrpo.tracking.console import Console
from progrpo.tracking.run_folder import RunFolder
from progrpo.training import checkpoints
from progrpo.training.absolute_paths import with_absolute_paths
from progrpo.training.build import resolve_dtype
from progrpo.training.distributed import Ranks, explain_lost_process
from progrpo.training.equal_inputs import require_same_settings
from progrpo.training.inputs import RunInputs, inputs_from
from progrpo.training.loop import NO_CHECKPOINT, Resumption, TrainingLoop, resume_hint
from progrpo.training.run import Run
from progrpo.training.torch_state import default_torch_state


@default_torch_state()
def train_run(config: Config, out: Path, overwrite: bool = False) -> RunFolder:
    """Train a configuration into a new run folder. DiskError if the disk refuses what is written there."""
    check(config)
    if objects := from_python(config):
        options = ", ".join(f"--{name}" for name in objects)
        raise ValueError(
            f"{', '.join(objects)}: a run of progrpo.train had these as objects, which no name loads; give {options},"
            " or call progrpo.train again"
        )
    with explain_lost_process(lambda: NO_CHECKPOINT):
        ranks = Ranks()
        require_same_settings(ranks, config)
        config = resolve_dtype(with_absolute_paths(config), ranks)
        out = ranks.gather([out])[0]  # where it was chosen by what is free, another process may have chosen later
        run = Run(inputs_from(config, ranks), RunFolder(out), ranks)
    return start(run, overwrite)


@default_torch_state()
def resume_run(folder: Path, iterations: int | None = None, accept_changes: bool = False) -> RunFolder:
    """Go on from the newest whole checkpoint, exactly as the run would have gone. DiskError if the disk refuses.

    With other `iterations`, go on as a run of so many, unless its learning rate or its weight of negative advantages
    depends on their number (`optim.decay`, `final_negative_weight`). ValueError if the configuration, the prompts or
    the model were changed since, unless that is accepted.
    """
    config = load_recipe(str(folder))
    if is_of_python(folder):
        raise ValueError(
            f"{folder} is a run of progrpo.train, whose pipeline, prompts and rewards only Python has: go on with"
            f" {resume_command(folder)}, with these given again"
        )
    if iterations is not None:
        config = replace(config, iterations=iterations)
    check(config)
    with explain_lost_process(lambda: resume_hint(folder)):
        ranks = Ranks()
        require_same_settings(ranks, config)
        config = resolve_dtype(config, ranks)
        return resume(RunFolder(folder), config, lambda: inputs_from(config, ranks), ranks, accept_changes)


def start(run: Run, overwrite: bool) -> RunFolder:
    """Train a run from its beginning, in a new folder."""
    path = run.folder.path
    with explain_lost_process(lambda: resume_hint(path)), ExitStack() as writing:
        with closed_where_refused(run.inputs.rewards):
            lock = writing.enter_context(checkpoints.writing_to(path, run.ranks))
            run.create_folder(overwrite)
            loop = TrainingLoop(run, lock)
        return loop.train()


def resume(
    folder: RunFolder, config: Config, make_inputs: Callable[[], RunInputs], ranks: Ranks, accept_changes: bool
) -> RunFolder:
    """Go on with the run in a folder by this configuration. ValueError for a change since that is not accepted."""
    path = folder.path
    warn = Console(config.iterations, enabled=ranks.is_main).warn
    with explain_lost_process(lambda: resume_hint(path)), checkpoints.writing_to(path, ranks) as lock:
        state = checkpoints.newest(path, ranks, warn)
        checkpoints.check_unchanged(path, state["config"], config, accept_changes)
        checkpoints.check_versions(state["versions"], config, warn)
        if state["iteration"] > config.iterations:  # first, or the warning would name rates beyond the run's end
            raise ValueError(
                f"{path} is at iteration {state['iteration']}, past {config.iterations} iterations; give more"
            )
        checkpoints.check_length(state, config, warn)
        inputs = make_inputs()
        with closed_where_refused(inputs.rewards):
            changed = checkpoints.check_prompts(path, state.get("prompts", {}), inputs.digests, config, accept_changes)
        run = Run(inputs, folder, ranks)

        def go_back() -> None:
            folder.log_config(to_dict(config))
            folder.truncate(state["iteration"])

        with closed_where_refused(inputs.rewards):
            was, now = state.get("weights", {}), run.policy.fingerprints
            if not checkpoints.check_weights(path, was, now, config, accept_changes):
                changed = [*changed, "model"]
            ranks.from_main(go_back)
            loop = TrainingLoop(run, lock, Resumption(state, changed))
        return loop.train()
