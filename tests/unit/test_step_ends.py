"""Where the steps of a diffusion model end: as in diffusers' own loop, for every spacing and number of steps."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from progrpo.config import Config, ModelSettings, config_to_json
from progrpo.diffusion.process import Process
from progrpo.policies.load import policy_from_pipeline
from progrpo.recipes import load_recipe
from progrpo.training.library import _complete
from tests.support.grids import SAMPLERS

SPACINGS = ("leading", "trailing", "linspace")
COUNTS = (1, 2, 6, 7, 10, 61, 300)  # of 1000, and 61 is a trailing grid that diffusers makes one step too long


@pytest.fixture(params=SPACINGS)
def pair(request, tiny_sd, tiny_pipeline) -> Any:
    """A policy, and diffusers' scheduler of the same pipeline."""
    pipeline = tiny_pipeline(tiny_sd)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing=request.param, clip_sample=False
    )
    own = DDIMScheduler.from_config(pipeline.scheduler.config)
    return policy_from_pipeline(pipeline, ModelSettings(lora_rank=2)), own


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_is_the_step_of_diffusers_for_every_spacing_and_number_of_steps(pair, eta):
    policy, own = pair
    generator = torch.Generator().manual_seed(0)
    for count in COUNTS:
        own.set_timesteps(count)
        process = Process(policy.prediction, SAMPLERS["ddim"], policy.levels(count), (eta,) * count)
        for step, timestep in list(enumerate(own.timesteps[:count]))[:: max(1, count // 20)]:
            x, output = torch.randn(2, 1, 4, 8, 8, generator=generator)
            mean = own.step(output, timestep, x, eta=eta, variance_noise=torch.zeros_like(x)).prev_sample
            if eta:
                actual, std = process.mean_std(step, x, output)
                end = timestep - 1000 // count
                assert std.item() ** 2 == pytest.approx(own._get_variance(timestep, end).item(), rel=1e-3, abs=1e-6)
            else:
                actual = process.deterministic(step, x, output)
            assert process.timestep(step, x) == timestep
            torch.testing.assert_close(actual, mean, rtol=1e-4, atol=1e-4 * mean.abs().max().item())


def test_steps_that_end_where_the_next_begin_are_another_setting(tiny_sd, tiny_pipeline):
    def levels(spacing: str, count: int, ends: Any) -> Any:
        pipeline = tiny_pipeline(tiny_sd)
        pipeline.scheduler.register_to_config(timestep_spacing=spacing)
        return policy_from_pipeline(pipeline, ModelSettings(lora_rank=2, step_ends=ends)).levels(count)

    assert levels("linspace", 10, "next").ends is None
    ends = levels("linspace", 10, "diffusers").ends
    assert ends.timestep.tolist() == [899, 788, 677, 566, 455, 344, 233, 122, 11, 0]
    for spacing, size in (("linspace", 0.15), ("trailing", 0.003)):  # as config.py says of both settings
        grid = levels(spacing, 6, "diffusers")
        apart = torch.stack([grid.ends.alpha - grid.alpha[1:], grid.ends.sigma - grid.sigma[1:]])
        assert 0.5 * size < apart[:, :-1].norm(dim=0).max() < 1.05 * size  # of x0 and noise of one size
    assert levels("trailing", 10, "diffusers").ends is None and levels("trailing", 7, "diffusers").ends is not None


def test_a_run_from_before_the_setting_goes_on_as_it_was(tmp_path):
    config = json.loads(config_to_json(load_recipe("smoke")))
    for name in ("new", "old", "old.json"):
        written = (
            config
            if name == "new"
            else {**config, "model": {k: v for k, v in config["model"].items() if k != "step_ends"}}
        )
        folder = tmp_path / name
        if name.endswith(".json"):  # a configuration of one's own: fields that are not there have their defaults
            folder.write_text(json.dumps(written))
            continue
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(written))
    ends = {name: load_recipe(str(tmp_path / name)).model.step_ends for name in ("new", "old", "old.json")}
    assert ends == {"new": "diffusers", "old": "next", "old.json": "diffusers"}


def test_a_call_that_goes_on_with_such_a_run_need_not_name_it(tiny_sd3, tiny_pipeline):
    def ends(given: Any, own: Any) -> str:
        configs = (Config(model=ModelSettings(step_ends=one)) for one in (given, own))
        asked, recorded = configs
        return _complete(asked, recorded, tiny_pipeline(tiny_sd3)).model.step_ends

    assert ends("diffusers", "next") == "next" and ends("diffusers", "diffusers") == "diffusers"
    assert ends("next", "diffusers") == "next"  # which is then refused as a change
