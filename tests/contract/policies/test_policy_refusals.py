"""Models that cannot be trained are refused in a sentence."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from progrpo.policies.load import policy_from_pipeline
from progrpo.policies.settings import ModelSettings
from tests.support.policies import (
    STEPS,
    load,
    untouched_pipeline,
)


def test_what_cannot_be_loaded_is_said_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "AllegroPipeline"}')
    for path, message in (
        (tmp_path / "empty", "has no model_index.json"),
        (
            other,
            "is a AllegroPipeline; progrpo trains Flux2KleinPipeline, FluxKontextPipeline, FluxPipeline,"
            " QwenImagePipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline",
        ),
        (tmp_path / "absent", "neither a built-in model"),
        ("nobody/nothing", "no folder has that name, and the Hugging Face hub was tried: the hub.* cannot be reached"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load(path, "lora")
        assert str(caught.value).startswith("model.path: ") and "\n" not in str(caught.value)


def test_sd3_without_any_text_encoder_is_refused(tiny_sd3):
    none = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"))
    with pytest.raises(ValueError, match=r"model\.path: the pipeline has no text encoder at all"):
        policy_from_pipeline(DiffusionPipeline.from_pretrained(tiny_sd3, **none), ModelSettings())


@pytest.mark.parametrize("model", ["tiny_flux2_klein", "tiny_qwen_image"])
def test_a_model_of_one_text_encoder_without_it_is_refused(request, model):
    pipeline = DiffusionPipeline.from_pretrained(request.getfixturevalue(model), text_encoder=None)
    with pytest.raises(ValueError, match=r"model\.path: the pipeline lacks its text encoder; load it"):
        policy_from_pipeline(pipeline, ModelSettings())


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2"])
def test_flux_without_a_text_encoder_is_refused(tiny_flux, encoder):
    pipeline = DiffusionPipeline.from_pretrained(tiny_flux, **{encoder: None})
    with pytest.raises(ValueError, match=r"model\.path: the pipeline lacks a text encoder; .* by CLIP and by T5"):
        policy_from_pipeline(pipeline, ModelSettings())


@pytest.mark.parametrize(("encoder", "which"), [("text_encoder", "its"), ("text_encoder_2", "its second")])
def test_sdxl_without_a_text_encoder_is_refused(tiny_sdxl, encoder, which):
    pipeline = DiffusionPipeline.from_pretrained(tiny_sdxl, **{encoder: None})
    with pytest.raises(ValueError, match=rf"^model\.path: the pipeline lacks {which} text encoder; load it"):
        policy_from_pipeline(pipeline, ModelSettings())


@pytest.mark.parametrize("model", ["tiny_flux", "tiny_flux2_klein", "tiny_qwen_image"])
def test_a_packed_model_for_more_than_text_is_refused(request, model):
    pipeline = untouched_pipeline(request.getfixturevalue(model))
    pipeline.transformer = type(pipeline.transformer).from_config(pipeline.transformer.config, in_channels=32)
    with pytest.raises(
        ValueError, match=r"the transformer takes 32 channels where tokens of latents have 16; .* alone"
    ):
        policy_from_pipeline(pipeline, ModelSettings())


def test_an_unet_for_more_than_text_is_refused(tiny_sd):
    pipeline = untouched_pipeline(tiny_sd)
    pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config, in_channels=9)
    with pytest.raises(
        ValueError, match=r"model\.path: the U-Net takes 9 channels where latents have 4; .* inpainting"
    ):
        policy_from_pipeline(pipeline, ModelSettings())


@pytest.mark.parametrize("model", ["tiny_sd3", "tiny_flux", "tiny_wan"])
def test_a_flow_model_with_another_scheduler_is_refused(request, model):
    pipeline = untouched_pipeline(request.getfixturevalue(model))
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match=r"model\.path: the scheduler is a DDIMScheduler; replace it by a FlowMatch"):
        policy_from_pipeline(pipeline, ModelSettings())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "a part of a Wan 2.2; load it with"),
        ({"boundary_ratio": 0.875}, "a part of a Wan 2.2; load it with"),
        ({"expand_timesteps": True}, "a Wan 2.2 with a timestep for each place"),
    ],
)
def test_a_wan_of_another_kind_is_refused_by_its_index_alone(tiny_wan, tmp_path, change, sentence):
    index = json.loads((tiny_wan / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=rf"^model\.path: this is {sentence}"):
        load(tmp_path, "lora")


def test_a_wan_of_another_kind_is_refused_as_a_pipeline(tiny_wan):
    pipeline = untouched_pipeline(tiny_wan)
    pipeline.register_modules(transformer_2=pipeline.transformer)
    with pytest.raises(ValueError, match=r"^model\.path: this is a part of a Wan 2\.2"):
        policy_from_pipeline(pipeline, ModelSettings())
    pipeline = untouched_pipeline(tiny_wan)
    pipeline.transformer = type(pipeline.transformer).from_config(pipeline.transformer.config, in_channels=9)
    with pytest.raises(ValueError, match=r"takes 9 channels where latents have 4; .* not one from picture to video"):
        policy_from_pipeline(pipeline, ModelSettings())
    pipeline = DiffusionPipeline.from_pretrained(tiny_wan, text_encoder=None)
    with pytest.raises(ValueError, match=r"model\.path: the pipeline lacks its text encoder"):
        policy_from_pipeline(pipeline, ModelSettings())


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),
        FlowMatchEulerDiscreteScheduler(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_an_unet_of_noise_that_ddim_does_not_know_is_refused(tiny_sdxl, scheduler):
    pipeline = untouched_pipeline(tiny_sdxl)
    pipeline.scheduler = scheduler
    with pytest.raises(
        ValueError, match=rf"^model\.path: the scheduler is a {type(scheduler).__name__}, for whose noise"
    ):
        policy_from_pipeline(pipeline, ModelSettings())


def test_a_unet_with_the_guidance_scale_as_an_input_is_refused(tiny_sd):
    pipeline = untouched_pipeline(tiny_sd)
    pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config, time_cond_proj_dim=8)
    with pytest.raises(ValueError, match=r"^model\.path: the guidance scale is an input of the U-Net"):
        policy_from_pipeline(pipeline, ModelSettings())


def test_a_model_of_noise_at_pure_noise_is_refused(tiny_sd, tiny_sd_v):
    for folder, refused in ((tiny_sd, True), (tiny_sd_v, False)):
        pipeline = untouched_pipeline(folder)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
        if refused:
            with pytest.raises(ValueError, match="set the scheduler's rescale_betas_zero_snr to false"):
                policy_from_pipeline(pipeline, ModelSettings())
        else:
            assert policy_from_pipeline(pipeline, ModelSettings(lora_rank=2)).levels(STEPS).alpha.isfinite().all()


def test_a_safety_checker_takes_no_memory(tiny_sd):
    pipeline = untouched_pipeline(tiny_sd)
    pipeline.safety_checker = torch.nn.Linear(1, 1)
    policy_from_pipeline(pipeline, ModelSettings(lora_rank=2))
    assert pipeline.safety_checker is None
