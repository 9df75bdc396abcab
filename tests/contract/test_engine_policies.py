"""Abilities of a policy beside predicting: probes, checkpointed activations, tiny decoders, compilation."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from progrpo.config import AuditSettings, ModelSettings, OptimSettings, PlanSettings, PreviewSettings, SamplingSettings
from progrpo.policies.base import Policy, PolicyContext
from progrpo.policies.load import load_policy, policy_from_pipeline
from progrpo.policies.prepare import compilable_decoder
from progrpo.rollout.preview import decoded
from progrpo.rollout.probe import latent_features, text_features
from progrpo.training.checks import rounding_of_ratio
from progrpo.types import Pictures, Prompt

TEXTS = ("red cat", "blue dog", "green bird")
SOURCES = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)) for i in range(3)]
PROMPTS = [Prompt(text, {"image": source}) for text, source in zip(TEXTS, SOURCES, strict=True)]
SETTINGS = ModelSettings(lora_rank=2, lora_alpha=6, max_sequence_length=8, resolution=16)


def previewed_by(decoder: Path | str) -> PolicyContext:
    return PolicyContext(decoder_for_previews=str(decoder))


@pytest.fixture
def folder(family_at_length: Path) -> Path:
    return family_at_length


@pytest.fixture
def of_pictures(family_at_length: Path) -> None:
    if family_at_length.name == "tiny-wan":
        pytest.skip("an AutoencoderTiny decodes pictures")


@pytest.fixture
def loaded(folder: Path, move: Any) -> Any:
    """The family's policy with moved weights."""

    def of(decoder: Path | str = "", **changes: Any) -> Any:
        settings = replace(SETTINGS, path=str(folder), frames=3 if folder.name == "tiny-wan" else None, **changes)
        policy = load_policy(settings, previewed_by(decoder))
        move(policy, 0.1)
        return policy

    return of


def noise(policy: Policy, count: int = len(TEXTS)) -> Tensor:
    return torch.randn(count, *policy.latent_shape, generator=torch.Generator().manual_seed(3))


def predicted(policy: Policy, guidance_scale: float = 1.0) -> Tensor:
    return policy.predict(noise(policy), torch.tensor(400.0), policy.encode(PROMPTS), guidance_scale)


def differentiated(policy: Policy) -> dict[str, Tensor]:
    (predicted(policy, 3.0) * noise(policy).flip(0)).mean().backward()
    gradients = {name: p.grad.clone() for name, p in policy.trainable.items() if p.grad is not None}
    for p in policy.trainable.values():
        p.grad = None
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    return gradients


# --- probed -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_probe_has_features_of_latents_and_texts(loaded):
    policy = loaded()
    texts, seen = text_features(policy.encode(PROMPTS)), latent_features(noise(policy))
    assert texts.ndim == 3 and len(texts) == len(seen) == len(TEXTS) and seen.ndim == 4
    assert texts.isfinite().all() and len(texts.flatten(1).unique(dim=0)) == len(TEXTS)


# --- activation checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_checkpointed_activations_give_the_same_outputs_and_gradients(loaded, weights):
    plain, checkpointed = (loaded(weights=weights, activation_checkpointing=asked) for asked in (False, True))
    assert torch.equal(predicted(checkpointed, 3.0), predicted(plain, 3.0))
    expected, gradients = differentiated(plain), differentiated(checkpointed)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_activations_are_computed_anew_by_the_kernels_of_the_call(tiny_sd3, move):
    policies = [
        load_policy(replace(SETTINGS, dtype="bfloat16", activation_checkpointing=asked, path=str(tiny_sd3)))
        for asked in (False, True)
    ]
    for policy in policies:
        move(policy, 0.1)
    expected, gradients = map(differentiated, policies)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


@dataclass
class Held:
    """The number of values that a graph keeps for its backward pass."""

    numbers: int = 0

    def pack(self, tensor: Tensor) -> Tensor:
        self.numbers += tensor.numel()
        return tensor


def test_checkpointing_keeps_fewer_activations(loaded):
    kept = []
    for asked in (False, True):
        policy, held = loaded(activation_checkpointing=asked), Held()
        with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda tensor: tensor):
            predicted(policy)
        kept.append(held.numbers)
    assert kept[1] < 0.7 * kept[0]


# --- tiny decoder -----------------------------------------------------------------------------------------------------


def save_tiny_decoder(folder: Path, channels: int = 4, scaling_factor: float = 1.3, shift_factor: float = 0.2) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tiny = AutoencoderTiny(
            latent_channels=channels,
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
        )
    tiny.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("of_pictures")
