"""The loop of a run, from its first evaluation to its report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from progrpo.rewards.base import Refusal
from progrpo.rewards.mixture import close_all, closed_where_refused
from progrpo.rollout.plan import UnitCosts
from progrpo.streams import tolerant_streams
from progrpo.tracking.commands import resume_command
from progrpo.tracking.console import Console
from progrpo.tracking.lock import Lock
from progrpo.tracking.run_folder import RunFolder
from progrpo.training import checkpoints, summary
from progrpo.training.distributed import explain_lost_process
from progrpo.training.errors import Interrupted, MissingScoresError
from progrpo.training.evaluator import Evaluator
from progrpo.training.notices import Notices
from progrpo.training.recorder import Recorder
from progrpo.training.run import Run
from progrpo.training.state import RunState, SavedState
from progrpo.training.stopping import Stop
from progrpo.training.summary import Progress
from progrpo.training.totals import TotalsState
from progrpo.training.trainer import Iteration

NO_CHECKPOINT = "there is no checkpoint yet"


def resume_hint(folder: Path) -> str:
    """A clause with the command that goes on from the last checkpoint, if there is one."""
    saved = checkpoints.saved(folder)
    return f"go on from {saved[-1].name} with {resume_command(folder)}" if saved else NO_CHECKPOINT


@contextmanager
def _resume_hint_in_errors(folder: RunFolder) -> Iterator[None]:
    """Add the command that goes on to the error of a reward that ends the run, if there is a checkpoint."""
    try:
        yield
    except (MissingScoresError, Refusal) as error:
        saved = checkpoints.saved(folder.path)
        if not saved:
            raise
        kind = MissingScoresError if isinstance(error, MissingScoresError) else Refusal
        command = resume_command(folder.path)
        raise kind(f"{error}; mend that, and go on from {saved[-1].name} with: {command}") from error


@dataclass(frozen=True)
class Resumption:
    """A checkpoint that a run goes on from. `changed` names prompts (training, evaluation) and a model that are new."""

    state: SavedState
    changed: Sequence[str] = ()


class TrainingLoop:
    """Evaluates, trains, saves and reports. The main process has the folder's `lock`."""

    def __init__(self, run: Run, lock: Lock | None, resumption: Resumption | None = None) -> None:
        self._run = run
        self._trainer = run.trainer
        self._config = run.trainer.config
        """The configuration as config.json has it."""
        self._resumed_at = None if resumption is None else resumption.state["iteration"]
        self._start = run.started
        """The time at which the run would have begun, had all of its attempts followed on each other."""
        self._console = Console(
            self._config.iterations,
            history=run.folder.metrics.read(),
            enabled=run.ranks.is_main,
        )
        self._notices = Notices(self._console)
        self._recorder = Recorder(run.folder, lock, run.ranks, self._notices)
        self._evaluator = Evaluator(run.trainer, run.inputs.held_out, run.folder, self._notices)
        if resumption is not None:
            self._go_on_from(resumption.state, resumption.changed)

    def _go_on_from(self, state: SavedState, changed: Sequence[str]) -> None:
        state = state.copy()
        if "training" in changed:  # what was observed is of other prompts
            state["order"] = self._trainer.order.state_dict()
        self._trainer.load_state_dict(state)
        if not checkpoints.audits_alike(state["config"], self._config):
            self._trainer.plan_monitor.forget_audits()
            self._recorder.forget_costs()
        if not checkpoints.plans_alike(state["config"], self._config):
            self._trainer.plan_monitor.begin_anew()
        alike = checkpoints.evaluates_alike(state["config"], self._config)
        comparable = alike and {"evaluation", "model"}.isdisjoint(changed)
        self._evaluator.load_state_dict(state, comparable)
        self._notices.sentences = list(state["warnings"])
        # the summary also has what a killed attempt did after its last checkpoint
        self._start -= max(state["wall_seconds"], self._run.folder.summary.read().get("wall_seconds") or 0.0)
        if self._run.ranks.is_main and (costs := self._run.folder.costs.read()) is not None:
            self._trainer.plan_monitor.judge.recorded = UnitCosts(**costs)
        if "evaluation" in changed:
            self._notices.warn(
                "the evaluation prompts were changed during the run: before and after are of different prompts, so what"
                " lies between them is not what training did"
            )
        if state["best"] is not None and self._config.eval.keep_best and not comparable:
            self._notices.warn(
                "the best weights are chosen anew (eval.keep_best), from evaluations after iteration"
                f" {state['iteration']} alone: those of other prompts, rewards, settings or models do not compare"
            )

    def train(self) -> RunFolder:
        """Train to the end; the run folder. The summary says what ended a run before that."""
        folder = self._run.folder
        with closed_where_refused(self._run.inputs.rewards):
            for warning in self._run.warnings():
                self._notices.warn(warning)
            if not self._config.model.keep_text_encoders:
                self._run.encode_prompts()
        # to the last word: a launcher that sees one process die sends the others SIGTERM while they say what happened
        with Stop(self._run.ranks) as stop, tolerant_streams():
            try:
                with explain_lost_process(lambda: resume_hint(folder.path)), _resume_hint_in_errors(folder):
                    self._recorder.open_trackers(self._config, self._resumed_at)
                    self._train(stop)
            except BaseException as error:
                with suppress(Exception):  # such as that of a full disk, which must not hide the error
                    self._write_summary(f"stopped: {str(error) or type(error).__name__}")
                raise
            finally:
                close_all(self._run.inputs.rewards, self._console.warn)
                self._recorder.close_trackers()
            self._write_summary("finished")
            self._recorder.report()
        self._run.ranks.wait_for_all()
        return folder

    def _train(self, stop: Stop) -> None:
        self._console.say(summary.introduction(self._trainer, self._run.folder))
        zero = self._run.ranks.zero
        if zero is not None and zero.stage:
            self._console.say(zero.describe(self._run.ranks.world))
        self._write_summary("running")
        if self._resumed_at is None:
            pictures = len(self._run.inputs.held_out.test)
            self._console.say(f"evaluating the model as it is, on {pictures} pictures")
            self._test("before", "reference")
            self._write_summary("running")
        while self._trainer.iteration < self._config.iterations and not self._evaluator.hacked:
            self._stop_if_signalled(stop)
            self._iterate()
        self._stop_if_signalled(stop)
        self._finish()

    def _iterate(self) -> None:
        """Make one iteration, evaluate it if that is due, and record what it left."""
        plan_monitor = self._trainer.plan_monitor
        plan_before = plan_monitor.standing
        self._console.nfe_unpruned = plan_monitor.nfe_unpruned
        done = self._step()
        self._keep_microbatches()
        iterations = self._trainer.iteration
        config = self._config
        if config.eval.every and iterations % config.eval.every == 0:
            done.record.update(self._evaluator.validate(done.record))
        self._warn_of_lost_pictures()
        save = iterations == config.iterations or iterations % config.checkpoint.every == 0
        self._recorder.costs(plan_monitor.judge)
        self._recorder.iteration(done, with_samples=save)
        plan_monitor.announce_change(plan_before, self._console)
        if save or self._evaluator.hacked:
            self._save_checkpoint()
        with self._notices.not_essential("writing summary.json"):
            self._write_summary("running")

    def _step(self) -> Iteration:
        """Make the next iteration. Where a reward ends the run before anything was learnt, save what was trained."""
        totals = self._trainer.totals.state_dict()
        try:
            done = self._trainer.step()
            self._recorder.require_lock()
            return done
        except (MissingScoresError, Refusal) as error:
            # all processes save together, and all have a MissingScoresError, while one alone may have a Refusal
            everywhere = isinstance(error, MissingScoresError) or self._run.ranks.world == 1
            if self._trainer.iteration and self._trainer.untouched and everywhere:
                self._save_checkpoint(totals)
            raise

    def _keep_microbatches(self) -> None:
        """Write the microbatches that fit into config.json, so that a resumed run begins with them."""
        config = self._trainer.config
        if config == self._config:
            return
        self._config = config
        self._recorder.config(config)
        sizes = f"sampling.microbatch {config.sampling.rows_per_call}, optim.microbatch {config.optim.items_per_pass}"
        self._console.warn(f"out of memory: going on with {sizes}")

    def _stop_if_signalled(self, stop: Stop) -> None:
        """Save and end the run where a signal came."""
        signal = stop.asked()
        if signal is None:
            return
        self._save_checkpoint()
        raise Interrupted(
            f"{signal.name} after {self._trainer.iteration} of {self._config.iterations} iterations; all is saved, go"
            f" on with: {resume_command(self._run.folder.path)}",
            signal,
        )

    def _finish(self) -> None:
        """Evaluate the trained model and save its weights."""
        self._trainer.check_frozen()
        best = self._evaluator.best
        weights = self._evaluator.final_weights
        which = f", as it was after iteration {best.iterations}" if best else ""
        pictures = len(self._run.inputs.held_out.test)
        self._console.say(f"evaluating the trained model{which} on {pictures} pictures")
        self._test("after", weights)
        policy = self._run.policy
        name = "lora" if self._config.model.weights == "lora" else policy.denoiser_name
        with self._recorder.weights(name) as folder:
            policy.save(folder, weights)

    def _test(self, when: str, weights: str) -> None:
        """Evaluate on the test prompts, for the summary."""
        self._recorder.evaluation(when, self._evaluator.test(weights), self._trainer.iteration)
        self._warn_of_lost_pictures()

    def _warn_of_lost_pictures(self) -> None:
        if fault := self._trainer.totals.fault:
            self._notices.warn(f"pictures are missing, which are not scored nor trained on: {fault}")

    def _save_checkpoint(self, totals: TotalsState | None = None) -> None:
        """Save the state after the last iteration. `totals` replace those that the next one has begun to count in."""
        self._recorder.require_lock()
        start = time.perf_counter()
        state: RunState = {
            **self._trainer.state_dict(),
            **self._evaluator.state_dict(),
            "wall_seconds": start - self._start,
            "warnings": self._notices.sentences,
            "prompts": self._run.inputs.digests,
            "weights": dict(self._run.policy.fingerprints),
        }
        if totals is not None:
            state["totals"] = totals
        self._recorder.checkpoint(state, self._config)
        self._trainer.totals.add_seconds({"checkpoint": time.perf_counter() - start})

    def _write_summary(self, status: str) -> None:
        if not self._recorder.writes_summary:
            return
        best = self._evaluator.best
        progress = Progress(
            status=status,
            wall_seconds=time.perf_counter() - self._start,
            best_iterations=None if best is None else best.iterations,
            warnings=self._notices.sentences,
        )
        self._recorder.summary(summary.summarize(self._trainer, self._run.folder, progress))
