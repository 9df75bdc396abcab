"""What is learnt of a pipeline from its own call: arguments, outputs, latents and guidance of its denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from progrpo.policies.learnt.argument import (
    Argument,
    Calls,
    FromGuidance,
    FromLatents,
    FromText,
    Probe,
    learn,
    leaves,
    renamed,
)
from progrpo.policies.learnt.guidance import Combined, Guidance, guidance_of
from progrpo.policies.learnt.rearranged import in_order, inverse, probes, read
from progrpo.policies.learnt.recording import Inputs, Recording, Script, record

_SHORT, _OTHER, _WORD = "a red cat", "two dogs on a blue boat, seen from above", "boat "
_SCALES = (3.5, 7.0)
_ASKED_STEPS = 4


@dataclass(frozen=True)
class CallOptions:
    """The options of every call: height and width in pixels, frames, tokens; None for the pipeline's own."""

    size: tuple[int, int] | None = None
    frames: int | None = None
    max_sequence_length: int | None = None


class PipelineCall:
    """A pipeline's call with the same options each time. `run` makes one call of the network itself."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        denoiser_name: str,
        options: CallOptions,
        run: Callable[[Inputs], Any],
    ) -> None:
        self.pipeline = pipeline
        self.denoiser_name = denoiser_name
        self.run = run
        self._options = options
        self._templates: dict[tuple[Any, ...], Any] = {}
        self.picture: Image.Image | None = None
        """The picture that the pipeline changes; None for one that takes a text alone."""
        self.unguided: float = 1.0
        """The guidance scale by which the pipeline makes one call a step, of as many rows as it has prompts."""

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
    def scale_name(self) -> str | None:
        """The parameter for the guidance by a pair of calls."""
        return next((name for name in ("true_cfg_scale", "guidance_scale") if name in self.parameters), None)

    @property
    def frames_name(self) -> str | None:
        """The parameter for the number of a video's frames."""
        return next((name for name in ("num_frames", "video_length") if name in self.parameters), None)

    def options(self, text: str, steps: int = _ASKED_STEPS, **more: object) -> dict[str, object]:
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
        fixed = {"guidance_scale": self.unguided, "true_cfg_scale": self.unguided, "use_resolution_binning": False}
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
        played = Script(**{"output": lambda step, inputs: self.template(inputs), **script})
        return record(self.pipeline, self.denoiser_name, options, played)

    def template(self, inputs: Inputs) -> Any:
        """Zeros in the form of the network's output."""
        flat, _ = tree_flatten(inputs)
        key = tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else repr(leaf) for leaf in flat)
        if key not in self._templates:
            self._templates[key] = tree_map(_zeros, self.run(inputs))
        return self._templates[key]


