"""The values that pass between stages, as frozen dataclasses.

Dimension letters, everywhere in progrpo: P prompts, G members of a group, K kept members, N flattened rows
(prompt-major, members ascending), T denoising steps, B microbatch, C H W latent. A suffix names the shape: `x_NCHW`,
`rewards_N`.

A video has a frame axis: its latents are (N, C, F, H, W) where a name says NCHW, and its pictures (N, F, H, W, 3)
where a name says NHWC. Steps and densities treat all dims but the first alike, so only policies, decoders and rewards
can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

if TYPE_CHECKING:  # the plan and the command line use these types without torch
    import torch
    from torch import Tensor

    _Change = Callable[[list[Tensor]], Tensor]

T = TypeVar("T")


WHOLE_GROUP = -1
"""The member number of noise that a whole group shares."""


GIVEN = {"images": "pictures", "prompts": "texts"}
"""Names of a reward function's own arguments, which no column of a prompt can have, and their meaning."""


FROM_PYTHON = "given to progrpo.train"
"""The end of a name in config.json for a model or prompts that only Python code has: no name loads them."""


@dataclass(frozen=True)
class Prompt:
    """A text to generate from, and columns (targets, scenes, references) that a reward may need."""

    text: str
    columns: Mapping[str, Any] = field(default_factory=dict)


_FOR_ALL, _ON_CPU = "for all", "on cpu"


class Rows:
    """A dataclass whose fields hold one row per prompt, trajectory or picture.

    A field holds a tensor, other `Rows`, a tuple or a mapping of these, or None. Fields marked `FOR_ALL` belong to all
    rows together, and fields marked `ON_CPU` never leave the CPU. A tensor that two fields share stays one tensor.
    """

    FOR_ALL: ClassVar[Mapping[str, str]] = {"rows": _FOR_ALL}
    ON_CPU: ClassVar[Mapping[str, str]] = {"rows": _ON_CPU}

    def take(self, rows: Tensor | slice) -> Self:
        """The given rows, in that order."""
        return _combined([self], _once(lambda tensors: tensors[0][rows]))

    def to(self, device: str | torch.device) -> Self:
        """Move the rows to a device."""
        return _combined([self], _once(lambda tensors: tensors[0].to(device)), (_FOR_ALL, _ON_CPU))

    @classmethod
    def cat(cls, batches: Sequence[Self]) -> Self:
        """The rows of several batches, one after another. Fields for all rows are those of the first batch."""
        import torch

        return _combined(batches, _once(torch.cat))


def _combined(batches: Sequence[T], change: _Change, unchanged: tuple[str, ...] = (_FOR_ALL,)) -> T:
    """Several batches as one: `change` applied to the tensors of each field, without batches that lack the field."""
    present: list[Any] = [batch for batch in batches if batch is not None]
    first = next(iter(present), None)
    if isinstance(first, Rows):
        names = _changing(cast(type, type(first)), unchanged)
        changed = {name: _combined([getattr(batch, name) for batch in present], change, unchanged) for name in names}
        return cast(T, replace(cast(Any, first), **changed))
    if isinstance(first, tuple):
        return cast(T, tuple(_combined(items, change, unchanged) for items in zip(*present, strict=True)))
    if isinstance(first, Mapping):
        return cast(T, {name: _combined([batch[name] for batch in present], change, unchanged) for name in first})
    return cast(T, change(present) if present else None)


