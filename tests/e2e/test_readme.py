"""The code and the figures that README and docs show: the code runs, and the figures are the measured ones."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from progrpo.cli import main
from progrpo.config import Config
from progrpo.objectives.settings import load_objective
from progrpo.settings import field_paths, read_settings

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "docs/results"
CARDS = (ROOT / "src").rglob("weights/*/README.md")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *CARDS])
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""The pages that describe this version; a changelog also names settings of earlier ones."""


def snippet(page: Path, name: str) -> str:
    block = re.search(rf"<!-- {name}:begin -->\s*```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert block, f"{page.name} has no python block between the {name} markers"
    return block[1]


def quickstart_results() -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads((RESULTS / "quickstart.json").read_text())
    return results


@pytest.mark.parametrize("page", ["README.md", pytest.param("docs/training.md", marks=pytest.mark.slow)])
def test_the_library_example_runs_but_for_the_model_and_how_many_iterations_and_pictures(
    page: str, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = snippet(ROOT / page, "library")
    fewer = (("iterations=40", "iterations=1"), ("pictures=16", "pictures=2"))
    for shown, here in (("path-or-hub-id", str(tiny_sd3)), *fewer):
        assert shown in code
        code = code.replace(shown, here)
    names: dict[str, object] = {}
    exec(compile(code, page, "exec"), names)
    assert (tmp_path / "runs/redness/report.html").is_file()
    assert (tmp_path / "runs/redness/lora/pytorch_lora_weights.safetensors").is_file()


def test_the_parts_of_ones_own_run(on_a_tiny_model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_parts.py").write_text(snippet(ROOT / "docs/extending.md", "extending"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    parts = ("--plan.preset", "my_parts:late", "--plan.selector", "my_parts:best")
    sampler = ("--sampling.sampler", "my_parts:HALF_DDIM")
    small = ("--iterations", "1", "--audit.every", "0", *on_a_tiny_model)
    assert main(["train", "smoke", "--out", "run", *small, *parts, *sampler]) == 0
    assert main(["plan", "smoke", "--plan", "my_parts:late"]) == 0
    metrics = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert metrics["rollout/survivors"] == 2 * 8  # of two prompts
    settings = read_settings(load_objective("my_parts:Reinforce").Settings, {"scale": 0.5})
    assert settings.items_per_trajectory(0) == 4
    sys.modules.pop("my_parts", None)


def test_the_quickstarts_table_is_what_was_measured() -> None:
    path = ROOT / "benchmarks/quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart_benchmark", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = quickstart_results()
    text = (RESULTS / "quickstart.md").read_text(encoding="utf-8")
    assert len(results) >= 3 and module.table(results) in text and module.with_table(text, results) == text


def test_readmes_result_is_the_mean_of_the_table() -> None:
    results = quickstart_results()
    before, after = (mean(100 * r[f"accuracy_{when}"] for r in results) for when in ("before", "after"))
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert f"from {before:.1f} to {after:.1f} % on 512 test prompts" in text
    *others, last = (f"{100 * r['accuracy_after']:.1f}" for r in results)
    assert f"({', '.join(others)} and {last} %;" in text


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not heading or heading in anchors(file), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_lines_end_at_120_columns(page: Path) -> None:
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    assert [number for number, line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", CURRENT, ids=[str(page.relative_to(ROOT)) for page in CURRENT])
def test_the_settings_that_a_page_gives_as_options_are_there(page: Path) -> None:
    named = set(re.findall(r"--([a-z]+\.[a-z-]+(?:\.[a-z-]+)?)", page.read_text(encoding="utf-8")))
    fields_there = {path.replace("_", "-") for path in field_paths(Config)}
    assert {name for name in named if name.replace(".no-", ".") not in fields_there} == set()


def test_the_plan_commands_of_pages_work(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in CURRENT).replace("\\\n", " ")
    commands = {command.strip() for command in re.findall(r"progrpo (plan \w[^`#\n]*)", text)}
    # without those that load a model's code to estimate memory, a user's file or module, and placeholders
    ours = sorted(c for c in commands if not re.search(r"--gpu|\.json|my_parts|[A-Z]{4}", c))
    assert len(ours) > 5
    for command in ours:
        assert main(command.split()) == 0, f"progrpo {command}: {capsys.readouterr().err}"


def test_every_figure_of_the_readmes_results_is_in_the_list_of_claims() -> None:
    results = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Measured result")[2].partition("\n## ")[0]
    stated = figures(re.sub(r"\]\([^)]*\)", "]", results))
    listed = figures((ROOT / "docs" / "results" / "README.md").read_text(encoding="utf-8"))
    assert len(stated) > 15
    assert stated <= listed, f"README states {sorted(stated - listed)}, which docs/results/README.md does not list"


def figures(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", text))
