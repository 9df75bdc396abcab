"""Waves of an iteration: what comes out does not depend on them, and who may work while others wait."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from progrpo.config import PreviewSettings, SamplingSettings
from progrpo.rewards.base import Reward, Score
from progrpo.rewards.function import FunctionReward
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.waves import in_waves
from progrpo.training.build import sampling_from
from progrpo.types import Prompt, Rollout
from tests.support.rewards import mixture_of_one

PLAN = Plan(4, (PrunePoint(0, 3),), final_keep=2)
SLOTS = torch.tensor([4, 5, 9])
PATIENCE = 20.0
"""Seconds, of which a right answer needs none."""


@pytest.fixture(scope="module")
def policy(tiny_policy):
    return tiny_policy(moved=0.1)


@pytest.fixture(scope="module")
def sampling(policy, tiny_config):
    """Microbatches of one: kernels differ by shape."""
    settings = SamplingSettings(num_inference_steps=3, microbatch=1)
    return sampling_from(tiny_config(sampling=settings, preview=PreviewSettings(probe=True)), policy, "means", 0)


@pytest.fixture
def roll(policy, sampling, prompts):
    """A rollout of all prompts in so many waves."""

    def run(reward: Any, waves: int, meter: Meter) -> Rollout:
        sampler = Sampler(policy, mixture_of_one(reward), sampling, PLAN)
        return in_waves(sampler, [Prompt(prompt) for prompt in prompts], SLOTS, NoiseKey(3, 1), meter, waves)

    return run


def tensors(rolled: Rollout) -> dict[str, Tensor]:
    """All that a rollout holds; previews by step, whichever wave they are of."""
    living = rolled.trajectories
    parts = {f"condition {name}": rows for name, rows in rolled.condition.tensors.items()}
    parts |= {name: getattr(living, name) for name in ("group_N", "slot_N", "member_N", "x_NCHW")}
    parts |= {f"glance {i}": g for i, g in enumerate(living.latent_features)}
    for t in living.path:
        of_step = {"x": t.x_NCHW, "x_next": t.x_next_NCHW, "log_prob": t.log_prob_N, "mean": t.mean_NCHW}
        parts |= {f"{name} {t.step}": rows for name, rows in of_step.items() if rows is not None}
    parts["pictures"] = rolled.pictures.images_NHWC
    for kind in ("survivors", "finalists"):
        parts |= {f"{kind} {name}": rows for name, rows in vars(getattr(rolled, kind)).items()}
    for step in {p.step for p in rolled.previews}:
        there = [p for p in rolled.previews if p.step == step]
        for name in ("group_N", "member_N", "scores_N"):
            parts[f"preview {step} {name}"] = torch.cat([getattr(p, name) for p in there])
    return parts


@pytest.mark.parametrize("waves", [2, 3, 8])
def test_waves_change_nothing(roll, redness, prompts, waves):
    meters = Meter(), Meter()
    once, parted = (
        roll(FunctionReward(redness), count, meter) for count, meter in zip((1, waves), meters, strict=True)
    )
    assert parted.prompts == once.prompts == tuple(Prompt(p) for p in prompts)
    one, other = tensors(once), tensors(parted)
    assert one.keys() == other.keys() and {"mean 1", "glance 2", "preview 0 scores_N"} <= one.keys()
    for name, rows in one.items():
        assert torch.equal(rows.nan_to_num(-1.0), other[name].nan_to_num(-1.0)), name
    assert (
        parted.group_N.tolist() == [0, 0, 1, 1, 2, 2]
        and parted.finalists.group_N.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    )
    assert len(parted.previews) == min(waves, 3)


@pytest.mark.parametrize("waves", [1, 2, 3])
def test_the_meter_has_the_sum_of_the_waves(roll, redness, waves):
    meter = Meter()
    meter.count(nfe=1000)
    roll(FunctionReward(redness), waves, meter)
    expected = PLAN.predict(3, 0, guidance=False) * 3
    assert replace(meter.cost, nfe=meter.cost.nfe - 1000) == expected
    assert set(meter.seconds) == {"sample", "preview", "reward"} and min(meter.seconds.values()) > 0


def watch_the_network(policy: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which threads called the network, in order; two at once are an error."""
    callers: list[str] = []
    inside, predict = threading.Lock(), policy.predict

    def watched(*args: Any) -> Tensor:
        assert inside.acquire(blocking=False), "two network calls at once"
        callers.append(threading.current_thread().name)
        try:
            return predict(*args)
        finally:
            inside.release()

    monkeypatch.setattr(policy, "predict", watched)
    return callers


