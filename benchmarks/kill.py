"""Kills of a run at random moments and before each of its writes: resumed every time, it equals an unbroken one.

    python benchmarks/kill.py [--kills 100] [--seed 0] [--out runs/kills] [--json]

The run has a checkpoint per iteration, audits, the best weights kept, an average of the weights, and prompts by signal.
A killed run is resumed by `progrpo train --resume` in a new process, forked from one that has only imported. At its end
its weights, optimizer, metrics, evaluations and pictures must be those of the unbroken run to the last bit (CPU,
float32); only seconds may differ. After each kill, every file with a final name must be whole.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from progrpo import storage
from progrpo.cli import main
from progrpo.config import (
    AuditSettings,
    Config,
    EvalSettings,
    PlanSettings,
    PromptSettings,
    RewardSettings,
    RewardTerm,
    WatchSettings,
    config_to_json,
)
from progrpo.recipes import load_recipe
from progrpo.tracking.run_folder import RunFolder
from progrpo.training.checkpoints import saved

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or importing it warns of picture formats we do not use
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    ["progrpo.training.entry", "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"]
)
PROMPTS = ("a red circle", "a blue square", "a green triangle above a red square", "two yellow circles")


# --- the process that is killed ---------------------------------------------------------------------------------------


class Death:
    """The kill of this process before the n-th of its writes in `room`; 0 is never.

    It notes each write to the files of a run.
    """

    def __init__(self, run: Path, room: str, nth: int, log: Path) -> None:
        self._run, self._room, self._nth, self._count = str(run), room, nth, 0
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def watch(self) -> None:
        sync, write = os.fsync, safetensors.torch.save_file  # neither of them is an event that Python audits

        def fsync(fd: FileDescriptorLike) -> None:
            self._about_to("fsync", f"/proc/self/fd/{fd if isinstance(fd, int) else fd.fileno()}")
            sync(fd)

        def save_file(
            tensors: dict[str, Tensor], filename: str | os.PathLike[str], metadata: dict[str, str] | None = None
        ) -> None:
            self._about_to("save_file", filename)
            write(tensors, filename, metadata)
            self._about_to("save_file, half", filename, lambda: os.truncate(filename, os.path.getsize(filename) // 2))

        os.fsync, safetensors.torch.save_file, storage.save_file = fsync, save_file, save_file
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and not isinstance(args[0], int):
            writes = set(args[1]) & set("wax+") if args[1] else args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes:
                self._about_to("open", args[0])
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            folder = args[-1] if event != "os.rename" and args[-1] not in (-1, None) else None
            self._about_to(event, args[0] if folder is None else f"/proc/self/fd/{folder}/{os.fsdecode(args[0])}")

    def _about_to(
        self, what: str, written: str | bytes | os.PathLike[str], dying: Callable[[], None] | None = None
    ) -> None:
        path = os.fsdecode(written)
        folder, name = os.path.split(path)
        place = os.path.realpath(path) if folder.startswith("/proc") else os.path.join(os.path.realpath(folder), name)
        if place != self._run and not place.startswith(self._run + os.sep):
            return
        place = os.path.relpath(place, self._run)
        os.write(self._log, f"{what}\t{place}\n".encode())
        self._count += place.startswith(self._room)
        if self._count == self._nth:
            if dying is not None:
                dying()
            os.kill(os.getpid(), signal.SIGKILL)


def progrpo(arguments: Sequence[str], run: Path, room: str, nth: int, log: Path) -> None:
    """Run the command in a process of its own whose output goes to a file."""
    words = os.open(log.with_suffix(".words"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(words, 1)
    os.dup2(words, 2)
    torch.set_num_threads(1)
    Death(run, room, nth, log).watch()
    sys.exit(main(arguments))


# --- who kills --------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    runs: int = 0
    """Ended, and equal to the unbroken one to the last bit."""
    kills: int = 0
    resumes: int = 0
    begun_anew: int = 0
    """After a kill before the first checkpoint."""
    iterations_redone: int = 0
    """Recorded in metrics.jsonl, but in no checkpoint yet."""
    bytes_lost: int = 0
    """The number of checkpoints that were the newest whole one before a kill and are not whole after it."""
    bytes_unfinished: int = 0
    """The bytes of files that had no final name yet."""
    enumerated: int = 0
    """The writes of a resumed process up to the end of its first iteration, if it was killed before each; else 0."""
    seconds: float = 0.0
    by_stage: Counter[str] = field(default_factory=Counter)


class Campaign:
    """Runs of one configuration, one after another, each killed again and again until it has come to its end.

    A process that resumes in the middle of a run is killed before the n-th of its writes, by the numbers of `stages`,
    counted in the part `room` of the folder; when they are used up, at random moments.
    """

    def __init__(self, config: Path, home: Path, seed: int, stages: Iterable[int], room: str = "") -> None:
        self.config, self.run, self.straight, self.log = config, home / "killed", home / "straight", home / "touched"
        self.draw, self.tally = random.Random(seed), Tally()
        self.iterations = json.loads(config.read_text())["iterations"]
        self.stages, self.room, self.span = deque(stages), room, 0.0

    def go(self, kills: int) -> Tally:
        """Run at least so many kills, and all stages."""
        start = time.perf_counter()
        process = self._start(self.straight, "", 0, resume=False)
        process.join()
        self._require_success(process)
        self.span = 0.4 * RunFolder(self.straight).summary.read()["wall_seconds"]
        while self.stages or self.tally.kills < kills:
            shutil.rmtree(self.run, ignore_errors=True)
            while self._attempt(bool(self.stages) or self.tally.kills < kills):
                pass
            if differing := differences(self.straight, self.run):
                raise SystemExit(f"a killed run differs from the unbroken one: {'; '.join(differing)}")
            self.tally.runs += 1
        self.tally.seconds = time.perf_counter() - start
        return self.tally

    def _attempt(self, to_be_killed: bool) -> bool:
        """Start or resume the run; return whether it was killed before its end."""
        before = Standing.of(self.run)
        room, nth, delay = self._moment(before) if to_be_killed else ("", 0, None)
        process = self._start(self.run, room, nth, before.checkpoint is not None)
        if delay is not None:
            self._wait_for_lock(process)
            process.join(delay)
            process.kill()
        process.join()
        self.tally.resumes += before.checkpoint is not None
        if process.exitcode == -signal.SIGKILL:
            self._count(
                before, Standing.of(self.run), "at a random moment" if delay is not None else self._stage(before)
            )
            return True
        self._require_success(process)
        return False

    def _moment(self, before: Standing) -> tuple[str, int, float | None]:
        """The moment of the next kill: the n-th write in a room, or seconds after the process has taken the folder."""
        in_the_middle = before.checkpoint is not None and before.checkpoint < self.iterations - 1
        if in_the_middle and self.stages:
            return self.room, self.stages.popleft(), None
        if not in_the_middle and self.draw.random() < 0.5:  # the base model's evaluation, or the end
            return "", self.draw.randint(1, 90), None
        return "", 0, self.draw.uniform(0, self.span)

    def _stage(self, before: Standing) -> str:
        """The write that the process was about to do.

        Where a resumed process was in its second iteration, every write of one iteration has been tried.
        """
        touched = [line.split("\t") for line in self.log.read_text().splitlines()]
        if before.checkpoint is not None and touched.count(["open", "metrics.jsonl"]) > 1 and self.stages:
            self.tally.enumerated = len(touched) - 1
            self.stages.clear()
        what, place = touched[-1]
        place = re.sub(r"[.][0-9]+[.]writing$", "", place)
        return f"{place.split(os.sep)[0]}: {what.removeprefix('os.')}"

    def _count(self, before: Standing, after: Standing, stage: str) -> None:
        tally = self.tally
        tally.kills += 1
        tally.by_stage[stage] += 1
        tally.begun_anew += after.checkpoint is None
        tally.iterations_redone += after.records - (after.checkpoint or 0)
        tally.bytes_unfinished += after.unfinished
        if (after.checkpoint or 0) < (before.checkpoint or 0):
            tally.bytes_lost += before.size
        if after.records < (after.checkpoint or 0):
            raise SystemExit(f"killed {stage}: metrics.jsonl lacks what is in a checkpoint ({before}, {after})")

    def _start(self, run: Path, room: str, nth: int, resume: bool) -> ForkServerProcess:
        arguments = ["--resume", str(run)] if resume else [str(self.config), "--out", str(run), "--overwrite"]
        self.log.unlink(missing_ok=True)
        process = FORKING.Process(target=progrpo, args=(["train", *arguments], run, room, nth, self.log))
        process.start()
        return process

    def _require_success(self, process: ForkServerProcess) -> None:
        if process.exitcode != 0:
            said = self.log.with_suffix(".words").read_text()[-2000:]
            raise SystemExit(f"a run ended with exit code {process.exitcode}:\n{said}")

    def _wait_for_lock(self, process: ForkServerProcess) -> None:
        while process.is_alive() and not (self.log.exists() and self.log.stat().st_size):
            time.sleep(0.01)


# --- what a kill leaves -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """The state of a run by its folder; reading it fails if a file with a final name is not whole."""

    checkpoint: int | None
    """Iterations of the newest whole checkpoint, and its bytes."""
    size: int
    records: int
    unfinished: int
    """Bytes of what has no final name."""

    @classmethod
    def of(cls, run: Path) -> Standing:
        from PIL import Image

        for path in run.rglob("*.json"):
            if "checkpoints" not in path.parts:
                json.loads(path.read_text())
        for path in run.rglob("*.png"):
            Image.open(path).load()
        for path in run.glob("lora/*.safetensors"):
            safetensors.torch.load_file(path)
        whole = [path for path in saved(run) if is_whole(path)]
        if whole != saved(run)[-len(whole) :] and whole:  # only those that are being deleted may be in parts
            raise SystemExit(f"a damaged checkpoint among {[path.name for path in saved(run)]}")
        unfinished = [p for p in run.rglob("*") if re.search(r"\.(writing|previous)(/|$)", str(p)) and p.is_file()]
        return cls(
            int(whole[-1].name.removeprefix("iteration_")) if whole else None,
            sum(path.stat().st_size for path in whole[-1].iterdir()) if whole else 0,
            len(RunFolder(run).metrics.read()),
            sum(path.stat().st_size for path in unfinished),
        )


def is_whole(checkpoint: Path) -> bool:
    try:
        storage.load_state(checkpoint)
    except ValueError:
        return False
    return True


def differences(straight: Path, run: Path) -> list[str]:
    """The differences of two runs, seconds aside."""
    differing = [
        name
        for name, read in {
            "checkpoint": checkpoint_of,
            "metrics": lambda run: [untimed(record) for record in RunFolder(run).metrics.read()],
            "evaluation before": lambda run: RunFolder(run).evaluations["before"].read(),
            "evaluation after": lambda run: RunFolder(run).evaluations["after"].read(),
            "audits": lambda run: RunFolder(run).read_audits(),
            "config": lambda run: RunFolder(run).config.read(),
            "trained weights": lambda run: safetensors.torch.load_file(
                run / "lora" / "pytorch_lora_weights.safetensors"
            ),
            "status": lambda run: RunFolder(run).summary.read()["status"],
            "figures": lambda run: [RunFolder(run).summary.read()[name] for name in ("nfe", "cost", "reward_after")],
            "names of files": lambda run: sorted(str(p.relative_to(run)) for p in run.rglob("*")),
        }.items()
        if not same(read(straight), read(run))
    ]
    pictures = [p.relative_to(straight) for p in straight.rglob("*.png")]
    return differing + [str(p) for p in pictures if (straight / p).read_bytes() != (run / p).read_bytes()]


def checkpoint_of(run: Path) -> dict[str, Any]:
    """The newest checkpoint, without seconds and the costs that follow from them, by which plans are judged."""
    state = storage.load_state(saved(run)[-1])
    for timed in ("wall_seconds", "plan_value", "judge"):
        del state[timed]
    del state["totals"]["seconds"]
    return state


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    timed = ("seconds", "plan/value", "plan/next_value", "plan/training_ratio")
    return {name: value for name, value in record.items() if name not in timed and not name.startswith("time/")}


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the last bit, tensors and all."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


# --- the command ------------------------------------------------------------------------------------------------------


def configuration(home: Path) -> Config:
    """The built-in model on a few prompts and steps: an iteration of half a second with everything in it."""
    prompts = home / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    base = load_recipe("smoke")
    return replace(
        base,
        recipe="kill",
        iterations=16,
        prompts=PromptSettings(str(prompts), per_iteration=1, order="signal"),
        sampling=replace(base.sampling, num_inference_steps=3),
        plan=PlanSettings(preset="custom", group_size=4, prune=((1, 3),)),
        reward=RewardSettings((RewardTerm("jpeg_compressibility"),)),
        optim=replace(base.optim, ema_decay=0.5),
        audit=AuditSettings(every=1),
        watch=WatchSettings(
            flat_iterations=0, still_iterations=0, lost_agreement=0, hacking="off"
        ),  # it learns nothing
        eval=EvalSettings(prompts=str(prompts), pictures=2, every=1, keep_best=True, num_inference_steps=1),
    )


def campaign() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    home = options.out.resolve()
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    config = home / "config.json"
    config.write_text(config_to_json(configuration(home)))
    tally = Campaign(config, home, options.seed, range(1, 1000)).go(options.kills)
    print(json.dumps(asdict(tally), indent=1) if options.json else in_words(tally))
    sys.exit(1 if tally.bytes_lost else 0)


def in_words(tally: Tally) -> str:
    stages = "\n".join(f"  {stage:<30}{times:>4}" for stage, times in sorted(tally.by_stage.items()))
    return (
        f"{tally.kills} kills in {tally.seconds / 60:.1f} min, {tally.resumes} resumes, {tally.begun_anew} begun anew;"
        f" {tally.runs} runs ended, each equal to the unbroken one\n"
        f"{tally.iterations_redone} finished iterations done again, {tally.bytes_lost} bytes lost,"
        f" {tally.bytes_unfinished:,} bytes of unfinished files left behind and cleared\n"
        f"killed before each of the {tally.enumerated} writes of a resumed process in its first iteration;"
        f" all kills by stage:\n{stages}"
    )


if __name__ == "__main__":
    campaign()
