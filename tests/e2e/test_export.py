"""`progrpo export`: whoever reads what it writes, by the rule that the reader publishes, gets the trained model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
)
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from progrpo.cli import main
from progrpo.config import EvalSettings, config_to_json
from progrpo.policies.architectures import ARCHITECTURES
from progrpo.policies.export import saved_lora
from progrpo.policies.load import FAMILIES, policy_from_pipeline
from progrpo.policies.settings import ModelSettings
from progrpo.publish.layouts import FORMATS, LAYOUTS, formats_of
from progrpo.publish.lora import laid_out, without_place
from progrpo.registry import load_named
from progrpo.rollout.denoise import Denoiser, denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.training.trained_model import ode_by
from tests.support import readers
from tests.support.pipelines import frames_of
from tests.support.runs import load_pipeline

FILE = "pytorch_lora_weights.safetensors"
MODELS = (
    "tiny_sd",
    "tiny_sdxl",
    "tiny_sd3",
    "tiny_flux",
    "tiny_kontext",
    "tiny_flux2_klein",
    "tiny_qwen_image",
    "tiny_wan",
)
READS_DIFFUSERS = ("tiny_sd3", "tiny_flux", "tiny_flux2_klein", "tiny_qwen_image")
"""The models for which ComfyUI reads diffusers' names."""
CONVERTED = ("tiny_sd", "tiny_sdxl", "tiny_flux2_klein", "tiny_qwen_image", "tiny_wan")
"""The models whose kohya files diffusers converts: no SD3's, and FLUX.1's in its true size alone."""
RULES = {"kohya": readers.kohya, "comfyui": readers.comfyui}


def settings_of(folder: Path, **more: Any) -> ModelSettings:
    own = {"lora_rank": 2, "lora_alpha": 5, "max_sequence_length": 8, "resolution": 16, "frames": frames_of(folder)}
    return ModelSettings(path=str(folder), **(own | more))


@torch.no_grad()
def pictures(policy: Any, prompts: list[Any]) -> tuple[Tensor, Tensor]:
    """The latents and pictures of a deterministic sampling of three steps."""
    key = NoiseKey(3, 0)
    sampling = ode_by(policy, EvalSettings(num_inference_steps=3))
    start = expand(policy, torch.arange(len(prompts)), 1, sampling, key)
    final = denoise(Denoiser(policy, policy.encode(prompts), sampling), start, key, Meter()).x_NCHW
    return final, policy.decode(final).images_NHWC


def same_pictures(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)
    assert (actual[1].int() - expected[1].int()).abs().max() <= 1


@cache
def model_of(folder: Path) -> Any:
    """The model of a folder without any LoRA, for readers to change."""
    settings = settings_of(folder, weights="full")
    return policy_from_pipeline(load_pipeline(folder), settings)


@contextmanager
def changed(folder: Path) -> Iterator[Any]:
    """That model for a block that changes its denoiser."""
    policy = model_of(folder)
    before = {name: tensor.clone() for name, tensor in policy.denoiser.state_dict().items()}
    yield policy
    policy.denoiser.load_state_dict(before)


def as_read(form: str, file: Path, folder: Path, prompts: list[Any]) -> tuple[Tensor, Tensor]:
    """The pictures of a folder's model in a tool that reads a file in a format."""
    with changed(folder) as policy:
        readers.apply(RULES[form], load_file(file), type(policy.pipeline).__name__, policy.denoiser)
        return pictures(policy, prompts)


def as_diffusers_reads(file: Path, folder: Path, prompts: list[Any]) -> tuple[Tensor, Tensor]:
    with changed(folder) as policy:
        pipeline = load_pipeline(folder)
        pipeline.load_lora_weights(str(file))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        policy.denoiser.load_state_dict(getattr(pipeline, policy.denoiser_name).state_dict())
        return pictures(policy, prompts)


def merged_pictures(out: Path, folder: Path, prompts: list[Any]) -> tuple[Tensor, Tensor]:
    with changed(folder) as policy:
        denoiser = type(policy.denoiser).from_pretrained(out / policy.denoiser_name, use_safetensors=True)
        policy.denoiser.load_state_dict(denoiser.state_dict())
        return pictures(policy, prompts)


@pytest.fixture
def prompts(prompts_of: Any) -> Any:
    return prompts_of("red cat", "blue dog")


