"""The toy model: a small network on latents of a few dims, pretrained in seconds from a seed, imperfect on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from progrpo.diffusion.levels import Levels, between_flow_levels, flow_levels
from progrpo.policies.invariance import is_batch_invariant
from progrpo.policies.tokens import Truncation
from progrpo.policies.weights import NamedWeights
from progrpo.types import Condition, Pictures, Prompt
from progrpo.zoo.toy import world

_WIDTH = 64
_BATCH = 256
_STEPS = 1500  # of pretraining: more would leave less to be wrong
_FREQUENCIES = 4  # of the noise level's features


class ToyNetwork(nn.Module):
    """The velocity at latents (N, DIMS), noise levels (N,) and codes (N, CODE)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(world.DIMS + world.CODE + 2 * _FREQUENCIES, _WIDTH),
            nn.SiLU(),
            nn.Linear(_WIDTH, _WIDTH),
            nn.SiLU(),
            nn.Linear(_WIDTH, world.DIMS),
        )

    def forward(self, x_ND: Tensor, sigma_N: Tensor, code_ND: Tensor) -> Tensor:
        angles = sigma_N[:, None] * torch.pi * torch.arange(1, _FREQUENCIES + 1)
        output: Tensor = self.layers(torch.cat([x_ND, code_ND, angles.sin(), angles.cos()], dim=1))
        return output


def pretrained(seed: int = 0) -> ToyNetwork:
    """The network after flow matching (arXiv 2210.02747) on the toy world's data, float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ToyNetwork()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in range(_STEPS):
        code = torch.randn(_BATCH, world.CODE, generator=generator, dtype=torch.float64)
        x0 = world.data(code, generator).float()
        eps = torch.randn(x0.shape, generator=generator)
        sigma = torch.rand(_BATCH, generator=generator)
        x = (1 - sigma[:, None]) * x0 + sigma[:, None] * eps
        loss = (network(x, sigma, code.float()) - (eps - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


class ToyPolicy:
    """The toy network as a policy, in float32 or float64. Latents have shape (DIMS, 1, 1)."""

    denoiser_name = "network"
    edits = False
    ignored = ""
    prediction = "flow"
    latent_shape: tuple[int, ...] = (world.DIMS, 1, 1)
    embeds_guidance = False
    compiled = False
    compiled_decoder = False

    def __init__(self, network: ToyNetwork, dtype: torch.dtype = torch.float32) -> None:
        self.device = torch.device("cpu")
        self.network = network.to(dtype)
        self.trainable: Mapping[str, nn.Parameter] = dict(self.network.named_parameters())
        self.named_weights = NamedWeights(self.trainable)
        self.fingerprints: Mapping[str, str] = {}
        self.batch_invariant = True
        self._dtype = dtype

    @property
    def drain_peer_calls(self) -> Callable[[], None] | None:
        return None

    def levels(self, num_inference_steps: int, shift: float | None = None) -> Levels:
        """Evenly spaced sigmas, moved by the shift: shift s / (1 + (shift - 1) s)."""
        sigma = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)
        if shift is not None:
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
        return flow_levels(sigma.float())

    def levels_between(self, levels_T1: Levels, place_B: Tensor) -> Levels:
        return between_flow_levels(levels_T1, place_B)

    def measure_batch_invariance(self, sampled: Iterable[int], trained: Iterable[int]) -> bool:
        sampled, trained = list(sampled), list(trained)
        most = max(*sampled, *trained)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(most, *self.latent_shape, generator=generator)
        condition = Condition({"prompt_embeds": torch.randn(most, 1, world.CODE, generator=generator)})

        def output(rows: Tensor) -> Tensor:
            return self.predict(x[rows], torch.tensor(500.0), condition.take(rows))

        self.batch_invariant = is_batch_invariant(output, sampled, trained)
        return self.batch_invariant

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """The prompts' codes, as one token each; prompts are numbers."""
        code_PD = world.codes([int(prompt.text) for prompt in prompts]).to(self._dtype)
        return Condition({"prompt_embeds": code_PD[:, None]})

    def truncation(self, texts: Sequence[str]) -> Truncation:
        return Truncation(0)

    def release_text_encoders(self) -> None:
        """Do nothing: there are none."""

    def predict(self, x_BCHW: Tensor, timestep: Tensor, condition: Condition, guidance_scale: float = 1.0) -> Tensor:
        """The velocity. There is no classifier-free guidance: the toy has no unconditional branch."""
        assert guidance_scale == 1.0, "the toy model has no guidance"
        sigma_B = (timestep.to(self._dtype) / 1000).expand(len(x_BCHW))
        code_BD = condition.tensors["prompt_embeds"][:, 0].to(self._dtype)
        output: Tensor = self.network(x_BCHW.flatten(1).to(self._dtype), sigma_B, code_BD)
        return output.reshape(x_BCHW.shape).to(x_BCHW.dtype)

    def encode_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        x0_ND = world.from_pictures(np.stack([np.asarray(picture) for picture in pictures]))
        return x0_ND.float().reshape(-1, *self.latent_shape)

    def decode(self, x0_BCHW: Tensor) -> Pictures:
        there_N = x0_BCHW.flatten(1).isfinite().all(1)
        x0_ND = x0_BCHW.detach().flatten(1).nan_to_num()
        return Pictures(world.to_pictures(x0_ND), there_N, "" if there_N.all() else "a latent is not finite")

    def preview(self, x0_BCHW: Tensor) -> Pictures:
        return self.decode(x0_BCHW)

    def weights(self, name: str) -> AbstractContextManager[None]:
        return self.named_weights.swapped(name)

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def save(self, folder: Path | None, weights: str = "current") -> None:
        """Write the network's weights as safetensors."""
        if folder is None:
            return
        with self.named_weights.swapped(weights):
            save_file({name: p.detach().clone() for name, p in self.trainable.items()}, folder / "network.safetensors")
