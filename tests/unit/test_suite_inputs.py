"""The models of a suite's evaluation: what they began from, one way to sample for all, and what tells them apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from progrpo.config import Config, EvalSettings, ModelSettings, to_dict
from progrpo.suites.table import SUITES
from progrpo.training.distributed import Ranks
from progrpo.training.suite_inputs import SuiteRequest, load_inputs
from progrpo.training.trained_model import ModelChoice


@pytest.fixture
def run(tmp_path):
    def write(name, model="shapes-flow", **evaluation):
        folder = tmp_path / name
        (folder / "lora").mkdir(parents=True)
        config = Config(model=ModelSettings(path=model), eval=EvalSettings(**evaluation))
        (folder / "config.json").write_text(json.dumps(to_dict(config)))
        (folder / "summary.json").write_text("{}")
        (folder / "lora" / "pytorch_lora_weights.safetensors").write_bytes(name.encode())
        return ModelChoice(str(folder))

    return write


def request(*models, **options):
    return SuiteRequest(SUITES["shapes"], models, Path("out"), **options)


def test_the_base_is_the_model_that_the_runs_began_from(run):
    a, b, other = run("a"), run("b"), run("c", model="shapes-diffusion")
    base = request(a, b).base
    assert base is not None and base.before and base.name == a.target
    assert request(ModelChoice("shapes-flow")).base is None
    assert request(ModelChoice("shapes-flow", Path("some-lora"))).base == ModelChoice("shapes-flow")
    with pytest.raises(ValueError, match="the runs began from different models; give the one to compare with as"):
        request(a, other).base  # noqa: B018
    assert request(a, other, against=b).base == b


def test_one_way_to_sample_is_that_of_the_runs(run):
    a, b, other = (run(name, num_inference_steps=steps, seed=7) for name, steps in zip("abc", (6, 6, 9), strict=True))
    settings = request(a, ModelChoice("shapes-flow"), b).settings
    assert (settings.num_inference_steps, settings.seed) == (6, 1234)
    assert request(ModelChoice("shapes-flow")).settings == EvalSettings()
    with pytest.raises(ValueError, match=r"different numbers of steps \(6, 9\); give one as --num-inference-steps"):
        request(a, other).settings  # noqa: B018
    given = request(a, other, given={"num_inference_steps": 3, "seed": 5}).settings
    assert (given.num_inference_steps, given.seed) == (3, 5)


def test_models_differ_by_their_weights_and_not_by_their_names(run):
    a, b = run("a"), run("b")
    asked = request(a, b)
    base = asked.base
    assert not asked.draw_alike(a, b) and asked.draw_alike(a, a) and not asked.draw_alike(a, base)
    assert asked.draw_alike(base, ModelChoice("shapes-flow"))
    assert not asked.draw_alike(base, replace(base, target="elsewhere", before=False))


def test_a_published_metric_that_is_not_built_in_is_a_note(tmp_path):
    copy = tmp_path / "dpg_bench.csv"
    copy.write_text("item_id,text\nfox1,A fox.\n")
    asked = SuiteRequest(
        SUITES["dpg"],
        (ModelChoice("shapes-flow"),),
        tmp_path,
        prompts=str(copy),
        rewards=("jpeg_compressibility",),
        features="pixels",
    )
    notes = load_inputs(asked, Ranks()).notes
    assert notes == ["the published metric of dpg is left out: mPLUG is asked the questions of the column questions"]
