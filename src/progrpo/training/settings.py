"""The settings of the optimizer, audits, evaluations, self-checks and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from progrpo.prompts.settings import COLUMN_NAME
from progrpo.rewards.settings import RewardTerm, check_terms
from progrpo.settings import FRACTION, NUM_STEPS, Rule, above, at_least, between, setting


@dataclass(frozen=True)
class OptimSettings:
    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """The optimizer. `adamw_8bit` stores AdamW's two averages in 8 bits (arXiv 2110.02861).
    It does so for parameters of 4096 numbers or more, which takes a quarter of the memory. A run's figures
    differ.
    It needs the extra `lean`."""
    lr: float = setting(1e-3, above(0))
    """The learning rate."""
    warmup: int = setting(0, at_least(0))
    """The number of iterations over which the rate rises to `lr`, in equal steps."""
    decay: float = setting(0.0, between(0, 1))
    """The share of the run's iterations, at its end, over which the rate falls linearly towards 0."""
    betas: tuple[float, float] = setting(
        (0.9, 0.999), Rule(lambda betas: all(0 <= beta < 1 for beta in betas), "two numbers at least 0 and below 1")
    )
    """AdamW's decay rates of its two averages."""
    weight_decay: float = setting(1e-4, at_least(0))
    """AdamW's weight decay."""
    max_grad_norm: float = setting(1.0, above(0))
    """The norm to which gradients are clipped."""
    updates_per_rollout: int = setting(1, at_least(1))
    """The number of optimizer steps in an iteration, each on its share of every group."""
    microbatch: int | None = setting(None, at_least(1).or_empty(" to have it measured"))
    """The largest number of items in a forward and backward pass.
    Empty: measured, like the microbatch of sampling."""
    reuse_rollout: bool = False
    """Let the first update of GRPO go back through the graphs that sampling computed (LeanGRPO, arXiv 2609.03528).
    It then needs no forward pass of its own.
    The graphs of all members that were alive at a trained step stay in memory until then, including pruned
    members.
    This is for plans that prune few members, and for models that fit in memory this way."""
    noise_scale: bool = True
    """Measure the gradient noise scale (arXiv 1812.06162): how many prompts an iteration needs before noise no longer
    rules its gradient.
    It compares the gradients of two halves of the prompts, and in one of eight updates of two halves of each prompt's
    members. That takes the memory of a second gradient, at most one pass more for each optimizer step, and with several
    processes a second sum of gradients. DGPO and DPO compute the weights of groups beforehand in these.
    It is not measured with one prompt, with `reuse_rollout`, or where weights are trained in full and sharded."""
    ema_decay: float = setting(0.0, FRACTION)
    """The decay of an average of the weights. Above 0, evaluations and the saved LoRA use this average."""

    @property
    def items_per_pass(self) -> int:
        """The items of a forward and backward pass: `microbatch`, or 64 where none was given or measured."""
        return 64 if self.microbatch is None else self.microbatch

    @property
    def measures_noise_scale(self) -> bool:
        """Whether gradients come in halves: graphs of sampling hold all prompts, and are gone after one pass."""
        return self.noise_scale and not self.reuse_rollout

    def learning_rate(self, iteration: int, iterations: int) -> float:
        """The learning rate of a zero-based iteration in a run of `iterations`; never 0."""
        rising = min(1.0, (iteration + 1) / max(1, self.warmup))
        falling = min(1.0, (iterations - iteration) / (self.decay * iterations)) if self.decay else 1.0
        return self.lr * min(rising, falling)


@dataclass(frozen=True)
class AuditSettings:
    every: int = setting(5, at_least(0))
    """Audit one group in every n-th iteration; 0: never.
    An audited group runs unpruned and is previewed at every step.
    It is one of the iteration's where the plan trains on every member, and else one more, never trained on.
    With `plan.preset auto` each iteration has an audit until a plan is chosen, which takes three as a rule."""


@dataclass(frozen=True)
class EvalSettings:
    prompts: str = "shapes"
    """The evaluation prompts: `shapes` or `words` (their test split), a prompt file, or `dataset:NAME`.
    A dataset's split `test` is used, or `train` if it has none."""
    column: str = setting("prompt", COLUMN_NAME)
    """The field of a row that holds its text, as in `prompts`."""
    pictures: int = setting(512, between(1, 1_000_000))
    """The number of pictures in an evaluation."""
    every: int = setting(0, at_least(0))
    """Evaluate on the validation prompts every n iterations; 0: never.
    The test prompts are always evaluated before and after training."""
    rewards: tuple[RewardTerm, ...] = ()
    """Held-out rewards. They are measured beside the trained reward and never trained on."""
    best_by: str = ""
    """The reward by which `keep_best` chooses: one of `rewards`.
    Empty: the trained reward."""
    keep_best: bool = False
    """At the end, measure and save the weights with the highest mean reward on the validation prompts, not the
    last ones.
    A prompt file has no splits: the choice is then made on the prompts on which the result is measured.
    That makes the result look better than it is."""
    num_inference_steps: int = setting(10, NUM_STEPS)
    """The number of sampling steps in evaluations."""
    guidance_scale: float = setting(1.0, at_least(1))
    """The guidance scale in evaluations; 1 is no guidance."""
    seed: int = setting(1234, at_least(0))
    """The seed of the noise in evaluations."""

    def check(self) -> None:
        """Raise ValueError if `best_by` or `keep_best` ask for a best that the run does not measure."""
        check_terms("eval.rewards", self.rewards)
        names = [term.name for term in self.rewards]
        if self.best_by and self.best_by not in names:
            raise ValueError(
                f"eval.best_by must name one of eval.rewards ({', '.join(names) or 'there is none'}),"
                f" not {self.best_by!r}"
            )
        if self.keep_best and not self.every:
            raise ValueError(
                "eval.keep_best must have eval.every above 0: the best is that of the evaluations on the way"
            )


@dataclass(frozen=True)
class WatchSettings:
    """The limits of a run's self-checks. A check that fails stops the run with a diagnosis; 0 turns a check off."""

    max_skipped: float = setting(0.2, between(0, 1))
    """The largest share of the last 20 updates that may be skipped; above it the run stops.
    An update is skipped if its loss or gradient is not finite."""
    flat_iterations: int = setting(10, at_least(0))
    """Stop after this many iterations in a row in which the rewards differ within no group."""
    still_iterations: int = setting(5, at_least(0))
    """Stop after this many iterations in a row in which no trained weight moves.
    Iterations without anything to learn do not count."""
    lost_agreement: float = setting(0.25, between(0, 1))
    """Stop if previews have collapsed: their agreement in the last five audits is below this share of the best
    five."""
    hacking: Literal["off", "warn", "stop"] = "warn"
    """The response to signs of reward hacking. `off`: none. `warn`: a warning.
    `stop`: also end training when it is seen at two evaluations in a row; the run then finishes normally.
    The signs, at an evaluation during training: the trained reward rises, and at the same time
    the judge or a held-out reward falls, or pictures become much sharper, blander or more alike,
    or the model is further from its reference than `max_kl`."""
    max_kl: float = setting(1.0, at_least(0))
    """The largest mean square distance of the network's velocities to the reference's.
    Latents have a variance of about 1. It is measured at evaluations during training."""


@dataclass(frozen=True)
class CheckpointSettings:
    every: int = setting(5, at_least(1))
    """Save a checkpoint every n iterations."""
    keep: int = setting(2, at_least(1))
    """The number of checkpoints to keep."""
