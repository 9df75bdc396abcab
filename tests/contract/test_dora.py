"""DoRA and ranks by layer: the layer against its closed form, and a policy of them that every reader takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from progrpo.cli import main
from progrpo.config import Config, config_to_json
from progrpo.policies.dora import Magnitude
from progrpo.policies.load import load_policy, policy_from_pipeline
from progrpo.policies.quantized import Int8Linear
from progrpo.policies.settings import ModelSettings
from progrpo.policies.sizes import sizes
from progrpo.settings import Values, check_rules
from progrpo.studio.model import RESULT, TunedModel
from tests.support.runs import load_pipeline

SETTINGS = ModelSettings(lora_rank=2, lora_alpha=6, max_sequence_length=8, resolution=16, lora_use_dora=True)
FILE = "pytorch_lora_weights.safetensors"
Output = Callable[[Any], Tensor]


@pytest.fixture
def output(prompts_of: Any) -> Output:
    """The network's output for two prompts."""

    @torch.no_grad()
    def of(policy: Any) -> Tensor:
        x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
        return policy.predict(x, torch.tensor(700.0), policy.encode(prompts_of("red cat", "blue dog")))

    return of


def policy_of(folder: Path, **changes: Any) -> Any:
    return policy_from_pipeline(load_pipeline(folder), replace(SETTINGS, **changes))


def trained_run(folder: Path, move: Any, out: Path) -> Any:
    """The policy of a finished run's folder."""
    policy = policy_of(folder)
    move(policy, 0.2)
    policy.save(out / "lora")
    (out / "config.json").write_text(config_to_json(Config(model=replace(SETTINGS, path=str(folder)))))
    (out / "summary.json").write_text("{}")
    return policy


def same(actual: Tensor, expected: Tensor, rounding: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=10 * rounding, atol=rounding * expected.abs().max().item())


@pytest.fixture
def layers() -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(8, 6).requires_grad_(False), nn.Linear(8, 2, bias=False), nn.Linear(2, 6, bias=False)


@pytest.mark.parametrize("stored", ["float32", "int8"])
def test_output_and_gradients_are_those_of_the_scaled_weight(layers, stored):
    base, first, second = layers
    base = Int8Linear(base) if stored == "int8" else base
    magnitude, scale = Magnitude(base), 1.5
    with torch.no_grad():
        magnitude.weight.mul_(torch.linspace(0.5, 2, 6))
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
    plain = base(x)
    adapted = plain + magnitude(x, lora_A=first, lora_B=second, scaling=scale, base_layer=base, base_result=plain)

    wide = base.weight.double() * base.scale.double() if stored == "int8" else base.weight.double()
    a, b, m = (p.detach().double().requires_grad_() for p in (first.weight, second.weight, magnitude.weight))
    changed = wide + scale * b @ a
    lengths = changed.square().sum(1).sqrt().detach()
    bias: Any = base.bias
    expected = x.double() @ (changed * (m / lengths)[:, None]).T + bias.double()
    same(adapted.double(), expected, 1e-6)
    towards = torch.randn(adapted.shape, generator=torch.Generator().manual_seed(2))
    (adapted * towards).sum().backward()
    (expected * towards).sum().backward()
    for parameter, own in ((first.weight, a), (second.weight, b), (magnitude.weight, m)):
        assert parameter.grad is not None and own.grad is not None
        same(parameter.grad.double(), own.grad, 1e-6)


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"quantize": "int8"}], ids=str)
@pytest.mark.parametrize("model", ["tiny_sd3", "tiny_sd"])
def test_before_training_it_is_the_base_bit_for_bit_and_so_is_its_reference(request, model, changes, output, move):
    folder = request.getfixturevalue(model)
    base = output(policy_of(folder, lora_use_dora=False, **changes))
    policy = policy_of(folder, **changes)
    assert {name.split(".lora_")[1] for name in policy.trainable} == {
        "A.default.weight",
        "B.default.weight",
        "magnitude_vector.default.weight",
    }
    assert {p.dtype for p in policy.trainable.values()} == {torch.float32}
    assert torch.equal(output(policy), base)
    move(policy, 0.1)
    assert not torch.equal(output(policy), base)
    with policy.weights("reference"):
        assert torch.equal(output(policy), base)


