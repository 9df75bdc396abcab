"""From a name, a folder or a hub id to a policy."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from torch import nn
from torch.utils.benchmark import Timer
from transformers.utils import logging as transformers_logging

from progrpo.policies.base import Policy, PolicySettings
from progrpo.policies.flux import FluxKontextPolicy, FluxPolicy
from progrpo.policies.flux2 import Flux2KleinPolicy
from progrpo.policies.hub import reason_of
from progrpo.policies.lora import HUB_ID, LORA_FILE
from progrpo.policies.pipeline import PipelinePolicy
from progrpo.policies.qwen_image import QwenImagePolicy
from progrpo.policies.sd3 import SD3Policy
from progrpo.policies.stable_diffusion import StableDiffusionPolicy, StableDiffusionXLPolicy
from progrpo.policies.wan import WanPolicy
from progrpo.words import named
from progrpo.zoo import WEIGHTS

BUILT_IN = ("shapes-flow", "shapes-diffusion")
_BUILT_IN_TOKENS = 16  # which all of their texts fit into, and which they were made for
POLICIES: dict[str, type[PipelinePolicy]] = {
    "Flux2KleinPipeline": Flux2KleinPolicy,
    "FluxKontextPipeline": FluxKontextPolicy,
    "FluxPipeline": FluxPolicy,
    "QwenImagePipeline": QwenImagePolicy,
    "StableDiffusion3Pipeline": SD3Policy,
    "StableDiffusionPipeline": StableDiffusionPolicy,
    "StableDiffusionXLPipeline": StableDiffusionXLPolicy,
    "WanPipeline": WanPolicy,
}


def quiet() -> None:
    """No progress bars while parts are loaded, and no words from the libraries below; a command line's wish."""
    diffusers_logging.disable_progress_bar()
    # it logs what it then raises, which we say in a sentence
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", ".*local_dir_use_symlinks.*")  # of how diffusers calls the hub's library


def fastest_dtype(device: torch.device) -> Literal["float32", "bfloat16"]:
    """Which of the two the device multiplies matrices faster in; processors without instructions for bfloat16 emulate it."""
    seconds: dict[Literal["float32", "bfloat16"], float] = {}
    for name in ("float32", "bfloat16"):
        a = torch.randn(1024, 1024, device=device, dtype=getattr(torch, name))
        timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
        seconds[name] = timer.blocked_autorange(min_run_time=0.1).median
    return min(seconds, key=lambda name: seconds[name])


def load_policy(path: str | Path, settings: PolicySettings, trained: str | Path | None = None) -> Policy:
    """The policy for a built-in model's name, a folder in diffusers' format, or a hub id (`owner/name`).

    `trained` is a folder that a policy's `save` wrote: its LoRA is merged, or its denoiser takes the place of the model's.
    Reads safetensors only and runs no code from the folder. ValueError if there is nothing to load, or a pipeline
    class that no policy is written for.
    """
    settings = of_model(path, settings)
    source = locate(path)
    kind = supported(source)
    pipeline = _read_pipeline(source, kind, settings)
    if trained is not None:
        _apply_trained(pipeline, kind.denoiser_name, Path(trained))
    return policy_from_pipeline(pipeline, settings)


def policy_from_pipeline(pipeline: DiffusionPipeline, settings: PolicySettings) -> Policy:
    """The policy for a loaded pipeline, which it takes over; ValueError for a class that no policy is written for."""
    return _policy_class(type(pipeline).__name__, "the pipeline").from_pipeline(pipeline, settings)


def _apply_trained(pipeline: DiffusionPipeline, denoiser_name: str, folder: Path) -> None:
    if os.path.isfile(folder / LORA_FILE):  # Path's own raises at a name that is too long
        with sayable(folder, "trained weights"):
            _merge_lora(pipeline, folder)
    elif os.path.isfile(folder / "config.json"):
        base = getattr(pipeline, denoiser_name)
        with sayable(folder, "trained weights"):
            kind = type(base).load_config(folder).get("_class_name")
            if kind != type(base).__name__:
                raise ValueError(f"they are of a {kind}, and this model has a {type(base).__name__}")
            trained = type(base).from_pretrained(folder, use_safetensors=True, dtype=base.dtype)
            _require_whole(trained, folder)
        setattr(pipeline, denoiser_name, trained)
    else:
        raise ValueError(f"{named(folder)} holds no trained weights: neither {LORA_FILE} nor a denoiser's config.json")


def _merge_lora(pipeline: DiffusionPipeline, folder: Path) -> None:
    """ValueError for another model's, of which diffusers takes what fits, and be it nothing, in silence."""
    pipeline.load_lora_weights(folder)
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    taken = sum(p.numel() for part in parts for name, p in part.named_parameters() if "lora_" in name)
    if taken != (stored := _stored(folder / LORA_FILE)) or not stored:
        raise ValueError(
            f"its LoRA has {stored:,} weights, of which this model takes {taken:,}; it is of another model"
        )
    for name, weight in ((name, p) for part in parts for name, p in part.named_parameters() if "lora_" in name):
        if not weight.isfinite().all():
            raise ValueError(f"its {name} has numbers that are not finite, as of a training that diverged")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def of_model(path: str | Path, settings: PolicySettings) -> PolicySettings:
    """The settings with what a built-in model has of its own where they leave it open."""
    if str(path) in BUILT_IN and settings.max_sequence_length is None:
        return replace(settings, max_sequence_length=_BUILT_IN_TOKENS)
    return settings