def test_a_tiny_decoder_serves_previews_alone(loaded, tmp_path):
    place = save_tiny_decoder(tmp_path / "tiny")
    plain, policy = loaded(), loaded(place)
    x0 = noise(policy)
    full = policy.decode(x0).images_NHWC
    assert torch.equal(full, plain.decode(x0).images_NHWC) and torch.equal(plain.preview(x0).images_NHWC, full)
    tiny = AutoencoderTiny.from_pretrained(place)
    with torch.no_grad():
        expected = tiny.decode(x0 / 1.3 + 0.2, return_dict=False)[0].permute(0, 2, 3, 1)
    pictures = policy.preview(x0).images_NHWC
    assert pictures.shape == full.shape and pictures.dtype == torch.uint8 and not torch.equal(pictures, full)
    assert (pictures.float() - (expected * 0.5 + 0.5).clamp(0, 1) * 255).abs().max() <= 0.51  # rounding
    assert pictures.float().std() > 1  # not one grey


@pytest.mark.usefixtures("of_pictures")
def test_a_tiny_decoder_is_not_trained(loaded, tmp_path):
    policy = loaded(save_tiny_decoder(tmp_path / "tiny"))
    tiny = policy.previewer.autoencoder
    assert not any(p.requires_grad for p in tiny.parameters()) and not tiny.training
    assert policy.trainable.keys() == loaded().trainable.keys()


@pytest.mark.usefixtures("of_pictures")
def test_a_tiny_decoder_of_other_latents_is_refused(folder, tmp_path):
    place = save_tiny_decoder(tmp_path / "tiny", channels=8)
    with pytest.raises(ValueError, match=r"preview\.tiny_decoder: .*tiny decodes latents of 8 channels.* 4") as refused:
        load_policy(replace(SETTINGS, path=str(folder)), previewed_by(place))
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("of_pictures")
def test_a_tiny_decoder_that_is_not_there_is_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(ValueError, match=r"^preview\.tiny_decoder: cannot load ") as refused:
            load_policy(replace(SETTINGS, path=str(folder)), previewed_by(place))
        assert str(place) in str(refused.value) and "\n" not in str(refused.value)


def test_a_tiny_decoder_that_is_none_is_refused(tiny_sd, tmp_path):
    place, file = save_tiny_decoder(tmp_path / "half"), "diffusion_pytorch_model.safetensors"
    weights = load_file(place / file)
    save_file(dict(list(weights.items())[1:]), place / file)
    for name, reason in (
        (tiny_sd / "vae", r".*vae lacks \d+ of the \d+ tensors .*"),  # the whole autoencoder
        (place, r".*half lacks 1 of the \d+ tensors that its config\.json asks for, such as \S+"),
        (place / "config.json", ".+"),
    ):
        with pytest.raises(ValueError, match=rf"^preview\.tiny_decoder: cannot load {re.escape(str(name))}: {reason}$"):
            load_policy(replace(SETTINGS, path=str(tiny_sd)), previewed_by(name))


def test_a_tiny_decoder_of_pictures_is_refused_for_videos(tiny_wan, tmp_path):
    place = save_tiny_decoder(tmp_path / "tiny")
    with pytest.raises(
        ValueError, match=r"^preview\.tiny_decoder: an AutoencoderTiny decodes pictures, and .* videos$"
    ):
        load_policy(replace(SETTINGS, path=str(tiny_wan), frames=3), previewed_by(place))


# --- compile ----------------------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler on a CPU"
)


def compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _of_one_block(folder: Path, settings: ModelSettings) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    del pipeline.transformer.transformer_blocks[0]
    return policy_from_pipeline(pipeline, settings)


def compile_by(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend=backend, **options)
    )
    torch._dynamo.reset()


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs of a network and of its gradients, compiled as users have them, which takes half a minute."""
    compile_by(monkeypatch, request.param)


def test_a_compiled_policy_is_the_policy_whatever_weights_it_has(compiler, tiny_sd3, move):
    """All of it with gradients, on one shape and with one block, so that there is one compilation."""
    layers = "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"
    settings = replace(SETTINGS, lora_targets=layers)
    eager, policy = (_of_one_block(tiny_sd3, replace(settings, compile=asked)) for asked in (False, True))
    assert policy.compiled and not eager.compiled
    assert policy.trainable.keys() == eager.trainable.keys()
    before = compilations()

    def pair(weights: str = "current") -> tuple[Tensor, Tensor]:
        velocities = []
        for one in (eager, policy):
            with one.weights(weights):
                velocities.append(predicted(one))
        torch.testing.assert_close(velocities[1], velocities[0], rtol=0, atol=1e-5)
        return velocities[0], velocities[1]

    base = pair()[0]
    for one in (eager, policy):
        move(one, 0.1)
    outputs = pair()
    assert (outputs[0] - base).abs().max() > 1e-2
    gradients = []
    for one, output in zip((eager, policy), outputs, strict=True):
        names, parameters = zip(*one.trainable.items(), strict=True)
        grads = torch.autograd.grad(output.square().mean(), parameters, allow_unused=True)
        gradients.append({n: g for n, g in zip(names, grads, strict=True) if g is not None and g.abs().max() > 0})
    assert len(gradients[0]) > 10
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert torch.equal(pair("reference")[0], base)
    assert torch.equal(pair()[0], outputs[0])
    assert compilations() == before + 1


@pytest.fixture
def quickly_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile without the minutes that the compiler takes: the graphs run as they are."""
    compile_by(monkeypatch, "eager")


