"""A diffusers pipeline as a policy: a family, and the four parts that all families share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from progrpo.diffusion.levels import Levels
from progrpo.policies.decoding import PictureDecoder, fault_of, load_tiny_decoder, unscale_tiny
from progrpo.policies.denoiser_call import DenoiserCall
from progrpo.policies.encoding import latents_of
from progrpo.policies.family import ModelFamily
from progrpo.policies.offload import offloader_of
from progrpo.policies.prepare import Prepared
from progrpo.policies.saving import TrainedWeights
from progrpo.policies.text_cache import TextCache
from progrpo.policies.tokens import Truncation
from progrpo.types import Condition, Pictures, Prompt


class PipelinePolicy:
    """A prepared pipeline: `progrpo.policies.base.Policy` says what each method promises."""

    def __init__(self, prepared: Prepared) -> None:
        family = prepared.family
        self.family = family
        self.pipeline = family.pipeline
        self.denoiser = family.denoiser
        self.denoiser_name = family.denoiser_name
        self.edits = family.edits
        self.prediction = family.prediction
        self.device = family.device
        self.latent_shape = family.latent_shape
        self.fingerprints = prepared.fingerprints
        self.ignored = prepared.ignored
        self.compiled = family.settings.compile
        self.compiled_decoder = prepared.compiled_decoder
        self.texts = TextCache(family)
        self.decoder, self.previewer = _decoders(family)
        self._offloader = offloader_of(family) if family.settings.offload else None
        self.trained = TrainedWeights(family, prepared.shared)
        self.trainable = self.trained.trainable
        self.named_weights = self.trained.named
        self.network = DenoiserCall(family, self.named_weights, prepared.shared)
        self.embeds_guidance = self.network.embeds_guidance
        self.batch_invariant = _may_be_batch_invariant(prepared)
        if family.settings.activation_checkpointing:
            for denoiser in family.denoisers.values():
                denoiser.enable_gradient_checkpointing(self.network.checkpointed)

    @property
    def drain_peer_calls(self) -> Callable[[], None] | None:
        return None if self.network.peers is None else self.network.peers.drain

    def levels(self, num_inference_steps: int, shift: float | None = None) -> Levels:
        return self.family.levels(num_inference_steps, shift)

    def levels_between(self, levels_T1: Levels, place_B: Tensor) -> Levels:
        return self.family.levels_between(levels_T1, place_B)

    def measure_batch_invariance(self, sampled: Iterable[int], trained: Iterable[int]) -> bool:
        if self.batch_invariant:
            timestep = self.levels(2).timestep[1]
            self.batch_invariant = self.network.is_batch_invariant(timestep, self.texts.unconditional, sampled, trained)
        return self.batch_invariant

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        return self.texts.encode(prompts)

    def truncation(self, texts: Sequence[str]) -> Truncation:
        return self.texts.truncation(texts)

    def release_text_encoders(self) -> None:
        self.texts.release()
        if self._offloader is not None:
            self._offloader.keep_only(self.denoiser)
        for name in self.pipeline.components:
            if name.startswith("text_encoder"):
                setattr(self.pipeline, name, None)

    def predict(self, x_BCHW: Tensor, timestep: Tensor, condition: Condition, guidance_scale: float = 1.0) -> Tensor:
        timestep_B = timestep.to(x_BCHW.device, torch.float32).expand(len(x_BCHW))
        if self.embeds_guidance:
            guidance_B = torch.full_like(timestep_B, guidance_scale)
            condition = Condition({**condition.tensors, "guidance": guidance_B})
        elif guidance_scale != 1.0:
            unconditional = self.texts.unconditional
            return self.network.guided_output(x_BCHW, timestep_B, condition, unconditional, guidance_scale)
        return self.network.output(x_BCHW, timestep_B, condition)

    def encode_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        return latents_of(self.family, pictures)

    def decode(self, x0_BCHW: Tensor) -> Pictures:
        return self.decoder.decode(x0_BCHW)

    def preview(self, x0_BCHW: Tensor) -> Pictures:
        return self.decode(x0_BCHW) if self.previewer is None else self.previewer.decode(x0_BCHW)

    def weights(self, name: str) -> AbstractContextManager[None]:
        return self.named_weights.swapped(name)

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        return self.trained.frozen()

    def save(self, folder: Path | None, weights: str = "current") -> None:
        self.trained.save(folder, weights)


def _decoders(family: ModelFamily) -> tuple[PictureDecoder, PictureDecoder | None]:
    """The decoder of pictures, and the one of previews if there is another."""
    vae, latents_fault = family.pipeline.vae, fault_of(family.denoiser_name, family.dtype)
    decoder = PictureDecoder(vae, family.unscale, "decoder", latents_fault)
    if not family.context.decoder_for_previews:
        return decoder, None
    tiny = load_tiny_decoder(vae, family.latent_channels, family.context)
    return decoder, PictureDecoder(tiny, unscale_tiny(tiny), "tiny decoder", latents_fault)


def _may_be_batch_invariant(prepared: Prepared) -> bool:
    """Whether the network may be batch-invariant, as far as is known without measuring.

    It is not on a GPU, compiled in low precision, and where processes make calls together.
    """
    settings, device = prepared.family.settings, prepared.family.device
    same_network = settings.dtype == "float32" or not settings.compile
    return same_network and device.type == "cpu" and not prepared.shared
