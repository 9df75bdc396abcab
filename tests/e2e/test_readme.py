"""What README shows runs as it stands, but for the model and the number of iterations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def snippet(name: str) -> str:
    text = README.read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name}:begin -->\s*```python\n(.*?)```", text, re.DOTALL)
    assert found, f"README has no python block between the {name} markers"
    return found[1]


def test_the_library_example_runs(tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = snippet("library")
    for shown, here in (("path-or-hub-id", str(tiny_sd3)), ("iterations=40", "iterations=2")):
        assert shown in code
        code = code.replace(shown, here)
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    assert (tmp_path / "runs/redness/report.html").is_file()
    assert (tmp_path / "runs/redness/lora/pytorch_lora_weights.safetensors").is_file()
