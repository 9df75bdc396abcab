"""SIGINT, SIGTERM and SIGHUP finish the step, save and end with the line that goes on."""

from __future__ import annotations

import importlib
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import progrpo
from progrpo.config import RewardSettings, RewardTerm
from progrpo.durable import LockLostError
from progrpo.pages.run_data import RunData, read_run_data
from progrpo.tracking.records import Summary
from progrpo.tracking.run_folder import RunFolder
from progrpo.training.checkpoints import saved
from progrpo.training.distributed import Ranks
from progrpo.training.entry import resume_run, train_run
from progrpo.training.errors import Interrupted, SelfCheckError
from progrpo.training.stopping import Stop
from tests.support.locks import record

TIMELESS = ("reward/mean", "update/grad_norm", "rollout/nfe")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_the_step(
    number, request, tiny_pipeline, tiny_config, prompts, redness, tmp_path, monkeypatch
):
    calls = iter(range(1000))

    def signalled(images, texts):
        if next(calls) == 3:  # one evaluation, then two calls an iteration: in the middle of the second
            os.kill(os.getpid(), number)
        return redness(images, texts)

    config = tiny_config(iterations=4)
    ours = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    inherited = signal.signal(number, ours)  # under nohup SIGHUP is ignored
    request.addfinalizer(lambda: signal.signal(number, inherited))
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped:
        progrpo.train(tiny_pipeline(), prompts, signalled, config=config, out=tmp_path / "run")
    assert signal.getsignal(number) is before
    assert stopped.value.signal == number
    assert f"progrpo.train(..., out={str(tmp_path / 'run')!r}, mode='resume')" in str(stopped.value)
    assert str(stopped.value).startswith(f"{number.name} after 2 of 4 iterations; all is saved")
    run = RunFolder(tmp_path / "run")
    assert run.summary.read()["status"].startswith(f"stopped: {number.name}")
    assert [r["iteration"] for r in run.metrics.read()] == [0, 1]
    assert (run.path / "checkpoints" / "iteration_000002").is_dir()


def test_a_handler_of_a_users_own_for_a_queues_notice_stays(tiny_pipeline, tiny_config, prompts, redness, tmp_path):
    """Such as one that writes where every thread is."""
    heard = []

    def noticed(images, texts):
        os.kill(os.getpid(), signal.SIGUSR2)
        return redness(images, texts)

    before = signal.signal(signal.SIGUSR2, lambda *_: heard.append(1))
    try:
        run = progrpo.train(tiny_pipeline(), prompts, noticed, config=tiny_config(iterations=1), out=tmp_path / "run")
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard and run.summary.read()["status"] == "finished"


def test_a_hang_up_that_is_ignored_stays_so(tiny_pipeline, tiny_config, prompts, redness, tmp_path):
    """As under nohup."""

    def hung_up(images, texts):
        os.kill(os.getpid(), signal.SIGHUP)
        return redness(images, texts)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = progrpo.train(tiny_pipeline(), prompts, hung_up, config=tiny_config(iterations=1), out=tmp_path / "run")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert run.summary.read()["status"] == "finished"


def closed_terminal():
    main_side, terminal = pty.openpty()
    os.close(main_side)
    return os.fdopen(terminal, "w", encoding="utf-8")


def unread_pipe():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", encoding="utf-8")


def full_disk():
    return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", encoding="utf-8")


