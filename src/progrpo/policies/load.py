"""Loading: a policy from a built-in model's name, a folder or a hub id."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import nn
from torch.utils.benchmark import Timer
from transformers.utils import logging as transformers_logging

from progrpo.messages import named
from progrpo.policies.base import PolicyContext, torch_dtype
from progrpo.policies.family import ModelFamily
from progrpo.policies.hub import reason_of
from progrpo.policies.learnt.family import denoiser_of, is_diffusion, recorded_kind
from progrpo.policies.lora_files import HUB_ID, LORA_FILE, is_lora
from progrpo.policies.networks import fetch, load_network, load_networks
from progrpo.policies.pipeline import PipelinePolicy
from progrpo.policies.prepare import prepare
from progrpo.policies.settings import ModelSettings
from progrpo.policies.single_file import check_single_file, load_single_file, networks_inside
from progrpo.registry import load_named
from progrpo.zoo import WEIGHTS

BUILT_IN = {"shapes-flow": "shapes", "shapes-diffusion": "shapes", "words-flow": "words"}
"""The built-in models, and the world that each was made for."""
_BUILT_IN_TOKENS = 16  # which all of their texts fit into, and which they were made for
FAMILIES: dict[str, str] = {
    "Flux2KleinPipeline": "progrpo.policies.flux2:Flux2Klein",
    "FluxKontextPipeline": "progrpo.policies.flux:FluxKontext",
    "FluxPipeline": "progrpo.policies.flux:Flux",
    "QwenImagePipeline": "progrpo.policies.qwen_image:QwenImage",
    "StableDiffusion3Pipeline": "progrpo.policies.sd3:SD3",
    "StableDiffusionPipeline": "progrpo.policies.stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "progrpo.policies.stable_diffusion:StableDiffusionXL",
    "WanPipeline": "progrpo.policies.wan:Wan",
}
"""The model families by the name of diffusers' pipeline. One is imported when a model needs it."""


def quiet() -> None:
    """Turn off the progress bars and messages of the libraries below."""
    diffusers_logging.disable_progress_bar()
    # it logs what it then raises, which becomes a sentence of ours
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", ".*local_dir_use_symlinks.*")  # of how diffusers calls the hub's library


_CLEARLY_FASTER = 1.2  # less would let chance choose between two runs of one command