@pytest.mark.parametrize("model", ["tiny_sd3", "tiny_sd", "tiny_wan"])
def test_what_is_saved_is_the_same_for_every_reader(request, model, output, move, tmp_path):
    folder, changes = request.getfixturevalue(model), {"frames": 3 if model == "tiny_wan" else None}
    policy = policy_of(folder, lora_rank_pattern=Values({"to_v": 3}), **changes)
    move(policy, 0.2)
    policy.save(tmp_path)
    expected = output(policy)
    other = {"lora_rank": 5, "lora_use_dora": False, **changes}
    again = policy_of(folder, lora=str(tmp_path), **other)  # as sample and a further run do
    assert {name: p.shape for name, p in again.trainable.items()} == {n: p.shape for n, p in policy.trainable.items()}
    same(output(again), expected)
    lean = policy_of(folder, lora=str(tmp_path), quantize="int8", **other)
    assert 0 < (output(lean) - expected).norm() < 0.1 * expected.norm()
    pipeline = load_pipeline(folder)
    for source in (tmp_path, load_file(tmp_path / FILE)):  # by the settings in its header, and by the tensors alone
        pipeline.load_lora_weights(source, **({"local_files_only": True} if source is tmp_path else {}))
        policy.family.denoiser = getattr(pipeline, policy.denoiser_name)
        same(output(policy), expected)
        pipeline.unload_lora_weights()


def test_pefts_own_folders_are_read(tiny_sd3, output, tmp_path):
    policy = policy_of(tiny_sd3)
    network = load_pipeline(tiny_sd3).transformer
    theirs = get_peft_model(network, LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], use_dora=True))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))), alpha=0.2)
    theirs.save_pretrained(tmp_path / "lora")
    policy.family.denoiser = network
    same(output(load_policy(replace(SETTINGS, path=str(tiny_sd3)), trained=tmp_path / "lora")), output(policy))


def test_a_damaged_one_and_other_kinds_are_refused(tiny_sd3, move, tmp_path):
    policy = policy_of(tiny_sd3)
    policy.save(tmp_path)
    own = load_file(tmp_path / FILE)
    name = next(name for name in own if name.endswith("lora_magnitude_vector"))
    rest = {key: tensor for key, tensor in own.items() if key != name}
    cases = {
        f"it is a DoRA whose {name.partition('.lora_')[0]} has no lora_magnitude_vector": rest,
        "it is a DoRA of convolutions": {**rest, name: own[name][None, :, None, None]},
        "it is not a plain LoRA, since it holds transformer.a.lora_magn": {
            **own,
            "transformer.a.lora_magnitude_vector": own[name],
        },
        "it is a DoRA in kohya's format, of which diffusers drops": {**own, "transformer.a.dora_scale": own[name]},
    }
    for sentence, tensors in cases.items():
        save_file({key: t.clone() for key, t in tensors.items()}, tmp_path / "changed.safetensors")
        with pytest.raises(ValueError, match=rf"^cannot use the LoRA .*: {sentence}"):
            policy_of(tiny_sd3, lora=str(tmp_path / "changed.safetensors"))


def test_a_row_without_a_direction_is_named(tiny_sd3):
    pipeline = load_pipeline(tiny_sd3)
    with torch.no_grad():
        pipeline.transformer.transformer_blocks[0].attn.to_k.weight[2] = 0
    with pytest.raises(ValueError, match=r"model.lora_use_dora: transformer_blocks.0.attn.to_k has a row of zeros, wh"):
        policy_from_pipeline(pipeline, SETTINGS)


