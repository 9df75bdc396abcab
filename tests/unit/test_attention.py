"""Attention by matrix products against diffusers' own processor, which uses torch's fused kernel; its backends."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.activations import GELU
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, AttnProcessor, JointAttnProcessor2_0
from peft.tuners.tuners_utils import BaseTunerLayer

from progrpo.policies.attention import JointAttention
from progrpo.policies.load import load_policy
from progrpo.policies.pipeline import PipelinePolicy
from progrpo.policies.settings import ModelSettings
from progrpo.types import Condition, Prompt

WIDTH, PLACES, TOKENS = 24, 10, 7


def loaded(folder: Path, dtype: Any) -> PipelinePolicy:
    policy = load_policy(ModelSettings(str(folder), dtype=dtype))
    assert isinstance(policy, PipelinePolicy)
    return policy


def layer(norm: str | None, text: bool, last: bool) -> Attention:
    torch.manual_seed(0)
    made = Attention(
        query_dim=WIDTH,
        added_kv_proj_dim=WIDTH if text else None,
        context_pre_only=last if text else None,
        dim_head=8,
        heads=3,
        out_dim=WIDTH,
        bias=True,
        qk_norm=norm,
        processor=JointAttnProcessor2_0(),
    )
    return made.double()


@pytest.mark.parametrize("norm", [None, "rms_norm"], ids=["plain", "normed"])
@pytest.mark.parametrize(("text", "last"), [(True, False), (True, True), (False, False)], ids=["both", "last", "alone"])
def test_it_is_diffusers_joint_attention_with_its_gradients(norm, text, last):
    attn = layer(norm, text, last)
    text_states = torch.randn(2, TOKENS, WIDTH).double() if text else None
    results = []
    for processor in (JointAttnProcessor2_0(), JointAttention()):
        x = torch.linspace(-1, 1, 2 * PLACES * WIDTH).double().sin().view(2, PLACES, WIDTH).requires_grad_()
        out = processor(attn, x, text_states)
        outputs = out if isinstance(out, tuple) else (out,)
        sum(part.square().sum() for part in outputs).backward()
        weights = [p.grad for p in attn.parameters() if p.grad is not None]
        attn.zero_grad()
        results.append((*outputs, x.grad, *weights))
    fused, products = results
    assert len(fused) == len(products)
    for expected, got in zip(fused, products, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_cpu_in_low_precision_attends_by_matrix_products(tiny_sd3, tiny_sd, dtype):
    for pipeline, kind in ((tiny_sd3, JointAttention), (tiny_sd, AttnProcessor)):
        denoiser = loaded(pipeline, dtype).denoiser
        assert all(isinstance(p, kind) == (dtype != "float32") for p in denoiser.attn_processors.values())


def test_a_cpu_in_low_precision_takes_gelu_itself_with_an_error_as_small(tiny_sd3):
    outputs = {}
    for dtype, expected in (("float32", "tanh"), ("bfloat16", "none")):
        policy = loaded(tiny_sd3, dtype)
        layers = [m for m in policy.denoiser.modules() if isinstance(m, GELU)]
        assert layers and all(layer.approximate == expected for layer in layers)
        condition = policy.encode([Prompt("a red cat")] * 4)
        x = torch.randn(4, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        for approximate in ("tanh", "none"):
            for layer in layers:
                layer.approximate = approximate
            with torch.no_grad():
                outputs[dtype, approximate] = policy.predict(x, torch.tensor(500.0), condition)
    truth = outputs["float32", "tanh"]
    error = {name: float((output - truth).abs().mean()) for name, output in outputs.items()}
    assert 0 < error["float32", "none"] < error["bfloat16", "tanh"] / 4
    assert error["bfloat16", "none"] < 1.1 * error["bfloat16", "tanh"]


def test_raising_a_loras_input_to_float32_would_change_no_bit(tiny_sd3):
    policy = loaded(tiny_sd3, "bfloat16")
    layers = [module for module in policy.denoiser.modules() if isinstance(module, BaseTunerLayer)]
    embeds = {
        name: torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
        for name, shape in policy.family.condition_shapes().items()
    }
    x = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in policy.trainable.items():  # a fresh LoRA's B is 0, and its A would have no gradient
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    results: list[list[torch.Tensor]] = []
    for raised in (False, True):
        assert layers
        for module in layers:
            assert results or not module.cast_input_dtype_enabled
            module.cast_input_dtype_enabled = raised
        out = policy.predict(x, torch.tensor(500.0), Condition(embeds))
        out.square().mean().backward()
        gradients = [p.grad.clone() for p in policy.trainable.values() if p.grad is not None]
        assert len(gradients) == len(policy.trainable)
        results.append([out.detach(), *gradients])
        for parameter in policy.trainable.values():
            parameter.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_backend_is_the_denoisers_alone_and_computes_the_same(tiny_flux):
    before = _AttentionBackendRegistry.get_active_backend()[0]
    outputs = []
    for attention in ("default", "_native_math"):
        policy = load_policy(ModelSettings(str(tiny_flux), attention=attention))
        backends = {
            processor._attention_backend
            for module in policy.denoiser.modules()
            if (processor := getattr(module, "processor", None)) is not None
        }
        assert backends == {None if attention == "default" else AttentionBackendName(attention)}
        assert _AttentionBackendRegistry.get_active_backend()[0] == before
        condition = policy.encode([Prompt("a red cat")])
        x = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        outputs.append(policy.predict(x, torch.tensor(500.0), condition).detach())
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_a_backend_that_cannot_be_used_is_said_in_a_sentence(tiny_sd3, tiny_flux):
    with pytest.raises(ValueError, match="attention of a SD3Transformer2DModel has no backends in diffusers; leave it"):
        load_policy(ModelSettings(str(tiny_sd3), attention="native"))
    if find_spec("xformers") is None:
        with pytest.raises(ValueError, match=r"model\.attention: xformers cannot be used: .*install.*xformers"):
            load_policy(ModelSettings(str(tiny_flux), attention="xformers"))
