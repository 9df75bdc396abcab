"""Who may import whom, read from the source: imports under `if TYPE_CHECKING` do not count, those in functions do."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

import progrpo

ROOT = Path(progrpo.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

PROTOCOLS = (
    "progrpo.policies.base",
    "progrpo.rewards.base",
    "progrpo.types",
    "progrpo.diffusion",
    "progrpo.packing",
    "progrpo.frames",
)

SETTINGS = (
    "progrpo.settings",
    "progrpo.registry",
    "progrpo.objectives.settings",
    "progrpo.policies.settings",
    "progrpo.prompts.settings",
    "progrpo.rewards.settings",
    "progrpo.rollout.settings",
    "progrpo.tracking.settings",
    "progrpo.training.settings",
)

# Each rule: the modules it binds (a module and all below it), and what of progrpo they may import besides themselves.
MAY_SEE = {
    "progrpo.types": (),
    "progrpo.settings": ("progrpo.messages",),
    "progrpo.registry": ("progrpo.messages", "progrpo.settings"),
    "progrpo.config": (*SETTINGS, "progrpo.rollout.plan", "progrpo.types"),
    "progrpo.checks": (*SETTINGS, "progrpo.rollout.plan", "progrpo.config"),
    "progrpo.diffusion": (),
    "progrpo.packing": (),
    "progrpo.frames": (),
    "progrpo.rollout": (*PROTOCOLS, "progrpo.settings", "progrpo.registry", "progrpo.messages"),
    "progrpo.rollout.plan": ("progrpo.types",),
    "progrpo.rollout.window": (),
    "progrpo.rollout.prune": (),
    "progrpo.objectives": (*PROTOCOLS, "progrpo.settings", "progrpo.registry"),
    "progrpo.objectives.advantage": (),
    "progrpo.objectives.surrogate": (),
}
# And whom they must not see; the rim stands above everyone.
RIM = (
    "progrpo.cli",
    "progrpo.studio",
    "progrpo.training",
    "progrpo.imports",
    "progrpo.recipes",
    "progrpo.config",
    "progrpo.checks",
    "progrpo.repro",
)
MUST_NOT_SEE = {
    "progrpo.training": ("progrpo.cli", "progrpo.imports", "progrpo.studio", "progrpo.publish", "progrpo.repro"),
    "progrpo.repro": ("progrpo.cli", "progrpo.imports", "progrpo.studio", "progrpo.publish"),
    "progrpo.studio": ("progrpo.cli", "progrpo.imports"),
    "progrpo.imports": ("progrpo.cli", "progrpo.training"),
    "progrpo.policies": (*RIM, "progrpo.rollout", "progrpo.objectives", "progrpo.tracking", "progrpo.publish"),
    "progrpo.rewards": (*RIM, "progrpo.rollout", "progrpo.objectives", "progrpo.tracking", "progrpo.publish"),
    "progrpo.tracking": (*RIM, "progrpo.pages", "progrpo.publish"),
    "progrpo.pages": (*RIM, "progrpo.publish"),
    "progrpo.preferences": (*RIM, "progrpo.rollout", "progrpo.objectives", "progrpo.rewards", "progrpo.publish"),
    "progrpo.suites": (
        *RIM,
        "progrpo.rollout",
        "progrpo.objectives",
        "progrpo.policies",
        "progrpo.rewards",
        "progrpo.publish",
    ),
    "progrpo.publish": (*RIM, "progrpo.rollout", "progrpo.objectives", "progrpo.rewards"),
    "progrpo.recipes": ("progrpo.cli", "progrpo.training", "progrpo.imports"),
}
# A tuned CLIP is a network that is trained here and is no policy. It is fetched and called as those of rewards are.
EXCEPT = {"progrpo.preferences.reward_model.clip": ("progrpo.rewards.clip", "progrpo.rewards.hub")}
KNOWS_PEFT = ("progrpo.preferences.reward_model.clip",)
KNOW_CONFIG = (
    "progrpo.cli",
    "progrpo.imports",
    "progrpo.recipes",
    "progrpo.config",
    "progrpo.checks",
    "progrpo.training",
    "progrpo.studio",
    "progrpo.repro.arms",
    "progrpo.repro.budget",
    "progrpo.repro.campaign",
    "progrpo.repro.fig1",
)
TORCH_ONLY = (
    "progrpo.types",  # where rows are put one after another
    "progrpo.diffusion",
    "progrpo.packing",
    "progrpo.rollout.prune",
    "progrpo.objectives.advantage",
    "progrpo.objectives.surrogate",
)
STANDARD_LIBRARY_ONLY = (
    *SETTINGS,
    "progrpo.rollout.plan",
    "progrpo.rollout.window",
    "progrpo.config",
    "progrpo.checks",
)
KNOW_DIFFUSERS_AND_PEFT = ("progrpo.policies", "progrpo.zoo")
FREE_OF_TORCH = (
    "progrpo.checks",
    "progrpo.cli",
    "progrpo.config",
    "progrpo.imports.flow_factory.read",
    "progrpo.imports.flow_grpo.read",
    "progrpo.imports.unirl.read",
    "progrpo.imports.verl_omni.read",
    "progrpo.recipes",
    "progrpo.rewards.load",  # processes of a plain function load it, and need no torch
    "progrpo.rollout.plan",
    "progrpo.pages.board",
    "progrpo.pages.compare",
    "progrpo.pages.report",
    "progrpo.preferences.agreement",
    "progrpo.preferences.label",
    "progrpo.preferences.pairs",
    "progrpo.publish.layouts",
    "progrpo.suites.statistics",
    "progrpo.suites.table",
    "progrpo.types",
)


def module_of(path: Path) -> str:
    return ".".join(("progrpo", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def within(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


def runtime_children(node: ast.AST) -> Iterable[ast.AST]:
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        return node.orelse
    return ast.iter_child_nodes(node)


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in runtime_children(node):
        yield from runtime_nodes(child)


def names_from(node: ast.ImportFrom, module: str, is_package: bool) -> Iterator[str]:
    """The modules that `from base import names` loads: a name may be a module of progrpo itself."""
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        parents = parts[: len(parts) - node.level + is_package]
        base = ".".join([*parents, *([base] if base else [])])
    for alias in node.names:
        below = f"{base}.{alias.name}"
        yield below if below in MODULES else base


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    modules: set[str] = set()
    for node in runtime_nodes(ast.parse(source, module)):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.update(names_from(node, module, is_package))
    return modules - {"__future__"}


@cache
def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    return imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")


def inner(module: str) -> set[str]:
    return {name for name in imports_of(module) if within(name, ("progrpo",))}


def outer(module: str) -> set[str]:
    roots = {name.split(".")[0] for name in imports_of(module) if not within(name, ("progrpo",))}
    return roots - sys.stdlib_module_names


def bound_by(*rooms: str) -> list[str]:
    return [module for module in MODULES if within(module, rooms)]


def test_reading_imports():
    source = """
