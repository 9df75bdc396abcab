"""The parts of a release beside the code: its version in one place, and files that other programs read."""

from __future__ import annotations

import importlib.util
import re
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from progrpo import __version__

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
FORMS = sorted(GITHUB.rglob("*.yml"))


@pytest.fixture(scope="module")
def release() -> Any:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci/release.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def workflow(name: str) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((GITHUB / "workflows" / name).read_text())
    return data


def commands(name: str) -> list[str]:
    return [step["run"] for job in workflow(name)["jobs"].values() for step in job["steps"] if "run" in step]


def test_the_version_is_written_once_and_cited() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"] and "version" not in project
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["license"] == project["license"]
    assert citation["cff-version"] == "1.2.0" and citation["title"] == project["name"]
    assert {"message", "authors"} <= set(citation)


def test_a_tag_is_the_version_with_a_dated_section(release: Any) -> None:
    dated = f"# Changelog\n\n## {__version__} (2026-12-24)\n"
    assert release.version() == __version__
    assert list(release.tag_faults(f"v{__version__}", dated)) == []
    assert len(list(release.tag_faults(f"v{__version__}", f"## {__version__} (unreleased)\n"))) == 1
    assert len(list(release.tag_faults(__version__, dated))) == 1
    assert len(list(release.tag_faults("v9.9.9", dated))) == 2


def test_a_wheel_without_weights_and_one_that_the_sdist_does_not_give_are_reported(
    release: Any, tmp_path: Path
) -> None:
    (tmp_path / "direct").mkdir()
    name = f"progrpo-{__version__}-py3-none-any.whl"
    for path, text in ((tmp_path / name, "a"), (tmp_path / "direct" / name, "b")):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("progrpo/__init__.py", text)
    with tarfile.open(tmp_path / f"progrpo-{__version__}.tar.gz", "w:gz"):
        pass
    faults = "\n".join(release.dist_faults(tmp_path))
    assert "has no progrpo/zoo/weights/shapes-flow/" in faults
    assert "differ in progrpo/__init__.py" in faults and "has no LICENSE" in faults


def test_every_supported_python_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = [c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert project["requires-python"] == f">={versions[0]}"
    assert workflow("ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == versions
    assert workflow("release.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == versions


def test_workflows_run_what_everybody_runs() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert commands("ci.yml") == [".ci/run", "make docs"]
    for name in ("ci.yml", "release.yml"):
        assert {word for run in commands(name) for word in re.findall(r"make ([a-z-]+)", run)} <= targets
        assert workflow(name)["permissions"] == {"contents": "read"}
    published = workflow("release.yml")["jobs"]["publish"]
    assert published["permissions"] == {"id-token": "write"} and published["needs"] == "test"


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.relative_to(GITHUB).as_posix())
def test_forms_can_be_read(form: Path) -> None:
    data = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert isinstance(data, dict)
    if form.parent.name == "ISSUE_TEMPLATE" and form.name != "config.yml":
        assert {"name", "description", "body"} <= set(data)
        ids = [part["id"] for part in data["body"]]
        assert len(ids) == len(set(ids))


def test_the_image_copies_files_that_are_there_and_not_ignored() -> None:
    text = (ROOT / "Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for name in line.split()[:-1]}
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert copied and all((ROOT / name).exists() and f"!{name}" in ignored for name in copied)
