"""Attention and GELU on a CPU in bfloat16, and the input of a LoRA's layers: milliseconds per row, in one process.

    python benchmarks/attention.py [--models shapes-flow shapes-diffusion] [--rows 48] [--rounds 7] [--json]

`products` is the attention that a policy takes there (progrpo.policies.attention, diffusers' AttnProcessor). `math` is
torch's attention without fused kernels, `fused` with them. `products, tanh` has GELU approximated by tanh, as these
networks are written, and `products, raised` a LoRA's input raised to float32 first, as peft does by default. Each is
timed over a network call, and over a call with its gradient. The ways take turns, round by round; figures are medians
over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.attention import SDPBackend, sdpa_kernel

from progrpo.config import ModelSettings
from progrpo.policies.base import PolicyContext
from progrpo.policies.load import quiet
from progrpo.policies.pipeline import PipelinePolicy
from progrpo.policies.sd3 import SD3
from progrpo.training.build import policy_from
from progrpo.training.distributed import Ranks
from progrpo.zoo.shapes import world


@dataclass(frozen=True)
class Way:
    products: bool
    fused: bool = False
    raised: bool = False
    tanh: bool = False

    def prepare(self, policy: PipelinePolicy) -> None:
        theirs = JointAttnProcessor2_0 if isinstance(policy.family, SD3) else AttnProcessor2_0
        plain = policy.family.plain_attention
        assert plain is not None
        policy.denoiser.set_attn_processor(plain() if self.products else theirs())
        for module in policy.denoiser.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = self.raised
            if isinstance(module, GELU):
                module.approximate = "tanh" if self.tanh else "none"

    def kernels(self) -> AbstractContextManager[None]:
        return nullcontext() if self.products or self.fused else sdpa_kernel(SDPBackend.MATH)


WAYS = {
    "products": Way(products=True),
    "products, tanh": Way(products=True, tanh=True),
    "products, raised": Way(products=True, raised=True),
    "math": Way(products=False),
    "fused": Way(products=False, fused=True),
}


def measured(model: str, rows: int, rounds: int) -> dict[str, dict[str, float]]:
    policy: Any = policy_from(ModelSettings(path=model, dtype="bfloat16"), PolicyContext(Ranks().device))
    condition = policy.encode(world.sample_prompts("train", 4, 0)).take(torch.arange(rows) % 4)
    x = torch.randn(rows, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    timestep = policy.levels(10).timestep[5]

    def seconds(way: Way, gradient: bool) -> float:
        way.prepare(policy)
        start = time.perf_counter()
        with way.kernels(), torch.set_grad_enabled(gradient):
            output = policy.predict(x, timestep, condition)
            if gradient:
                output.square().mean().backward()
        return time.perf_counter() - start

    times: dict[tuple[str, str], list[float]] = {}
    for i in range(rounds + 1):
        for name, way in WAYS.items():
            for kind, gradient in (("call", False), ("call and gradient", True)):
                spent = seconds(way, gradient)
                if i:
                    times.setdefault((name, kind), []).append(1000 * spent / rows)
    return {
        name: {kind: statistics.median(times[name, kind]) for kind in ("call", "call and gradient")} for name in WAYS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["shapes-flow", "shapes-diffusion"])
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    quiet()
    figures = {model: measured(model, options.rows, options.rounds) for model in options.models}
    if options.json:
        print(json.dumps({**vars(options), "torch": torch.__version__, "ms a row": figures}, indent=1))
        return
    for model, ways in figures.items():
        for name, kinds in ways.items():
            print(f"{model:17s} {name:17s}", "  ".join(f"{kind} {ms:.2f} ms" for kind, ms in kinds.items()))


if __name__ == "__main__":
    main()
