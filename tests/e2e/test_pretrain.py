"""The command `progrpo pretrain`: every stage with a tiny budget, stopped, resumed and exported for diffusers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline

from progrpo.cli import main
from progrpo.zoo.networks import build_transformer
from progrpo.zoo.pretraining import Pretraining
from progrpo.zoo.shapes.detector import load_detector
from progrpo.zoo.shapes.models import noise_scheduler
from progrpo.zoo.shapes.pretrain import Budget, pretrain
from progrpo.zoo.shapes.pretrain_diffusion import DiffusionBudget, Teacher, pretrain_diffusion
from progrpo.zoo.shapes.pretrain_tiny import STEPS, TinyBudget, pretrain_tiny
from progrpo.zoo.words.pretrain import WordsBudget, pretrain_words

TINY = Budget(
    vae_steps=2, vae_batch=2, judge_steps=2, judge_batch=2, pictures=64, flow_steps=3, flow_batch=4, test_pictures=12
)


def silent(out: Path, export: Path | None = None) -> Pretraining:
    return Pretraining(out, device="cpu", export=export, log=lambda line: None)


def telling(out: Path, lines: list[str], export: Path | None = None) -> Pretraining:
    return replace(silent(out, export), log=lines.append)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    pretrain(silent(folder / "state", folder / "weights"), TINY)
    return folder


@pytest.mark.slow
def test_folder_loads_with_no_further_argument(exported: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(exported / "weights" / "shapes-flow")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.text_encoder_3 is not None
    images = pipeline("a red circle", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)


@pytest.mark.slow
def test_weights_are_safetensors_below_the_limit(exported: Path) -> None:
    files = [f for f in (exported / "weights").rglob("*") if f.is_file()]
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert sum(f.stat().st_size for f in files) < 25e6


@pytest.mark.slow
def test_judge_loads(exported: Path) -> None:
    assert sum(p.numel() for p in load_detector(exported / "weights" / "shapes-judge").parameters()) > 0


@pytest.mark.slow
def test_finished_stages_are_not_trained_again(exported: Path) -> None:
    lines: list[str] = []
    again = pretrain(telling(exported / "state", lines), TINY)
    assert "flow: resumed at step 3" in lines
    first = StableDiffusion3Pipeline.from_pretrained(exported / "weights" / "shapes-flow").transformer.state_dict()
    assert all(torch.equal(first[name], t) for name, t in again.transformer.state_dict().items())


@pytest.mark.slow
def test_an_exported_model_is_trained_further(exported: Path, tmp_path: Path) -> None:
    start = exported / "weights" / "shapes-flow"
    before = StableDiffusion3Pipeline.from_pretrained(start)
    further = pretrain(silent(tmp_path), TINY, start)
    kept, moved = before.vae.state_dict(), before.transformer.state_dict()
    assert all(torch.equal(kept[name], t) for name, t in further.vae.state_dict().items())
    change = sum((moved[name] - t).norm() for name, t in further.transformer.state_dict().items())
    fresh = sum((moved[name] - t).norm() for name, t in build_transformer().state_dict().items())
    assert 0 < change < fresh / 2


# --- shapes-diffusion -------------------------------------------------------------------------------------------------

TINY_TAUGHT = DiffusionBudget(pictures=64, steps=3, batch=4, test_pictures=12)


@pytest.fixture(scope="module")
def taught(exported: Path) -> Path:
    weights = exported / "weights"
    pretrain_diffusion(silent(exported / "taught", weights), TINY_TAUGHT, weights / "shapes-flow")
    return weights / "shapes-diffusion"


@pytest.mark.slow
def test_the_taught_model_loads_with_no_further_argument(taught: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(taught)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, DDIMScheduler) and pipeline.scheduler.config.prediction_type == "epsilon"
    images = pipeline("a red circle", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)


@pytest.mark.slow
def test_it_shares_its_teachers_autoencoder(taught: Path) -> None:
    vae = StableDiffusionPipeline.from_pretrained(taught).vae
    teachers = StableDiffusion3Pipeline.from_pretrained(taught.parent / "shapes-flow").vae.state_dict()
    assert all(torch.equal(teachers[name], t) for name, t in vae.state_dict().items())
    assert vae.config.shift_factor is None


@pytest.mark.slow
def test_its_training_goes_on_where_it_stopped(taught: Path) -> None:
    lines: list[str] = []
    teacher, state = taught.parent / "shapes-flow", taught.parent.parent / "taught"
    again = pretrain_diffusion(telling(state, lines), TINY_TAUGHT, teacher)
    assert "unet: resumed at step 3" in lines
    first = StableDiffusionPipeline.from_pretrained(taught).unet.state_dict()
    assert all(torch.equal(first[name], t) for name, t in again.unet.state_dict().items())


@pytest.mark.slow
def test_a_teachers_noise_is_that_of_its_velocity(exported: Path) -> None:
    """A flow model that says the true velocity says the true noise, whatever the autoencoder's offset."""
    flow = StableDiffusion3Pipeline.from_pretrained(exported / "weights" / "shapes-flow")
    teacher = Teacher(flow, ["a red circle"])
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(3, 8, 16, 16, generator=generator) for _ in range(2))
    teacher.transformer.forward = lambda *args, **options: (eps - z,)  # the truth of normalised latents
    signal = noise_scheduler().alphas_cumprod[torch.tensor([10, 500, 999])].reshape(3, 1, 1, 1)
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    x = alpha * (z + teacher.offset) + sigma * eps
    noise = teacher.noise(x, alpha, sigma, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(noise, eps, rtol=0, atol=1e-5)


def test_an_option_of_the_other_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "shapes-diffusion", "--flow-steps", "3"]) == 2
    assert "--flow-steps is an option of shapes-flow and words-flow, not of shapes-diffusion" in capsys.readouterr().err
    assert main(["pretrain", "shapes-flow", "--unet-steps", "3"]) == 2
    assert "--unet-steps is an option of shapes-diffusion, not of shapes-flow" in capsys.readouterr().err
    assert main(["pretrain", "shapes-flow", "--decoder-steps", "3"]) == 2
    assert "--decoder-steps is an option of shapes-tiny, not of shapes-flow" in capsys.readouterr().err
    assert main(["pretrain", "shapes-tiny", "--from-shipped"]) == 2
    assert "--from-shipped is an option of shapes-flow, not of shapes-tiny" in capsys.readouterr().err