@pytest.fixture
def run(tiny_config: Any, move: Any, tmp_path: Path) -> Callable[..., Any]:
    """A run folder in tmp_path/run, as one that has ended leaves it, and its policy, whose weights have moved."""

    def make(settings: ModelSettings, far: float = 0.2) -> Any:
        policy: Any = policy_from_pipeline(load_pipeline(Path(settings.path)), settings)
        move(policy, far)
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "config.json").write_text(config_to_json(tiny_config(model=settings)))
        (folder / "summary.json").write_text("{}")
        policy.save(folder / ("lora" if settings.weights == "lora" else policy.denoiser_name))
        return policy

    return make


def export(folder: Path, form: str, *more: str) -> Path:
    out = folder / (form if form == "merged" else f"{form}.safetensors")
    assert main(["export", str(folder / "run"), "--format", form, "--out", str(out), *more]) == 0
    return out


@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=pytest.mark.slow) if m == "tiny_kontext" else m for m in MODELS]
)
def test_every_reader_makes_the_trained_pictures(request, model, run, prompts, tmp_path):
    folder = request.getfixturevalue(model)
    expected = pictures(run(settings_of(folder)), prompts)
    assert (pictures(model_of(folder), prompts)[0] - expected[0]).abs().max() > 0.01
    files: dict[str, Path] = {form: export(tmp_path, form) for form in FORMATS}
    for form in RULES:
        same_pictures(as_read(form, files[form], folder, prompts), expected)
    same_pictures(as_diffusers_reads(files["diffusers"], folder, prompts), expected)
    same_pictures(merged_pictures(files["merged"], folder, prompts), expected)
    if model in READS_DIFFUSERS:
        save_file(load_file(files["diffusers"]), tmp_path / "bare.safetensors")  # without settings, and without alphas
        same_pictures(as_read("comfyui", tmp_path / "bare.safetensors", folder, prompts), expected)
    if model in CONVERTED:
        same_pictures(as_diffusers_reads(files["kohya"], folder, prompts), expected)


# --- layers -----------------------------------------------------------------------------------------------------------


