"""The settings of the optimizer and of what a run does beside training: audits, evaluations, watching, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from progrpo.prompts.settings import COLUMN_NAME
from progrpo.rewards.settings import RewardTerm, check_terms
from progrpo.settings import FRACTION, NUM_STEPS, Rule, above, at_least, between, setting


@dataclass(frozen=True)
class OptimSettings:
    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps AdamW's two averages of each weight in 8 bits (arXiv 2110.02861) where a parameter has 4096 numbers or more: a quarter
    of the memory, other figures. It needs the extra `lean`."""
    lr: float = setting(1e-3, above(0))
    warmup: int = setting(0, at_least(0))
    """Iterations over which the rate rises to `lr`, in equal steps."""
    decay: float = setting(0.0, between(0, 1))
    """Share of the run's iterations, at its end, over which the rate falls linearly towards 0."""
    betas: tuple[float, float] = setting(
        (0.9, 0.999), Rule(lambda betas: all(0 <= beta < 1 for beta in betas), "two numbers at least 0 and below 1")
    )
    weight_decay: float = setting(1e-4, at_least(0))
    max_grad_norm: float = setting(1.0, above(0))
    updates_per_rollout: int = setting(1, at_least(1))
    microbatch: int | None = setting(None, at_least(1).or_empty(" to have it measured"))
    """Items of a forward and backward pass at most; empty: measured, as that of sampling."""
    reuse_rollout: bool = False
    """GRPO: the first update goes back through the graphs of what sampling computed, without a forward pass of its own (LeanGRPO,
    arXiv 2609.03528). Graphs of everyone who lived at a trained step are held until then, also of the pruned: for plans that prune
    few, and models that fit."""
    ema_decay: float = setting(0.0, FRACTION)
    """Above 0, evaluation and the saved LoRA use an average of the weights."""

    def learning_rate(self, iteration: int, iterations: int) -> float:
        """The rate of a zero-based iteration of a run of so many; never 0."""
        rising = min(1.0, (iteration + 1) / max(1, self.warmup))
        falling = min(1.0, (iterations - iteration) / (self.decay * iterations)) if self.decay else 1.0
        return self.lr * min(rising, falling)


@dataclass(frozen=True)
class AuditSettings:
    every: int = setting(5, at_least(0))
    """Every n-th iteration one group runs unpruned, is decoded at every step and is never trained on; 0: never."""


@dataclass(frozen=True)
class EvalSettings:
    prompts: str = "shapes"
    """`shapes` (the built-in test split), a prompt file, or `dataset:NAME` (its split `test`, else its `train`)."""
    column: str = setting("prompt", COLUMN_NAME)
    """As that of `prompts`."""
    pictures: int = setting(512, between(1, 1_000_000))
    every: int = setting(0, at_least(0))
    """Evaluate every n iterations on the validation prompts; before and after always happen, on the test prompts."""
    rewards: tuple[RewardTerm, ...] = ()
    """Held-out rewards, which are measured beside the trained one and never trained on."""
    best_by: str = ""
    """Of `keep_best`: the held-out reward (of `rewards`) by which the best is chosen; empty: the trained reward."""
    keep_best: bool = False
    """At the end, measure and save the weights that had the highest mean reward on the validation prompts, not the last. Prompt
    files have no splits: with one, the choice is made on the prompts that it is then measured on, which flatters it."""
    num_inference_steps: int = setting(10, NUM_STEPS)
    guidance_scale: float = setting(1.0, at_least(1))
    seed: int = setting(1234, at_least(0))

    def check(self) -> None:
        """ValueError for a best that nothing measures."""
        check_terms("eval.rewards", self.rewards)
        names = [term.name for term in self.rewards]
        if self.best_by and self.best_by not in names:
            raise ValueError(
                f"eval.best_by must name one of eval.rewards ({', '.join(names) or 'there is none'}), not {self.best_by!r}"
            )
        if self.keep_best and not self.every:
            raise ValueError(
                "eval.keep_best must have eval.every above 0: the best is that of the evaluations on the way"
            )


@dataclass(frozen=True)
class WatchSettings:
    """What a run looks out for. A self-check that fails stops it with a diagnosis; 0 turns one off."""

    max_skipped: float = setting(0.2, between(0, 1))
    """An update whose loss or gradient is not finite is skipped. The run stops when more than this share of the last 20 were."""
    flat_iterations: int = setting(10, at_least(0))
    """Iterations in a row in which no group's rewards differ."""
    still_iterations: int = setting(5, at_least(0))
    """Iterations in a row in which no trained weight moves, though there is something to learn."""
    lost_agreement: float = setting(0.25, between(0, 1))
    """Previews have collapsed when their agreement in the last five audits is below this share of the best five."""
    hacking: Literal["off", "warn", "stop"] = "warn"
    """When the trained reward rises at an evaluation on the way, and the judge or a held-out reward falls, or pictures become much
    sharper, blander or more alike, or the model goes further from its reference than `max_kl`: say so, or also end training there, as if
    it were done, when it is seen twice in a row."""
    max_kl: float = setting(1.0, at_least(0))
    """Mean square distance of the network's velocities to the reference's (latents have a variance of about 1), measured at evaluations on the way."""


@dataclass(frozen=True)
class CheckpointSettings:
    every: int = setting(5, at_least(1))
    keep: int = setting(2, at_least(1))