# --- shapes-tiny ------------------------------------------------------------------------------------------------------

TINY_DECODER = TinyBudget(drawn=4, sampled=2, steps=3, batch=4, test_groups=6, group_size=2)


@pytest.fixture(scope="module")
def distilled(exported: Path) -> Path:
    weights = exported / "weights"
    pretrain_tiny(silent(exported / "distilled", weights), TINY_DECODER, weights / "shapes-flow")
    return weights / "shapes-tiny"


@pytest.mark.slow
def test_the_tiny_decoder_loads_with_no_further_argument(distilled: Path) -> None:
    tiny = AutoencoderTiny.from_pretrained(distilled)
    assert tiny.decode(torch.zeros(1, 8, 16, 16)).sample.shape == (1, 3, 64, 64)


@pytest.mark.slow
def test_its_figures_stand_beside_it(distilled: Path) -> None:
    figures = json.loads((distilled / "figures.json").read_text())
    assert figures["milliseconds_a_picture"].keys() == {"full", "tiny", "full, bfloat16", "tiny, bfloat16"}
    assert all(len(rows) == STEPS for rows in figures["against_full"].values())


@pytest.mark.slow
def test_the_tiny_decoders_training_goes_on_where_it_stopped(distilled: Path) -> None:
    lines: list[str] = []
    teacher, state = distilled.parent / "shapes-flow", distilled.parent.parent / "distilled"
    again = pretrain_tiny(telling(state, lines), TINY_DECODER, teacher)
    assert "decoder: resumed at step 3" in lines and not any(line.startswith("pairs") for line in lines)
    first = AutoencoderTiny.from_pretrained(distilled).state_dict()
    assert all(torch.equal(first[name], t) for name, t in again.state_dict().items())


# --- words-flow -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_model_of_words_begins_with_that_of_shapes_and_goes_on_where_it_stopped(
    exported: Path, tmp_path: Path
) -> None:
    pytest.importorskip("rapidocr")
    budget = WordsBudget(vae_steps=2, vae_batch=2, pictures=64, flow_steps=3, flow_batch=4, test_pictures=6)
    start, lines = exported / "weights" / "shapes-flow", list[str]()
    pretrain_words(telling(tmp_path / "state", lines, tmp_path), budget, start)
    words = StableDiffusion3Pipeline.from_pretrained(tmp_path / "words-flow")
    assert words.tokenizer.tokenize("cat") == ["c", "a", "t</w>"]
    before = StableDiffusion3Pipeline.from_pretrained(start).transformer.state_dict()
    after = words.transformer.state_dict()
    change = sum((before[name] - t).norm() for name, t in after.items())
    assert 0 < change < sum((before[name] - t).norm() for name, t in build_transformer().state_dict().items()) / 2
    again = pretrain_words(telling(tmp_path / "state", lines), budget, start)
    assert "flow: resumed at step 3" in lines
    assert all(torch.equal(after[name], t) for name, t in again.transformer.state_dict().items())
    assert json.loads((tmp_path / "words-flow" / "figures.json").read_text())["drawn"]["exact"] > 0.5
