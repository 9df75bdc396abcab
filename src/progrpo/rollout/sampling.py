"""The sampling of trajectories: its settings, and the process that follows from them for a policy and an iteration."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from progrpo.diffusion.process import Process
from progrpo.diffusion.samplers import DDIM, StochasticStep
from progrpo.messages import quoted
from progrpo.policies.base import Policy
from progrpo.registry import load_named
from progrpo.rollout.settings import SAMPLERS, SamplingSettings


@dataclass(frozen=True)
class Record:
    """The parts of each trajectory that are stored while it is sampled.

    Transitions of `steps` are stored with their log-probs, and with `means` the means of their Gaussians. With `graphs`
    the network's outputs at these steps keep their graphs. With `latent_features` a probe's view of every step is
    stored.
    """

    steps: frozenset[int] = frozenset()
    means: bool = False
    graphs: bool = False
    latent_features: bool = False


@dataclass(frozen=True)
class Sampling:
    """The process of T steps by which trajectories are denoised, the settings that it follows, and what is stored.

    Only stochastic steps have transitions. Latents are rounded to `latent_dtype` before their log-probs are computed,
    and can therefore be stored in it. At the first `shared_calls` network calls the members of a group are equal, so
    that one call is made for all.
    """

    process: Process
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    record: Record = field(default_factory=Record)
    shared_calls: int = 0

    def __post_init__(self) -> None:
        assert all(self.process.noise_levels[step] > 0 for step in self.record.steps), "an ODE step has no log-prob"

    @property
    def num_inference_steps(self) -> int:
        return self.process.num_steps

    @property
    def guidance_scale(self) -> float:
        return self.settings.guidance_scale

    @property
    def microbatch(self) -> int:
        """The number of rows in a network call."""
        return self.settings.rows_per_call

    @property
    def nfe_per_call(self) -> int:
        return 2 if self.settings.in_pairs else 1

    @property
    def latent_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.settings.latent_dtype)
        return dtype

    def with_max_batch(self, rows: int) -> Sampling:
        """Return the sampling with at most `rows` rows in a network call."""
        microbatch = min(self.microbatch, max(rows, 1))
        return replace(self, settings=replace(self.settings, microbatch=microbatch))

    def rounded(self, x: Tensor) -> Tensor:
        """The latents x as they are stored, in x's own dtype: the log-prob must be that of the stored ones."""
        return x if x.dtype == self.latent_dtype else x.to(self.latent_dtype).to(x.dtype)


def load_sampler(name: str) -> StochasticStep:
    """The stochastic step of a name; ValueError for a user's name of something else."""
    targets = {built_in: sampler.target for built_in, sampler in SAMPLERS.items()}
    step = load_named(name, targets, "sampling.sampler", "step")
    if not isinstance(step, StochasticStep):
        raise ValueError(
            f"sampling.sampler: {name} must be a progrpo.diffusion.samplers.StochasticStep, not {quoted(step)}"
        )
    return step


def sampler_name(settings: SamplingSettings, policy: Policy) -> str:
    """The name of the sampler: the settings' own, or the one that belongs to the kind of model."""
    own = "flow_grpo" if policy.prediction == "flow" else "ddim"
    return own if settings.sampler == "auto" else settings.sampler


def stochastic_step(settings: SamplingSettings, policy: Policy) -> StochasticStep:
    """The stochastic step of a policy; ValueError for one that this kind of model does not have."""
    name = sampler_name(settings, policy)
    step = load_sampler(name)
    if step.flow_only and policy.prediction != "flow":
        raise ValueError(
            f"sampling.sampler: {name} is the SDE of flow models, and this is a diffusion model; use ddim, cps or"
            " precise"
        )
    return step


def sampling_for(policy: Policy, settings: SamplingSettings, stochastic: range, record: Record) -> Sampling:
    """The sampling of a policy with noise at the `stochastic` steps.

    ValueError for guidance that this model does not have, and for a stored step without noise or length.
    """
    if settings.guidance_scale > 1 and settings.embedded_guidance != policy.embeds_guidance:
        raise ValueError(
            "sampling.embedded_guidance must be true: this model takes the guidance scale as an input and makes one"
            " call of it"
            if policy.embeds_guidance
            else "sampling.embedded_guidance must be false: this model is guided by a pair of calls"
        )
    step = stochastic_step(settings, policy)
    noise_level = step.noise_level if settings.noise_level is None else settings.noise_level
    process = Process(
        prediction=policy.prediction,
        sampler=step,
        levels_T1=policy.levels(settings.num_inference_steps, settings.shift),
        noise_levels=tuple(noise_level if i in stochastic else 0.0 for i in range(settings.num_inference_steps)),
    )
    if any(process.stds_T[i] == 0 or process.lengths_T[i] == 0 for i in record.steps):
        name = sampler_name(settings, policy)
        raise ValueError(
            f"sampling.train_last_step must be false: the last step of {name} on this model's grid has no noise or no"
            " length"
        )
    return Sampling(process, settings, record)


def ode(policy: Policy, num_inference_steps: int, guidance_scale: float, microbatch: int) -> Sampling:
    """Deterministic sampling on the model's own grid: the flow's ODE, or DDIM."""
    settings = SamplingSettings(
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        embedded_guidance=policy.embeds_guidance,
        microbatch=microbatch,
    )
    levels_T1 = policy.levels(num_inference_steps, None)
    return Sampling(Process(policy.prediction, DDIM, levels_T1, (0.0,) * num_inference_steps), settings)
