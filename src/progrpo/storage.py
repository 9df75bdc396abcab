"""Nested state on disk: tensors in safetensors, everything else in JSON, in a folder that appears whole or not at all.

Nothing is unpickled, so a folder from a stranger can be read without running its code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from progrpo.durable import naming, new_folder, whole_folder

_TENSOR = "__tensor__"
_INT_KEYS = "__int_keys__"
_MANIFEST = "manifest.json"
_TENSORS, _TREE = "tensors.safetensors", "state.json"


def _split(node: object, path: str, tensors: dict[str, torch.Tensor]) -> object:
    """The node with each tensor replaced by its name in `tensors`, which are filled."""
    if isinstance(node, torch.Tensor):
        name = f"{len(tensors)}{path}"  # the path alone is not unique: {"a": {"b": ...}, "a/b": ...}
        tensors[name] = node.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(node, dict):
        kinds = {type(k) for k in node}
        if kinds - {str} and kinds != {int}:
            raise TypeError(f"{path}: keys must be all str or all int, found {sorted(k.__name__ for k in kinds)}")
        if node.keys() & {_TENSOR, _INT_KEYS}:
            raise TypeError(f"{path}: {_TENSOR} and {_INT_KEYS} cannot be keys")
        body = {str(k): _split(v, f"{path}/{k}", tensors) for k, v in node.items()}
        return {_INT_KEYS: body} if kinds == {int} else body
    if isinstance(node, (list, tuple)):
        return [_split(v, f"{path}/{i}", tensors) for i, v in enumerate(node)]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"{path}: a {type(node).__name__} cannot be stored")


def _join(node: object, tensors: dict[str, torch.Tensor]) -> object:
    """The node with each name replaced by its tensor: the inverse of `_split`."""
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


def _write_json(path: Path, value: object, indent: int | None = None) -> None:
    with naming(path):
        path.write_text(json.dumps(value, indent=indent), encoding="utf-8")


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not JSON, so this state cannot be used") from None


def disk_error(error: SafetensorError, path: Path) -> OSError:
    """The system's error behind one of safetensors, which only has its number in the message."""
    match = re.search(r"os error (\d+)", str(error))
    code = int(match[1]) if match else errno.EIO
    return OSError(code, os.strerror(code), str(path))


def save_state(folder: Path, state: Mapping[str, object]) -> None:
    """Write nested dicts and lists of tensors, numbers and strings to `folder`, which appears whole or not at all.

    OSError with the file's name if the disk refuses. An older state in the folder then remains.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    tree = _split(state, "", tensors)
    with new_folder(folder) as temporary:
        try:
            save_file(tensors, temporary / _TENSORS)
        except SafetensorError as error:
            raise disk_error(error, temporary / _TENSORS) from error
        _write_json(temporary / _TREE, tree)
        _write_json(temporary / _MANIFEST, {name: _digest(temporary / name) for name in (_TREE, _TENSORS)}, indent=1)


def load_state(folder: Path) -> dict[str, Any]:
    """Read a state of `save_state`. ValueError if a file is missing or was changed."""
    folder = whole_folder(folder)
    manifest = folder / _MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{folder}: no saved state here (no {_MANIFEST})")
    digests = _read_json(manifest)
    if not isinstance(digests, dict) or digests.keys() != {_TREE, _TENSORS}:
        raise ValueError(f"{manifest}: does not name the files of a state, so this state cannot be used")
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file() or _digest(file) != digest:
            raise ValueError(f"{file}: missing or changed since it was written, so this state cannot be used")
    tree = _read_json(folder / _TREE)
    try:
        state = _join(tree, load_file(folder / _TENSORS))
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{folder}: its files agree with {_MANIFEST} but are not a state") from None
    if not isinstance(state, dict):
        raise ValueError(f"{folder}: its files agree with {_MANIFEST} but are not a state")
    return state
