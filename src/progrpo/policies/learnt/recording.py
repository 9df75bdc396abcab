"""Recordings of a pipeline's own call: stand-ins for its denoiser, scheduler, autoencoder and text encoding.

The pipeline's `__call__` runs as it is. The stand-ins note what it hands them and answer by a script, so that it can be
asked how it calls its network, what it makes of the outputs, and what it decodes, without the network being run.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from progrpo.policies.experts import parts_of

Inputs = dict[str, Any]
"""The arguments of one call of the denoiser, by the names of its `forward`."""


@dataclass(frozen=True)
class Script:
    """The answers of the stand-ins.

    `output(step, inputs)` is what the denoiser gives; None ends the call where it would run first. `sample(step,
    sample)` is what the scheduler's step gives; None leaves it to the scheduler. `timesteps`, if given, are those that
    the loop goes through. `encoded` are the results of `encode_prompt` in the order of its calls; None lets it run. The
    call ends after `last_step`, or before the autoencoder decodes if `decodes` is False, or as it does. `guiders` take
    the place of components of these names.
    """

    output: Callable[[int, Inputs], Any] | None
    sample: Callable[[int, Tensor], Tensor] | None = None
    timesteps: Tensor | None = None
    encoded: list[Any] | None = None
    last_step: int | None = None
    decodes: bool = False
    guiders: Mapping[str, object] = field(default_factory=dict)


@dataclass
class Recording:
    """The values that the pipeline handed to the stand-ins."""

    calls: list[list[Inputs]] = field(default_factory=lambda: [[]])
    """The denoiser's calls of each step; the last list is that of a step that did not end."""
    outputs: list[Tensor] = field(default_factory=list)
    """The network's output as the scheduler got it, a tensor a step."""
    samples: list[Tensor] = field(default_factory=list)
    """The latents that the scheduler got, likewise."""
    grid: dict[str, Any] = field(default_factory=dict)
    """The arguments of the scheduler's `set_timesteps`."""
    timesteps: Tensor | None = None
    encoded: list[Any] = field(default_factory=list)
    latents: Tensor | None = None
    """The autoencoder's input."""
    decode_options: dict[str, Any] = field(default_factory=dict)
    pictures: Any = None


class _StoppedError(Exception):
    """The end of a call that has shown what it was made for."""