@pytest.mark.parametrize(
    ("model", "microbatch", "graphs"),
    [
        ("tiny_sd3", 9, 6),
        pytest.param("tiny_sd3", 3, 4, marks=pytest.mark.slow),
        pytest.param("tiny_flux", 3, 6, marks=pytest.mark.slow),
    ],
)
def test_a_second_iteration_of_a_plan_that_prunes_compiles_nothing(
    quickly_compiled, request, model, microbatch, graphs, tiny_trainer, tiny_config
):
    policy = load_policy(replace(SETTINGS, lora_alpha=4, compile=True, path=str(request.getfixturevalue(model))))
    config = tiny_config(
        model=ModelSettings(lora_rank=2, lora_alpha=4, max_sequence_length=8),
        plan=PlanSettings("custom", group_size=5, prune=((0, 4), (1, 3))),
        sampling=SamplingSettings(num_inference_steps=4, microbatch=microbatch),
        optim=OptimSettings(microbatch=5),
        preview=PreviewSettings(probe=True, ode_steps=2),
        audit=AuditSettings(every=1),
    )
    trainer, start = tiny_trainer(config, policy), compilations()
    first = trainer.step().record
    assert first["update/on_policy_deviation"] <= 3e-5
    met = compilations()
    trainer.step()
    assert compilations() == met
    # for every kind of block of sampling, of training, and of an audit whose group is smaller than a microbatch
    assert met - start == graphs


@pytest.mark.parametrize("model", ["tiny_sd3", pytest.param("tiny_sd", marks=pytest.mark.slow)])
def test_compiled_blocks_compute_their_activations_anew(quickly_compiled, request, model, move):
    results = []
    for asked in (False, True):
        settings = replace(SETTINGS, activation_checkpointing=True, compile=asked)
        policy = load_policy(replace(settings, path=str(request.getfixturevalue(model))))
        move(policy, 0.1)
        output = predicted(policy)
        parameters = list(policy.trainable.values())
        grads = torch.autograd.grad(output.square().mean(), parameters, allow_unused=True)
        results.append((output.detach(), [g for g in grads if g is not None]))
    (output, expected), (compiled, own) = results
    torch.testing.assert_close(compiled, output, rtol=0, atol=1e-5)
    assert len(own) == len(expected) > 10
    for mine, theirs in zip(own, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@needs_compiler
def test_grpo_trains_what_is_compiled_in_low_precision(tiny_sd3, tiny_trainer, tiny_config):
    """By the compiler that users have: networks with and without gradient are fused, and round, differently."""
    torch._dynamo.reset()
    policy = load_policy(replace(SETTINGS, dtype="bfloat16", compile=True, path=str(tiny_sd3)))
    config = tiny_config(
        model=ModelSettings(lora_rank=2, lora_alpha=4, max_sequence_length=8, dtype="bfloat16", compile=True),
        optim=OptimSettings(microbatch=4, updates_per_rollout=2),
    )
    trainer = tiny_trainer(config, policy)
    for _ in range(2):
        record = trainer.step().record
        assert 0 < record["update/on_policy_deviation"] <= rounding_of_ratio(math.prod(policy.latent_shape))


def test_of_decoders_those_of_pictures_are_compiled_and_on_no_cpu(tiny_sd3, tiny_wan):
    vaes = [DiffusionPipeline.from_pretrained(f, use_safetensors=True).vae for f in (tiny_sd3, tiny_wan)]
    on_gpu, on_cpu = torch.device("cuda"), torch.device("cpu")
    assert [compilable_decoder(vae, SETTINGS, on_gpu) for vae in vaes] == [[vaes[0].decoder], []]
    assert not compilable_decoder(vaes[0], SETTINGS, on_cpu)
    assert not compilable_decoder(vaes[0], replace(SETTINGS, decoding="tiled"), on_gpu)


@pytest.mark.parametrize(("compiled", "sizes"), [(False, [4, 4, 1]), (True, [4, 4, 4])])
def test_acompilable_decoder_sees_one_shape(tiny_policy, monkeypatch, compiled, sizes):
    policy, met = tiny_policy(), []
    decode = policy.decode

    def noted(x: Tensor) -> Pictures:
        met.append(len(x))
        return decode(x)

    monkeypatch.setattr(policy, "compiled_decoder", compiled)
    monkeypatch.setattr(policy, "decode", noted)
    x0 = torch.randn(9, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    pictures = decoded(policy, x0, 4).images_NHWC
    assert met == sizes and len(pictures) == 9
    assert (pictures.int() - decode(x0).images_NHWC.int()).abs().max() <= 1
