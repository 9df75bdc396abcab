"""The sizes of a model without its weights: its own code runs on tensors that have a shape and no content.

Parameters and FLOPs are exact for matrix products and convolutions. Memory is the most that lives at once beyond the
weights.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from progrpo.policies.architectures import ARCHITECTURES, Architecture, NetworkConfig
from progrpo.policies.base import PolicyContext, torch_dtype
from progrpo.policies.experts import parts_of
from progrpo.policies.family import ModelFamily
from progrpo.policies.learnt.outline import outlined_kind
from progrpo.policies.load import (
    FAMILIES,
    family_of,
    family_of_pipeline,
    locate,
    reported_errors,
    with_own_length,
)
from progrpo.policies.networks import network_class
from progrpo.policies.pipeline import PipelinePolicy
from progrpo.policies.prepare import prepare, text_encoders
from progrpo.policies.settings import ModelSettings
from progrpo.policies.stacks import FEW, are_adapted_alike, stacks_of, with_blocks


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, bytes, and floating-point operations (a multiplication and an addition are two).

    FLOPs are those of one row of a network call, of one with its backward pass, and of one decoded picture. The last
    three are bytes beyond the weights, for a whole microbatch.
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
    """The sizes of the model at `settings.path`.

    Microbatches have `called` rows of a network call, `trained` items and `decoded` pictures. ValueError for a hub id
    whose architecture is not known here.
    """
    pipeline = without_weights(settings.path, torch_dtype(settings))
    denoisers = parts_of(pipeline, _kind(pipeline).denoiser_name)
    stacks = stacks_of(denoisers)
    ends = (*settings.lora_targets, *settings.lora_rank_pattern, *settings.lora_alpha_pattern)
    if not are_adapted_alike(denoisers, stacks, ends):
        stacks = []
    few = _sizes_of(_with(pipeline, with_blocks(denoisers, stacks, FEW)), settings, (called, trained, decoded))
    if not stacks:
        return few
    more = _sizes_of(_with(pipeline, with_blocks(denoisers, stacks, FEW + 1)), settings, (called, trained, 0))
    further = stacks[0].count - FEW
    in_blocks = ("frozen", "trained", "frozen_bytes", "call_flops", "train_flops", "call_bytes", "train_bytes")
    numbers = {name: (getattr(few, name), getattr(more, name)) for name in in_blocks}
    return replace(few, **{name: base + further * (more - base) for name, (base, more) in numbers.items()})


def _kind(pipeline: DiffusionPipeline) -> type[ModelFamily]:
    """The family of a pipeline, without weights where it is learnt from its call."""
    own = family_of_pipeline(pipeline)
    name = type(pipeline).__name__
    return own if name in FAMILIES else outlined_kind(name, own.denoiser_name) or own


def _with(pipeline: DiffusionPipeline, denoisers: Mapping[str, nn.Module]) -> DiffusionPipeline:
    """The pipeline with other denoisers, and an autoencoder of its own."""
    other = copy(pipeline)
    for name, network in {**denoisers, "vae": deepcopy(pipeline.vae)}.items():
        setattr(other, name, network)
    return other


def _sizes_of(pipeline: DiffusionPipeline, settings: ModelSettings, rows: tuple[int, int, int]) -> Sizes:
    """The sizes of a pipeline on the meta device, which is taken over; rows are those of `sizes`."""
    called, trained, decoded = rows
    dtype = torch_dtype(settings)
    bare = replace(with_own_length(settings), compile=False)
    policy = PipelinePolicy(prepare(_kind(pipeline), pipeline, bare, PolicyContext(torch.device("meta"))))
    denoiser, vae = policy.denoiser, pipeline.vae
    weights = [(p.numel(), p.numel() * p.element_size(), p.requires_grad) for p in denoiser.parameters()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (denoiser, vae):
            _allocate_in_name(module)

        def call(rows: int, grad: bool) -> None:
            low = dtype != torch.float32
            with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, enabled=low, cache_enabled=False):
                output = policy.family.outline_call(rows)
            if grad:
                output.square().mean().backward()

        def decode() -> None:
            with torch.no_grad():
                vae.decode(policy.family.outline_latents(decoded).to(vae.dtype), return_dict=False)

        gradients = [p.grad for p in denoiser.parameters() if p.grad is not None]
        own = [*denoiser.parameters(), *denoiser.buffers(), *vae.parameters(), *vae.buffers(), *gradients]
        call_flops, call_bytes = _measured(lambda: call(called, False), own)
        train_flops, train_bytes = _measured(lambda: call(trained, True), own)
        decode_flops, decode_bytes = _measured(decode, own) if decoded else (0, 0)
    return Sizes(
        frozen=sum(count for count, _, grad in weights if not grad),
        trained=sum(count for count, _, grad in weights if grad),
        frozen_bytes=sum(size for _, size, grad in weights if not grad),
        decoder_bytes=_bytes(vae),
        text_encoder_bytes=sum(map(_bytes, text_encoders(pipeline))),
        latent=torch.Size(policy.latent_shape).numel(),
        call_flops=call_flops // called,
        train_flops=train_flops // trained,
        decode_flops=decode_flops // max(decoded, 1),
        call_bytes=call_bytes,
        train_bytes=train_bytes,
        decode_bytes=decode_bytes,
    )


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _measured(work: Callable[[], None], own: list[Tensor]) -> tuple[int, int]:
    """The FLOPs of `work`, and the most bytes that live at once beside `own`."""
    with Watch(own) as watch:
        work()
    return watch.flops, watch.most


class Watch(TorchDispatchMode):
    """A counter of operations and bytes. Torch's FlopCounterMode would keep alive what checkpoints compute anew."""

    def __init__(self, own: list[Tensor]) -> None:
        super().__init__()
        self.flops = self.most = self._now = 0
        self._living: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in own}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if (operations := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += operations(*args, **kwargs, out_val=output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._living:
                storage = tensor.untyped_storage()
                self._living[key] = storage.nbytes()
                self._now += storage.nbytes()
                self.most = max(self.most, self._now)
                weakref.finalize(storage, self._gone, key)
        return output

    def _gone(self, key: int) -> None:
        self._now -= self._living.pop(key, 0)


# --- models without weights -------------------------------------------------------------------------------------------


def without_weights(path: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of a model, with its networks on the meta device and without tokenizers.

    ValueError for a hub id whose architecture is not known here.
    """
    architecture = ARCHITECTURES.get(path) or _read_architecture(path)
    kind: type[DiffusionPipeline] = getattr(diffusers, architecture.pipeline)
    required, _ = kind._get_signature_keys(kind)
    components: dict[str, object] = dict.fromkeys(required)
    with reported_errors(path):
        for name, (library, class_name, config) in architecture.components.items():
            component = _from_config(library, class_name, config)
            if isinstance(component, nn.Module):  # a text encoder too comes in the model's dtype
                component.to(dtype)
            components[name] = component
        return kind(**components, **architecture.settings)


def _from_config(library: str, class_name: str, config: NetworkConfig) -> object:
    """A network on the meta device, or a scheduler."""
    kind = getattr(diffusers if library == "diffusers" else transformers, class_name)
    with torch.device("meta" if issubclass(kind, nn.Module) else "cpu"):
        return kind.from_config(config) if library == "diffusers" else kind(kind.config_class(**config))


def _read_architecture(path: str) -> Architecture:
    """The architecture in a folder's configuration files."""
    folder = Path(locate(path))
    if not folder.is_dir():
        raise ValueError(
            f"model.path: the size of {path} is not known here; give its folder, or one of {', '.join(ARCHITECTURES)}"
        )
    family = family_of(str(folder))
    needed = (family.denoiser_name, "vae", "scheduler")
    with reported_errors(folder):
        index = json.loads((folder / "model_index.json").read_bytes())
        components = {}
        for name, entry in index.items():
            if not isinstance(entry, list) or not all(entry) or name in family.omitted_components:
                continue
            if name in needed or name.startswith("text_encoder") or network_class(entry) is not None:
                file = "scheduler_config.json" if name == "scheduler" else "config.json"
                library, class_name = entry
                components[name] = library, class_name, json.loads((folder / name / file).read_bytes())
        kind: type[DiffusionPipeline] = getattr(diffusers, index["_class_name"])
        _, optional = kind._get_signature_keys(kind)
        settings = {name: index[name] for name in optional if name in index and not isinstance(index[name], list)}
        return Architecture(index["_class_name"], components, settings)


def _allocate_in_name(network: nn.Module) -> None:
    """Give parameters and buffers a place on the CPU in name alone, with gradients as after the first microbatch."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = replaced = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                if replaced.requires_grad:
                    replaced.grad = torch.empty_like(fake)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