@cache
def _changing(kind: type, unchanged: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a class' fields whose rows are of none of these kinds."""
    return tuple(f.name for f in fields(cast(Any, kind)) if f.metadata.get("rows") not in unchanged)


def _once(change: _Change) -> _Change:
    """A change that is made once for the same tensors, so that two fields which share one share the changed one."""
    done: dict[tuple[int, ...], Tensor] = {}

    def remembered(tensors: list[Tensor]) -> Tensor:
        key = tuple(map(id, tensors))
        if key not in done:
            done[key] = change(tensors)
        return done[key]

    return remembered


@dataclass(frozen=True)
class Condition(Rows):
    """The network's condition, one row per prompt (or per trajectory): named tensors."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Transition(Rows):
    """One stochastic step of N trajectories, stored for training: x_next was drawn from the policy's Gaussian at x.

    The Gaussian's mean is stored if the objective needs it, and the network's output with its graph (`attached_NCHW`)
    if the first update goes back through what sampling computed.
    """

    step: int = field(metadata=Rows.FOR_ALL)
    x_NCHW: Tensor
    x_next_NCHW: Tensor
    log_prob_N: Tensor
    mean_NCHW: Tensor | None = None
    attached_NCHW: Tensor | None = None


@dataclass(frozen=True)
class Trajectories(Rows):
    """The living trajectories of P groups, packed without gaps.

    `slot_N` is the global prompt slot of the iteration and `member_N` the place in the group at expansion: both never
    change, so noise keyed by them does not depend on who was pruned. `output_NCHW` is the network's output at
    `x_NCHW`, there only between a network call and the step that uses it. `latent_features` has a probe's view of the
    x0 projections after each network call. A latent that one transition ends at and the next begins at is one tensor.
    """

    group_N: Tensor = field(metadata=Rows.ON_CPU)
    slot_N: Tensor = field(metadata=Rows.ON_CPU)
    member_N: Tensor = field(metadata=Rows.ON_CPU)
    x_NCHW: Tensor
    output_NCHW: Tensor | None = None
    path: tuple[Transition, ...] = ()
    attached_NCHW: Tensor | None = None
    latent_features: tuple[Tensor, ...] = field(default=(), metadata=Rows.ON_CPU)

    def __len__(self) -> int:
        return self.x_NCHW.shape[0]

    def take(self, rows: Tensor | slice) -> Self:
        """The given rows, in that order, in new memory; these trajectories themselves if the rows are all of them."""
        everyone = range(len(self))
        chosen = everyone[rows] if isinstance(rows, slice) else rows.tolist()
        return self if list(chosen) == list(everyone) else super().take(rows)


@dataclass(frozen=True)
class Cost:
    """The cost of sampling and training. NFE: one sample through the denoiser once (a CFG pair counts two)."""

    nfe: int = 0
    decodes: int = 0
    reward_calls: int = 0
    trained_steps: int = 0
    previews: int = 0
    """The decodes and reward calls of unfinished trajectories, which `decodes` and `reward_calls` include."""
    probed: int = 0
    """Unfinished trajectories that a probe or a latent reward head ranked, without decode and reward call."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Cost) -> Cost:
        return self + other * -1

    def __mul__(self, times: int) -> Cost:
        return Cost(*(getattr(self, f.name) * times for f in fields(self)))


@dataclass(frozen=True)
class Scores(Rows):
    """The rewards of N pictures: float64, NaN where missing.

    `value_N` is the weighted sum of R rewards, and `rewards_NR` each reward's own part before its weight. Selectors
    compare `ranking_N`: the value, or a sum in which each reward was normalised within its group. `passed_N` is a
    strict verdict (1, 0, NaN for none).
    """

    value_N: Tensor
    ranking_N: Tensor
    passed_N: Tensor
    rewards_NR: Tensor


@dataclass(frozen=True)
class GroupScores(Scores):
    """The rewards of N finished trajectories, with the group of each."""

    group_N: Tensor

    @classmethod
    def of(cls, scores: Scores, group_N: Tensor) -> GroupScores:
        return cls(scores.value_N, scores.ranking_N, scores.passed_N, scores.rewards_NR, group_N)


@dataclass(frozen=True)
class Pictures(Rows):
    """N decoded latents: uint8 (N, H, W, 3) on the CPU, for videos (N, F, H, W, 3).

    `there_N` (bool) is True for finite pictures. A picture that is not finite is grey, and no reward sees it; `fault`
    is the reason for the last one.
    """

    images_NHWC: Tensor
    there_N: Tensor
    fault: str = field(default="", metadata=Rows.FOR_ALL)

    @classmethod
    def cat(cls, batches: Sequence[Self]) -> Self:
        fault = next((batch.fault for batch in reversed(batches) if batch.fault), "")
        return replace(super().cat(batches), fault=fault)


@dataclass(frozen=True)
class Preview(Rows):
    """The preview of N living trajectories after the network call of `step`, before any of them is pruned."""

    step: int = field(metadata=Rows.FOR_ALL)
    group_N: Tensor
    member_N: Tensor
    scores_N: Tensor


@dataclass(frozen=True)
class Rollout:
    """The survivors of P prompts' groups: N finished trajectories, prompt-major, with their pictures and scores.

    The F `finalists` were denoised to the end and rewarded. With a plan's `final_keep` the survivors are some of them,
    otherwise all. A group that was stopped whole has neither. Pictures that existed before have a `weight_P`, the
    weight of each group in the loss, and their scores are preferences, not rewards.
    """

    prompts: tuple[Prompt, ...]
    condition: Condition
    trajectories: Trajectories
    pictures: Pictures
    survivors: GroupScores
    finalists: GroupScores
    previews: tuple[Preview, ...]
    weight_P: Tensor | None = None

    @property
    def group_N(self) -> Tensor:
        return self.trajectories.group_N
