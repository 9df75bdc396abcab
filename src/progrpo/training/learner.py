"""The learner of a run: it changes weights by a rollout, keeps averages of them, and checks that they learn."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from progrpo.config import Config, learning_rate, negative_weight
from progrpo.objectives.base import Experience
from progrpo.policies.base import Policy
from progrpo.policies.sharded import all_gathered
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.sampling import Sampling
from progrpo.rollout.sharding import NOT_SHARDED
from progrpo.training import checks
from progrpo.training.build import objective_from
from progrpo.training.distributed import Ranks, Tally
from progrpo.training.experience import AdvantageEstimator
from progrpo.training.loss_scale import LossScale
from progrpo.training.optimizer import load_optimizer, optimizer_from
from progrpo.training.pictures import group_diversities
from progrpo.training.state import LearnerState
from progrpo.training.update import Updated, Updater
from progrpo.training.watch import SelfChecks
from progrpo.types import Rollout

EMA = "ema"
CURRENT = "current"


class Learner:
    """The objective and the optimizer of a policy, and the averages of its weights.

    `reward_weights` are the weights of the mixed rewards, by name.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        reward_weights: Mapping[str, float],
        ranks: Ranks,
        self_checks: SelfChecks,
    ) -> None:
        self.objective = objective_from(config, policy)
        optimizer = optimizer_from(config.optim, policy.trainable.values(), ranks.zero)
        loss_scale = LossScale(config.model.dtype == "float16")
        self.updater = Updater(policy, self.objective, optimizer, config.optim, ranks, loss_scale)
        self.estimator = AdvantageEstimator(
            config.objective,
            self.objective.settings.adv_clip_max,
            reward_weights,
            ranks,
            config.reward.quorum,
            ranks if config.prompts.split_groups else NOT_SHARDED,
        )
        self._config = config
        self._policy = policy
        self._ranks = ranks
        self._self_checks = self_checks
        self._checked_first_update = False
        self._keeps_ema = config.optim.ema_decay > 0
        for name in self._averages:
            policy.named_weights.snapshot(name)

    @property
    def _averages(self) -> list[str]:
        """The names of the averages that are kept."""
        return [*([EMA] if self._keeps_ema else []), *self.objective.settings.averages]

    @property
    def evaluated_weights(self) -> str:
        """The weights that evaluation and the saved LoRA use."""
        return EMA if self._keeps_ema else CURRENT

    @property
    def learning_rate(self) -> float:
        """The rate of the last update."""
        rate: float = self.updater.optimizer.param_groups[0]["lr"]
        return rate

    def learn(self, rolled: Rollout, sampling: Sampling, key: NoiseKey, iteration: int) -> Updated:
        """Update the weights by the rollout of a zero-based iteration. SelfCheckError for a run that does not learn."""
        weight = negative_weight(self._config, iteration)
        experience, tally = self.estimator.experience(rolled, sampling, key, weight)
        for group in self.updater.optimizer.param_groups:
            group["lr"] = learning_rate(self._config, iteration)
        updated = self.updater.update(experience)
        tally.merge(updated.tally)
        tally.merge(_diversity(rolled))
        self._update_averages(iteration)
        number = iteration + 1  # as people count
        self._self_checks.check_updates(number, updated.skipped, self._config.optim.updates_per_rollout)
        items = self._ranks.sum(torch.tensor(float(updated.items))).item()
        taught = items > 0 and not updated.skipped
        self._self_checks.check_weights(number, checks.sum_of_trained(self._policy), taught)
        if taught and not self._checked_first_update:
            self._check_first_update(updated, experience)
        return Updated(tally, updated.items)

    def _update_averages(self, iteration: int) -> None:
        if self._keeps_ema:
            self._policy.named_weights.update(EMA, self._config.optim.ema_decay)
        for name, average in self.objective.settings.averages.items():
            self._policy.named_weights.update(name, average.decay(iteration + 1))

    def _check_first_update(self, updated: Updated, experience: Experience) -> None:
        """Check the first update in the life of this object, so again after a resume."""
        self._checked_first_update = True
        deviation = updated.tally.maxima.get("update/on_policy_deviation")
        if deviation is not None:
            assert self.objective.clip_range is not None
            rounding = checks.rounding_between(self._policy, self.objective)
            checks.check_ratio(deviation, self.objective.clip_range, rounding)
        if "reference" not in self._policy.named_weights:
            return  # a resumed run that let it go after these checks
        checks.check_moved(self._policy)
        if len(experience):
            checks.check_bound(self._policy, experience)
        self._ranks.drain_peer_calls()  # the others may be at it still, and need this process' part of the reference
        if self._config.model.weights == "full" and not self.objective.settings.uses_reference:
            self._policy.named_weights.forget("reference")  # a copy of the whole denoiser that nothing asks for

    def state_dict(self) -> LearnerState:
        """The main process' state is whole; all must ask for it, since some weights may be shared out."""
        return {
            "policy": all_gathered(self._policy.named_weights.state_dict(), self._ranks.is_main),
            "optimizer": all_gathered(self.updater.optimizer.state_dict(), self._ranks.is_main),
            "loss_scale": self.updater.loss_scale.state_dict(),
            "noise_scale": self.updater.noise_scale.state_dict(),
        }

    def load_state_dict(self, state: LearnerState) -> None:
        """Go on from a saved state, by the configuration's own settings where they are others than the saved ones."""
        own_weights = self._policy.named_weights.names
        # a run whose loss asked for no reference has let it go: it is what was loaded
        needed = ("reference",) if self.objective.settings.uses_reference else ()
        self._policy.named_weights.load_state_dict(state["policy"], keep=needed)
        for name in (EMA, *self.objective.settings.averages):
            if name in own_weights and name not in self._policy.named_weights:  # an average that begins only now
                self._policy.named_weights.snapshot(name)
        load_optimizer(self.updater.optimizer, state["optimizer"])
        self.updater.loss_scale.load_state_dict(state.get("loss_scale", {}))
        self.updater.noise_scale.load_state_dict(state.get("noise_scale", {}))


def _diversity(rolled: Rollout) -> Tally:
    """The diversity of pictures within a group."""
    tally = Tally()
    there_N = rolled.pictures.there_N.numpy()
    values = group_diversities(rolled.pictures.images_NHWC.numpy()[there_N], rolled.group_N.numpy()[there_N])
    tally.add("rollout/diversity", sum(values), len(values))
    return tally
