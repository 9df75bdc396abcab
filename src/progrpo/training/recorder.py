"""The place where a run hands out its records: to the run folder, the console and other trackers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from progrpo.config import Config, to_dict
from progrpo.pages.report import write_report
from progrpo.tracking.grids import tile
from progrpo.tracking.lock import Lock
from progrpo.tracking.own_files import new_weights
from progrpo.tracking.records import Summary
from progrpo.tracking.run_folder import RunFolder
from progrpo.tracking.tracker import Tracker, Trackers, open_trackers
from progrpo.training import checkpoints
from progrpo.training.distributed import Ranks
from progrpo.training.evaluate import Evaluation
from progrpo.training.evaluator import evaluation_metrics
from progrpo.training.notices import Notices
from progrpo.training.plan_judge import PlanJudge
from progrpo.training.state import RunState
from progrpo.training.trainer import Iteration

_SAMPLES, _SAMPLE_COLUMNS = 32, 8  # of the grid of an iteration's pictures
_TEST_PICTURES, _TEST_COLUMNS = 36, 6  # of the grid of an evaluation's pictures


class Recorder:
    """The writer of what a run leaves. Only the main process writes, and it has the folder's `lock`."""

    def __init__(self, folder: RunFolder, lock: Lock | None, ranks: Ranks, notices: Notices) -> None:
        self.folder = folder
        self._lock = lock
        self._ranks = ranks
        self._notices = notices
        self._trackers = Trackers({}, notices.warn)

    def open_trackers(self, config: Config, resumed_at: int | None) -> None:
        """Open the trackers of `tracking.to` in the main process. ValueError, in all, for one that cannot be opened."""

        def open_and_log_config() -> None:
            self._trackers = open_trackers(config.tracking, self.folder, resumed_at, self._notices.warn)
            self._trackers.log_config(to_dict(config))

        self._ranks.from_main(open_and_log_config)

    def close_trackers(self) -> None:
        self._trackers.close()

    @property
    def _all_trackers(self) -> list[Tracker]:
        return [self.folder, self._notices.console, self._trackers]

    def require_lock(self) -> None:
        """LockLostError, before something is written, where another run has taken the folder."""

        def check() -> None:
            if self._lock is not None:
                self._lock.check()

        self._ranks.from_main(check)

    def config(self, config: Config) -> None:
        """Write the configuration again, after what was measured has changed."""
        if self._ranks.is_main:
            for tracker in self._all_trackers:
                tracker.log_config(to_dict(config))

    def costs(self, judge: PlanJudge) -> None:
        """Write the costs that plans are judged by, once, and before any record of a decision that depends on them."""
        if self._ranks.is_main and judge.units is not None and judge.recorded is None:
            self.folder.costs.write(asdict(judge.units))
            judge.recorded = judge.units

    def forget_costs(self) -> None:
        """Drop the written costs: those of other rewards or previews are not this run's."""
        if self._ranks.is_main and self.folder.costs.read() is not None:
            self.folder.costs.write(None)

    def iteration(self, done: Iteration, with_samples: bool) -> None:
        """Hand out an iteration's record, its audit, and its pictures if they are asked for."""
        if not self._ranks.is_main:
            return
        for tracker in self._all_trackers:
            tracker.log(done.record, done.number)
        if done.audit is not None:
            with self._notices.not_essential("writing an audit"):
                self.folder.write_audit(done.audit.record(done.number), done.audit.pictures_GSHWC)
        # under plan.keep_groups all groups of this process may have been stopped
        if with_samples and len(done.rollout.pictures.images_NHWC):
            with self._notices.not_essential("writing samples"):
                grid = tile(done.rollout.pictures.images_NHWC[:_SAMPLES].numpy(), _SAMPLE_COLUMNS)
                for tracker in self._all_trackers:
                    tracker.log_images({"samples": grid}, done.number)

    def evaluation(self, when: str, result: Evaluation, iterations: int) -> None:
        """Write the evaluation before or after training, which is after so many iterations."""
        self.require_lock()
        if not self._ranks.is_main:
            return
        self.folder.write_evaluation(when, result.records, result.pictures_NHWC)
        metrics = evaluation_metrics(result, "test") | {"test/diversity": result.mean("diversity")}
        self._trackers.log(metrics, iterations)
        grid = tile(result.pictures_NHWC[:_TEST_PICTURES], _TEST_COLUMNS)
        self._trackers.log_images({"test/pictures": grid}, iterations)

    def checkpoint(self, state: RunState, config: Config) -> None:
        """Save a checkpoint."""
        if self._ranks.is_main:
            checkpoints.save(self.folder.path, state, config)

    @contextmanager
    def weights(self, name: str) -> Iterator[Path | None]:
        """A folder for the trained weights, which appears whole; None in other processes than the main one."""
        if not self._ranks.is_main:
            yield None
            return
        with new_weights(self.folder.path / name) as folder:
            yield folder

    @property
    def writes_summary(self) -> bool:
        """Whether this process writes the summary: the main one, unless another run has taken the folder."""
        return self._ranks.is_main and (self._lock is None or not self._lock.is_lost)

    def summary(self, summary: Summary) -> None:
        self.folder.summary.write(summary)

    def report(self) -> None:
        """Write the report and print the summary. All is saved by now, so a failure here takes nothing from it."""
        if not self._ranks.is_main:
            return
        report = None
        with self._notices.not_essential("writing report.html"):
            report = write_report(self.folder.path)
        with self._notices.not_essential("reading summary.json"):
            self._notices.console.summary_table(self.folder.summary.read(), report)
