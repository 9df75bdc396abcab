"""Nested state on disk: tensors in safetensors, everything else in JSON, written under another name and then renamed.

Nothing here unpickles: a folder from a stranger can be read without running its code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_TENSOR = "__tensor__"
_INT_KEYS = "__int_keys__"
_MANIFEST = "manifest.json"


def _split(node: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, torch.Tensor):
        tensors[path] = node.detach().cpu().contiguous().clone()
        return {_TENSOR: path}
    if isinstance(node, dict):
        kinds = {type(k) for k in node}
        if kinds - {str} and kinds != {int}:
            raise TypeError(f"{path}: keys must be all str or all int, found {sorted(k.__name__ for k in kinds)}")
        body = {str(k): _split(v, f"{path}/{k}", tensors) for k, v in node.items()}
        return {_INT_KEYS: body} if kinds == {int} else body
    if isinstance(node, (list, tuple)):
        return [_split(v, f"{path}/{i}", tensors) for i, v in enumerate(node)]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"{path}: a {type(node).__name__} cannot be stored")


def _join(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, dict):
        if set(node) == {_TENSOR}:
            return tensors[node[_TENSOR]]
        if set(node) == {_INT_KEYS}:
            return {int(k): _join(v, tensors) for k, v in node[_INT_KEYS].items()}
        return {k: _join(v, tensors) for k, v in node.items()}
    if isinstance(node, list):
        return [_join(v, tensors) for v in node]
    return node


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one, never half of it."""
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write nested dicts and lists of tensors, numbers and strings to `folder`, which appears whole or not at all."""
    temporary = folder.with_name(folder.name + ".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    tree = _split(state, "", tensors)
    save_file(tensors, temporary / "tensors.safetensors")
    (temporary / "state.json").write_text(json.dumps(tree), encoding="utf-8")
    digests = {file.name: _digest(file) for file in sorted(temporary.iterdir())}
    (temporary / _MANIFEST).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    for file in temporary.iterdir():
        _sync(file)
    previous = folder.with_name(folder.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    temporary.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def load_state(folder: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; ValueError if a file is missing or is not the one that was written."""
    previous = folder.with_name(folder.name + ".previous")
    if not folder.exists() and previous.exists():  # killed between the two renames
        folder = previous
    manifest = folder / _MANIFEST
    if not manifest.exists():
        raise ValueError(f"{folder}: no saved state here (no {_MANIFEST})")
    for name, digest in json.loads(manifest.read_text(encoding="utf-8")).items():
        file = folder / name
        if not file.exists() or _digest(file) != digest:
            raise ValueError(f"{file}: missing or changed since it was written; use an earlier checkpoint")
    tree = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return _join(tree, load_file(folder / "tensors.safetensors"))
