import json
import os
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from progrpo.storage import load_state, save_state, write_text


def same(a, b) -> bool:
    """Equal values of equal types; tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def adamw_after_steps() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(3):
        module(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


STATES = {
    "numbers": {
        "step": 7,
        "loss": 0.1,
        "done": False,
        "name": "späte Ränge",
        "nothing": None,
        "list": [1, [2.5, "x"], {}],
    },
    "int keys": {"state": {0: {"step": 1}, 10: {"step": 2}, -1: {}}, "names": {"0": 1}},
    "empty": {"a": {}, "b": [], "c": {0: {}}, "d": torch.empty(0, 3)},
    "no tensors at all": {},
    "dtypes": {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    },
    "odd tensors": {
        "scalar": torch.tensor(3.5),
        "nan": torch.tensor([float("inf"), 0.0, -0.0]),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "view": torch.arange(10)[2:5],
        "a/b": torch.ones(1),
        "a": {"c": torch.zeros(1)},
    },
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
def test_state_comes_back(state, tmp_path):
    save_state(tmp_path / "state", state)
    assert same(state, load_state(tmp_path / "state"))


def test_floats_come_back_to_the_bit(tmp_path):
    floats = [0.1 + 0.2, 1e-308, 5e-324, float("inf"), float("-inf"), 1 / 3]
    save_state(tmp_path / "state", {"floats": floats, "nan": float("nan")})
    loaded = load_state(tmp_path / "state")
    assert loaded["floats"] == floats
    assert loaded["nan"] != loaded["nan"]


def test_an_optimizer_goes_on_as_it_was(tmp_path):
    module, optimizer = adamw_after_steps()
    save_state(tmp_path / "state", {"module": dict(module.state_dict()), "optimizer": optimizer.state_dict()})
    loaded = load_state(tmp_path / "state")
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    other.load_state_dict(loaded["module"])
    resumed = torch.optim.AdamW(other.parameters(), lr=9.0)
    resumed.load_state_dict(loaded["optimizer"])
    x = torch.randn(5, 3)
    for m, o in ((module, optimizer), (other, resumed)):
        m(x).square().mean().backward()
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    weight = torch.arange(4.0)
    save_state(tmp_path / "state", {"tied": [weight, weight, weight[:2]], "grad": torch.ones(2, requires_grad=True)})
    loaded = load_state(tmp_path / "state")
    loaded["tied"][0][0] = 9
    assert loaded["tied"][1].tolist() == [0, 1, 2, 3]
    assert not loaded["grad"].requires_grad


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_changed_byte_is_found_and_the_file_named(name, tmp_path):
    folder = tmp_path / "state"
    save_state(folder, {"x": torch.arange(3.0), "step": 12})
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}: missing or changed.*earlier checkpoint"):
        load_state(folder)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_missing_file_is_named(name, tmp_path):
    save_state(tmp_path / "state", {"x": torch.arange(3.0)})
    (tmp_path / "state" / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: missing or changed"):
        load_state(tmp_path / "state")


def test_a_folder_without_state_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no saved state here"):
        load_state(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no saved state here"):
        load_state(tmp_path)


# --- a writer that was killed -----------------------------------------------------------------------------------------


def test_killed_while_writing(tmp_path):
    folder = tmp_path / "state"
    save_state(folder, {"step": 1})
    (tmp_path / "state.writing").mkdir()
    (tmp_path / "state.writing" / "tensors.safetensors").write_bytes(b"half of it")
    assert load_state(folder) == {"step": 1}
    save_state(folder, {"step": 2})
    assert load_state(folder) == {"step": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_killed_between_the_two_renames(tmp_path):
    folder = tmp_path / "state"
    save_state(folder, {"step": 1})
    save_state(tmp_path / "next", {"step": 2})
    folder.rename(tmp_path / "state.previous")
    (tmp_path / "next").rename(tmp_path / "state.writing")
    assert load_state(folder) == {"step": 1}
    save_state(folder, {"step": 3})
    assert load_state(folder) == {"step": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_killed_before_the_previous_state_was_removed(tmp_path):
    folder = tmp_path / "state"
    save_state(folder, {"step": 1})
    shutil.copytree(folder, tmp_path / "state.previous")
    save_state(folder, {"step": 2})
    assert load_state(folder) == {"step": 2}
    assert not (tmp_path / "state.previous").exists()


def test_a_state_that_cannot_be_stored_leaves_the_old_one(tmp_path):
    folder = tmp_path / "state"
    save_state(folder, {"step": 1})
    with pytest.raises(TypeError):
        save_state(folder, {"step": object()})
    assert load_state(folder) == {"step": 1}


@pytest.mark.parametrize("at_rename", [1, 2])
def test_killed_at_each_rename(at_rename, tmp_path, monkeypatch):
    folder = tmp_path / "state"
    save_state(folder, {"step": 1})
    rename, calls = Path.rename, []

    def dying(self, target):
        calls.append(self)
        if len(calls) == at_rename:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", dying)
        save_state(folder, {"step": 2})
    assert load_state(folder) == {"step": 1}
    save_state(folder, {"step": 3})
    assert load_state(folder) == {"step": 3}


# --- what is not stored -----------------------------------------------------------------------------------------------


class Stranger:
    pass


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": [1, Stranger()]}}, "/a/b/1: a Stranger cannot be stored"),
        ({"a": {"b": {1, 2}}}, "/a/b: a set cannot be stored"),
        ({"a": {"b": b"bytes"}}, "/a/b: a bytes cannot be stored"),
        ({"a": {1: 0, "1": 0}}, r"/a: keys must be all str or all int, found \['int', 'str'\]"),
        ({"a": {(0, 1): 0}}, r"/a: keys must be all str or all int, found \['tuple'\]"),
        ({"a": {True: 0}}, r"/a: keys must be all str or all int, found \['bool'\]"),
    ],
)
def test_other_types_are_refused_with_their_path(state, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        save_state(tmp_path / "state", state)
    assert not (tmp_path / "state").exists()


def test_state_dicts_are_stored_as_dicts(tmp_path):
    save_state(tmp_path / "state", OrderedDict(a=torch.ones(1)))
    assert type(load_state(tmp_path / "state")) is dict


def test_nothing_unpickles(tmp_path, monkeypatch):
    """Loading works with every unpickler broken, and no file can hold a pickle: JSON and safetensors are all there is."""
    save_state(tmp_path / "state", {"x": torch.ones(2), "optimizer": adamw_after_steps()[1].state_dict()})

    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert load_state(tmp_path / "state")["x"].tolist() == [1, 1]
    for file in (tmp_path / "state").iterdir():
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        else:
            assert file.name == "tensors.safetensors"


# --- texts ------------------------------------------------------------------------------------------------------------


def test_write_text_replaces_in_one_step(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    write_text(file, "ä old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        write_text(file, "new")
    assert file.read_text(encoding="utf-8") == "ä old"
    write_text(file, "new")
    assert file.read_text(encoding="utf-8") == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
