"""The trackers, by what their own files hold. `make trackers-test` brings the packages that are not in .venv."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from progrpo.checks import check
from progrpo.config import Config, config_from_json, to_dict
from progrpo.tracking.run_folder import RunFolder
from progrpo.tracking.settings import TRACKERS, TrackingSettings
from progrpo.tracking.tracker import TrackedRun, Trackers, open_trackers, require_installed

CONFIG = {"seed": 3, "model": {"path": "shapes-flow"}, "reward": {"terms": [{"name": "shapes"}]}}
PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
OWN = f"{__name__}:FileTracker"


class FileTracker:
    """A user's tracker: a line of JSON for each call."""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self.file = (run.folder / "own.jsonl").open("a")

    def write(self, kind: str, value: Any, step: int | None = None) -> None:
        self.file.write(json.dumps([kind, step, value]) + "\n")
        self.file.flush()

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self.write("metrics", dict(metrics), step)

    def log_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        self.write("images", {name: image.tolist() for name, image in images.items()}, step)

    def log_config(self, config: Mapping[str, object]) -> None:
        self.write("config", config)

    def close(self) -> None:
        self.write("closed", None)
        self.file.close()


class DeafTracker:
    def __init__(self, run: TrackedRun) -> None:
        raise OSError("no way out")


def refuse(sentence: str) -> None:
    raise AssertionError(sentence)


def opened(folder: Path, *names: str, resumed_at: int | None = None) -> Trackers:
    return open_trackers(TrackingSettings(names), RunFolder(folder), resumed_at, refuse)


def killed_and_resumed(folder: Path, name: str) -> None:
    """Four iterations of which the checkpoint knows two, and then the run goes on from it to five."""
    trackers = opened(folder, name)
    trackers.log_config(CONFIG)
    trackers.log({"test/graded": 0.25}, 0)
    for step in range(4):
        trackers.log({"iteration": step, "reward/mean": step / 2, "update/kl": None, "plan/path": [8, 4]}, step)
    trackers.log_images({"samples": PICTURE}, 3)
    trackers.close()
    trackers = opened(folder, name, resumed_at=2)
    trackers.log_config({**CONFIG, "iterations": 5})
    for step in range(2, 5):
        trackers.log({"iteration": step, "reward/mean": step / 2}, step)
        if step == 3:
            trackers.log_images({"samples": PICTURE}, 3)
    trackers.log({"test/graded": 0.75}, 5)
    trackers.close()


REWARDS = [(step, step / 2) for step in range(5)]
GRADED = [(0, 0.25), (5, 0.75)]


# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_configuration_names_trackers_and_an_older_one_names_none():
    config = config_from_json(json.dumps({"tracking": {"to": ["tensorboard", "my.module:Mine"], "name": "first"}}))
    check(config)
    assert config.tracking == TrackingSettings(("tensorboard", "my.module:Mine"), "progrpo", "first")
    old = {name: value for name, value in to_dict(Config()).items() if name != "tracking"}
    assert config_from_json(json.dumps(old), of_run=True).tracking == TrackingSettings()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TrackingSettings(("mlflow",)), "tracking.to must be different names, each one of tensorboard, wandb, "),
        (TrackingSettings(("wandb", "wandb")), "tracking.to must be different names"),
        (TrackingSettings(project=""), "tracking.project must be a name of letters"),
        (TrackingSettings(name="a/b"), "tracking.name must be .* or empty for the run folder's name"),
    ],
)
def test_what_is_no_tracker_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check(Config(tracking=settings))


def test_a_missing_package_is_named_with_the_command(monkeypatch, tmp_path):
    require_installed(TrackingSettings())
    (tmp_path / "wandb").mkdir()  # as W&B leaves one; Python would import it as an empty package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in TRACKERS:
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(
            ValueError, match=rf"^tracking.to {name} needs {name}, .*: pip install 'progrpo\[{name}\]'$"
        ):
            require_installed(TrackingSettings((name,)))
    with pytest.raises(ValueError, match=r"^tracking.to 'no_such_module:Mine': there is no module"):
        require_installed(TrackingSettings(("no_such_module:Mine",)))


