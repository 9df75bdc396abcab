"""What a policy is: a denoiser that can be told a prompt, stepped, decoded, trained and saved. Nothing here runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from progrpo.diffusion.levels import Levels
from progrpo.policies.settings import ModelSettings
from progrpo.policies.tokens import Truncation
from progrpo.policies.weights import NamedWeights
from progrpo.types import Condition, Pictures, Prompt


@dataclass(frozen=True)
class PolicyContext:
    """The surroundings of a policy: what it needs beside the settings of its model.

    A fresh LoRA's first matrices follow from `lora_seed` alone, whatever the global generator's state. `world_size` processes make
    network calls together where `ModelSettings.shard` shares the weights out among them.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    lora_seed: int = 0
    world_size: int = 1
    decoder_for_previews: str = ""
    """An AutoencoderTiny: the built-in `shapes-tiny`, a folder or a hub id. Empty: previews are decoded by the autoencoder."""
    guide_away_from: str = ""
    """The negative prompt of classifier-free guidance. Empty: the one that the model's pipeline takes when none is given."""


def torch_dtype(settings: ModelSettings) -> torch.dtype:
    """Torch's dtype of the settings, in which `auto` has been resolved."""
    assert settings.dtype != "auto"
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype


class Policy(Protocol):
    """A model of pictures from text, or from text and a picture, whose denoiser is trained; one file per model family implements it.

    Everything outside the denoiser is frozen, and there is no dropout anywhere: the same inputs give the same output
    in sampling and in training, up to rounding (see `batch_invariant`).
    """

    denoiser_name: str
    """`transformer` or `unet`: what diffusers' pipeline calls the part that is trained."""
    edits: bool
    """Whether the model changes a picture: every prompt must then have one, its column `image` (`progrpo.prompts.pictures`)."""
    fingerprints: Mapping[str, str]
    """What tells the weights of each part (the denoiser, the text encoders, the VAE) from another model's, as they are before training."""
    ignored: str
    """What the pipeline's own sampling would do and this policy's does not, in a sentence; empty for nothing."""
    prediction: str
    """What the network's output means, a name of `progrpo.diffusion.prediction.PREDICTIONS`."""

    latent_shape: tuple[int, ...]
    """(C, H, W) of one latent, of a video (C, F, H, W)."""
    device: torch.device
    trainable: Mapping[str, Parameter]
    """The parameters that the optimizer may change, by their name in the denoiser."""
    named_weights: NamedWeights
    """Copies of the trainable weights: `reference` from the start; the trainer adds `old` or `ema` if it needs them."""
    embeds_guidance: bool
    """Whether guidance is an input of the network, as in FLUX.1-dev: it then costs no second call."""
    compiled: bool
    """Whether the network is compiled anew for each shape that it meets, so that shapes should be few."""
    compiled_decoder: bool
    """The same of what decodes pictures."""

    batch_invariant: bool
    """Whether a row's output is the same, to a few float32 steps, however many rows are with it and whether gradients are kept.

    False on a GPU, whose kernels differ by shape, and for networks compiled in low precision, of which there are two. On a CPU
    it depends on the processor and the dtype, so `measure_batch_invariance` has the last word."""

    @property
    def drain_peer_calls(self) -> Callable[[], None] | None:
        """What this process has to do before it waits for others, where network calls are made by all processes together; else None."""
        ...

    def levels(self, num_inference_steps: int, shift: float | None = None) -> Levels:
        """The model's own grid from noise to data, float32 (T+1,) on the CPU; `shift` replaces a flow model's own."""
        ...

    def levels_between(self, levels_T1: Levels, place_B: Tensor) -> Levels:
        """Levels (B,) at places (float64) in [0, T] of that grid."""
        ...

    def measure_batch_invariance(self, sampled: Iterable[int], trained: Iterable[int]) -> bool:
        """Measure whether the network is batch-invariant, note it as `batch_invariant` and return it.

        Calls have `sampled` rows without gradients, and `trained` rows with them. What is False already is not measured.
        """
        ...

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """One row a prompt, on the policy's device: its text and, of a policy that `edits`, its picture; other columns are not read.

        Among its tensors is `prompt_embeds`, (P, tokens, width), which a probe is told.

        ValueError for a new text after `release_text_encoders`, and for a picture that is lacking or cannot be read.
        """
        ...

    def truncation(self, texts: Sequence[str]) -> Truncation:
        """How many of the texts are longer than the text encoders read, also after `release_text_encoders`."""
        ...

    def release_text_encoders(self) -> None:
        """Free the text encoders; prompts that were encoded before can still be asked for."""
        ...

    def predict(self, x_BCHW: Tensor, timestep: Tensor, condition: Condition, guidance_scale: float = 1.0) -> Tensor:
        """The network's output at x, float32, in x's shape.

        `timestep` is () or (B,), row b of `condition` belongs to row b of x. A `guidance_scale` w other than 1 is
        classifier-free guidance, o_u + w (o_c - o_u), away from the negative prompt, with gradients through both branches and twice the cost; a network that
        `embeds_guidance` is told w, 1 as well as any other.
        """
        ...

    def decode(self, x0_BCHW: Tensor) -> Pictures:
        """Pictures on the CPU, without gradient; of a model of videos all frames."""
        ...

    def preview(self, x0_BCHW: Tensor) -> Pictures:
        """The same for the eyes of a preview: by the tiny decoder where the policy has one."""
        ...

    def weights(self, name: str) -> AbstractContextManager[None]:
        """Run the block with the weights of that name: `current`, or one of `named_weights`."""
        ...

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """The denoiser's tensors that training must not move, with their names."""
        ...

    def save(self, folder: Path | None, weights: str = "current") -> None:
        """Write what was trained in a format that diffusers loads without progrpo.

        All processes take part, since weights may be shared out among them; one has a folder.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Current and named weights. The frozen ones are not in it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
