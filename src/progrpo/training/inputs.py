"""The inputs of a run: its configuration, rewards, prompts, and a model that is loaded last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from progrpo.config import Config, stochastic_steps
from progrpo.messages import quoted
from progrpo.policies.base import Policy
from progrpo.prompts.order import PromptOrder
from progrpo.prompts.texts import matching_texts
from progrpo.rewards.base import Judge
from progrpo.rewards.mixture import RewardMixture, closed_where_refused, load_mixture
from progrpo.tracking.tracker import require_installed
from progrpo.training import checkpoints
from progrpo.training.build import (
    eval_prompts,
    judge_for,
    policy_context,
    policy_from,
    ranking_from,
    train_order,
)
from progrpo.training.distributed import Ranks
from progrpo.training.equal_inputs import require_same_prompts
from progrpo.types import Prompt


@dataclass(frozen=True)
class HeldOut:
    """The means to measure a run: test prompts for before and after, validation prompts on the way, a judge and
    rewards.

    Neither the judge nor these rewards train the model.
    """

    test: Sequence[Prompt]
    validation: Sequence[Prompt]
    judge: Judge | None
    rewards: RewardMixture | None = None

    @property
    def prompts(self) -> list[Prompt]:
        return [*self.test, *self.validation]


@dataclass(frozen=True)
class RunInputs:
    """The inputs of a run. `load` loads the model, which comes last, since most mistakes show without it."""

    config: Config
    reward: RewardMixture
    order: PromptOrder
    held_out: HeldOut
    load: Callable[[], Policy]

    @property
    def rewards(self) -> list[RewardMixture | None]:
        """The trained and the held-out rewards, which hold connections and processes until they are closed."""
        return [self.reward, self.held_out.rewards]

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digests of the training and the evaluation prompts."""
        return {
            "training": checkpoints.digest(self.order.all_prompts),
            "evaluation": checkpoints.digest(self.held_out.prompts),
        }

    @cached_property
    def all_prompts(self) -> list[Prompt]:
        """Every prompt that the run may use, once."""
        ahead = self.order.possible_prompts(0, self.config.iterations, self.config.prompts.per_iteration)
        return list({id(prompt): prompt for prompt in chain(self.held_out.prompts, ahead)}.values())

    def check(self, ranks: Ranks) -> None:
        """ValueError for trackers that are not installed, unequal prompts of processes, rewards that cannot work."""
        require_installed(self.config.tracking)
        firsts = {"training": next(iter(self.order.all_prompts)), "evaluation": self.held_out.test[0]}
        for name, digest in self.digests.items():
            require_same_prompts(ranks, name, digest, firsts[name])
        # with pairs the reward sees evaluations alone
        self.reward.check(self.held_out.prompts if self.config.prompts.pairs else self.all_prompts)
        if self.held_out.rewards is not None:
            self.held_out.rewards.check(self.held_out.prompts)

    def overlap_warning(self) -> str | None:
        """A warning of evaluation prompts that are trained on while others are not. Where all are, it was asked for."""
        held_out = list(dict.fromkeys(prompt.text for prompt in self.held_out.prompts))
        trained = matching_texts(held_out, (prompt.text for prompt in self.order.all_prompts))
        if not 0 < len(trained) < len(held_out):
            return None
        return (
            f"{len(trained)} of {len(held_out)} evaluation prompts are trained on as well (letters, quotes and spaces"
            f" in any form), so evaluations are not of held-out prompts alone; the first is {quoted(trained[0])}"
        )


def audits_warning(config: Config) -> str | None:
    """A warning of a setting that needs three audits, in a run that ends before it could make use of them."""
    by_audits = {
        "plan.preset auto": config.plan.preset == "auto",
        "plan.adaptive": config.plan.adaptive,
        "preview.probe": config.preview.probe,
    }
    names = [name for name, active in by_audits.items() if active]
    at_once = config.plan.preset == "auto"  # it audits the first three iterations, whatever `audit.every` is
    third = 3 if at_once else 3 * config.audit.every
    if not names or config.prompts.pairs or config.iterations > third:
        return None
    sooner = "" if at_once else f", or audit more often than audit.every {config.audit.every}"
    return (
        f"{' and '.join(names)} cannot have an effect in {config.iterations} iterations: the third audit, which is"
        f" needed, comes in iteration {third}; raise iterations{sooner}"
    )


def noise_warning(config: Config) -> str | None:
    """A warning of settings of noise in a run none of whose steps adds noise."""
    sampling = config.sampling
    set_here = {
        f"sampling.sampler {sampling.sampler}": sampling.sampler != "auto",
        f"sampling.noise_level {sampling.noise_level}": sampling.noise_level is not None,
    }
    names = [name for name, given in set_here.items() if given]
    if not names or config.prompts.pairs or stochastic_steps(config, 0):
        return None
    return (
        f"{' and '.join(names)} cannot have an effect: sampling.sde_window {sampling.sde_window} follows the ODE at"
        f" every step under objective.name {config.objective.name}"
    )


def inputs_from(config: Config, ranks: Ranks) -> RunInputs:
    """The inputs that a configuration names."""
    evaluation, reward = config.eval, config.reward
    test, validation = (
        eval_prompts(evaluation.prompts, split, evaluation.pictures, evaluation.column)
        for split in ("test", "validation")
    )
    order, judge = train_order(config.prompts, config.seed), judge_for(evaluation.prompts)
    mixture = load_mixture(reward.terms, reward.frames, ranking_from(config.objective, reward))
    with closed_where_refused([mixture]):
        held_out = HeldOut(test, validation, judge, held_out_rewards(config))
    return RunInputs(config, mixture, order, held_out, lambda: policy_from(config.model, policy_context(config, ranks)))


def held_out_rewards(config: Config) -> RewardMixture | None:
    """The held-out rewards that a configuration names, as one; None without any."""
    return load_mixture(config.eval.rewards, config.reward.frames) if config.eval.rewards else None
