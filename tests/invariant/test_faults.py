"""A reward that fails costs the pictures that it failed on and nothing else: the others teach what they did."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from progrpo.config import (
    AWMSettings,
    DGPOSettings,
    ELBOSettings,
    NFTSettings,
    ObjectiveSettings,
    OptimSettings,
    PlanSettings,
    PromptSettings,
)
from progrpo.rewards.base import Reward
from progrpo.rewards.function import FunctionReward
from progrpo.rewards.mixture import Component, RewardMixture
from progrpo.rewards.remote import RemoteReward
from progrpo.rewards.retrying import RetryingReward
from progrpo.rewards.settings import RewardTerm
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.rollout import rollout
from progrpo.training.errors import SelfCheckError
from progrpo.training.experience import AdvantageEstimator
from progrpo.types import Rollout

SLOTS, GROUP = 6, 10
EVERYONE = PlanSettings(preset="custom", group_size=GROUP)


def name_of(image: Any) -> str:
    return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()


class Faulty:
    """`redness`, and an error where one of the pictures is bad."""

    def __init__(self, redness: Callable[..., list[float]], bad: Callable[[str], bool]) -> None:
        self._redness, self._bad = redness, bad

    def plain(self, images: list[Any], prompts: list[str]) -> list[float]:
        if any(self._bad(name_of(image)) for image in images):
            raise OSError("the judge is out")
        return self._redness(images, prompts)

    async def waiting(self, images: list[Any], prompts: list[str]) -> list[float]:
        return self.plain(images, prompts)

    def quiet(self, images: list[Any], prompts: list[str]) -> list[float | None]:
        kinds = (None, math.nan, math.inf)
        values = zip(images, self._redness(images, prompts), strict=True)
        return [kinds[i % 3] if self._bad(name_of(image)) else value for i, (image, value) in enumerate(values)]


@contextmanager
def served(function: Callable[..., Any]) -> Iterator[Reward]:
    """The function behind a server of its own, on this machine."""
    import uvicorn

    from progrpo.rewards.server import make_app

    server = uvicorn.Server(
        uvicorn.Config(make_app(RewardTerm("mine"), FunctionReward(function)), port=0, log_level="error")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    reward = RemoteReward.make(RewardTerm("mine", url=f"http://127.0.0.1:{port}"))
    try:
        yield reward
    finally:
        reward.close()
        server.should_exit = True
        thread.join()


KINDS = ("plain", "waiting", "quiet", "served")


@contextmanager
def rewarded(kind: str, redness: Callable[..., list[float]], bad: Callable[[str], bool]) -> Iterator[RewardMixture]:
    """The faulty reward of a kind as a run is rewarded by it."""
    faulty = Faulty(redness, bad)
    if kind == "served":
        with served(faulty.plain) as reward:
            yield RewardMixture([Component(RewardTerm("mine"), RetryingReward(reward, retries=0))])
    else:
        yield RewardMixture(
            [Component(RewardTerm("mine"), RetryingReward(FunctionReward(getattr(faulty, kind)), retries=0))]
        )


def roll(trainer: Any) -> Rollout:
    key, count = NoiseKey(trainer.config.seed, 0), trainer.config.prompts.per_iteration
    return rollout(trainer.sampler, trainer.order.prompts_for(0, count), torch.arange(count), key, Meter())


def gradients(trainer: Any, rolled: Rollout) -> list[torch.Tensor]:
    """The gradients that the optimizer is given."""
    config, clip = trainer.config.objective, trainer.learner.objective.settings.adv_clip_max
    estimator = AdvantageEstimator(config, clip, trainer.reward.weights, trainer.ranks, quorum=0.5)
    experience, _ = estimator.experience(rolled, trainer.sampler.sampling, NoiseKey(0, 0))
    grads: list[torch.Tensor] = []
    parameters = list(trainer.policy.trainable.values())
    seen = trainer.learner.updater.optimizer.register_step_pre_hook(
        lambda *_: grads.extend(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters)
    )
    trainer.learner.updater.update(experience)
    seen.remove()
    assert any(g.any() for g in grads)
    return grads


def without(rolled: Rollout, rows: torch.Tensor) -> Rollout:
    """The rollout as if only these had been sampled."""
    return replace(
        rolled,
        trajectories=rolled.trajectories.take(rows),
        pictures=rolled.pictures.take(rows),
        survivors=rolled.survivors.take(rows),
        finalists=rolled.finalists.take(rows),
    )


OBJECTIVES = {
    "grpo": ObjectiveSettings(),
    "gdpo": ObjectiveSettings(advantage="gdpo"),
    "nft": ObjectiveSettings(name="nft", nft=NFTSettings(draws=1)),
    "awm": ObjectiveSettings(name="awm", awm=AWMSettings(draws=1)),
    "dgpo": ObjectiveSettings(name="dgpo", dgpo=DGPOSettings(draws=1)),
    "elbo": ObjectiveSettings(name="elbo", elbo=ELBOSettings(draws=1)),
}
CASES = [(kind, rate, "grpo") for kind in KINDS for rate in (0.01, 0.1)]
CASES += [("plain", 0.1, name) for name in OBJECTIVES if name != "grpo"]


@pytest.mark.parametrize(("kind", "rate", "objective"), CASES)
def test_the_gradient_is_that_of_the_pictures_that_were_scored(
    kind, rate, objective, tiny_trainer, tiny_policy, tiny_config, redness
):
    config = tiny_config(
        prompts=PromptSettings(per_iteration=SLOTS),
        plan=EVERYONE,
        objective=OBJECTIVES[objective],
        optim=OptimSettings(max_grad_norm=1e9),
    )
    clean = tiny_trainer(config, tiny_policy(moved=0.1), reward=redness)
    full = roll(clean)
    names = [name_of(picture) for picture in full.pictures.images_NHWC.numpy()]
    assert len(set(names)) == SLOTS * GROUP
    lost = set(sorted(names)[: math.ceil(rate * len(names))])  # a hash's order is as good as a draw
    expected = gradients(clean, without(full, torch.tensor([i for i, n in enumerate(names) if n not in lost])))

    with rewarded(kind, redness, lost.__contains__) as reward:
        faulty = tiny_trainer(config, tiny_policy(moved=0.1), reward)
        rolled = roll(faulty)
        assert [n in lost for n in names] == rolled.survivors.value_N.isnan().tolist()
        actual = gradients(faulty, rolled)
        failures = reward.failures()
    assert (failures.asked, failures.missing) == ({"mine": len(names)}, {"mine": len(lost)})
    assert (
        "no finite number" in str(failures.last_error)
        if kind == "quiet"
        else "judge is out" in str(failures.last_error)
    )
    for got, reference in zip(actual, expected, strict=True):
        assert torch.equal(got, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_that_always_fails_stops_the_run_with_the_last_error(kind, tiny_trainer, tiny_config, redness):
    with rewarded(kind, redness, lambda name: True) as reward:
        trainer = tiny_trainer(tiny_config(), reward=reward)
        before = {name: p.clone() for name, p in trainer.policy.trainable.items()}
        error = "it gave no finite number" if kind == "quiet" else "OSError: the judge is out"
        with pytest.raises(SelfCheckError, match=rf"iteration 1: 14 of 14 scores of reward mine are missing.*{error}"):
            trainer.step()
    assert all(torch.equal(p, before[name]) for name, p in trainer.policy.trainable.items())


def test_previews_fail_the_same_way_and_the_run_goes_on(tiny_trainer, tiny_config, redness):
    config = tiny_config(
        prompts=PromptSettings(per_iteration=3), plan=PlanSettings(preset="custom", group_size=8, prune=((1, 5),))
    )
    with rewarded("plain", redness, lambda name: int(name[:2], 16) < 50) as reward:  # about 20 % of all pictures
        trainer = tiny_trainer(config, reward=reward)
        record = trainer.step().record
    assert 0 < record["reward/missing"] < record["reward/failed@mine"]  # some of them previews
    assert record["rollout/nfe"] == trainer.predicted().nfe and record["reward/skipped_groups"] == 0
    assert trainer.totals.missing == {"mine": record["reward/failed@mine"]}
    assert "judge is out" in trainer.totals.last_error


def test_faults_that_pass_when_asked_again_leave_no_trace(tiny_trainer, tiny_config, redness):
    calls = iter(range(1000))

    def shaky(images, prompts):
        if next(calls) % 2 == 0:
            raise ConnectionError("reset by peer")
        return redness(images, prompts)

    records = []
    for reward in (redness, shaky):
        retrying = RetryingReward(FunctionReward(reward), sleep=lambda seconds: None)
        trainer = tiny_trainer(tiny_config(), reward=RewardMixture([Component(RewardTerm("mine"), retrying)]))
        done = [trainer.step().record for _ in range(2)]
        timeless = [{k: v for k, v in r.items() if "time" not in k and k != "seconds"} for r in done]
        records.append((timeless, [p.detach().clone() for p in trainer.policy.trainable.values()]))
    assert next(calls) == 8  # two calls an iteration, each twice
    (clean, weights), (faulty, others) = records
    assert clean == faulty and all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_a_group_below_its_quorum_teaches_nothing(tiny_trainer, tiny_config, redness):
    config = tiny_config(prompts=PromptSettings(per_iteration=2), plan=EVERYONE, optim=OptimSettings(max_grad_norm=1e9))
    trainer = tiny_trainer(config)
    full = roll(trainer)
    rewards = full.survivors.value_N.clone()
    rewards[: GROUP // 2 + 1] = math.nan  # of the first group fewer than half are left
    second = torch.arange(GROUP, 2 * GROUP)
    lost = replace(full, survivors=replace(full.survivors, value_N=rewards))
    actual, expected = gradients(trainer, lost), gradients(tiny_trainer(config), without(full, second))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
