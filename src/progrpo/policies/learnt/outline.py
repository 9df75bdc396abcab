"""Recorded pipelines without weights: their calls are recorded with what their encoders would give, for sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from progrpo.policies.learnt.call import CallOptions, PipelineCall
from progrpo.policies.learnt.family import RecordedFlow, recorded_kind
from progrpo.policies.learnt.recording import Inputs

Encoded = Callable[[Any, int], tuple[Any, ...]]
_TOKENS_OF_A_SOURCE = 14 * 14
"""The tokens of a source that Qwen-Image-Edit-Plus shows its encoder: 384 pixels, in patches of 28."""


def _z_image(network: Any, tokens: int) -> tuple[Any, ...]:
    embeds_LD = torch.zeros(tokens, network.cap_feat_dim)
    return [embeds_LD], [embeds_LD]


def _sana(network: Any, tokens: int) -> tuple[Any, ...]:
    one = torch.zeros(1, tokens, network.caption_channels), torch.ones(1, tokens, dtype=torch.int64)
    return (*one, *one)


def _qwen_image_edit_plus(network: Any, tokens: int) -> tuple[Any, ...]:
    return torch.zeros(1, _TOKENS_OF_A_SOURCE + tokens, network.joint_attention_dim), None


ENCODED: Mapping[str, Encoded] = {
    "ZImagePipeline": _z_image,
    "SanaPipeline": _sana,
    "QwenImageEditPlusPipeline": _qwen_image_edit_plus,
}
"""The result of a pipeline's `encode_prompt` for a text of so many tokens, by the network's configuration."""


class Outlined(RecordedFlow):
    """A recorded flow model on the meta device, with the shapes of its call in place of what is learnt of it."""

    has_weights: ClassVar[bool] = False
    encoded: ClassVar[Encoded]

    def learn(self) -> None:
        size = self.size if self.settings.resolution else None
        options = CallOptions(size, self.settings.frames, self.settings.max_sequence_length)
        self.call = PipelineCall(self.pipeline, self.denoiser_name, options, self.run_network, torch.device("cpu"))
        if self.edits:
            self.call.picture = self._fitted(self.any_picture())
        encoded = type(self).encoded(self.denoiser.config, self.call.text_tokens)
        self._encoded = [tree_map(lambda leaf: self._in_dtype(leaf), encoded)]
        # without guidance, which some pipelines turn off at a scale of 0 and not of 1
        self.call.unguided = min((1.0, 0.0), key=lambda scale: _numbers(self._first_inputs(scale)))
        self._row = self._first_inputs(self.call.unguided)
        latents = self.call.record(self.call.options(""), encoded=self._encoded).latents
        assert latents is not None
        self._decoded_shape = latents.shape[1:]
        self.latent_shape = tuple(side for side in self._decoded_shape if side != 1)

    def _in_dtype(self, leaf: Any) -> Any:
        return leaf.to(self.dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    def _first_inputs(self, scale: float) -> Inputs:
        self.call.unguided = scale
        return self.call.record(self.call.options(""), encoded=self._encoded, output=None).calls[0][0]

    @torch.no_grad()
    def run_network(self, inputs: Inputs) -> Any:
        """The network's output, on the CPU where the pipeline goes on with it."""
        on_meta = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, inputs)
        output = self.denoiser(**on_meta)
        return tree_map(lambda leaf: torch.zeros_like(leaf, device="cpu") if isinstance(leaf, Tensor) else leaf, output)

    @property
    def embeds_guidance(self) -> bool:
        return False

    def outline_call(self, rows: int) -> Tensor:
        inputs = {name: _repeated(value, rows) for name, value in self._row.items()}
        outputs = [leaf for leaf in tree_leaves(self.denoiser(**inputs)) if isinstance(leaf, Tensor)]
        return torch.stack(outputs).float() if len(outputs) > 1 else outputs[0].float()

    def outline_latents(self, rows: int) -> Tensor:
        return torch.empty(rows, *self._decoded_shape)


def _numbers(inputs: Inputs) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))


def _repeated(value: Any, rows: int) -> Any:
    """An argument of one row as that of so many, without content."""
    if isinstance(value, Tensor):
        return torch.empty(rows, *value.shape[1:], dtype=value.dtype) if len(value) == 1 else torch.empty_like(value)
    if isinstance(value, list) and len(value) == 1:
        return [tree_map(lambda leaf: _empty(leaf), value[0]) for _ in range(rows)]
    return value


def _empty(leaf: Any) -> Any:
    return torch.empty(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, Tensor) else leaf


def outlined_kind(pipeline_name: str, denoiser_name: str) -> type[Outlined] | None:
    """The outlined family of a class of pipelines; None for a class whose encoded texts are not known here."""
    if pipeline_name not in ENCODED:
        return None
    recorded = recorded_kind(pipeline_name, denoiser_name)
    assert recorded is not None
    own = {name: getattr(recorded, name) for name in ("denoiser_name", "omitted_components", "edits")}
    return type("Outlined", (Outlined,), {**own, "encoded": staticmethod(ENCODED[pipeline_name])})
