"""Names that stand for objects: built-in ones, those of a user's modules, and the sentences that refuse others."""

from __future__ import annotations

import sys
from collections import OrderedDict

import pytest

from progrpo.registry import UnknownNameError, load_named, one_of, refuse_within_import

REGISTRY = {"ordered": "collections:OrderedDict", "join": "os.path:join"}


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("class Thing:\n    pass\n\ndef thing():\n    pass\n\nnothing = None\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package/deep.py").write_text("from own import Thing\n")
    (tmp_path / "broken.py").write_text("import os\n\nvalue = 1 / 0\n")
    (tmp_path / "lacking.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "runs.py").write_text("from progrpo.registry import refuse_within_import\n\nrefuse_within_import()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("own", "package", "package.deep", "broken", "lacking", "runs"):
        sys.modules.pop(name, None)


def test_built_ins_and_the_users_own():
    assert load_named("ordered", REGISTRY, "kind") is OrderedDict
    assert load_named("own:Thing", REGISTRY, "kind").__name__ == "Thing"
    assert load_named("package.deep:Thing", REGISTRY, "kind") is load_named("own:Thing", REGISTRY, "kind")
    assert load_named("collections:OrderedDict", {}, "kind") is OrderedDict


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "orderd",
            "kind 'orderd' is neither built in (ordered, join) nor of the form module:function; did you mean ordered?",
        ),
        ("own.thing", "nor of the form module:function; a function thing of a module is own:thing"),
        ("own.py:thing", "a module is named as Python imports it; write own:thing"),
        ("./own.py:thing", "a module is named as Python imports it; write own:thing"),
        ("package/deep.py", "a module is named as Python imports it; write package.deep:function"),
        ("own:Thig", "the module 'own' has no function or class 'Thig' (its file is "),
        ("own:nothing", "the module 'own' has no function or class 'nothing'"),
        ("gone:thing", "kind 'gone:thing': there is no module 'gone' in this folder or installed"),
        ("lacking:thing", "its module cannot be imported: lacking.py, line 1: ModuleNotFoundError: "),
        ("broken:value", "its module cannot be imported: broken.py, line 3: ZeroDivisionError: division by zero"),
        ("runs:thing", "importing its module starts a run; put the code that starts it under"),
    ],
)
def test_other_names_are_refused_in_a_sentence(name, sentence):
    with pytest.raises(UnknownNameError) as refused:
        load_named(name, REGISTRY, "kind", "function")
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_nothing_is_refused_outside_of_an_import():
    refuse_within_import()


def test_the_rule_of_a_field():
    rule = one_of(REGISTRY, "Class")
    assert rule.text == "one of ordered, join, or `module:Class`"
    assert all(map(rule.holds, ("ordered", "own:Thing", "a.b-c:d.e")))
    assert not any(map(rule.holds, ("other", "own:", ":Thing", "own thing:x", "")))
