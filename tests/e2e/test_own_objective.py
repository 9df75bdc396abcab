"""An objective of the user's own: one file, named on the command line, with settings of its own."""

from __future__ import annotations

import json
import sys

import pytest

from progrpo.cli import main
from progrpo.config import from_dict
from progrpo.objectives.settings import OBJECTIVES, LossSettings, load_objective

MODULE = """
from dataclasses import dataclass
from typing import ClassVar

from progrpo.objectives.base import Loss
from progrpo.objectives.forward_process import Draws, NoisedLatents
from progrpo.objectives.settings import DrawnSettings
from progrpo.settings import above, setting


@dataclass(frozen=True)
class ReinforceSettings(DrawnSettings):
    draws: int = 2
    scale: float = setting(1.0, above(0))


@dataclass(frozen=True)
class Reinforce:
    settings: ReinforceSettings
    Settings: ClassVar = ReinforceSettings

    @property
    def clip_range(self):
        return None

    def prepare(self, policy, experience, microbatch, updates):
        return experience

    def loss(self, policy, experience, items_B):
        draws = Draws(self.settings.draws, self.settings.time_fraction)
        noised = NoisedLatents.gather(policy, experience, items_B, draws)
        return Loss(self.settings.scale * noised.advantages * noised.error(noised.predict(policy)))


class Unsettled:
    pass
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "own_losses"
    sys.modules.pop("own_losses", None)


def test_an_objective_of_ones_own_trains(own_module, on_a_tiny_model, tmp_path):
    options = [*on_a_tiny_model, "--audit.every", "0", "--iterations", "2"]
    objective = ["--objective.name", f"{own_module}:Reinforce", "--objective.custom", '{"scale": 0.5}']
    assert main(["train", "smoke", "--out", "run", *options, *objective]) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())["objective"]
    assert config["name"] == "own_losses:Reinforce" and config["custom"] == {"scale": 0.5}
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(record["update/grad_norm"] > 0 for record in metrics)
    assert metrics[0]["rollout/trained_steps"] == 2 * 2 * 4  # draws, prompts, survivors
    assert main(["train", "--resume", "run", "--iterations", "3"]) == 0


@pytest.mark.parametrize(
    ("name", "custom", "message"),
    [
        ("own_losses:Reinforce", {"scale": -1}, "objective.custom.scale must be above 0, not -1.0"),
        ("own_losses:Reinforce", {"size": 1}, "objective.custom.size is not a field"),
        ("own_losses:Unsettled", {}, "objective.name own_losses:Unsettled must be a class with `Settings`"),
        ("own_losses:Nothing", {}, "has no function or class 'Nothing'"),
        ("no_such_module:Loss", {}, "there is no module 'no_such_module' in this folder or installed"),
        (
            "reinforce",
            {},
            "objective.name must be one of grpo, nft, awm, dgpo, elbo, dpo, sft, or `module:Class`, not 'reinforce'",
        ),
        ("nft", {"scale": 1}, "objective.custom must be empty for objective.name nft; give objective.nft"),
    ],
)
def test_what_cannot_be_an_objective_is_refused_in_a_sentence(own_module, capsys, name, custom, message):
    options = ["--objective.name", name, "--objective.custom", json.dumps(custom)]
    assert main(["train", "smoke", "--out", "run", *options]) == 2
    assert message in capsys.readouterr().err


def test_registered_objectives_are_their_settings_classes_counterparts():
    for name in OBJECTIVES:
        loss = from_dict({"objective": {"name": name}}).objective.loss
        kind = load_objective(name)
        assert isinstance(loss, LossSettings) and kind.Settings is type(loss)
