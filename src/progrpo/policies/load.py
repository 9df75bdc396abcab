"""From a name, a folder or a hub id to a policy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch.utils.benchmark import Timer
from transformers.utils import logging as transformers_logging

from progrpo.policies.base import Policy, PolicySettings
from progrpo.policies.pipeline import PipelinePolicy
from progrpo.policies.sd3 import SD3Policy
from progrpo.policies.stable_diffusion import StableDiffusionPolicy, StableDiffusionXLPolicy
from progrpo.zoo import WEIGHTS

BUILT_IN = ("shapes-flow", "shapes-diffusion")
POLICIES: dict[str, type[PipelinePolicy]] = {
    "StableDiffusion3Pipeline": SD3Policy,
    "StableDiffusionPipeline": StableDiffusionPolicy,
    "StableDiffusionXLPipeline": StableDiffusionXLPolicy,
}

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def quiet() -> None:
    """No progress bars while parts are loaded, and only errors from the libraries below; a command line's wish."""
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


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
    source = _locate(path)
    kind = _supported(source)
    pipeline = _read_pipeline(source, kind, settings)
    if trained is not None:
        _apply_trained(pipeline, kind.denoiser_name, Path(trained))
    return policy_from_pipeline(pipeline, settings)


def policy_from_pipeline(pipeline: DiffusionPipeline, settings: PolicySettings) -> Policy:
    """The policy for a loaded pipeline, which it takes over; ValueError for a class that no policy is written for."""
    return _policy_class(type(pipeline).__name__, "the pipeline").from_pipeline(pipeline, settings)


def _apply_trained(pipeline: DiffusionPipeline, denoiser_name: str, folder: Path) -> None:
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        pipeline.load_lora_weights(folder)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    elif (folder / "config.json").is_file():
        base = getattr(pipeline, denoiser_name)
        setattr(pipeline, denoiser_name, type(base).from_pretrained(folder, use_safetensors=True).to(base.dtype))
    else:
        raise ValueError(
            f"{folder} holds no trained weights: neither pytorch_lora_weights.safetensors nor a denoiser's config.json"
        )


def _locate(path: str | Path) -> str:
    """A folder that has a pipeline in it, or a hub id."""
    if str(path) in BUILT_IN:
        return _built_in(str(path))
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"model.path: {folder} has no model_index.json; give a folder written by save_pretrained")
        return str(folder)
    if _HUB_ID.fullmatch(str(path)):
        return str(path)
    raise ValueError(f"model.path: {path} is neither a built-in model ({', '.join(BUILT_IN)}), a folder nor a hub id")


def _built_in(name: str) -> str:
    folder = WEIGHTS / name
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"model.path: the weights of the built-in {name!r} are not in this installation ({folder});"
            f" progrpo pretrain {name} --export makes them"
        )
    return str(folder)


def _supported(source: str) -> type[PipelinePolicy]:
    """Decided on the pipeline's index alone, before gigabytes are fetched."""
    try:
        index = DiffusionPipeline.load_config(source)
    except OSError as error:
        raise _unreadable(source, error) from error
    return _policy_class(str(index.get("_class_name")), source)


def _policy_class(name: str, source: str) -> type[PipelinePolicy]:
    if name not in POLICIES:
        raise ValueError(f"model.path: {source} is a {name}; progrpo trains {', '.join(POLICIES)}")
    return POLICIES[name]


def _read_pipeline(source: str, kind: type[PipelinePolicy], settings: PolicySettings) -> DiffusionPipeline:
    """Loaded in `dtype`, but a denoiser that is trained in full in float32: no precision is lost on the way."""
    denoiser = torch.float32 if settings.weights == "full" else settings.dtype
    try:
        return DiffusionPipeline.from_pretrained(
            source, dtype={kind.denoiser_name: denoiser, "default": settings.dtype}, use_safetensors=True
        )
    except OSError as error:
        raise _unreadable(source, error) from error


def _unreadable(source: str, error: OSError) -> ValueError:
    place = "the folder" if Path(source).is_dir() else "no folder has that name, and the Hugging Face hub"
    reason = " ".join(str(error).split())
    return ValueError(f"model.path: cannot load {source}; {place} was tried: {reason}")
