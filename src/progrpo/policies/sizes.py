"""What a model takes, without its weights: its own code runs on tensors that have a shape and nothing else.

Parameters and FLOPs are exact for matrix products and convolutions, memory is the most that lives at once beyond the weights.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from progrpo.policies.architectures import ARCHITECTURES, Architecture
from progrpo.policies.base import PolicyContext, torch_dtype
from progrpo.policies.load import family_of, locate, policy_from_pipeline, sayable, with_own_length
from progrpo.policies.settings import ModelSettings
from progrpo.types import Condition

_PARTS = ("transformer", "unet", "vae", "scheduler")


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, bytes, and floating-point operations (a multiplication and an addition are two).

    FLOPs are of one row of a network call, of one with its backward pass, and of one decoded picture. The last three are
    bytes beyond the weights, of a whole microbatch.
    """

    frozen: int
    trained: int
    frozen_bytes: int
    decoder_bytes: int
    text_encoder_bytes: int
    latent: int
    call_flops: int
    train_flops: int
    decode_flops: int
    call_bytes: int
    train_bytes: int
    decode_bytes: int


def sizes(settings: ModelSettings, called: int, trained: int, decoded: int) -> Sizes:
    """The sizes of the model at `settings.path`, with microbatches of so many rows called, items trained and pictures decoded.

    ValueError for a hub id whose architecture is not known here.
    """
    dtype = torch_dtype(settings)
    pipeline = without_weights(settings.path, dtype)
    bare = replace(with_own_length(settings), compile=False)
    on_meta = PolicyContext(torch.device("meta"))
    policy = policy_from_pipeline(pipeline, bare, on_meta)
    denoiser, vae = policy.denoiser, pipeline.vae
    encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part]
    weights = [(p.numel(), p.numel() * p.element_size(), p.requires_grad) for p in denoiser.parameters()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (denoiser, vae):
            _fake(module)

        def call(rows: int, grad: bool) -> None:
            x, at = torch.empty(rows, *policy.latent_shape), torch.empty(rows)
            shapes = policy.network.input_shapes
            told = {name: torch.empty(rows, *shape, dtype=dtype) for name, shape in shapes.items()}
            low = dtype != torch.float32
            with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, enabled=low, cache_enabled=False):
                output = policy.family.denoise(x, at, Condition(told)).float()
            if grad:
                output.square().mean().backward()

        def decode() -> None:
            with torch.no_grad():
                latents = policy.family.unscale(torch.empty(decoded, *policy.latent_shape))
                vae.decode(latents.to(vae.dtype), return_dict=False)

        gradients = [p.grad for p in denoiser.parameters() if p.grad is not None]
        own = [*denoiser.parameters(), *denoiser.buffers(), *vae.parameters(), *vae.buffers(), *gradients]
        call_flops, call_bytes = _measured(lambda: call(called, False), own)
        train_flops, train_bytes = _measured(lambda: call(trained, True), own)
        decode_flops, decode_bytes = _measured(decode, own)
    return Sizes(
        frozen=sum(count for count, _, grad in weights if not grad),
        trained=sum(count for count, _, grad in weights if grad),
        frozen_bytes=sum(size for _, size, grad in weights if not grad),
        decoder_bytes=_bytes(vae),
        text_encoder_bytes=sum(map(_bytes, encoders)),
        latent=torch.Size(policy.latent_shape).numel(),
        call_flops=call_flops // called,
        train_flops=train_flops // trained,
        decode_flops=decode_flops // decoded,
        call_bytes=call_bytes,
        train_bytes=train_bytes,
        decode_bytes=decode_bytes,
    )


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _measured(work: Callable[[], None], own: list[Tensor]) -> tuple[int, int]:
    """FLOPs, and the most bytes that live at once beside `own`."""
    with Watch(own) as seen:
        work()
    return seen.flops, seen.most


class Watch(TorchDispatchMode):
    """Counts operations as torch's FlopCounterMode, which would keep alive what checkpoints compute anew, and bytes."""

    def __init__(self, own: list[Tensor]) -> None:
        super().__init__()
        self.flops = self.most = self._now = 0
        self._living: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if (operations := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += operations(*args, **kwargs, out_val=found)
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._living:
                storage = tensor.untyped_storage()
                self._living[key] = storage.nbytes()
                self._now += storage.nbytes()
                self.most = max(self.most, self._now)
                weakref.finalize(storage, self._gone, key)
        return found

    def _gone(self, key: int) -> None:
        self._now -= self._living.pop(key, 0)


# --- models without weights -------------------------------------------------------------------------------------------


def without_weights(path: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of a published model, a built-in one or a folder, by its configuration: tensors on the meta device, no tokenizers.

    ValueError for a hub id whose architecture is not known here.
    """
    told = ARCHITECTURES.get(path) or _read(path)
    parts: dict[str, Any] = {name: None for name in _arguments(told["_class_name"])}
    with sayable(path):
        for name, part in told.items():
            if name != "_class_name":
                with torch.device("cpu" if name == "scheduler" else "meta"):
                    parts[name] = _built(*part)
                if isinstance(parts[name], nn.Module):  # a text encoder too comes in the model's dtype
                    parts[name].to(dtype)
        kind: type[DiffusionPipeline] = getattr(diffusers, told["_class_name"])
        return kind(**parts)


def _arguments(class_name: str) -> list[str]:
    """The parts that a pipeline must be given, be it None."""
    needed, _ = getattr(diffusers, class_name)._get_signature_keys(getattr(diffusers, class_name))
    return list(needed)


def _built(library: str, class_name: str, config: dict[str, Any]) -> Any:
    kind = getattr(diffusers if library == "diffusers" else transformers, class_name)
    if library == "diffusers":
        return kind.from_config(config)
    return kind(kind.config_class(**config))


def _read(path: str) -> Architecture:
    """A folder's configuration files."""
    folder = Path(locate(path))
    if not folder.is_dir():
        raise ValueError(
            f"model.path: how large {path} is is not known here; give its folder, or one of {', '.join(ARCHITECTURES)}"
        )
    family_of(str(folder))
    with sayable(folder):
        index = json.loads((folder / "model_index.json").read_bytes())
        told: Architecture = {"_class_name": index["_class_name"]}
        for name, (library, class_name) in ((n, v) for n, v in index.items() if isinstance(v, list) and all(v)):
            if name in _PARTS or name.startswith("text_encoder"):
                file = "scheduler_config.json" if name == "scheduler" else "config.json"
                told[name] = library, class_name, json.loads((folder / name / file).read_bytes())
        return told


def _fake(module: nn.Module) -> None:
    """Parameters and buffers that have a place on the CPU, in name alone. Gradients are there, as after the first microbatch."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = named = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                if named.requires_grad:
                    named.grad = torch.empty_like(fake)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
