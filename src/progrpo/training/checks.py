"""Checks of a run while it goes. A failed check stops the run and says why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from progrpo.objectives.base import Experience, Objective
from progrpo.policies.base import Policy
from progrpo.policies.sharded import gathered
from progrpo.rewards.mixture import Failures
from progrpo.training.errors import MissingScoresError, SelfCheckError

_ROUNDING = 1e-6  # a few float32 steps of a log-prob near 1
_OFF = 0.05  # of a step's noise, that its mean may be off by where sampling and training round differently


def check_ratio(deviation: float, clip_range: float, rounding: float = 0.0) -> None:
    """SelfCheckError unless, before any update, the ratio of the recomputed to the sampled density is 1.

    It may deviate by a hundredth of the clip range, or by float32's rounding where that is more, but never by more than
    the clip range. A deviation of `rounding` is allowed in any case.
    """
    allowed = max(clip_range / 100, min(_ROUNDING, clip_range), rounding)
    if not deviation <= allowed:
        raise SelfCheckError(
            f"the first update is off-policy: a ratio deviates by {deviation:.1e} from 1 where {allowed:.1e} is"
            " allowed; sampling and training compute different predictions (dropout, mixed precision, changed weights)"
        )


def rounding_between(policy: Policy, objective: Objective) -> float:
    """The deviation of a ratio that is allowed because sampling and training round differently.

    It is 0 for objectives that train no sampled step, and for networks that are batch-invariant.
    """
    exact = policy.batch_invariant or objective.settings.stores == "latents"
    return 0.0 if exact else rounding_of_ratio(math.prod(policy.latent_shape))


def rounding_of_ratio(dims: int) -> float:
    """The deviation of a ratio where rounding moves a step's mean by a twentieth of the noise's std.

    A log-prob, a mean over `dims`, then changes by the mean of z / 20 for the noise z, less 1 / 800. On an H200 in
    bfloat16 the worst of 216 was 3e-4 at 65,536 dims, a sixtieth of the std.
    """
    return 4 * _OFF / math.sqrt(dims) + _OFF**2 / 2


def check_failures(failures: Sequence[Failures], bound: float, when: str) -> None:
    """MissingScoresError where a larger share of pictures or scores than the bound is missing, or all of them."""
    pictures = sum(f.pictures for f in failures)
    lost = sum(f.lost for f in failures)
    if _too_many(lost, pictures, bound):
        raise MissingScoresError(
            f"{when}: {lost} of {pictures} pictures are missing (reward.max_missing allows {bound:.0%}):"
            f" {fault_of(failures)}"
        )
    for name in failures[0].asked if failures else ():
        # of the pictures that are not lost
        asked = sum(f.asked[name] for f in failures) - lost
        missing = sum(f.missing[name] for f in failures) - lost
        if _too_many(missing, asked, bound):
            last = next((f.last_error for f in failures if f.last_error), None)
            raise MissingScoresError(
                f"{when}: {missing} of {asked} scores of reward {name} are missing (reward.max_missing allows"
                f" {bound:.0%}); last error: {last or 'none was given'}"
            )


def _too_many(missing: int, of: int, bound: float) -> bool:
    return missing > bound * of or (of > 0 and missing == of)


def fault_of(failures: Sequence[Failures]) -> str:
    """The reason why pictures are missing, as a process last saw it; empty where none is missing."""
    return next((f.fault for f in failures if f.fault), "")


def check_moved(policy: Policy) -> None:
    """SelfCheckError where no trained weight differs from the reference."""
    state = policy.named_weights.state_dict()
    moved = any(not torch.equal(gathered(p), gathered(state["reference"][n])) for n, p in state["current"].items())
    if not moved:
        raise SelfCheckError(
            "no trained weight moved in the first update: is optim.lr too small for the weights' dtype?"
        )


@torch.no_grad()
def check_bound(policy: Policy, experience: Experience) -> None:
    """SelfCheckError where the network's output with the trained weights is the reference's."""
    condition = experience.condition.take(experience.trajectories.group_N[:1].to(policy.device))
    x = experience.trajectories.x_NCHW[:1]
    timestep = experience.process.timestep(0, x)
    with torch.compiler.set_stance("force_eager"):  # one row is not worth compiling for
        trained = policy.predict(x, timestep, condition)
        with policy.weights("reference"):
            reference = policy.predict(x, timestep, condition)
    if torch.equal(trained, reference):
        raise SelfCheckError("the trained weights do not change the network's output: the adapter is not bound to it")


def sum_of_trained(policy: Policy) -> float:
    """The sum of all trained weights, enough to see that some moved."""
    return sum(gathered(_exact(p).sum()).item() for p in policy.trainable.values())


def fingerprint(policy: Policy) -> dict[str, tuple[float, float]]:
    """Two sums of each frozen tensor, enough to see that one moved."""
    return {name: (_exact(t).sum().item(), _exact(t).square().sum().item()) for name, t in policy.frozen()}


def _exact(t: torch.Tensor) -> torch.Tensor:
    """The tensor in float64, or in float32 on Apple's devices, which have no float64."""
    return t.detach().float() if t.device.type == "mps" else t.detach().double()


def check_frozen(policy: Policy, before: Mapping[str, tuple[float, float]]) -> None:
    """SelfCheckError where a frozen weight has another fingerprint than before."""
    moved = [n for n, sums in fingerprint(policy).items() if not np.array_equal(sums, before[n], equal_nan=True)]
    if moved:
        raise SelfCheckError(f"{len(moved)} frozen weights moved during training, first {moved[0]}")
