"""The protocol of policies: a model whose denoiser is trained, with its text encoders and its decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import Parameter

from progrpo.diffusion.levels import Levels
from progrpo.policies.settings import ModelSettings
from progrpo.policies.tokens import Truncation
from progrpo.policies.weights import NamedWeights
from progrpo.types import Condition, Pictures, Prompt


@dataclass(frozen=True)
class PolicyContext:
    """The surroundings of a policy: what it needs beside the settings of its model."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    lora_seed: int = 0
    """The seed of a fresh LoRA's first matrices, which do not depend on the global generator."""
    world_size: int = 1
    """The number of processes.

    They make network calls together where `ModelSettings.shard` shares weights out among them.
    """
    decoder_for_previews: str = ""
    """An AutoencoderTiny: the built-in `shapes-tiny`, a folder or a hub id. Empty: the model's own autoencoder."""
    guide_away_from: str = ""
    """The negative prompt of classifier-free guidance. Empty: the one that the pipeline takes when none is given."""


def torch_dtype(settings: ModelSettings) -> torch.dtype:
    """The dtype of the settings, in which `auto` has been resolved."""
    assert settings.dtype != "auto"
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype


class Policy(Protocol):
    """A model that makes pictures from text, or from text and a picture, and whose denoiser is trained.

    All other networks are frozen, and there is no dropout: the same inputs give the same output in sampling and in
    training, up to rounding (see `batch_invariant`).
    """

    denoiser_name: str
    """The name of the trained component in diffusers' pipeline: `transformer` or `unet`."""
    edits: bool
    """Whether the model changes a picture, which every prompt must bring in its column `image`."""
    fingerprints: Mapping[str, str]
    """A digest of the weights of each network (denoiser, text encoders, VAE), as they are before training."""
    ignored: str
    """One sentence about what the pipeline's own sampling does and this policy's does not; empty for nothing."""
    prediction: str
    """The meaning of the network's output, a name of `progrpo.diffusion.prediction.PREDICTIONS`."""

    latent_shape: tuple[int, ...]
    """The shape of one latent: (C, H, W), or (C, F, H, W) of a video."""
    device: torch.device
    trainable: Mapping[str, Parameter]
    """The parameters that the optimizer changes, by their name in the denoiser."""
    named_weights: NamedWeights
    """The trainable weights and their copies: `reference` from the start, and `old` or `ema` if the trainer adds them.

    Their `state_dict` is the policy's state: frozen weights are not in it."""
    embeds_guidance: bool
    """Whether guidance is an input of the network, as in FLUX.1-dev: it then costs no second call."""
    compiled: bool
    """Whether the network is compiled anew for each shape that it meets, so that shapes should be few."""
    compiled_decoder: bool
    """Whether the decoder of pictures is compiled anew for each shape, likewise."""

    batch_invariant: bool
    """Whether a row's output is the same, to a few float32 steps, in a call of any size, with and without gradients.

    False on a GPU, whose kernels differ by shape, and for a network that is compiled in low precision. On a CPU it
    depends on the processor and the dtype, so `measure_batch_invariance` decides.
    """

    @property
    def drain_peer_calls(self) -> Callable[[], None] | None:
        """The call that a process makes before it waits for others: it takes part in their network calls.

        None where each process makes its network calls alone.
        """
        ...

    def levels(self, num_inference_steps: int, shift: float | None = None) -> Levels:
        """The model's grid from noise to data, float32 (T+1,) on the CPU. `shift` replaces the one of a flow model."""
        ...

    def levels_between(self, levels_T1: Levels, place_B: Tensor) -> Levels:
        """The levels (B,) at places (float64) in [0, T] of that grid."""
        ...

    def measure_batch_invariance(self, sampled: Iterable[int], trained: Iterable[int]) -> bool:
        """Measure whether the network is batch-invariant, keep it as `batch_invariant` and return it.

        Calls have `sampled` rows without gradients, and `trained` rows with them. Nothing is measured where it is False
        already.
        """
        ...

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Encode each prompt as one row on the policy's device: its text and, for a policy that `edits`, its picture.

        One of the tensors is `prompt_embeds`, (P, tokens, width). ValueError for a new text after
        `release_text_encoders`, and for a picture that is missing or cannot be read.
        """
        ...

    def truncation(self, texts: Sequence[str]) -> Truncation:
        """Count the texts that are longer than the text encoders read, also after `release_text_encoders`."""
        ...

    def release_text_encoders(self) -> None:
        """Free the text encoders. Prompts that were encoded before can still be asked for."""
        ...

    def predict(self, x_BCHW: Tensor, timestep: Tensor, condition: Condition, guidance_scale: float = 1.0) -> Tensor:
        """The network's output at x, float32, in x's shape.

        `timestep` is () or (B,), and row b of `condition` belongs to row b of x. A `guidance_scale` w other than 1 is
        classifier-free guidance, o_u + w (o_c - o_u), with gradients through both branches and twice the cost. For a
        network that `embeds_guidance` w is an input, also where it is 1.
        """
        ...

    def encode_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Encode RGB pictures to latents, float32 (N, *latent_shape) on the policy's device, without gradients.

        A picture of another size than the model's is resized and cropped. ValueError for a model of videos.
        """
        ...

    def decode(self, x0_BCHW: Tensor) -> Pictures:
        """Decode latents to pictures on the CPU, without gradients; videos with all their frames."""
        ...

    def preview(self, x0_BCHW: Tensor) -> Pictures:
        """Decode latents for a preview: by the tiny decoder where the policy has one."""
        ...

    def weights(self, name: str) -> AbstractContextManager[None]:
        """Run the block with the weights `name`: `current`, or one of `named_weights`."""
        ...

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """The denoiser's tensors that training must not move, with their names."""
        ...

    def save(self, folder: Path | None, weights: str = "current") -> None:
        """Write the trained weights in a format that diffusers loads without progrpo.

        All processes call it, since weights may be shared out among them; one has a folder.
        """
        ...
