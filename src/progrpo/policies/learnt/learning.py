"""The learning of a pipeline from its own call: arguments, outputs, latents and guidance of its denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from progrpo.policies.learnt.argument import Argument, FromGuidance, FromLatents, FromText, leaves, renamed
from progrpo.policies.learnt.call import LONGER_TEXT, TEXT, PipelineCall
from progrpo.policies.learnt.comparison import Calls, Probe, learn
from progrpo.policies.learnt.guidance import Combined, Guidance, guidance_of
from progrpo.policies.learnt.output import Output, learn_output
from progrpo.policies.learnt.rearranged import inverse, probes, read
from progrpo.policies.learnt.recording import Inputs, Recording

_WORD = "boat "
_SCALES = (3.5, 7.0)


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
    """The places of a latent's numbers in the pipeline's."""
    scale_N: Tensor
    """The factors of these numbers in the autoencoder's input, in the autoencoder's order."""
    offset_N: Tensor
    """The numbers that are added to these products."""
    decodes_rows: bool
    """Whether the pipeline decodes more latents at its end than it began with; otherwise rows are decoded in turn."""
    encoded: list[Any]
    """The results of `encode_prompt` for a text, for calls in which no text matters."""
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
        """The parts of the arguments that a prompt gives."""
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
            output=learn_output(self.call, first, latents_KN.shape[1]),
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
            recording = self.call.record(self.call.options(TEXT), last_step=0)
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
            self.call.options(TEXT),
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
            call.options(TEXT, len(later)), encoded=encoded, timesteps=later.to(sample.device),
            sample=lambda step, x: sample, last_step=len(later) - 1,
        )  # fmt: skip
        same_time = first.timesteps[:1].expand(len(latents_KN) + 1)  # type: ignore[index]
        latents = call.record(
            call.options(TEXT, len(same_time)), encoded=encoded, timesteps=same_time,
            sample=lambda step, x: latents_KN[step].to(x).reshape(sample.shape), last_step=len(latents_KN),
        )  # fmt: skip
        texts = [call.record(call.options(text), output=None) for text in (LONGER_TEXT, "", self._longest())]
        calls = Calls(
            base=first.calls[0][0],
            pair=self.call.pair,
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
        if self.call.picture is None:
            return []
        with self.call.showing(ImageOps.invert(self.call.picture)):
            return [self.call.record(self.call.options(TEXT), output=None).calls[0][0]]

    def _longest(self) -> str:
        """A text that is longer than the text encoders read, as far as the call says."""
        return _WORD * self.call.text_tokens

    def _timesteps(self, first: Recording) -> Tensor:
        """Some timesteps, of the kind that the pipeline's scheduler has."""
        assert first.timesteps is not None
        places = torch.tensor([0.999, 0.9, 0.75, 0.5, 0.3333, 0.25, 0.1, 0.02])
        return (places * self._scheduler.config.num_train_timesteps).to(first.timesteps.dtype)

    def _scales(self, first: Recording) -> list[Any]:
        """Calls with guidance scales, for a network that takes it as an input; none where there is no such network."""
        inputs, name = [], self.call.embedded_scale_name
        if name is None:
            return []
        for scale in _SCALES:
            recording = self.call.record(self.call.options(TEXT) | {name: scale}, last_step=0)
            if len(recording.calls[0]) > 1 or not _of_same_shapes(recording.calls[0][0], first.calls[0][0]):
                return []
            inputs.append(recording.calls[0][0])
        return inputs

    # --- from latents to the autoencoder ------------------------------------------------------------------------------

    def _tail(self, first: Recording, latents_KN: Tensor) -> dict[str, Any]:
        """The order and scale in which the autoencoder gets latents."""
        sample = first.samples[0]
        decoded = [self.call.decoded(first.encoded, x_N.reshape(sample.shape).to(sample)) for x_N in latents_KN]
        if any(recording.latents is None for recording in decoded):
            raise ValueError("its call does not end with its autoencoder's decode")
        options = {name: v for name, v in decoded[0].decode_options.items() if name not in ("return_dict", "generator")}
        if any(value is not None for value in options.values()):
            raise ValueError(f"its autoencoder takes {min(options)} beside latents")
        latents = [recording.latents for recording in decoded]
        rows = self.call.decoded(first.encoded, torch.cat([sample, sample])).latents
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

    # --- guidance -----------------------------------------------------------------------------------------------------

    def _guidance(self, learnt: Learnt, first: Recording) -> Learnt:
        """The form of guidance by a pair of calls, or the reason why there is none."""
        if self.call.scale_name is None:
            return replace(learnt, unguidable="the pipeline has no guidance scale")
        try:
            recording = self.call.record(self.call.guided(TEXT, "", _SCALES[0]), last_step=0)
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
        """Random outputs, and the pipeline's combination of them at this scale."""
        generator = torch.Generator().manual_seed(1)
        given: list[Tensor] = []

        def output(step: int, inputs: Inputs) -> Any:
            made = tree_map(lambda leaf: _normal(leaf, generator), self.call.template(inputs))
            given.extend(learnt.output.read(made, 2 if learnt.doubled else 1))
            return made

        options = self.call.guided(TEXT, "", scale)
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


def _normal(leaf: Any, generator: torch.Generator) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.randn(leaf.shape, generator=generator).to(leaf)
