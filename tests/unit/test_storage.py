import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from progrpo import storage
from progrpo.storage import load_state, save_state


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
        "a": {"b": torch.zeros(1), "c": torch.zeros(1)},
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
    with pytest.raises(ValueError, match=f"{name}: missing or changed.*cannot be used"):
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


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("left", [0, 1, 0.5])
def test_a_file_that_was_cut_off_is_named(name, left, tmp_path):
    save_state(tmp_path / "state", {"x": torch.arange(3.0)})
    file = tmp_path / "state" / name
    os.truncate(file, int(left * file.stat().st_size) if left == 0.5 else left)
    with pytest.raises(ValueError, match=f"{name}: .*cannot be used"):
        load_state(tmp_path / "state")


@pytest.mark.parametrize(
    "manifest", ["{}", "[]", "null", '{"state.json": "0"}', '{"../state/state.json": "0"}', "[" * 9999]
)
def test_a_manifest_that_vouches_for_less_than_the_state_is_refused(manifest, tmp_path):
    save_state(tmp_path / "state", {"x": torch.arange(3.0)})
    (tmp_path / "state" / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=r"manifest.json: .*so this state cannot be used"):
        load_state(tmp_path / "state")


@pytest.mark.parametrize(
    "tree", ['{"x": {"__tensor__": "y"}}', '{"x": {"__tensor__": []}}', '{"__int_keys__": 3}', "[]", '{"a":' * 9999]
)
def test_a_state_whose_manifest_was_changed_with_it_is_no_traceback(tree, tmp_path):
    folder = tmp_path / "state"
    save_state(folder, {"x": torch.arange(3.0)})
    (folder / "state.json").write_text(tree)
    digests = json.loads((folder / "manifest.json").read_text())
    digests["state.json"] = hashlib.sha256(tree.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(digests))
    with pytest.raises(ValueError, match=r"are not a state|cannot be used"):
        load_state(folder)


def test_a_stranger_s_file_beside_the_state_is_not_read(tmp_path):
    save_state(tmp_path / "state", {"step": 1})
    (tmp_path / "state" / ".nfs0001").write_bytes(b"\0")
    assert load_state(tmp_path / "state") == {"step": 1}


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


def test_the_only_whole_state_stays_until_the_new_one_is_there(tmp_path, monkeypatch):
    """Killed between the two renames, and again before the next one: the state lies under `.previous` all the time."""
    folder = tmp_path / "state"
    save_state(folder, {"step": 1})
    folder.rename(tmp_path / "state.previous")

    def dying(self, target):
        assert load_state(folder) == {"step": 1}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", dying)
        save_state(folder, {"step": 2})
    assert load_state(folder) == {"step": 1}


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
        ({"a": {"__tensor__": "b"}}, "/a: __tensor__ and __int_keys__ cannot be keys"),
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
    """Loading works with every unpickler broken, and no file can hold a pickle: all are JSON and safetensors."""
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


# --- a disk that refuses ----------------------------------------------------------------------------------------------


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The order that a power cut may end: files and names first, then the rename, then the end of the old state."""
    folder, done = tmp_path / "state", []
    save_state(folder, {"step": 1})

    def noted(act, words):
        def first(*args, **options):
            done.append(words(*args))
            act(*args, **options)

        return first

    monkeypatch.setattr(os, "fsync", noted(os.fsync, lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name))
    monkeypatch.setattr(Path, "rename", noted(Path.rename, lambda path, to: f"{path.name} -> {to.name}"))
    monkeypatch.setattr(shutil, "rmtree", noted(shutil.rmtree, lambda path: f"rm {path.name}"))
    save_state(folder, {"step": 2})
    assert sorted(done[1:4]) == ["manifest.json", "state.json", "tensors.safetensors"]
    assert [name for i, name in enumerate(done) if i not in (1, 2, 3)] == [
        "rm state.writing",
        "state.writing",
        "rm state.previous",
        "state -> state.previous",
        "state.writing -> state",
        tmp_path.name,
        "rm state.previous",
    ]


@pytest.mark.parametrize("at", ["tensors", "tree", "fsync", "rename"])
def test_a_full_disk_names_the_file_and_leaves_the_old_state(at, tmp_path, monkeypatch):
    folder = tmp_path / "state"
    save_state(folder, {"step": 1})
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*args, **options):
        raise full

    def half(tensors, path):
        path.write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device") as caught:
        if at == "tensors":
            patch.setattr(storage, "save_file", half)
        elif at == "tree":
            patch.setattr(Path, "write_text", refuse)
        else:
            patch.setattr(*((os, "fsync") if at == "fsync" else (Path, "rename")), refuse)
        save_state(folder, {"step": 2, "x": torch.ones(3)})
    assert caught.value.errno == errno.ENOSPC
    if at in ("tensors", "tree"):
        assert Path(caught.value.filename).parent.name == "state.writing"
    assert load_state(folder) == {"step": 1}
    if at != "rename":
        assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_limit_of_the_system_is_met_by_the_real_writer(tmp_path):
    """Files of at most 64 KiB, as the kernel enforces it: what safetensors' own code makes of that."""
    script = """
import resource, signal, sys, torch
from pathlib import Path
from progrpo.storage import load_state, save_state
folder = Path(sys.argv[1]) / "state"
save_state(folder, {"step": 1})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    save_state(folder, {"x": torch.zeros(100_000)})
except OSError as error:
    print(error)
assert load_state(folder) == {"step": 1}
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout and "state.writing/tensors.safetensors" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
