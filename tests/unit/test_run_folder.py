import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from progrpo.tracking.commands import restart_command, resume_command
from progrpo.tracking.grids import tile
from progrpo.tracking.own_files import new_weights
from progrpo.tracking.run_folder import RunFolder


def pictures(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 8, 6, 3), dtype=np.uint8)


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    RunFolder.create(tmp_path / "run").log_config({"seed": 1})
    with pytest.raises(ValueError, match=r"already holds a run \(config.json\); replace it with --overwrite"):
        RunFolder.create(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "iteration_000001").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"; resume it with progrpo train --resume .*run, replace it with --overwrite"):
        RunFolder.create(tmp_path / "run")


def test_the_command_that_goes_on_is_one_that_works(tmp_path):
    run = RunFolder.create(tmp_path / "my run")
    path = f"'{tmp_path}/my run'"
    assert resume_command(run.path) == f"progrpo train --resume {path}"
    run.log_config({"model": {"path": "shapes-flow"}})
    assert restart_command(run.path) == f"progrpo train {path} --out {path} --overwrite"
    run.log_config({"model": {"path": "a FluxPipeline given to progrpo.train"}})
    assert resume_command(run.path) == f"progrpo.train(..., out={path}, mode='resume')"
    assert restart_command(run.path) == f"progrpo.train(..., out={path}, mode='overwrite')"


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints/iteration_000002", "samples/0000.png"])
def test_what_is_left_of_a_run_is_not_mixed_with_another(tmp_path, left):
    (tmp_path / left).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"holds {left} of another run, whose config.json is gone.*--overwrite"):
        RunFolder.create(tmp_path)
    assert (tmp_path / left).exists()
    RunFolder.create(tmp_path, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").touch()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds transformer/config\.json but no run"):
            RunFolder.create(tmp_path, overwrite)
    assert (tmp_path / "transformer" / "config.json").exists()


def test_a_name_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^the run folder's name '/.*/a\\udcff' is not UTF-8 text; give another$"):
        RunFolder.create(f"{tmp_path}/a\udcff")


def test_what_is_no_path_is_refused():
    nothing: Any = None
    with pytest.raises(ValueError, match=r"^the run folder must be a str or a Path, not NoneType$"):
        RunFolder.create(nothing)


def test_an_empty_name_is_not_the_current_folder():
    with pytest.raises(ValueError, match="name is empty"):
        RunFolder.create("")


def test_overwriting_deletes_the_run_and_nothing_else(tmp_path):
    """The run's files go, and a folder only if that leaves it empty, since a user may have one of the same name."""
    mine = ("notes.txt", "samples/mine.txt", "audit/mine.json", "checkpoints/best/a.pt", "lora/README.md", "unet/x.png")
    for name in (*mine, "lora/pytorch_lora_weights.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    run = RunFolder(tmp_path)
    run.log_config({})
    run.log({"iteration": 0}, 0)
    run.log_images({"samples": tile(pictures(2), 2)}, 0)
    run.write_audit({"iteration": 0, "steps": []}, pictures(2, 1))
    run.write_evaluation("before", [{"prompt": "a"}], pictures(1))
    for left in ("checkpoints/iteration_000001", "checkpoints/iteration_000002.writing", "lora.previous"):
        (tmp_path / left).mkdir()
    (tmp_path / "lora.previous" / "pytorch_lora_weights.safetensors").touch()
    (tmp_path / "samples" / "0001.png.12.writing").touch()
    (tmp_path / "samples" / "novel.writing").touch()
    RunFolder.create(tmp_path, overwrite=True)
    there = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert there == sorted([*mine, "samples/novel.writing"])
    assert not (tmp_path / "evaluation").exists() and not (tmp_path / "lora.previous").exists()


def test_new_weights_leave_what_lies_beside_the_old(tmp_path):
    run = RunFolder.create(tmp_path)
    for version in ("old", "new"):
        with new_weights(run.path / "lora") as folder:
            (folder / "pytorch_lora_weights.safetensors").write_text(version)
        if version == "old":
            (tmp_path / "lora" / "README.md").write_text("mine")
            (tmp_path / "lora" / "pictures").mkdir()
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "README.md",
        "pictures",
        "pytorch_lora_weights.safetensors",
    ]
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").read_text() == "new"