def fastest_dtype(device: torch.device) -> Literal["float32", "bfloat16"]:
    """Choose bfloat16 where the device multiplies matrices clearly faster in it, else float32.

    Processors without instructions for bfloat16 emulate it. Both are timed in turn, and the best of each counts: other
    work on the processors must not decide.
    """
    timers = [_product(device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    rounds = [[timer.timeit(1).mean for timer in timers] for _ in range(6)]
    float32, bfloat16 = (min(seconds) for seconds in zip(*rounds, strict=True))
    return "bfloat16" if bfloat16 * _CLEARLY_FASTER < float32 else "float32"


def _product(device: torch.device, dtype: torch.dtype) -> Timer:
    a = torch.randn(1024, 1024, device=device, dtype=dtype)
    return Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())


def load_policy(
    settings: ModelSettings, context: PolicyContext | None = None, trained: str | Path | None = None
) -> PipelinePolicy:
    """The policy of the model at `settings.path`.

    `trained` is a denoiser's folder, which takes the place of the model's, or a LoRA, which is added like
    `settings.lora`. Only safetensors are read, and no code of the folder is run. ValueError where there is nothing to
    load, and for a pipeline that cannot be trained here.
    """
    settings = with_own_length(settings)
    source = locate(settings.path, settings.revision)
    kind = family_of(source, settings.revision)
    pipeline = read_pipeline(source, kind, settings, _dtypes(kind, settings))
    if trained is not None and _is_denoiser(trained):
        apply_trained(pipeline, kind.denoiser_name, Path(trained))
    elif trained is not None:
        settings = replace(settings, weights="lora", lora=str(trained))
    return policy_from_pipeline(pipeline, settings, context)


def policy_from_pipeline(
    pipeline: DiffusionPipeline, settings: ModelSettings, context: PolicyContext | None = None
) -> PipelinePolicy:
    """The policy of a loaded pipeline, which it takes over. ValueError for a pipeline that cannot be trained here."""
    if not isinstance(pipeline, DiffusionPipeline):
        raise ValueError(
            f"the pipeline is a {named(type(pipeline).__name__)}; give one of diffusers, such as"
            " StableDiffusion3Pipeline.from_pretrained(...)"
        )
    kind = family_of_pipeline(pipeline)
    return PipelinePolicy(prepare(kind, pipeline, settings, context or PolicyContext()))


def family_of_pipeline(pipeline: DiffusionPipeline) -> type[ModelFamily]:
    """The family of a loaded pipeline. ValueError for a pipeline that is not trained here."""
    return _family(type(pipeline).__name__, "the pipeline", pipeline.components, is_diffusion(pipeline))


def _is_denoiser(folder: str | Path) -> bool:
    is_lora, has_config = (os.path.isfile(os.path.join(folder, name)) for name in (LORA_FILE, "config.json"))
    return has_config and not is_lora


def apply_trained(pipeline: DiffusionPipeline, denoiser_name: str, folder: Path) -> None:
    """Put the denoiser of a folder in the place of the pipeline's. ValueError where it is of another class."""
    base = getattr(pipeline, denoiser_name)
    with reported_errors(folder, "trained weights"):
        kind = type(base).load_config(folder).get("_class_name")
        if kind != type(base).__name__:
            raise ValueError(f"they are of a {kind}, and this model has a {type(base).__name__}")
        trained = load_network(type(base), folder, dtype=base.dtype)
    setattr(pipeline, denoiser_name, trained)


def with_own_length(settings: ModelSettings) -> ModelSettings:
    """The settings with the number of tokens that a built-in model was made for, where they leave it open."""
    if settings.path in BUILT_IN and settings.max_sequence_length is None:
        return replace(settings, max_sequence_length=_BUILT_IN_TOKENS)
    return settings


def locate(path: str | Path, revision: str = "") -> str:
    """The folder or hub id of a model. ValueError for what is neither, and for a revision of a folder."""
    source = _located(path)
    if revision and os.path.isdir(source):
        raise ValueError(
            f"model.revision: {named(path)} is no hub id, and has no revision {named(revision)}; leave it empty, or"
            " give a hub id"
        )
    return source


def _located(path: str | Path) -> str:
    if str(path) in BUILT_IN:
        return _built_in(str(path))
    folder = os.path.expanduser(path)  # as os.path.isdir, and unlike Path's, it takes every text
    if path and is_lora(folder):
        raise ValueError(
            f"model.path: {named(path)} is a LoRA; give the model that it belongs to, and the LoRA as model.lora"
            " (--lora of sample and eval)"
        )
    if path and os.path.isdir(folder):
        if not os.path.isfile(os.path.join(folder, "model_index.json")):
            raise ValueError(
                f"model.path: {named(folder)} has no model_index.json; give a folder written by save_pretrained"
            )
        return folder
    if os.path.isfile(folder) or folder.endswith(_SINGLE_FILES):
        raise ValueError(
            f"model.path: {named(path)} is a single file; give it as model.single_file, and as model.path the model"
            " that it was made from, such as stabilityai/stable-diffusion-xl-base-1.0"
        )
    if HUB_ID.fullmatch(str(path)):
        return str(path)
    raise ValueError(
        f"model.path: {named(path) or 'an empty text'} is neither a built-in model ({', '.join(BUILT_IN)}), a folder"
        " nor a hub id"
    )


_SINGLE_FILES = (".safetensors", ".ckpt", ".gguf", ".pt", ".pth", ".bin")


def _built_in(name: str) -> str:
    folder = WEIGHTS / name
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"model.path: the weights of the built-in {name!r} are not in this installation ({folder});"
            f" progrpo pretrain {name} --export makes them"
        )
    return str(folder)


def family_of(source: str, revision: str = "") -> type[ModelFamily]:
    """The family of a model, by its pipeline's index alone. ValueError for a pipeline that is not trained here."""
    with reported_errors(source):
        index = dict(DiffusionPipeline.load_config(source, revision=revision or None))
    kind = _family(str(index.get("_class_name")), source, index)
    kind.check_index(index)
    return kind