# --- any tracker ------------------------------------------------------------------------------------------------------


def lines(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "own.jsonl").read_text().splitlines()]


def test_a_users_tracker_gets_the_config_numbers_and_pictures_and_no_step_twice(tmp_path):
    killed_and_resumed(tmp_path, OWN)
    got = lines(tmp_path)
    assert [value for kind, _, value in got if kind == "config"] == [CONFIG, {**CONFIG, "iterations": 5}]
    metrics = [(step, value) for kind, step, value in got if kind == "metrics"]
    assert [(step, value["reward/mean"]) for step, value in metrics if "reward/mean" in value] == REWARDS
    assert [(step, value["test/graded"]) for step, value in metrics if "test/graded" in value] == GRADED
    assert {name for _, value in metrics for name in value} == {"reward/mean", "test/graded"}
    assert [(step, value) for kind, step, value in got if kind == "images"] == [(3, {"samples": PICTURE.tolist()})]


def test_a_resumed_run_keeps_its_id_and_name_and_a_new_one_has_another(tmp_path):
    def state(**options: Any) -> dict[str, Any]:
        opened(tmp_path, OWN, **options).close()
        return json.loads((tmp_path / "trackers.json").read_text())

    first = state()
    assert first["name"] == tmp_path.name and first["project"] == "progrpo" and len(first["id"]) == 8
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    moved.rename(tmp_path)
    assert state(resumed_at=1) == first
    assert state()["id"] != first["id"]


def test_a_tracker_that_fails_warns_once_and_the_others_go_on(tmp_path):
    warnings: list[str] = []
    run = TrackedRun(tmp_path, "progrpo", "x", "0" * 8)
    broken, whole = FileTracker(run), FileTracker(run)
    broken.file.close()
    trackers = Trackers({"mine": broken, "whole": whole}, warnings.append)
    trackers.log_config(CONFIG)
    trackers.log({"reward/mean": 1.0}, 0)
    trackers.log_images({"samples": PICTURE}, 0)
    trackers.close()
    assert [kind for kind, *_ in lines(tmp_path)] == ["config", "metrics", "images", "closed"]
    (warning,) = warnings
    assert warning.startswith("the tracker mine failed (") and "ValueError: I/O operation on closed file" in warning


def test_a_tracker_that_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(ValueError, match=rf"^tracking.to {__name__}:DeafTracker cannot be opened \(.*no way out\)"):
        opened(tmp_path, OWN, f"{__name__}:DeafTracker")
    assert lines(tmp_path) == [["closed", None, None]]


