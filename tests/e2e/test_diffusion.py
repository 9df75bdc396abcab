"""Diffusion models through the command line: a user's folder, prompts and reward; diffusers loads the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from progrpo.cli import main
from progrpo.tracking.run_folder import RunFolder

REWARD = """
import numpy as np

def redness(images, prompts):
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]
"""
# The fixture of a model's folder, and what is asked beside it
RUNS = {
    "sd, GRPO on DDIM with guidance and one noise a group": (
        "tiny_sd",
        ["--sampling.guidance-scale", "2", "--sampling.same-latent", "--sampling.latent-dtype", "bfloat16"],
    ),
    "sd that says v, all weights by NFT": ("tiny_sd_v", ["--model.weights", "full", "--objective.name", "nft"]),
    "sdxl, DGPO": ("tiny_sdxl", ["--objective.name", "dgpo"]),
    "flux, GRPO with embedded guidance": (
        "tiny_flux",
        ["--model.resolution", "16", "--sampling.guidance-scale", "3.5", "--sampling.embedded-guidance"],
    ),
    "sdxl, GRPO on CPS": ("tiny_sdxl", ["--sampling.sampler", "cps", "--model.weights", "full"]),
}

QUICK = ("sd, GRPO on DDIM with guidance and one noise a group", "sd that says v, all weights by NFT", "sdxl, DGPO")
RUNS_AND_SLOW_ONES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RUNS]


@pytest.fixture
def own(tmp_path, monkeypatch) -> list[str]:
    """Options that name a user's prompts and reward, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_reward.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("red cat\nblue dog\ngreen bird\n")
    prompts = ["--prompts.source", "prompts.txt", "--eval.prompts", "prompts.txt", "--eval.pictures", "3"]
    prompts += ["--eval.num-inference-steps", "2"]
    return [*prompts, "--reward.terms", "own_reward:redness", "--model.lora-rank", "2", "--optim.lr", "0.01"]


def untimed(folder: Path) -> list[dict[str, Any]]:
    records = RunFolder(folder).metrics.read()
    return [{k: v for k, v in r.items() if k != "seconds" and not k.startswith("time/")} for r in records]


