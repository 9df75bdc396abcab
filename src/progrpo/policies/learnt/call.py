"""A pipeline's call, with the same options each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter, signature
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance, DiffusionPipeline
from diffusers.guiders.guider_utils import BaseGuidance
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from progrpo.policies.learnt.recording import Inputs, Recording, Script, record

TEXT = "a red cat"
"""The text of calls in which no text matters."""
LONGER_TEXT = 'two dogs on a boat, whose name is "sea"'
"""Another text, of more tokens. Some pipelines encode quoted words by themselves."""
GUIDERS = "guiders"
"""The option of a call that is the scale of the components that guide. The other options are the call's own."""
_ASKED_STEPS = 4


@dataclass(frozen=True)
class CallOptions:
    """The options of every call: height and width in pixels, frames, tokens; None for the pipeline's own."""

    size: tuple[int, int] | None = None
    frames: int | None = None
    max_sequence_length: int | None = None


class PipelineCall:
    """A pipeline's call with the same options each time. `run` makes one call of the network itself.

    The pipeline takes `device` for that of all its networks, wherever they wait; None: where they are.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        denoiser_name: str,
        options: CallOptions,
        run: Callable[[Inputs], Any],
        device: torch.device | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.denoiser_name = denoiser_name
        self.run = run
        self._device = device
        self._options = options
        self._templates: dict[tuple[Any, ...], Any] = {}
        self.picture: Image.Image | None = None
        """The picture that the pipeline changes; None for one that takes a text alone."""
        self.unguided: float = 1.0
        """The guidance scale by which the pipeline makes one call a step, of as many rows as it has prompts."""

    @contextmanager
    def showing(self, picture: Image.Image | None) -> Iterator[None]:
        """Have another picture in the calls of a block."""
        before, self.picture = self.picture, picture
        try:
            yield
        finally:
            self.picture = before

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        return signature(type(self.pipeline).__call__).parameters

    @property
    def text_tokens(self) -> int:
        """The number of tokens of a text: that of the options, the call's default, or 512 where it says none."""
        parameter = self.parameters.get("max_sequence_length")
        own = None if parameter is None else parameter.default
        return self._options.max_sequence_length or (own if isinstance(own, int) else 512)

    @property
    def guiders(self) -> list[str]:
        """The components that combine the outputs of guidance, for a pipeline that leaves this to components."""
        return [name for name, component in self.pipeline.components.items() if isinstance(component, BaseGuidance)]

    @property
    def scale_name(self) -> str | None:
        """The option for the guidance by a pair of calls: a parameter of the call, or `GUIDERS`."""
        if self.guiders:
            return GUIDERS
        return next((name for name in ("true_cfg_scale", "guidance_scale") if name in self.parameters), None)

    @property
    def embedded_scale_name(self) -> str | None:
        """The parameter for the guidance scale as an input of the network, if the network has one."""
        return next((name for name in ("distilled_guidance_scale", "guidance_scale") if name in self.parameters), None)

    @property
    def frames_name(self) -> str | None:
        """The parameter for the number of a video's frames."""
        return next((name for name in ("num_frames", "video_length") if name in self.parameters), None)

    def options(self, text: str | list[str], steps: int = _ASKED_STEPS, **more: object) -> dict[str, object]:
        """The call's options for a text. Guidance is off where `more` does not turn it on."""
        chosen = self._options
        height, width = chosen.size or (None, None)
        given: dict[str, object] = {
            "prompt": text,
            "height": height,
            "width": width,
            self.frames_name or "": chosen.frames,
            "max_sequence_length": chosen.max_sequence_length,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if self.picture is not None:
            given["image"] = self.picture
        area = self.picture.width * self.picture.height if self.picture else None
        given |= {name: v for name, v in (("max_area", area), ("_auto_resize", False)) if name in self.parameters}
        scales = ("guidance_scale", "true_cfg_scale", "distilled_guidance_scale")
        fixed = {**dict.fromkeys(scales, self.unguided), "use_resolution_binning": False, "use_kv_cache": False}
        given |= {name: value for name, value in fixed.items() if name in self.parameters}
        generator = torch.Generator().manual_seed(0)
        return given | {"num_inference_steps": steps, "generator": generator, "output_type": "np"} | more

    def guided(self, text: str, negative: str, scale: float, steps: int = _ASKED_STEPS) -> dict[str, object]:
        """The options of a call with guidance by a pair, at the pipeline's own scale."""
        assert self.scale_name is not None
        more: dict[str, object] = {self.scale_name: scale}
        if "negative_prompt" in self.parameters and (negative or self.scale_name == "true_cfg_scale"):
            more["negative_prompt"] = negative
        return self.options(text, steps, **more)

    def record(self, options: Mapping[str, object], **script: Any) -> Recording:
        """Record a call; the network is run once for each kind of input, for the form of its output."""
        scale = options.get(GUIDERS, 1.0)
        guiders = {name: ClassifierFreeGuidance(guidance_scale=scale) for name in self.guiders}
        played = Script(**{"output": lambda step, inputs: self.template(inputs), "guiders": guiders, **script})
        of_call = {name: value for name, value in options.items() if name != GUIDERS}
        return record(self.pipeline, self.denoiser_name, of_call, played, self._device)

    def decoded(self, encoded: list[Any], latents: Tensor) -> Recording:
        """Record a call whose loop ends with these latents (B, ...), and with it the autoencoder's input."""
        return self.record(
            self.options(TEXT, 2),  # a call of one step may be that of a distilled model
            encoded=encoded,
            sample=lambda step, sample: latents.to(sample) if step else sample,
        )

    @cached_property
    def pair(self) -> Inputs | None:
        """A call of two rows; None for a pipeline that takes one prompt at a time, which it says by a ValueError."""
        try:
            recording = self.record(self.options([TEXT, TEXT]), last_step=0)
        except ValueError:
            return None
        return recording.calls[0][0]

    def template(self, inputs: Inputs) -> Any:
        """Zeros in the form of the network's output."""
        flat, _ = tree_flatten(inputs)
        key = tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else repr(leaf) for leaf in flat)
        if key not in self._templates:
            self._templates[key] = tree_map(_zeros, self.run(inputs))
        return self._templates[key]


def _zeros(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf
