"""Frozen weights in 8 bits: the layer against its closed form, and a denoiser of such layers beside a LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from progrpo.config import Config, ModelSettings, config_to_json
from progrpo.policies.base import PolicyContext
from progrpo.policies.load import load_policy
from progrpo.policies.quantized import Int8Linear
from progrpo.policies.sizes import sizes
from progrpo.training.build import policy_from
from progrpo.training.distributed import Ranks
from progrpo.training.trained_model import ModelChoice
from progrpo.types import Prompt

SETTINGS = ModelSettings(lora_rank=2, lora_alpha=4, max_sequence_length=8, resolution=16)


@pytest.fixture
def linear() -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(48, 32).requires_grad_(False)
        layer.weight[3] = 0.0  # a row without a scale of its own
        layer.weight[5, 7] = 100.0
        return layer


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))


def wide(layer: Int8Linear) -> Tensor:
    return layer.weight.double() * layer.scale.double()


def test_every_weight_is_within_half_a_scale_and_a_rows_largest_is_exact(linear):
    layer = Int8Linear(linear)
    assert layer.weight.dtype == torch.int8 and layer.scale.shape == (32, 1) and layer.weight.abs().max() == 127
    off = (wide(layer) - linear.weight.double()).abs()
    assert (off <= layer.scale.double() * (0.5 + 1e-5)).all() and off.max() > 0
    assert wide(layer)[3].eq(0).all() and wide(layer)[5, 7].item() == pytest.approx(100, rel=1e-6)


def test_output_and_gradient_are_those_of_the_widened_weight(linear, x):
    layer, inputs = Int8Linear(linear), x.clone().requires_grad_()
    output = layer(inputs)
    with torch.no_grad():
        assert torch.equal(layer(x), output)
    assert (output.double() - (x.double() @ wide(layer).T + linear.bias.double())).abs().max() < 1e-4
    towards = torch.randn_like(output)
    (output * towards).sum().backward()
    assert (inputs.grad.double() - towards.double() @ wide(layer)).abs().max() < 1e-4


class Made(TorchDispatchMode):
    """Dtypes of what is computed in a shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.dtypes = shape, set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape == self.shape:
            self.dtypes.add(result.dtype)
        return result


def test_autocast_decides_on_the_dtype_and_nothing_is_wider(linear, x):
    layer, low = Int8Linear(linear.bfloat16()), torch.bfloat16
    with torch.autocast("cpu", low), Made((32, 48)) as made:
        actual = layer(x)
    with torch.autocast("cpu", low):
        plain = linear(x)
    assert actual.dtype == plain.dtype == low and made.dtypes <= {low, torch.int8}
    expected = nn.functional.linear(x.to(low), wide(layer).to(low), linear.bias)
    assert (actual - expected).abs().max() <= 0.01 * expected.abs().max()


def test_no_graph_holds_a_wide_weight(linear, x):
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Int8Linear(linear)(x.requires_grad_())
    assert [(t.dtype, t.shape) for t in kept] == [(torch.int8, (32, 48)), (torch.float32, (32, 1))]


# --- a policy of them -------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(family_at_length: Path, move: Any) -> Any:
    """The family's policy with moved weights, the same whatever its frozen ones are kept in."""
    folder = family_at_length

    def of(**changes: Any) -> Any:
        policy = load_policy(
            replace(SETTINGS, frames=3 if folder.name == "tiny-wan" else None, **changes, path=str(folder))
        )
        if "lora" not in changes:
            move(policy, 0.1)
        return policy

    return of


def output(policy: Any, prompts: Any) -> Tensor:
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    return policy.predict(x, torch.tensor(700.0), policy.encode(prompts))


def in_blocks(policy: Any) -> list[str]:
    return [name for name, module in policy.denoiser.named_modules() if isinstance(module, Int8Linear)]