class _StandIn:
    """An object in another's place: it has the other's class and attributes, and some methods of its own."""

    def __init__(self, real: object, device: torch.device | None) -> None:
        object.__setattr__(self, "_real", real)
        object.__setattr__(self, "_device", device)

    @property
    def device(self) -> torch.device:
        """The device that the pipeline is to take for the network's, which may wait on another."""
        own: torch.device = self._real.device
        return own if self._device is None else self._device

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._real(*args, **kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # pipelines look for modules among their components
        return type(self._real)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_real"), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._real, name, value)


class _Denoiser(_StandIn):
    def __init__(self, real: Any, device: torch.device | None, script: Script, recording: Recording) -> None:
        super().__init__(real, device)
        object.__setattr__(self, "_script", script)
        object.__setattr__(self, "_recording", recording)

    def __call__(self, *args: object, **kwargs: object) -> object:
        inputs = dict(inspect.signature(self._real.forward).bind(*args, **kwargs).arguments)
        for name in [n for n, p in inspect.signature(self._real.forward).parameters.items() if p.kind is p.VAR_KEYWORD]:
            inputs |= inputs.pop(name, {})
        recording = self._recording
        recording.calls[-1].append(_kept(inputs))
        if self._script.output is None:
            raise _StoppedError
        return self._script.output(len(recording.calls) - 1, inputs)


def _scheduler(real: Any, script: Script, recording: Recording) -> Any:
    """A copy of the scheduler, of its very class, that notes what it is handed."""
    copy = deepcopy(real)
    set_timesteps, own_step = copy.set_timesteps, copy.step

    def lay(*args: object, **kwargs: object) -> None:
        recording.grid = dict(inspect.signature(set_timesteps).bind(*args, **kwargs).arguments)
        set_timesteps(*args, **kwargs)
        if script.timesteps is not None:
            copy.timesteps = script.timesteps
        recording.timesteps = copy.timesteps

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        place = len(recording.outputs)
        recording.outputs.append(model_output.detach().clone())
        recording.samples.append(sample.detach().clone())
        if place == script.last_step:
            raise _StoppedError
        recording.calls.append([])
        if script.sample is None:
            return own_step(model_output, timestep, sample, *args, **kwargs)
        result = script.sample(place, sample)
        return SchedulerOutput(prev_sample=result) if kwargs.get("return_dict", True) else (result,)

    copy.set_timesteps, copy.step = _with_signature(lay, set_timesteps), _with_signature(step, own_step)
    return copy


class _Autoencoder(_StandIn):
    def __init__(self, real: Any, device: torch.device | None, script: Script, recording: Recording) -> None:
        super().__init__(real, device)
        object.__setattr__(self, "_notes", (script, recording))

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The real encoding, or zeros in its form where there are no weights to encode by."""
        if self._real.device.type != "meta":
            return self._real.encode(x, *args, **kwargs)
        parameters = self._real.encode(x.to("meta"), *args, **kwargs).latent_dist.parameters
        zeros = torch.zeros_like(parameters, device=x.device)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(zeros))

    def decode(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        script, recording = self._notes
        names = list(inspect.signature(self._real.decode).parameters)[1:]
        recording.latents = z.detach().clone()
        recording.decode_options = dict(zip(names, args, strict=False)) | kwargs
        if not script.decodes:
            raise _StoppedError
        return self._real.decode(z, *args, **kwargs)


@torch.no_grad()
def record(
    pipeline: DiffusionPipeline,
    denoiser_name: str,
    options: Mapping[str, object],
    script: Script,
    device: torch.device | None,
) -> Recording:
    """Run the pipeline's call with these options. Its components, settings and random state are then as before.

    The pipeline takes `device` for that of its networks, None for where they are.
    """
    recording = Recording()
    encode = pipeline.encode_prompt

    def encode_prompt(*args: object, **kwargs: object) -> object:
        place = len(recording.encoded)
        result = encode(*args, **kwargs) if script.encoded is None else script.encoded[place % len(script.encoded)]
        recording.encoded.append(result)
        return result

    stand_ins = {
        **{n: _StandIn(part, device) for n, part in pipeline.components.items() if isinstance(part, nn.Module)},
        **{n: _Denoiser(part, device, script, recording) for n, part in parts_of(pipeline, denoiser_name).items()},
        "scheduler": _scheduler(pipeline.scheduler, script, recording),
        "vae": _Autoencoder(pipeline.vae, device, script, recording),
        "encode_prompt": _with_signature(encode_prompt, encode),
        "_progress_bar_config": {"disable": True},
        **script.guiders,
    }
    with _in_place(pipeline, stand_ins), torch.random.fork_rng(devices=[]), suppress(_StoppedError):
        recording.pictures = pipeline(**options, return_dict=False)[0]
    return recording


@contextmanager
def _in_place(pipeline: DiffusionPipeline, stand_ins: Mapping[str, object]) -> Iterator[None]:
    """Put objects into a pipeline's dictionary, since its own assignment would change its configuration."""
    own = pipeline.__dict__
    before = {name: own[name] for name in stand_ins if name in own}
    own.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del own[name]
        own.update(before)


def _with_signature(method: Any, real: Any) -> Any:
    """The method with the signature of another, which pipelines look at."""

    @functools.wraps(real)
    def wrapped(*args: object, **kwargs: object) -> object:
        return method(*args, **kwargs)

    return wrapped


def _kept(inputs: Inputs) -> Inputs:
    """The arguments as they are now, since a pipeline may change them in place."""
    kept: Inputs = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, inputs)
    return kept