def drawn(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images: np.ndarray = pipeline(
        "red cat", num_inference_steps=4, output_type="np", height=16, width=16, generator=generator
    ).images
    return images


@pytest.mark.parametrize("name", RUNS_AND_SLOW_ONES)
def test_a_folder_of_ones_own_is_trained_and_diffusers_loads_the_result(name, own, request, tmp_path):
    model, options = str(request.getfixturevalue(RUNS[name][0])), [*RUNS[name][1], *own]
    assert main(["train", "smoke", "--out", "run", "--model.path", model, *options]) == 0
    summary = RunFolder(tmp_path / "run").summary.read()
    assert summary["status"] == "finished" and summary["cost"]["predicted"] == summary["cost"]["counted"]
    base = drawn(DiffusionPipeline.from_pretrained(model))
    pipeline = DiffusionPipeline.from_pretrained(model)
    if (tmp_path / "run" / "lora").is_dir():
        pipeline.load_lora_weights(tmp_path / "run" / "lora", local_files_only=True)
    else:
        pipeline.unet = type(pipeline.unet).from_pretrained(tmp_path / "run" / "unet")
    assert np.abs(drawn(pipeline) - base).max() > 1e-3
    assert main(["sample", model, "--lora", "run", "--prompt", "red cat", "--out", "pictures"]) == 0
    assert Image.open(tmp_path / "pictures" / "000-00.png").size == (
        16,
        16,
    )  # as in the run, also where that was asked for


@pytest.mark.parametrize("weights", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_stop_and_resume_is_a_straight_run(weights, own, tiny_sd, tmp_path):
    options = ["--model.path", str(tiny_sd), "--model.weights", weights, *own]
    assert main(["train", "smoke", "--out", "straight", "--iterations", "3", *options]) == 0
    assert main(["train", "smoke", "--out", "resumed", "--iterations", "2", *options]) == 0
    assert main(["train", "--resume", "resumed", "--iterations", "3"]) == 0
    assert untimed(tmp_path / "straight") == untimed(tmp_path / "resumed") != []
    for when in ("before", "after"):
        both = [RunFolder(tmp_path / run).evaluations[when].read() for run in ("straight", "resumed")]
        assert both[0] == both[1] != []


@pytest.mark.slow
def test_a_run_goes_on_from_the_lora_of_another(own, tiny_sd, tmp_path, capsys):
    options = ["--model.path", str(tiny_sd), *own]
    assert main(["train", "smoke", "--out", "first", "--iterations", "1", *options]) == 0
    more = [*options, "--model.lora", "first", "--model.lora-rank", "7"]
    assert main(["train", "smoke", "--out", "second", "--iterations", "2", *more]) == 0
    first, second = (RunFolder(tmp_path / run) for run in ("first", "second"))
    ended, began, after = (
        [{**record, "picture": None} for record in run.evaluations[when].read()]
        for run, when in ((first, "after"), (second, "before"), (second, "after"))
    )
    assert ended == began != after
    assert main(["train", "smoke", "--out", "resumed", "--iterations", "1", *more]) == 0
    assert main(["train", "--resume", "resumed", "--iterations", "2"]) == 0
    assert untimed(tmp_path / "second") == untimed(tmp_path / "resumed") != []
    files = [tmp_path / run / "lora" / "pytorch_lora_weights.safetensors" for run in ("second", "resumed", "first")]
    tensors = [load_file(file) for file in files]
    assert all(torch.equal(tensors[0][name], tensor) for name, tensor in tensors[1].items())
    assert all(tensors[0][name].shape == tensor.shape for name, tensor in tensors[2].items())

    capsys.readouterr()
    asked = ["--reward", "own_reward:redness", "--prompts", "prompts.txt", "--pictures", "3", "--json"]
    asked += ["--num-inference-steps", "2"]  # as the run's own evaluations
    assert main(["eval", "second", *asked]) == 0  # what it began with is in what it saved, and not twice
    graded = json.loads(capsys.readouterr().out)["graded"]
    assert graded == pytest.approx(second.summary.read()["reward_after"], abs=5e-5)

    assert main(["plan", "smoke", *options, "--model.lora", "absent"]) == 0
    capsys.readouterr()
    for wrong, sentence in (
        (["--model.lora", "absent"], "cannot use the LoRA absent: it is neither a folder, a file nor"),
        (["--model.lora", "first", "--model.weights", "full"], "model.lora must be empty for model.weights full"),
    ):
        assert main(["train", "smoke", "--out", "no", *options, *wrong]) == 2 and not (tmp_path / "no").exists()
        error = capsys.readouterr().err
        assert error.startswith(f"progrpo: error: {sentence}") and error.count("\n") == 1


def test_a_negative_prompt_is_the_runs_wherever_it_is_looked_at(own, tiny_sd, tmp_path, capsys):
    guided = ["--sampling.guidance-scale", "3", "--eval.guidance-scale", "3"]
    away = ["--sampling.negative-prompt", "blue dog"]
    options = ["--model.path", str(tiny_sd), *own, *guided]
    assert main(["train", "smoke", "--out", "run", "--iterations", "1", *options, *away]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["sampling"]["negative_prompt"] == "blue dog"
    assert main(["train", "--resume", "run", "--iterations", "2"]) == 0
    for out, said in (("own", []), ("same", ["blue dog"]), ("other", ["green bird"]), ("none", [""])):
        negative = ["--negative-prompt", *said] if said else []
        assert main(["sample", "run", "--prompt", "red cat", "--out", out, *negative]) == 0
    pictures = [np.asarray(Image.open(f"{out}/000-00.png"), int) for out in ("own", "same", "other", "none")]
    apart = [np.abs(picture - pictures[0]).max() for picture in pictures[1:]]
    assert apart[0] <= 1 < min(apart[1:])
    capsys.readouterr()
    measured = ["eval", "run", "--reward", "own_reward:redness", "--pictures", "2", "--json"]
    assert main(measured) == 0
    assert json.loads(capsys.readouterr().out)["negative_prompt"] == "blue dog"
    assert main([*measured, "--guidance-scale", "1"]) == 0
    assert "negative_prompt" not in json.loads(capsys.readouterr().out)
    for words in (["sample", "run", "--prompt", "x"], measured):
        assert main([*words, "--guidance-scale", "1", "--negative-prompt", "x"]) == 2
        error = capsys.readouterr().err
        assert error == (
            "progrpo: error: --negative-prompt has no effect at a guidance scale of 1;"
            " give --guidance-scale above 1, or"
            " leave it out\n"
        )


def test_the_papers_plans_are_costed_without_weights(capsys):
    def plan(*args: str) -> dict[str, Any]:
        assert main(["plan", *args, "--json"]) == 0
        costs: dict[str, Any] = json.loads(capsys.readouterr().out)
        return costs

    sd14 = plan("sd14-hpsv2")
    assert sd14["path"] == [48, 32, 8] and sd14["prune_steps"] == [30, 40]
    # with guidance a call counts two; a group has one initial latent, so that its first call is made once
    assert sd14["nfe_per_prompt"] == 2 * (1 + 48 * 30 + 32 * 10 + 8 * 9)
    assert (sd14["decodes_per_prompt"], sd14["trained_steps_per_prompt"]) == (48 + 32 + 8, 8 * 49)
    baseline = plan("sd14-hpsv2", "--plan.preset", "custom", "--plan.group-size", "16")
    assert (baseline["path"], baseline["nfe_per_prompt"]) == ([16], 2 * (1 + 16 * 49))
    assert plan("sd35m-pickscore")["path"] == [48, 24, 12]
    assert plan("sd35m-pickscore", "--plan", "flash")["path"] == [24, 16, 12]
    assert plan("sd35m-pickscore", "--plan", "none")["path"] == [24]


def test_what_a_diffusion_model_has_not_is_refused_in_a_sentence(own, tiny_sd, capsys):
    for options, sentence in (
        (["--sampling.sampler", "dance"], "sampling.sampler: dance is the SDE of flow models"),
        (["--sampling.shift", "3"], "sampling.shift: this is a diffusion model, whose grid has no shift"),
        (["--sampling.train-last-step", "--sampling.sampler", "cps"], None),
    ):
        code = main(["train", "smoke", "--out", "no", "--overwrite", "--model.path", str(tiny_sd), *options, *own])
        error = capsys.readouterr().err
        if sentence is None:  # its grid ends at a noise level above 0
            assert code == 0
        else:
            assert code == 2 and error.startswith(f"progrpo: error: {sentence}") and error.count("\n") == 1


def test_built_in_weights_that_are_not_there_are_named_with_the_command_that_makes_them(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("progrpo.policies.load.WEIGHTS", tmp_path)
    assert main(["sample", "shapes-diffusion", "--prompt", "a red circle"]) == 2
    assert "progrpo pretrain shapes-diffusion --export makes them" in capsys.readouterr().err