class WaitsForAnother(Reward):
    """A reward whose first call returns once another wave has called the network, or patience ends."""

    def __init__(self, callers: list[str]) -> None:
        self.callers, self.met = callers, False
        self._first, self._lock = True, threading.Lock()

    def score(self, pictures_NHWC, prompts):
        with self._lock:
            first, self._first = self._first, False
        if first:
            asked = threading.Event()
            me = threading.current_thread().name
            for _ in range(int(PATIENCE / 0.01)):
                if any(name != me for name in list(self.callers)):
                    self.met = True
                    break
                asked.wait(0.01)
        return [Score(float(np.mean(p))) for p in pictures_NHWC]


@pytest.mark.parametrize("waves", [2, 3])
def test_while_one_wave_is_scored_another_samples(roll, policy, monkeypatch, waves):
    callers = watch_the_network(policy, monkeypatch)
    reward = WaitsForAnother(callers)
    rolled = roll(reward, waves, Meter())
    assert reward.met
    assert len(set(callers)) == waves and rolled.survivors.value_N.isfinite().all()


def test_all_rewards_may_be_under_way_at_once(roll):
    together = threading.Barrier(3)

    class Meets(Reward):
        def score(self, pictures_NHWC, prompts):
            together.wait(PATIENCE)
            return [Score(float(np.mean(p))) for p in pictures_NHWC]

    assert len(roll(Meets(), 3, Meter()).survivors.value_N) == 6


def test_networks_never_run_at_the_same_time(roll, redness, policy, monkeypatch):
    callers = watch_the_network(policy, monkeypatch)
    roll(FunctionReward(redness), 3, Meter())
    steps = 4 + 3 + 3  # living at each of three steps, a row a call
    assert len(callers) == 3 * steps


def ended(work: Any) -> Any:
    """The error that it raises; a lock that was left held would have it wait for ever."""
    outcomes: list[BaseException | None] = []

    def run() -> None:
        try:
            work()
            outcomes.append(None)
        except BaseException as error:
            outcomes.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert outcomes, "it waits for ever"
    return outcomes[0]


def test_an_error_in_a_waves_reward_is_raised_and_others_go_on(roll, prompts):
    done = []

    class Fails(Reward):
        def score(self, pictures_NHWC, prompts_N):
            if prompts_N[0].text == prompts[0]:
                raise RuntimeError("the server is gone")
            done.append(prompts_N[0].text)
            return [Score(float(np.mean(p))) for p in pictures_NHWC]

    error = ended(lambda: roll(Fails(), 3, Meter()))
    assert isinstance(error, RuntimeError) and str(error) == "the server is gone"
    assert sorted(done) == sorted([prompts[1]] * 2 + [prompts[2]] * 2)  # a preview and the end of each


@pytest.mark.parametrize("last", [False, True])
def test_an_error_of_the_network_is_raised_whichever_wave_it_is_in(roll, redness, policy, monkeypatch, last):
    calls, predict = iter(range(1000)), policy.predict

    def breaks(*args: Any) -> Tensor:
        if next(calls) == (25 if last else 0):
            raise RuntimeError("out of luck")
        return predict(*args)

    monkeypatch.setattr(policy, "predict", breaks)
    error = ended(lambda: roll(FunctionReward(redness), 3, Meter()))
    assert isinstance(error, RuntimeError) and str(error) == "out of luck"


def test_one_wave_needs_no_thread(roll, redness, policy, monkeypatch):
    callers = watch_the_network(policy, monkeypatch)
    roll(FunctionReward(redness), 1, Meter())
    assert set(callers) == {threading.current_thread().name}