def _zeros(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf


@dataclass(frozen=True, eq=False)
class Output:
    """Where the network's output holds what the scheduler gets: a path of keys, whether in a list of rows, places."""

    path: tuple[Any, ...]
    listed: bool
    place_N: Tensor
    sign: float

    def read(self, output: Any, rows: int) -> Tensor:
        """The output (B, N) as the scheduler gets it."""
        for key in self.path:
            output = output[key]
        tensor = torch.stack(list(output)) if self.listed else output
        read = in_order(tensor.reshape(rows, -1), self.place_N.to(tensor.device))
        return read if self.sign == 1 else read * self.sign


@dataclass(frozen=True, eq=False)
class Learnt:
    """A pipeline's call as it was learnt. Latents (B, N) are in the pipeline's order unless something else is said."""

    inputs: Argument
    output: Output
    shape: tuple[int, ...]
    """The shape of the pipeline's latents, without the first dimension."""
    latent_shape: tuple[int, ...]
    """The shape of a latent in the autoencoder's order: (C, H, W), or (C, F, H, W) of a video."""
    place_N: Tensor
    """Where a latent's numbers are in the pipeline's."""
    scale_N: Tensor
    """What the autoencoder's input is of them, in the autoencoder's order: their products with this ..."""
    offset_N: Tensor
    """... plus this."""
    decodes_rows: bool
    """Whether the pipeline decodes more latents at its end than it began with; otherwise rows are decoded in turn."""
    encoded: list[Any]
    """What `encode_prompt` gave for a text, for calls in which no text matters."""
    guidance: Guidance | None
    unguidable: str
    """The reason why there is no guidance by pairs; empty where there is."""
    unconditional_first: bool = True
    doubled: bool = False

    @property
    def back_N(self) -> Tensor:
        return inverse(self.place_N)

    @property
    def embeds_guidance(self) -> bool:
        return any(isinstance(leaf, FromGuidance) for leaf in leaves(self.inputs))

    @property
    def texts(self) -> list[FromText]:
        """What a prompt gives."""
        return _text_leaves(self.inputs)


class Learner:
    """The learning of one pipeline: each method is one question to it."""

    def __init__(self, call: PipelineCall) -> None:
        self.call = call
        self._scheduler = call.pipeline.scheduler

    def learn(self) -> Learnt:
        """Learn all. ValueError, one sentence, for what is of no known kind."""
        first = self._first_call()
        sample, encoded = first.samples[0], first.encoded
        latents_KN = probes(sample[0].numel())
        shape = tuple(sample.shape[1:])
        inputs = self._inputs(first, latents_KN)
        learnt = Learnt(
            inputs=inputs,
            output=self._output(first, latents_KN),
            shape=shape,
            encoded=encoded,
            guidance=None,
            unguidable="",
            **self._tail(first, latents_KN),
        )
        return self._guidance(learnt, first)

    def _first_call(self) -> Recording:
        """A call of one row. It turns guidance off, which some pipelines do at a scale of 0 and not of 1."""
        for scale in (1.0, 0.0):
            self.call.unguided = scale
            recording = self.call.record(self.call.options(_SHORT), last_step=0)
            if not recording.samples:
                raise ValueError("its call made no step of its scheduler")
            if len(recording.calls[0]) == 1 and self._rows(recording) == 1:
                return recording
        raise ValueError(
            f"without guidance it makes {len(recording.calls[0])} calls of its {self.call.denoiser_name} in a step, of"
            f" {self._rows(recording)} rows, and one call of one row is what can be learnt"
        )

    def _rows(self, recording: Recording) -> int:
        """The number of rows of a call, by the argument that changes with the latents."""
        first = self.call.record(
            self.call.options(_SHORT),
            encoded=recording.encoded,
            sample=lambda step, sample: sample + 1,
            last_step=1,
        )
        one, two = ({**step[0]} for step in first.calls[:2])
        changed = [name for name in one if not _same(one[name], two[name])]
        sizes = {name: sum(t.numel() for t in tree_flatten(one[name])[0] if isinstance(t, Tensor)) for name in changed}
        value = one[max(sizes, key=lambda name: sizes[name])]
        return len(value) if isinstance(value, list | Tensor) else 1

    def _inputs(self, first: Recording, latents_KN: Tensor) -> Argument:
        call, encoded, sample = self.call, first.encoded, first.samples[0]
        at = self._timesteps(first)
        later = torch.cat([first.timesteps[:1].cpu().to(at), at])  # type: ignore[index]
        times = call.record(
            call.options(_SHORT, len(later)), encoded=encoded, timesteps=later.to(sample.device),
            sample=lambda step, x: sample, last_step=len(later) - 1,
        )  # fmt: skip
        same_time = first.timesteps[:1].expand(len(latents_KN) + 1)  # type: ignore[index]
        latents = call.record(
            call.options(_SHORT, len(same_time)), encoded=encoded, timesteps=same_time,
            sample=lambda step, x: latents_KN[step].to(x).reshape(sample.shape), last_step=len(latents_KN),
        )  # fmt: skip
        texts = [call.record(call.options(text), output=None) for text in (_OTHER, "", self._longest())]
        calls = Calls(
            base=first.calls[0][0],
            pair=self._pair(),
            texts=[text.calls[0][0] for text in texts],
            pictures=self._pictures(),
            scales=self._scales(first),
            times=[step[0] for step in times.calls[1:]],
            latents=[step[0] for step in latents.calls[1:]],
        )
        probe = Probe(latents_KN.shape[1], at, _SCALES, int(self._scheduler.config.num_train_timesteps))
        inputs = learn(calls, probe)
        if not _text_leaves(inputs):
            raise ValueError(
                f"its {self.call.denoiser_name} gets nothing that depends on the text, as far as a few texts show; a"
                " larger model.max_sequence_length may be needed"
            )
        return renamed(inputs, _embeddings_name(inputs))

    def _pictures(self) -> list[Inputs]:
        """Calls with another picture."""
        own = self.call.picture
        if own is None:
            return []
        self.call.picture = ImageOps.invert(own)
        try:
            return [self.call.record(self.call.options(_SHORT), output=None).calls[0][0]]
        finally:
            self.call.picture = own

    def _longest(self) -> str:
        """A text that is longer than the text encoders read, as far as the call says."""
        return _WORD * self.call.text_tokens

    def _timesteps(self, first: Recording) -> Tensor:
        """Some timesteps, of the kind that the pipeline's scheduler has."""
        assert first.timesteps is not None
        places = torch.tensor([0.999, 0.9, 0.75, 0.5, 0.3333, 0.25, 0.1, 0.02])
        return (places * self._scheduler.config.num_train_timesteps).to(first.timesteps.dtype)

    def _pair(self) -> Inputs | None:
        """A call of two rows; None for a pipeline that makes none."""
        try:
            recording = self.call.record(self.call.options([_SHORT, _SHORT]), last_step=0)  # type: ignore[arg-type]
        except (ValueError, RuntimeError, IndexError, TypeError):
            return None
        return recording.calls[0][0]

    def _scales(self, first: Recording) -> list[Any]:
        """Calls with guidance scales, for a network that takes it as an input; none where there is no such network."""
        inputs = []
        for scale in _SCALES if "guidance_scale" in self.call.parameters else ():
            recording = self.call.record(self.call.options(_SHORT, guidance_scale=scale), last_step=0)
            if len(recording.calls[0]) > 1 or not _of_same_shapes(recording.calls[0][0], first.calls[0][0]):
                return []
            inputs.append(recording.calls[0][0])
        return inputs

    # --- the output ---------------------------------------------------------------------------------------------------

    def _output(self, first: Recording, latents_KN: Tensor) -> Output:
        template = self.call.template(first.calls[0][0])
        flat, _ = tree_flatten(template)
        total = sum(leaf.numel() for leaf in flat if isinstance(leaf, Tensor))
        values_KM = probes(total)
        recording = self.call.record(
            self.call.options(_SHORT, len(values_KM)),
            encoded=first.encoded,
            output=lambda step, inputs: _filled(template, values_KM[step]),
            sample=lambda step, sample: sample,
            last_step=len(values_KM) - 1,
        )
        size = latents_KN.shape[1]
        if recording.outputs[0].numel() != size:
            raise ValueError(
                f"its scheduler gets an output of {recording.outputs[0].numel()} numbers where latents have {size}"
            )
        order = read(values_KM, torch.stack([output.flatten() for output in recording.outputs]))
        factors = set() if order is None else set(order.factor_M.tolist())
        if order is None or order.offset_M.any() or not order.touched_M.all() or len(factors) != 1:
            raise ValueError("its scheduler gets something else than the network's output in another order")
        return self._placed(template, order.place_M, factors.pop())

    def _placed(self, template: Any, place_N: Tensor, sign: float) -> Output:
        start = 0
        for path, leaf in _paths(template):
            if (place_N >= start).all() and (place_N < start + leaf.numel()).all():
                place_N = place_N - start
                listed = self._is_list_of_rows(path)
                return Output(path[:-1] if listed else path, listed, place_N, sign)
            start += leaf.numel()
        raise ValueError("its scheduler gets parts of several outputs of the network")

    def _is_list_of_rows(self, path: tuple[Any, ...]) -> bool:
        """Whether the last key counts rows: a call of two has then two of them."""
        pair = self._pair()
        if len(path) < 2 or pair is None:
            return False
        both = self.call.template(pair)
        for key in path[:-1]:
            both = both[key]
        return isinstance(both, list) and len(both) == 2

    # --- from latents to the autoencoder ------------------------------------------------------------------------------

    def _tail(self, first: Recording, latents_KN: Tensor) -> dict[str, Any]:
        """The order and scale in which the autoencoder gets latents."""
        sample = first.samples[0]
        decoded = [self.decoded(first.encoded, x_N.reshape(sample.shape).to(sample)) for x_N in latents_KN]
        if any(recording.latents is None for recording in decoded):
            raise ValueError("its call does not end with its autoencoder's decode")
        options = {name: v for name, v in decoded[0].decode_options.items() if name not in ("return_dict", "generator")}
        if any(value is not None for value in options.values()):
            raise ValueError(f"its autoencoder takes {min(options)} beside latents")
        latents = [recording.latents for recording in decoded]
        rows = self.decoded(first.encoded, torch.cat([sample, sample])).latents
        if any(z is not None and len(z) != 1 for z in latents):
            raise ValueError("its autoencoder decodes a video's frames as pictures, one by one")
        order = read(latents_KN, torch.stack([z.flatten() for z in latents if z is not None]))
        if order is None or not order.is_permutation(latents_KN.shape[1]):
            raise ValueError("its autoencoder gets something else than the latents in another order and scale")
        assert latents[0] is not None
        shape = tuple(latents[0].shape[1:])
        if len(shape) == 4 and self.call.frames_name is None:
            if shape[1] != 1:
                raise ValueError(f"its autoencoder decodes a picture as a video of {shape[1]} frames")
            shape = (shape[0], *shape[2:])
        return {
            "latent_shape": shape,
            "place_N": order.place_M,
            "scale_N": order.factor_M.float(),
            "offset_N": order.offset_M.float(),
            "decodes_rows": rows is not None and rows.shape[0] == 2,
        }

    def decoded(self, encoded: list[Any], latents: Tensor) -> Recording:
        """What the autoencoder gets for latents (B, ...) at the end of the loop."""
        return self.call.record(
            self.call.options(_SHORT, 2),  # a call of one step may be that of a distilled model
            encoded=encoded,
            sample=lambda step, sample: latents.to(sample) if step else sample,
        )

    # --- guidance -----------------------------------------------------------------------------------------------------

    def _guidance(self, learnt: Learnt, first: Recording) -> Learnt:
        """The form of guidance by a pair of calls, or the reason why there is none."""
        if self.call.scale_name is None:
            return replace(learnt, unguidable="the pipeline has no guidance scale")
        try:
            recording = self.call.record(self.call.guided(_SHORT, "", _SCALES[0]), last_step=0)
            rows = guided_rows(learnt, recording.calls[0])
            if len(rows) != 2:
                return replace(learnt, unguidable=f"the pipeline guides by {len(rows)} calls a step")
            own = [_equal_texts(text_of(learnt, row), text_of(learnt, first.calls[0][0])) for row in rows]
            if sum(own) != 1:
                return replace(learnt, unguidable="guided, the pipeline encodes a text otherwise than unguided")
            doubled = len(recording.calls[0]) == 1
            learnt = replace(learnt, unconditional_first=own[1], doubled=doubled)
            form = guidance_of([self._combined(learnt, recording, scale) for scale in _SCALES])
        except (ValueError, RuntimeError) as error:
            return replace(learnt, unguidable=f"the pipeline's guidance could not be learnt ({error})")
        unknown = "the pipeline combines the outputs of guidance in a way that is not known here"
        return replace(learnt, guidance=form, unguidable="" if form else unknown)

    def _combined(self, learnt: Learnt, recording: Recording, scale: float) -> Combined:
        """What the pipeline makes of random outputs."""
        generator = torch.Generator().manual_seed(1)
        given: list[Tensor] = []

        def output(step: int, inputs: Inputs) -> Any:
            made = tree_map(lambda leaf: _normal(leaf, generator), self.call.template(inputs))
            given.extend(learnt.output.read(made, 2 if learnt.doubled else 1))
            return made

        options = self.call.guided(_SHORT, "", scale)
        result = self.call.record(options, encoded=recording.encoded, output=output, last_step=0).outputs[0]
        unconditional, conditional = given if learnt.unconditional_first else given[::-1]
        shape = (1, *learnt.shape)
        return Combined(unconditional.reshape(shape), conditional.reshape(shape), scale, result.reshape(shape))


def _text_leaves(inputs: Argument) -> list[FromText]:
    texts = [leaf for leaf in leaves(inputs) if isinstance(leaf, FromText)]
    besides = [leaf.beside for leaf in leaves(inputs) if isinstance(leaf, FromLatents)]
    return [*texts, *(beside for beside in besides if isinstance(beside, FromText))]


def text_of(learnt: Learnt, inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of a prompt, out of a call of one row."""
    return learnt.inputs.text(inputs, "")


def guided_rows(learnt: Learnt, calls: list[Inputs]) -> list[Inputs]:
    """The rows of a guided step, each as a call of one row."""
    if len(calls) > 1:
        return calls
    return [learnt.inputs.row(calls[0], place) for place in range(2)]


def _equal_texts(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(a[n].shape == b[n].shape and torch.allclose(a[n].float(), b[n].float(), atol=1e-3) for n in a)


def _embeddings_name(inputs: Argument) -> dict[str, str]:
    """The name `prompt_embeds` for the largest tensor that a text gives, as policies call it."""
    texts = [leaf for leaf in leaves(inputs) if isinstance(leaf, FromText) and len(leaf.shape) == 2]
    if not texts:
        return {}
    largest = max(texts, key=lambda leaf: torch.Size(leaf.shape).numel())
    return {largest.name: "prompt_embeds"}


def _same(a: Any, b: Any) -> bool:
    pairs = zip(tree_flatten(a)[0], tree_flatten(b)[0], strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def _of_same_shapes(a: Any, b: Any) -> bool:
    one, two = tree_flatten(a)[0], tree_flatten(b)[0]
    return len(one) == len(two) and all(
        x.shape == y.shape if isinstance(x, Tensor) and isinstance(y, Tensor) else type(x) is type(y)
        for x, y in zip(one, two, strict=True)
    )


def _paths(output: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Tensor]]:
    """The tensors in an output, in the order of `tree_flatten`, with the keys that lead to them."""
    if isinstance(output, Tensor):
        return [(path, output)]
    if isinstance(output, Mapping):
        return [leaf for key in output for leaf in _paths(output[key], (*path, key))]
    if isinstance(output, list | tuple):
        return [leaf for place, part in enumerate(output) for leaf in _paths(part, (*path, place))]
    return []


def _filled(template: Any, values_M: Tensor) -> Any:
    """The output with these numbers, in the order of `_paths`."""
    start = 0

    def fill(leaf: Any) -> Any:
        nonlocal start
        if not isinstance(leaf, Tensor):
            return leaf
        part = values_M[start : start + leaf.numel()].reshape(leaf.shape).to(leaf)
        start += leaf.numel()
        return part

    return tree_map(fill, template)


def _normal(leaf: Any, generator: torch.Generator) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.randn(leaf.shape, generator=generator).to(leaf)