def test_numbers_without_a_json_form_become_null(tmp_path):
    run = RunFolder.create(tmp_path)
    metrics: Any = {"iteration": np.int64(0), "reward/mean": float("nan"), "update/kl": np.float32("inf")}
    run.log(metrics, 0)
    summary: Any = {"path": (48, 12), "mean": np.float64(0.5), "rows": np.array([1.0, np.nan]), "ok": np.bool_(True)}
    run.summary.write(summary)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"iteration": 0, "reward/mean": null, "update/kl": null}\n'
    assert run.summary.read() == {"path": [48, 12], "mean": 0.5, "rows": [1.0, None], "ok": True}


def test_what_is_not_written_yet_is_empty(tmp_path):
    run = RunFolder(tmp_path / "nothing")
    assert run.config.read() == run.summary.read() == {} and run.costs.read() is None
    assert run.metrics.read() == run.evaluations["after"].read() == run.read_audits() == []


@pytest.mark.parametrize(
    "tail", ['{"iteration": 2, "rew', '{"iteration": 2, "name": "é'.encode()[:-1].decode("latin1")]
)
def test_a_half_written_last_line_is_left_out(tmp_path, tail):
    run = RunFolder.create(tmp_path)
    for i in range(2):
        run.log({"iteration": i}, i)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail.encode("latin1"))
    assert [record["iteration"] for record in run.metrics.read()] == [0, 1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [('{"iter', "not JSON"), ("[" * 9999, "not JSON")]
    + [(line, "no record of an iteration") for line in ("{}", "3", "[]", '{"iteration": "1"}')],
    ids=lambda text: text[:20],
)
def test_a_broken_line_in_the_middle_is_an_error(tmp_path, line, reason):
    (tmp_path / "metrics.jsonl").write_text(f'{{"iteration": 0}}\n{line}\n{{"iteration": 2}}\n')
    with pytest.raises(ValueError, match=rf"metrics\.jsonl: line 2 is {reason}; delete that line$"):
        RunFolder(tmp_path).metrics.read()


def test_resuming_drops_what_will_be_written_again(tmp_path):
    run = RunFolder.create(tmp_path)
    for i in range(5):
        run.log({"iteration": i}, i)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5')
    for i in (2, 3):
        run.log_images({"samples": tile(pictures(2), 2)}, i)
        run.write_audit({"iteration": i, "steps": []}, pictures(2, 1))
    (tmp_path / "audit" / "mine.json").write_text("{}")
    run.truncate(3)
    run.log({"iteration": 3}, 3)
    assert [record["iteration"] for record in run.metrics.read()] == [0, 1, 2, 3]
    assert [audit["iteration"] for audit in run.read_audits()] == [2]
    left = sorted(path.name for folder in ("audit", "samples") for path in (tmp_path / folder).iterdir())
    assert left == ["0002.json", "0002.png", "0002.png", "mine.json"]


def test_resuming_clears_what_a_killed_writer_left_and_nothing_else(tmp_path):
    run = RunFolder.create(tmp_path)
    run.log_images({"samples": tile(pictures(2), 2)}, 0)
    left = [tmp_path / "summary.json.12.writing", tmp_path / "samples" / "0001.png.12.writing"]
    mine = [tmp_path / "novel.writing", tmp_path / "drafts" / "a.writing"]
    mine[1].parent.mkdir()
    for path in left + mine:
        path.touch()
    run.truncate(1)
    assert [path.exists() for path in left + mine] == [False, False, True, True]


def test_overwriting_deletes_checkpoints_first_and_the_config_last(tmp_path, monkeypatch):
    """An interrupted deletion leaves a run that is refused, or nothing: never a new run among old checkpoints."""
    run = RunFolder.create(tmp_path / "run")
    run.log_config({})
    run.log({"iteration": 0}, 0)
    run.log_images({"samples": tile(pictures(2), 2)}, 0)
    (run.path / "checkpoints" / "iteration_000001").mkdir(parents=True)
    deleted = []

    def noted(delete):
        def first(path, **options):
            deleted.append(path.name)
            delete(path, **options)

        return first

    monkeypatch.setattr(shutil, "rmtree", noted(shutil.rmtree))
    monkeypatch.setattr(Path, "unlink", noted(Path.unlink))
    RunFolder.create(run.path, overwrite=True)
    assert deleted == ["iteration_000001", "0000.png", "metrics.jsonl", "config.json"]
    assert list(run.path.iterdir()) == []


def test_overwriting_a_run_whose_checkpoints_lie_elsewhere(tmp_path):
    """In a folder that is a link to another disk: they would be taken for the new run's. The link is the user's."""
    RunFolder.create(tmp_path / "run").log_config({})
    (tmp_path / "elsewhere" / "iteration_000001").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    RunFolder.create(tmp_path / "run", overwrite=True)
    assert [*(tmp_path / "elsewhere").iterdir()] == [] and (tmp_path / "run" / "checkpoints").is_symlink()


