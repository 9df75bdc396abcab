"""Evaluations of a run: on test prompts before and after training, on validation prompts on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import Sampling, ode
from progrpo.tracking.records import Metrics, metric
from progrpo.tracking.run_folder import RunFolder
from progrpo.training.evaluate import DIVERSE_PROMPTS, STATISTICS, Evaluation, Measures, evaluate, kl_to_reference
from progrpo.training.inputs import HeldOut
from progrpo.training.notices import Notices
from progrpo.training.state import EvaluatorState
from progrpo.training.trainer import Trainer
from progrpo.training.watch import HackingWatch
from progrpo.types import Prompt


@dataclass(frozen=True)
class Best:
    """The validation with the highest mean reward so far, whose weights are kept as `NAME`."""

    NAME: ClassVar[str] = "best"
    iterations: int
    reward: float


def evaluation_metrics(result: Evaluation, stage: str, kl: float | None = None) -> Metrics:
    """The means of an evaluation as metrics, such as `eval/graded`."""
    metrics: Metrics = {f"{stage}/{name}": result.mean(name) for name in ("graded", "strict", "judge", *STATISTICS)}
    if kl is not None:
        metrics[f"{stage}/kl"] = kl
    return metrics | {f"{stage}/held_out@{name}": value for name, value in result.held_out().items()}


class Evaluator:
    """The evaluations of a run's model on held-out prompts, its best weights, and the watch for reward hacking."""

    def __init__(self, trainer: Trainer, held_out: HeldOut, folder: RunFolder, notices: Notices) -> None:
        self.best: Best | None = None
        self.hacked = False
        """Whether training must end, since hacking was seen twice in a row and `watch.hacking` is stop."""
        self._trainer = trainer
        self._held_out = held_out
        self._folder = folder
        self._notices = notices
        self._watch = HackingWatch(trainer.config.watch.max_kl)

    @property
    def final_weights(self) -> str:
        """The name of the weights that are measured and saved at the end."""
        return Best.NAME if self.best else self._trainer.learner.evaluated_weights

    def test(self, weights: str) -> Evaluation:
        """The evaluation of these weights on the test prompts."""
        return self._evaluate(self._held_out.test, weights, diverse=DIVERSE_PROMPTS)

    def validate(self, record: Metrics) -> Metrics:
        """The metrics of the validation prompts after the iteration of that record."""
        trainer = self._trainer
        config = trainer.config.eval
        weights = trainer.learner.evaluated_weights
        result = self._evaluate(self._held_out.validation, weights)
        held_out = result.held_out()
        reward = held_out[config.best_by] if config.best_by else result.mean("graded")
        if config.keep_best and reward is not None and (self.best is None or reward > self.best.reward):
            self.best = Best(trainer.iteration, reward)
            trainer.policy.named_weights.snapshot(Best.NAME, weights)
        sampling = self._sampling(trainer.collector.microbatch.size)
        kl = kl_to_reference(trainer.policy, weights, self._held_out.validation, sampling, config.seed)
        self._watch_for_hacking(result, kl, metric(record, "rollout/diversity"))
        return evaluation_metrics(result, "eval", kl)

    def _sampling(self, microbatch: int) -> Sampling:
        config = self._trainer.config.eval
        return ode(self._trainer.policy, config.num_inference_steps, config.guidance_scale, microbatch)

    def _evaluate(self, prompts: Sequence[Prompt], weights: str, diverse: int = 0) -> Evaluation:
        trainer = self._trainer
        measures = Measures(self._held_out.judge, self._held_out.rewards, diverse)

        def sample(microbatch: int) -> Evaluation:
            sampler = Sampler(trainer.policy, trainer.reward, self._sampling(microbatch))
            return evaluate(sampler, prompts, trainer.config.eval.seed, trainer.ranks, measures)

        with trainer.policy.weights(weights):
            result = trainer.collector.microbatch.run(sample, trainer.collector.refusal)
        trainer.failures.check(f"evaluation after {trainer.iteration} iterations")
        self._report_failures()
        return result

    def _report_failures(self) -> None:
        """Warn of missing held-out scores. Held-out rewards only report, so one that fails stops no training."""
        rewards = self._held_out.rewards
        if rewards is None:
            return
        for failed in self._trainer.ranks.gather([rewards.failures()]):
            missing = ", ".join(
                f"{count} of {failed.asked[name]} of {name}" for name, count in failed.missing.items() if count
            )
            if missing:
                last_error = failed.last_error or "none was given"
                self._notices.console.warn(f"held-out rewards: {missing} are missing; last error: {last_error}")

    def _watch_for_hacking(self, result: Evaluation, kl: float | None, diversity: float | None) -> None:
        """Have the main process compare this evaluation with earlier ones. `diversity` is the last iteration's."""
        mode = self._trainer.config.watch.hacking
        if mode == "off":
            return
        if self._trainer.ranks.is_main:
            witnesses = {"the judge's share": result.column("judge")} | {
                f"the held-out {name}": [record["held_out"][name] for record in result.records]
                for name in result.held_out()
            }
            recent = [metric(record, "rollout/diversity") for record in self._folder.metrics.read()[-4:]]
            statistics = {name: result.column(name) for name in STATISTICS}
            statistics["diversity within groups"] = [*recent, diversity]
            for sign in self._watch.signs(result.column("graded"), witnesses, statistics, kl):
                self._notices.warn(f"the model may be learning to please the reward alone: {sign}")
        stop = mode == "stop" and self._watch.alarms >= 2
        self.hacked = self._trainer.ranks.gather([stop])[0]
        if self.hacked:
            self._notices.console.say(
                "training ends here: the same was seen at two evaluations in a row (watch.hacking stop)"
            )

    def state_dict(self) -> EvaluatorState:
        return {
            "best": None if self.best is None else asdict(self.best),
            "hacking": self._watch.state_dict(),
            "hacked": self.hacked,
        }

    def load_state_dict(self, state: EvaluatorState, comparable: bool = True) -> None:
        """Go on from a checkpoint. Where later evaluations do not compare with earlier ones, begin comparisons anew."""
        if not comparable:
            return
        self.hacked = state["hacked"] and self._trainer.config.watch.hacking == "stop"
        if self.hacked:
            self._notices.console.say(
                "training has ended at a sign of reward hacking (watch.hacking stop); to go on with it, give"
                " watch.hacking warn and accept that change"
            )
        self._watch.load_state_dict(state["hacking"])
        if state["best"] is not None and self._trainer.config.eval.keep_best:
            self.best = Best(**state["best"])