def test_without_trackers_nothing_is_written(tmp_path):
    opened(tmp_path).log({"reward/mean": 1.0}, 0)
    assert not list(tmp_path.iterdir())


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_reads_back_what_was_logged_with_the_repeated_steps_purged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed_and_resumed(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == REWARDS
    assert [(e.step, e.value) for e in events.Scalars("test/graded")] == GRADED
    (picture,) = events.Images("samples")
    assert (picture.step, picture.width, picture.height) == (3, 6, 4)
    (before, after) = events.Tensors("config/text_summary")
    assert b"shapes-flow" in before.tensor_proto.string_val[0]
    assert b'"iterations": 5' in after.tensor_proto.string_val[0]


def test_a_run_that_overwrites_another_takes_its_event_files_and_id_away(tmp_path):
    pytest.importorskip("tensorboard")
    run = RunFolder.create(tmp_path / "run")
    run.log_config({})
    opened(run.path, "tensorboard").close()
    (run.path / "tensorboard" / "notes.txt").write_text("mine")
    RunFolder.create(run.path, overwrite=True)
    assert [path.name for path in run.path.rglob("*") if path.is_file()] == ["notes.txt"]


# --- the clients of servers, without one ------------------------------------------------------------------------------


def logged_apart(folder: Path, name: str, **environment: str) -> None:
    """Call `killed_and_resumed` in a process whose proxies lead nowhere: clients keep threads and streams."""
    call = f"test_trackers.killed_and_resumed(Path({str(folder)!r}), {name!r})"
    script = f"from pathlib import Path; import test_trackers; {call}"
    paths = [str(Path(__file__).parent), *sys.path]
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **nowhere, "PYTHONPATH": os.pathsep.join(paths), "HOME": str(folder), **environment},
        check=True,
        cwd=folder,
        timeout=100,
    )


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, 7 bytes of header, then chunks in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 0 < (left := -at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack("<4xHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last chunk of one
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def test_wandb_offline_goes_on_with_the_same_run(tmp_path):
    pytest.importorskip("wandb")
    logged_apart(tmp_path, "wandb", WANDB_MODE="offline")
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    records = [record for path in files for record in wandb_records(path)]
    run_id = json.loads((tmp_path / "trackers.json").read_text())["id"]
    assert len(files) == 2 and {r.run.run_id for r in records if r.HasField("run")} == {run_id}
    assert {(r.run.project, r.run.display_name) for r in records if r.HasField("run")} == {("progrpo", tmp_path.name)}
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    for name, expected in (("reward/mean", REWARDS), ("test/graded", GRADED)):
        assert [(row["iteration"], row[name]) for row in rows if name in row] == expected
    (picture,) = [row for row in rows if "samples/path" in row]
    assert (picture["iteration"], picture["samples/width"], picture["samples/height"]) == (3, 6, 4)
    config = {u.key: json.loads(u.value_json) for r in records if r.HasField("config") for u in r.config.update}
    assert config == {**CONFIG, "iterations": 5}


def test_trackio_goes_on_with_the_same_run_in_its_local_store(tmp_path):
    pytest.importorskip("trackio")
    logged_apart(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "store"))
    read = (
        "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as store;"
        " (run,) = trackio.Api().runs('progrpo');"
        " print(json.dumps([run.name, run.config, store.get_logs('progrpo', run.name)]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRACKIO_DIR": str(tmp_path / "store")}
    done = subprocess.run([sys.executable, "-c", read], env=environment, check=True, capture_output=True, text=True)
    name, config, rows = json.loads(done.stdout.splitlines()[-1])
    assert name == f"{tmp_path.name}-{json.loads((tmp_path / 'trackers.json').read_text())['id']}"
    assert config["model"] == CONFIG["model"]
    for metric, expected in (("reward/mean", REWARDS), ("test/graded", GRADED)):
        assert [(row["step"], row[metric]) for row in rows if metric in row] == expected
    (picture,) = [row for row in rows if "samples" in row]
    assert picture["step"] == 3 and (tmp_path / "store/media" / picture["samples"]["file_path"]).is_file()


def test_swanlab_offline_goes_on_with_the_same_run(tmp_path):
    pytest.importorskip("swanlab")
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    logged_apart(tmp_path, "swanlab", SWANLAB_MODE="offline")
    records = []
    for path in sorted(tmp_path.glob("swanlog/run-*/*.swanlab")):
        reader = DataStoreReader()
        reader.open(path)
        records += [Record.FromString(data) for data in reader]
        reader.close()
    run_id = json.loads((tmp_path / "trackers.json").read_text())["id"]
    assert [(r.start.id, r.start.name) for r in records if r.HasField("start")] == [(run_id, tmp_path.name)] * 2
    scalars = [(r.scalar.key, r.scalar.step, r.scalar.value.number) for r in records if r.HasField("scalar")]
    assert [value for key, *value in scalars if key == "reward/mean"] == [list(pair) for pair in REWARDS]
    assert [value for key, *value in scalars if key == "test/graded"] == [list(pair) for pair in GRADED]
    assert [(r.media.key, r.media.step) for r in records if r.HasField("media")] == [("samples", 3)]
    configs = sorted(tmp_path.glob("swanlog/run-*/files/config.yaml"))
    assert "shapes-flow" in configs[0].read_text()
