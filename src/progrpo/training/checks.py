"""What a run checks of itself while it goes. A failed check stops it and says why."""

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
    """Before any update the ratio of the recomputed to the sampled density is 1, up to a hundredth of the clip range.

    Where that is finer than float32, up to rounding, but never more than the clip range. `rounding` is what to allow in any case.
    """
    allowed = max(clip_range / 100, min(_ROUNDING, clip_range), rounding)
    if not deviation <= allowed:
        raise SelfCheckError(
            f"the first update is off-policy: a ratio deviates by {deviation:.1e} from 1 where {allowed:.1e} is"
            " allowed; sampling and training compute different predictions (dropout, mixed precision, changed weights)"
        )


def rounding_between(policy: Policy, objective: Objective) -> float:
    """How far from 1 a ratio may be since sampling and training round differently: the density of a step that was sampled, and no other."""
    exact = policy.batch_invariant or objective.settings.stores == "latents"
    return 0.0 if exact else rounding_of_ratio(math.prod(policy.latent_shape))


def rounding_of_ratio(dims: int) -> float:
    """How far from 1 a ratio may be where a step's mean, rounded in low precision, is off by a twentieth of the noise's std.

    A log-prob, a mean over `dims`, then changes by the mean of z / 20, z being the noise that was drawn, less 1 / 800. On an H200 in
    bfloat16 the worst of 216 was 3e-4 at 65,536 dims, a sixtieth of the std.
    """
    return 4 * _OFF / math.sqrt(dims) + _OFF**2 / 2


def check_failures(failures: Sequence[Failures], bound: float, when: str) -> None:
    """Refuse a share of missing pictures or scores, over all processes, that is above the bound, or everything missing."""
    pictures, lost = (sum(getattr(f, name) for f in failures) for name in ("pictures", "lost"))
    if _too_many(lost, pictures, bound):
        raise MissingScoresError(
            f"{when}: {lost} of {pictures} pictures are missing (reward.max_missing allows {bound:.0%}): {fault_of(failures)}"
        )
    for name in failures[0].asked if failures else ():
        # of the pictures that there are
        asked, missing = sum(f.asked[name] for f in failures) - lost, sum(f.missing[name] for f in failures) - lost
        if _too_many(missing, asked, bound):
            last = next((f.last_error for f in failures if f.last_error), None)
            raise MissingScoresError(
                f"{when}: {missing} of {asked} scores of reward {name} are missing (reward.max_missing allows"
                f" {bound:.0%}); last error: {last or 'none was given'}"
            )


def _too_many(missing: int, of: int, bound: float) -> bool:
    return missing > bound * of or (of > 0 and missing == of)


def fault_of(failures: Sequence[Failures]) -> str:
    """Why pictures are missing, as one of the processes last saw it; empty where none is."""
    return next((f.fault for f in failures if f.fault), "")


def check_moved(policy: Policy) -> None:
    """Some trained weight differs from the reference."""
    state = policy.state_dict()
    moved = any(not torch.equal(gathered(p), gathered(state["reference"][n])) for n, p in state["current"].items())
    if not moved:
        raise SelfCheckError(
            "no trained weight moved in the first update: is optim.lr too small for the weights' dtype?"
        )


@torch.no_grad()
def check_bound(policy: Policy, experience: Experience) -> None:
    """The trained weights reach the network that samples: its output with them is not the reference's."""
    told = experience.condition.take(experience.trajectories.group_N[:1].to(policy.device))
    x = experience.trajectories.x_NCHW[:1]
    timestep = experience.process.timestep(0, x)
    with torch.compiler.set_stance("force_eager"):  # it is not worth compiling for one row
        trained = policy.predict(x, timestep, told)
        with policy.weights("reference"):
            reference = policy.predict(x, timestep, told)
    if torch.equal(trained, reference):
        raise SelfCheckError("the trained weights do not change the network's output: the adapter is not bound to it")


def sum_of_trained(policy: Policy) -> float:
    """Of all trained weights, enough to see that some moved."""
    return sum(gathered(_exact(p).sum()).item() for p in policy.trainable.values())


def fingerprint(policy: Policy) -> dict[str, tuple[float, float]]:
    """Two sums of each frozen tensor, enough to see that one moved."""
    return {name: (_exact(t).sum().item(), _exact(t).square().sum().item()) for name, t in policy.frozen()}


def _exact(t: torch.Tensor) -> torch.Tensor:
    """In float64, or in float32 on Apple's devices, which have no other."""
    return t.detach().float() if t.device.type == "mps" else t.detach().double()


def check_frozen(policy: Policy, before: Mapping[str, tuple[float, float]]) -> None:
    moved = [n for n, sums in fingerprint(policy).items() if not np.array_equal(sums, before[n], equal_nan=True)]
    if moved:
        raise SelfCheckError(f"{len(moved)} frozen weights moved during training, first {moved[0]}")
