"""The agreement of a recorded family with its pipeline: one picture is sampled both ways, and each part is compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from progrpo.diffusion.levels import Levels, end_of
from progrpo.diffusion.prediction import PREDICTIONS
from progrpo.policies.decoding import PictureDecoder
from progrpo.policies.learnt.argument import Given
from progrpo.policies.learnt.recording import Recording
from progrpo.types import Condition

if TYPE_CHECKING:
    from progrpo.policies.learnt.family import Recorded

STEPS = 2
_TEXT = "two dogs on a blue boat"
_SCALE = 3.5


@torch.no_grad()
def require_agreement(family: Recorded) -> tuple[int, int]:
    """The height and width of the pictures, where the pipeline and the family make the same from the same noise.

    Without guidance and with it, for two steps each. ValueError that names the first difference.
    """
    plain = _pipelines_own(family, None)
    _require_same_steps(family, plain, None)
    if family.learnt.guidance is not None:
        _require_same_steps(family, _pipelines_own(family, _SCALE), _SCALE)
    return _require_same_pictures(family, plain)


def _pipelines_own(family: Recorded, scale: float | None) -> Recording:
    """The pipeline's own sampling by its scheduler, with its network."""
    call = family.call
    options = call.options(_TEXT, STEPS) if scale is None else call.guided(_TEXT, family.negative_prompt, scale, STEPS)
    return call.record(options, output=lambda step, inputs: family.run_network(inputs), decodes=scale is None)


def _require_same_steps(family: Recorded, recording: Recording, scale: float | None) -> None:
    levels, guided = family.levels(STEPS), scale is not None
    condition = _condition(family, _TEXT)
    for step in range(STEPS):
        x = family.from_pipeline(recording.samples[step].flatten(1)).float()
        timestep_B = levels.timestep[step].to(x).reshape(1)
        if not guided:
            given = Given(family.to_pipeline(x), timestep_B, condition.tensors.get("guidance"), condition.tensors)
            _require_same_arguments(family, step, recording.calls[step][0], family.learnt.inputs.make(given))
        output = _output(family, x, timestep_B, condition, scale)
        expected = family.from_pipeline(recording.outputs[step].flatten(1)).float()
        of = f"the {'guided ' * guided}output at step {step}"
        _require(family, of, expected, output)
        x_next = _stepped(family, levels, step, x, output)
        if step + 1 < STEPS:
            expected = family.from_pipeline(recording.samples[step + 1].flatten(1)).float()
            _require(family, f"the latents after step {step}", expected, x_next)


def _condition(family: Recorded, text: str, negative: bool = False) -> Condition:
    encoded = family.encode_negative(text) if negative else family.encode_text(text)
    if family.edits and not negative and family.call.picture is not None:
        encoded |= family.encode_picture(family.call.picture)
        encoded |= family.encode_both(text, family.call.picture) if family.reads_both else {}
    tensors = {name: tensor.to(family.device) for name, tensor in encoded.items()}
    if family.learnt.embeds_guidance:
        tensors["guidance"] = torch.full((1,), float(family.call.unguided), device=family.device)
    return Condition(tensors)


def _output(family: Recorded, x: Tensor, timestep_B: Tensor, condition: Condition, scale: float | None) -> Tensor:
    if scale is None:
        return family.network.output(x, timestep_B, condition)
    assert family.learnt.guidance is not None
    negative = _condition(family, family.negative_prompt, negative=True)
    return family.network.guided_output(x, timestep_B, condition, negative, scale + family.learnt.guidance.offset)


def _stepped(family: Recorded, levels: Levels, step: int, x: Tensor, output: Tensor) -> Tensor:
    at, after = levels[step].to(x), end_of(levels, step).to(x)
    return PREDICTIONS[family.prediction].step(x, output, at, after)


def _require_same_arguments(family: Recorded, step: int, expected: Any, made: Any) -> None:
    ours = dict(_leaves(made))
    for name, value in _leaves(expected):
        of = f"the argument {name} at step {step}"
        other = ours.get(name)
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            _require(family, of, value.float(), other.float().reshape(value.shape))
        elif value != other:
            raise ValueError(f"{of} is {value!r} in the pipeline's call and {other!r} here")


def _leaves(inputs: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in tree_flatten_with_path(inputs)[0]:
        yield ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), leaf


def _require(family: Recorded, what: str, expected: Tensor, actual: Tensor) -> None:
    if expected.shape != actual.shape:
        raise ValueError(
            f"{what} has the shape {tuple(expected.shape)} in the pipeline's call and {tuple(actual.shape)} here"
        )
    size = max(1.0, float(expected.abs().max()))
    difference = float((expected - actual.to(expected)).abs().max())
    if not difference <= tolerance(family.dtype) * size:
        raise ValueError(f"{what} differs from the pipeline's own by {difference:.3g}, in numbers up to {size:.3g}")


def tolerance(dtype: torch.dtype) -> float:
    """The share of the largest number by which both ways may differ."""
    return 1e-4 if dtype == torch.float32 else 5e-2


def _require_same_pictures(family: Recorded, recording: Recording) -> tuple[int, int]:
    levels, condition = family.levels(STEPS), _condition(family, _TEXT)
    x = family.from_pipeline(recording.samples[-1].flatten(1)).float()
    timestep_B = levels.timestep[STEPS - 1].to(x).reshape(1)
    x0 = _stepped(family, levels, STEPS - 1, x, _output(family, x, timestep_B, condition, None))
    decoder = PictureDecoder(family.pipeline.vae, family.unscale, "decoder", "the latents are not finite")
    pictures_NHWC = decoder.decode(torch.cat([x0, x0])).images_NHWC
    own = torch.as_tensor(np.asarray(recording.pictures)).mul(255).round().clamp(0, 255)
    shapes = tuple(own.shape[1:]), tuple(pictures_NHWC.shape[1:])
    if shapes[0] != shapes[1]:
        raise ValueError(f"a picture has the shape {shapes[0]} in the pipeline's call and {shapes[1]} here")
    difference = (own - pictures_NHWC.float()).abs()
    most = difference.max() if family.dtype == torch.float32 else difference.mean()
    if most > 1.01:
        raise ValueError(f"pictures differ from the pipeline's own by {float(most):.3g} of 255")
    height, width = pictures_NHWC.shape[-3:-1]
    if family.settings.resolution is not None and (height, width) != family.size:
        raise ValueError(
            f"asked for {family.size[0]} x {family.size[1]} pixels (height and width) it makes {height} x {width}; set"
            f" model.resolution to {height} {width}"
        )
    return int(height), int(width)