def test_the_studio_shows_the_base_at_strength_0_and_the_trained_model_at_1(tiny_sd3, output, move, tmp_path):
    policy = trained_run(tiny_sd3, move, tmp_path / "run")
    model: Any = TunedModel(tmp_path / "run")
    same(output(model.show(RESULT, 1.0)), output(policy))
    same(output(model.show(RESULT, 0.0)), output(policy_of(tiny_sd3, lora_use_dora=False)), 1e-6)


def test_a_plan_counts_its_parameters(tiny_sd3):
    trained = policy_of(tiny_sd3).trainable
    assert sum("magnitude" in name for name in trained) == len(trained) // 3
    assert sizes(replace(SETTINGS, path=str(tiny_sd3)), 1, 1, 1).trained == sum(p.numel() for p in trained.values())


def test_a_merged_model_has_it_and_tools_that_scale_otherwise_are_refused(tiny_sd3, output, move, tmp_path, capsys):
    policy = trained_run(tiny_sd3, move, tmp_path / "run")
    out = tmp_path / "merged"
    assert main(["export", str(tmp_path / "run"), "--format", "merged", "--out", str(out)]) == 0
    expected = output(policy)
    policy.family.denoiser = DiffusionPipeline.from_pretrained(out).transformer
    same(output(policy), expected)
    for form in ("kohya", "comfyui"):
        assert main(["export", str(tmp_path / "run"), "--format", form, "--out", f"{out}.safetensors"]) == 2
        assert capsys.readouterr().err.endswith(
            f"the run trained a DoRA, and not all readers of {form} files scale its rows by the trained lengths; its"
            " formats are diffusers and merged\n"
        )


# --- ranks and alphas of single layers --------------------------------------------------------------------------------


def test_ranks_and_alphas_are_those_of_the_first_ending_that_a_layer_has(tiny_sd3, output, move, tmp_path):
    ranks, alphas = Values({"0.attn.to_v": 5, "to_v": 3}), Values({"attn.to_*": 9})
    patterns: Any = {"lora_rank_pattern": ranks, "lora_alpha_pattern": alphas, "lora_use_dora": False}
    policy = policy_of(tiny_sd3, **patterns)
    for block, rank in enumerate((5, 3)):
        for name, own, alpha in (("attn.to_v", rank, 9), ("attn.to_q", 2, 9), ("ff.net.2", 2, 6)):
            layer = policy.denoiser.get_submodule(f"transformer_blocks.{block}.{name}")
            assert (layer.r["default"], layer.scaling["default"]) == (own, alpha / own)
    move(policy, 0.2)
    policy.save(tmp_path)
    again = policy_of(tiny_sd3, lora=str(tmp_path))
    assert all(torch.allclose(p, policy.trainable[name]) for name, p in again.trainable.items())
    same(output(again), output(policy))
    pipeline = load_pipeline(tiny_sd3)
    pipeline.load_lora_weights(tmp_path, local_files_only=True)
    expected = output(policy)
    policy.family.denoiser = pipeline.transformer
    same(output(policy), expected)


def test_patterns_that_fit_nothing_are_refused(tiny_sd3):
    with pytest.raises(
        ValueError, match=r"^model.lora_alpha_pattern: no adapted layer's name ends in 'to_x'; use such"
    ):
        policy_of(tiny_sd3, lora_alpha_pattern=Values({"to_x": 3}))
    for value in (0, 1.5, True, "4", 5000):
        with pytest.raises(
            ValueError, match=r"^lora_rank_pattern must be an object of whole numbers between 1 and 4,096"
        ):
            check_rules(replace(SETTINGS, lora_rank_pattern=Values({"to_v": value})))
    assert json.loads(config_to_json(Config(model=replace(SETTINGS, lora_rank_pattern=Values({"to_v": 4})))))["model"][
        "lora_rank_pattern"
    ] == {"to_v": 4}
