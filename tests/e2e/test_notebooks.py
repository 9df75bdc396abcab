"""The notebooks of examples/: each runs in a kernel of its own with small settings, and computes what it says."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
executed = runpy.run_path(str(ROOT / "docs/notebooks.py"))["executed"]


def read(name: str) -> Any:
    return nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)


def computed(name: str, folder: Path, parameters: Mapping[str, object], *expressions: str) -> list[Any]:
    """The values of expressions after a notebook has run with other parameters, as papermill would give them."""
    notebook = read(name)
    (place,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    assert all(f"{key} = " in notebook.cells[place].source for key in parameters)
    given = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(given))
    source = f"import json\nprint(json.dumps([{', '.join(expressions)}]))"
    notebook.cells.append(nbformat.v4.new_code_cell(source))
    values: list[Any] = json.loads(executed(notebook, folder).cells[-1].outputs[-1].text)
    return values


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
def test_the_method(tmp_path: Path) -> None:
    small = {"PRETRAINING": 200, "GROUPS": 32, "BUDGET": 4, "SEEDS": 1}
    values = computed(
        "method", tmp_path, small, "clustered", "best", "agreement", "by_step", "counted", "per_cost", "curves"
    )
    clustered, best, agreement, by_step, counted, per_cost, curves = values
    assert clustered["near"] > 0.3 and clustered["side"] < 0.1
    assert best["near"] > 2 > 1.3 > best["side"]
    assert agreement["near"][-1] > 0.95 > 0.5 > agreement["near"][0]
    assert best["near"] >= by_step["near"][-1] > by_step["near"][4]
    assert counted == {"24": 240, "6": 60, "6 of 24 after 4": 150, "6 of 24 after 8": 222}
    assert per_cost["6 of 24 after 8"] > per_cost["6 of 24 after 4"]
    assert all(curve[-1][1] > curve[0][1] and curve[-1][0] <= 4 for curve in curves.values())
    assert curves["6 of 24 after 8"][-1][1] > curves["24"][-1][1]


@pytest.mark.slow
def test_the_quickstart(tmp_path: Path) -> None:
    small = {"ITERATIONS": 1, "PICTURES": 12, "OUT": "run"}
    summary, files, rewards = computed("quickstart", tmp_path, small, "summary", "[str(f) for f in files]", "rewards")
    assert summary["status"] == "finished" and summary["iterations"] == len(rewards) == 1
    assert (tmp_path / "run/report.html").is_file()
    assert len(files) == 12 and all((tmp_path / file).is_file() for file in files)


@pytest.mark.slow
def test_ones_own_model_and_reward(tmp_path: Path) -> None:
    small = {"ITERATIONS": 1, "PICTURES": 4, "OUT": "run"}
    moved = "float(max(np.abs(np.asarray(a, float) - np.asarray(b, float)).max() for a, b in zip(before, after)))"
    summary, change = computed("own_model_and_reward", tmp_path, small, "summary", moved)
    assert summary["status"] == "finished" and 0 < summary["reward_before"] < 1
    assert summary["nfe_saved"] == pytest.approx(1 - (4 * 12 + 2 * 6) / (6 * 12))
    assert (tmp_path / "run/report.html").is_file()
    assert (tmp_path / "run/lora/pytorch_lora_weights.safetensors").is_file()
    assert change > 0


def test_there_is_a_test_of_each() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"method", "quickstart", "own_model_and_reward"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_saved_is_small_and_names_no_folder_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert not [folder for folder in (sys.prefix, gettempdir(), str(ROOT), str(Path.home())) if f"{folder}/" in text]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_prose_has_lines_of_120_columns_and_links_that_lead_somewhere(path: Path) -> None:
    prose = [cell.source for cell in read(path.stem).cells if cell.cell_type == "markdown"]
    assert not [line for text in prose for line in text.splitlines() if len(line) > 120]
    targets = [target for text in prose for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert not [target for target in targets if "://" not in target and not (path.parent / target).exists()]
