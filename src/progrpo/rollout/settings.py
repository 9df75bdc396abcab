"""The settings of sampling, of plans and of previews: three parts of a configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from progrpo.rollout.plan import Plan, PrunePoint, preset
from progrpo.rollout.window import window
from progrpo.settings import NUM_STEPS, Rule, above, at_least, between, setting

_NOISE_LEVEL = Rule(
    lambda v: v is None or 0 < v < math.inf,
    "above 0 (a step without noise has no log-prob to train on), or empty for the published one",
)


@dataclass(frozen=True)
class SamplingSettings:
    num_inference_steps: int = setting(10, NUM_STEPS)
    guidance_scale: float = setting(1.0, at_least(1))
    """1 is no classifier-free guidance; above 1 a network call counts twice. See `embedded_guidance`."""
    negative_prompt: str = ""
    """A text that guidance leads away from, in training and wherever the run is measured or sampled from; empty: none, as the model's own
    pipeline has it. It counts where a guidance scale is above 1 and guidance is a pair of calls."""
    embedded_guidance: bool = False
    """The model is told the guidance scale and needs no second call. Must be true for FLUX.1-dev where the scale is above 1, and
    false for other models."""
    sampler: Literal["auto", "flow_grpo", "dance", "flow_grpo_wan", "ddim", "cps", "cps_reduced"] = "auto"
    """How a stochastic step adds noise. For flow models Flow-GRPO's SDE (`flow_grpo`, arXiv 2505.05470), DanceGRPO's (`dance`,
    arXiv 2505.07818) or that of flow_grpo's script for Wan (`flow_grpo_wan`); for flow and diffusion models `ddim` (with eta) and `cps` (arXiv 2509.05952; `cps_reduced` has the published
    stand-in for its log-prob). `auto`: flow_grpo for a flow model, ddim for a diffusion model."""
    noise_level: float | None = setting(None, _NOISE_LEVEL)
    """How much noise: Flow-GRPO's a, DanceGRPO's and DDIM's eta, CPS's. Empty: the published 0.7 (1 of `flow_grpo_wan`), 0.3, 1 and 0.8."""
    shift: float | None = setting(None, above(0).or_empty(" for the model's own"))
    """Time shift of a flow model's grid; empty: the model's own."""
    same_latent: bool = False
    """All members of a group begin at one noise, and differ by the noise of their steps."""
    latent_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """In which latents are kept for training. They are rounded before their log-probs are taken, so that ratios stay exact."""
    sde_window: Literal["auto", "all", "first", "sliding", "random", "none"] = "auto"
    """Which steps are stochastic; the others follow the ODE. `all`; a window, which alone is trained, at the `first` steps,
    `sliding` (MixGRPO, arXiv 2507.21802) or `random` for each iteration; `none`. `auto` is `all` for an objective that trains
    transitions and `none` for the others."""
    sde_window_size: int = setting(3, at_least(1))
    sde_window_end: int | None = None
    """Windows lie in the steps before this one; empty: all steps that may be trained."""
    sde_window_interval: int = setting(25, at_least(1))
    """Iterations that a sliding window stays before it moves on by one step."""
    train_last_step: bool = False
    """The last step is nearly deterministic (std 0.006 on SD3's grid): its log-prob overflows, so it is not trained."""
    microbatch: int | None = setting(None, at_least(1).or_empty(" to have it measured"))
    """Rows of a network call. Empty: the fastest for this plan on this device, measured when a run begins and then kept in its
    configuration."""

    @property
    def num_trainable_steps(self) -> int:
        """How many steps, from the first, may be trained: all but the last, unless `train_last_step`."""
        return self.num_inference_steps - (0 if self.train_last_step else 1)

    @property
    def window_end(self) -> int:
        """The step before which windows lie."""
        return self.num_trainable_steps if self.sde_window_end is None else self.sde_window_end

    def stochastic_steps(self, iteration: int, trains_transitions: bool, seed: int) -> range:
        """The zero-based steps of an iteration at which sampling adds noise."""
        kind = self.sde_window
        if kind == "auto":
            kind = "all" if trains_transitions else "none"
        if kind in ("all", "none"):
            return range(self.num_inference_steps if kind == "all" else 0)
        size, end, interval = self.sde_window_size, self.window_end, self.sde_window_interval
        return window(kind, iteration, size=size, end=end, interval=interval, seed=seed)

    def check(self) -> None:
        """ValueError for a window that does not fit into the steps, and for more noise than a sampler can add."""
        if self.sde_window in ("first", "sliding", "random"):
            self._check_window()
        if self.sampler in ("ddim", "cps", "cps_reduced") and (self.noise_level or 0) > 1:
            raise ValueError(
                f"sampling.noise_level must be at most 1 for sampling.sampler {self.sampler}, not {self.noise_level}:"
                " a step cannot add more noise than there is at its end"
            )

    def _check_window(self) -> None:
        size, end, most = self.sde_window_size, self.window_end, self.num_trainable_steps
        if end > most:
            raise ValueError(
                f"sampling.sde_window_end must be at most the {most} steps that may be trained, not {end}"
                " (sampling.train_last_step adds the last)"
            )
        if size > end:
            raise ValueError(
                f"sampling.sde_window_size must be at most the {end} steps that a window may lie in, not {size}"
            )

    @property
    def in_pairs(self) -> bool:
        """Whether a network call is a pair, for classifier-free guidance."""
        return self.guidance_scale > 1 and not self.embedded_guidance


@dataclass(frozen=True)
class PlanSettings:
    preset: Literal["standard", "flash", "posthoc", "none", "sd14", "custom"] = "standard"
    """The paper's plans; `custom` takes the three fields below."""
    group_size: int = setting(24, between(2, 100_000))
    prune: tuple[tuple[int, int], ...] = ()
    """Pairs (step, keep): after the network call of zero-based step, keep that many members of each group."""
    final_keep: int | None = None
    """Keep that many on final rewards."""
    selector: Literal["ovf", "uniform", "top_bottom", "none"] = "ovf"
    adaptive: bool = False
    """Begin with this plan, and after each audit take the prune points and keeps whose expected signal a second is highest, from
    the agreement of previews and the costs that this run measured. The group's size stays, survivors do not become fewer."""

    def plan(self, num_inference_steps: int) -> Plan:
        """The plan itself; ValueError if it cannot be run in so many steps."""
        if self.preset != "custom":
            return preset(self.preset, num_inference_steps)
        plan = Plan(self.group_size, tuple(PrunePoint(*point) for point in self.prune), self.final_keep)
        plan.validate(num_inference_steps)
        return plan

    def check(self) -> None:
        """ValueError for fields of a custom plan beside another one."""
        if self.preset != "custom" and self != PlanSettings(
            preset=self.preset, selector=self.selector, adaptive=self.adaptive
        ):
            raise ValueError(
                "plan.group_size, plan.prune and plan.final_keep are read only when plan.preset is custom,"
                f" not {self.preset}; set it or leave them out"
            )


@dataclass(frozen=True)
class PreviewSettings:
    decoder: Literal["full", "tiny"] = "full"
    """What decodes unfinished trajectories: the model's own decoder, or a tiny one (an AutoencoderTiny)."""
    tiny_decoder: str = "shapes-tiny"
    """The built-in models' tiny decoder, a folder, or a hub id: madebyollin/taesd3 for SD 3, taef1 for FLUX,
    taesd for SD 1.x, taesdxl for XL."""
    ode_steps: int = setting(1, NUM_STEPS)
    """Steps of the ODE from here to data. 1 is the projection that costs no network call; each further one costs one."""
    probe: bool = False
    """Learn a small network on x0 projections, which ranks at a prune point once its measured agreement is high enough."""
    probe_threshold: float = setting(0.5, between(-1, 1))
    """Spearman's correlation with final rewards, mean over the last audits, from which on the probe takes over."""