from __future__ import annotations
import os, torch.nn as nn
from typing import TYPE_CHECKING
from progrpo.rollout import plan
from progrpo.rollout.plan import Plan
from . import prune
from ..types import Cost
if TYPE_CHECKING:
    import diffusers
else:
    import peft
def late():
    from progrpo import config
"""
    assert imports(source, "progrpo.rollout.rollout") == {
        "os",
        "torch.nn",
        "typing",
        "progrpo.rollout.plan",
        "progrpo.rollout.prune",
        "progrpo.types",
        "peft",
        "progrpo.config",
    }
    assert imports("from . import plan", "progrpo.rollout", is_package=True) == {"progrpo.rollout.plan"}


@pytest.mark.parametrize("room", MAY_SEE)
def test_rooms_see_only_what_stands_below_them(room):
    for module in bound_by(room):
        strangers = {name for name in inner(module) if not within(name, (room, *MAY_SEE[room]))}
        assert not strangers, f"{module} imports {sorted(strangers)}"


@pytest.mark.parametrize("room", MUST_NOT_SEE)
def test_nobody_looks_up(room):
    for module in bound_by(room):
        seen = {name for name in inner(module) if within(name, MUST_NOT_SEE[room])}
        assert not seen - {*EXCEPT.get(module, ())}, f"{module} imports {sorted(seen)}"


def test_only_the_rim_knows_config_training_and_the_command_line():
    for module in MODULES:
        entrance = module in ("progrpo", "progrpo.__main__")
        if not entrance and not within(module, KNOW_CONFIG):
            assert not within_any(inner(module), "progrpo.config"), f"{module} imports progrpo.config"
        if not entrance and not within(module, ("progrpo.cli", "progrpo.repro", "progrpo.studio", "progrpo.training")):
            seen = inner(module) - ({"progrpo.training.settings"} if module == "progrpo.config" else set())
            assert not within_any(seen, "progrpo.training"), f"{module} imports progrpo.training"
        if not entrance and not within(module, ("progrpo.cli",)):
            assert not within_any(inner(module), "progrpo.cli"), f"{module} imports progrpo.cli"


def test_no_room_sees_the_settings_of_another():
    for module in MODULES:
        room = module.split(".")[1] if "." in module else ""
        strangers = {name for name in inner(module) if name in SETTINGS[2:] and name.split(".")[1] != room}
        assert not strangers or within(module, RIM), f"{module} imports {sorted(strangers)}"


def within_any(names: set[str], room: str) -> bool:
    return any(within(name, (room,)) for name in names)


def test_diffusers_and_peft_are_known_to_policies_and_the_zoo_only():
    for module in MODULES:
        if not within(module, KNOW_DIFFUSERS_AND_PEFT):
            barred = {"diffusers"} if within(module, KNOWS_PEFT) else {"diffusers", "peft"}
            assert not outer(module) & barred, module


def test_formulas_import_torch_only():
    for module in bound_by(*TORCH_ONLY):
        assert outer(module) <= {"torch"}, module


def test_plans_and_config_import_the_standard_library_only():
    for module in bound_by(*STANDARD_LIBRARY_ONLY):
        assert not outer(module), module


@pytest.mark.parametrize("module", [module for module in FREE_OF_TORCH if module in MODULES])
def test_importing_it_does_not_import_torch(module):
    check = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    assert subprocess.run([sys.executable, "-c", check], env=environment, check=False).returncode == 0