def locate(path: str | Path) -> str:
    """A folder that has a pipeline in it, or a hub id."""
    if str(path) in BUILT_IN:
        return _built_in(str(path))
    folder = os.path.expanduser(path)  # as os.path.isdir, and unlike Path's, it takes every text
    if path and os.path.isdir(folder):
        if not os.path.isfile(os.path.join(folder, "model_index.json")):
            raise ValueError(
                f"model.path: {named(folder)} has no model_index.json; give a folder written by save_pretrained"
            )
        return folder
    if HUB_ID.fullmatch(str(path)):
        return str(path)
    raise ValueError(
        f"model.path: {named(path) or 'an empty text'} is neither a built-in model ({', '.join(BUILT_IN)}), a folder nor a hub id"
    )


def _built_in(name: str) -> str:
    folder = WEIGHTS / name
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"model.path: the weights of the built-in {name!r} are not in this installation ({folder});"
            f" progrpo pretrain {name} --export makes them"
        )
    return str(folder)


def supported(source: str) -> type[PipelinePolicy]:
    """Decided on the pipeline's index alone, before gigabytes are fetched."""
    with sayable(source):
        index = dict(DiffusionPipeline.load_config(source))
    kind = _policy_class(str(index.get("_class_name")), source)
    kind.check_index(index)
    return kind


def _policy_class(name: str, source: str) -> type[PipelinePolicy]:
    if name not in POLICIES:
        raise ValueError(f"model.path: {named(source)} is a {named(name)}; progrpo trains {', '.join(POLICIES)}")
    return POLICIES[name]


def _read_pipeline(source: str, kind: type[PipelinePolicy], settings: PolicySettings) -> DiffusionPipeline:
    """Loaded in `dtype`, but a denoiser that is trained in full in float32: no precision is lost on the way."""
    denoiser = torch.float32 if settings.weights == "full" else settings.dtype
    with sayable(source):
        for file in Path(source).glob(
            "*/*config.json"
        ):  # the libraries take other JSON for a hub's name, and ask there
            if not isinstance(json.loads(file.read_bytes()), dict):
                raise ValueError(f"{file} holds no object of named settings")
        pipeline = DiffusionPipeline.from_pretrained(
            source,
            dtype={kind.denoiser_name: denoiser, "vae": kind.vae_dtype or settings.dtype, "default": settings.dtype},
            use_safetensors=True,
            **_absent_encoders(source),
        )
        for name, part in pipeline.components.items():
            if part is not None and Path(source).is_dir():
                _require_whole(part, Path(source, name))
    return pipeline


def _absent_encoders(source: str) -> dict[str, None]:
    """Text encoders that the pipeline was saved without, and their tokenizers: diffusers must be told of them to load the rest."""
    absent = {name for name, part in DiffusionPipeline.load_config(source).items() if part == [None, None]}
    encoders = {name for name in absent if name.startswith("text_encoder")}
    return dict.fromkeys(encoders | {name for name in absent if name.replace("tokenizer", "text_encoder") in encoders})


_VOCABULARIES = {"tokenizer.json", "vocab.json", "spiece.model"}


def _require_whole(part: object, folder: Path) -> None:
    """ValueError where the files of a pipeline's part lack something that the libraries fill up in silence.

    Missing weights become random numbers, a missing vocabulary an empty one. Weights are counted and not named, since names
    change on the way from a file to a module; tied ones are stored once.
    """
    if folder.name.startswith("tokenizer") and not _VOCABULARIES & {file.name for file in folder.glob("*")}:
        raise ValueError(f"{folder} holds none of {', '.join(sorted(_VOCABULARIES))}")
    if not isinstance(part, nn.Module):
        return
    buffers = dict(part.named_buffers())
    stored = sum(_stored(file, buffers) for file in folder.glob("*.safetensors"))
    if stored < (wanted := sum(parameter.numel() for parameter in part.parameters())):
        raise ValueError(f"{folder} holds {stored:,} weights, and its config.json asks for {wanted:,}")


def _stored(file: Path, without: Container[str] = ()) -> int:
    """Numbers in a safetensors file."""
    with safe_open(file, "pt") as weights:
        names = [name for name in weights.keys() if name not in without]  # noqa: SIM118 (it is no dict)
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)


@contextmanager
def sayable(source: str | Path, what: str = "model.path") -> Iterator[None]:
    """Whatever the libraries below raise at a damaged file, as a ValueError of one sentence."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds: of JSON, of safetensors, of a class that gets another's settings
        place = "" if os.path.isdir(source) else "; no folder has that name, and the Hugging Face hub was tried"
        raise ValueError(f"{what}: cannot load {named(source)}{place}: {reason_of(error, source)}") from error
