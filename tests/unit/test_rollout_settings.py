"""The registries of samplers, selectors and plans: every built-in name is there, and says the truth without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from progrpo.checks import check
from progrpo.config import Config, from_dict
from progrpo.rollout.plan import PRESETS
from progrpo.rollout.prune import Selection
from progrpo.rollout.sampling import load_sampler
from progrpo.rollout.settings import SAMPLERS, SELECTORS, PlanSettings, SamplingSettings


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_samplers_facts_are_those_of_its_step(name):
    assert load_sampler(name).facts == SAMPLERS[name].facts == SamplingSettings(sampler=name).sampler_facts
    check(from_dict({"sampling": {"sampler": name}}))


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_selects(name):
    scores_PG = torch.arange(6.0)[None]
    selector = PlanSettings(selector=name).load_selector()
    selection = selector(scores_PG, 2, torch.ones(1, 6, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    assert isinstance(selection, Selection) and selection.indices_PK.shape == (1, 2)
    check(from_dict({"plan": {"selector": name}}))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_plan(name):
    assert PlanSettings(preset=name).plan(50).group_size == PRESETS[name][0].group_size
    assert from_dict({"plan": {"preset": name}}).plan.preset == name


@pytest.mark.parametrize("field", ["plan.selector", "plan.preset", "sampling.sampler"])
def test_a_name_that_is_none_is_refused_with_the_names(field):
    section, name = field.split(".")
    with pytest.raises(ValueError, match=rf"^{field} must be one of .*, or `module:\w+`, not 'nothing'"):
        check(from_dict({section: {name: "nothing"}}))


def test_built_in_names_are_checked_without_torch():
    code = "import sys; from progrpo.checks import check; from progrpo.config import from_dict;"
    code += " check(from_dict({'sampling': {'sampler': 'cps'}, 'plan': {'selector': 'uniform', 'preset': 'flash'}}));"
    code += " sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert Config().sampling.sampler_facts.has_density
