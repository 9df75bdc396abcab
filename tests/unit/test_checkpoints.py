"""Checkpoints: their contents, which of them are kept, and from which a run goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from progrpo import storage
from progrpo.config import (
    CheckpointSettings,
    Config,
    GRPOSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimSettings,
    PlanSettings,
    SamplingSettings,
    config_to_json,
)
from progrpo.durable import DiskError
from progrpo.storage import load_state, save_state
from progrpo.training import checkpoints
from progrpo.training.checkpoints import (
    check_length,
    check_unchanged,
    check_versions,
    digest,
    newest,
    plans_alike,
    save,
    saved,
    writing_to,
)
from progrpo.training.distributed import Ranks
from progrpo.types import Prompt

CONFIG = Config(checkpoint=CheckpointSettings(keep=2))


def state(iteration):
    return {"iteration": iteration, "weights": torch.full((3,), float(iteration))}


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture
def run(tmp_path):
    """A run folder with the checkpoints of iterations 2 and 3."""
    for iteration in (1, 2, 3):
        save(tmp_path, state(iteration), CONFIG)
    return tmp_path


@pytest.fixture
def take_up():
    """The iteration that a run goes on from, and what it warns of."""

    def take_up(run):
        warnings: list[str] = []
        return newest(run, Ranks(), warnings.append)["iteration"], warnings

    return take_up


def truncate(path, size=0):
    os.truncate(path, size)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def replaced(folder):
    shutil.rmtree(folder)
    folder.touch()


DAMAGE = {
    "an empty file": lambda folder: truncate(folder / "tensors.safetensors"),
    "a manifest in half": lambda folder: truncate(folder / "manifest.json", 40),
    "a missing file": lambda folder: (folder / "state.json").unlink(),
    "an empty folder": empty,
    "a file in its place": replaced,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_passed_over_and_named(run, damage, take_up):
    damage(run / "checkpoints" / "iteration_000003")
    iteration, (warning,) = take_up(run)
    assert iteration == 2
    assert "iteration_000003" in warning and warning.endswith("; going on from iteration_000002")


def test_the_newest_is_taken_without_a_word(run, take_up):
    assert take_up(run) == (3, [])


def test_one_without_a_whole_checkpoint_says_what_to_do(run, tmp_path, take_up):
    for path in saved(run):
        truncate(path / "state.json")
    with pytest.raises(
        ValueError, match=r"holds no whole checkpoint \(.*000003/state.json.*000002/state.json.*--overwrite"
    ):
        take_up(run)
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match=r"holds no checkpoint yet; start it anew with progrpo train .* --overwrite"):
        take_up(tmp_path / "new")


def test_one_that_cannot_be_read_is_passed_over(run, monkeypatch, take_up):
    def load(path):
        if path.name.endswith("3"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return load_state(path)

    monkeypatch.setattr(checkpoints, "load_state", load)
    iteration, (warning,) = take_up(run)
    assert iteration == 2 and "Input/output error" in warning


def test_a_checkpoint_of_another_kind_is_refused(run, take_up):
    save_state(run / "checkpoints" / "iteration_000004", state(4))
    with pytest.raises(ValueError, match="iteration_000004 has no config: it is of another version of progrpo"):
        take_up(run)


def test_a_checkpoint_of_before_the_plan_value_had_its_name_is_read_with_one_line(run):
    save(run, {**state(9), "pays": 1.25}, CONFIG)
    warnings: list[str] = []
    read = newest(run, Ranks(), warnings.append)
    assert read["plan_value"] == 1.25 and "pays" not in read
    assert len(warnings) == 1 and "plan/pays" in warnings[0] and "plan/value" in warnings[0]


def test_checkpoints_come_by_number_and_strangers_are_none(tmp_path):
    for name in ("iteration_1000000", "iteration_999999", "iteration_000002.writing", "iteration_²", "iteration_", "x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in saved(tmp_path)] == ["iteration_999999", "iteration_1000000"]


# --- which are kept ---------------------------------------------------------------------------------------------------


def test_the_last_ones_are_kept(run):
    assert names(run) == ["iteration_000002", "iteration_000003"]


def test_the_folder_of_checkpoints_is_on_the_disk_before_the_first(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def fsync(handle):
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    save(tmp_path, state(1), CONFIG)
    assert synced[0] == "." and synced[-1] == "checkpoints" and len(synced) == 6


def test_old_ones_stay_until_the_new_one_is_on_the_disk(run, monkeypatch):
    config = replace(CONFIG, checkpoint=CheckpointSettings(keep=1))
    monkeypatch.setattr(checkpoints, "save_state", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        save(run, state(4), config)
    assert names(run) == ["iteration_000002", "iteration_000003"]
    monkeypatch.setattr(checkpoints, "save_state", save_state)
    save(run, state(4), config)
    assert names(run) == ["iteration_000004"]


def test_a_later_one_that_was_passed_over_takes_no_place(run, take_up):
    """Else the next one, which has a lower number, would be the one to go."""
    truncate(run / "checkpoints" / "iteration_000003" / "state.json")
    (run / "checkpoints" / "iteration_000003").rename(run / "checkpoints" / "iteration_000009")
    assert take_up(run)[0] == 2
    save(run, state(4), CONFIG)
    assert names(run) == ["iteration_000002", "iteration_000004"]


def test_what_killed_writers_left_goes_with_the_next_one(run):
    for name in ("iteration_000001.writing", "iteration_000002.previous", "mine"):
        (run / "checkpoints" / name).mkdir()
    save(run, state(4), CONFIG)
    assert names(run) == ["iteration_000003", "iteration_000004", "mine"]


def test_one_that_was_being_replaced_is_found(run, take_up):
    """A run that is interrupted saves anew what it has just saved, and is killed between the two renames."""
    (run / "checkpoints" / "iteration_000003").rename(run / "checkpoints" / "iteration_000003.previous")
    (run / "checkpoints" / "iteration_000003.writing").mkdir()
    assert take_up(run) == (3, [])
    save(run, state(3), CONFIG)
    assert names(run) == ["iteration_000002", "iteration_000003"]


def test_a_run_folder_that_is_gone_is_not_made_anew(run):
    shutil.rmtree(run)
    with pytest.raises(FileNotFoundError):
        save(run, state(4), CONFIG)
    assert not run.exists()


# --- what a run goes on with ------------------------------------------------------------------------------------------


def test_a_changed_configuration_is_refused_with_the_fields(run):
    stored = load_state(run / "checkpoints" / "iteration_000003")
    check_unchanged(run, stored["config"], CONFIG, accept=False)
    changed = replace(CONFIG, seed=1, optim=OptimSettings(betas=(0.9, 0.99)), model=ModelSettings("x"))
    with pytest.raises(ValueError) as refused:
        check_unchanged(run, stored["config"], changed, accept=False)
    assert str(refused.value) == (
        f"{run}/config.json was changed since the checkpoint: seed was 0 and is 1,"
        " model.path was 'shapes-flow' and is 'x',"
        " optim.betas was [0.9, 0.999] and is [0.9, 0.99]; put it back, or give --accept-changes to go on with it"
    )


def test_what_a_run_may_change_on_its_way_is_no_change(run):
    longer = replace(CONFIG, iterations=99, sampling=SamplingSettings(microbatch=3), optim=OptimSettings(microbatch=2))
    check_unchanged(run, load_state(run / "checkpoints" / "iteration_000003")["config"], longer, accept=False)


def test_what_a_checkpoint_is_of_no_use_without_cannot_be_changed(run):
    stored = load_state(run / "checkpoints" / "iteration_000003")
    calmer = replace(CONFIG, optim=OptimSettings(weight_decay=0.5))
    check_unchanged(run, stored["config"], calmer, accept=True)
    with pytest.raises(
        ValueError, match=r"the checkpoint: objective\.name was 'grpo' and is 'nft'; put that back, since"
    ):
        check_unchanged(run, stored["config"], replace(calmer, objective=ObjectiveSettings(name="nft")), accept=True)
    with pytest.raises(ValueError, match=r"the checkpoint: model\.lora_alpha was 32 and is 64; put that back, since"):
        check_unchanged(run, stored["config"], replace(calmer, model=replace(calmer.model, lora_alpha=64)), accept=True)


@pytest.mark.parametrize(("decay", "iterations", "warned"), [(1.0, 8, 1), (1.0, 4, 0), (1.0, 3, 0), (0.0, 8, 0)])
def test_another_length_is_said_where_the_learning_rate_depends_on_it(run, decay, iterations, warned):
    config, warnings = replace(CONFIG, iterations=4, optim=OptimSettings(lr=1e-3, decay=decay)), list[str]()
    save(run, state(3), config)
    stored = load_state(run / "checkpoints" / "iteration_000003")
    check_length(stored, replace(config, iterations=iterations), warnings.append)
    assert len(warnings) == warned
    if warned:  # of 2 of 4 iterations left, and of 5 of 8
        assert "was after 4 and is after 8 iterations: it goes on with 0.000625 after 0.0005" in warnings[0]


@pytest.mark.parametrize(("last", "iterations", "warned"), [(0.0, 9, 1), (0.0, 5, 0), (None, 9, 0), (1.0, 9, 0)])
def test_another_length_is_said_where_the_weight_of_negative_advantages_depends_on_it(run, last, iterations, warned):
    objective = ObjectiveSettings(grpo=GRPOSettings(negative_weight=1.0, final_negative_weight=last))
    config, warnings = replace(CONFIG, iterations=5, objective=objective), list[str]()
    save(run, state(3), config)
    stored = load_state(run / "checkpoints" / "iteration_000003")
    check_length(stored, replace(config, iterations=iterations), warnings.append)
    assert len(warnings) == warned
    if warned:  # after 2 of 4 changes, and of 3 of 8
        assert "was after 5 and is after 9 iterations: it goes on with 0.625 after 0.5" in warnings[0]


def test_a_field_that_the_checkpoint_does_not_know_is_no_change(run):
    """It was saved before there was such a field, whose default is what it did."""
    stored = load_state(run / "checkpoints" / "iteration_000003")
    del stored["config"]["optim"]["ema_decay"]
    check_unchanged(run, stored["config"], replace(CONFIG, optim=OptimSettings(ema_decay=0.5)), accept=False)


def test_lists_of_prompts_differ_by_texts_columns_and_order():
    rows = {"a": Prompt("a", {"x": 1, "y": [b"1", {"z": None}]}), "b": Prompt("b", {"image": Image.new("RGB", (2, 2))})}
    same = [Prompt("a", {"y": (b"1", {"z": None}), "x": 1}), Prompt("b", {"image": Image.new("RGB", (2, 2))})]
    assert digest(rows.values()) == digest(same)
    others = [
        [rows["b"], rows["a"]],
        [rows["a"]],
        [rows["a"], Prompt("b")],
        [Prompt("a", {**rows["a"].columns, "x": 2}), rows["b"]],
        [Prompt("a", {"x": 1, "y": [b"2", {"z": None}]}), rows["b"]],
    ]
    assert len({digest(rows.values()), *map(digest, others)}) == 6


def test_a_checkpoint_of_before_there_were_digests_is_taken(run):
    now = {"training": "1", "unet": "2"}
    assert checkpoints.check_prompts(run, {}, now, CONFIG, accept=False) == []
    assert checkpoints.check_weights(run, {}, now, CONFIG, accept=False)


def test_another_model_is_refused_by_its_parts_unless_that_is_accepted(run):
    was = {"unet": "1", "vae": "2", "text_encoder": "3"}
    now = {"unet": "1", "vae": "4", "text_encoder": "5"}
    message = (
        rf"^the weights of vae, text_encoder \(shapes-flow\) are not those that {run} began with; .*--accept-changes"
    )
    with pytest.raises(ValueError, match=message):
        checkpoints.check_weights(run, was, now, CONFIG, accept=False)
    assert not checkpoints.check_weights(run, was, now, CONFIG, accept=True)
    checkpoints.check_weights(run, was, {"unet": "1", "safety_checker": "6"}, CONFIG, accept=False)


def test_a_reward_of_before_there_was_a_field_is_no_change(run):
    stored = load_state(run / "checkpoints" / "iteration_000003")
    assert stored["config"]["reward"]["terms"][0].pop("from_python") is False
    check_unchanged(run, stored["config"], CONFIG, accept=False)


def test_other_versions_are_said(run):
    stored = load_state(run / "checkpoints" / "iteration_000003")
    warnings: list[str] = []
    check_versions(stored["versions"], CONFIG, warnings.append)
    assert warnings == []
    stored["versions"] |= {"torch": "1.0"}
    del stored["versions"]["peft"]
    check_versions(stored["versions"], CONFIG, warnings.append)
    (warning,) = warnings
    assert "torch 1.0 -> 2" in warning and "peft unknown -> " in warning and "python" not in warning


def test_the_version_of_an_optimizers_package_is_kept_by_runs_that_use_it(run, monkeypatch):
    lean, warnings = replace(CONFIG, optim=OptimSettings("adamw_8bit")), list[str]()
    there = run / "packages" / "bitsandbytes-0.1.dist-info"
    there.mkdir(parents=True)
    (there / "METADATA").write_text("Name: bitsandbytes\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(there.parent)
    for config, iteration in ((lean, 4), (CONFIG, 5)):
        save(run, state(iteration), config)
    kept, plain = (load_state(run / "checkpoints" / f"iteration_00000{i}")["versions"] for i in (4, 5))
    assert kept == plain | {"bitsandbytes": "0.1"} and "bitsandbytes" not in plain
    check_versions(kept | {"bitsandbytes": "0.0"}, lean, warnings.append)
    check_versions(kept, lean, warnings.append)
    (warning,) = warnings
    assert warning.endswith(": bitsandbytes 0.0 -> 0.1")


def test_a_run_can_be_looked_at_where_its_optimizers_package_is_not(run, monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # nor is any other's
    assert checkpoints.versions(replace(CONFIG, optim=OptimSettings("adamw_8bit")))["bitsandbytes"] == "not installed"


# --- a disk that refuses ----------------------------------------------------------------------------------------------


def refusal(run, error):
    """The sentence that an error of the block becomes."""
    with pytest.raises(DiskError) as stopped, writing_to(run, Ranks()):
        assert (run / "run.lock").exists()
        raise error
    assert not (run / "run.lock").exists() and "\n" not in str(stopped.value)
    return str(stopped.value)


def test_a_full_disk_is_one_sentence(run):
    file = run / "metrics.jsonl"
    assert refusal(run, OSError(errno.ENOSPC, "No space left on device", str(file))) == (
        f"{file} cannot be written: No space left on device;"
        " the last good checkpoint is iteration_000003: make space, then"
        f" go on with progrpo train --resume {run}"
    )
    shutil.rmtree(run / "checkpoints")
    assert refusal(run, OSError(errno.EROFS, "Read-only file system")) == (
        f"{run} cannot be written: Read-only file system; there is no checkpoint yet: mend that, then start anew with"
        f" progrpo train {run} --out {run} --overwrite"
    )


def test_a_folder_that_vanished_is_one_sentence(run):
    sentence = r"metrics\.jsonl cannot be written: No such file.*the run folder is gone.*anew"
    with pytest.raises(DiskError, match=sentence), writing_to(run, Ranks()):
        shutil.rmtree(run)
        (run / "metrics.jsonl").open("ab")


def test_the_sentence_is_about_the_first_file_and_not_about_the_summary_after_it(run):
    with pytest.raises(DiskError, match=r"a\.json cannot be written: full"), writing_to(run, Ranks()):
        try:
            raise OSError(errno.ENOSPC, "full", str(run / "a.json"))
        except OSError:
            raise OSError(errno.ENOSPC, "full", str(run / "summary.json"))  # noqa: B904  # as it comes


def test_what_safetensors_says_is_understood(run, monkeypatch):
    """Of a LoRA that diffusers writes."""
    error = storage.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert refusal(run, error).startswith(f"{run} cannot be written: No space left on device; the last good")


def test_an_error_that_is_not_of_the_runs_files_stays_what_it_is(run):
    for error in (ConnectionError("refused"), FileNotFoundError(errno.ENOENT, "none", "/etc/none"), ValueError("no")):
        with pytest.raises(type(error)), writing_to(run, Ranks()):
            raise error


@pytest.mark.parametrize(
    ("changed", "alike"),
    [
        ({"sampling": SamplingSettings(microbatch=3)}, True),  # as after a run that was out of memory
        ({"optim": OptimSettings(lr=0.5)}, True),
        ({"plan": PlanSettings("auto")}, False),
        ({"sampling": SamplingSettings(same_latent=True)}, False),
        ({"sampling": SamplingSettings(sde_window="first")}, False),
    ],
)
def test_a_plan_goes_on_where_it_means_the_same(changed, alike):
    assert plans_alike(json.loads(config_to_json(Config())), replace(Config(), **changed)) is alike
