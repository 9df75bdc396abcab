"""A run's trackers: what they are given, also by a run that was stopped and resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

import progrpo
from progrpo.config import EvalSettings, TrackingSettings
from progrpo.tracking.tracker import TrackedRun


class FileTracker:
    """A user's tracker. Of pictures it keeps the size."""

    def __init__(self, run: TrackedRun) -> None:
        self.path = run.folder / "own.jsonl"

    def _write(self, kind: str, value: Any, step: int | None = None) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([kind, step, value]) + "\n")

    def log(self, metrics: Any, step: int) -> None:
        self._write("metrics", metrics, step)

    def log_images(self, images: Any, step: int) -> None:
        self._write("images", {name: image.shape for name, image in images.items()}, step)

    def log_config(self, config: Any) -> None:
        self._write("config", config)

    def close(self) -> None:
        self._write("closed", None)


class FailingTracker(FileTracker):
    def log(self, metrics: Any, step: int) -> None:
        raise ConnectionError("the network is gone")


class ClosedTracker(FileTracker):
    def __init__(self, run: TrackedRun) -> None:
        raise PermissionError("no login")


def by_name(tracker: type) -> str:
    return f"{tracker.__module__}:{tracker.__name__}"


@pytest.fixture(scope="module")
def resumed(tiny_pipeline, tiny_config, prompts, redness, tmp_path_factory):
    """Two iterations and then two more, with an evaluation on the way after each second one."""
    out = tmp_path_factory.mktemp("tracking") / "run"
    tracking = TrackingSettings(("tensorboard", by_name(FileTracker)), name="first")
    config = tiny_config(tracking=tracking, eval=EvalSettings(pictures=3, num_inference_steps=3, every=2))
    progrpo.train(tiny_pipeline(), prompts, redness, config=config, out=out)
    elsewhere = replace(tracking, project="other", name="second")  # a resumed run keeps what it is known by
    longer = replace(config, iterations=4, tracking=elsewhere)
    return progrpo.train(tiny_pipeline(), prompts, redness, config=longer, out=out, mode="resume")


def calls_of(run: Any, kind: str) -> list[tuple[int | None, Any]]:
    lines = [json.loads(line) for line in (run.path / "own.jsonl").read_text().splitlines()]
    return [(step, value) for name, step, value in lines if name == kind]


def test_a_tracker_gets_each_record_once_with_the_evaluations_and_pictures(resumed):
    run = resumed
    records: Any = run.metrics.read()
    logged = calls_of(run, "metrics")
    assert len(records) == 4 and [step for step, _ in logged] == [0, 0, 1, 2, 2, 3, 4]  # test, 0, 1, test, 2, 3, test
    of_iterations = [(step, values) for step, values in logged if "reward/mean" in values]
    for record, (step, values) in zip(records, of_iterations, strict=True):
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        assert {"iteration": step, **values} == numbers
    assert ["eval/graded" in values for _, values in of_iterations] == [False, True, False, True]
    summary = run.summary.read()
    tests = [(step, values["test/graded"]) for step, values in logged if "test/graded" in values]
    assert [step for step, _ in tests] == [0, 2, 4]
    assert (tests[0][1], tests[-1][1]) == (summary["reward_before"], summary["reward_after"])
    assert next(values for _, values in logged)["test/diversity"] == summary["diversity_before"]
    pictures = calls_of(run, "images")
    assert [step for step, images in pictures if "samples" in images] == [0, 1, 2, 3]
    assert [step for step, images in pictures if "test/pictures" in images] == [0, 2, 4]
    assert [len(calls_of(run, kind)) for kind in ("config", "closed")] == [2, 2]
    assert calls_of(run, "config")[0][1]["iterations"] == 2 and calls_of(run, "config")[1][1]["iterations"] == 4
    state = json.loads((run.path / "trackers.json").read_text())
    assert (state["project"], state["name"]) == ("progrpo", "first")


def test_tensorboard_shows_the_run_as_it_is_in_its_folder(resumed):
    run = resumed
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    records: Any = run.metrics.read()
    for name in ("reward/mean", "update/grad_norm", "seconds"):
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (record["iteration"], pytest.approx(record[name])) for record in records
        ]
    # the evaluation at the end of the first part is purged with all that a longer run logs again
    assert [e.step for e in events.Scalars("test/graded")] == [0, 4]
    assert [e.step for e in events.Images("samples")] == [0, 1, 2, 3]
    last = events.Images("samples")[-1]
    assert (last.width, last.height) == Image.open(run.path / "samples" / "0003.png").size


def test_a_tracker_that_fails_leaves_the_run_alone(tiny_pipeline, tiny_config, prompts, redness, tmp_path, capsys):
    config = tiny_config(tracking=TrackingSettings((by_name(FailingTracker),)))
    run = progrpo.train(tiny_pipeline(), prompts, redness, config=config, out=tmp_path / "run")
    warnings = [w for w in run.summary.read()["warnings"] if "tracker" in w]
    assert len(warnings) == 1 and "ConnectionError: the network is gone" in warnings[0]
    assert run.summary.read()["status"] == "finished" and len(run.metrics.read()) == 2
    assert capsys.readouterr().out.count("the network is gone") == 1
    assert calls_of(run, "images") and calls_of(run, "closed")


def test_a_tracker_that_cannot_be_opened_ends_the_run_at_its_beginning(
    tiny_pipeline, tiny_config, prompts, redness, tmp_path
):
    config = tiny_config(tracking=TrackingSettings((by_name(ClosedTracker),)))
    with pytest.raises(ValueError, match=r"ClosedTracker cannot be opened \(.*PermissionError: no login\)"):
        progrpo.train(tiny_pipeline(), prompts, redness, config=config, out=tmp_path / "run")
    assert not (tmp_path / "run" / "evaluation").exists()


@pytest.mark.parametrize("name", ["wandb", "no_such_module:Mine"])
def test_a_tracker_that_is_not_there_is_refused_before_a_model_is_loaded(
    name, tiny_config, prompts, redness, tmp_path, monkeypatch
):
    monkeypatch.setattr("progrpo.tracking.tracker._is_installed", lambda package: False)
    config = tiny_config(tracking=TrackingSettings((name,)))
    with pytest.raises(ValueError, match=r"pip install 'progrpo\[wandb\]'|there is no module 'no_such_module'"):
        progrpo.train(None, prompts, redness, config=config, out=tmp_path / "run")
    assert not list(tmp_path.iterdir())