def _family(
    pipeline_name: str, source: str, components: Mapping[str, object], diffusion: bool = False
) -> type[ModelFamily]:
    """The family of a class of pipelines; one that has none is learnt from its own call."""
    if pipeline_name in FAMILIES:
        family: type[ModelFamily] = load_named(pipeline_name, FAMILIES, "the pipeline")
        return family
    denoiser_name = denoiser_of(components) if "scheduler" in components else None
    recorded = recorded_kind(pipeline_name, denoiser_name, diffusion) if denoiser_name else None
    if recorded is None:
        raise ValueError(
            f"model.path: {named(source)} is a {named(pipeline_name)}; progrpo trains {', '.join(FAMILIES)}, and"
            " others of diffusers that make pictures or videos of a text by one transformer or U-Net"
        )
    return recorded


def _dtypes(kind: type[ModelFamily], settings: ModelSettings) -> dict[str, torch.dtype]:
    """The settings' dtype, but float32 for a denoiser that is trained in full: no precision is lost."""
    dtype = torch_dtype(settings)
    denoiser = torch.float32 if settings.weights == "full" else dtype
    return {kind.denoiser_name: denoiser, "vae": kind.vae_dtype or dtype, "default": dtype}


def read_pipeline(
    source: str, kind: type[ModelFamily], settings: ModelSettings, dtypes: dict[str, torch.dtype]
) -> DiffusionPipeline:
    """Load a pipeline, each network in its dtype of `dtypes` or in `default`."""
    file = check_single_file(settings.single_file) if settings.single_file else ""
    with reported_errors(source):
        folder = fetch(source, settings.revision, settings.variant, kind.omitted_components)
        _require_objects(folder)
        index = {
            name: entry
            for name, entry in DiffusionPipeline.load_config(folder).items()
            if name not in kind.omitted_components
        }
        absent = {**dict.fromkeys(_absent_encoders(index)), **kind.omitted_components}
        inside = networks_inside(file, index, kind.denoiser_name) if file else set()
        others = {name: entry for name, entry in index.items() if name not in inside}
        networks = load_networks(folder, others, dtypes, settings.variant)
    if file:
        with reported_errors(file, "model.single_file"):
            networks |= load_single_file(file, folder, inside, {**networks, **absent}, dtypes)
    with reported_errors(source):
        # with the dtypes as well, without which it casts what it is given
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtypes, use_safetensors=True, **networks, **absent)
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module) and name not in networks:
                raise ValueError(f"its {name} is of no class that diffusers or transformers has")
            if name.startswith("tokenizer") and component is not None:
                _require_vocabulary(folder / name)
    return pipeline


def _require_objects(folder: Path) -> None:
    """ValueError for a configuration file that is no JSON object, which the libraries take for a hub's name."""
    for file in folder.glob("*/*config.json"):
        if not isinstance(json.loads(file.read_bytes()), dict):
            raise ValueError(f"{file} holds no object of named settings")


def _absent_encoders(index: Mapping[str, object]) -> set[str]:
    """The text encoders that the pipeline was saved without, and their tokenizers: diffusers needs their names."""
    absent = {name for name, entry in index.items() if entry == [None, None]}
    encoders = {name for name in absent if name.startswith("text_encoder")}
    return encoders | {name for name in absent if name.replace("tokenizer", "text_encoder") in encoders}


_VOCABULARIES = {"tokenizer.json", "vocab.json", "spiece.model"}


def _require_vocabulary(folder: Path) -> None:
    """ValueError for a tokenizer without a vocabulary, for which transformers silently makes an empty one."""
    if not _VOCABULARIES & {file.name for file in folder.glob("*")}:
        raise ValueError(f"{folder} holds none of {', '.join(sorted(_VOCABULARIES))}")


@contextmanager
def reported_errors(source: str | Path, what: str = "model.path") -> Iterator[None]:
    """Turn what the libraries below raise at a damaged file into a ValueError of one sentence."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds: of JSON, of safetensors, of a class that gets another's settings
        place = "" if os.path.exists(source) else "; no folder has that name, and the Hugging Face hub was tried"
        raise ValueError(f"{what}: cannot load {named(source)}{place}: {reason_of(error, source)}") from error
