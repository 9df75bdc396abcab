"""The evaluation of models on a suite, by a command that goes on where it was stopped."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from progrpo.rewards.mixture import RewardMixture, close_all
from progrpo.suites.page import write_results
from progrpo.suites.records import MeasuresRecord, ModelFolder, slug
from progrpo.suites.results import ModelRecords, SuiteResults, model_results, score_of
from progrpo.tracking.console import Console
from progrpo.training.build import judge_for
from progrpo.training.distributed import Ranks, explain_lost_process
from progrpo.training.suite_inputs import SuiteInputs, SuiteRequest, load_inputs
from progrpo.training.suite_work import SuiteWork
from progrpo.training.summary import command_line, device_name
from progrpo.training.trained_model import ModelChoice


@torch.no_grad()
def evaluate_suite(request: SuiteRequest) -> SuiteResults | None:
    """The result, which is also written into the folder `out`, in the main process alone.

    Several processes share the prompts out; all see the folder. Pictures and scores that are there are not made again.
    ValueError for pictures there that other settings made.
    """
    started = time.monotonic()
    base, base_id = request.base, request.base_id
    settings, negative_prompt = request.settings, request.guide_away_from
    others = [model for model in request.models if base is None or not request.draw_alike(model, base)]
    models = [*([] if base is None else [base]), *others]
    with ExitStack() as ending, explain_lost_process(lambda: "give the same command again, and it goes on"):
        ranks = Ranks()
        console = Console(0, enabled=ranks.is_main, file=sys.stderr)
        inputs = load_inputs(request, ranks)
        ending.callback(close_all, [RewardMixture(inputs.rewards)], console.warn)
        notes = list(inputs.notes)
        for note in notes:
            console.warn(note)
        judge = judge_for(request.suite.name)
        work = SuiteWork(inputs.grid, inputs.rewards, judge, settings, negative_prompt, ranks, console)
        folders = _open_folders(request, models, inputs, ranks)
        of_others = folders[len(models) - len(others) :]
        paths = [work.evaluate(model, folder, base_id) for model, folder in zip(others, of_others, strict=True)]
        if base is not None and base_id is not None:
            notes += work.evaluate_base(base, folders[0], base_id, list(zip(of_others, paths, strict=True)))
        if ranks.is_main:
            for folder in folders:
                work.measure_diversity(folder, inputs.diversity)
        ranks.wait_for_all()
    if not ranks.is_main:
        return None
    records = [
        ModelRecords(name, folder.path.name, folder.read(), _measures(folder, base_id), model is base)
        for name, model, folder in zip(_names(models), models, folders, strict=True)
    ]
    figures = model_results(inputs.grid, records, work.reward_names)
    result: SuiteResults = {
        "suite": request.suite.name,
        "paper": request.suite.paper,
        "score": score_of(figures, work.reward_names),
        "mean_of_kinds": inputs.grid.mean_of_kinds,
        "prompts": len(inputs.grid.prompts),
        "of_prompts": inputs.of_prompts,
        "pictures_per_prompt": inputs.grid.per_prompt,
        "prompts_digest": inputs.digest,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "negative_prompt": negative_prompt,
        "seed": settings.seed,
        "features": inputs.diversity.name,
        "kinds": inputs.grid.kinds,
        "models": figures,
        "notes": notes,
        "seconds": time.monotonic() - started,
        "device": device_name(ranks.device),
        "command": command_line(),
    }
    write_results(request.out, result, inputs.grid, records)
    return result


def _open_folders(
    request: SuiteRequest, models: Sequence[ModelChoice], inputs: SuiteInputs, ranks: Ranks
) -> list[ModelFolder]:
    """The folder of each model. ValueError for pictures that were made otherwise, and where a process sees none."""
    folders = [ModelFolder(request.out, name) for name in _names(models)]

    def open_all() -> None:
        for model, folder in zip(models, folders, strict=True):
            folder.open({**request.made_by(model), "prompts": inputs.digest})

    ranks.from_main(open_all)
    seen = all(folder.settings.written is not None for folder in folders)
    ranks.require_same({"whether --out is seen": str(seen)}, "give a folder on a disk that all of them see")
    return folders


def _measures(folder: ModelFolder, base_id: str | None) -> MeasuresRecord:
    """The measures of a folder, without a distance to another base than this command's."""
    measures = folder.measures.read()
    if measures.get("kl_to") != base_id or base_id is None:
        measures.pop("kl", None)
    return measures


def _names(models: Sequence[ModelChoice]) -> list[str]:
    """The names of models, each once: a second one of the same name gets a number."""
    names: list[str] = []
    for model in models:
        name = model.config.model.path if model.before else model.name
        alike = [other for other in names if slug(other) == slug(name)]
        names.append(f"{name} ({len(alike) + 1})" if alike else name)
    return names
