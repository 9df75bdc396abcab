"""`progrpo pretrain`: every stage with a tiny budget, stopped and resumed, exported as a folder that diffusers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from progrpo.zoo.shapes.judge import load_judge
from progrpo.zoo.shapes.models import build_transformer
from progrpo.zoo.shapes.pretrain import Budget, pretrain

TINY = Budget(
    vae_steps=2, vae_batch=2, judge_steps=2, judge_batch=2, pictures=64, flow_steps=3, flow_batch=4, test_pictures=12
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    pretrain(folder / "state", budget=TINY, device="cpu", export=folder / "weights", log=lambda line: None)
    return folder


def test_folder_loads_with_no_further_argument(exported: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(exported / "weights" / "shapes-flow")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.text_encoder_3 is not None
    images = pipeline("a red circle", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)


def test_weights_are_safetensors_below_the_limit(exported: Path) -> None:
    files = [f for f in (exported / "weights").rglob("*") if f.is_file()]
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert sum(f.stat().st_size for f in files) < 25e6


def test_judge_loads(exported: Path) -> None:
    assert sum(p.numel() for p in load_judge(exported / "weights" / "shapes-judge").parameters()) > 0


def test_finished_stages_are_not_trained_again(exported: Path) -> None:
    lines: list[str] = []
    again = pretrain(exported / "state", budget=TINY, device="cpu", log=lines.append)
    assert "flow: resumed at step 3" in lines
    first = StableDiffusion3Pipeline.from_pretrained(exported / "weights" / "shapes-flow").transformer.state_dict()
    assert all(torch.equal(first[name], t) for name, t in again.transformer.state_dict().items())


def test_an_exported_model_is_trained_further(exported: Path, tmp_path: Path) -> None:
    start = exported / "weights" / "shapes-flow"
    before = StableDiffusion3Pipeline.from_pretrained(start)
    further = pretrain(tmp_path, budget=TINY, device="cpu", start=start, log=lambda line: None)
    kept, moved = before.vae.state_dict(), before.transformer.state_dict()
    assert all(torch.equal(kept[name], t) for name, t in further.vae.state_dict().items())
    change = sum((moved[name] - t).norm() for name, t in further.transformer.state_dict().items())
    fresh = sum((moved[name] - t).norm() for name, t in build_transformer().state_dict().items())
    assert 0 < change < fresh / 2
