"""What every policy promises (`progrpo.policies.base.Policy`); a new one joins by a line in CASES."""

from __future__ import annotations

import inspect
import json
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Tensor

from progrpo.diffusion.process import Process
from progrpo.policies.base import Policy, PolicyContext
from progrpo.policies.load import load_policy, policy_from_pipeline
from progrpo.policies.settings import ModelSettings
from progrpo.storage import load_state, save_state
from progrpo.types import Prompt

TEXTS = ("red cat", "blue dog")
SOURCES = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 20, 3), np.uint8)) for i in range(2)]
PROMPTS = tuple(Prompt(text, {"image": source}) for text, source in zip(TEXTS, SOURCES, strict=True))
STEPS = 4
TOKENS = 12
FRAMES = 3


@dataclass(frozen=True)
class Case:
    model: str
    """The name of the fixture that gives the pipeline's folder."""
    weights: str
    without_gradient: tuple[str, ...] = ()
    """The denoiser's parameters that cannot change the picture, as parts of their names."""
    always_float32: tuple[str, ...] = ()
    """Those that diffusers keeps in float32, likewise."""


# SD3's last block throws its text stream away, and with it the text's queries.
SD3_UNUSED = ("blocks.1.attn.add_q_proj", "blocks.1.attn.norm_added_q")
# So does Qwen-Image's, with what comes after its attention as well.
QWEN_IMAGE_UNUSED = tuple(f"blocks.1.{name}" for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp"))
CASES = {
    "sd3-lora": Case("tiny_sd3", "lora", without_gradient=SD3_UNUSED),
    "sd3-full": Case("tiny_sd3", "full", without_gradient=SD3_UNUSED),
    "sd-lora": Case("tiny_sd", "lora"),
    "sd-full": Case("tiny_sd", "full"),
    "sd-v-lora": Case("tiny_sd_v", "lora"),
    "flux-lora": Case("tiny_flux", "lora"),
    "flux-full": Case("tiny_flux", "full"),
    "flux-schnell-lora": Case("tiny_flux_schnell", "lora"),
    "kontext-lora": Case("tiny_kontext", "lora"),
    "flux2-klein-lora": Case("tiny_flux2_klein", "lora"),
    "qwen-image-lora": Case("tiny_qwen_image", "lora", without_gradient=QWEN_IMAGE_UNUSED),
    "sdxl-lora": Case("tiny_sdxl", "lora"),
    "sdxl-full": Case("tiny_sdxl", "full"),
    "wan-lora": Case("tiny_wan", "lora", always_float32=("time_embedder",)),
}


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def folder(case: Case, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(case.model)


@pytest.fixture
def policy(case: Case, folder: Path) -> Policy:
    return _load(folder, case.weights)


@pytest.fixture
def pipeline(folder: Path) -> Any:
    """The untouched model, as a user of diffusers has it."""
    return _pipeline(folder)


def _load(folder: Path | str, weights: Any, away: str = "", **changes: Any) -> Any:
    settings = ModelSettings(str(folder), weights, lora_rank=2, lora_alpha=6, max_sequence_length=TOKENS, resolution=16)
    length = FRAMES if Path(folder).name == "tiny-wan" else None
    return load_policy(replace(settings, **{"frames": length, **changes}), PolicyContext(guide_away_from=away))


def _pipeline(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "unet"):  # whatever it came with, its noise schedule is sampled by DDIM
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    if type(pipeline).__name__ == "WanPipeline":  # in place of UniPC, of the same shift
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.flow_shift)
    return pipeline


def _noise(policy: Policy, count: int = len(TEXTS)) -> Tensor:
    return torch.randn(count, *policy.latent_shape, generator=torch.Generator().manual_seed(3))


def _perturb(policy: Policy, scale: float = 0.1) -> None:
    """Move every trained weight: a fresh LoRA is the base model and hides its own mistakes."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in policy.trainable.values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=scale)


@torch.no_grad()
def _ode(policy: Policy, guidance_scale: float) -> Tensor:
    x, condition = _noise(policy), policy.encode(PROMPTS)
    process = Process(policy.prediction, "ddim", policy.levels(STEPS), (0.0,) * STEPS)
    for step in range(STEPS):
        output = policy.predict(x, process.timestep(step, x), condition, guidance_scale)
        x = process.deterministic(step, x, output)
    return x


def _diffusers(pipeline: Any, policy: Policy, guidance_scale: float, output_type: str, **prompt: Any) -> Any:
    video = hasattr(pipeline, "vae_scale_factor_spatial")
    scale = pipeline.vae_scale_factor_spatial if video else pipeline.vae_scale_factor
    latents, (height, width) = _noise(policy), (side * scale for side in policy.latent_shape[-2:])
    packed = hasattr(pipeline, "_pack_latents")
    patchified = hasattr(pipeline, "_patchify_latents")  # before it packs; and it is guided by itself
    if patchified:
        latents = pipeline._patchify_latents(latents)
    elif packed:
        latents = pipeline._pack_latents(latents, *latents.shape)
    if packed and not patchified and not policy.embeds_guidance and guidance_scale > 1:
        nothing = " " if type(pipeline).__name__ == "QwenImagePipeline" else ""
        prompt = {"true_cfg_scale": guidance_scale, "negative_prompt": [nothing] * len(TEXTS), **prompt}
    if policy.edits:  # it would go by the source's size, and by the million pixels of the model's own
        covering = [pipeline.image_processor.resize(source, height, width, "crop") for source in SOURCES]
        prompt |= {"image": prompt.pop("image_latents", covering), "max_area": height * width, "_auto_resize": False}
    if hasattr(pipeline, "text_encoder_3") or packed or video:
        prompt["max_sequence_length"] = TOKENS
    if video:
        prompt["num_frames"] = FRAMES
    steps: list[Tensor] = []

    def note(pipeline: Any, step: int, timestep: Any, told: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(told["latents"])
        return {}

    found = pipeline(
        **({} if "prompt_embeds" in prompt else {"prompt": list(TEXTS)}),
        **prompt,
        height=height,
        width=width,
        latents=latents,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        output_type=output_type,
        return_dict=False,
        callback_on_step_end=note,
    )[0]
    if not packed or output_type != "latent":
        return found
    rows, columns = (count // 2 for count in policy.latent_shape[1:])
    return torch.nn.functional.pixel_shuffle(steps[-1].transpose(1, 2).unflatten(2, (rows, columns)), 2)


def _velocity(policy: Policy) -> Tensor:
    with torch.no_grad():
        return policy.predict(_noise(policy), torch.tensor(700.0), policy.encode(PROMPTS))


def test_without_noise_it_is_the_diffusers_pipeline_bit_for_bit(policy, pipeline):
    embeddings = policy.encode(PROMPTS).tensors  # each text alone: the pipeline's batch of two gives other last bits
    assert torch.equal(_ode(policy, 1.0), _diffusers(pipeline, policy, 1.0, "latent", **embeddings))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_without_noise_it_is_the_diffusers_pipeline_from_text_to_latent(policy, pipeline, guidance_scale):
    expected = _diffusers(pipeline, policy, guidance_scale, "latent")
    size = max(1.0, expected.abs().max().item())  # an untrained network that says noise ends far from 1
    torch.testing.assert_close(_ode(policy, guidance_scale), expected, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize(
    "model", ["tiny_sd3", "tiny_sd", "tiny_sdxl", "tiny_flux_schnell", "tiny_qwen_image", "tiny_wan"]
)
def test_guidance_leads_away_from_the_negative_prompt_as_the_diffusers_pipeline_does(request, model):
    folder = request.getfixturevalue(model)
    policy, plain = (_load(folder, "lora", away=text) for text in ("green bird", ""))
    expected = _diffusers(_pipeline(folder), policy, 3.5, "latent", negative_prompt=["green bird"] * len(TEXTS))
    size = max(1.0, expected.abs().max().item())
    policy.encode(PROMPTS)
    policy.release_text_encoders()
    torch.testing.assert_close(_ode(policy, 3.5), expected, rtol=0, atol=1e-5 * size)
    assert (_ode(plain, 3.5) - expected).abs().max() > 1e-3 * size


def test_a_model_that_is_told_its_guidance_leads_away_from_no_text(tiny_flux):
    with pytest.raises(ValueError, match=r"^sampling\.negative_prompt: this model is told .* leave it empty$"):
        _load(tiny_flux, "lora", away="green bird")


def test_pictures_are_the_diffusers_pipelines(policy, pipeline):
    pictures = policy.decode(_ode(policy, 1.0)).images_NHWC
    expected = torch.stack([_grey(picture) for picture in _diffusers(pipeline, policy, 1.0, "pil")])
    assert pictures.dtype == torch.uint8 and pictures.shape == expected.shape
    assert (pictures.int() - expected).abs().max() <= 1
    assert pictures.float().std() > 5  # not one grey


def _grey(picture: Any) -> Tensor:
    """A picture of PIL, or a list of frames, as a tensor."""
    if isinstance(picture, list):
        return torch.stack([_grey(frame) for frame in picture])
    return torch.tensor(list(picture.tobytes()), dtype=torch.int32).view(picture.height, picture.width, 3)


@pytest.mark.parametrize("model", sorted({case.model for case in CASES.values()} - {"tiny_sd_v", "tiny_flux_schnell"}))
def test_without_noise_it_is_the_diffusers_pipeline_where_pictures_are_not_square(request, model):
    folder = request.getfixturevalue(model)
    policy, pipeline = _load(folder, "lora", resolution=(16, 32)), _pipeline(folder)
    assert policy.latent_shape[-2:] == (8, 16)
    embeddings = policy.encode(PROMPTS).tensors
    found = _ode(policy, 1.0)
    assert torch.equal(found, _diffusers(pipeline, policy, 1.0, "latent", **embeddings))
    pictures = policy.decode(found).images_NHWC
    expected = torch.stack([_grey(picture) for picture in _diffusers(pipeline, policy, 1.0, "pil")])
    assert pictures.shape == expected.shape and pictures.shape[-3:] == (16, 32, 3)
    assert (pictures.int() - expected).abs().max() <= 1


def test_a_flow_models_levels_are_the_schedulers_own_or_shifted(tiny_sd3):
    policy, pipeline = _load(tiny_sd3, "lora"), _pipeline(tiny_sd3)
    levels = policy.levels(STEPS)
    sigmas = levels.sigma
    pipeline.scheduler.set_timesteps(STEPS)
    assert torch.equal(sigmas, pipeline.scheduler.sigmas)
    assert torch.equal(levels.timestep[:-1], pipeline.scheduler.timesteps) and levels.timestep[-1] == 0
    assert torch.equal(levels.alpha, 1 - sigmas)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (STEPS + 1,) and sigmas.device.type == "cpu"
    torch.testing.assert_close(
        policy.levels(STEPS, shift=1.0).sigma, torch.tensor([*torch.linspace(1, 0.001, STEPS).tolist(), 0.0])
    )
    assert torch.equal(policy.levels(STEPS).sigma, sigmas)


@pytest.mark.parametrize("model", ["tiny_flux", "tiny_flux_schnell", "tiny_flux2_klein", "tiny_qwen_image"])
def test_a_packed_model_has_the_levels_that_its_pipeline_sampled_on(request, model):
    folder = request.getfixturevalue(model)
    pipeline = _pipeline(folder)
    for resolution in (8, 16, (8, 24)):  # 4 tokens, 16 and 12, where the scheduler's base is 9
        policy = _load(folder, "lora", resolution=resolution)
        _diffusers(pipeline, policy, 1.0, "latent")
        levels = policy.levels(STEPS)
        assert torch.equal(levels.sigma, pipeline.scheduler.sigmas)
        assert torch.equal(levels.timestep[:-1], pipeline.scheduler.timesteps) and levels.timestep[-1] == 0
        even = torch.linspace(1, 0, STEPS + 1)
        shifted = 3 * even / (1 + 2 * even)
        if model == "tiny_qwen_image":  # stretched to end at 0.02
            shifted[:-1] = 1 - (1 - shifted[:-1]) * (1 - 0.02) / (1 - shifted[-2])
        torch.testing.assert_close(policy.levels(STEPS, shift=3.0).sigma, shifted)
    assert torch.equal(levels.sigma, even) == (model == "tiny_flux_schnell")


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd_v", "tiny_sdxl"])
def test_a_diffusion_models_levels_are_ddims(request, model):
    folder = request.getfixturevalue(model)
    policy, pipeline = _load(folder, "lora"), _pipeline(folder)
    levels, scheduler = policy.levels(STEPS), pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    assert levels.timestep.tolist() == [*scheduler.timesteps.tolist(), 0]
    signal = torch.stack([*scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod])
    assert torch.equal(levels.alpha, signal.sqrt()) and torch.equal(levels.sigma, (1 - signal).sqrt())
    assert policy.prediction == scheduler.config.prediction_type
    with pytest.raises(ValueError, match=r"sampling\.shift: this is a diffusion model"):
        policy.levels(STEPS, shift=3.0)
    with pytest.raises(ValueError, match=r"sampling\.num_inference_steps: 1001 is more than the 1000 timesteps"):
        policy.levels(1001)
    with pytest.raises(ValueError, match=r"sampling\.num_inference_steps: 1000 steps begin beyond the 1000 timesteps"):
        policy.levels(1000)


def test_levels_between_the_grids_are_on_the_way(policy):
    grid = policy.levels(STEPS)
    for step in range(STEPS):
        at = policy.between(grid, torch.tensor([step, step + 0.5, step + 1.0], dtype=torch.float64))
        assert at.timestep[0] == grid.timestep[step] and at.timestep[2] == grid.timestep[step + 1]
        torch.testing.assert_close(at.alpha[0], grid.alpha[step])
        assert at.sigma[0] > at.sigma[1] >= at.sigma[2] and at.timestep[0] > at.timestep[1] >= at.timestep[2]
        halfway = (grid.timestep[step] + grid.timestep[step + 1]) / 2
        assert (at.timestep[1] - halfway).abs() <= 0.5  # a diffusion model was trained at whole timesteps only


def test_a_timestep_for_all_is_a_timestep_for_each(policy):
    condition, x = policy.encode(PROMPTS), _noise(policy)
    for guidance_scale in (1.0, 3.5):
        one = policy.predict(x, torch.tensor(600.0), condition, guidance_scale)
        each = policy.predict(x, torch.tensor([600.0, 600.0]), condition, guidance_scale)
        assert torch.equal(one, each)
    mixed = policy.predict(x, torch.tensor([600.0, 200.0]), condition)
    torch.testing.assert_close(mixed[1:], policy.predict(x[1:], torch.tensor(200.0), condition.take(torch.tensor([1]))))


def test_each_row_is_told_its_own_prompt(policy):
    x = _noise(policy, 1).expand(2, *policy.latent_shape)
    v = policy.predict(x, torch.tensor(600.0), policy.encode(PROMPTS))
    assert (v[0] - v[1]).abs().max() > 1e-2
    back = policy.predict(x, torch.tensor(600.0), policy.encode(PROMPTS[::-1]))
    torch.testing.assert_close(back.flip(0), v)


def test_guidance_is_taken_between_prompt_and_empty_prompt_with_gradients_through_both(policy):
    if policy.embeds_guidance:
        pytest.skip("the network is told of it")
    _perturb(policy)
    x, timestep, w = _noise(policy), torch.tensor(600.0), 3.0
    v = policy.predict(x, timestep, policy.encode(PROMPTS), w)
    v_c = policy.predict(x, timestep, policy.encode(PROMPTS))
    nothing = policy._unconditional.take(torch.tensor([0, 0]))  # SDXL has zeros for the empty prompt
    v_u = policy.predict(x, timestep, nothing)
    expected = v_u + w * (v_c - v_u)
    if type(policy).__name__ == "QwenImagePolicy":  # of the conditional's length, in each patch of 2x2
        lengths = [torch.nn.functional.avg_pool2d(v.square().sum(1, True), 2).sqrt() for v in (v_c, expected)]
        expected = expected * (lengths[0] / lengths[1]).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-5)
    parameter = next(iter(policy.trainable.values()))
    (gradient,), (expected_gradient,) = (torch.autograd.grad(out.square().mean(), parameter) for out in (v, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-6)


def test_embedded_guidance_is_an_input_of_one_call(tiny_flux, tiny_flux_schnell):
    for folder, rows in ((tiny_flux, [2, 2]), (tiny_flux_schnell, [2, 4])):
        policy, told = _load(folder, "lora"), []
        policy.denoiser.register_forward_pre_hook(lambda m, a, k: told.append(k), with_kwargs=True)  # noqa: B023
        outputs = [policy.predict(_noise(policy), torch.tensor(600.0), policy.encode(PROMPTS), w) for w in (1.0, 3.0)]
        assert [len(inputs["hidden_states"]) for inputs in told] == rows
        assert (outputs[0] - outputs[1]).abs().max() > 1e-3
        embedded = folder == tiny_flux
        assert policy.embeds_guidance == embedded
        given = [inputs["guidance"] if inputs["guidance"] is None else inputs["guidance"].tolist() for inputs in told]
        assert given == ([[1.0, 1.0], [3.0, 3.0]] if embedded else [None, None])


def test_gradient_reaches_every_trained_weight_and_no_frozen_one(policy, case):
    _perturb(policy)
    before = {name: t.clone() for name, t in policy.frozen()}
    policy.predict(_noise(policy), torch.tensor(600.0), policy.encode(PROMPTS)).square().mean().backward()
    for name, p in policy.trainable.items():
        reached = p.grad is not None and bool(p.grad.any())
        assert reached != any(part in name for part in case.without_gradient), name
    assert not set(before) & set(policy.trainable)
    assert all(t.grad is None and not t.requires_grad for _, t in policy.frozen())
    torch.optim.SGD(policy.trainable.values(), lr=0.1).step()
    assert all(torch.equal(t, before[name]) for name, t in policy.frozen())


def test_reference_is_the_base_model_after_training(policy, pipeline):
    _perturb(policy)
    trained = _ode(policy, 1.0)
    base = _diffusers(pipeline, policy, 1.0, "latent", **policy.encode(PROMPTS).tensors)
    assert (trained - base).abs().max() > 1e-2
    with policy.weights("reference"):
        assert torch.equal(_ode(policy, 1.0), base)
    assert torch.equal(_ode(policy, 1.0), trained)


def test_current_weights_come_back_after_an_exception(policy):
    _perturb(policy)
    before = _velocity(policy)
    with pytest.raises(RuntimeError, match="inside"), policy.weights("reference"):
        raise RuntimeError("inside")
    assert torch.equal(_velocity(policy), before)


def test_state_goes_through_storage_to_a_new_policy(policy, case, folder, tmp_path):
    policy.named_weights.snapshot("ema")
    _perturb(policy)
    policy.named_weights.update("ema", 0.9)
    save_state(tmp_path / "state", policy.state_dict())
    other = _load(folder, case.weights, seed=1)
    other.load_state_dict(load_state(tmp_path / "state"))
    for name in ("current", "reference", "ema"):
        with policy.weights(name), other.weights(name):
            assert torch.equal(_velocity(other), _velocity(policy)), name


@pytest.mark.parametrize("weights", ["current", "ema"])
def test_saved_weights_give_diffusers_the_trained_pictures(policy, case, pipeline, tmp_path, weights):
    policy.named_weights.snapshot("ema")
    _perturb(policy)
    policy.named_weights.update("ema", 0.5)
    policy.save(tmp_path / "saved", weights)
    if case.weights == "lora":
        pipeline.load_lora_weights(tmp_path / "saved", local_files_only=True)
    else:
        denoiser = type(getattr(pipeline, policy.denoiser_name)).from_pretrained(tmp_path / "saved")
        setattr(pipeline, policy.denoiser_name, denoiser)
    with policy.weights(weights):
        pictures = policy.decode(_ode(policy, 1.0)).images_NHWC
    expected = torch.stack([_grey(picture) for picture in _diffusers(pipeline, policy, 1.0, "pil")])
    assert (pictures.int() - expected).abs().max() <= 1


def test_a_text_is_encoded_once_and_alone(policy):
    calls = []
    handle = policy._pipeline.text_encoder.register_forward_hook(
        lambda module, inputs, named, output: calls.append(len([*inputs, *named.values()][0])), with_kwargs=True
    )
    first, second, nothing = (Prompt(text, PROMPTS[0].columns) for text in ("a b", "c d", ""))
    together = policy.encode([first, second, first, nothing])
    again = policy.encode([second])
    handle.remove()
    assert calls == [1, 1, 1]
    for name, rows in together.tensors.items():
        assert torch.equal(rows[0], rows[2]) and torch.equal(again.tensors[name][0], rows[1])
        assert not rows.requires_grad


def test_what_texts_become_is_known_without_encoding_them(policy):
    told = policy.encode(PROMPTS[:1]).tensors
    assert policy.condition_shapes() == {name: tuple(rows.shape[1:]) for name, rows in told.items()}


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        ("tiny_sd3", 256),
        *((model, 512) for model in ("tiny_flux", "tiny_kontext", "tiny_flux2_klein", "tiny_qwen_image", "tiny_wan")),
    ],
)
def test_a_text_is_as_long_as_the_models_pipeline_takes_it_unless_told_otherwise(request, model, tokens):
    folder = request.getfixturevalue(model)
    own, short = (_load(folder, "lora", max_sequence_length=length) for length in (None, TOKENS))
    assert own.condition_shapes()["prompt_embeds"][0] - short.condition_shapes()["prompt_embeds"][0] == tokens - TOKENS
    long = [Prompt("red cat " * 12 + end, PROMPTS[0].columns) for end in ("red cat " * 6, "blue dog " * 6)]
    for policy, told_apart in ((own, True), (short, False)):
        x, condition = _noise(policy, 1).expand(2, *policy.latent_shape), policy.encode(long)
        assert condition.tensors["prompt_embeds"].shape[1:] == policy.condition_shapes()["prompt_embeds"]
        v = policy.predict(x, torch.tensor(600.0), condition)
        assert ((v[0] - v[1]).abs().max() > 1e-4) == told_apart


def test_the_built_in_model_is_told_as_many_tokens_as_it_was_made_for():
    shapes = [
        _load("shapes-flow", "lora", max_sequence_length=n, resolution=None).condition_shapes() for n in (None, 16)
    ]
    assert shapes[0] == shapes[1]


def test_text_encoders_can_be_released(policy):
    before = policy.encode(PROMPTS)
    policy.release_text_encoders()
    after = policy.encode(PROMPTS)
    assert all(torch.equal(rows, after.tensors[name]) for name, rows in before.tensors.items())
    assert policy.predict(_noise(policy), torch.tensor(600.0), after, 3.0).isfinite().all()
    with pytest.raises(ValueError, match=r"'a new one' is new and the text encoders are released"):
        policy.encode([Prompt("a new one", PROMPTS[0].columns)])


def test_guidance_goes_on_after_the_text_encoders_where_python_leaves_out_asserts(tiny_sd):
    policy = _load(tiny_sd, "lora")
    told = policy.encode(PROMPTS)
    names: dict[str, Any] = {}
    source = textwrap.dedent(inspect.getsource(type(policy).release_text_encoders))
    exec(compile(source, "<as python -O>", "exec", optimize=1), names)
    names["release_text_encoders"](policy)
    assert policy.predict(_noise(policy), torch.tensor(600.0), told, 3.0).isfinite().all()


def test_nothing_is_random_in_the_network(policy):
    modules = [m for m in policy._pipeline.components.values() if isinstance(m, torch.nn.Module)]
    assert not any(m.training for module in modules for m in module.modules())
    _perturb(policy)
    assert torch.equal(_velocity(policy), _velocity(policy))


def test_low_precision_keeps_trained_weights_and_velocities_in_float32(case, folder, policy):
    low = _load(folder, case.weights, dtype="bfloat16")
    assert {p.dtype for p in low.trainable.values()} == {torch.float32}
    if case.weights == "lora":
        frozen = [(name, p) for name, p in low.frozen() if p.dim() == 2 and "rope" not in name]
        wide = {name for name, p in frozen if any(part in name for part in case.always_float32)}
        assert {p.dtype for name, p in frozen if name not in wide} == {torch.bfloat16}
        assert {p.dtype for name, p in frozen if name in wide} == ({torch.float32} if case.always_float32 else set())
    v = low.predict(_noise(low), torch.tensor(600.0), low.encode(PROMPTS), 3.0)
    assert v.dtype == torch.float32
    v.square().mean().backward()
    unused = {name for name in low.trainable if any(part in name for part in case.without_gradient)}
    for name, p in low.trainable.items():
        assert name in unused if p.grad is None else p.grad.isfinite().all(), name
    expected = policy.predict(_noise(policy), torch.tensor(600.0), policy.encode(PROMPTS), 3.0)
    assert (v - expected).abs().max() < 0.1 * expected.abs().max()
    assert low.decode(_noise(low)).images_NHWC.dtype == torch.uint8


def test_low_precision_without_training_is_near_the_float32_pictures(case, folder, policy):
    low = _load(folder, case.weights, dtype="bfloat16")
    x0 = _noise(policy)
    assert (low.decode(x0).images_NHWC.int() - policy.decode(x0).images_NHWC.int()).abs().float().mean() < 3


@pytest.mark.parametrize("model", ["tiny_sd3", "tiny_wan"])
def test_a_saved_denoiser_takes_the_models_place_in_low_precision_as_it_is(request, tmp_path, model):
    folder = request.getfixturevalue(model)
    _load(folder, "full").save(tmp_path / "saved")
    settings = ModelSettings(lora_rank=2, max_sequence_length=TOKENS, resolution=16, dtype="bfloat16")
    settings = replace(settings, frames=FRAMES if model == "tiny_wan" else None)
    own, taken = (
        load_policy(replace(settings, path=str(folder))),
        load_policy(replace(settings, path=str(folder)), trained=tmp_path / "saved"),
    )
    found = dict(taken.frozen())
    for name, tensor in own.frozen():  # of Wan some in float32
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert torch.equal(_velocity(taken), _velocity(own))


def test_lora_starts_from_its_seed_alone(tiny_sd3):
    state = torch.get_rng_state()
    one = _load(tiny_sd3, "lora", seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(999)
    same, other = _load(tiny_sd3, "lora", seed=5), _load(tiny_sd3, "lora", seed=6)
    assert all(torch.equal(p, same.trainable[name]) for name, p in one.trainable.items())
    for name, p in one.trainable.items():
        assert torch.equal(p, other.trainable[name]) == ("lora_B" in name), name


def test_lora_adapts_both_streams_of_every_block_by_default(tiny_sd3):
    names = _load(tiny_sd3, "lora").trainable
    adapted = {name.split(".lora_")[0].removeprefix("transformer_blocks.") for name in names}
    image = {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"}
    text = {"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"}
    last_only_absent = {"attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"}
    assert adapted == {f"0.{n}" for n in image | text | last_only_absent} | {f"1.{n}" for n in image | text}


def test_a_lora_of_flux_adapts_both_kinds_of_blocks_and_nothing_else_by_default(tiny_flux):
    adapted = {name.split(".lora_")[0] for name in _load(tiny_flux, "lora").trainable}
    query_key_value = {"attn.to_q", "attn.to_k", "attn.to_v"}
    text = {"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"}
    feed_forward = {f"{ff}.{name}" for ff in ("ff", "ff_context") for name in ("net.0.proj", "net.2")}
    of_two = {f"transformer_blocks.0.{n}" for n in query_key_value | text | feed_forward | {"attn.to_out.0"}}
    single = query_key_value | {"proj_mlp", "proj_out"}
    assert adapted == of_two | {f"single_transformer_blocks.{i}.{n}" for i in range(2) for n in single}


def test_a_lora_of_flux2_klein_adapts_both_kinds_of_blocks_by_default(tiny_flux2_klein):
    adapted = {name.split(".lora_")[0] for name in _load(tiny_flux2_klein, "lora").trainable}
    attention = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    feed_forward = {f"{ff}.{name}" for ff in ("ff", "ff_context") for name in ("linear_in", "linear_out")}
    of_two = {f"transformer_blocks.0.{name}" for name in {f"attn.{name}" for name in attention} | feed_forward}
    of_one = {f"single_transformer_blocks.{i}.attn.{name}" for i in range(2) for name in ("to_qkv_mlp_proj", "to_out")}
    assert adapted == of_two | of_one


def test_a_lora_of_qwen_image_adapts_both_streams_of_every_block_by_default(tiny_qwen_image):
    adapted = {name.split(".lora_")[0] for name in _load(tiny_qwen_image, "lora").trainable}
    attention = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    feed_forward = {f"{mlp}.{name}" for mlp in ("img_mlp", "txt_mlp") for name in ("net.0.proj", "net.2")}
    wanted = {f"attn.{name}" for name in attention} | feed_forward
    assert adapted == {f"transformer_blocks.{i}.{name}" for i in range(2) for name in wanted}


def test_a_distilled_flux2_klein_is_sampled_without_guidance(tiny_flux2_klein):
    pipeline = _pipeline(tiny_flux2_klein)
    pipeline.register_to_config(is_distilled=True)
    policy = policy_from_pipeline(
        pipeline, ModelSettings(lora_rank=2, lora_alpha=6, max_sequence_length=TOKENS, resolution=16)
    )
    with pytest.raises(ValueError, match=r"sampling\.guidance_scale: 3\.5 would guide a distilled model, .* use 1"):
        _ode(policy, 3.5)
    own = _diffusers(pipeline, policy, 3.5, "latent")  # which ignores it
    torch.testing.assert_close(_ode(policy, 1.0), own, rtol=0, atol=1e-5)


def test_qwen_image_is_told_where_a_text_ends_whatever_it_is_filled_up_to(tiny_qwen_image):
    prompts = [Prompt("red"), Prompt("red cat")]
    long, short = (_load(tiny_qwen_image, "lora", max_sequence_length=tokens) for tokens in (40, TOKENS))
    told = short.encode(prompts).tensors
    assert told["prompt_embeds_mask"].sum(1).tolist() == [8, 9]  # 3 letters and " cat", and five tokens of the chat's
    assert not told["prompt_embeds"][0, 8:].any() and told["prompt_embeds"][0, :8].any()
    outputs = [p.predict(_noise(p), torch.tensor(600.0), p.encode(prompts), 3.0) for p in (long, short)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    cut = _load(tiny_qwen_image, "lora", max_sequence_length=4).encode(prompts).tensors
    assert cut["prompt_embeds_mask"].all() and torch.equal(cut["prompt_embeds"], told["prompt_embeds"][:, :4])


def test_lora_targets_can_be_chosen(tiny_sd3):
    adapted = {name.split(".lora_")[0] for name in _load(tiny_sd3, "lora", lora_targets=("attn.to_q",)).trainable}
    assert adapted == {f"transformer_blocks.{i}.attn.to_q" for i in range(2)}
    adapted = {name.split(".lora_")[0] for name in _load(tiny_sd3, "lora", lora_targets=("*blocks.1.ff.*",)).trainable}
    assert adapted == {f"transformer_blocks.1.ff.{name}" for name in ("net.0.proj", "net.2")}


@pytest.mark.parametrize("target", ["attn.to_z", "attn", "o_q"])
def test_an_unknown_lora_target_is_named(tiny_sd3, target):
    with pytest.raises(ValueError, match=rf"model.lora_targets: .* '{target}'"):
        _load(tiny_sd3, "lora", lora_targets=("attn.to_q", target))


def test_the_t5_may_be_absent(tiny_sd3):
    from progrpo.policies.sd3 import SD3Policy

    pipeline = DiffusionPipeline.from_pretrained(tiny_sd3, text_encoder_3=None, tokenizer_3=None)
    policy = SD3Policy.from_pipeline(pipeline, ModelSettings(lora_rank=2, lora_alpha=2, max_sequence_length=TOKENS))
    expected = _diffusers(_without_t5(tiny_sd3), policy, 1.0, "latent")
    torch.testing.assert_close(_ode(policy, 1.0), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "absent", [("",), ("_2",), ("", "_2"), ("_2", "_3"), ("", "_3")], ids=lambda absent: "+".join(map(str, absent))
)
def test_what_an_absent_encoder_of_sd3_would_say_is_zeros(tiny_sd3, absent):
    settings = ModelSettings(lora_rank=2, lora_alpha=2, max_sequence_length=TOKENS)
    whole = dict(policy_from_pipeline(_pipeline(tiny_sd3), settings).encode([PROMPTS[0]]).tensors)
    without = {f"{part}{n}": None for n in absent for part in ("text_encoder", "tokenizer")}
    policy = policy_from_pipeline(DiffusionPipeline.from_pretrained(tiny_sd3, **without), settings)
    found = dict(policy.encode([PROMPTS[0]]).tensors)
    expected = {name: rows.clone() for name, rows in whole.items()}
    half, clip = whole["pooled_prompt_embeds"].shape[1] // 2, whole["prompt_embeds"].shape[1] - TOKENS
    for n, columns in (("", slice(0, half)), ("_2", slice(half, 2 * half))):
        if n in absent:
            expected["pooled_prompt_embeds"][:, columns] = 0
            expected["prompt_embeds"][:, :clip, columns] = 0
    if "_3" in absent:
        expected["prompt_embeds"][:, clip:] = 0
    if {"", "_2"} <= set(absent):  # 77 places of zeros, whatever the tokenizer that is not there had
        found["prompt_embeds"] = torch.cat([found["prompt_embeds"][:, :clip], found["prompt_embeds"][:, -TOKENS:]], 1)
    for name, rows in expected.items():
        assert torch.equal(found[name], rows), name
    policy.release_text_encoders()
    assert torch.equal(policy.encode([PROMPTS[0]]).tensors["pooled_prompt_embeds"], found["pooled_prompt_embeds"])
    with pytest.raises(ValueError, match="released"):
        policy.encode([Prompt("another")])


def test_sd3_without_any_text_encoder_is_refused(tiny_sd3):
    none = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"))
    with pytest.raises(ValueError, match=r"model\.path: the pipeline has no text encoder at all"):
        policy_from_pipeline(DiffusionPipeline.from_pretrained(tiny_sd3, **none), ModelSettings())


def test_a_model_that_was_saved_without_a_text_encoder_is_loaded_without_it(tiny_sd3, tmp_path):
    lacking = DiffusionPipeline.from_pretrained(tiny_sd3, text_encoder_3=None, tokenizer_3=None)
    lacking.save_pretrained(tmp_path / "lacking")
    policy, whole = _load(tmp_path / "lacking", "lora"), _load(tiny_sd3, "lora")
    found, of_all = (p.encode(PROMPTS).tensors["prompt_embeds"] for p in (policy, whole))
    assert torch.equal(found[:, :-TOKENS], of_all[:, :-TOKENS]) and not found[:, -TOKENS:].any()


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


@pytest.mark.parametrize("model", ["tiny_flux", "tiny_flux2_klein", "tiny_qwen_image"])
def test_a_packed_model_for_more_than_text_is_refused(request, model):
    pipeline = _pipeline(request.getfixturevalue(model))
    pipeline.transformer = type(pipeline.transformer).from_config(pipeline.transformer.config, in_channels=32)
    with pytest.raises(
        ValueError, match=r"the transformer takes 32 channels where tokens of latents have 16; .* alone"
    ):
        policy_from_pipeline(pipeline, ModelSettings())


def test_a_model_that_edits_is_told_the_source_beside_the_noise_and_is_not_asked_about_it(tiny_kontext):
    policy, told = _load(tiny_kontext, "lora"), []
    policy.denoiser.register_forward_pre_hook(lambda m, a, k: told.append(k), with_kwargs=True)
    one, other = (policy.encode([Prompt("red cat", prompt.columns)]) for prompt in PROMPTS)
    assert torch.equal(one.tensors["prompt_embeds"], other.tensors["prompt_embeds"])
    x = _noise(policy, 1)
    v = [policy.predict(x, torch.tensor(600.0), condition) for condition in (one, other)]
    assert v[0].shape == x.shape and (v[0] - v[1]).abs().max() > 1e-2
    assert told[0]["hidden_states"].shape == (1, 2 * 16, 16)
    assert told[0]["img_ids"][:, 0].tolist() == [0.0] * 16 + [1.0] * 16
    assert torch.equal(told[0]["img_ids"][:16, 1:], told[0]["img_ids"][16:, 1:])


def test_a_source_is_encoded_once_as_its_pipeline_does(tiny_kontext, tmp_path):
    policy, pipeline, encoded = _load(tiny_kontext, "lora"), _pipeline(tiny_kontext), []
    policy._pipeline.vae.encoder.register_forward_hook(lambda *args: encoded.append(1))
    SOURCES[0].save(tmp_path / "source.png")
    path = str(tmp_path / "source.png")
    asked = [Prompt("red cat", {"image": path}), Prompt("blue dog", {"image": path}), PROMPTS[0]]
    rows = policy.encode(asked).tensors["image_latents"]
    assert len(encoded) == 2 and torch.equal(rows[0], rows[1])  # by its path, and by its pixels
    (tmp_path / "source.png").unlink()
    assert torch.equal(policy.encode(asked).tensors["image_latents"], rows) and len(encoded) == 2
    pixels = pipeline.image_processor.preprocess(SOURCES[0], 16, 16, "crop")
    expected = pipeline._encode_vae_image(pixels, None)
    for row in (rows[0], rows[2]):
        torch.testing.assert_close(row[None], expected, rtol=0, atol=1e-6)


def test_a_source_of_another_shape_covers_the_size_that_is_sampled_and_is_cropped_at_its_middle(tiny_kontext):
    middle = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
    edge = np.zeros((16, 8, 3), np.uint8)
    wide = np.concatenate([edge, middle, edge], axis=1)
    tall = np.concatenate([edge.reshape(4, 32, 3), middle, edge.reshape(4, 32, 3)])
    large = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 96, 3), np.uint8))
    reduced = large.resize((48, 16), Image.Resampling.LANCZOS).crop((8, 0, 40, 16))
    policy = _load(tiny_kontext, "lora", resolution=(16, 32))
    sources = [*map(Image.fromarray, (middle, wide, tall)), large, reduced]
    rows = policy.encode([Prompt("red cat", {"image": source}) for source in sources]).tensors["image_latents"]
    assert rows.shape == (5, *policy.latent_shape)
    assert torch.equal(rows[1], rows[0]) and torch.equal(rows[2], rows[0])
    assert torch.equal(rows[3], rows[4])


def test_a_pair_of_calls_shows_the_source_in_both(tiny_kontext):
    pipeline = _pipeline(tiny_kontext)
    told = {**pipeline.transformer.config, "guidance_embeds": False}
    pipeline.transformer = type(pipeline.transformer).from_config(told)
    settings = ModelSettings(lora_rank=2, max_sequence_length=TOKENS, resolution=16)
    policy = policy_from_pipeline(pipeline, settings)
    x, condition, w = _noise(policy), policy.encode(PROMPTS), 3.0
    nothing = policy.encode([Prompt("", prompt.columns) for prompt in PROMPTS])
    v_u, v_c = (policy.predict(x, torch.tensor(600.0), told) for told in (nothing, condition))
    v = policy.predict(x, torch.tensor(600.0), condition, w)
    torch.testing.assert_close(v, v_u + w * (v_c - v_u), rtol=1e-4, atol=1e-5)


def test_a_prompt_without_a_source_is_named(tiny_kontext):
    policy = _load(tiny_kontext, "lora")
    for columns, message in (
        ({}, r"the prompt 'red cat' has no column image: this model changes a picture"),
        ({"image": 3}, r"column image of the prompt 'red cat' must be a picture or the path of one, not 3"),
        ({"image": "none.png"}, r"column image of the prompt 'red cat': none\.png cannot be read .*: no such file"),
        ({"image": b"text"}, r"column image of the prompt 'red cat': what it holds cannot be read as a picture"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.encode([Prompt("red cat", columns)])


@pytest.mark.parametrize("model", ["tiny_sd3", "tiny_flux", "tiny_wan"])
def test_a_flow_model_with_another_scheduler_is_refused(request, model):
    pipeline = _pipeline(request.getfixturevalue(model))
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match=r"model\.path: the scheduler is a DDIMScheduler; replace it by a FlowMatch"):
        policy_from_pipeline(pipeline, ModelSettings())


def test_wan_is_sampled_on_eulers_grid_of_its_unipcs_shift(tiny_wan):
    policy, pipeline = _load(tiny_wan, "lora"), _pipeline(tiny_wan)
    pipeline.scheduler.set_timesteps(STEPS)
    assert torch.equal(policy.levels(STEPS).sigma, pipeline.scheduler.sigmas)
    assert torch.equal(policy.levels(STEPS).timestep[:-1], pipeline.scheduler.timesteps)
    assert pipeline.scheduler.config.shift == 3


def test_a_lora_of_wan_adapts_both_attentions_and_the_feed_forward_by_default(tiny_wan):
    adapted = {name.split(".lora_")[0] for name in _load(tiny_wan, "lora").trainable}
    attention = {f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")}
    assert adapted == {f"blocks.{i}.{n}" for i in range(2) for n in attention | {"ffn.net.0.proj", "ffn.net.2"}}


def test_wans_autoencoder_is_float32_whatever_the_rest_is(tiny_wan):
    saved = _pipeline(tiny_wan).vae.state_dict()
    for dtype in ("bfloat16", "float16"):
        found = _load(tiny_wan, "lora", dtype=dtype)._pipeline.vae.state_dict()
        assert all(torch.equal(weight, saved[name]) for name, weight in found.items())


def test_videos_are_decoded_one_at_a_time(tiny_wan):
    policy, rows = _load(tiny_wan, "lora"), []
    policy._pipeline.vae.decoder.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    assert len(policy.decode(_noise(policy, 3)).images_NHWC) == 3
    assert rows == [1] * 3 * 2  # and a latent's frame at a time


def test_frames_set_the_length_of_a_video_and_must_fit(tiny_wan, tiny_sd3):
    for frames, latents in ((1, 1), (7, 4)):
        policy = _load(tiny_wan, "lora", resolution=8, frames=frames)
        assert policy.latent_shape == (4, latents, 4, 4)
        assert policy.decode(_noise(policy, 2)).images_NHWC.shape == (2, frames, 8, 8, 3)
    assert _load(tiny_wan, "lora", resolution=None, frames=None).latent_shape == (4, 41, 240, 416)
    with pytest.raises(ValueError, match=r"^model\.frames: 8 is not one more than a multiple of 2; .* 7 and 9$"):
        _load(tiny_wan, "lora", frames=8)
    with pytest.raises(ValueError, match=r"^model\.frames: this model makes pictures, not videos; leave it empty$"):
        _load(tiny_sd3, "lora", frames=9)


@pytest.mark.parametrize(
    "change",
    [
        {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
        {"boundary_ratio": 0.875},
        {"expand_timesteps": True},
    ],
)
def test_a_wan_of_another_kind_is_refused_by_its_index_alone(tiny_wan, tmp_path, change):
    index = json.loads((tiny_wan / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=r"^model\.path: this is a Wan 2\.2, .*; use a text-to-video Wan 2\.1"):
        _load(tmp_path, "lora")


def test_a_wan_of_another_kind_is_refused_as_a_pipeline(tiny_wan):
    pipeline = _pipeline(tiny_wan)
    pipeline.register_modules(transformer_2=pipeline.transformer)
    with pytest.raises(ValueError, match=r"^model\.path: this is a Wan 2\.2"):
        policy_from_pipeline(pipeline, ModelSettings())
    pipeline = _pipeline(tiny_wan)
    pipeline.transformer = type(pipeline.transformer).from_config(pipeline.transformer.config, in_channels=9)
    with pytest.raises(ValueError, match=r"takes 9 channels where latents have 4; .* not one from picture to video"):
        policy_from_pipeline(pipeline, ModelSettings())
    pipeline = DiffusionPipeline.from_pretrained(tiny_wan, text_encoder=None)
    with pytest.raises(ValueError, match=r"model\.path: the pipeline lacks its text encoder"):
        policy_from_pipeline(pipeline, ModelSettings())


def _without_t5(folder: Path) -> Any:
    pipeline = _pipeline(folder)
    pipeline.text_encoder_3 = None
    return pipeline


def test_a_unets_lora_adapts_the_transformer_blocks_by_default(tiny_sd):
    adapted = {
        name.split(".lora_")[0].rpartition("transformer_blocks.0.")[2] for name in _load(tiny_sd, "lora").trainable
    }
    attention = {f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")}
    assert adapted == attention | {"ff.net.0.proj", "ff.net.2"}


def test_sdxl_is_told_the_pictures_size_and_zeros_for_no_prompt(tiny_sdxl):
    policy, told = _load(tiny_sdxl, "lora", resolution=(8, 12)), []
    policy.denoiser.register_forward_pre_hook(lambda m, a, k: told.append(k["added_cond_kwargs"]), with_kwargs=True)
    policy.predict(_noise(policy), torch.tensor(600.0), policy.encode(PROMPTS), 2.0)
    (added,) = told
    assert added["time_ids"].tolist() == [[8, 12, 0, 0, 8, 12]] * 4
    assert not added["text_embeds"][:2].any() and added["text_embeds"][2:].all()


def test_sdxls_autoencoder_stays_in_float32_where_float16_would_overflow(tiny_sdxl, tiny_sd):
    assert _load(tiny_sdxl, "lora", dtype="float16")._pipeline.vae.dtype == torch.float32
    assert _load(tiny_sdxl, "lora", dtype="bfloat16")._pipeline.vae.dtype == torch.bfloat16
    assert _load(tiny_sd, "lora", dtype="float16")._pipeline.vae.dtype == torch.float16


def test_latents_with_a_mean_and_std_of_their_own_are_decoded_as_sdxls_pipeline_does(tiny_sdxl):
    policy, pipeline = _load(tiny_sdxl, "lora"), _pipeline(tiny_sdxl)
    for vae in (policy._pipeline.vae, pipeline.vae):
        vae.register_to_config(latents_mean=[0.3, -0.2, 0.1, 0.0], latents_std=[1.5, 0.8, 1.0, 2.0])
    pictures = policy.decode(_ode(policy, 1.0)).images_NHWC
    expected = torch.stack([_grey(picture) for picture in _diffusers(pipeline, policy, 1.0, "pil")])
    assert (pictures.int() - expected).abs().max() <= 1


def test_an_unet_for_more_than_text_is_refused(tiny_sd):
    pipeline = _pipeline(tiny_sd)
    pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config, in_channels=9)
    with pytest.raises(
        ValueError, match=r"model\.path: the U-Net takes 9 channels where latents have 4; .* inpainting"
    ):
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
    pipeline = _pipeline(tiny_sdxl)
    pipeline.scheduler = scheduler
    with pytest.raises(
        ValueError, match=rf"^model\.path: the scheduler is a {type(scheduler).__name__}, for whose noise"
    ):
        policy_from_pipeline(pipeline, ModelSettings())


def test_an_unet_that_must_be_told_the_guidance_scale_is_refused(tiny_sd):
    pipeline = _pipeline(tiny_sd)
    pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config, time_cond_proj_dim=8)
    with pytest.raises(ValueError, match=r"^model\.path: the U-Net must be told the guidance scale"):
        policy_from_pipeline(pipeline, ModelSettings())


@pytest.mark.parametrize(("encoder", "which"), [("text_encoder", "its"), ("text_encoder_2", "its second")])
def test_sdxl_without_a_text_encoder_is_refused(tiny_sdxl, encoder, which):
    pipeline = DiffusionPipeline.from_pretrained(tiny_sdxl, **{encoder: None})
    with pytest.raises(ValueError, match=rf"^model\.path: the pipeline lacks {which} text encoder; load it"):
        policy_from_pipeline(pipeline, ModelSettings())


def test_a_model_of_noise_at_pure_noise_is_refused(tiny_sd, tiny_sd_v):
    for folder, refused in ((tiny_sd, True), (tiny_sd_v, False)):
        pipeline = _pipeline(folder)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
        if refused:
            with pytest.raises(ValueError, match="set the scheduler's rescale_betas_zero_snr to false"):
                policy_from_pipeline(pipeline, ModelSettings())
        else:
            assert policy_from_pipeline(pipeline, ModelSettings(lora_rank=2)).levels(STEPS).alpha.isfinite().all()


@pytest.mark.parametrize("scheduler", [LCMScheduler, EulerDiscreteScheduler])
def test_what_a_scheduler_has_by_default_stays_when_its_noise_is_sampled_by_ddim(tiny_sd, tmp_path, scheduler):
    pipeline = _pipeline(tiny_sd)
    pipeline.scheduler = scheduler()
    pipeline.scheduler.save_pretrained(tmp_path)  # a file says every default, where an object lists those it was left
    own, settings = pipeline.scheduler, ModelSettings(lora_rank=2)
    levels = policy_from_pipeline(pipeline, settings).levels(STEPS)
    signal = own.alphas_cumprod[levels.timestep[:-1].long()]
    assert torch.equal(levels.alpha[:-1], signal.sqrt())
    pipeline = _pipeline(tiny_sd)
    pipeline.scheduler = scheduler.from_pretrained(tmp_path)
    assert torch.equal(policy_from_pipeline(pipeline, settings).levels(STEPS).timestep, levels.timestep)


def test_a_safety_checker_takes_no_memory(tiny_sd):
    pipeline = _pipeline(tiny_sd)
    pipeline.safety_checker = torch.nn.Linear(1, 1)
    policy_from_pipeline(pipeline, ModelSettings(lora_rank=2))
    assert pipeline.safety_checker is None


@pytest.mark.parametrize("model", ["tiny_sd3", "tiny_flux", "tiny_flux2_klein", "tiny_qwen_image"])
def test_resolution_sets_the_latent_and_must_fit(request, model):
    folder = request.getfixturevalue(model)
    policy = _load(folder, "lora", resolution=8)
    assert policy.latent_shape == (4, 4, 4)
    assert policy.decode(_noise(policy, 1)).images_NHWC.shape == (1, 8, 8, 3)
    for resolution, message in (
        (10, r"10 is not a multiple of 4; 8 or 12 would do"),
        (2, r"2 is not a multiple of 4; 4 would do"),
        ((8, 10), r"8 10 \(height and width\) are not both multiples of 4; 8 8 or 8 12 would do"),
        ((3, 9), r"3 9 \(height and width\) are not both multiples of 4; 4 8 or 4 12 would do"),
    ):
        with pytest.raises(ValueError, match=rf"^model\.resolution: {message}$"):
            _load(folder, "lora", resolution=resolution)


def test_a_size_beyond_the_embedding_of_places_is_refused(tiny_sd3):
    assert _load(tiny_sd3, "lora", resolution=(8, 32)).latent_shape == (4, 4, 16)
    with pytest.raises(
        ValueError, match=r"^model\.resolution: 36 is more than 32 pixels a side, where .* places ends$"
    ):
        _load(tiny_sd3, "lora", resolution=(8, 36))


@pytest.mark.parametrize(
    ("model", "side"), [("tiny_sd3", 8), ("tiny_sdxl", 8), ("tiny_flux", 128), ("tiny_qwen_image", 128)]
)
def test_without_a_resolution_it_is_the_models_own(request, model, side):
    assert _load(request.getfixturevalue(model), "lora", resolution=None).latent_shape == (4, side, side)


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
            "is a AllegroPipeline; progrpo trains Flux2KleinPipeline, FluxKontextPipeline, FluxPipeline, QwenImagePipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline",
        ),
        (tmp_path / "absent", "neither a built-in model"),
        ("nobody/nothing", "no folder has that name, and the Hugging Face hub was tried: the hub.* cannot be reached"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            _load(path, "lora")
        assert str(caught.value).startswith("model.path: ") and "\n" not in str(caught.value)


def test_unknown_kind_of_weights_is_refused(tiny_sd3):
    with pytest.raises(ValueError, match=r"model\.weights: 'dora' is not known"):
        _load(tiny_sd3, "dora")


# --- texts that are too long -------------------------------------------------------------------------------------------


def test_texts_are_said_to_become_equal_exactly_where_the_network_is_told_the_same(case, policy):
    """Pairs that differ in their last letter, longer by one letter each: what the tensors say is the truth."""
    if case.weights == "full":
        pytest.skip("as with a LoRA")
    equal, cut = [], []
    for count in range(1, 2 * TOKENS):
        texts = [f"{'a' * count}{end}" for end in "bc"]
        told = policy.encode([Prompt(text, {"image": SOURCES[0]}) for text in texts]).tensors
        found = policy.truncation(texts)
        assert found.count == 2 and set(found.cut) <= set(texts) and found.equal in (0, 2)
        equal.append(found.equal == 2)
        cut.append(len(found.cut) == 2)
        assert equal[-1] == all(torch.equal(*rows) for name, rows in told.items() if name != "image_latents")
    assert equal == sorted(equal) and equal[-1] and cut == sorted(cut)
    assert all(cut[i] for i in range(len(cut)) if equal[i])
    policy.release_text_encoders()
    assert policy.truncation(["a" * 4 * TOKENS + end for end in "bc"]).equal == 2


def test_a_text_that_fits_is_not_said_to_be_cut(tiny_sd, tiny_flux):
    for folder, name, fits in ((tiny_sd, "text_encoder", 14), (tiny_flux, "text_encoder_2", TOKENS - 2)):
        policy = _load(folder, "lora")
        (reader,) = (r for r in policy._readers if r.name == name)
        assert [len(ids) - reader.limit for ids in reader.tokens(["a" * fits, "a" * (fits + 1)])] == [0, 1], name
