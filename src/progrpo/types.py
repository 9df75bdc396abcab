"""The values that pass between stages, as frozen dataclasses.

Dimension letters, everywhere in progrpo: P prompts, G members of a group, K kept members, N flattened rows (prompt-major,
members ascending), T denoising steps, B microbatch, C H W latent. A suffix names the shape: `x_NCHW`, `rewards_N`.

A video has a frame axis: its latents are (N, C, F, H, W) where a name says NCHW, and what is decoded of them (N, F, H, W, 3) where it
says NHWC. Steps and densities treat all dims but the first alike, so that only policies, decoders and rewards can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the plan and the command line use these types without torch
    import torch
    from torch import Tensor


WHOLE_GROUP = -1
"""In place of a member's number: of noise that a group shares."""


GIVEN = {"images": "pictures", "prompts": "texts"}
"""What a reward function is given under these names, which no column of a prompt can have."""


FROM_PYTHON = "given to progrpo.train"
"""How a run's config.json ends the name of a model or of prompts that only Python code has: no name loads them."""


@dataclass(frozen=True)
class Prompt:
    """What is asked for: a text, and columns (targets, scenes, references) that a reward may need."""

    text: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Condition:
    """What the network is told, one row a prompt (or a trajectory): named tensors that share their first dimension."""

    tensors: Mapping[str, Tensor]

    def take(self, rows: Tensor) -> Condition:
        return Condition({name: t[rows] for name, t in self.tensors.items()})


@dataclass(frozen=True)
class Transition:
    """One stochastic step of N trajectories, kept for training: x_next was drawn from the policy's Gaussian at x.

    The Gaussian's mean is kept where the objective asks for it, and the network's output with its graph where the first
    update goes back through what sampling computed.
    """

    step: int
    x_NCHW: Tensor
    x_next_NCHW: Tensor
    log_prob_N: Tensor
    mean_NCHW: Tensor | None = None
    attached_NCHW: Tensor | None = None

    def take(self, rows: Tensor) -> Transition:
        return Transition(
            self.step,
            self.x_NCHW[rows],
            self.x_next_NCHW[rows],
            self.log_prob_N[rows],
            None if self.mean_NCHW is None else self.mean_NCHW[rows],
            None if self.attached_NCHW is None else self.attached_NCHW[rows],
        )

    def to(self, device: str | torch.device) -> Transition:
        return Transition(
            self.step,
            self.x_NCHW.to(device),
            self.x_next_NCHW.to(device),
            self.log_prob_N.to(device),
            _moved(self.mean_NCHW, device),
            _moved(self.attached_NCHW, device),
        )


@dataclass(frozen=True)
class Trajectories:
    """The living trajectories of P groups, packed without gaps.

    `slot_N` is the global prompt slot of the iteration and `member_N` the place in the group at expansion: both never
    change, so that noise keyed by them does not know who was pruned. `output_NCHW` is the network's output at `x_NCHW`,
    there only between a network call and the step that uses it. `latent_features` are what a probe saw after each network call.
    """

    group_N: Tensor
    slot_N: Tensor
    member_N: Tensor
    x_NCHW: Tensor
    output_NCHW: Tensor | None = None
    path: tuple[Transition, ...] = ()
    attached_NCHW: Tensor | None = None
    latent_features: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return self.x_NCHW.shape[0]

    def take(self, rows: Tensor) -> Trajectories:
        """The rows named, in that order, in new memory; if they are all of them, these trajectories themselves.

        A latent that one transition ends at and the next begins at stays one.
        """
        if rows.tolist() == list(range(len(self))):
            return self
        path: list[Transition] = []
        for before, transition in zip((None, *self.path), self.path, strict=False):
            taken = transition.take(rows)
            if before is not None and before.x_next_NCHW is transition.x_NCHW:
                taken = replace(taken, x_NCHW=path[-1].x_next_NCHW)
            path.append(taken)
        onwards = bool(self.path) and self.path[-1].x_next_NCHW is self.x_NCHW
        return Trajectories(
            self.group_N[rows],
            self.slot_N[rows],
            self.member_N[rows],
            path[-1].x_next_NCHW if onwards else self.x_NCHW[rows],
            None if self.output_NCHW is None else self.output_NCHW[rows],
            tuple(path),
            None if self.attached_NCHW is None else self.attached_NCHW[rows],
            tuple(g[rows] for g in self.latent_features),
        )

    def to(self, device: str | torch.device) -> Trajectories:
        """Latents and all that was made of them there; who is who stays on the CPU."""
        return replace(
            self,
            x_NCHW=self.x_NCHW.to(device),
            output_NCHW=_moved(self.output_NCHW, device),
            path=tuple(t.to(device) for t in self.path),
            attached_NCHW=_moved(self.attached_NCHW, device),
        )


def _moved(there: Tensor | None, device: str | torch.device) -> Tensor | None:
    return None if there is None else there.to(device)


@dataclass(frozen=True)
class Cost:
    """What sampling and training spend. NFE: one sample through the denoiser once (a CFG pair counts two)."""

    nfe: int = 0
    decodes: int = 0
    reward_calls: int = 0
    trained_steps: int = 0
    previews: int = 0
    """Of the decodes and reward calls, those of unfinished trajectories."""
    probed: int = 0
    """Unfinished trajectories that a probe ranked, with neither."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(getattr(self, f.name) * times for f in fields(self)))


@dataclass(frozen=True)
class Scores:
    """What N pictures are worth: float64, NaN where missing.

    `value_N` is the weighted sum of R rewards, and `rewards_NR` what each of them counts with before its weight. `ranking_N` is
    what selectors compare: the value, or a sum in which each reward was normalised within its group. `passed_N` is a strict
    verdict (1, 0, NaN for none).
    """

    value_N: Tensor
    ranking_N: Tensor
    passed_N: Tensor
    rewards_NR: Tensor


@dataclass(frozen=True)
class Pictures:
    """What N latents show: uint8 (N, H, W, 3) on the CPU, of videos (N, F, H, W, 3), and which of them are pictures, bool (N,).

    One that is not finite in every number is none: it is grey, and no reward sees it. `fault` says why the last such one is none.
    """

    images_NHWC: Tensor
    there_N: Tensor
    fault: str = ""

    def first(self, count: int) -> Pictures:
        return Pictures(self.images_NHWC[:count], self.there_N[:count], self.fault)


@dataclass(frozen=True)
class Preview:
    """What was seen of N living trajectories after the network call of `step`; `kept_N` says who went on."""

    step: int
    group_N: Tensor
    member_N: Tensor
    scores_N: Tensor
    kept_N: Tensor


@dataclass(frozen=True)
class Rollout:
    """N finished trajectories of P prompts, prompt-major. Rewards are float64 and NaN where missing.

    `ranking_N` is what selectors compare; `passed_N` is a strict verdict (1, 0, NaN for none); `rewards_NR` are the rewards that were mixed.
    `there_N` says whose picture is one (see `Pictures`). F finalists were rewarded; with a `final_keep` the N survivors are some of them, otherwise all.
    """

    prompts: tuple[Prompt, ...]
    condition: Condition
    trajectories: Trajectories
    images_NHWC: Tensor
    there_N: Tensor
    rewards_N: Tensor
    ranking_N: Tensor
    passed_N: Tensor
    rewards_NR: Tensor
    finalist_rewards_F: Tensor
    finalist_group_F: Tensor
    previews: tuple[Preview, ...]

    @property
    def group_N(self) -> Tensor:
        return self.trajectories.group_N
