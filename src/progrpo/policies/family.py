"""The base of a model family: what one kind of diffusers pipeline knows and the others do not.

Another family is one file with one class, and a line in `progrpo.policies.load.FAMILIES`. Its methods may count on
`pipeline`, `denoiser`, `settings`, `context`, `dtype` and `device`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from inspect import signature
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image
from torch import Tensor

from progrpo.diffusion.levels import Levels
from progrpo.policies.base import PolicyContext, torch_dtype
from progrpo.policies.experts import denoiser_of, parts_of
from progrpo.policies.geometry import Geometry
from progrpo.policies.settings import ModelSettings
from progrpo.policies.tokens import Reader
from progrpo.types import Condition

NEGATIVE = "negative_"
"""The beginning of names in a condition of what guidance leads away from, where each prompt has its own."""


class TextHooks(ABC):
    """The half of a family that turns a prompt into tensors."""

    pipeline: DiffusionPipeline
    settings: ModelSettings

    edits: ClassVar[bool] = False
    """Whether the model changes a picture that the prompt brings."""
    default_negative_prompt: ClassVar[str] = ""
    """The negative prompt where none is given."""

    @abstractmethod
    def encode_text(self, text: str) -> dict[str, Tensor]:
        """Encode one text: named tensors, each with a first dimension of 1."""

    def encode_negative(self, text: str) -> dict[str, Tensor]:
        """Encode what guidance leads away from, likewise."""
        return self.encode_text(text)

    def encode_picture(self, image: Image.Image) -> dict[str, Tensor]:
        """Encode the picture that is to be changed, likewise. Only families that `edits` are asked."""
        raise NotImplementedError

    def encode_both(self, text: str, image: Image.Image) -> dict[str, Tensor]:
        """Encode what the text and the picture give together, likewise. Only families that say `reads_both` are asked.

        What guidance leads away from is then of that picture too: it has the same names after `NEGATIVE`.
        """
        raise NotImplementedError

    @property
    def reads_both(self) -> bool:
        """Whether an encoder reads the text and the picture together."""
        return False

    @abstractmethod
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of a prompt's tensors without their first dimension, known without encoding anything.

        `prompt_embeds` (tokens, width) is one of them: a probe reads it.
        """

    @property
    def zero_embeddings_for_no_prompt(self) -> bool:
        """Whether guidance leads away from zeros, and not from an encoded text, where no negative prompt is given."""
        return False

    @property
    def text_tokens(self) -> int:
        """The number of tokens that the network reads: that of the settings, or of the pipeline's own call."""
        if self.settings.max_sequence_length is not None:
            return self.settings.max_sequence_length
        own: int = signature(type(self.pipeline).__call__).parameters["max_sequence_length"].default
        return own

    def text_readers(self) -> list[Reader]:
        """The text encoders as readers of so many tokens: CLIP reads what its tokenizer says, others `text_tokens`."""
        readers, components = [], self.pipeline.components
        for suffix in ("", "_2", "_3"):
            encoder, tokenizer = components.get(f"text_encoder{suffix}"), components.get(f"tokenizer{suffix}")
            if encoder is not None and tokenizer is not None:
                clip = encoder.config.model_type.startswith("clip")
                limit = tokenizer.model_max_length if clip else self.text_tokens
                readers.append(Reader(f"text_encoder{suffix}", tokenizer, limit, not clip, self.tokenizer_text))
        return readers

    def tokenizer_text(self, text: str) -> str:
        """The text as the pipeline hands it to the tokenizers."""
        return text