@pytest.mark.parametrize("gone", [closed_terminal, unread_pipe, full_disk, lambda: None])
def test_a_run_whose_console_is_gone_is_the_run_with_one(
    gone, tiny_pipeline, tiny_config, prompts, redness, tmp_path, monkeypatch
):
    """Also where a reward prints, a library's progress bar draws and something warns."""

    tqdm = importlib.import_module("tqdm").tqdm

    def outspoken(images, texts):
        print("scoring", len(images), flush=True)
        list(tqdm(range(3), mininterval=0, desc="pictures"))
        warnings.warn("careful", stacklevel=1)
        print("scored", file=sys.stderr, flush=True)
        return redness(images, texts)

    pipeline = tiny_pipeline()
    monkeypatch.setattr(sys, "stdout", out := gone())
    monkeypatch.setattr(sys, "stderr", err := gone())
    with warnings.catch_warnings(action="always", category=UserWarning):
        config = tiny_config(iterations=2)
        run = progrpo.train(pipeline, prompts, outspoken, config=config, out=tmp_path / "run")
    assert (sys.stdout, sys.stderr) == (out, err)
    for stream in filter(None, (out, err)):
        os.dup2(nowhere := os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what it holds still goes there
        os.close(nowhere)
        stream.close()
    assert run.summary.read()["status"] == "finished" and run.summary.read()["rewards"]["missing"] == {
        name: 0 for name in run.summary.read()["rewards"]["asked"]
    }
    assert len(run.metrics.read()) == 2 and (run.path / "report.html").is_file()


def test_what_only_informs_does_not_end_a_run(tiny_pipeline, tiny_config, prompts, redness, tmp_path, capsys):
    """Pictures of samples, audits and the report have nowhere to go, and an audit's file is broken."""
    out = tmp_path / "run"

    def score(images, texts):
        (out / "samples").touch()
        (out / "report.html").mkdir(exist_ok=True)
        (out / "audit").mkdir(exist_ok=True)
        (out / "audit" / "0001.png").mkdir(exist_ok=True)
        (out / "audit" / "0000.json").write_text("{")
        return redness(images, texts)

    base = tiny_config(iterations=2)
    config = replace(base, audit=replace(base.audit, every=2))
    run = progrpo.train(tiny_pipeline(), prompts, score, config=config, out=out)
    assert run.summary.read()["status"] == "finished" and len(run.metrics.read()) == 2
    said = capsys.readouterr().out
    for what in ("writing samples", "writing an audit", "writing report.html"):
        assert f"warning: {what} failed (" in said
    assert (out / "checkpoints" / "iteration_000002").is_dir() and any((out / "lora").iterdir())


def test_a_run_under_way_has_a_report_of_its_last_iteration(tiny_pipeline, tiny_config, prompts, redness, tmp_path):
    out, calls, seen = tmp_path / "run", iter(range(1000)), list[tuple[RunData, Summary]]()

    def score(images, texts):
        if next(calls) == 5:  # in the third iteration
            seen.append((read_run_data(out), RunFolder(out).summary.read()))
        return redness(images, texts)

    progrpo.train(tiny_pipeline(), prompts, score, config=tiny_config(iterations=4), out=out)
    run: Any
    summary: Any
    ((run, summary),) = seen
    assert (run.status, summary["status"], summary["iterations"], len(run.metrics)) == ("running", "running", 2, 2)
    assert run.wall_seconds >= summary["wall_seconds"] > sum(record["seconds"] for record in run.metrics)
    assert summary["nfe"] == summary["cost"]["counted"]["nfe"] == sum(r["rollout/nfe"] for r in run.metrics)
    assert summary["seconds_by_stage"]["sample"] == sum(r["time/sample"] for r in run.metrics)


def test_the_time_of_a_resumed_run_has_what_a_killed_attempt_did_after_its_checkpoint(
    tiny_pipeline, tiny_config, prompts, redness, tmp_path
):
    out = tmp_path / "run"
    folder = progrpo.train(tiny_pipeline(), prompts, redness, config=tiny_config(iterations=1), out=out)
    killed: Summary = {**folder.summary.read(), "status": "running", "wall_seconds": 1000.0}
    folder.summary.write(killed)
    progrpo.train(tiny_pipeline(), prompts, redness, config=tiny_config(iterations=2), out=out, mode="resume")
    assert 1000 < folder.summary.read()["wall_seconds"] < 2000


def test_a_run_that_was_taken_for_dead_writes_nothing_more(tiny_pipeline, tiny_config, prompts, redness, tmp_path):
    """Its machine slept while another took the folder over."""
    out, calls = tmp_path / "run", iter(range(1000))

    def score(images, texts):
        if next(calls) == 3:  # in the second iteration
            (out / "run.lock").unlink()
            (out / "run.lock").write_text(record())
        return redness(images, texts)

    with pytest.raises(LockLostError, match="was taken over by process 7 on elsewhere"):
        progrpo.train(tiny_pipeline(), prompts, score, config=tiny_config(iterations=4), out=out)
    run = RunFolder(out)
    assert len(run.metrics.read()) == 1 and [path.name for path in saved(out)] == ["iteration_000001"]
    assert run.summary.read()["status"] == "running" and (out / "run.lock").read_text() == record()


@pytest.mark.parametrize("broken", [False, True])
def test_a_signal_in_the_runs_last_moments_does_not_take_its_last_word(
    broken, tiny_pipeline, tiny_config, prompts, redness, tmp_path
):
    """A launcher that sees one process die sends it to the others while they say what happened."""

    class Held:
        def score(self, images, prompts):
            return [None] * len(images) if broken else redness(images, prompts)

        def close(self):
            os.kill(os.getpid(), signal.SIGTERM)

    obeyed = []
    before = signal.signal(signal.SIGTERM, lambda *_: obeyed.append(1))
    try:
        progrpo.train(tiny_pipeline(), prompts, Held(), config=tiny_config(iterations=1), out=tmp_path / "run")
    except SelfCheckError as error:
        assert broken and "scores of reward" in str(error)
    else:
        assert not broken and RunFolder(tmp_path / "run").summary.read()["status"] == "finished"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not obeyed


def test_a_signal_before_the_first_iteration_keeps_the_evaluation(
    tiny_sd3, tiny_config, prompts, tmp_path, monkeypatch, capfd
):
    """Sent while the model is evaluated as it is; what goes on is the run that was not stopped."""
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    (tmp_path / "stopped_here.py").write_text(
        "import numpy as np\nwhen = lambda: None\n"
        "def redness(images, prompts):\n    when()\n    return [float(np.asarray(i)[..., 0].mean()) for i in images]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    stopped_here = importlib.import_module("stopped_here")
    base = tiny_config()
    config = replace(
        base,
        model=replace(base.model, path=str(tiny_sd3)),
        prompts=replace(base.prompts, source=str(tmp_path / "prompts.txt")),
        eval=replace(base.eval, prompts=str(tmp_path / "prompts.txt")),
        # given, since two runs that measure theirs may choose differently, and then differ by rounding
        sampling=replace(base.sampling, microbatch=8),
        optim=replace(base.optim, microbatch=8),
        reward=RewardSettings((RewardTerm("stopped_here:redness"),)),
    )
    whole = train_run(config, tmp_path / "whole")
    monkeypatch.setattr(stopped_here, "when", lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match=r"^SIGINT after 0 of 2 iterations; all is saved"):
        train_run(config, tmp_path / "broken")
    assert "progrpo: SIGINT: the run ends" in capfd.readouterr().err
    monkeypatch.setattr(stopped_here, "when", lambda: None)
    again = resume_run(tmp_path / "broken")
    ours, theirs = ([{k: r[k] for k in TIMELESS} for r in run.metrics.read()] for run in (again, whole))
    assert ours == theirs and len(ours) == 2
    for when in ("before", "after"):
        assert again.evaluations[when].read() == whole.evaluations[when].read() != []


@pytest.mark.slow
def test_the_command_line_ends_with_the_line_that_goes_on_and_the_run_is_the_unbroken_one(tmp_path):
    common = ["train", "smoke", "--iterations", "3", "--eval.pictures", "4", "--checkpoint.every", "100", "--seed", "3"]
    common += ["--model.dtype", "float32"]
    environment = {**os.environ, "PYTHONPATH": str(Path(progrpo.__file__).parents[1]), "OMP_NUM_THREADS": "1"}

    def progrpo_(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "progrpo", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=pipe, stderr=pipe)

    unbroken = progrpo_(*common, "--out", "whole")
    broken = progrpo_(*common, "--out", "broken")
    metrics = tmp_path / "broken" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not metrics.exists() or not metrics.read_bytes():
        assert broken.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    broken.send_signal(signal.SIGTERM)
    _, said = broken.communicate(timeout=100)
    assert broken.returncode == 128 + signal.SIGTERM
    assert said.splitlines()[-1].startswith("progrpo: SIGTERM after ")
    assert "Traceback" not in said
    arguments = said.splitlines()[-1].rpartition("progrpo train ")[2].split()
    resumed = progrpo_("train", *arguments)
    for process in (resumed, unbroken):
        _, said = process.communicate(timeout=100)
        assert process.returncode == 0, said
    whole, again = (RunFolder(tmp_path / name) for name in ("whole", "broken"))
    assert again.summary.read()["status"] == "finished"
    ours, theirs = ([{k: r[k] for k in TIMELESS} for r in run.metrics.read()] for run in (again, whole))
    assert ours == theirs and len(ours) == 3
    assert again.evaluations["after"].read() == whole.evaluations["after"].read()


def test_a_second_interrupt_does_not_wait(capfd):
    with Stop(Ranks()) as stop:
        assert stop.asked() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked() is signal.SIGINT
        (said,) = capfd.readouterr().err.splitlines()
        assert said.startswith("progrpo: SIGINT: the run ends, with all saved, as soon as") and "Ctrl-C" in said
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked() is signal.SIGTERM and capfd.readouterr().err == ""
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_in_another_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with Stop(Ranks()) as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.asked()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)]