def test_blocks_are_in_8_bits_the_lora_is_whole_and_fits_the_unquantised_model(loaded, prompts_of, tmp_path):
    prompts = prompts_of("red cat", "blue dog")
    whole, lean = loaded(), loaded(quantize="int8")
    assert len(in_blocks(lean)) > 5 and not in_blocks(whole)
    assert [n for n, t in lean.frozen() if t.dtype == torch.int8] == [f"{n}.weight" for n in in_blocks(lean)]
    assert all(torch.equal(p, whole.trainable[name]) for name, p in lean.trainable.items())
    with torch.no_grad():
        quantized, expected = output(lean, prompts), output(whole, prompts)
    assert 0 < (quantized - expected).norm() < 0.05 * expected.norm()
    output(lean, prompts).square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in lean.trainable.values())
    lean.save(tmp_path / "lora")
    taken = loaded(lora=str(tmp_path / "lora"))  # as diffusers reads it, on the unquantised model
    with torch.no_grad():
        assert torch.equal(output(taken, prompts), expected)
    again = loaded(lora=str(tmp_path / "lora"), quantize="int8")
    with torch.no_grad():
        assert torch.equal(output(again, prompts), quantized)


def encoders_of(policy: Any) -> list[Any]:
    return [c for name, c in policy.pipeline.components.items() if name.startswith("text_encoder") and c is not None]


@pytest.mark.parametrize("model", ["tiny_sd3", "tiny_flux2_klein", "tiny_wan", "tiny_qwen_image"])
def test_text_encoders_in_8_bits_are_half_as_large_and_say_nearly_the_same(request, model, prompts_of):
    folder = request.getfixturevalue(model)
    settings = replace(SETTINGS, frames=3 if model == "tiny_wan" else None, path=str(folder), keep_text_encoders=True)
    whole, lean = (load_policy(replace(settings, text_quantize=name)) for name in ("none", "int8"))
    assert not in_blocks(lean)
    for encoder in encoders_of(lean):
        kinds = {type(m) for name, m in encoder.named_modules() if ".0." in name and isinstance(m, nn.Linear)}
        assert kinds == {Int8Linear}
    one, other = (policy.encode(prompts_of("red cat", "blue dog")).tensors for policy in (whole, lean))
    for name, embedding in one.items():
        if embedding.is_floating_point():
            off = (other[name] - embedding).norm() / embedding.norm()
            assert off < 0.05 and (off > 0 or "mask" in name), name


def test_a_plan_counts_text_encoders_in_8_bits(tiny_sd3):
    settings = replace(SETTINGS, path=str(tiny_sd3), text_quantize="int8")
    policy = load_policy(replace(settings, keep_text_encoders=True))
    own = sum(p.nbytes for encoder in encoders_of(policy) for p in encoder.parameters())
    assert sizes(settings, 1, 1, 1).text_encoder_bytes == own


def test_scales_stay_precise_where_the_rest_is_not(tiny_sd3):
    policy: Any = load_policy(replace(SETTINGS, dtype="bfloat16", quantize="int8", path=str(tiny_sd3)))
    layers = [module for module in policy.denoiser.modules() if isinstance(module, Int8Linear)]
    assert {layer.scale.dtype for layer in layers} == {torch.float32}


def test_a_saved_lora_gives_diffusers_the_pictures_of_the_unquantised_model(tiny_sd3, tiny_pipeline, move, tmp_path):
    policy = load_policy(replace(SETTINGS, quantize="int8", path=str(tiny_sd3)))
    move(policy, 0.1)
    policy.save(tmp_path)
    pipeline = tiny_pipeline(tiny_sd3)
    pipeline.load_lora_weights(tmp_path, local_files_only=True)
    embeds = policy.encode([Prompt("red cat")]).tensors
    x = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        one = policy.predict(x, torch.tensor(500.0), policy.encode([Prompt("red cat")]))
        other = pipeline.transformer(
            x, embeds["prompt_embeds"], embeds["pooled_prompt_embeds"], torch.tensor([500.0]), return_dict=False
        )[0]
    assert 0 < (one - other).norm() < 0.05 * other.norm()


def test_a_run_is_quantized_and_what_it_saved_is_drawn_with_the_whole_model(tiny_sd3, tmp_path):
    model = ModelSettings(str(tiny_sd3), lora_rank=2, max_sequence_length=8, quantize="int8", text_quantize="int8")
    policy: Any = policy_from(model, PolicyContext())
    assert in_blocks(policy)
    run = tmp_path / "run"
    policy.save(run / "lora")
    (run / "config.json").write_text(config_to_json(Config(model=model)))
    (run / "summary.json").write_text("{}")
    looked_at: Any = ModelChoice(str(run)).load(Ranks())
    assert not in_blocks(looked_at)
    assert not any(isinstance(m, Int8Linear) for encoder in encoders_of(looked_at) for m in encoder.modules())