def all_layers(denoiser: nn.Module, draw: torch.Generator) -> dict[str, Any]:
    """A LoRA of every linear layer and convolution, of rank 1 or 2."""
    lora = {}
    for i, (name, module) in enumerate(denoiser.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            rows, *columns = module.weight.shape
            ones = (1,) * (len(columns) - 1)
            a, b = (1 + i % 2, *columns), (rows, 1 + i % 2, *ones)
            lora[name] = torch.randn(a, generator=draw), torch.randn(b, generator=draw)
    return lora


@pytest.mark.parametrize("form", RULES)
@pytest.mark.parametrize("model", MODELS)
def test_each_layer_that_a_reader_takes_is_read_at_its_strength(request, model, form):
    """Of all layers together and of some alone. The others have no place."""
    pipeline = load_pipeline(request.getfixturevalue(model))
    denoiser, name = getattr(pipeline, "unet", None) or pipeline.transformer, type(pipeline).__name__
    layout, lora = LAYOUTS[form][name], all_layers(denoiser, torch.Generator().manual_seed(5))
    modules = {"kohya": readers.kohyas_modules, "comfyui": readers.first_release}[form](name, denoiser)
    taken = {layer for module in modules.values() for layer in module.layers}
    assert set(without_place(lora, layout, denoiser.config)) == lora.keys() - taken
    assert len(taken) > 10 and lora.keys() - taken <= {"patch_embedding"} | (
        {layer for layer in lora if "blocks" not in layer and "mid_block" not in layer} if form == "kohya" else set()
    )
    base = {layer: denoiser.get_submodule(layer).weight.detach().clone() for layer in lora}
    alone = [layer for layer in sorted(taken) if re.search(r"0\.attn.*(to_k|add_v)|proj_mlp|norm|\.attn2\.to_q", layer)]
    for chosen in (taken, *({layer} for layer in alone)):
        readers.apply(
            RULES[form], laid_out({layer: lora[layer] for layer in chosen}, layout, denoiser.config), name, denoiser
        )
        for layer, before in base.items():
            weight = denoiser.get_submodule(layer).weight.data
            change = readers.product(*reversed(lora[layer])) if layer in chosen else torch.zeros(())
            torch.testing.assert_close(weight, before + change)
            weight.copy_(before)


def test_odd_layers_are_exported_and_those_without_a_place_refused(tiny_flux, run, prompts, tmp_path, capsys):
    targets = ("single_transformer_blocks.*.attn.to_v", "ff.net.2", "norm.linear", "norm_out.linear")
    settings = settings_of(tiny_flux, lora_targets=targets)
    expected = pictures(run(settings), prompts)
    same_pictures(as_read("comfyui", export(tmp_path, "comfyui"), tiny_flux, prompts), expected)
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--format", "kohya", "--out", str(tmp_path / "k.safetensors")]) == 2
    assert capsys.readouterr().err == (
        "progrpo: error: kohya files have no place for 1 of the 6 layers that the LoRA adapts, such as norm_out.linear;"
        " its formats are diffusers, comfyui, merged\n"
    )
    assert not (tmp_path / "k.safetensors").exists()


# --- strengths --------------------------------------------------------------------------------------------------------


def trained_changes(policy: Any) -> dict[str, Tensor]:
    """By how much the trained adapter changes each layer, as peft itself says."""
    modules = {name: m for name, m in policy.denoiser.named_modules() if isinstance(m, BaseTunerLayer)}
    return {name: module.get_delta_weight("default").detach() for name, module in modules.items()}


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_alphas_and_rslora_of_a_continued_lora_are_in_the_numbers(rslora, tiny_sd3, run, prompts, tmp_path):
    network = load_pipeline(tiny_sd3).transformer
    patterns: Any = {"rank_pattern": {"to_v": 3}, "alpha_pattern": {"to_v": 7}}
    config = LoraConfig(r=2, lora_alpha=9, target_modules=["to_q", "to_v"], use_rslora=rslora, **patterns)
    get_peft_model(network, config).save_pretrained(tmp_path / "theirs")
    settings = settings_of(tiny_sd3, lora=str(tmp_path / "theirs"))
    policy = run(settings)
    changes = trained_changes(policy)
    for name, (a, b) in saved_lora(tmp_path / "run" / "lora" / FILE).items():
        torch.testing.assert_close(readers.product(b, a), changes.pop(name))
    assert not changes
    expected = pictures(policy, prompts)
    for form in RULES:
        same_pictures(as_read(form, export(tmp_path, form), tiny_sd3, prompts), expected)


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_a_lora_continued_from_kohyas_file_returns_to_it(request, model, run, prompts, tmp_path):
    """Convolutions among its layers, and alphas that are no ranks."""
    folder = request.getfixturevalue(model)
    pipeline = load_pipeline(folder)
    layout = LAYOUTS["kohya"][type(pipeline).__name__]
    lora = all_layers(pipeline.unet, torch.Generator().manual_seed(1))
    chosen = {name: m for name, m in lora.items() if re.search(r"to_q|resnets.0.conv1|samplers", name)}
    theirs = laid_out(chosen, layout, pipeline.unet.config)
    theirs |= {name: torch.tensor(0.25) for name in theirs if name.endswith(".alpha")}
    save_file(theirs, tmp_path / "theirs.safetensors")
    settings = settings_of(folder, lora=str(tmp_path / "theirs.safetensors"))
    expected = pictures(run(settings, 0.1), prompts)
    for form in RULES:
        same_pictures(as_read(form, export(tmp_path, form), folder, prompts), expected)
    assert load_file(tmp_path / "kohya.safetensors").keys() == theirs.keys()
    same_pictures(merged_pictures(export(tmp_path, "merged"), folder, prompts), expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_strength_of_an_older_file_is_in_its_header(tmp_path, rslora):
    settings = {"r": 2, "lora_alpha": 6, "rank_pattern": {"b": 4}, "alpha_pattern": {"c": 1}, "use_rslora": rslora}
    ranks = {"a": 2, "b": 4, "c": 2}
    tensors = {f"unet.{n}.lora_A.weight": torch.ones(r, 3) for n, r in ranks.items()}
    tensors |= {f"unet.{n}.lora_B.weight": torch.ones(5, r) for n, r in ranks.items()}
    header = {f"unet.{name}": value for name, value in settings.items()}
    save_file(tensors, tmp_path / FILE, {"format": "pt", "lora_adapter_metadata": json.dumps(header)})
    root = (lambda r: r**0.5) if rslora else float
    strengths = {"a": 6 / root(2), "b": 6 / root(4), "c": 1 / root(2)}
    for name, (a, b) in saved_lora(tmp_path / FILE).items():
        torch.testing.assert_close(a, torch.ones(ranks[name], 3))
        torch.testing.assert_close(b, torch.full((5, ranks[name]), strengths[name]))


# --- other readers of the same files ----------------------------------------------------------------------------------


def kohya_of(pipeline: str, lora: dict[str, Any], config: Any) -> dict[str, Tensor]:
    return laid_out(lora, LAYOUTS["kohya"][pipeline], config)


def test_diffusers_reads_the_stacked_layers_of_flux_in_their_true_sizes():
    draw, width = torch.Generator().manual_seed(0), 3072
    heights = {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1, "proj_mlp": 4}
    lora = {
        f"single_transformer_blocks.3.{name}": (
            torch.randn(2, width, generator=draw),
            torch.randn(height * width, 2, generator=draw),
        )
        for name, height in heights.items()
    }
    file = kohya_of("FluxPipeline", lora, {})
    assert {name: tuple(t.shape) for name, t in file.items()} == {
        "lora_unet_single_blocks_3_linear1.alpha": (),
        "lora_unet_single_blocks_3_linear1.lora_down.weight": (8, width),
        "lora_unet_single_blocks_3_linear1.lora_up.weight": (7 * width, 8),
    }
    read = diffusers.FluxPipeline.lora_state_dict(file)
    for name, (a, b) in lora.items():
        torch.testing.assert_close(read[f"transformer.{name}.lora_A.weight"], a)
        torch.testing.assert_close(read[f"transformer.{name}.lora_B.weight"], b)


def a1111(name: str) -> str:
    """The module that A1111 changes by a tensor's name, with underscores: it knows diffusers' names of a U-Net.

    It takes three blocks of its own for each of diffusers', as Stable Diffusion has. Other names are its own.
    """
    inner = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1"}
    inner["conv_shortcut"] = "skip_connection"
    name = name.removeprefix("lora_unet_")
    if match := re.fullmatch(r"(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
        side, block, kind, number, rest = match.groups()
        n = 3 * int(block) + int(number)
        first = f"input_blocks_{1 + n}" if side == "down" else f"output_blocks_{n}"
        return f"{first}_{int(kind == 'attentions')}_{inner.get(rest, rest) if kind == 'resnets' else rest}"
    if match := re.fullmatch(r"mid_block_(attentions|resnets)_(\d+)_(.+)", name):
        kind, number, rest = match.groups()
        n = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block_{n}_{inner.get(rest, rest) if kind == 'resnets' else rest}"
    if match := re.fullmatch(r"down_blocks_(\d+)_downsamplers_0_conv", name):
        return f"input_blocks_{3 + 3 * int(match[1])}_0_op"
    if match := re.fullmatch(r"up_blocks_(\d+)_upsamplers_0_conv", name):
        return f"output_blocks_{2 + 3 * int(match[1])}_{1 + (int(match[1]) > 0)}_conv"
    return name


@pytest.mark.parametrize("model", ["CompVis/stable-diffusion-v1-4", "stabilityai/stable-diffusion-xl-base-1.0"])
def test_a1111_finds_every_layer_of_the_true_models(model):
    """In the U-Net of the first release, which for both has the names of Stability AI's."""
    architecture = ARCHITECTURES[model]
    _, kind, config = architecture.components["unet"]
    with torch.device("meta"):
        unet = getattr(diffusers, kind).from_config(config)
    theirs = readers.first_release("StableDiffusionXLPipeline", unet)  # the numbering is that of SD 1, too
    ours = {module.layers[0]: name.replace(".", "_") for name, module in theirs.items()}
    layout = LAYOUTS["kohya"][architecture.pipeline]
    places = {layer: layout.place(layer, unet.config) for layer in ours}
    names = {layer: a1111(layout.names(place.module)[0].partition(".")[0]) for layer, place in places.items() if place}
    assert len(names) > 200
    assert names == {layer: ours[layer] for layer in names}
    assert {layer for layer in places if layer not in names} <= {
        *("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"),
        *("add_embedding.linear_1", "add_embedding.linear_2"),
    }


@pytest.mark.parametrize("model", [name for name, a in ARCHITECTURES.items() if a.pipeline in FAMILIES])
def test_the_layers_that_are_adapted_if_nothing_is_asked_have_a_place(model):
    architecture = ARCHITECTURES[model]
    family = load_named(architecture.pipeline, FAMILIES, "the pipeline")
    _, kind, config = architecture.components[family.denoiser_name]
    with torch.device("meta"):
        denoiser = getattr(diffusers, kind).from_config(config)
    linears = [f".{name}" for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    layers = [name[1:] for name in linears if any(fnmatchcase(name, f"*.{target}") for target in family.lora_targets)]
    assert len(layers) > 50
    for form in RULES:
        layout = LAYOUTS[form][architecture.pipeline]
        assert [layer for layer in layers if layout.place(layer, denoiser.config) is None] == []


# --- the tables of the readers that this suite has of their models ----------------------------------------------------


@pytest.mark.parametrize(
    ("model", "convert"),
    [
        ("tiny_sd3", convert_sd3_transformer_checkpoint_to_diffusers),
        ("tiny_flux2_klein", convert_flux2_transformer_checkpoint_to_diffusers),
        ("tiny_wan", convert_wan_transformer_to_diffusers),
    ],
)
def test_the_suites_names_of_first_releases_are_those_that_diffusers_converts(request, model, convert):
    pipeline = load_pipeline(request.getfixturevalue(model))
    state = pipeline.transformer.state_dict()
    checkpoint = {}
    for name, module in readers.first_release(type(pipeline).__name__, pipeline.transformer).items():
        for end in ("weight", "bias"):
            parts = [state[f"{layer}.{end}"] for layer in module.layers if f"{layer}.{end}" in state]
            if parts:
                whole = torch.cat(parts)
                checkpoint[f"{name}.{end}"] = torch.cat(whole.chunk(2)[::-1]) if module.swapped else whole
    expected = {
        f"{layer}.weight"
        for m in readers.first_release(type(pipeline).__name__, pipeline.transformer).values()
        for layer in m.layers
    }
    if model == "tiny_sd3":
        norms = {
            f"joint_blocks.{i}.{s}_block.attn.ln_{x}.weight": torch.ones(1)
            for i in (0, 1)
            for s in ("x", "context")
            for x in "qk"
        }
        checkpoint |= {**norms, "pos_embed": torch.ones(1)}
    converted = convert(checkpoint)
    for name in expected:
        torch.testing.assert_close(converted[name], state[name])


# --- the whole model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_flux"])
def test_all_weights_are_exported_as_a_whole_model_alone(request, model, run, prompts, tmp_path, capsys):
    folder = request.getfixturevalue(model)
    settings = settings_of(folder, weights="full")
    policy = run(settings, 0.02)
    merged = DiffusionPipeline.from_pretrained(export(tmp_path, "merged"), use_safetensors=True)
    same_pictures(pictures(policy_from_pipeline(merged, settings), prompts), pictures(policy, prompts))
    capsys.readouterr()  # the bars of diffusers
    for form in ("diffusers", *RULES):
        out = tmp_path / "x.safetensors"
        assert main(["export", str(tmp_path / "run"), "--format", form, "--out", str(out)]) == 2
        assert capsys.readouterr().err == (
            f"progrpo: error: the run trained all weights of the {policy.denoiser_name}, and no LoRA; --format merged"
            " writes the whole model\n"
        )


def test_a_merged_model_keeps_the_dtypes_of_its_files_but_that_of_its_denoiser(tiny_sd3, run, tmp_path):
    pipeline = load_pipeline(tiny_sd3)
    pipeline.text_encoder_2.half()
    pipeline.transformer.bfloat16()
    pipeline.vae.bfloat16()
    pipeline.save_pretrained(tmp_path / "base")
    run(settings_of(tmp_path / "base"))
    out = export(tmp_path, "merged")

    def dtypes(folder: Path) -> dict[str, set[torch.dtype]]:
        files = folder.glob("*/*.safetensors")
        return {file.parent.name: {t.dtype for t in load_file(file).values()} for file in files}

    assert dtypes(out) == dtypes(tmp_path / "base") | {"transformer": {torch.float32}}
    assert (
        main(["export", str(tmp_path / "run"), "--format", "merged", "--dtype", "bfloat16", "--out", f"{out}-16"]) == 0
    )
    assert dtypes(Path(f"{out}-16")) == dtypes(tmp_path / "base")


# --- through the command line -----------------------------------------------------------------------------------------


def test_a_trained_run_is_exported_and_a_merged_one_draws_its_pictures(on_a_tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "smoke", *on_a_tiny_model, "--iterations", "1", "--out", "mine"]) == 0
    capsys.readouterr()
    for form in FORMATS:
        assert main(["export", "mine", "--format", form]) == 0
        end = "" if form == "merged" else ".safetensors"
        assert capsys.readouterr().out == f"exports/mine-{form}{end}\n"
    assert main(["export", "mine", "--format", "kohya"]) == 0
    assert capsys.readouterr().out == "exports/mine-kohya-2.safetensors\n"
    assert (tmp_path / "exports/mine-kohya.safetensors").read_bytes() == (
        tmp_path / "exports/mine-kohya-2.safetensors"
    ).read_bytes()
    for model in ("mine", "exports/mine-merged"):
        steps = ["--num-inference-steps", "3", "--guidance-scale", "1", "--seed", "5"]
        assert main(["sample", model, "--prompt", "red cat", "--out", f"drawn/{model}", *steps]) == 0
    drawn = [np.asarray(Image.open(file), int) for file in sorted(tmp_path.glob("drawn/**/*.png"))]
    assert len(drawn) == 2 and np.abs(drawn[0] - drawn[1]).max() <= 1


def test_what_cannot_be_exported_is_said_in_a_sentence(tiny_sd3, run, tmp_path, capsys):
    run(settings_of(tiny_sd3))

    def refusal(*args: str) -> str:
        assert main(["export", *args]) == 2
        return capsys.readouterr().err.removeprefix("progrpo: error: ").rstrip("\n")

    own, out = str(tmp_path / "run"), str(tmp_path / "a.safetensors")
    assert refusal(own, "--format", "kohya", "--model", "shapes-flow", "--out", out) == (
        "no tool reads kohya files of shapes-flow; its formats are diffusers and merged"
    )
    assert "must end in .safetensors, by which tools know a LoRA's file" in refusal(
        own, "--format", "kohya", "--out", str(tmp_path)
    )
    (tmp_path / "a.safetensors").write_text("mine")
    assert "a.safetensors is already there; give another name" in refusal(own, "--format", "comfyui", "--out", out)
    assert (tmp_path / "a.safetensors").read_text() == "mine"
    assert refusal(own, "--format", "kohya", "--dtype", "float16") == (
        "--dtype is an option of --format merged; a LoRA is written in float32"
    )
    assert "is no run folder (it holds no config.json); did you mean" in refusal(own[:-1], "--format", "kohya")
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["model"]["path"] = "a StableDiffusion3Pipeline given to progrpo.train"
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert "which no name loads; name the model it was: --model MODEL" in refusal(own, "--format", "kohya")
    assert export(tmp_path, "kohya", "--model", str(tiny_sd3)).is_file()
    (tmp_path / "run" / "lora" / FILE).unlink()
    assert "trained weights: cannot load" in refusal(own, "--format", "diffusers")
    (tmp_path / "run" / "lora").rmdir()
    assert "has saved no trained weights yet; they are written when the run ends" in refusal(own, "--format", "kohya")


def linears_with_place(model: Path, form: str) -> str:
    pipeline = load_pipeline(model)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    lora = {
        name: matrices for name, matrices in all_layers(denoiser, torch.Generator()).items() if matrices[0].ndim == 2
    }
    return "blocks" if without_place(lora, LAYOUTS[form][type(pipeline).__name__], denoiser.config) else "all"


def test_the_table_of_formats_is_what_the_code_does(request):
    page = (Path(__file__).parents[2] / "docs" / "publish.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| `(\w+Pipeline)`(?:, `(\w+Pipeline)`)? \|(.+)\|$", page, re.MULTILINE)
    stated = {pipeline: cells.split("|") for *pair, cells in rows for pipeline in pair if pipeline}
    assert stated.keys() == FAMILIES.keys()
    for model in MODELS:
        folder = request.getfixturevalue(model)
        pipeline = type(load_pipeline(folder)).__name__
        assert formats_of(pipeline) == FORMATS
        expected = ["all", *(linears_with_place(folder, form) for form in RULES), "all"]
        assert [re.split(r"\W", cell.strip())[0] for cell in stated[pipeline]] == expected, pipeline