class ModelFamily(TextHooks):
    """One kind of diffusers pipeline, with the pipeline that is made into a policy."""

    denoiser_name: ClassVar[str]
    """The pipeline's component that is trained."""
    lora_targets: ClassVar[tuple[str, ...]]
    """The layers that a LoRA adapts if nothing else is asked, as endings of module names; `*` stands for anything."""
    vae_dtype: ClassVar[torch.dtype | None] = None
    """The autoencoder's dtype, where it is not the model's."""
    plain_attention: ClassVar[type | None] = None
    """An attention processor of matrix products for the denoiser; None where there is none for its kind."""
    channels_last: ClassVar[bool] = False
    """Whether the denoiser is faster on a GPU with its weights in channels-last order."""
    omitted_components: ClassVar[Mapping[str, object]] = {}
    """The components that are never loaded, with what the pipeline gets in their place."""

    def __init__(self, pipeline: DiffusionPipeline, settings: ModelSettings, context: PolicyContext) -> None:
        self.pipeline = pipeline
        self.settings = settings
        self.context = context
        self.dtype = torch_dtype(settings)
        self.device = context.device
        self.denoisers: Mapping[str, ModelMixin] = parts_of(pipeline, self.denoiser_name)
        """The networks that are trained, by their names in the pipeline: one, or two by noise level."""
        self.denoiser: Any = denoiser_of(pipeline, self.denoiser_name)
        """Them as one network."""
        self.size: tuple[int, int] = (0, 0)
        """Height and width of pictures in pixels, as `prepare` finds them."""
        self.latent_shape: tuple[int, ...] = ()
        """The shape of one latent, likewise: (C, H, W), or (C, F, H, W) of a video."""

    @classmethod
    def check_index(cls, index: Mapping[str, object]) -> None:
        """ValueError for a pipeline that cannot be trained, as far as its model_index.json tells."""

    @abstractmethod
    def check(self) -> None:
        """ValueError for a pipeline that cannot be trained."""

    def learn(self) -> None:
        """Learn from the pipeline what is not known of it, when its networks are on the device."""

    def default_lora_targets(self) -> tuple[str, ...]:
        """The layers that a LoRA adapts if nothing else is asked."""
        return self.lora_targets

    @property
    def negative_prompt(self) -> str:
        """The text that guidance leads away from."""
        return self.context.guide_away_from or self.default_negative_prompt

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the network."""
        return bool(getattr(self.denoiser.config, "guidance_embeds", False))

    def ignored(self) -> str:
        """One sentence about what the pipeline's own loop does and sampling here does not; empty for nothing."""
        return ""

    def geometry(self) -> Geometry:
        """The sizes of the model's latents and pictures."""
        scale: int = self.pipeline.vae_scale_factor
        side = self.denoiser.config.sample_size
        return Geometry(self.latent_channels, scale, None if side is None else (side * scale, side * scale))

    @property
    def latent_channels(self) -> int:
        """The channels of a latent."""
        config = self.pipeline.vae.config
        channels: int = config.z_dim if "z_dim" in config else config.latent_channels  # z_dim: autoencoders of videos
        return channels

    @property
    def loaded_vae_dtype(self) -> torch.dtype:
        """The dtype that the autoencoder decodes in."""
        return self.vae_dtype or self.dtype

    @property
    @abstractmethod
    def prediction(self) -> str:
        """The meaning of the network's output, a name of `progrpo.diffusion.prediction.PREDICTIONS`."""

    @abstractmethod
    def levels(self, num_inference_steps: int, shift: float | None = None) -> Levels:
        """The model's grid from noise to data: see `Policy.levels`."""

    @abstractmethod
    def levels_between(self, levels_T1: Levels, place_B: Tensor) -> Levels:
        """Levels at places of that grid: see `Policy.levels_between`."""

    @abstractmethod
    def denoise(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        """Call the network once: its output in the shape of x, in any dtype."""

    def combine_guidance(self, unconditional_BCHW: Tensor, conditional_BCHW: Tensor, guidance_scale: float) -> Tensor:
        """Combine the two outputs of classifier-free guidance."""
        return unconditional_BCHW + guidance_scale * (conditional_BCHW - unconditional_BCHW)

    @abstractmethod
    def unscale(self, x0_BCHW: Tensor) -> Tensor:
        """Latents as the autoencoder decodes them: each number times a factor of its place, plus another."""

    def outline_call(self, rows: int) -> Tensor:
        """The output of a call of so many rows whose numbers do not matter: for sizes, in a mode without content."""
        shapes = self.condition_shapes() | ({"guidance": ()} if self.embeds_guidance else {})
        inputs = {name: torch.empty(rows, *shape, dtype=self.dtype) for name, shape in shapes.items()}
        return self.denoise(torch.empty(rows, *self.latent_shape), torch.empty(rows), Condition(inputs)).float()

    def outline_latents(self, rows: int) -> Tensor:
        """Latents in the shape that the autoencoder decodes, likewise."""
        return self.unscale(torch.empty(rows, *self.latent_shape))

    def scale(self, latents_BCHW: Tensor) -> Tensor:
        """Latents as the network takes them, from those that the autoencoder gives: the inverse of `unscale`."""
        zero = latents_BCHW.new_zeros(1, *self.latent_shape)
        offset = self.unscale(zero)
        x0_BCHW: Tensor = (latents_BCHW - offset) / (self.unscale(zero + 1) - offset)
        return x0_BCHW.reshape(len(latents_BCHW), *self.latent_shape)


def require_text_encoder(pipeline: DiffusionPipeline) -> None:
    """ValueError for a pipeline without its one text encoder."""
    if pipeline.text_encoder is None:
        raise ValueError("model.path: the pipeline lacks its text encoder; load it with the pipeline")


GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
"""Settings by which diffusers' schedulers lay their grid otherwise."""


def unused_settings(scheduler: object, names: tuple[str, ...], instead: str) -> str:
    """One sentence about those of these settings that a pipeline's scheduler has on and sampling here does not read."""
    on = [name for name in names if scheduler.config.get(name)]  # type: ignore[attr-defined]
    verb = "is" if len(on) == 1 else "are"
    return f"the {type(scheduler).__name__}'s {' and '.join(on)} {verb} not used: {instead}" if on else ""