def test_a_folder_that_vanished_is_not_made_anew(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    shutil.rmtree(run.path)
    for write in (
        lambda: run.summary.write({}),
        lambda: run.log({"iteration": 0}, 0),
        lambda: run.log_images({"samples": tile(pictures(2), 2)}, 0),
    ):
        with pytest.raises(FileNotFoundError):
            write()
    assert not run.path.exists()


@pytest.mark.parametrize("content", ["", '{"a": 1', "[" * 9999, "\0"])
def test_a_damaged_file_is_named(tmp_path, content):
    run = RunFolder.create(tmp_path)
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(ValueError, match=r"summary\.json is not JSON"):
        run.summary.read()


def test_files_appear_whole(tmp_path):
    run = RunFolder.create(tmp_path)
    run.log_config({"a": 1})
    run.save_picture("samples/0.png", pictures(1)[0])
    assert not list(tmp_path.rglob("*.writing"))


def test_a_picture_comes_back_as_it_was(tmp_path):
    image = pictures(1)[0]
    name = RunFolder.create(tmp_path).save_picture("deep/er/a.png", image)
    assert (np.asarray(Image.open(tmp_path / name)) == image).all()


def test_tile_places_pictures_row_by_row():
    images = pictures(5)
    sheet = tile(images, columns=3, gap=4)
    assert sheet.shape == (2 * 8 + 4, 3 * 6 + 2 * 4, 3)
    assert (sheet[12:20, 10:16] == images[4]).all()
    assert (sheet[12:, 20:] == sheet[9, 0]).all()  # the empty sixth place has the gaps' grey


def test_evaluation_names_the_pictures_that_are_saved(tmp_path):
    run = RunFolder.create(tmp_path)
    records: Any = [{"prompt": str(i), "kind": "k", "graded": 0.5, "strict": True, "judge": None} for i in range(4)]
    run.write_evaluation("before", records, pictures(3), pictures=2)
    names = [record["picture"] for record in run.evaluations["before"].read()]
    assert names == ["evaluation/before/000.png", "evaluation/before/001.png", None, None]
    assert (tmp_path / names[1]).exists()


def test_audit_sheet_has_a_row_a_member_and_audits_come_in_order(tmp_path):
    run = RunFolder.create(tmp_path)
    shots = pictures(4, 3)
    for iteration in (10000, 5):
        audit: Any = {
            "iteration": iteration,
            "prompt": "p",
            "steps": [0, 1],
            "scores": [[1.0, float("nan"), 0.0, 1.0]] * 2,
        }
        run.write_audit({**audit, "final": [1, 2, 3, 4], "stopped_at": [None, 0, 0, None]}, shots)
    first, second = run.read_audits()
    assert (first["iteration"], second["iteration"]) == (5, 10000)
    assert first["strip"] == "audit/0005.png"
    assert first["scores"][0][1] is None
    sheet = np.asarray(Image.open(tmp_path / first["strip"]))
    assert sheet.shape == (4 * 8, 3 * 6, 3)
    assert (sheet[8:16, 12:18] == shots[1, 2]).all()


def test_tracking_does_not_import_torch():
    code = (
        "import sys, progrpo.tracking.run_folder, progrpo.tracking.console, progrpo.pages.report;"
        "print([name for name in ('torch', 'plotly', 'rich', 'PIL') if name in sys.modules])"
    )
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(modules.replace("'", '"')) == []


def test_an_audit_of_large_pictures_has_a_small_sheet(tmp_path):
    from PIL import Image

    run = RunFolder.create(tmp_path / "run")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 3, 400, 320, 3), dtype=np.uint8)
    audit: Any = {"iteration": 0, "steps": [0, 1], "scores": [[0.0, 1.0]] * 2, "final": [0.0, 1.0]}
    run.write_audit(audit, pictures)
    sheet = np.asarray(Image.open(run.path / "audit" / "0000.png"))
    assert sheet.shape == (2 * 134, 3 * 107, 3)  # each side a third, rounded up
    mean = pictures[1, 2, :3, 3:6].astype(float).mean((0, 1))
    np.testing.assert_allclose(sheet[134, 2 * 107 + 1], mean, atol=1)


def test_a_run_folder_may_have_the_name_of_one_of_weights(tmp_path):
    run = RunFolder.create(tmp_path / "lora")
    run.log_config({})
    with pytest.raises(ValueError, match=r"already holds a run \(config.json\)"):
        RunFolder.create(run.path)
