"""A model that edits, through the command line: prompts with a picture each, and a reward that compares with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import progrpo
from progrpo.cli import main
from progrpo.config import PreviewSettings
from progrpo.tracking.run_folder import RunFolder

REWARD = """
import numpy as np

def likeness(images, prompts, image):
    own, sources = ([np.asarray(p.resize((16, 16)), dtype=float) for p in given] for given in (images, image))
    return [-float(np.abs(a - b).mean()) / 255 for a, b in zip(own, sources)]
"""
TEXTS = ("red cat", "blue dog", "green bird")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_kontext: Path) -> list[str]:
    """Options of a run in the current folder, whose prompt file names pictures beside itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_likeness.py").write_text(REWARD)
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "c.webp")):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "pictures" / name)
    rows = zip(TEXTS, ("pictures/a.png", "pictures/b.jpg", str(tmp_path / "data/pictures/c.webp")), strict=True)
    write([{"prompt": text, "image": image} for text, image in rows])
    prompts = ["--prompts.source", "data/prompts.jsonl", "--eval.prompts", "data/prompts.jsonl"]
    model = ["--model.path", str(tiny_kontext), "--model.resolution", "16", "--model.lora-rank", "2"]
    model += ["--model.max-sequence-length", "16"]
    return [*prompts, *model, "--eval.pictures", "3", "--reward.terms", "own_likeness:likeness", "--optim.lr", "0.01"]


def write(rows: list[dict[str, Any]]) -> None:
    Path("data/prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def edited(model: Path, image: str, lora: Path | None = None) -> np.ndarray:
    pipeline = DiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora, local_files_only=True)
    source = Image.open(image).resize((16, 16), Image.Resampling.LANCZOS)
    inputs = {"image": source, "prompt": "red cat", "height": 16, "width": 16, "max_area": 256, "_auto_resize": False}
    drawn = pipeline(**inputs, num_inference_steps=4, output_type="np", generator=torch.Generator().manual_seed(0))
    return drawn.images


def test_it_is_trained_measured_and_asked_for_pictures(own, tmp_path, tiny_kontext, capsys):
    options = ["smoke", *own, "--audit.every", "1", "--eval.every", "1"]
    assert main(["train", *options, "--out", "run", "--iterations", "2"]) == 0
    summary = RunFolder(tmp_path / "run").summary.read()
    assert summary["status"] == "finished" and summary["cost"]["predicted"] == summary["cost"]["counted"]
    assert not any(summary["rewards"]["missing"].values()) and summary["reward_before"] != summary["reward_after"]
    base, trained = (edited(tiny_kontext, "data/pictures/a.png", lora) for lora in (None, tmp_path / "run" / "lora"))
    assert np.abs(trained - base).max() > 1e-3

    capsys.readouterr()
    asked = ["--reward", "own_likeness:likeness", "--pictures", "3", "--num-inference-steps", "6", "--json"]
    assert main(["eval", "run", *asked]) == 0
    after = json.loads(capsys.readouterr().out)["graded"]
    assert after == pytest.approx(summary["reward_after"], abs=2e-4)

    sources = ["--image", "data/pictures/a.png", "data/pictures/b.jpg"]
    assert main(["sample", "run", "--prompt", "red cat", "red cat", *sources, "--out", "two", "--seed", "3"]) == 0
    assert main(["sample", "run", "--prompt", "red cat", *sources[:2], "--out", "one", "--seed", "3"]) == 0
    one, (first, second) = (Image.open("one/000-00.png"), (Image.open(f"two/00{i}-00.png") for i in range(2)))
    assert np.abs(np.asarray(one, int) - np.asarray(first, int)).max() <= 1
    assert np.asarray(second, int).shape == (16, 16, 3)


def test_what_is_lacking_is_said_in_a_sentence_and_no_run_is_begun(own, tmp_path, tiny_flux, capsys):
    def refused(*args: str) -> str:
        assert main(list(args)) == 2 and not (tmp_path / "run").exists()
        error = capsys.readouterr().err
        assert error.startswith("progrpo: error: ") and error.count("\n") == 1
        return error

    kontext = own[own.index("--model.path") + 1]
    write([{"prompt": TEXTS[0], "image": "pictures/a.png"}, {"prompt": TEXTS[1]}])
    plain = ["jpeg_compressibility" if option == "own_likeness:likeness" else option for option in own]
    assert "the prompt 'blue dog' has no column image" in refused("train", "smoke", *plain, "--out", "run")
    assert "reward likeness takes 'image', but the prompt 'blue dog'" in refused("train", "smoke", *own, "--out", "run")
    write([{"prompt": TEXTS[0], "image": "pictures/a.png"}, {"prompt": TEXTS[1], "image": "pictures/none.png"}])
    missing = refused("train", "smoke", *own, "--out", "run")
    assert "line 2: image: no picture " in missing and "data/pictures/none.png" in missing
    (tmp_path / "data" / "pictures" / "none.png").write_text("no picture")
    assert "data/pictures/none.png cannot be read as a picture" in refused("train", "smoke", *own, "--out", "run")
    ask = ["eval", kontext, "--prompts", "data/prompts.jsonl", "--reward", "own_likeness:likeness"]
    assert "data/pictures/none.png cannot be read as a picture" in refused(*ask)
    sample = ["sample", kontext, "--prompt", "a", "b", "c"]
    assert "the prompt 'a' has no column image" in refused(*sample)
    assert "--image: 2 pictures for 3 prompts" in refused(*sample, "--image", "one.png", "two.png")
    assert "none.png cannot be read as a picture: no such file" in refused(*sample, "--image", "none.png")
    assert f"--image: {tiny_flux} takes prompts alone" in refused(
        "sample", str(tiny_flux), "--prompt", "a", "--image", "data/pictures/a.png"
    )


def test_python_code_gives_pictures_and_its_reward_gets_them(
    tiny_pipeline, tiny_kontext, tiny_config, prompts_of, tmp_path
):
    prompts, seen = prompts_of(*TEXTS), []

    def likeness(images: Any, texts: Any, image: Any) -> list[float]:
        for text, source in zip(texts, image, strict=True):
            (prompt,) = (p for p in prompts if p.text == text)
            seen.append(np.array_equal(np.asarray(source), np.asarray(prompt.columns["image"])))
        return [-float(np.abs(np.asarray(a, float) - np.asarray(b)).mean()) for a, b in zip(images, image, strict=True)]

    config = tiny_config(preview=PreviewSettings(ode_steps=2))
    config = replace(config, model=replace(config.model, resolution=16))
    run = progrpo.train(tiny_pipeline(tiny_kontext), prompts, likeness, config=config, out=tmp_path / "run")
    assert run.summary.read()["status"] == "finished" and seen and all(seen)
