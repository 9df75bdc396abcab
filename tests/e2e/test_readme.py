"""What README shows runs as it stands, but for the model and the number of iterations."""

from __future__ import annotations

import importlib.util
import json
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


def test_the_quickstarts_table_is_what_was_measured() -> None:
    path = README.parent / "benchmarks" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart_benchmark", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = json.loads((README.parent / "docs/results/quickstart.json").read_text())
    text = README.read_text(encoding="utf-8")
    assert len(results) >= 3 and module.with_table(text, results) == text
