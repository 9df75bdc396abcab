"""The settings of sampling, of plans and of previews: three sections of a configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from progrpo.diffusion.facts import PRESERVING, REDUCED, SDE, StepFacts
from progrpo.messages import quoted, raised
from progrpo.registry import choices_of, load_named, one_of
from progrpo.rollout.plan import PRESETS, Plan, PrunePoint, plans, preset
from progrpo.rollout.window import WINDOWS, last_start, window
from progrpo.settings import NUM_STEPS, Rule, above, at_least, between, setting

if TYPE_CHECKING:
    from progrpo.rollout.prune import Selector


@dataclass(frozen=True)
class BuiltInSampler:
    """A built-in sampler: where its stochastic step is, and its facts, which are known without torch."""

    target: str
    facts: StepFacts


SAMPLERS: dict[str, BuiltInSampler] = {
    "flow_grpo": BuiltInSampler("progrpo.diffusion.samplers:FLOW_GRPO", SDE),
    "dance": BuiltInSampler("progrpo.diffusion.samplers:DANCE", SDE),
    "flow_grpo_wan": BuiltInSampler("progrpo.diffusion.samplers:FLOW_GRPO_WAN", SDE),
    "ddim": BuiltInSampler("progrpo.diffusion.samplers:DDIM", PRESERVING),
    "cps": BuiltInSampler("progrpo.diffusion.samplers:CPS", PRESERVING),
    "cps_reduced": BuiltInSampler("progrpo.diffusion.samplers:CPS_REDUCED", REDUCED),
    "precise": BuiltInSampler("progrpo.diffusion.samplers:PRECISE", StepFacts()),
}
SELECTORS: dict[str, str] = {
    "ovf": "progrpo.rollout.prune:ovf",
    "uniform": "progrpo.rollout.prune:uniform",
    "top_bottom": "progrpo.rollout.prune:top_bottom",
    "furthest": "progrpo.rollout.prune:furthest",
    "none": "progrpo.rollout.prune:none",
}
_SAMPLER_NAMES = ("auto", *SAMPLERS)
PLAN_NAMES = (*PRESETS, "custom")
_AUTO_GROUPS, _AUTO_SURVIVORS = (24, 16, 12), 6
if TYPE_CHECKING:
    SamplerName = str
    SelectorName = str
    PlanName = str
else:
    SamplerName = choices_of(_SAMPLER_NAMES)
    SelectorName = choices_of(SELECTORS)
    PlanName = choices_of(PLAN_NAMES)

_NOISE_LEVEL = Rule(
    lambda v: v is None or 0 < v < math.inf,
    "above 0 (a step without noise has no log-prob to train on), or empty for the published one",
)


@dataclass(frozen=True)
class SamplingSettings:
    num_inference_steps: int = setting(10, NUM_STEPS)
    """The number of sampling steps in training."""
    guidance_scale: float = setting(1.0, at_least(1))
    """The scale of classifier-free guidance; 1 is no guidance.
    Above 1 a network call counts twice, unless `embedded_guidance` is set."""
    negative_prompt: str = ""
    """A text from which guidance leads away; empty: none, as in the model's own pipeline.
    It is used in training, in evaluations and in samples of the run.
    It has an effect only if a guidance scale is above 1 and guidance is a pair of calls."""
    embedded_guidance: bool = False
    """Pass the guidance scale to the model as an input, without a second call.
    It must be true for FLUX.1-dev if the scale is above 1, and false for other models."""
    sampler: SamplerName = setting("auto", one_of(_SAMPLER_NAMES, "step"))  # noqa: RUF009 (a field)
    """The way in which a stochastic step adds noise.
    `auto`: flow_grpo for a flow model, ddim for a diffusion model.
    Flow models only: `flow_grpo` (Flow-GRPO's SDE, arXiv 2505.05470), `dance` (DanceGRPO's, arXiv 2505.07818)
    and `flow_grpo_wan` (the SDE of flow_grpo's script for Wan).
    Flow and diffusion models: `ddim` (with eta), `cps` (arXiv 2509.05952) and `precise` (arXiv 2605.23522).
    `cps_reduced` is cps with the published stand-in for its log-prob.
    `module:step`: a `progrpo.diffusion.samplers.StochasticStep` of your own."""
    noise_level: float | None = setting(None, _NOISE_LEVEL)
    """The amount of noise: a of Flow-GRPO, eta of DanceGRPO and of DDIM, and that of CPS and of Precise.
    Empty: the published values 0.7 (flow_grpo; 1 for flow_grpo_wan), 0.3 (dance), 1 (ddim), 0.8 (cps) and 1.5
    (precise)."""
    shift: float | None = setting(None, above(0).or_empty(" for the model's own"))
    """The time shift of a flow model's grid; empty: the model's own."""
    same_latent: bool = False
    """Start all members of a group from the same noise.
    They then differ only by the noise that their steps add.
    The network calls up to the first step with noise are made once for a group."""
    latent_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype in which latents are stored for training.
    They are rounded before their log-probs are computed, so ratios stay exact."""
    sde_window: Literal["auto", "all", "first", "sliding", "random", "none"] = "auto"
    """The steps that are stochastic; the other steps follow the ODE.
    `all`: all steps. `none`: no step.
    A window of steps, and only the window is trained: `first` (the first steps),
    `sliding` (MixGRPO, arXiv 2507.21802) or `random` (drawn for each iteration).
    `auto`: `all` if the objective trains transitions, otherwise `none`."""
    sde_window_size: int = setting(3, at_least(1))
    """The number of steps in a window."""
    sde_window_end: int | None = setting(None, at_least(1).or_empty(" for all steps that can be trained"))
    """Windows lie before this step; empty: all steps that can be trained."""
    sde_window_interval: int = setting(25, at_least(1))
    """The number of iterations after which a sliding window moves on by one step."""
    train_last_step: bool = False
    """Train the last step too.
    It is nearly deterministic (std 0.006 on SD3's grid) and its log-prob overflows, so by default it is not
    trained."""
    microbatch: int | None = setting(None, at_least(1).or_empty(" to have it measured"))
    """The number of rows in a network call.
    Empty: the fastest number for this plan on this device.
    It is measured when the run begins, and the choice is kept in the run's configuration."""

    @property
    def num_trainable_steps(self) -> int:
        """The number of steps, from the first, that can be trained: all but the last, unless `train_last_step`."""
        return self.num_inference_steps - (0 if self.train_last_step else 1)

    @property
    def rows_per_call(self) -> int:
        """The rows of a network call: `microbatch`, or 64 where none was given or measured."""
        return 64 if self.microbatch is None else self.microbatch

    @property
    def window_end(self) -> int:
        """The step before which windows lie."""
        return self.num_trainable_steps if self.sde_window_end is None else self.sde_window_end

    @property
    def last_start(self) -> int:
        """The last step at which the stochastic steps of an iteration begin."""
        return last_start(self.sde_window, size=self.sde_window_size, end=self.window_end)

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
        """Raise ValueError for a window that does not fit into the steps, and for more noise than a sampler can add."""
        if self.sde_window in WINDOWS:
            self._check_window()
        most = self.sampler_facts.max_noise_level
        if (self.noise_level or 0) > most:
            raise ValueError(
                f"sampling.noise_level must be at most {most:g} for sampling.sampler {self.sampler}, not"
                f" {self.noise_level}: a step cannot add more noise than there is at its end"
            )

    @property
    def sampler_facts(self) -> StepFacts:
        """The facts of the sampler; without restrictions for `auto`, which depends on the model."""
        if self.sampler == "auto":
            return StepFacts()
        if self.sampler in SAMPLERS:
            return SAMPLERS[self.sampler].facts
        from progrpo.rollout.sampling import load_sampler

        return load_sampler(self.sampler).facts

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
    preset: PlanName = setting("late", one_of(PLAN_NAMES, "function"))  # noqa: RUF009 (a field)
    """The name of a plan, or `custom` with the three fields below.
    `late`: 12 -> 6 members after nine of ten network calls. The paper's: `standard`, 48 -> 24 -> 12; `flash`,
    24 -> 16 -> 12; `sd14`, 48 -> 32 -> 8. `none`: 24, not pruned.
    `posthoc`: 24 members are finished, and 12 are kept by their final rewards.
    `auto`: 24, not pruned, in the first three iterations, whose audits measure what pays; then the group of 12 to 24,
    the points and the 6 survivors or more with the highest expected progress per second, none pruned where that is
    best.
    `module:function`: a `progrpo.rollout.plan.Plan` of your own, or a function of num_inference_steps that returns
    one."""
    group_size: int = setting(24, between(2, 100_000))
    """The number of members with which a group begins, in a custom plan."""
    prune: tuple[tuple[int, int], ...] = ()
    """The prune points of a custom plan: pairs (step, keep).
    After the network call of this zero-based step, keep this many members of each group."""
    final_keep: int | None = None
    """In a custom plan, keep this many members by their final rewards."""
    keep_groups: int | None = setting(None, at_least(1).or_empty(" to stop no group"))
    """At the plan's first prune point also stop whole groups: so many of an iteration's prompts go on.
    They are those whose previews' scores differ most; groups whose scores are all equal teach nothing.
    It must be smaller than `prompts.per_iteration`; raise that to keep the number of trained trajectories."""
    selector: SelectorName = setting("ovf", one_of(SELECTORS, "function"))  # noqa: RUF009 (a field)
    """The choice of members that are kept. `ovf`: those whose scores have the largest variance (the paper's).
    `top_bottom`: half from the best, half from the worst. `furthest`: those furthest from the mean (CPPO's).
    `uniform`: a random draw.
    `none`: the first members, whatever their scores.
    `module:function`: a function of your own, of (scores_PG, keep, present_PG, seeds_P), that returns a
    `progrpo.rollout.prune.Selection`."""
    adaptive: bool = False
    """Begin with this plan, and choose a better one after each audit.
    The run takes the prune points and keeps with the highest expected learning signal per second.
    It computes this from the measured agreement of previews and from the measured costs.
    The group size stays the same, and the survivors do not become fewer."""

    @property
    def follows_audits(self) -> bool:
        """Whether audits may change the plan."""
        return self.adaptive or self.preset == "auto"

    def candidates(self, plan: Plan, num_inference_steps: int) -> Iterator[Plan]:
        """The plans that an audit may choose in place of `plan`."""
        if self.preset == "auto":
            for group_size in _AUTO_GROUPS:
                yield from plans(group_size, _AUTO_SURVIVORS, num_inference_steps)
        elif self.adaptive:
            yield from plans(plan.group_size, self.plan(num_inference_steps).survivors, num_inference_steps)

    def plan(self, num_inference_steps: int) -> Plan:
        """The plan that is run, or with which a run begins whose audits change it.

        ValueError if it needs more steps than `num_inference_steps`.
        """
        if self.preset in PRESETS:
            plan = preset(self.preset, num_inference_steps)
        elif self.preset == "custom":
            plan = Plan(self.group_size, tuple(PrunePoint(*point) for point in self.prune), self.final_keep)
        else:
            plan = _load_plan(self.preset, num_inference_steps)
        if self.keep_groups is not None:
            plan = replace(plan, keep_groups=self.keep_groups)
        plan.validate(num_inference_steps)
        return plan

    def load_selector(self) -> Selector:
        """The selector itself."""
        selector: Selector = load_named(self.selector, SELECTORS, "plan.selector", "function")
        if not callable(selector):
            raise ValueError(f"plan.selector: {self.selector} must be a function, not {quoted(selector)}")
        if self.selector in SELECTORS:
            return selector
        from progrpo.rollout.own_selector import OwnSelector

        return OwnSelector(self.selector, selector)

    def check(self) -> None:
        """Raise ValueError for fields that do not go together, or a selector that is no function."""
        if self.selector not in SELECTORS:
            self.load_selector()
        if self.preset == "auto" and self.keep_groups is not None:
            raise ValueError("plan.keep_groups must be empty for plan.preset auto: plans are judged by one group")
        if self.preset == "auto" and self.adaptive:
            raise ValueError("plan.adaptive must be false for plan.preset auto, which adapts by itself; leave it out")
        if self.preset != "custom" and self != PlanSettings(
            preset=self.preset, selector=self.selector, adaptive=self.adaptive, keep_groups=self.keep_groups
        ):
            raise unread_fields(self.preset)


def unread_fields(name: str) -> ValueError:
    """The error for fields of a custom plan beside another plan, which has a group and points of its own."""
    return ValueError(
        "plan.group_size, plan.prune and plan.final_keep are read only when plan.preset is custom,"
        f" not {name}; set it or leave them out"
    )


def _load_plan(name: str, num_inference_steps: int) -> Plan:
    """The plan that a user's `module:name` gives: a Plan, or what a function of the number of steps returns."""
    made: object = load_named(name, dict.fromkeys(PLAN_NAMES, ""), "plan.preset", "function")
    try:
        plan = made(num_inference_steps) if callable(made) else made
    except Exception as error:  # a user's code may raise anything
        raise ValueError(f"plan.preset: {name}({num_inference_steps}): {raised(error)}") from error
    if not isinstance(plan, Plan) or not _has_points(plan.prune):
        raise ValueError(
            f"plan.preset: {name} must be a progrpo.rollout.plan.Plan, or a function of num_inference_steps that"
            f" returns one, with a tuple of PrunePoints as its prune, not {quoted(plan)}"
        )
    numbers = [number for point in plan.prune for number in (point.step, point.keep)]
    numbers += [plan.group_size, *(n for n in (plan.final_keep, plan.keep_groups) if n is not None)]
    for number in numbers:
        if type(number) is not int:
            raise ValueError(f"plan.preset: {name} must have whole numbers, not {quoted(number)}")
    if plan.recorded:
        raise ValueError(
            f"plan.preset: {name} must not be recorded, since its groups are sampled; prompts.pairs learns from"
            " recorded pairs"
        )
    return plan


def _has_points(prune: object) -> bool:
    """Whether a user's plan has a tuple of prune points."""
    return isinstance(prune, tuple) and all(isinstance(point, PrunePoint) for point in prune)


@dataclass(frozen=True)
class PreviewSettings:
    decoder: Literal["full", "tiny"] = "full"
    """The decoder of unfinished trajectories.
    `full`: the model's own decoder. `tiny`: a small one (an AutoencoderTiny)."""
    tiny_decoder: str = "shapes-tiny"
    """The tiny decoder: that of the built-in models, a folder, or a hub id.
    On the hub: madebyollin/taesd3 for SD 3, taef1 for FLUX, taesd for SD 1.x, taesdxl for XL."""
    ode_steps: int = setting(1, NUM_STEPS)
    """The number of ODE steps from the unfinished latent to the preview.
    1 is the projection, which needs no network call; each further step costs one call."""
    probe: bool = False
    """Train a small network on x0 projections.
    It ranks members at a prune point once its measured agreement is high enough."""
    probe_threshold: float = setting(0.5, between(-1, 1))
    """The agreement from which the probe is used.
    It is Spearman's correlation with final rewards, averaged over the last audits."""
    latent_reward: str = ""
    """The folder of a latent reward head, which ranks x0 projections at every prune point: nothing is decoded or
    rewarded. `progrpo reward-model train PAIRS --latent MODEL` makes one. Or your own `module:function` of the latents
    (N, C, H, W) and their texts (docs/extending.md). Empty: none."""

    def check(self) -> None:
        """Raise ValueError for fields that have no effect beside others."""
        default = PreviewSettings()
        if self.tiny_decoder != default.tiny_decoder and self.decoder != "tiny":
            raise ValueError("preview.tiny_decoder is read only where preview.decoder is tiny; set it or leave it out")
        if self.probe_threshold != default.probe_threshold and not self.probe:
            raise ValueError("preview.probe_threshold is read only with preview.probe; set it or leave it out")
        conflicts = {"decoder": "full", "ode_steps": 1, "probe": False}
        for name, needed in conflicts.items():
            if self.latent_reward and getattr(self, name) != needed:
                raise ValueError(
                    f"preview.{name} must be {str(needed).lower()} for preview.latent_reward, which ranks the latents"
                    " of x0 projections in place of decoder and probe; leave one of them out"
                )

    @property
    def steps_to_picture(self) -> int:
        """The ODE steps to the picture of a preview; 0 where a latent reward ranks, and no picture is made."""
        return 0 if self.latent_reward else self.ode_steps

    @property
    def needed_decoder(self) -> str:
        """The tiny decoder that these previews need; empty for none."""
        return self.tiny_decoder if self.decoder == "tiny" else ""
