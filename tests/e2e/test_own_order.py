"""An order of prompts of the user's own: one class, named on the command line."""

from __future__ import annotations

import json
import sys

import pytest

from progrpo.cli import main
from progrpo.config import from_dict
from progrpo.prompts.order import make_order
from progrpo.prompts.settings import ORDERS
from progrpo.types import Prompt

MODULE = """
class OneFurther:
    '''The prompts of the file from its start, one further after each iteration.'''

    def __init__(self, prompts, seed):
        self._all = [prompt for kind in prompts.values() for prompt in kind]
        self._observed = 0

    @property
    def all_prompts(self):
        return self._all

    def prompts_for(self, iteration, count):
        return self._all[self._observed : self._observed + count]

    def possible_prompts(self, first, last, count):
        return self._all[first : last - 1 + count]

    def observe(self, iteration, signals):
        self._observed += 1

    def metrics(self):
        return {"prompts/observed": self._observed}

    def state_dict(self):
        return {"observed": self._observed}

    def load_state_dict(self, state):
        self._observed = state["observed"]


class Nothing:
    def __init__(self, prompts, seed):
        pass


class OfPrompts:
    def __init__(self, prompts):
        pass
"""
OPTIONS = ["--audit.every", "0", "--prompts.order"]


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_orders.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("own_orders", None)


def test_an_order_of_ones_own_is_used_and_resumed(own_module, on_a_tiny_model, tmp_path):
    options = [*on_a_tiny_model, *OPTIONS, "own_orders:OneFurther", "--iterations", "2", "--prompts.per-iteration", "1"]
    assert main(["train", "smoke", "--out", "run", *options]) == 0
    assert main(["train", "--resume", "run", "--iterations", "3"]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["prompts/observed"] for record in metrics] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_orders:Nothing", "prompts.order own_orders:Nothing has no all_prompts, prompts_for, possible_prompts"),
        ("own_orders:OfPrompts", "prompts.order: own_orders:OfPrompts(prompts, seed): TypeError: "),
        ("own_orders:Absent", "has no function or class 'Absent'"),
        ("signals", "prompts.order must be one of turn, signal, or `module:Class`, not 'signals'"),
    ],
)
def test_what_cannot_be_an_order_is_refused_in_a_sentence(own_module, capsys, name, message):
    assert main(["train", "smoke", "--out", "run", *OPTIONS, name]) == 2
    assert message in capsys.readouterr().err


def test_every_built_in_order_can_be_made():
    prompts = {"": (Prompt("a"), Prompt("b"))}
    for name in ORDERS:
        assert from_dict({"prompts": {"order": name}}).prompts.order == name
        order = make_order(name, prompts, seed=0)
        assert {prompt.text for prompt in order.prompts_for(0, 2)} == {"a", "b"}
