"""The denoiser call: guidance, precision, attention kernels, and calls that several processes make together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from progrpo.policies.family import NEGATIVE, ModelFamily
from progrpo.policies.invariance import is_batch_invariant
from progrpo.policies.low_precision import is_low_precision_on_cpu
from progrpo.policies.sharded import PeerCalls
from progrpo.policies.weights import NamedWeights
from progrpo.types import Condition


class DenoiserCall:
    """A family's network as a function of latents, timesteps and a condition, float32 in and out."""

    def __init__(self, family: ModelFamily, weights: NamedWeights, shared: bool) -> None:
        self._family = family
        self._weights = weights
        self.peers = PeerCalls(family.device, self.dummy_forward) if shared else None
        if shared:
            _ = self.input_shapes  # asked now, while the text encoders are there

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the network."""
        return self._family.embeds_guidance

    @cached_property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of a row of the network's inputs beside latents and timestep."""
        return self._family.condition_shapes() | ({"guidance": ()} if self.embeds_guidance else {})

    def output(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        """The output of one call."""
        assert all(len(rows) == len(x_BCHW) for rows in condition.tensors.values())
        if self.peers is not None:
            self.peers.begin_call(self._weights.names.index(self._weights.active), torch.is_grad_enabled())
        if len(x_BCHW) == 1 and is_low_precision_on_cpu(self._family.dtype, self._family.device):
            # products with a single row are made by other kernels, which round differently: it would depend on being
            # alone
            rows = torch.zeros(2, dtype=torch.int64)
            return self.forward(x_BCHW[rows], timestep_B[rows], condition.take(rows))[:1]
        return self.forward(x_BCHW, timestep_B, condition)

    def guided_output(
        self,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        condition: Condition,
        unconditional: Condition,
        guidance_scale: float,
    ) -> Tensor:
        """The output of classifier-free guidance, a call of twice the rows."""
        own = condition.tensors
        negative = {name: own.get(NEGATIVE + name, unconditional.tensors.get(name, rows)) for name, rows in own.items()}
        pair = Condition(
            {
                name: torch.cat([negative[name].expand_as(rows), rows])
                for name, rows in own.items()
                if not name.startswith(NEGATIVE)
            }
        )
        both = self.output(torch.cat([x_BCHW, x_BCHW]), torch.cat([timestep_B, timestep_B]), pair)
        without, with_prompt = both.chunk(2)
        return self._family.combine_guidance(without, with_prompt, guidance_scale)

    def forward(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        """The network in the model's dtype. Other processes are not waited for."""
        dtype = self._family.dtype
        # no cache of cast weights: it would outlive a change of weights inside a caller's own autocast block
        autocast = torch.autocast(self._family.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
        with autocast, self.attention():
            return self._family.denoise(x_BCHW, timestep_B, condition).float()

    def attention(self) -> AbstractContextManager[None]:
        """Torch's own matrix products, where fused attention is slow and the denoiser has no processor without it."""
        fused_is_slow = is_low_precision_on_cpu(self._family.dtype, self._family.device)
        return sdpa_kernel(SDPBackend.MATH) if fused_is_slow and not self._family.plain_attention else nullcontext()

    @torch.compiler.disable(recursive=False)  # blocks of a U-Net call it from inside
    def checkpointed(self, block: nn.Module, *inputs: object) -> object:
        """Run a block without keeping its activations, which are computed anew later, by the same kernels."""
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), self.attention()))

    def is_batch_invariant(
        self, timestep: Tensor, unconditional: Condition, sampled: Iterable[int], trained: Iterable[int]
    ) -> bool:
        """Whether a row's output is the same in all calls.

        They have `sampled` rows without gradients, and `trained` rows with them.
        """
        sampled, trained, device = list(sampled), list(trained), self._family.device
        most = max(*sampled, *trained)
        generator = torch.Generator().manual_seed(0)
        x_NCHW = torch.randn(most, *self._family.latent_shape, generator=generator).to(device)
        timestep_N = timestep.to(x_NCHW).expand(most)
        condition = Condition({**self._ones(self.input_shapes), **unconditional.tensors})
        condition = condition.take(torch.zeros(most, dtype=torch.int64, device=device))

        def output(rows: Tensor) -> Tensor:
            rows = rows.to(device)
            return self.output(x_NCHW[rows], timestep_N[rows], condition.take(rows))

        with torch.compiler.set_stance("force_eager"):  # one compilation for each size would take minutes
            return is_batch_invariant(output, sampled, trained)

    def dummy_forward(self, weights: int, training: bool) -> None:
        """Make a network call that takes part in the other processes' calls and adds 0 to gradients."""
        device = self._family.device
        x, timestep_B = torch.ones(1, *self._family.latent_shape, device=device), torch.ones(1, device=device)
        condition = Condition(self._ones(self.input_shapes))
        with self._weights.instead(self._weights.names[weights]), torch.set_grad_enabled(training):
            output = self.forward(x, timestep_B, condition)
            if training:
                output.backward(torch.zeros_like(output))

    def _ones(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """One row of a condition of these shapes."""
        dtype, device = self._family.dtype, self._family.device
        return {name: torch.ones(1, *shape, device=device, dtype=dtype) for name, shape in shapes.items()}
